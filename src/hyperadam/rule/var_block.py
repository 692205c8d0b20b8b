"""VarBlock: the update's variance, its divergence from the prior, and the sample."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadam.rule.normalize import Reduce

PRIOR_EPSILON = 1e-6

SMALLEST_SQUARE = 1e-30
"""Mean squares below it count as none."""


def var_block(h_NH: Tensor, weight_1H: Tensor, bias_1: Tensor) -> Tensor:
    """``log_var_N = h W^T + b`` (docs/method.md, step 7)."""
    return F.linear(h_NH, weight_1H, bias_1).squeeze(-1)


def mean_squares(
    moment_S: Tensor, mean_S: Tensor, count_S: Tensor, reduce: Reduce | None = None
) -> tuple[Tensor, Tensor]:
    """Of S independent problems, the mean squares of the gradient and of the update's mean.

    Args:
        moment_S: sums of the gradient's second moment over coordinates, float64 of shape (S,).
        mean_S: sums of the squares of the update's mean, likewise.
        count_S: how many coordinates.
        reduce: sums over shards, where these are not all coordinates; called once.
    """
    sums_3S = torch.stack([moment_S, mean_S, count_S])
    if reduce is not None:
        sums_3S = reduce(sums_3S)
    squares_2S = sums_3S[:2] / sums_3S[2].clamp_min(1)
    return squares_2S[0], squares_2S[1]


def level(moment: Tensor, peak: Tensor, mean: Tensor) -> Tensor:
    """What multiplies the variance of all coordinates: ``mean² f``.

    Here mean² is the mean square of the update's mean over all coordinates, and f that of the
    gradient over the largest that it has been (docs/method.md, "The variance's shape").

    Args:
        moment, mean: of :func:`mean_squares`.
        peak: the largest ``moment`` so far, this one among them.
    """
    fall = moment / peak.clamp_min(SMALLEST_SQUARE)
    return (mean * fall).clamp_min(SMALLEST_SQUARE)


def narrowing(moment_N: Tensor, moment: Tensor, base: float, floor: float) -> Tensor:
    """What multiplies the variance of one coordinate: ``floor + (1 - floor) / (1 + r / base)``.

    Here r is a coordinate's second moment of the gradient over its mean over all coordinates; it
    stands for the curvature, as in Fisher's information matrix (docs/method.md, "The variance's
    shape").

    Args:
        moment_N: second moments.
        moment: their mean, at least :data:`SMALLEST_SQUARE`, in a shape that goes with them.
        base, floor: the rule's ``variance_base`` and ``variance_floor``.
    """
    return floor + (1 - floor) * base / (base + moment_N / moment)


def sample_update(mean_N: Tensor, log_var_N: Tensor, noise_N: Tensor) -> Tensor:
    """``d = mean + exp(log_var / 2) ε`` (docs/method.md, step 8)."""
    return mean_N + torch.exp(0.5 * log_var_N) * noise_N


def kl_divergence(
    log_var_N: Tensor, mean_error_N: Tensor | None = None, prior_scale: float = 1.0
) -> Tensor:
    """KL of the update's distribution from its prior, summed over coordinates (docs/method.md).

    For a normal prior of standard deviation s:
    ``sum of log(s + 1e-6) - log_var/2 + exp(log_var)/(2 s² + 1e-6) - 1/2``, the epsilons as in
    the released program, which has s = 1.

    Args:
        log_var_N: log-variance of the update.
        mean_error_N: ``mean - prior_mean``; adds ``mean_error²/(2 s²)``. None, as in the paper's
            experiments: the mean has no prior.
        prior_scale: s.

    Returns:
        A tensor of shape (), or of the leading dimensions.
    """
    kl_N = (
        math.log(prior_scale + PRIOR_EPSILON)
        - 0.5 * log_var_N
        + torch.exp(log_var_N) / (2 * prior_scale**2 + PRIOR_EPSILON)
        - 0.5
    )
    if mean_error_N is not None:
        kl_N = kl_N + mean_error_N.square() / (2 * prior_scale**2)
    return kl_N.sum(dim=-1)
