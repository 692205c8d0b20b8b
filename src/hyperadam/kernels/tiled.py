"""A step of a rule over tiles, in place: the one signature of all backends."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from hyperadam.kernels.tiles import Part, TileLayout
from hyperadam.rule import (
    SCALAR_FIELDS,
    Reduce,
    Rule,
    RuleState,
    Theta,
    rounding_words,
    standard_normal,
)


@dataclasses.dataclass(eq=False)
class TiledState:
    """A rule's state in tiles.

    Attributes:
        tiles_TRx: of shape (T, R, 32).
        squares: sums over each segment of the squares of h and of m, as they are in the tiles of
            the parts ``squares_of``: a cache, which any other change of the tiles must drop.
        squares_of: those parts.
    """

    tiles_TRx: Tensor
    squares: tuple[Tensor, Tensor] | None = None
    squares_of: tuple[Part, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Lanes:
    """What a step reads and writes for each lane of all tiles: vectors of 32 T numbers.

    Attributes:
        grad: the gradient, 0 in padding.
        mean: gets the mean of the update's distribution.
        log_var: gets the log of its variance; None for a deterministic rule.
        direction: gets what, times lr, is to be subtracted from the parameters: a sample or the
            mean. It may be the memory of ``grad``. None: not wanted.
    """

    grad: Tensor
    mean: Tensor
    log_var: Tensor | None
    direction: Tensor | None


LARGEST_GRADIENT = {torch.float32: 1e15, torch.float64: 1e140}
"""By the dtype of the computation: a gradient with a number beyond it counts as not finite. Sums of
squares over all coordinates still hold it; its own square would turn moments infinite for good."""


def is_finite(grad: Tensor) -> Tensor:
    """Whether a gradient can be used: bool of shape (), on its device.

    Args:
        grad: float32 or float64.

    Returns:
        False where it holds NaN, infinity or a number beyond :data:`LARGEST_GRADIENT`.
    """
    return (grad.abs() <= LARGEST_GRADIENT[grad.dtype]).all()


class FlaggedReduce:
    """A reduction whose first call tells, beside its sums, whether the gradient is finite on every
    shard, so that all of them step or none does.

    Args:
        reduce: the reduction.
        finite: whether this shard's gradient is, bool of shape ().

    Attributes:
        finite: after the first call, whether every shard's is.
    """

    def __init__(self, reduce: Reduce, finite: Tensor) -> None:
        self.reduce = reduce
        self.finite = finite
        self.called = False

    def __call__(self, sums: Tensor) -> Tensor:
        if self.called:
            return self.reduce(sums)
        self.called = True
        bad = (~self.finite).to(sums.dtype).reshape(1)
        joined = self.reduce(torch.cat([sums.flatten(), bad]))
        self.finite = joined[-1] == 0
        return joined[:-1].view(sums.shape)


class TiledRule(abc.ABC):
    """A rule with its theta on one device, applied to tiles."""

    @abc.abstractmethod
    def step(
        self,
        state: TiledState,
        parts: Sequence[Part],
        steps_P: Tensor,
        lanes: Lanes,
        reduce: Reduce | None = None,
        peak_S: Tensor | None = None,
    ) -> Tensor:
        """One step of ``parts``, in place; other tiles stay as they are.

        Args:
            state: of all tiles.
            parts: what takes a step.
            steps_P: the number of this step for each of them, from 1; int64, on the device.
            lanes: gradient in, update out.
            reduce: see :func:`~hyperadam.rule.normalize.unit_columns`. Its first vector has one
                number more, for whether the gradient is finite on all shards.
            peak_S: ``peak_1`` of each segment's state, float64, on the device; changed in place.
                None for a rule that has none (:attr:`~hyperadam.rule.Rule.has_peak`).

        Returns:
            bool of shape (), on the device: whether the gradient was finite, with no number
            beyond :data:`LARGEST_GRADIENT`. If not, the state is as it was, and what is in
            ``lanes`` means nothing.
        """


class ReferenceTiledRule(TiledRule):
    """Any rule, by its own PyTorch code; all parts must be of one segment.

    Args:
        rule: the rule.
        theta: its meta-parameters, whose dtype is that of the computation.
    """

    def __init__(self, rule: Rule, theta: Theta) -> None:
        self.rule = rule
        self.theta = theta
        self.layout = TileLayout.of(rule)

    def step(
        self,
        state: TiledState,
        parts: Sequence[Part],
        steps_P: Tensor,
        lanes: Lanes,
        reduce: Reduce | None = None,
        peak_S: Tensor | None = None,
    ) -> Tensor:
        grad_N = torch.cat([lanes.grad[part.lanes] for part in parts])
        finite = is_finite(grad_N)
        flagged = None if reduce is None else FlaggedReduce(reduce, finite)
        if flagged is None and not bool(finite):
            return finite
        counts = [part.count for part in parts]
        before = self._join(state, parts, steps_P - 1, peak_S, grad_N)
        update, new = self.rule.step(self.theta, before, grad_N, flagged)
        if flagged is not None:
            if not flagged.called:  # a rule without column norms
                flagged(grad_N.new_empty(0))
            finite = flagged.finite
            if not bool(finite):
                return finite
        noise_N = torch.cat(
            [
                standard_normal(
                    part.seed,
                    step,
                    part.noise_start,
                    part.count,
                    device=grad_N.device,
                    dtype=grad_N.dtype,
                )
                if part.sample
                else grad_N.new_zeros(part.count)
                for part, step in zip(parts, steps_P.tolist(), strict=True)
            ]
        )
        results = (
            (lanes.mean, update.mean_N),
            (lanes.log_var, update.log_var_N),
            (lanes.direction, update.sample(noise_N)),
        )
        for out, values_N in results:
            if out is not None and values_N is not None:
                for part, values in zip(parts, values_N.split(counts), strict=True):
                    out[part.lanes] = values
        self._scatter(new, state, parts, steps_P)
        if peak_S is not None:
            peak_S.copy_(new.peak_1)
        return finite

    def _join(
        self,
        state: TiledState,
        parts: Sequence[Part],
        taken_P: Tensor,
        peak_S: Tensor | None,
        like_N: Tensor,
    ) -> RuleState:
        """The parts' state as the rule has it."""
        pieces = [self.layout.unpack(state.tiles_TRx[part.tiles], part.count) for part in parts]
        fields = {
            field.name: torch.cat([piece[field.name] for piece in pieces]).to(like_N.dtype)
            if field.name in self.layout.rows
            else like_N.new_empty(len(like_N), 0)
            for field in dataclasses.fields(RuleState)
            if field.name not in SCALAR_FIELDS
        }
        counts = torch.tensor([part.count for part in parts], device=taken_P.device)
        same = bool((taken_P == taken_P[0]).all())
        step = taken_P[0] if same else taken_P.repeat_interleave(counts)
        assert (peak_S is not None) == self.rule.has_peak
        if peak_S is None:
            peak_S = torch.zeros(1, dtype=torch.float64, device=taken_P.device)
        return RuleState(step=step, peak_1=peak_S, **fields)

    def _scatter(
        self, new: RuleState, state: TiledState, parts: Sequence[Part], steps_P: Tensor
    ) -> None:
        end = 0
        for part, step in zip(parts, steps_P.tolist(), strict=True):
            here = slice(end, end := end + part.count)
            words = None
            if state.tiles_TRx.dtype == torch.bfloat16:
                words = rounding_words(
                    part.seed, step, part.noise_start, part.count, device=steps_P.device
                )
            fields = {name: new.tensors()[name][here] for name in self.layout.rows}
            self.layout.pack(fields, state.tiles_TRx[part.tiles], words)
        state.squares = None
