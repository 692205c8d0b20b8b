"""Multi-layer perceptrons for classification, as in the papers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadam.tasks.base import Batch, Params, batch_indices
from hyperadam.tasks.data import ClassificationData

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "elu": F.elu,
    "tanh": torch.tanh,
}

INIT_STD = 0.1


@dataclasses.dataclass(frozen=True)
class MLPTask:
    """Pixels, ``depth`` hidden layers of ``width``, labels; cross-entropy.

    All weights and biases start at N(0, 0.1²), as in the papers.

    Attributes:
        data: images and labels.
        depth: hidden layers.
        width: units of a hidden layer.
        activation: a name of :data:`ACTIVATIONS`.
        batch_size: images of a batch, fewer where the data set has fewer.
    """

    data: ClassificationData
    depth: int = 1
    width: int = 20
    activation: str = "sigmoid"
    batch_size: int = 128

    @property
    def name(self) -> str:
        return f"{self.data.name}-mlp{self.depth}-{self.activation}"

    def init_params(self, generator: torch.Generator) -> Params:
        pixels = self.data.train_images[0].numel()
        sizes = [pixels, *[self.width] * self.depth, self.data.num_classes]
        params: Params = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            for name, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
                values = torch.randn(shape, generator=generator)
                params[f"linear{layer + 1}.{name}"] = INIT_STD * values
        return params

    def batch(self, seed: int, step: int) -> Batch:
        """Pixels (batch, height width) from 0 to 1, float32, and labels (batch,)."""
        labels = self.data.train_labels
        indices = batch_indices(len(labels), self.batch_size, seed, step)
        return self._pixels(self.data.train_images[indices]), labels[indices]

    def _pixels(self, images: Tensor) -> Tensor:
        return images.flatten(1).to(torch.float32) / self.data.max_value

    def loss(self, params: Params, batch: Batch) -> Tensor:
        pixels, labels = batch
        return F.cross_entropy(self._logits(params, pixels), labels)

    def validate(self, params: Params) -> dict[str, float]:
        """``val_loss`` and ``val_accuracy`` (0 to 1)."""
        labels = self.data.val_labels
        logits = self._logits(params, self._pixels(self.data.val_images))
        accuracy = (logits.argmax(dim=1) == labels).double().mean()
        return {
            "val_loss": float(F.cross_entropy(logits, labels)),
            "val_accuracy": float(accuracy),
        }

    def _logits(self, params: Params, pixels: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        x = pixels.to(params["linear1.weight"].dtype)
        for layer in range(1, self.depth + 1):
            x = activation(
                F.linear(x, params[f"linear{layer}.weight"], params[f"linear{layer}.bias"])
            )
        last = f"linear{self.depth + 1}"
        return F.linear(x, params[f"{last}.weight"], params[f"{last}.bias"])
