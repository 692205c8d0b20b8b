"""A rule's steps as a function of theta that can be differentiated, over B tasks at once.

Shapes: B independent tasks, N coordinates each, H channels. A task's columns have norms of their
own; the tasks share theta and the step's number and nothing else.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyperadam.rule import Rule, RuleState, Theta, UpdateDistribution, standard_normal

CPU = torch.device("cpu")


def _map_columns(state: RuleState, function: Callable[[Tensor], Tensor]) -> RuleState:
    """The state with ``function`` applied to all its tensors but ``step``."""
    columns = {name: value for name, value in state.tensors().items() if name != "step"}
    return RuleState(state.step, **{name: function(value) for name, value in columns.items()})


class Carry(abc.ABC):
    """What an unroll hands to the next, in its program's own form; no graph is behind it."""

    @abc.abstractmethod
    def unpack(self) -> RuleState:
        """The state of B tasks."""


class RuleUnroll(abc.ABC):
    """The steps of one unroll.

    It belongs to one call of :meth:`DifferentiableRule.begin`: what a program keeps for the
    backward pass lives in this object and in the graph of the updates, and goes with them.
    """

    @abc.abstractmethod
    def step(self, grad_BN: Tensor) -> UpdateDistribution:
        """One step.

        Args:
            grad_BN: the gradients, constants: no derivative is taken with respect to them.

        Returns:
            The distribution of the update directions, each of its tensors of shape (B, N);
            differentiable by theta, also through the state of the steps before.
        """

    @abc.abstractmethod
    def carry(self) -> Carry:
        """The state after the steps so far, as ``begin`` takes it."""


class DifferentiableRule(abc.ABC):
    """A program for a rule's step and its derivative by theta.

    A state of B tasks is a :class:`RuleState` whose tensors have a leading dimension B, also
    where B = 1, but for ``step``, of shape (): the tasks take their steps together.

    Args:
        rule: the update rule.
        device: where the state is.
    """

    def __init__(self, rule: Rule, device: torch.device = CPU) -> None:
        self.rule = rule
        self.device = device

    def init_state(
        self, num_tasks: int, num_coordinates: int, dtype: torch.dtype = torch.float32
    ) -> Carry:
        """The state of B tasks before the first step."""
        state = self.rule.init_state(num_coordinates, dtype=dtype, device=self.device)
        return self.pack(
            _map_columns(state, lambda value: value.expand(num_tasks, *value.shape).clone())
        )

    def noise(self, seeds: Sequence[int], steps_T: Tensor, num_coordinates: int) -> Tensor:
        """Standard normal numbers (T, B, N) of float32, the same from every program.

        Args:
            seeds: one a task.
            steps_T: numbers of the steps, from 1.
            num_coordinates: N.
        """
        noises = [
            standard_normal(seed, steps_T, 0, num_coordinates, device=self.device) for seed in seeds
        ]
        return torch.stack(noises, dim=1)

    @abc.abstractmethod
    def pack(self, state: RuleState) -> Carry:
        """The state of B tasks, with no graph behind it, in the form that ``begin`` takes."""

    @abc.abstractmethod
    def begin(self, theta: Theta, carry: Carry, length: int) -> RuleUnroll:
        """Begin an unroll.

        Args:
            theta: meta-parameters, of the state's dtype and device.
            carry: of B tasks, from this rule. It stays as it is.
            length: how many steps the unroll will have.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class _ReferenceCarry(Carry):
    state: RuleState

    def unpack(self) -> RuleState:
        return self.state


class ReferenceRule(DifferentiableRule):
    """The rule's own PyTorch code under autograd."""

    def pack(self, state: RuleState) -> Carry:
        return _ReferenceCarry(state)

    def begin(self, theta: Theta, carry: Carry, length: int) -> RuleUnroll:
        return _ReferenceUnroll(self.rule, theta, carry.unpack())


class _ReferenceUnroll(RuleUnroll):
    def __init__(self, rule: Rule, theta: Theta, state: RuleState) -> None:
        self.rule = rule
        self.theta = theta
        # One task goes without the leading dimension: its bits are those of Rule.step alone.
        self.single = len(state.h_NLH) == 1
        self.state = _map_columns(state, lambda value: value[0]) if self.single else state

    def step(self, grad_BN: Tensor) -> UpdateDistribution:
        if not self.single:
            update, self.state = self.rule.step(self.theta, self.state, grad_BN)
            return update
        update, self.state = self.rule.step(self.theta, self.state, grad_BN[0])
        return update.map(lambda value_N: value_N.unsqueeze(0))

    def carry(self) -> Carry:
        state = self.state.map(Tensor.detach)
        if self.single:
            state = _map_columns(state, lambda value: value.unsqueeze(0))
        return _ReferenceCarry(state)
