"""A learning rate that is lowered where the first steps turn out too long: where gradients swing.

Where steps overshoot, a gradient tends to point against the one before it, and what is remembered
of gradients is less than of independent ones. The first gradients show it before it has done harm.

Suffixes: N coordinates, K fixed moments, P parts, I points of an integral, S gradients so far.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

STEPS = 20
"""The learning rate is scaled from this step on."""

POWER = 12.0
LOWEST = 0.6

POINTS = 256
"""At which an integral is taken, to five digits."""


@functools.cache
def independent_coherence(decays: tuple[float, ...]) -> float:
    """The mean coherence of the steps 2 to :data:`STEPS` where gradients are independent of each
    other and normal, of mean 0: the learning rate stays as it is from there on.

    With ``a`` the corrected weights that a moment has of the gradients ``g`` so far, a coordinate's
    coherence is ``|a g| / sqrt(sum(a g^2))``. By ``1 / sqrt(x) = 2 / sqrt(pi)`` times the integral
    of ``exp(-x t^2)`` over positive ``t`` its expectation is one of a normal's, which is known.

    Args:
        decays: of the moments, (K,).
    """
    # t = u / (1 - u), so that u goes from 0 to 1.
    u_I = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    t_I = u_I / (1 - u_I)
    weight_I = 1 / (1 - u_I) ** 2 / POINTS
    total = 0.0
    for decay in decays:
        for step in range(2, STEPS + 1):
            a_S = (1 - decay) / (1 - decay**step) * decay ** torch.arange(step).double()
            shrink_IS = 1 + 2 * t_I.square().unsqueeze(1) * a_S
            spread_I = (a_S.square() / shrink_IS).sum(1).sqrt()
            total += float((spread_I * shrink_IS.prod(1).rsqrt() * weight_I).sum())
    return math.sqrt(8) / math.pi * total / (len(decays) * (STEPS - 1))


def in_rows_with_gradient(grad: Tensor) -> Tensor:
    """Which coordinates of a parameter lie in a row that has a gradient other than 0.

    A row is what one output has, or one embedding: all dimensions but the first. That of a vector
    is a coordinate. Rows without a gradient, as embeddings of what is not in a batch, tell nothing.

    Args:
        grad: a step's gradient, of the parameter's shape.

    Returns:
        bool, of that shape.
    """
    has = grad != 0
    if has.dim() < 2:
        return has
    rows = has.flatten(1).any(1)
    return rows.view(-1, *[1] * (has.dim() - 1)).expand_as(has)


def coherence_sums(
    exp_avg_NK: Tensor, exp_avg_sq_NK: Tensor, step: Tensor, decay_K: Tensor, counted_N: Tensor
) -> Tensor:
    """How far a step's gradient agrees with those before it: the coherence's sum and number.

    The coherence is the mean of ``|exp_avg| / sqrt(exp_avg_sq)``, both corrected, over the fixed
    moments and over all coordinates that have had a gradient other than 0, in rows that have one
    in this step: 1 in the first step, where there is none before.

    Args:
        exp_avg_NK, exp_avg_sq_NK: the fixed moments after the step, uncorrected; N may be several
            dimensions, of which the sums are over the last.
        step: its number, from 1, of shape ().
        decay_K: of the moments, float64.
        counted_N: from :func:`in_rows_with_gradient`.

    Returns:
        float64, (..., 2): sums of what the mean is over, and how many there are.
    """
    # (|m| / c) / sqrt(v / c), where c is what corrects both.
    scale_NK = (exp_avg_sq_NK * (1 - decay_K**step)).sqrt()
    seen_NK = (scale_NK > 0) & counted_N.unsqueeze(-1)
    ratio_NK = torch.where(seen_NK, exp_avg_NK.abs() / scale_NK, 0)
    return torch.stack([ratio_NK.sum((-2, -1)), seen_NK.sum((-2, -1))], dim=-1)


def mean_coherence(sums: Tensor, decays: tuple[float, ...]) -> Tensor:
    """The coherence, from :func:`coherence_sums` or sums of them; that of independent gradients
    where no row has any, with moments of these ``decays``."""
    total, number = sums.unbind(-1)
    return torch.where(number > 0, total / number, independent_coherence(decays))


def counts(steps_P: Tensor) -> Tensor:
    """Whether the coherence of these steps, which count from 1, is part of what tells the task."""
    return (steps_P > 1) & (steps_P <= STEPS)


def calibrated_lr_scale(total_P: Tensor, steps_P: Tensor, decays: tuple[float, ...]) -> Tensor:
    """What the learning rate is multiplied by: 1 where gradients agree or are independent, less
    where they swing to and fro.

    Args:
        total_P: the sum of the coherence of all steps so far that :func:`counts`.
        steps_P: the number of this step, from 1.
        decays: of the fixed moments, (K,).
    """
    share_P = total_P / ((STEPS - 1) * independent_coherence(decays))
    return torch.where(steps_P >= STEPS, share_P.pow(POWER).clamp(LOWEST, 1), 1)
