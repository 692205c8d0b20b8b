"""Variational HyperAdam with its noise spread evenly: does it matter *where* the variance is?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperadam.errors import WeightsError
from hyperadam.kernels import Lanes, Part
from hyperadam.optim.variational_hyperadam import VariationalHyperAdam
from hyperadam.rule import standard_normal
from hyperadam.weights import Weights


class IsotropicNoise(VariationalHyperAdam):
    """Variational HyperAdam whose noise has one variance for all coordinates of a step.

    The variance is the average of what the VarBlock predicts for the coordinates of the step: the
    noise has the power of :class:`VariationalHyperAdam`'s and knows nothing of where the rule is
    sure. An ablation, beside ``sample=True`` and ``sample=False``. Arguments: those of
    :class:`VariationalHyperAdam`; the noise is made of the same normal numbers.

    Raises:
        ValueError: as :class:`VariationalHyperAdam`, or weights without a VarBlock.
    """

    def _check_weights(self, weights: Weights) -> None:
        super()._check_weights(weights)
        if not weights.rule.has_variance:
            raise WeightsError("IsotropicNoise takes weights with a VarBlock; these have none")

    def _redirect(self, lanes: Lanes, parts: Sequence[Part], steps_P: Tensor) -> None:
        assert lanes.log_var is not None
        assert lanes.direction is not None
        sums = [lanes.log_var[part.lanes].double().exp().sum() for part in parts]
        total = torch.stack(sums).sum()
        pair = torch.stack([total, total.new_full((), sum(part.count for part in parts))])
        if self._reduce is not None:
            pair = self._reduce(pair)
        variance = (pair[0] / pair[1].clamp_min(1)).to(lanes.log_var.dtype)
        for part, step in zip(parts, steps_P, strict=True):
            lanes.log_var[part.lanes] = variance.log()  # where update_distribution looks
            if part.sample:
                noise_N = standard_normal(
                    part.seed,
                    step,
                    part.noise_start,
                    part.count,
                    device=variance.device,
                    dtype=variance.dtype,
                )
                lanes.direction[part.lanes] = lanes.mean[part.lanes] + variance.sqrt() * noise_N
