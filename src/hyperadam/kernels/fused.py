"""The order of the fused passes, the same for every kernel that has them.

Coordinates meet only in column norms, so a step is three passes over the state with sums between
them: features; state cell; Adam, weight and var cells with the sample. The sums of squares of h
and m, which the next step needs before anything else, are gathered on the way by the pass that
writes them.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hyperadam.kernels.tiles import TILE, Part, TileLayout
from hyperadam.rule import Reduce, VariationalHyperAdamRule
from hyperadam.rule.normalize import EPSILON

Plan = TypeVar("Plan")


@dataclasses.dataclass(frozen=True, eq=False)
class TiledUpdate:
    """What a step gives, over all lanes of all tiles; only the stepped parts' lanes mean something.

    Attributes:
        direction: what is to be subtracted, times lr, from the parameters.
        mean: of the update's distribution.
        log_var: of the update's distribution; None for a deterministic rule.
        finite: bool of shape (): whether the gradient was finite. If not, the state is as before
            and the rest means nothing.
    """

    direction: Tensor
    mean: Tensor
    log_var: Tensor | None
    finite: Tensor


@dataclasses.dataclass(eq=False)
class TiledState:
    """The state of a step's parts, in tiles.

    Attributes:
        tiles_TRx: of shape (T, R, 32).
        steps_P: steps taken by each part that there is, int64, on the same device.
        squares_S2H: sums over each segment of the squares of h and m as they are in the tiles, of
            the parts ``squares_of``; None where they are to be made.
    """

    tiles_TRx: Tensor
    steps_P: Tensor
    squares_S2H: Tensor | None = None
    squares_of: tuple[Part, ...] = ()


class Passes(abc.ABC, Generic[Plan]):
    """The passes of one rule with one theta on one device.

    Sums are float64 of shape (S, H). A pass reads ``tiles`` and writes ``new_tiles``, which may be
    the same tensor; a pass writes nothing where ``finite`` is False.
    """

    rule: VariationalHyperAdamRule

    @abc.abstractmethod
    def plan(self, parts: Sequence[Part]) -> Plan:
        """The parts in the form that the passes take."""

    @abc.abstractmethod
    def features(
        self, plan: Plan, steps_P: Tensor, tiles: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of x squared, and whether the gradient is finite (bool, shape ())."""

    @abc.abstractmethod
    def squares(self, plan: Plan, tiles: Tensor, field: str) -> Tensor:
        """Sums of the squares of the field ``h_NLH`` or ``m_NH``."""

    @abc.abstractmethod
    def state_cell(
        self,
        plan: Plan,
        steps_P: Tensor,
        tiles: Tensor,
        new_tiles: Tensor,
        grad: Tensor,
        scale_S2H: Tensor,
        finite: Tensor,
    ) -> Tensor:
        """New fixed moments, h and c; returns the sums of h squared. ``scale`` is of [x, h]."""

    @abc.abstractmethod
    def adam_cell(
        self,
        plan: Plan,
        steps_P: Tensor,
        tiles: Tensor,
        new_tiles: Tensor,
        grad: Tensor,
        scale_S2H: Tensor,
        finite: Tensor,
        mean: Tensor,
        log_var: Tensor | None,
        direction: Tensor | None,
    ) -> Tensor:
        """New m, v and corrections, and the update; returns the sums of m squared. ``scale`` is
        of [m, h], the m before the step and the h after it. ``direction`` may be ``grad``."""


def column_scales(
    sums_SC: Tensor, counts_S: Tensor, rule: VariationalHyperAdamRule, reduce: Reduce | None
) -> Tensor:
    """What unit_columns multiplies each column with: float32 of shape (S, C)."""
    if reduce is not None:
        joined = reduce(torch.cat([sums_SC, counts_S.unsqueeze(-1)], dim=-1))
        sums_SC, counts_S = joined[..., :-1], joined[..., -1]
    if rule.column_norm == "rms":
        sums_SC = sums_SC / counts_S.clamp_min(1).unsqueeze(-1)
    return torch.rsqrt(sums_SC + EPSILON).to(torch.float32)


def segment_counts(parts: Sequence[Part], device: torch.device) -> Tensor:
    """Coordinates of each segment, float64."""
    counts = [0] * (1 + max((part.segment for part in parts), default=0))
    for part in parts:
        counts[part.segment] += part.count
    return torch.tensor(counts, dtype=torch.float64, device=device)
