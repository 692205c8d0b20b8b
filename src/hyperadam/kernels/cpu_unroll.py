"""The CPU kernel in meta-training: an unroll that keeps few states and recomputes the rest.

A rule's state depends on theta and the gradients alone, so what backpropagation needs of it can be
made again. An unroll of T steps keeps about sqrt(2 T) of its states; going back, it steps forward
again from the last one kept. The inside of each step is recomputed in C++, tile by tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyperadam.kernels.cpu import THETA_ORDER, CpuPasses, standard_normal
from hyperadam.kernels.differentiable import Carry, DifferentiableRule, RuleUnroll
from hyperadam.kernels.fused import column_scales, segment_counts
from hyperadam.kernels.tiled import Lanes
from hyperadam.kernels.tiles import TILE, Part, TileLayout, lay_out
from hyperadam.rule import RuleState, Theta, UpdateDistribution, VariationalHyperAdamRule
from hyperadam.rule.features import MOMENT_EPSILON


def states_to_keep(length: int) -> set[int]:
    """Steps whose states before them are kept, such that no more are there at any time going back.

    With M of them there is room for M - 1 steps made again behind the first, M - 2 behind the
    second and so on, so M (M - 1) / 2 steps at most; what is left goes to the last steps, which
    then need not be made again.
    """
    slots = 1
    while slots * (slots - 1) // 2 < length:
        slots += 1
    keep, start = set(), 0
    for stretch in range(slots - 1, 0, -1):
        if start < length:
            keep.add(start)
            start += stretch
    for step in reversed(range(length)):
        if len(keep) < slots:
            keep.add(step)
    return keep


class Tape:
    """What an unroll's backward steps need.

    Args:
        rule: the rule.
        theta: its meta-parameters, on the CPU, of float32 or float64.
        parts: independent problems, each a segment of its own.
        taken: steps that they have taken before.
        length: steps that will follow and be gone back over; 0 where none will be.
        instruction_set: see :class:`~hyperadam.kernels.cpu.CpuPasses`.
        spare: memory of states that are done with, of this tape and of those before and after it:
            fresh memory costs more than a step's arithmetic.
    """

    def __init__(
        self,
        rule: VariationalHyperAdamRule,
        theta: Theta,
        parts: Sequence[Part],
        taken: int,
        length: int,
        instruction_set: str | None = None,
        spare: list[Tensor] | None = None,
    ) -> None:
        self.kept: dict[int, Tensor] = {}
        """States before steps."""
        self.handed_out: set[int] = set()
        """Addresses of states that are somebody else's too."""
        self.spare: list[Tensor] = [] if spare is None else spare
        self.passes = CpuPasses(rule, theta, instruction_set=instruction_set)
        self.dtype = theta[THETA_ORDER[0]].dtype
        self.size = sum(value.numel() for value in theta.values())
        self.plan = self.passes.plan(parts)
        self.parts = parts
        self.counts_S = segment_counts(parts, torch.device("cpu"))
        self.kappa_S = torch.ones_like(self.counts_S, dtype=self.dtype)
        if rule.column_norm == "rms":
            self.kappa_S = (1 / self.counts_S.clamp_min(1)).to(self.dtype)
        self.taken = taken
        self.keep = states_to_keep(length)
        self.squares: tuple[Tensor, Tensor] | None = None
        self.grads: list[Tensor] = []
        self.scales: list[tuple[Tensor, Tensor]] = []
        self.returned: int | None = None
        self.owed_SC = torch.zeros(len(self.counts_S), 2 * rule.channels, dtype=self.dtype)
        self.owed_before: int | None = None

    def __del__(self) -> None:
        for tiles in self.kept.values():
            self._done_with(tiles)

    def _done_with(self, tiles: Tensor) -> None:
        if tiles.data_ptr() not in self.handed_out:
            self.spare.append(tiles)

    def _memory(self, like: Tensor) -> Tensor:
        """Tiles of any content; each pass over all parts writes all of them."""
        while self.spare:
            tiles = self.spare.pop()
            if tiles.shape == like.shape and tiles.dtype == like.dtype:
                return tiles
        return torch.empty_like(like)

    def hand_out(self) -> Tensor:
        """The state after the last step, never to be written again."""
        self.handed_out.add(self.last.data_ptr())
        return self.last

    def _steps(self, index: int) -> Tensor:
        return torch.full((len(self.parts),), self.taken + index + 1)

    def _lanes(self, grad: Tensor) -> Lanes:
        log_var = torch.empty_like(grad) if self.passes.rule.has_variance else None
        return Lanes(grad, torch.empty_like(grad), log_var, direction=None)

    def forward(self, tiles: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """One more step: the state after it, mean and log-variance over all lanes."""
        passes, plan, index = self.passes, self.plan, len(self.grads)
        if index == 0:
            self.handed_out.add(tiles.data_ptr())
        steps_P, finite = self._steps(index), torch.tensor(True)
        x_SH, _ = passes.features(plan, steps_P, tiles, grad)
        if self.squares is None:
            self.squares = (
                passes.squares(plan, tiles, "h_NLH"),
                passes.squares(plan, tiles, "m_NH"),
            )
        old_h_SH, old_m_SH = self.squares
        new_tiles, lanes = self._memory(tiles), self._lanes(grad)
        state_scale = self._scale(x_SH, old_h_SH)
        h_SH = passes.state_cell(plan, steps_P, tiles, new_tiles, grad, state_scale, finite)
        adam_scale = self._scale(old_m_SH, h_SH)
        m_SH = passes.adam_cell(plan, steps_P, tiles, new_tiles, lanes, adam_scale, finite)
        self.squares = (h_SH, m_SH)
        self.grads.append(grad)
        self.scales.append((state_scale, adam_scale))
        # Detached: a tensor with a graph would hold the tape that holds the tensor.
        if index in self.keep:
            self.kept[index] = tiles.detach()
        else:
            self._done_with(tiles.detach())
        self.last = new_tiles.detach()
        return new_tiles, lanes.mean, lanes.log_var

    def _scale(self, *sums_SH: Tensor) -> Tensor:
        sums_SC = torch.cat(sums_SH, -1)
        return column_scales(sums_SC, self.counts_S, self.passes.rule, self.dtype, None)

    def _again(self, index: int, tiles: Tensor) -> Tensor:
        """The state after a step that was taken before."""
        new_tiles = self._memory(tiles)
        self.passes.program.again(
            self.plan,
            self._steps(index),
            tiles,
            new_tiles,
            self.grads[index],
            *self.scales[index],
            torch.get_num_threads(),
        )
        return new_tiles

    def _state(self, index: int) -> Tensor:
        """The state before a step, made from the last one kept where it is not there."""
        if index == len(self.grads):
            return self.last
        start = max(kept for kept in self.kept if kept <= index)
        for step in range(start, index):
            self.kept[step + 1] = self._again(step, self.kept[step])
        return self.kept[index]

    def backward(
        self,
        index: int,
        d_new_tiles: Tensor | None,
        d_mean: Tensor | None,
        d_log_var: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Gradients with respect to the state before a step and theta, from those after it.

        Those of exp_avg and exp_avg_sq are 0: the rule's features are data, as its gradients are.
        Steps come from the last to the first. What the column norms take from the gradients of m
        and h is owed: the next call, for the step before, subtracts it, or :meth:`settle`.
        """
        tiles, new_tiles = self._state(index), self._state(index + 1)
        grad = self.grads[index]
        # In place where the incoming tensor was made here, by the step behind, for this one alone.
        own = d_new_tiles is not None and d_new_tiles.data_ptr() == self.returned
        d_tiles = d_new_tiles if d_new_tiles is not None and own else self._memory(tiles)
        d_theta = torch.empty(self.size, dtype=self.dtype)
        state_scale, adam_scale = self.scales[index]
        zeros = torch.zeros_like(grad)
        d_var = zeros if d_log_var is None else d_log_var.contiguous()
        if d_new_tiles is None or self.owed_before != index + 1:
            self.owed_SC.zero_()
        self.passes.program.backward(
            self.plan,
            self._steps(index),
            tiles,
            new_tiles,
            grad,
            state_scale,
            adam_scale,
            self.kappa_S,
            zeros if d_mean is None else d_mean.contiguous(),
            d_var if self.passes.rule.has_variance else None,
            None if d_new_tiles is None else d_new_tiles.contiguous(),
            self.owed_SC,
            d_tiles,
            d_theta,
            torch.get_num_threads(),
        )
        if index + 1 in self.kept:
            self._done_with(self.kept.pop(index + 1))
        self.returned, self.owed_before = d_tiles.data_ptr(), index
        return d_tiles, d_theta

    def settle(self, index: int, d_tiles: Tensor) -> None:
        """Subtract what is owed to the gradient of the state before a step."""
        rows, tiles = self.passes.layout.rows, self._state(index)
        channels = self.passes.rule.channels
        for part in self.parts:
            inside = torch.arange(part.num_tiles * TILE).view(-1, 1, TILE) < part.count
            owed = self.owed_SC[part.segment].split(channels)
            for name, owed_H in zip(("m_NH", "h_NLH"), owed, strict=True):
                columns = tiles[part.tiles, rows[name]] * inside
                d_tiles[part.tiles, rows[name]] -= owed_H.unsqueeze(-1) * columns


def flatten_theta(theta: Theta) -> Tensor:
    """All of theta in one vector, in the kernel's order."""
    return torch.cat([theta[name].flatten() for name in THETA_ORDER if name in theta])


class FusedStep(torch.autograd.Function):
    """A step of a :class:`Tape`, differentiable by the state before it and by theta, whose tensors
    come flat, one behind the other (:func:`flatten_theta`): autograd then adds up one gradient a
    step."""

    @staticmethod
    def forward(
        ctx: Any, tape: Tape, grad: Tensor, tiles: Tensor, theta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.index = tape, len(tape.grads)
        return tape.forward(tiles, grad)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_new_tiles: Tensor | None,
        d_mean: Tensor | None,
        d_log_var: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        d_tiles, d_theta = ctx.tape.backward(ctx.index, d_new_tiles, d_mean, d_log_var)
        if not ctx.needs_input_grad[2]:
            ctx.tape.spare.append(d_tiles)
            return None, None, None, d_theta
        if ctx.index == 0:
            ctx.tape.settle(0, d_tiles)
        return None, None, d_tiles, d_theta


@dataclasses.dataclass(frozen=True, eq=False)
class _TiledCarry(Carry):
    layout: TileLayout
    parts: list[Part]
    """One a task, of one size."""
    taken: int
    tiles: Tensor
    peak_B1: Tensor

    @classmethod
    def zeros(
        cls, rule: VariationalHyperAdamRule, num_tasks: int, count: int, dtype: torch.dtype
    ) -> _TiledCarry:
        layout = TileLayout.of(rule)
        parts = [
            dataclasses.replace(part, segment=number)
            for number, part in enumerate(lay_out([count] * num_tasks))
        ]
        shape = (sum(part.num_tiles for part in parts), layout.num_rows, TILE)
        peak_B1 = torch.zeros(num_tasks, 1, dtype=torch.float64)
        return cls(layout, parts, 0, torch.zeros(shape, dtype=dtype), peak_B1)

    @classmethod
    def of(cls, rule: VariationalHyperAdamRule, state: RuleState) -> _TiledCarry:
        num_tasks, count = state.h_NLH.shape[:2]
        empty = cls.zeros(rule, num_tasks, count, state.h_NLH.dtype)
        for number, part in enumerate(empty.parts):
            fields = {name: state.tensors()[name][number] for name in empty.layout.rows}
            empty.layout.pack(fields, empty.tiles[part.tiles])
        return dataclasses.replace(empty, taken=int(state.step), peak_B1=state.peak_1)

    def unpack(self) -> RuleState:
        tasks = [self.layout.unpack(self.tiles[part.tiles], part.count) for part in self.parts]
        fields = {name: torch.stack([task[name] for task in tasks]) for name in self.layout.rows}
        return RuleState(step=torch.tensor(self.taken), peak_1=self.peak_B1, **fields)


class _CpuUnroll(RuleUnroll):
    def __init__(
        self,
        rule: VariationalHyperAdamRule,
        theta: Theta,
        carry: _TiledCarry,
        length: int,
        spare: list[Tensor],
    ) -> None:
        self.rule = rule
        self.theta = flatten_theta(theta)
        self.before = carry
        self.num_tasks, self.count = len(carry.parts), carry.parts[0].count
        back = length if torch.is_grad_enabled() else 0
        self.tape = Tape(rule, theta, carry.parts, carry.taken, back, spare=spare)
        self.tiles = carry.tiles.to(self.theta.dtype)
        self.peak_B1 = carry.peak_B1

    def step(self, grad_BN: Tensor) -> UpdateDistribution:
        lanes = grad_BN.new_zeros(self.num_tasks, self.before.parts[0].num_tiles * TILE)
        lanes[:, : self.count] = grad_BN
        self.tiles, mean, log_var = FusedStep.apply(
            self.tape, lanes.view(-1), self.tiles, self.theta
        )
        mean_BN = self._coordinates(mean)
        log_var_BN = None if log_var is None else self._coordinates(log_var)
        return UpdateDistribution(
            mean_N=mean_BN,
            log_var_N=None if log_var_BN is None else self._shaped(log_var_BN, mean_BN),
            prior_mean_N=self._direction() if self.rule.kl_prior_mean != "none" else None,
        )

    def _coordinates(self, lanes: Tensor) -> Tensor:
        return lanes.view(self.num_tasks, -1)[:, : self.count]

    def _shaped(self, log_var_BN: Tensor, mean_BN: Tensor) -> Tensor:
        """The log-variance with what ``variance_base`` adds."""
        if self.rule.variance_base is None:
            return log_var_BN
        row = self.before.layout.rows["exp_avg_sq_NK"].start + self.rule.longest_memory
        tiles_BTRx = self.tiles.detach().view(self.num_tasks, -1, *self.tiles.shape[1:])
        moment_BN = tiles_BTRx[:, :, row].flatten(1)[:, : self.count]
        step = torch.tensor(self._taken)
        added_BN, peak_B1 = self.rule.log_shape(moment_BN, mean_BN, step, self.peak_B1)
        self.peak_B1 = peak_B1.detach()  # data, as the moment is
        return log_var_BN + added_BN

    @property
    def _taken(self) -> int:
        """Steps taken so far."""
        return self.before.taken + len(self.tape.grads)

    def _direction(self) -> Tensor:
        """That of the first fixed moment, of shape (B, N)."""
        state = self._after(self.tiles.detach()).unpack()
        correction = 1 - self.rule.moment_decays[0] ** int(state.step)
        scale_BN = (state.exp_avg_sq_NK[..., 0] / correction).sqrt() + MOMENT_EPSILON
        return state.exp_avg_NK[..., 0] / correction / scale_BN

    def _after(self, tiles: Tensor) -> _TiledCarry:
        return dataclasses.replace(
            self.before, taken=self._taken, tiles=tiles, peak_B1=self.peak_B1
        )

    def carry(self) -> Carry:
        return self._after(self.tape.hand_out() if self.tape.grads else self.tiles)


class CpuRule(DifferentiableRule):
    """Variational HyperAdam by the CPU kernel, on theta of float32 or float64."""

    rule: VariationalHyperAdamRule

    def __init__(self, rule: VariationalHyperAdamRule) -> None:
        super().__init__(rule)
        self.spare: list[Tensor] = []

    def noise(self, seeds: Sequence[int], steps_T: Tensor, num_coordinates: int) -> Tensor:
        return standard_normal(seeds, steps_T, num_coordinates)

    def init_state(
        self, num_tasks: int, num_coordinates: int, dtype: torch.dtype = torch.float32
    ) -> Carry:
        return _TiledCarry.zeros(self.rule, num_tasks, num_coordinates, dtype)

    def pack(self, state: RuleState) -> Carry:
        return _TiledCarry.of(self.rule, state)

    def begin(self, theta: Theta, carry: Carry, length: int) -> RuleUnroll:
        own = carry if isinstance(carry, _TiledCarry) else _TiledCarry.of(self.rule, carry.unpack())
        return _CpuUnroll(self.rule, theta, own, length, self.spare)
