"""Adam with the bundled weights' scales by layer: how much of their lead is these, not the rule?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hyperadam.rule import VariationalHyperAdamRule


class AdamByLayer(torch.optim.Adam):
    """Adam, whose steps are scaled by layer as a learned rule's are.

    A step of ``torch.optim.Adam`` is taken, and what it did to each parameter is changed by the
    rule's ``row_mean_scale`` and ``lr_scale`` of the parameter's shape. A control: the settings are
    not Adam's, and a learned rule that has them should be ahead of this too.

    Args:
        params: as for ``torch.optim.Adam``; real numbers.
        lr: of parameters that no setting slows down.
        fan_in_base, row_mean_base, vector_scale: as in
            :class:`~hyperadam.rule.VariationalHyperAdamRule`, by default those of the presets
            ``broad*``.

    Raises:
        ConfigError: a setting out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        fan_in_base: float | None = 16.0,
        row_mean_base: float | None = 1.0,
        vector_scale: float = 0.3,
    ) -> None:
        super().__init__(params, lr=lr)
        self.rule = VariationalHyperAdamRule(
            fan_in_base=fan_in_base, row_mean_base=row_mean_base, vector_scale=vector_scale
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: as for ``torch.optim.Adam``.

        Returns:
            What the closure returns.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        before = [param.clone() for param in params]
        loss = super().step(closure)
        for param, start in zip(params, before, strict=True):
            move = param - start
            self.rule.scale_row_means_(move, param.shape)
            param.copy_(start + self.rule.lr_scale(param.shape) * move)
        return loss
