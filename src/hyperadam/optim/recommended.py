"""The learning rate's schedule that weights recommend."""

from __future__ import annotations

import operator

import torch
from torch.optim.lr_scheduler import LambdaLR

from hyperadam.errors import ConfigError
from hyperadam.optim.learned_optimizer import LearnedOptimizer
from hyperadam.schedule import lr_scheduler


def recommended_scheduler(optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
    """The schedule that the optimizer's weights recommend, over a run of known length.

    Args:
        optimizer: a learned one, or a wrapper that has it as ``optimizer``, such as Accelerate's;
            its ``weights.schedule`` says which: ``"none"``, the learning rate stays;
            ``"cooldown"``, it stays for half of the run, then falls to 0 along a line;
            ``"cosine"``, it falls to 0 along half a cosine; or ``"inverse-sqrt"``, it stays for 100
            steps, then falls with their number's root.
        total_steps: of the run; call the scheduler's ``step()`` once after each of them. Behind the
            last one the learning rate stays where it is.

    Raises:
        TypeError: the optimizer has no weights.
        ConfigError: ``total_steps`` is no whole number above 0.
    """
    inside = optimizer
    while not isinstance(inside, LearnedOptimizer):  # Accelerate and others wrap it
        if not hasattr(inside, "optimizer"):
            raise TypeError(f"{type(inside).__name__} has no weights that recommend a schedule")
        inside = inside.optimizer
    try:
        steps = operator.index(total_steps)
    except TypeError:
        steps = 0
    if steps < 1:
        raise ConfigError(f"total_steps must be a whole number above 0; got {total_steps!r}")
    return lr_scheduler(optimizer, inside.weights.schedule, steps)
