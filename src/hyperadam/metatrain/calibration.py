"""The calibrated learning rate of inner runs.

Shapes: B inner runs, N coordinates, K fixed moments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hyperadam.rule import (
    Rule,
    VariationalHyperAdamRule,
    calibrated_lr_scale,
    coherence_sums,
    mean_coherence,
)
from hyperadam.rule.coherence import STEPS, counts
from hyperadam.rule.features import fixed_moments


class Calibration:
    """What scales the learning rate of B inner runs, in the steps of one unroll.

    It keeps fixed moments of its own over the first steps, all of which are in the first unroll:
    those of the rule's state are the kernel's business until the unroll is done.

    Args:
        rule: whose learning rate is calibrated.
        coherence_B: the sum of the coherence so far.
        first_step: the number of the unroll's first step, from 1.
        counted: which coordinates of gradients (B, N) are part of the coherence, from
            :func:`~hyperadam.rule.in_rows_with_gradient` of each parameter.

    Attributes:
        coherence_B: the sum after the steps so far.
    """

    def __init__(
        self,
        rule: Rule,
        coherence_B: Tensor,
        first_step: int,
        counted: Callable[[Tensor], Tensor],
    ) -> None:
        assert isinstance(rule, VariationalHyperAdamRule)
        self._decays = rule.moment_decays
        self._moments: tuple[Tensor, Tensor] | None = None
        self._step = torch.tensor(first_step, device=coherence_B.device)
        self._decay_K = torch.tensor(self._decays, dtype=torch.float64, device=coherence_B.device)
        self._counted = counted
        self.coherence_B = coherence_B

    @torch.no_grad()
    def lr_scale(self, grad_BN: Tensor) -> Tensor:
        """The factor of the next step's learning rate, (B, 1); it has no derivative by theta.

        Args:
            grad_BN: the gradients that the step is made from.
        """
        step = self._step
        if int(step) <= STEPS:
            if self._moments is None:
                nothing = grad_BN.new_zeros(*grad_BN.shape, len(self._decays))
                self._moments = nothing, nothing
            _, *moments = fixed_moments(grad_BN, *self._moments, step, self._decays)
            self._moments = moments[0], moments[1]
            counted_BN = self._counted(grad_BN)
            sums = coherence_sums(*self._moments, step, self._decay_K, counted_BN)
            found_B = mean_coherence(sums, self._decays)
            self.coherence_B = self.coherence_B + torch.where(counts(step), found_B, 0)
        scale_B = calibrated_lr_scale(self.coherence_B, step, self._decays)
        self._step = step + 1
        return scale_B.to(grad_BN.dtype).unsqueeze(1)
