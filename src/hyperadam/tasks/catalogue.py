"""Tasks by name. A name says everything: data, network, variant."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyperadam.errors import ConfigError, unknown_name
from hyperadam.tasks.base import Task, make_generator
from hyperadam.tasks.convnet import HIDDEN, ConvNet
from hyperadam.tasks.data import DATA_SETS, ClassificationData, Data, load_data
from hyperadam.tasks.examples import ImageExamples, SineExamples
from hyperadam.tasks.image_folder import ImageFolder, ImageFolderExamples
from hyperadam.tasks.imagenet_resnet import STAGES, ImageNetResNet
from hyperadam.tasks.networks import ACTIVATIONS, LSTM, MLP, ModuleNetwork
from hyperadam.tasks.resnet import CifarResNet
from hyperadam.tasks.supervised import (
    Classification,
    Examples,
    Network,
    Objective,
    Regression,
    SupervisedTask,
)
from hyperadam.tasks.text import CONTEXT, VOCABULARY, TextData, TextExamples
from hyperadam.tasks.transformer import CharacterTransformer, VisionTransformer

MLP_WIDTH = 20
MAX_MLP_DEPTH = 10
RESNET_DEPTHS = (20, 32, 44, 56, 110)
IMAGENET_CLASSES = 1000
RESNET_WEIGHT_DECAY = 1e-4

IMAGES = {
    "digits": (1, 8, 10),
    "mnist": (1, 28, 10),
    "cifar10": (3, 32, 10),
    "cifar100": (3, 32, 100),
}
"""Channels, height and width, and classes of each data set of images."""


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """A task that can be made.

    Attributes:
        name: of the task.
        data: of :data:`hyperadam.tasks.DATA_SETS`; None: it makes its own.
        network: makes the network, for the data; without data, where a task needs them, one of the
            published size whose parameters can be counted only.
        examples: makes the examples, from the data.
        objective: see :class:`~hyperadam.tasks.supervised.SupervisedTask`.
        weight_decay: likewise.
    """

    name: str
    data: str | None
    network: Callable[[Data | None], Network]
    examples: Callable[[Data | None], Examples]
    objective: Objective = dataclasses.field(default_factory=Classification)
    weight_decay: float = 0.0

    def make(self, data_dir: Path | None) -> SupervisedTask:
        """The task, on the data of its name; see :func:`load_data`."""
        return self.on(None if self.data is None else load_data(self.data, data_dir))

    def on(self, data: Data | None) -> SupervisedTask:
        """The task, on these data."""
        return SupervisedTask(
            self.name, self.network(data), self.examples(data), self.objective, self.weight_decay
        )

    def data_needs(self) -> str:
        """In words, what the data are read from."""
        return "none" if self.data is None else DATA_SETS[self.data]

    def num_params(self) -> int:
        """How many numbers the network has; needs no data."""
        network = self.network(None)
        if isinstance(network, ModuleNetwork):
            return sum(value.numel() for value in network.training.parameters())
        return sum(value.numel() for value in network.init_params(make_generator(0)).values())


def _module(build: Callable[[], nn.Module], **settings: Any) -> Callable[[Data | None], Network]:
    return lambda _: ModuleNetwork(build, **settings)


def _images(**settings: bool) -> Callable[[Data | None], Examples]:
    def examples(data: Data | None) -> Examples:
        assert isinstance(data, ClassificationData)
        return ImageExamples(data, **settings)

    return examples


def _mlp(data: str, depth: int, activation: str) -> TaskEntry:
    channels, size, classes = IMAGES[data]
    sizes = (channels * size**2, *[MLP_WIDTH] * depth, classes)
    return TaskEntry(
        f"{data}-mlp{depth}-{activation}", data, lambda _: MLP(sizes, activation), _images()
    )


def _cnn(data: str, blocks: int, variant: str) -> TaskEntry:
    build = functools.partial(ConvNet, *IMAGES[data], blocks=blocks, batch_norm=variant == "-bn")
    masks = [(HIDDEN,)] if variant == "-dropout" else []
    network = _module(build, init="normal", mask_shapes=masks)
    return TaskEntry(f"{data}-cnn{blocks}{variant}", data, network, _images())


def _lstm(layers: int, variant: str) -> TaskEntry:
    # The papers write N(0, 0.1) and N(0, 0.01). As standard deviations these give the figures that
    # are known of the released weights; as variances they would not.
    noise = 0.01 if variant else 0.1
    return TaskEntry(
        f"sine-lstm{layers}{variant}",
        None,
        lambda _: LSTM(layers=layers),
        lambda _: SineExamples(noise),
        Regression(),
    )


def _resnet(data: str, depth: int) -> TaskEntry:
    return TaskEntry(
        f"{data}-resnet{depth}",
        data,
        _module(lambda: CifarResNet(depth, IMAGES[data][2])),
        _images(augment=True),
        weight_decay=RESNET_WEIGHT_DECAY,
    )


def _autoencoder(data: str) -> TaskEntry:
    channels, size, _ = IMAGES[data]
    shape = (channels, size, size)

    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        pixels = math.prod(shape)
        for fan_in, fan_out in ((pixels, 128), (128, 32), (32, 128)):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(128, pixels), nn.Sigmoid(), nn.Unflatten(1, shape))

    examples = _images(reconstruct=True)
    return TaskEntry(f"{data}-autoencoder", data, _module(build), examples, Regression())


def _vit(data: str) -> TaskEntry:
    patch = {"digits": 2, "mnist": 7, "cifar10": 4}[data]
    build = functools.partial(VisionTransformer, *IMAGES[data], patch=patch)
    return TaskEntry(f"{data}-vit", data, _module(build), _images())


def _imagenet(depth: int) -> TaskEntry:
    def network(data: Data | None) -> Network:
        if data is None:
            with torch.device("meta"):  # shapes without numbers
                return ModuleNetwork(lambda: ImageNetResNet(depth, IMAGENET_CLASSES))
        assert isinstance(data, ImageFolder)
        return ModuleNetwork(lambda: ImageNetResNet(depth, data.num_classes))

    def examples(data: Data | None) -> Examples:
        assert isinstance(data, ImageFolder)
        return ImageFolderExamples(data)

    return TaskEntry(
        f"imagenet-resnet{depth}", "imagenet", network, examples, weight_decay=RESNET_WEIGHT_DECAY
    )


def _transformer(data: str) -> TaskEntry:
    def examples(data: Data | None) -> Examples:
        assert isinstance(data, TextData)
        return TextExamples(data)

    network = _module(lambda: CharacterTransformer(VOCABULARY, CONTEXT))
    return TaskEntry(f"{data}-transformer", data, network, examples)


def _entries() -> list[TaskEntry]:
    grey = ("digits", "mnist")
    return [
        *(
            _mlp(data, depth, activation)
            for data in grey
            for depth in range(1, MAX_MLP_DEPTH + 1)
            for activation in ACTIVATIONS
        ),
        *(
            _cnn(data, blocks, variant)
            for data in (*grey, "cifar10")
            for blocks, variants in ((1, ("", "-bn")), (2, ("", "-bn", "-dropout")))
            for variant in variants
        ),
        *(_lstm(layers, variant) for layers in (1, 2) for variant in ("", "-smallnoise")),
        *(_resnet(data, depth) for data in ("cifar10", "cifar100") for depth in RESNET_DEPTHS),
        *(_imagenet(depth) for depth in STAGES),
        *(_autoencoder(data) for data in grey),
        *(_vit(data) for data in (*grey, "cifar10")),
        *(_transformer(data) for data in ("pydoc", "shakespeare")),
    ]


TASKS: dict[str, TaskEntry] = {entry.name: entry for entry in _entries()}


def match_tasks(patterns: Sequence[str]) -> list[TaskEntry]:
    """The tasks whose names match a pattern, as file names do; each once, in their order.

    Raises:
        ConfigError: a pattern that matches nothing; the message has the near misses.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(TASKS, pattern)
        if not found:
            raise ConfigError(unknown_name("task", pattern, TASKS))
        chosen.update(found)
    return [entry for name, entry in TASKS.items() if name in chosen]


def make_task(name: str, data_dir: Path | None = None) -> Task:
    """The task of this name.

    Args:
        name: of :data:`TASKS`; ``hyperadam tasks`` lists them.
        data_dir: see :func:`load_data`.

    Raises:
        ConfigError: no such task.
        DataError: its data can't be had.
    """
    if name not in TASKS:
        raise ConfigError(unknown_name("task", name, TASKS))
    return TASKS[name].make(data_dir)
