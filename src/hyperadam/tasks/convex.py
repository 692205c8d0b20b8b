"""The convex term that is added to the inner loss in meta-training."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hyperadam.tasks.base import Batch, Params, make_generator


@dataclasses.dataclass(frozen=True)
class ConvexTask:
    """``mean(clip((z - η)², 0, 10))`` with targets ``η ~ U(-1, 1)``; z starts at 0.

    Source: Lv et al., "Learning gradient descent: better generalization and longer horizons",
    ICML 2017 (combination with convex functions).

    Attributes:
        dim: how many coordinates z has.
        seed: of the targets.
    """

    dim: int = 20
    seed: int = 0

    @property
    def name(self) -> str:
        return f"convex{self.dim}"

    def init_params(self, generator: torch.Generator) -> Params:
        return {"z": torch.zeros(self.dim)}

    def batch(self, seed: int, step: int) -> Batch:
        """The targets η, the same at every step."""
        return 2 * torch.rand(self.dim, generator=make_generator(self.seed, "targets")) - 1

    def loss(self, params: Params, batch: Batch) -> Tensor:
        z = params["z"]
        targets: Tensor = batch
        return (z - targets.to(z.dtype)).square().clamp(0, 10).mean()

    def validate(self, params: Params) -> dict[str, float]:
        return {}
