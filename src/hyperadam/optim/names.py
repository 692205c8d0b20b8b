"""What parameters' names tell an optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hyperadam.rule import attention_projections


def named(params: Iterable[Tensor | tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Parameters with their names, empty ones where there are none.

    Args:
        params: with or without names.

    Returns:
        Pairs of names and parameters.
    """
    return [param if isinstance(param, tuple) else ("", param) for param in params]


def attention_parameters(
    optimizer: torch.optim.Optimizer, others: Iterable[tuple[str, Tensor]] = ()
) -> set[Tensor]:
    """Attention's projections, among an optimizer's parameters that have names.

    Args:
        optimizer: its groups have ``param_names`` where it was made of ``named_parameters()``.
        others: parameters with names that its groups don't have.

    Returns:
        Of the groups and of the others.
    """
    pairs = [*others]
    for group in optimizer.param_groups:
        pairs += zip(group.get("param_names", ()), group["params"], strict=False)
    projections = attention_projections(name for name, _ in pairs)
    return {param for name, param in pairs if name in projections}
