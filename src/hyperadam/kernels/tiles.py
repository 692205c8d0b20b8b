"""How the kernels keep a rule's state: tiles of 32 coordinates.

A tile is a matrix of R rows by 32 coordinates; R counts all numbers of a coordinate's state. The
rows are the fields of :class:`~hyperadam.rule.RuleState` in their order. Everything about 32
coordinates so lies together, each row is a whole number of vector registers, and a pass over the
state reads memory from front to back.

Suffixes: T tiles, R rows, P parts, S segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hyperadam.rule import Rule, RuleState, round_stochastically

TILE = 32


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of coordinates that begins at a tile's first lane: a parameter, or an inner task.

    Lanes behind its last coordinate are padding. Their gradient must be 0; what the kernels leave
    in them is nobody's.

    Attributes:
        first_tile: where its tiles begin.
        count: its coordinates.
        segment: the independent problem that it belongs to; column norms run over a segment.
        noise_start: the number of its first coordinate in the noise.
        seed: of the noise.
        sample: whether its direction is sampled, or the mean.
    """

    first_tile: int
    count: int
    segment: int = 0
    noise_start: int = 0
    seed: int = 0
    sample: bool = True

    @property
    def num_tiles(self) -> int:
        return num_tiles(self.count)

    @property
    def tiles(self) -> slice:
        """Its tiles among all."""
        return slice(self.first_tile, self.first_tile + self.num_tiles)

    @property
    def lanes(self) -> slice:
        """Its coordinates among all tiles' lanes."""
        start = self.first_tile * TILE
        return slice(start, start + self.count)


def num_tiles(count: int) -> int:
    """How many tiles hold ``count`` coordinates."""
    return -(-count // TILE)


def lay_out(counts: Sequence[int]) -> list[Part]:
    """Parts of these sizes, one behind the other."""
    parts, tile, coordinate = [], 0, 0
    for count in counts:
        parts.append(Part(tile, count, noise_start=coordinate))
        tile += num_tiles(count)
        coordinate += count
    return parts


@dataclasses.dataclass(frozen=True)
class TileLayout:
    """Where the fields of a rule's state lie in a tile.

    Attributes:
        rows: the rows of each field.
        widths: a field's dimensions after the coordinate.
    """

    rows: Mapping[str, slice]
    widths: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, rule: Rule) -> TileLayout:
        widths = rule.state_widths()
        order = [field.name for field in dataclasses.fields(RuleState) if field.name in widths]
        rows, start = {}, 0
        for name in order:
            size = torch.Size(widths[name]).numel()
            rows[name] = slice(start, start + size)
            start += size
        return cls(rows, {name: widths[name] for name in order})

    @property
    def num_rows(self) -> int:
        """R."""
        return max((rows.stop for rows in self.rows.values()), default=0)

    def unpack(self, tiles_TRx: Tensor, count: int) -> dict[str, Tensor]:
        """The fields of ``count`` coordinates, each of shape (count, *width)."""
        return {name: self.field(name, tiles_TRx, count) for name in self.rows}

    def field(self, name: str, tiles_TRx: Tensor, count: int) -> Tensor:
        """One of them alone, (count, *width)."""
        rows = self.rows[name]
        columns = tiles_TRx[:, rows].transpose(1, 2).reshape(-1, rows.stop - rows.start)
        return columns[:count].reshape(count, *self.widths[name])

    def pack(
        self,
        fields: Mapping[str, Tensor],
        tiles_TRx: Tensor,
        rounding_words_N: Tensor | None = None,
    ) -> None:
        """Write fields of shape (count, *width) into tiles; padding becomes 0.

        Args:
            fields: by name.
            tiles_TRx: the tiles of these coordinates.
            rounding_words_N: from :func:`~hyperadam.rule.rounding_words`, for tiles of bfloat16:
                rounds stochastically what accumulates, which is all but h. None: to nearest.
        """
        for name, rows in self.rows.items():
            width = rows.stop - rows.start
            columns = fields[name].reshape(-1, width)
            if rounding_words_N is not None and name != "h_NLH":
                columns = round_stochastically(columns, rounding_words_N, rows.start)
            padded = tiles_TRx.new_zeros(len(tiles_TRx) * TILE, width)
            padded[: len(columns)] = columns
            tiles_TRx[:, rows] = padded.view(-1, TILE, width).transpose(1, 2)
