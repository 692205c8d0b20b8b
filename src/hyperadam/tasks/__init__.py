"""Tasks: initial parameters, batches and a loss, as pure functions. Torch only.

Data sets are loaded by libraries that are imported where they are used.
"""

from __future__ import annotations

from hyperadam.tasks.base import (
    Batch,
    Params,
    Task,
    derive_seed,
    make_generator,
    map_batches,
    move_batch,
    stack_batches,
)
from hyperadam.tasks.catalogue import TASKS, make_task, match_tasks
from hyperadam.tasks.convex import ConvexTask
from hyperadam.tasks.data import DATA_SETS, ClassificationData, Data, load_data
from hyperadam.tasks.entry import TaskEntry
from hyperadam.tasks.examples import ImageExamples, SineExamples
from hyperadam.tasks.image_folder import ImageFolder, ImageFolderExamples
from hyperadam.tasks.networks import ACTIVATIONS, LSTM, MLP, ModuleNetwork
from hyperadam.tasks.supervised import (
    Classification,
    Examples,
    Network,
    Objective,
    Regression,
    SupervisedTask,
)
from hyperadam.tasks.text import TextData, TextExamples
from hyperadam.tasks.wrappers import RandomScaling, SumOfTasks

__all__ = [
    "ACTIVATIONS",
    "DATA_SETS",
    "LSTM",
    "MLP",
    "TASKS",
    "Batch",
    "Classification",
    "ClassificationData",
    "ConvexTask",
    "Data",
    "Examples",
    "ImageExamples",
    "ImageFolder",
    "ImageFolderExamples",
    "ModuleNetwork",
    "Network",
    "Objective",
    "Params",
    "RandomScaling",
    "Regression",
    "SineExamples",
    "SumOfTasks",
    "SupervisedTask",
    "Task",
    "TaskEntry",
    "TextData",
    "TextExamples",
    "derive_seed",
    "load_data",
    "make_generator",
    "make_task",
    "map_batches",
    "match_tasks",
    "move_batch",
    "stack_batches",
]
