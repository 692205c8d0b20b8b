"""Training a task with an optimizer, as a function of seeds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from hyperadam.tasks import Task, derive_seed, make_generator

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

FINAL_STEPS = 10
"""The final loss of a run is the mean over this many last steps, as in the papers."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRun:
    """One training run of T steps.

    Attributes:
        train_loss_T: loss of each step's batch before its update.
        train_loss_post_T: loss of the same batch after its update.
        metrics: of the task's held-out data, at the end.
        optimizer_seconds: time spent in ``optimizer.step()``, in all.
    """

    train_loss_T: np.ndarray
    train_loss_post_T: np.ndarray
    metrics: dict[str, float]
    optimizer_seconds: float

    @property
    def final_loss(self) -> float:
        """Mean post-update loss of the last steps; NaN or infinite where the run diverged."""
        return float(self.train_loss_post_T[-FINAL_STEPS:].mean())


def train(task: Task, factory: OptimizerFactory, *, seed: int, steps: int) -> TrainingRun:
    """Train from scratch.

    Args:
        task: what to train.
        factory: makes the optimizer for a list of parameters.
        seed: of the initial parameters and of the data order.
        steps: how many.
    """
    initial = task.init_params(make_generator(seed, "params"))
    params = {name: value.requires_grad_() for name, value in initial.items()}
    optimizer = factory(list(params.values()))
    data_seed = derive_seed(seed, "data")
    before, after = np.empty(steps), np.empty(steps)
    seconds = 0.0
    for step in range(steps):
        batch = task.batch(data_seed, step)
        optimizer.zero_grad()
        loss = task.loss(params, batch)
        loss.backward()
        start = time.perf_counter()
        optimizer.step()
        seconds += time.perf_counter() - start
        before[step] = float(loss.detach())
        with torch.no_grad():
            after[step] = float(task.loss(params, batch))
    with torch.no_grad():
        metrics = task.validate(params)
    return TrainingRun(before, after, metrics, seconds)
