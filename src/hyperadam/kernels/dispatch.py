"""Which program computes a rule's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from hyperadam.errors import ConfigError, unknown_name
from hyperadam.kernels.differentiable import DifferentiableRule, ReferenceRule
from hyperadam.rule import Reduce, Rule, RuleState, Theta, UpdateDistribution

Backend = Literal["auto", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference")

StepFunction = Callable[
    [Theta, RuleState, Tensor, Reduce | None], tuple[UpdateDistribution, RuleState]
]


def step_function(rule: Rule, backend: str = "auto") -> StepFunction:
    """The step of ``rule`` in the chosen backend, with the signature of :meth:`Rule.step`.

    Args:
        rule: the update rule.
        backend: ``"reference"`` is the rule's own PyTorch code; ``"auto"`` takes the fastest
            that serves the rule, which today is the reference.

    Raises:
        ConfigError: an unknown backend.
    """
    _check(backend)
    return rule.step


def differentiable_rule(rule: Rule, backend: str = "auto") -> DifferentiableRule:
    """The steps of ``rule`` that can be differentiated by theta, in the chosen backend.

    Args:
        rule: the update rule.
        backend: as in :func:`step_function`.

    Raises:
        ConfigError: an unknown backend.
    """
    _check(backend)
    return ReferenceRule(rule)


def _check(backend: str) -> None:
    if backend not in BACKENDS:
        raise ConfigError(unknown_name("backend", backend, BACKENDS))
