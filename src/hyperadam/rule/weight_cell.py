"""WeightCell: how much each candidate direction counts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def weight_cell(h_NH: Tensor, weight_HH: Tensor, bias_H: Tensor) -> Tensor:
    """``ρ_NH = elu(h W^T + b)``; ``mean_N = sum over H of ρ a`` (docs/method.md, step 6)."""
    return F.elu(F.linear(h_NH, weight_HH, bias_H))
