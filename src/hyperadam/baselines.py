"""Hand-designed optimizers to compare with, and the grids they are tuned on."""

from __future__ import annotations

import torch

from hyperadam.evaluation.harness import OptimizerFactory, train
from hyperadam.tasks import Task

ADAM_DEFAULT_LR = 1e-3
ADAM_LR_GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Half decades."""


def adam(lr: float) -> OptimizerFactory:
    """Torch's Adam with its defaults, at a learning rate."""
    return lambda params: torch.optim.Adam(params, lr=lr)


def tune_adam(task: Task, *, seeds: range, steps: int) -> float:
    """The learning rate of the grid at which Adam's mean final loss over ``seeds`` is least."""

    def mean_final_loss(lr: float) -> float:
        runs = [train(task, adam(lr), seed=seed, steps=steps) for seed in seeds]
        return sum(run.final_loss for run in runs) / len(runs)

    return min(ADAM_LR_GRID, key=mean_final_loss)
