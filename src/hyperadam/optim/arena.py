"""The memory of an optimizer: the state of all its parameters in one tensor of tiles.

Each parameter is a part of its own, so that one without a gradient is passed over and a state dict
can be cut by parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hyperadam.errors import OutOfMemoryError
from hyperadam.kernels import TILE, Lanes, TiledState, TileLayout, lay_out
from hyperadam.optim.memory import free_memory
from hyperadam.optim.sharding import local, own_share, spread_like
from hyperadam.rule import Rule, VariationalHyperAdamRule

CPU_ALLOCATOR = "DefaultCPUAllocator"
"""In the message of the RuntimeError that PyTorch raises where the system has no more memory."""

SCALARS = ("step", "coherence", "peak")
"""Keys in a state dict of what is one number."""


def scalars_of(rule: Rule, *, calibrate: bool) -> tuple[str, ...]:
    """Those of :data:`SCALARS` that a state has."""
    has = {"step": True, "coherence": calibrate, "peak": rule.has_peak}
    return tuple(name for name in SCALARS if has[name])


class Entry(dict[str, Tensor]):
    """A parameter's entry in ``optimizer.state``: its scalars and each field of the state, by the
    names that they have in a state dict, as views of an arena."""


class Unmade(dict[str, Tensor]):
    """The entry of a parameter whose state is still to be made: the names alone, which
    ``torch.distributed.checkpoint`` looks up to load them. False, as an empty dict is."""

    def __bool__(self) -> bool:
        return False


class Arena:
    """State and buffers for a list of parameters.

    Args:
        params: the parameters, on one device; of a DTensor what lies in this process.
        device: theirs; there may be no parameter.
        rule: whose state it is.
        dtype: of the computation.
        state_dtype: of the state.
        calibrate: keep the sum of the coherence too (:mod:`hyperadam.rule.coherence`).

    Attributes:
        index: each parameter's number.
        state: the tiles.
        lanes: the buffers of a step.
        steps_P: steps that each parameter has taken.
        scalars: what there is one number of for each parameter, by its key in a state dict.
        peak_S: the rule's ``peak_1``, if it has one: of all parameters together, so that it is one
            memory behind the scalars of that name.
        decay_K: of the fixed moments, with ``calibrate``.

    Raises:
        OutOfMemoryError: the state does not fit; the message has the bytes.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        device: torch.device,
        rule: Rule,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        *,
        calibrate: bool = False,
    ) -> None:
        self.layout = TileLayout.of(rule)
        self.index = {param: number for number, param in enumerate(params)}
        self.params = list(params)
        self.parts = lay_out([local(param).numel() for param in params])
        tiles = sum(part.num_tiles for part in self.parts)
        shape = (tiles, self.layout.num_rows, TILE)
        state_bytes = tiles * self.layout.num_rows * TILE * state_dtype.itemsize
        buffers = 2 + rule.has_variance
        buffer_bytes = tiles * TILE * buffers * dtype.itemsize
        free = free_memory(device) if device.type == "cpu" else None  # a GPU's allocator fails
        message = (
            f"the state of {sum(part.count for part in self.parts):,} parameters does not fit on "
            f"{device}: it needs {state_bytes:,} bytes, and {buffer_bytes:,} for buffers"
            + (f"; {free:,} are free" if free is not None else "")
            + " (`hyperadam estimate` tells in advance; state_dtype='bfloat16' halves the state)"
        )
        if free is not None and state_bytes + buffer_bytes > free:
            raise OutOfMemoryError(message)
        try:
            self.state = TiledState(torch.zeros(shape, dtype=state_dtype, device=device))
            lanes = torch.zeros(buffers, tiles * TILE, dtype=dtype, device=device)
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)):
                raise
            raise OutOfMemoryError(message) from error
        log_var = lanes[2] if rule.has_variance else None
        self.lanes = Lanes(lanes[0], lanes[1], log_var, direction=lanes[0])
        self.steps_P = torch.zeros(len(params), dtype=torch.int64, device=device)
        self.scalars = {"step": self.steps_P}
        self.peak_S: Tensor | None = None
        names = scalars_of(rule, calibrate=calibrate)
        if "coherence" in names:
            assert isinstance(rule, VariationalHyperAdamRule)
            self.scalars["coherence"] = self.steps_P.double()
            self.decay_K = torch.tensor(rule.moment_decays, dtype=torch.float64, device=device)
        if "peak" in names:
            self.peak_S = torch.zeros(1, dtype=torch.float64, device=device)
            self.scalars["peak"] = self.peak_S.expand(len(params))
        self._shapes = [local(param).shape for param in params]

    def view(self, lanes: Tensor, number: int) -> Tensor:
        """A parameter's share of a vector over all lanes, in its shape."""
        return lanes[self.parts[number].lanes].view(self._shapes[number])

    def _tiles(self, number: int) -> Tensor:
        return self.state.tiles_TRx[self.parts[number].tiles]

    def entry(self, number: int) -> Entry:
        """A parameter's entry in ``optimizer.state``."""
        tiles = self._tiles(number)
        fields = {key: tiles[:, self.layout.rows[f]] for f, key in keys(self.layout).items()}
        scalars = {key: values_P[number] for key, values_P in self.scalars.items()}
        return Entry(**scalars, **fields)

    def reset(self, number: int) -> None:
        """Set a parameter's state to that before its first step."""
        self._tiles(number).zero_()
        for name, values_P in self.scalars.items():
            if name != "peak":
                values_P[number] = 0
        if self.peak_S is not None and not bool(self.steps_P.any()):
            self.peak_S.zero_()  # it was the last one
        self.state.squares = None

    def load(self, number: int, fields: Mapping[str, Tensor]) -> None:
        """Take up a parameter's state from :meth:`fields`, or from one over all processes."""
        param, part = self.params[number], self.parts[number]
        columns = {
            field: own_share(fields[key], param).reshape(part.count, *self.layout.widths[field])
            for field, key in keys(self.layout).items()
        }
        self.layout.pack(columns, self._tiles(number))
        for key, values_P in self.scalars.items():
            values_P[number] = fields[key]
        self.state.squares = None

    def fields(self, number: int) -> dict[str, Tensor]:
        """A parameter's state in the form of a state dict: its scalars, and each field as a tensor
        of shape (*param.shape, *width), with memory of its own, a DTensor where the parameter is.
        """
        shape, tiles = self._shapes[number], self._tiles(number)
        found = self.layout.unpack(tiles, shape.numel())
        columns = {
            key: _apart(found[field].reshape(*shape, *self.layout.widths[field]), tiles)
            for field, key in keys(self.layout).items()
        }
        param = self.params[number]
        scalars = {key: values_P[number].clone() for key, values_P in self.scalars.items()}
        return scalars | {key: spread_like(values, param) for key, values in columns.items()}


def _apart(values: Tensor, tiles: Tensor) -> Tensor:
    """Contiguous values in memory of their own; what lies in one tile is a view of it till here."""
    shared = values.untyped_storage().data_ptr() == tiles.untyped_storage().data_ptr()
    return values.clone(memory_format=torch.contiguous_format) if shared else values.contiguous()


def keys(layout: TileLayout) -> dict[str, str]:
    """The rule's names of the state's fields, and their keys in a state dict."""
    return {field: field.rsplit("_", 1)[0] for field in layout.rows}
