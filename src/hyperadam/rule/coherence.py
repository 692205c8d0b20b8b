"""A learning rate that fits the task: scaled by how coherent the first gradients are.

Where successive gradients agree, the loss goes down along a long, smooth slope and long steps pay;
where they are mostly noise, or swing to and fro, short ones do. The part of noise alone is what
gives large batches larger learning rates: McCandlish et al., "An empirical model of large-batch
training", 2018, section 2.2.

Suffixes: N coordinates, K fixed moments, P parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 20
"""The learning rate is scaled from this step on."""

NEUTRAL = 0.4
"""The mean coherence at which the learning rate stays as it is."""

POWER = 4.0
LIMITS = (0.2, 4.0)


def coherence_sums(
    exp_avg_NK: Tensor, exp_avg_sq_NK: Tensor, step: Tensor, decays: tuple[float, ...]
) -> Tensor:
    """How far a step's gradient agrees with those before it: the coherence's sum and number.

    The coherence is the mean of ``|exp_avg| / sqrt(exp_avg_sq)``, both corrected, over the fixed
    moments and over all coordinates that have had a gradient other than 0: 1 in the first step,
    where there is none before.

    Args:
        exp_avg_NK, exp_avg_sq_NK: the fixed moments after the step, uncorrected; N may be several
            dimensions, of which the sums are over the last.
        step: its number, from 1, of shape ().
        decays: of the moments, (K,).

    Returns:
        float64, (..., 2): sums of what the mean is over, and how many there are.
    """
    decay_K = torch.tensor(decays, dtype=torch.float64, device=exp_avg_NK.device)
    # (|m| / c) / sqrt(v / c), where c is what corrects both.
    scale_NK = (exp_avg_sq_NK * (1 - decay_K**step)).sqrt()
    seen_NK = scale_NK > 0
    ratio_NK = torch.where(seen_NK, exp_avg_NK.abs() / scale_NK, 0)
    return torch.stack([ratio_NK.sum((-2, -1)), seen_NK.sum((-2, -1))], dim=-1)


def mean_coherence(sums: Tensor) -> Tensor:
    """The coherence, from :func:`coherence_sums` or sums of them; 0 where no coordinate has had a
    gradient."""
    return sums[..., 0] / sums[..., 1].clamp_min(1)


def counts(steps_P: Tensor) -> Tensor:
    """Whether the coherence of these steps, which count from 1, is part of what tells the task."""
    return (steps_P > 1) & (steps_P <= STEPS)


def calibrated_lr_scale(total_P: Tensor, steps_P: Tensor) -> Tensor:
    """What the learning rate is multiplied by.

    Args:
        total_P: the sum of the coherence of all steps so far that :func:`counts`.
        steps_P: the number of this step, from 1.
    """
    scale_P = (total_P / (STEPS - 1) / NEUTRAL).pow(POWER).clamp(*LIMITS)
    return torch.where(steps_P >= STEPS, scale_P, 1)
