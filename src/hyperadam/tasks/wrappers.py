"""Tasks made of other tasks, for meta-training."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperadam.tasks.base import Batch, Params, Task, make_generator


class RandomScaling:
    """A task whose every parameter is multiplied inside the network by a fixed random scale.

    Scales are ``exp(U(-spread, spread))``, one a coordinate; parameters start divided by them,
    so that the network starts as it would without.

    Source: Lv et al., "Learning gradient descent: better generalization and longer horizons",
    ICML 2017 (random scaling).

    Args:
        task: the task.
        spread: half the width of the logarithm's range; 3 in the papers.
        seed: of the scales.
    """

    def __init__(self, task: Task, spread: float, seed: int) -> None:
        self.task = task
        generator = make_generator(seed, "scales")
        self.scales = {
            name: torch.exp(spread * (2 * torch.rand(value.shape, generator=generator) - 1))
            for name, value in task.init_params(generator).items()
        }

    @property
    def name(self) -> str:
        return f"{self.task.name}-scaled"

    def init_params(self, generator: torch.Generator) -> Params:
        params = self.task.init_params(generator)
        return {name: value / self.scales[name] for name, value in params.items()}

    def batch(self, seed: int, step: int) -> Batch:
        """The scales by name, the same at every step, and the task's batch."""
        return self.scales, self.task.batch(seed, step)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        scales, inner = batch
        return self.task.loss(_scaled(params, scales), inner)

    def validate(self, params: Params) -> dict[str, float]:
        return self.task.validate(_scaled(params, self.scales))


def _scaled(params: Params, scales: Params) -> Params:
    return {name: value * scales[name] for name, value in params.items()}


class SumOfTasks:
    """Several tasks trained as one: parameters side by side, losses added.

    Args:
        tasks: the tasks; their parameters' names get the prefixes ``0.``, ``1.`` and so on.
    """

    def __init__(self, *tasks: Task) -> None:
        self.tasks = tasks

    @property
    def name(self) -> str:
        return "+".join(task.name for task in self.tasks)

    def init_params(self, generator: torch.Generator) -> Params:
        return {
            f"{index}.{name}": value
            for index, task in enumerate(self.tasks)
            for name, value in task.init_params(generator).items()
        }

    def batch(self, seed: int, step: int) -> Batch:
        return [task.batch(seed, step) for task in self.tasks]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        losses = [
            task.loss(self._own(index, params), own)
            for index, (task, own) in enumerate(zip(self.tasks, batch, strict=True))
        ]
        return torch.stack(losses).sum()

    def validate(self, params: Params) -> dict[str, float]:
        """Metrics of all tasks; of one name, the first task's."""
        metrics: dict[str, float] = {}
        for index, task in enumerate(self.tasks):
            metrics = task.validate(self._own(index, params)) | metrics
        return metrics

    @staticmethod
    def _own(index: int, params: Params) -> Params:
        prefix = f"{index}."
        return {
            name.removeprefix(prefix): value
            for name, value in params.items()
            if name.startswith(prefix)
        }
