"""How a learning rate goes over a run."""

from __future__ import annotations

import functools
import math
from typing import Literal, get_args

import torch
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["none", "cooldown", "cosine", "inverse-sqrt"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
STEPS_BEFORE_FALL = 100
"""Of ``"inverse-sqrt"``; as many as the papers' runs have."""
COOLDOWN = 0.5
"""The part of a run over which ``"cooldown"`` falls."""


def lr_factor(step: int, *, schedule: str, total_steps: int) -> float:
    """What a run's learning rate is multiplied with before a step.

    Args:
        step: from 0; from ``total_steps`` on, the factor stays as it is at the end.
        schedule: ``"none"``: 1; ``"cooldown"``: 1 for the first half of the run, then to 0 along a
            line (Hägele et al., "Scaling laws and compute-optimal training beyond fixed training
            durations", NeurIPS 2024); ``"cosine"``: from 1 to 0 along half a cosine;
            ``"inverse-sqrt"``: 1 for the first 100 steps, then ``sqrt(100 / step)``, whatever
            the length (without a warm-up that of Vaswani et al., NeurIPS 2017).
        total_steps: of the run.
    """
    reached = min(step, total_steps)
    if schedule == "none":
        return 1.0
    if schedule == "cooldown":
        return min(1.0, (total_steps - reached) / (COOLDOWN * total_steps))
    if schedule == "inverse-sqrt":
        return math.sqrt(STEPS_BEFORE_FALL / max(reached, STEPS_BEFORE_FALL))
    return 0.5 * (1 + math.cos(math.pi * reached / total_steps))


def lr_scheduler(optimizer: torch.optim.Optimizer, schedule: str, total_steps: int) -> LambdaLR:
    """A scheduler to be stepped once after each step of a run of known length."""
    factor = functools.partial(lr_factor, schedule=schedule, total_steps=total_steps)
    return LambdaLR(optimizer, factor)
