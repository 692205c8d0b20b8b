"""Adam with the bundled weights' scales by layer: how much of their lead is these, not the rule?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from hyperadam.optim.names import attention_parameters
from hyperadam.rule import VariationalHyperAdamRule


class AdamByLayer(torch.optim.Adam):
    """Adam, whose steps are scaled by layer as a learned rule's are.

    A step of ``torch.optim.Adam`` is taken, and what it did to each parameter is changed by the
    rule's ``row_mean_scale`` and ``lr_scale`` of the parameter. A control: the settings are
    not Adam's, and a learned rule that has them should be ahead of this too.

    Args:
        params: as for ``torch.optim.Adam``, with names for ``attention_scale``; real numbers.
        lr: of parameters that no setting slows down.
        fan_in_base, row_mean_base, vector_scale, attention_scale: as in
            :class:`~hyperadam.rule.VariationalHyperAdamRule`, by default those of the presets
            ``broad*``.

    Raises:
        ConfigError: a setting out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        fan_in_base: float | None = 16.0,
        row_mean_base: float | None = 1.0,
        vector_scale: float = 0.3,
        attention_scale: float = 0.2,
    ) -> None:
        super().__init__(params, lr=lr)
        self.rule = VariationalHyperAdamRule(
            fan_in_base=fan_in_base,
            row_mean_base=row_mean_base,
            vector_scale=vector_scale,
            attention_scale=attention_scale,
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
        projections = attention_parameters(self)
        loss = super().step(closure)
        for param, start in zip(params, before, strict=True):
            move = param - start
            self.rule.scale_row_means_(move, param.shape)
            scale = self.rule.lr_scale(param.shape, attention=param in projections)
            param.copy_(start + scale * move)
        return loss
