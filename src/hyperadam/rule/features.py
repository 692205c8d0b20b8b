"""What the rules see of the gradient: gradient in, feature columns out.

Gradients are data to a learned rule: nothing here depends on theta but the preprocessing layer,
so no derivative is taken through a square root at zero.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadam.rule.normalize import Reduce, unit_columns

MOMENT_EPSILON = 1e-8
LOG_FLOOR = -10.0


def fixed_moments(
    grad_N: Tensor,
    exp_avg_NK: Tensor,
    exp_avg_sq_NK: Tensor,
    step: Tensor,
    decays: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments with fixed decays, and the two features of each (docs/method.md, steps 1 and 2).

    Args:
        grad_N: the gradient.
        exp_avg_NK: first moments before this step, uncorrected, one column a decay.
        exp_avg_sq_NK: second moments, likewise.
        step: the number of this step, from 1; shape () or (N,).
        decays: the K decay rates, each in (0, 1).

    Returns:
        ``features_NF`` with F = 2K columns ``g/s, exp_avg/s`` for each decay in turn, where
        ``s = sqrt(corrected exp_avg_sq) + 1e-8``; the new ``exp_avg_NK``; the new
        ``exp_avg_sq_NK`` (both uncorrected).
    """
    decay_K = torch.tensor(decays, dtype=torch.float64, device=grad_N.device)
    correction_K = (1 - decay_K ** step.to(torch.float64).unsqueeze(-1)).to(grad_N.dtype)
    decay_K = decay_K.to(grad_N.dtype)
    grad_N1 = grad_N.unsqueeze(-1)
    exp_avg_NK = decay_K * exp_avg_NK + (1 - decay_K) * grad_N1
    exp_avg_sq_NK = decay_K * exp_avg_sq_NK + (1 - decay_K) * grad_N1.square()
    scale_NK = (exp_avg_sq_NK / correction_K).sqrt() + MOMENT_EPSILON
    features_NK2 = torch.stack([grad_N1 / scale_NK, exp_avg_NK / correction_K / scale_NK], dim=-1)
    return features_NK2.flatten(-2), exp_avg_NK, exp_avg_sq_NK


def unit_gradient(grad_N: Tensor, reduce: Reduce | None = None) -> Tensor:
    """HyperAdam's feature (AAAI 2019): the gradient over its Euclidean norm, one column."""
    return unit_columns(grad_N.unsqueeze(-1), "euclidean", reduce)


def log_and_sign(grad_N: Tensor) -> Tensor:
    """DMoptimizer's features: ``log(max(|g|, e^-10))/10`` and ``clip(e^10 g, -1, 1)``.

    Source: Andrychowicz et al., "Learning to learn by gradient descent by gradient descent",
    NeurIPS 2016, appendix A, with p = 10.
    """
    log_N = grad_N.abs().clamp_min(math.exp(LOG_FLOOR)).log() / -LOG_FLOOR
    sign_N = (grad_N * math.exp(-LOG_FLOOR)).clamp(-1, 1)
    return torch.stack([log_N, sign_N], dim=-1)


def preprocess(features_NF: Tensor, weight_HF: Tensor, bias_H: Tensor) -> Tensor:
    """The learned preprocessing layer: ``x_NH = elu(features W^T + b)``."""
    return F.elu(F.linear(features_NF, weight_HF, bias_H))
