"""The meta-gradient from perturbations of theta, without backpropagation.

Truncated backpropagation sees what theta does within one unroll: what is best for the next twenty
steps, which is not what is best for a run of two thousand (Wu et al., "Understanding short-horizon
bias in stochastic meta-optimization", ICLR 2018). Here an inner run has copies, each under a theta
of its own from its first step to its last, so that an unroll's losses show what theta did to all
steps before (evolution strategies with one perturbation a run: Vicol, "Low-variance gradient
estimation in unrolled computation graphs with ES-Single", ICML 2023).

Shapes: B inner runs, P perturbations of each, C = 2 B P copies, which are run by run and in pairs:
``theta + scale * epsilon`` and ``theta - scale * epsilon``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from hyperadam.kernels import Carry, DifferentiableRule, RuleUnroll
from hyperadam.rule import RuleState, Theta, UpdateDistribution
from hyperadam.tasks import make_generator


class Perturbations:
    """The perturbations of B inner runs: standard normal numbers, a function of the runs' seeds.

    Args:
        theta: what is perturbed: all of theta, or the part that is trained.
        run_seeds: B of them.
        pairs: P.
        scale: the standard deviation of what is added to theta.

    Attributes:
        copies: of each run, 2 P.
    """

    def __init__(self, theta: Theta, run_seeds: Sequence[int], pairs: int, scale: float) -> None:
        self.copies = 2 * pairs
        self.scale = scale
        runs = [make_generator(seed, "perturbations") for seed in run_seeds]
        self._epsilons = {  # B P of each of theta's tensors
            name: torch.cat([torch.randn(pairs, *value.shape, generator=run) for run in runs])
            for name, value in theta.items()
        }

    def thetas(self, theta: Theta) -> list[dict[str, Tensor]]:
        """All of theta as each of the C copies has it."""
        steps = {
            name: self.scale * epsilon_PX.to(theta[name])
            for name, epsilon_PX in self._epsilons.items()
        }
        return [
            {**theta, **{name: theta[name] + sign * step[pair] for name, step in steps.items()}}
            for pair in range(len(next(iter(steps.values()))))
            for sign in (1, -1)
        ]

    def meta_loss(self, theta: Theta, loss_C: Tensor) -> Tensor:
        """The mean of the copies' meta-losses, with the estimated meta-gradient for a derivative.

        That is the mean over pairs of ``(loss_plus - loss_minus) / (2 scale) * epsilon``.
        """
        plus, minus = loss_C.detach().view(-1, 2).unbind(1)
        slopes = (plus - minus) / (2 * self.scale * len(plus))
        along = torch.stack(
            [
                (torch.tensordot(slopes, epsilon_PX.to(slopes), dims=1) * theta[name]).sum()
                for name, epsilon_PX in self._epsilons.items()
            ]
        ).sum()
        return loss_C.mean() + along - along.detach()


@dataclasses.dataclass(frozen=True, eq=False)
class _Copies(Carry):
    """One for each copy."""

    carries: list[Carry]

    def unpack(self) -> RuleState:
        states = [carry.unpack().tensors() for carry in self.carries]
        columns = {
            name: torch.cat([state[name] for state in states])
            for name in states[0]
            if name != "step"
        }
        return RuleState(states[0]["step"], **columns)


class _UnrollOfCopies(RuleUnroll):
    def __init__(self, unrolls: list[RuleUnroll]) -> None:
        self.unrolls = unrolls

    def step(self, grad_BN: Tensor) -> UpdateDistribution:
        updates = [
            unroll.step(grad_1N)
            for unroll, grad_1N in zip(self.unrolls, grad_BN.split(1), strict=True)
        ]
        present = [name for name, value in vars(updates[0]).items() if value is not None]
        return UpdateDistribution(
            **{name: torch.cat([vars(update)[name] for update in updates]) for name in present}
        )

    def carry(self) -> Carry:
        return _Copies([unroll.carry() for unroll in self.unrolls])


class PerturbedRule(DifferentiableRule):
    """A rule whose tasks, the C copies, have each a theta of their own.

    Args:
        program: of the rule.
        perturbations: that theta has.
    """

    def __init__(self, program: DifferentiableRule, perturbations: Perturbations) -> None:
        super().__init__(program.rule, program.device)
        self.program = program
        self.perturbations = perturbations

    def noise(self, seeds: Sequence[int], steps_T: Tensor, num_coordinates: int) -> Tensor:
        """Numbers (T, C, N) for B seeds: a run's copies have the same."""
        noise_TBN = self.program.noise(seeds, steps_T, num_coordinates)
        return noise_TBN.repeat_interleave(self.perturbations.copies, dim=1)

    def pack(self, state: RuleState) -> Carry:
        columns = {name: value for name, value in state.tensors().items() if name != "step"}
        rows = zip(*(value.split(1) for value in columns.values()), strict=True)
        states = [RuleState(state.step, **dict(zip(columns, row, strict=True))) for row in rows]
        return _Copies([self.program.pack(one) for one in states])

    def begin(self, theta: Theta, carry: Carry, length: int) -> RuleUnroll:
        copies = carry if isinstance(carry, _Copies) else self.pack(carry.unpack())
        assert isinstance(copies, _Copies)
        thetas = self.perturbations.thetas(theta)
        return _UnrollOfCopies(
            [
                self.program.begin(own, one, length)
                for own, one in zip(thetas, copies.carries, strict=True)
            ]
        )
