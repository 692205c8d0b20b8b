"""Parameters that are spread over processes: which of their numbers lie here, and sums over all.

A parameter may be a DTensor (FSDP2), of which this process has some rows; or it is whole, and other
processes have other parameters (ZeRO). The rule needs two things of either: the place of a local
coordinate among those of all processes, for its noise, and sums over all processes, for its column
norms.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperadam.errors import ConfigError
from hyperadam.rule import Reduce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_dtensor(tensor: object) -> bool:
    """Whether this is a tensor of ``torch.distributed.tensor``, which is not imported to tell."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """A tensor's numbers in this process, in the tensor's memory; complex ones as pairs of real
    numbers."""
    own: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return torch.view_as_real(own) if own.is_complex() else own


def count_everywhere(param: Tensor) -> int:
    """How many real numbers a parameter has, over all processes."""
    return param.numel() * (2 if param.is_complex() else 1)


def real_shape(param: Tensor) -> tuple[int, ...]:
    """A parameter's shape over all processes, a complex one's as pairs of real numbers."""
    return (*param.shape, 2) if param.is_complex() else tuple(param.shape)


def first_row(param: Any) -> int:
    """The number of a parameter's first local row."""
    if not is_dtensor(param) or param.dim() == 0:
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    return int(offset[0])


def first_coordinate(param: Tensor) -> int:
    """The place of a parameter's first local number among all of its own."""
    row = first_row(param)
    return row * (count_everywhere(param) // param.shape[0]) if row else 0


def spread_like(values: Tensor, param: Any) -> Tensor:
    """Values of this process as a DTensor, where the parameter is one, spread over processes as it.

    Args:
        values: of shape (*local(param).shape, ...).
        param: the parameter.
    """
    if not is_dtensor(param):
        return values
    from torch.distributed.tensor import DTensor

    shape = values.shape if param.dim() == 0 else (param.shape[0], *values.shape[1:])
    meta = torch.empty(shape, device="meta")
    return DTensor.from_local(
        values,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=meta.shape,
        stride=meta.stride(),
    )


def own_share(saved: Any, param: Any) -> Tensor:
    """What this process needs of a value that :func:`spread_like` made, or of the whole value.

    Raises:
        ConfigError: it is spread over processes in another way than the parameter.
    """
    whole: Tensor
    if is_dtensor(saved):
        if not is_dtensor(param):
            whole = saved.full_tensor()
            return whole
        if saved.device_mesh != param.device_mesh or saved.placements != param.placements:
            raise ConfigError(
                f"the saved state is spread over processes as {saved.placements}, its parameter as "
                f"{param.placements}: load it with torch.distributed.checkpoint"
            )
        whole = saved.to_local()
        return whole
    whole = saved
    if is_dtensor(param) and param.dim() > 0:
        whole = whole[first_row(param) : first_row(param) + len(local(param))]
    return whole


class GroupSum:
    """Sums vectors over the processes of a group (a :data:`~hyperadam.rule.Reduce`)."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __call__(self, sums: Tensor) -> Tensor:
        from torch import distributed

        total = sums.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=self.group)
        return total


def sum_over_shards(params: Iterable[Tensor]) -> Reduce | None:
    """How to sum over the processes that these parameters are spread over; None: they are whole.

    Raises:
        ConfigError: they are not all spread in one way, or not by their rows (``Shard(0)``, as
            FSDP2 does): column norms run over all coordinates, and each has to be counted once.
    """
    spread = {_rows_of(param) if is_dtensor(param) else None for param in params}
    if len(spread) > 1:
        raise ConfigError(
            "some parameters are spread over processes and others not, or in another way: "
            "fully_shard the whole model on one mesh, since column norms run over all parameters"
        )
    found = spread.pop() if spread else None
    if found is None:
        return None
    mesh, dim = found
    return GroupSum(mesh.get_group(dim))


def _rows_of(param: Any) -> tuple[Any, int] | None:
    """The mesh and its dimension over which a DTensor's rows are spread; None: it is replicated."""
    from torch.distributed.tensor import Replicate, Shard

    dims = []
    for dim, placement in enumerate(param.placements):
        if placement == Shard(0):
            dims.append(dim)
        elif not isinstance(placement, Replicate):
            raise ConfigError(
                f"a parameter is placed as {placement} on dimension {dim} of its mesh: only "
                f"Shard(0) and Replicate can be served, as fully_shard (FSDP2, HSDP) has them; "
                f"tensor parallelism can't"
            )
    if len(dims) > 1:
        raise ConfigError(
            f"a parameter's rows are spread over {len(dims)} dimensions of its mesh: only one can "
            f"be served"
        )
    return (param.device_mesh, dims[0]) if dims else None
