"""A task made of three parts: a network, examples, and what is wanted of the outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadam.tasks.base import Batch, Params

Predict = Callable[[Tensor], Tensor]

CALIBRATION_BATCHES = 20


class Network(Protocol):
    """Outputs as a pure function of parameters and inputs."""

    def init_params(self, generator: torch.Generator) -> Params:
        """Fresh parameters, float32."""

    def masks(self, seed: int, step: int, batch_size: int) -> list[Tensor]:
        """What is random in a training step, as dropout is; empty where nothing is."""

    def outputs(self, params: Params, inputs: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """In training, in the parameters' dtype."""

    def predictor(self, params: Params, inputs: Iterator[Tensor]) -> Predict:
        """Outputs for validation: no dropout, and normalisation by statistics of training inputs.

        Args:
            params: the parameters.
            inputs: batches of training inputs to take the statistics from, where they are needed.
        """


class Examples(Protocol):
    """A data set, or what makes one."""

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a training step."""

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Held-out inputs and targets, in batches."""


class Objective(Protocol):
    """What is wanted of the outputs."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over examples, of shape ()."""

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Validation's metrics by name, each the mean over these examples."""


class Classification:
    """Cross-entropy with labels, over the last dimension of the outputs."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        right = (outputs.argmax(dim=-1) == targets).double().mean()
        return {"val_loss": self.loss(outputs, targets), "val_accuracy": right}


class Regression:
    """Mean squared error."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets.to(outputs.dtype)).square().mean()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"val_loss": self.loss(outputs, targets)}


@dataclasses.dataclass(frozen=True, eq=False)
class SupervisedTask:
    """A network that is trained on examples.

    Attributes:
        name: says everything.
        network: what is trained.
        examples: on what.
        objective: for what.
        weight_decay: adds ``weight_decay / 2`` times the parameters' squared norm to the loss.
    """

    name: str
    network: Network
    examples: Examples
    objective: Objective
    weight_decay: float = 0.0

    def init_params(self, generator: torch.Generator) -> Params:
        return self.network.init_params(generator)

    def batch(self, seed: int, step: int) -> Batch:
        """Inputs, targets, masks."""
        inputs, targets = self.examples.batch(seed, step)
        return inputs, targets, self.network.masks(seed, step, len(targets))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        inputs, targets, masks = batch
        loss = self.objective.loss(self.network.outputs(params, inputs, masks), targets)
        if self.weight_decay > 0:
            squares = torch.stack([value.square().sum() for value in params.values()])
            loss = loss + self.weight_decay / 2 * squares.sum()
        return loss

    def validate(self, params: Params) -> dict[str, float]:
        """The objective's metrics, without the weight decay."""
        device = next(iter(params.values())).device
        steps = range(CALIBRATION_BATCHES)
        calibration = (self.examples.batch(0, step)[0].to(device) for step in steps)
        predict = self.network.predictor(params, calibration)
        totals: dict[str, float] = {}
        count = 0
        for inputs, targets in self.examples.validation():
            count += len(targets)
            outputs = predict(inputs.to(device))
            for name, value in self.objective.metrics(outputs, targets.to(device)).items():
                totals[name] = totals.get(name, 0.0) + len(targets) * float(value)
        return {name: total / count for name, total in totals.items()}
