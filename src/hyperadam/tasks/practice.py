"""Small, quick tasks to meta-train on. No suite has them: what is reported was not trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hyperadam.tasks.data import CLUTTER, CLUTTER_SIZE, SMALL_MNIST, SMALL_SIZE
from hyperadam.tasks.entry import TaskEntry, image_examples, module_network, text_examples
from hyperadam.tasks.examples import AutoregressiveExamples
from hyperadam.tasks.networks import ACTIVATIONS, LSTM, MLP
from hyperadam.tasks.supervised import Regression
from hyperadam.tasks.text import UNICODE_NAMES, VOCABULARY
from hyperadam.tasks.transformer import CharacterTransformer, VisionTransformer

CLASSES = 10
TEXT_CONTEXT = 32


class Images(NamedTuple):
    """A data set of images, for tasks.

    Attributes:
        name: in the tasks' names.
        data: of :data:`hyperadam.tasks.DATA_SETS`.
        size: pixels a side.
        channels: 3 where they have colours.
    """

    name: str
    data: str
    size: int
    channels: int = 1


SMALL = Images(SMALL_MNIST, SMALL_MNIST, SMALL_SIZE)
WHOLE = Images("mnist28", "mnist", 28)
"""As many inputs as the reported networks on MNIST have."""
COLOURED = Images(CLUTTER, CLUTTER, CLUTTER_SIZE, channels=3)
"""Hard ones: a network is far from fitting them after some hundred steps, and the early steps of a
convolutional one without normalisation can stop it for good."""


class RowAttention(nn.Module):
    """Layers of attention over an image's rows; the mean of their outputs is classified.

    Args:
        width: of a row's embedding.
        layers: how many.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(SMALL_SIZE, width)
        self.position = nn.Parameter(0.1 * torch.randn(SMALL_SIZE, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.output = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (batch, 1, size, size)."""
        rows = self.embed(images.squeeze(1)) + self.position
        logits: Tensor = self.output(self.encoder(rows).mean(dim=1))
        return logits


def _mlp(images: Images, depth: int, width: int, activation: str) -> TaskEntry:
    network = MLP((images.channels * images.size**2, *[width] * depth, CLASSES), activation)
    return TaskEntry(
        f"{images.name}-mlp{depth}x{width}-{activation}",
        images.data,
        lambda _: network,
        image_examples(),
    )


def _normalised_mlp(depth: int, width: int, batch_size: int) -> TaskEntry:
    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        fan_in = SMALL.size**2
        for _ in range(depth):
            layers += [nn.Linear(fan_in, width), nn.LayerNorm(width), nn.GELU()]
            fan_in = width
        return nn.Sequential(*layers, nn.Linear(width, CLASSES))

    return TaskEntry(
        f"{SMALL_MNIST}-mlp{depth}x{width}-gelu-ln-b{batch_size}",
        SMALL_MNIST,
        module_network(build),
        image_examples(batch_size=batch_size),
    )


def _cnn(
    images: Images,
    blocks: tuple[tuple[int, ...], ...],
    batch_size: int,
    *,
    hidden: int | None = None,
    batch_norm: bool = False,
) -> TaskEntry:
    """Each block has its convolutions' channels, and a 2×2 maximum at the end."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        fan_in = images.channels
        for block in blocks:
            for fan_out in block:
                layers.append(nn.Conv2d(fan_in, fan_out, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(fan_out))
                layers.append(nn.ReLU())
                fan_in = fan_out
            layers.append(nn.MaxPool2d(2))
        layers.append(nn.Flatten())
        fan_in *= (images.size // 2 ** len(blocks)) ** 2
        if hidden is not None:
            layers += [nn.Linear(fan_in, hidden), nn.ReLU()]
            fan_in = hidden
        return nn.Sequential(*layers, nn.Linear(fan_in, CLASSES))

    name = "x".join("-".join(map(str, block)) for block in blocks)
    name += f"-h{hidden}" if hidden is not None else ""
    name += "-bn" if batch_norm else ""
    return TaskEntry(
        f"{images.name}-cnn{name}-b{batch_size}",
        images.data,
        module_network(build, init="normal"),
        image_examples(batch_size=batch_size),
    )


def _row_lstm(layers: int, hidden: int) -> TaskEntry:
    network = LSTM(hidden, layers, inputs=SMALL_SIZE, classes=CLASSES)
    return TaskEntry(
        f"{SMALL_MNIST}-lstm{layers}x{hidden}", SMALL_MNIST, lambda _: network, image_examples()
    )


def _autoregressive_lstm(layers: int, hidden: int) -> TaskEntry:
    return TaskEntry(
        f"autoregressive-lstm{layers}x{hidden}",
        None,
        lambda _: LSTM(hidden, layers),
        lambda _: AutoregressiveExamples(),
        Regression(),
    )


def _attention(layers: int, width: int) -> TaskEntry:
    return TaskEntry(
        f"{SMALL_MNIST}-attention{layers}x{width}",
        SMALL_MNIST,
        module_network(lambda: RowAttention(width, layers)),
        image_examples(batch_size=64),
    )


def _vit(images: Images, patch: int, layers: int, width: int, batch_size: int) -> TaskEntry:
    return TaskEntry(
        f"{images.name}-vit{layers}x{width}-b{batch_size}",
        images.data,
        module_network(
            lambda: VisionTransformer(
                images.channels, images.size, CLASSES, patch=patch, width=width, layers=layers
            )
        ),
        image_examples(batch_size=batch_size),
    )


def _transformer(layers: int, width: int, batch_size: int) -> TaskEntry:
    return TaskEntry(
        f"{UNICODE_NAMES}-transformer{layers}x{width}-b{batch_size}",
        UNICODE_NAMES,
        module_network(
            lambda: CharacterTransformer(VOCABULARY, TEXT_CONTEXT, width=width, layers=layers)
        ),
        text_examples(batch_size=batch_size, context=TEXT_CONTEXT),
    )


def _autoencoder(widths: tuple[int, ...], activation: type[nn.Module]) -> TaskEntry:
    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        fan_in = SMALL.size**2
        for fan_out in widths:
            layers += [nn.Linear(fan_in, fan_out), activation()]
            fan_in = fan_out
        shape = (1, SMALL_SIZE, SMALL_SIZE)
        return nn.Sequential(*layers, nn.Linear(fan_in, SMALL.size**2), nn.Unflatten(1, shape))

    name = "x".join(map(str, widths))
    return TaskEntry(
        f"{SMALL_MNIST}-autoencoder{name}-{activation.__name__.lower()}",
        SMALL_MNIST,
        module_network(build),
        image_examples(reconstruct=True),
        Regression(),
    )


def practice_entries() -> list[TaskEntry]:
    """All of them."""
    return [
        *(
            _mlp(images, depth, width, activation)
            for images, depth, width in (
                (SMALL, 1, 32),
                (SMALL, 2, 16),
                (SMALL, 4, 24),
                (SMALL, 8, 16),
                (WHOLE, 1, 24),
                (WHOLE, 3, 16),
                (WHOLE, 7, 16),
            )
            for activation in ACTIVATIONS
        ),
        *(_normalised_mlp(2, 32, batch_size) for batch_size in (16, 128)),
        *(
            _cnn(images, blocks, batch_size, batch_norm=batch_norm)
            for images, blocks, batch_size in (
                (SMALL, ((8,),), 128),
                (SMALL, ((8,), (16,)), 32),
                (WHOLE, ((6,),), 64),
                (COLOURED, ((8,),), 128),
                (COLOURED, ((8,), (16,)), 64),
            )
            for batch_norm in (False, True)
        ),
        *(
            _cnn(COLOURED, blocks, batch_size, hidden=hidden)
            for blocks, hidden, batch_size in (
                (((12, 12),), None, 64),
                (((16, 32),), None, 64),
                (((8,), (16,), (24,)), None, 64),
                (((8,), (16,)), 32, 64),
                (((8, 8), (16, 16)), None, 64),
                (((8, 8), (16, 16)), 32, 64),
                (((12, 12), (24, 24)), 48, 64),
                (((8, 8, 8),), 32, 32),
                (((8, 8), (16, 16), (24, 24)), None, 32),
            )
        ),
        _row_lstm(1, 16),
        _row_lstm(2, 8),
        _autoregressive_lstm(1, 16),
        _autoregressive_lstm(2, 8),
        _attention(1, 16),
        _attention(2, 16),
        _vit(WHOLE, 7, 2, 32, 64),
        _vit(COLOURED, 4, 1, 48, 64),
        _vit(COLOURED, 4, 4, 24, 32),
        _transformer(2, 32, 16),
        _transformer(4, 24, 8),
        _autoencoder((32, 8, 32), nn.ReLU),
        _autoencoder((16,), nn.Tanh),
    ]
