"""Tasks: initial parameters, batches and a loss, as pure functions. Torch only.

Data sets are loaded by libraries that are imported where they are used.
"""

from __future__ import annotations

from pathlib import Path

from hyperadam.errors import ConfigError, unknown_name
from hyperadam.tasks.base import (
    Batch,
    Params,
    Task,
    derive_seed,
    make_generator,
    stack_batches,
)
from hyperadam.tasks.convex import ConvexTask
from hyperadam.tasks.data import DATA_SETS, ClassificationData, load_data
from hyperadam.tasks.mlp import ACTIVATIONS, MLPTask
from hyperadam.tasks.wrappers import RandomScaling, SumOfTasks

MAX_DEPTH = 10

TASKS: dict[str, tuple[str, int, str]] = {
    f"{data}-mlp{depth}-{activation}": (data, depth, activation)
    for data in DATA_SETS
    for depth in range(1, MAX_DEPTH + 1)
    for activation in ACTIVATIONS
}
"""Task names to data set, hidden layers and activation."""


def check_task_name(name: str) -> None:
    """Refuse an unknown task.

    Raises:
        ConfigError: no such task; the message has the near misses.
    """
    if name not in TASKS:
        raise ConfigError(unknown_name("task", name, TASKS))


def make_task(name: str, data_dir: Path | None = None) -> Task:
    """The task of this name.

    Args:
        name: ``{digits,mnist}-mlp{1..10}-{sigmoid,relu,elu,tanh}``.
        data_dir: see :func:`load_data`.

    Raises:
        ConfigError: no such task.
        DataError: its data can't be had.
    """
    check_task_name(name)
    data, depth, activation = TASKS[name]
    return MLPTask(load_data(data, data_dir), depth=depth, activation=activation)


__all__ = [
    "ACTIVATIONS",
    "DATA_SETS",
    "TASKS",
    "Batch",
    "ClassificationData",
    "ConvexTask",
    "MLPTask",
    "Params",
    "RandomScaling",
    "SumOfTasks",
    "Task",
    "check_task_name",
    "derive_seed",
    "load_data",
    "make_generator",
    "make_task",
    "stack_batches",
]
