"""A task by its parts: data, network, examples, objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from hyperadam.tasks.base import make_generator
from hyperadam.tasks.data import DATA_SETS, ClassificationData, Data, load_data
from hyperadam.tasks.examples import ImageExamples
from hyperadam.tasks.networks import ModuleNetwork
from hyperadam.tasks.supervised import (
    Classification,
    Examples,
    Network,
    Objective,
    SupervisedTask,
)
from hyperadam.tasks.text import TextData, TextExamples


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


def module_network(
    build: Callable[[], nn.Module], **settings: Any
) -> Callable[[Data | None], Network]:
    """A :class:`TaskEntry`'s network of an ``nn.Module``, whatever the data."""
    return lambda _: ModuleNetwork(build, **settings)


def image_examples(**settings: Any) -> Callable[[Data | None], Examples]:
    """A :class:`TaskEntry`'s examples of images; settings of :class:`ImageExamples`."""

    def examples(data: Data | None) -> Examples:
        assert isinstance(data, ClassificationData)
        return ImageExamples(data, **settings)

    return examples


def text_examples(**settings: Any) -> Callable[[Data | None], Examples]:
    """A :class:`TaskEntry`'s examples of text; settings of :class:`TextExamples`."""

    def examples(data: Data | None) -> Examples:
        assert isinstance(data, TextData)
        return TextExamples(data, **settings)

    return examples
