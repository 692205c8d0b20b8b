"""StateCell: the LSTM that every coordinate runs with the same theta."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadam.rule.normalize import ColumnNorm, Reduce, unit_columns

FORGET_OFFSET = 1.0


def state_cell(
    x_NC: Tensor,
    h_NH: Tensor,
    c_NH: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: ColumnNorm = "euclidean",
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer, one step (docs/method.md, step 4).

    ``[i j f o] = [unit_columns(x), unit_columns(h)] W^T + b``,
    ``c = sigmoid(f + 1) c + sigmoid(i) tanh(j)``, ``h = sigmoid(o) tanh(c)``.

    Args:
        x_NC: the input: preprocessed features, plain ones, or the h of the layer below.
        h_NH, c_NH: this layer's state before the step.
        weight: (4H, C + H), the columns for x first.
        bias: (4H,).
        norm, reduce: see :func:`~hyperadam.rule.normalize.unit_columns`.

    Returns:
        The new ``h_NH`` and ``c_NH``.
    """
    inputs_NG = unit_columns(torch.cat([x_NC, h_NH], dim=-1), norm, reduce)
    i_NH, j_NH, f_NH, o_NH = F.linear(inputs_NG, weight, bias).chunk(4, dim=-1)
    c_NH = torch.sigmoid(f_NH + FORGET_OFFSET) * c_NH + torch.sigmoid(i_NH) * torch.tanh(j_NH)
    return torch.sigmoid(o_NH) * torch.tanh(c_NH), c_NH
