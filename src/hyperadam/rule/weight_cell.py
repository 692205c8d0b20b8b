"""WeightCell: how much each candidate direction counts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def weight_cell(h_NH: Tensor, a_NH: Tensor, weight_HH: Tensor, bias_H: Tensor) -> Tensor:
    """``ρ = elu(h W^T + b)``; returns ``mean_N = sum over H of ρ a`` (docs/method.md, step 6)."""
    rho_NH = F.elu(F.linear(h_NH, weight_HH, bias_H))
    return (rho_NH * a_NH).sum(dim=-1)
