"""The order of the fused passes, the same for every kernel that has them.

Coordinates meet only in column norms, so a step is three passes over the state with sums between
them: features; state cell; Adam, weight and var cells with the sample. The sums of squares of h
and m, which the next step needs first, are gathered by the passes that write them. With
``variance_base`` two passes follow, over the update and one row of the state, with sums between.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperadam.kernels.tiled import FlaggedReduce, Lanes, TiledRule, TiledState
from hyperadam.kernels.tiles import Part
from hyperadam.rule import Reduce, Rule, VariationalHyperAdamRule
from hyperadam.rule.normalize import EPSILON
from hyperadam.rule.var_block import SMALLEST_SQUARE, level, mean_squares

MAX_CHANNELS = 32
MAX_DECAYS = 8

Plan = Any
"""Parts in the form that a kernel takes; each kernel has its own."""


def why_not(rule: Rule) -> str | None:
    """Why the fused passes can't serve a rule; None where they can."""
    if not isinstance(rule, VariationalHyperAdamRule):
        return f"it serves {VariationalHyperAdamRule.name} only, not {rule.name}"
    for name in ("lstm", "preprocessing"):
        if not getattr(rule, name):
            return f"it does not have {name}=False"
    if rule.state_layers != 1:
        return f"it has one state layer, not {rule.state_layers}"
    if rule.channels > MAX_CHANNELS:
        return f"it has at most {MAX_CHANNELS} channels, not {rule.channels}"
    if len(rule.moment_decays) > MAX_DECAYS:
        return f"it has at most {MAX_DECAYS} moment decays, not {len(rule.moment_decays)}"
    return None


