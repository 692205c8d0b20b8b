"""The memory of an optimizer: the state of all its parameters in one tensor of tiles.

Each parameter is a part of its own, so that one without a gradient is passed over and a state dict
can be cut by parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperadam.errors import OutOfMemoryError
from hyperadam.kernels import TILE, Lanes, TiledState, TileLayout, lay_out
from hyperadam.optim.memory import free_memory
from hyperadam.rule import Rule

CPU_ALLOCATOR = "DefaultCPUAllocator"
"""In the message of the RuntimeError that PyTorch raises where the system has no more memory."""


def as_real(tensor: Tensor) -> Tensor:
    """The tensor, a complex one as pairs of real numbers."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Arena:
    """State and buffers for a list of parameters.

    Args:
        params: the parameters, on one device.
        rule: whose state it is.
        dtype: of the computation.
        state_dtype: of the state.

    Attributes:
        index: each parameter's number.
        state: the tiles.
        lanes: the buffers of a step.
        steps_P: steps that each parameter has taken.

    Raises:
        OutOfMemoryError: the state does not fit; the message has the bytes.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        rule: Rule,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
    ) -> None:
        self.layout = TileLayout.of(rule)
        self.index = {param: number for number, param in enumerate(params)}
        self.parts = lay_out([as_real(param).numel() for param in params])
        device = params[0].device
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
        self._shapes = [as_real(param).shape for param in params]

    def view(self, lanes: Tensor, number: int) -> Tensor:
        """A parameter's share of a vector over all lanes, in its shape."""
        return lanes[self.parts[number].lanes].view(self._shapes[number])

    def entry(self, number: int) -> dict[str, Tensor]:
        """A parameter's entry in ``optimizer.state``: views of the arena."""
        tiles = self.state.tiles_TRx[self.parts[number].tiles]
        return {"step": self.steps_P[number], "tiles": tiles}

    def reset(self, number: int) -> None:
        """Set a parameter's state to that before its first step."""
        self.entry(number)["tiles"].zero_()
        self.steps_P[number] = 0
        self.state.squares = None

    def load(self, number: int, fields: dict[str, Tensor]) -> None:
        """Take up a parameter's state from :func:`named`."""
        part, tiles = self.parts[number], self.entry(number)["tiles"]
        columns = {
            field: fields[key].reshape(part.count, *self.layout.widths[field])
            for field, key in keys(self.layout).items()
        }
        self.layout.pack(columns, tiles)
        self.steps_P[number] = fields["step"]
        self.state.squares = None


def keys(layout: TileLayout) -> dict[str, str]:
    """The rule's names of the state's fields, and their keys in a state dict."""
    return {field: field.rsplit("_", 1)[0] for field in layout.rows}


def named(entry: dict[str, Any], param: Tensor, layout: TileLayout) -> dict[str, Tensor]:
    """A parameter's entry in the form of a state dict: ``step``, and each field of the state as a
    tensor of shape (*param.shape, *width), with copies of their own."""
    if "tiles" not in entry:  # loaded, and no step since
        return entry
    shape = as_real(param).shape
    fields = layout.unpack(entry["tiles"], shape.numel())
    return {"step": entry["step"].clone()} | {
        key: fields[field].reshape(*shape, *layout.widths[field]).contiguous()
        for field, key in keys(layout).items()
    }
