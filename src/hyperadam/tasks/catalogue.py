"""Tasks by name. A name says everything: data, network, variant."""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from hyperadam.errors import ConfigError, unknown_name
from hyperadam.tasks.base import Task
from hyperadam.tasks.convnet import HIDDEN, ConvNet
from hyperadam.tasks.data import CLUTTER, CLUTTER_SIZE, SMALL_MNIST, SMALL_SIZE, Data
from hyperadam.tasks.entry import TaskEntry, image_examples, module_network, text_examples
from hyperadam.tasks.examples import SineExamples
from hyperadam.tasks.image_folder import ImageFolder, ImageFolderExamples
from hyperadam.tasks.imagenet_resnet import STAGES, ImageNetResNet
from hyperadam.tasks.networks import ACTIVATIONS, LSTM, MLP, ModuleNetwork
from hyperadam.tasks.practice import practice_entries
from hyperadam.tasks.resnet import CifarResNet
from hyperadam.tasks.supervised import Examples, Network, Regression
from hyperadam.tasks.text import CONTEXT, VOCABULARY
from hyperadam.tasks.transformer import CharacterTransformer, VisionTransformer

MLP_WIDTH = 20
MAX_MLP_DEPTH = 10
RESNET_DEPTHS = (20, 32, 44, 56, 110)
IMAGENET_CLASSES = 1000
RESNET_WEIGHT_DECAY = 1e-4

IMAGES = {
    "digits": (1, 8, 10),
    "mnist": (1, 28, 10),
    SMALL_MNIST: (1, SMALL_SIZE, 10),
    CLUTTER: (3, CLUTTER_SIZE, 10),
    "cifar10": (3, 32, 10),
    "cifar100": (3, 32, 100),
}
"""Channels, height and width, and classes of each data set of images."""


def _mlp(data: str, depth: int, activation: str) -> TaskEntry:
    channels, size, classes = IMAGES[data]
    sizes = (channels * size**2, *[MLP_WIDTH] * depth, classes)
    return TaskEntry(
        f"{data}-mlp{depth}-{activation}", data, lambda _: MLP(sizes, activation), image_examples()
    )


def _cnn(data: str, blocks: int, variant: str) -> TaskEntry:
    build = functools.partial(ConvNet, *IMAGES[data], blocks=blocks, batch_norm=variant == "-bn")
    masks = [(HIDDEN,)] if variant == "-dropout" else []
    network = module_network(build, init="normal", mask_shapes=masks)
    return TaskEntry(f"{data}-cnn{blocks}{variant}", data, network, image_examples())


def _lstm(layers: int, variant: str) -> TaskEntry:
    # The papers write N(0, 0.1) and N(0, 0.01). As standard deviations these come near the figures
    # that are known of the released weights; as variances they would not.
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
        module_network(lambda: CifarResNet(depth, IMAGES[data][2])),
        image_examples(augment=True),
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

    examples = image_examples(reconstruct=True)
    return TaskEntry(f"{data}-autoencoder", data, module_network(build), examples, Regression())


def _vit(data: str) -> TaskEntry:
    patch = {"digits": 2, "mnist": 7, "cifar10": 4}[data]
    build = functools.partial(VisionTransformer, *IMAGES[data], patch=patch)
    return TaskEntry(f"{data}-vit", data, module_network(build), image_examples())


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
    network = module_network(lambda: CharacterTransformer(VOCABULARY, CONTEXT))
    return TaskEntry(f"{data}-transformer", data, network, text_examples())


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
        *practice_entries(),
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