class Passes(abc.ABC):
    """The passes of one rule with one theta on one device.

    Sums are float64 of shape (S, H). A pass reads ``tiles`` and writes ``new_tiles``, which may be
    the same tensor; where ``finite`` is False it writes nothing there.
    """

    rule: VariationalHyperAdamRule

    @abc.abstractmethod
    def plan(self, parts: tuple[Part, ...]) -> Plan:
        """The parts in the form that the passes take."""

    @abc.abstractmethod
    def features(
        self, plan: Plan, steps_P: Tensor, tiles: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of x squared, and whether the gradient is finite (bool, shape ()), as
        :func:`~hyperadam.kernels.tiled.is_finite` has it."""

    @abc.abstractmethod
    def squares(self, plan: Plan, tiles: Tensor, field: str) -> Tensor:
        """Sums of the squares of ``h_NLH`` or ``m_NH``."""

    @abc.abstractmethod
    def state_cell(
        self,
        plan: Plan,
        steps_P: Tensor,
        tiles: Tensor,
        new_tiles: Tensor,
        grad: Tensor,
        scale_SC: Tensor,
        finite: Tensor,
    ) -> Tensor:
        """New fixed moments, h and c; returns the sums of the new h squared.

        ``scale`` is of the columns [x, h], of shape (S, 2H), in the dtype of the computation.
        """

    @abc.abstractmethod
    def adam_cell(
        self,
        plan: Plan,
        steps_P: Tensor,
        tiles: Tensor,
        new_tiles: Tensor,
        lanes: Lanes,
        scale_SC: Tensor,
        finite: Tensor,
    ) -> Tensor:
        """New m, v and corrections, and the update; returns the sums of the new m squared.

        ``scale`` is of the columns [m, h]: m before the step, h after it.
        """

    @abc.abstractmethod
    def variance_sums(self, plan: Plan, steps_P: Tensor, tiles: Tensor, lanes: Lanes) -> Tensor:
        """Sums of the fixed moment of the longest memory, corrected, and of the update's mean
        squared: float64 of shape (S, 2). It follows ``adam_cell``, and reads the new tiles;
        rules without ``variance_base`` need neither it nor the next."""

    @abc.abstractmethod
    def shape_variance(
        self,
        plan: Plan,
        steps_P: Tensor,
        tiles: Tensor,
        lanes: Lanes,
        moment_S: Tensor,
        level_S: Tensor,
        finite: Tensor,
    ) -> None:
        """Multiplies variances by the level and by what
        :func:`~hyperadam.rule.var_block.narrowing` is for their coordinates, and what samples add
        to the mean by the roots of both.

        ``moment`` is the mean of that fixed moment over each segment, at least
        :data:`~hyperadam.rule.var_block.SMALLEST_SQUARE`; ``level`` is
        :func:`~hyperadam.rule.var_block.level`. Both are float64.
        """


def column_scales(
    sums_SC: Tensor,
    counts_S: Tensor,
    rule: VariationalHyperAdamRule,
    dtype: torch.dtype,
    reduce: Reduce | None,
) -> Tensor:
    """What unit_columns multiplies each column with: of shape (S, C), in the dtype asked for."""
    if reduce is not None:
        joined = reduce(torch.cat([sums_SC, counts_S.unsqueeze(-1)], dim=-1))
        sums_SC, counts_S = joined[..., :-1], joined[..., -1]
    if rule.column_norm == "rms":
        sums_SC = sums_SC / counts_S.clamp_min(1).unsqueeze(-1)
    return torch.rsqrt(sums_SC + EPSILON).to(dtype)


def segment_counts(parts: Sequence[Part], device: torch.device) -> Tensor:
    """Coordinates of each segment, float64 of shape (S,)."""
    counts = [0] * (1 + max(part.segment for part in parts))
    for part in parts:
        counts[part.segment] += part.count
    return torch.tensor(counts, dtype=torch.float64, device=device)


class FusedTiledRule(TiledRule):
    """Variational HyperAdam by fused passes.

    Args:
        passes: of the kernel.
    """

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self._parts: tuple[Part, ...] = ()

    def _prepare(self, parts: tuple[Part, ...], device: torch.device) -> None:
        """Plan for the parts, kept while they stay the same."""
        if parts != self._parts:
            self._plan = self.passes.plan(parts)
            self._counts_S = segment_counts(parts, device)
            self._parts = parts

    def step(
        self,
        state: TiledState,
        parts: Sequence[Part],
        steps_P: Tensor,
        lanes: Lanes,
        reduce: Reduce | None = None,
        peak_S: Tensor | None = None,
    ) -> Tensor:
        passes, tiles, dtype = self.passes, state.tiles_TRx, lanes.grad.dtype
        self._prepare(tuple(parts), tiles.device)
        plan, counts_S = self._plan, self._counts_S
        x_SH, finite = passes.features(plan, steps_P, tiles, lanes.grad)
        flagged = None if reduce is None else FlaggedReduce(reduce, finite)
        if flagged is None and finite.device.type == "cpu" and not bool(finite):
            return finite
        if state.squares is None or state.squares_of != self._parts:
            state.squares = (
                passes.squares(plan, tiles, "h_NLH"),
                passes.squares(plan, tiles, "m_NH"),
            )
            state.squares_of = self._parts
        old_h_SH, old_m_SH = state.squares
        joined = torch.cat([x_SH, old_h_SH], -1)
        scale = column_scales(joined, counts_S, passes.rule, dtype, flagged)
        if flagged is not None:
            finite = flagged.finite
            if finite.device.type == "cpu" and not bool(finite):
                return finite
        h_SH = passes.state_cell(plan, steps_P, tiles, tiles, lanes.grad, scale, finite)
        joined = torch.cat([old_m_SH, h_SH], -1)
        scale = column_scales(joined, counts_S, passes.rule, dtype, flagged)
        m_SH = passes.adam_cell(plan, steps_P, tiles, tiles, lanes, scale, finite)
        # In their place, so that a CUDA graph's next replay finds them; where the gradient is not
        # finite, which is not known here on a GPU, the old sums stay.
        old_h_SH.copy_(torch.where(finite, h_SH, old_h_SH))
        old_m_SH.copy_(torch.where(finite, m_SH, old_m_SH))
        if passes.rule.variance_base is not None:
            assert peak_S is not None
            sums_S2 = passes.variance_sums(plan, steps_P, tiles, lanes)
            moment_S, mean_S = mean_squares(sums_S2[:, 0], sums_S2[:, 1], counts_S, flagged)
            new_peak_S = torch.maximum(peak_S, moment_S)
            level_S = level(moment_S, new_peak_S, mean_S)
            moment_S = moment_S.clamp_min(SMALLEST_SQUARE)
            passes.shape_variance(plan, steps_P, tiles, lanes, moment_S, level_S, finite)
            peak_S.copy_(torch.where(finite, new_peak_S, peak_S))
        return finite
