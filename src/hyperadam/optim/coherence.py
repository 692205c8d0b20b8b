"""A learning rate that fits the task: scaled by how coherent the first gradients are.

Where successive gradients agree, the loss goes down along a long, smooth slope and long steps pay;
where they are mostly noise, or swing to and fro, short ones do. The part of noise alone is what
gives large batches larger learning rates: McCandlish et al., "An empirical model of large-batch
training", 2018, section 2.2.

Suffixes: P parts, K fixed moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperadam.kernels import Part, TiledState, TileLayout
from hyperadam.rule import Reduce

STEPS = 20
"""The learning rate is scaled from this step on."""

NEUTRAL = 0.4
"""The mean coherence at which the learning rate stays as it is."""

POWER = 4.0
LIMITS = (0.2, 4.0)


def coherence(
    state: TiledState,
    layout: TileLayout,
    decays: tuple[float, ...],
    parts: Sequence[Part],
    steps_P: Tensor,
    reduce: Reduce | None,
) -> Tensor:
    """How far a step's gradient agrees with those before it: 1 in the first step, where there are
    none.

    The mean of ``|exp_avg| / sqrt(exp_avg_sq)``, both corrected, over the fixed moments and over
    all coordinates that have had a gradient other than 0.

    Args:
        state: after the step.
        layout: of its rows.
        decays: of the fixed moments, (K,).
        parts: what took the step.
        steps_P: the number of this step for each part, from 1.
        reduce: sums over processes.

    Returns:
        float64, of shape (); 0 where no coordinate has had a gradient.
    """
    decay_K = torch.tensor(decays, dtype=torch.float64, device=steps_P.device)
    pair = torch.zeros(2, dtype=torch.float64, device=steps_P.device)
    for part, step in zip(parts, steps_P, strict=True):
        fields = layout.unpack(state.tiles_TRx[part.tiles], part.count)
        # (|m| / c) / sqrt(v / c), where c is what corrects both.
        scale_NK = (fields["exp_avg_sq_NK"] * (1 - decay_K**step)).sqrt()
        seen_NK = scale_NK > 0
        ratio_NK = torch.where(seen_NK, fields["exp_avg_NK"].abs() / scale_NK, 0)
        pair += torch.stack([ratio_NK.sum(), seen_NK.sum()])
    if reduce is not None:
        pair = reduce(pair)
    return pair[0] / pair[1].clamp_min(1)


def lr_scale(total_P: Tensor, steps_P: Tensor) -> Tensor:
    """The factor of the learning rate, for each part.

    Args:
        total_P: the sum of the coherence over the part's steps from the second to :data:`STEPS`.
        steps_P: steps that it has taken.
    """
    scale_P = (total_P / (STEPS - 1) / NEUTRAL).pow(POWER).clamp(*LIMITS)
    return torch.where(steps_P >= STEPS, scale_P, 1)
