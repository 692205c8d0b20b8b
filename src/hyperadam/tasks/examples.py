"""What networks are trained on: images, sine waves, text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadam.tasks.base import batch_indices, make_generator
from hyperadam.tasks.data import ClassificationData

VALIDATION_BATCH = 125
"""Small enough for a convolution's outputs to stay in a core's cache."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageExamples:
    """Images from 0 to 1, float32, of shape (batch, channels, height, width), and their labels.

    Attributes:
        data: the data set.
        batch_size: images of a batch, fewer where the data set has fewer.
        augment: move training images by up to 4 pixels, zeros coming in, and mirror half of them.
        reconstruct: the images are their own targets.
    """

    data: ClassificationData
    batch_size: int = 128
    augment: bool = False
    reconstruct: bool = False

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        labels = self.data.train_labels
        indices = batch_indices(len(labels), self.batch_size, seed, step)
        images = self._scaled(self.data.train_images[indices])
        if self.augment:
            images = _augmented(images, make_generator(seed, "augment", step))
        return images, images if self.reconstruct else labels[indices]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.data
        for images, labels in zip(
            data.val_images.split(VALIDATION_BATCH),
            data.val_labels.split(VALIDATION_BATCH),
            strict=True,
        ):
            scaled = self._scaled(images)
            yield scaled, scaled if self.reconstruct else labels

    def _scaled(self, images: Tensor) -> Tensor:
        channels_first = images if images.dim() == 4 else images.unsqueeze(1)
        scaled = channels_first.to(torch.float32) / self.data.max_value
        return scaled.contiguous(memory_format=torch.channels_last)


CROP_PADDING = 4


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of padded images, half of them mirrored (He et al., CVPR 2016, section 4.2)."""
    count, _, height, width = images.shape
    padded = F.pad(images, (CROP_PADDING,) * 4)
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    across = torch.arange(width)
    columns = left + torch.where(mirrored, width - 1 - across, across)
    rows = top + torch.arange(height)
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)  # in memory, the channels are last


SEQUENCE = 10
HELD_OUT_SINES = 1000


@dataclasses.dataclass(frozen=True)
class SineExamples:
    """Ten values of a sine wave, and the next one.

    ``f(k) = A sin(k ω + φ)`` for k = 0 to 10 with ``A ~ U(0, 10)``, ``ω ~ U(0, π/2)`` and
    ``φ ~ U(0, 2π)``, all values with normal noise.

    Source: Lv et al., "Learning gradient descent: better generalization and longer horizons",
    ICML 2017, section 4.4.

    Attributes:
        noise: its standard deviation.
        batch_size: sequences of a batch.
    """

    noise: float
    batch_size: int = 128

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        return self._draw(make_generator(seed, "sine", step), self.batch_size)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._draw(make_generator(0, "sine, held out"), HELD_OUT_SINES)

    def _draw(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        amplitude, omega, phase = torch.rand(3, count, 1, generator=generator)
        times = torch.arange(SEQUENCE + 1)
        angles = times * (omega * math.pi / 2) + 2 * math.pi * phase
        values = 10 * amplitude * torch.sin(angles)
        values += self.noise * torch.randn(values.shape, generator=generator)
        return values[:, :SEQUENCE], values[:, SEQUENCE]


HELD_OUT_WALKS = 1000


@dataclasses.dataclass(frozen=True)
class AutoregressiveExamples:
    """Ten values of an autoregressive process of order 2, and the next one without its noise.

    ``x(k) = 2 r cos(ω) x(k-1) - r² x(k-2) + ε`` with ``r ~ U(0.5, 1)``, ``ω ~ U(0, π)`` and two
    standard normal values to begin with: each sequence has its own coefficients, which are to be
    found from what was seen of it.

    Attributes:
        noise: standard deviation of ε.
        batch_size: sequences of a batch.
    """

    noise: float = 0.1
    batch_size: int = 64

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        return self._draw(make_generator(seed, "autoregressive", step), self.batch_size)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._draw(make_generator(0, "autoregressive, held out"), HELD_OUT_WALKS)

    def _draw(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        radius, angle = torch.rand(2, count, generator=generator)
        radius = 0.5 + 0.5 * radius
        first, second = 2 * radius * torch.cos(math.pi * angle), -radius.square()
        values = list(torch.randn(2, count, generator=generator))
        noise = self.noise * torch.randn(SEQUENCE - 2, count, generator=generator)
        for own in noise:
            values.append(first * values[-1] + second * values[-2] + own)
        return torch.stack(values, dim=1), first * values[-1] + second * values[-2]
