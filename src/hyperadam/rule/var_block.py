"""VarBlock: the update's variance, its divergence from the prior, and the sample."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadam.rule.normalize import Reduce

PRIOR_EPSILON = 1e-6

SMALLEST_MEAN_SQUARE = 1e-30
"""Gradients whose mean square is below it count as none."""


def var_block(h_NH: Tensor, weight_1H: Tensor, bias_1: Tensor) -> Tensor:
    """``log_var_N = h W^T + b`` (docs/method.md, step 7)."""
    return F.linear(h_NH, weight_1H, bias_1).squeeze(-1)


def narrowing(square_N: Tensor, mean_square: Tensor, base: float) -> Tensor:
    """What a large gradient takes from the log-variance, ``log(1 + r / base)``.

    Here r is a coordinate's mean square of the gradient over the mean of all. The square stands for
    the curvature, as in Fisher's information matrix: per coordinate the meta-loss is least where
    the variance is ``λ / (λ / s² + lr² curvature)`` (docs/method.md, "The variance's shape").

    Args:
        square_N: mean squares of the gradient.
        mean_square: their mean over all coordinates; of a shape that goes with ``square_N``.
        base: the rule's ``variance_base``.
    """
    return torch.log1p(square_N / (base * mean_square.clamp_min(SMALLEST_MEAN_SQUARE)))


def mean_over_shards(total_S: Tensor, count_S: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Means of S independent problems from sums and counts of float64, (S,).

    Args:
        total_S, count_S: of this shard's coordinates.
        reduce: sums over shards, where these are not all coordinates; called once.
    """
    both_2S = torch.stack([total_S, count_S])
    if reduce is not None:
        both_2S = reduce(both_2S)
    return both_2S[0] / both_2S[1].clamp_min(1)


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
