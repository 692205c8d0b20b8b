"""AdamCell: H candidate directions, each an Adam whose decay rates are predicted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadam.rule.normalize import ColumnNorm, Reduce, unit_columns

CORRECTION_EPSILON = 1e-24


def decay_rates(
    h_NH: Tensor,
    m_NH: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: ColumnNorm = "euclidean",
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """``[β γ] = sigmoid([unit_columns(m), unit_columns(h)] W^T + b)`` (docs/method.md, step 5).

    Args:
        h_NH: the state cell's new output.
        m_NH: this cell's first moments before the step.
        weight: (2H, 2H), the columns for m first.
        bias: (2H,).
        norm, reduce: see :func:`~hyperadam.rule.normalize.unit_columns`.

    Returns:
        ``beta_NH`` and ``gamma_NH``.
    """
    inputs_N2H = unit_columns(torch.cat([m_NH, h_NH], dim=-1), norm, reduce)
    beta_NH, gamma_NH = torch.sigmoid(F.linear(inputs_N2H, weight, bias)).chunk(2, dim=-1)
    return beta_NH, gamma_NH


def adam_cell(
    grad_N: Tensor,
    beta_NH: Tensor,
    gamma_NH: Tensor,
    m_NH: Tensor,
    v_NH: Tensor,
    m_corr_NH: Tensor,
    v_corr_NH: Tensor,
    bound: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of the H Adams with predicted decay rates (docs/method.md, step 5).

    ``m`` and ``v`` decay with β and γ; the correction accumulators, which start at 0, hold the
    sum of the weights that m and v have given to gradients so far;
    ``a = (m / m_corr) / sqrt(v / v_corr)``.

    Args:
        grad_N: the gradient.
        beta_NH, gamma_NH: from :func:`decay_rates`.
        m_NH, v_NH, m_corr_NH, v_corr_NH: this cell's state before the step.
        bound: with a number b, candidates become ``b tanh(a / b)``.

    Returns:
        The candidates ``a_NH``, then the new ``m_NH, v_NH, m_corr_NH, v_corr_NH``.
    """
    grad_N1 = grad_N.unsqueeze(-1)
    m_NH = beta_NH * m_NH + (1 - beta_NH) * grad_N1
    v_NH = gamma_NH * v_NH + (1 - gamma_NH) * grad_N1.square()
    m_corr_NH = beta_NH * m_corr_NH + (1 - beta_NH)
    v_corr_NH = gamma_NH * v_corr_NH + (1 - gamma_NH)
    m_hat_NH = m_NH / (m_corr_NH + CORRECTION_EPSILON)
    v_hat_NH = v_NH / (v_corr_NH + CORRECTION_EPSILON)
    a_NH = m_hat_NH / torch.sqrt(v_hat_NH + CORRECTION_EPSILON)
    if bound is not None:
        a_NH = bound * torch.tanh(a_NH / bound)
    return a_NH, m_NH, v_NH, m_corr_NH, v_corr_NH
