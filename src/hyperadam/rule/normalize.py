"""Where coordinates meet, and the home of its epsilon; but for the option ``variance_base``
(:mod:`hyperadam.rule.var_block`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

ColumnNorm = Literal["euclidean", "rms"]

Reduce = Callable[[Tensor], Tensor]
"""Sums a vector over all shards of the coordinates, and returns the sum to each of them."""

EPSILON = 1e-16


def unit_columns(
    y_NC: Tensor, norm: ColumnNorm = "euclidean", reduce: Reduce | None = None
) -> Tensor:
    """Divide each column by its norm over all coordinates.

    ``y * rsqrt(sum over N of y² + 1e-16)`` for ``norm="euclidean"`` (the paper's); the mean in
    place of the sum for ``"rms"``, whose result does not shrink as the network grows.

    Args:
        y_NC: N coordinates by C columns; leading dimensions are independent problems.
        norm: which norm.
        reduce: sums the C column sums (and N) over shards, when this tensor is one shard of
            the coordinates. One call of this function makes one call of ``reduce``.

    Returns:
        A tensor of the shape of ``y_NC``.
    """
    total_C = y_NC.square().sum(dim=-2)
    if reduce is not None:
        count_1 = total_C.new_full((*total_C.shape[:-1], 1), y_NC.shape[-2])
        total_C, count_1 = reduce(torch.cat([total_C, count_1], dim=-1)).split(
            [y_NC.shape[-1], 1], dim=-1
        )
        if norm == "rms":
            total_C = total_C / count_1
    elif norm == "rms":
        total_C = total_C / max(y_NC.shape[-2], 1)
    return y_NC * torch.rsqrt(total_C + EPSILON).unsqueeze(-2)
