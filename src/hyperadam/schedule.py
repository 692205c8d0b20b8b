"""How a learning rate goes over a run."""

from __future__ import annotations

import math
from typing import Literal, get_args

Schedule = Literal["none", "cosine"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def lr_factor(step: int, *, schedule: str, total_steps: int) -> float:
    """What a run's learning rate is multiplied with before a step.

    Args:
        step: from 0; from ``total_steps`` on, the factor stays as it is at the end.
        schedule: ``"none"``: 1; ``"cosine"``: from 1 to 0 along half a cosine.
        total_steps: of the run.
    """
    if schedule == "none":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(step, total_steps) / total_steps))
