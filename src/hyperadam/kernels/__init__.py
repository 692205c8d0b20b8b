"""Programs that compute a rule's step, behind one signature."""

from hyperadam.kernels.dispatch import BACKENDS, Backend, StepFunction, step_function

__all__ = ["BACKENDS", "Backend", "StepFunction", "step_function"]
