"""Programs that compute a rule's step, behind one signature."""

from hyperadam.kernels.differentiable import DifferentiableRule, ReferenceRule, RuleUnroll
from hyperadam.kernels.dispatch import (
    BACKENDS,
    Backend,
    StepFunction,
    differentiable_rule,
    step_function,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "DifferentiableRule",
    "ReferenceRule",
    "RuleUnroll",
    "StepFunction",
    "differentiable_rule",
    "step_function",
]
