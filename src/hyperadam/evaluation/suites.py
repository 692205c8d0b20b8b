"""Which tasks are evaluated together, and for how long."""

from __future__ import annotations

import dataclasses
import fnmatch

from hyperadam.errors import ConfigError, unknown_name
from hyperadam.tasks import TASKS
from hyperadam.tasks.practice import practice_entries

_CNNS = ("cnn1", "cnn1-bn", "cnn2", "cnn2-bn", "cnn2-dropout")

PAPER_TASKS = (
    *(f"mnist-mlp{depth}-sigmoid" for depth in range(1, 11)),
    *(f"mnist-mlp1-{activation}" for activation in ("relu", "elu", "tanh")),
    "sine-lstm1",
    "sine-lstm2",
    "sine-lstm1-smallnoise",
    *(f"{data}-{network}" for data in ("mnist", "cifar10") for network in _CNNS),
)
"""The papers' tasks but the residual networks."""

PRACTICE = "practice"
"""The suite whose tasks are in no other, so that they may be chosen by."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks that are evaluated together.

    Attributes:
        name: on the command line.
        tasks: by name.
        steps: of each run.
        tuning_seeds: how many runs a learning rate of the grid is judged by.
        about: in words.
    """

    name: str
    tasks: tuple[str, ...]
    steps: int
    tuning_seeds: int
    about: str


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("paper-100", PAPER_TASKS, 100, 2, "the papers' tasks, 100 steps as in meta-training"),
        Suite("paper-2000", PAPER_TASKS, 2_000, 1, "the papers' tasks, 2,000 steps"),
        Suite("paper-10000", PAPER_TASKS, 10_000, 1, "the papers' tasks, 10,000 steps"),
        Suite(
            "resnet",
            tuple(name for name in TASKS if "-resnet" in name),
            200 * 390,
            1,
            "residual networks: 200 epochs of CIFAR at a batch of 128, or as --steps says",
        ),
        Suite(
            "modern",
            tuple(
                name
                for name in TASKS
                if name.endswith(("-transformer", "-vit", "-autoencoder"))
                and not name.startswith("digits")
            ),
            2_000,
            1,
            "networks of today that the papers did not have, 2,000 steps",
        ),
        Suite(
            "digits",
            (
                *(f"digits-mlp{depth}-sigmoid" for depth in (1, 2, 3, 6)),
                *(f"digits-mlp1-{activation}" for activation in ("relu", "elu", "tanh")),
                *(f"digits-{network}" for network in _CNNS),
                "digits-autoencoder",
                "digits-vit",
                "sine-lstm1",
            ),
            100,
            2,
            "small versions on data that come along: nothing is downloaded",
        ),
        Suite(
            "ablations",
            (
                "digits-mlp1-sigmoid",
                "digits-mlp3-sigmoid",
                "digits-mlp1-relu",
                "digits-cnn1",
                "digits-autoencoder",
                "sine-lstm1",
            ),
            400,
            2,
            "what the parts of the rule and of its meta-training are worth",
        ),
        Suite(
            PRACTICE,
            tuple(entry.name for entry in practice_entries()),
            2_000,
            1,
            "tasks to meta-train on and to choose weights and settings by, 2,000 steps",
        ),
    )
}


ABLATIONS = {
    "full": "nothing is taken away",
    "no-lstm": "the rule has no LSTM",
    "no-preprocessing": "the rule has no preprocessing layer",
    "no-random-scaling": "meta-training has no random scaling",
    "no-convex": "meta-training has no convex term",
    "candidates-1": "the rule has one candidate for twenty",
    "candidates-5": "the rule has five candidates for twenty",
    "candidates-10": "the rule has ten candidates for twenty",
    "no-varblock": "the rule has no VarBlock: its updates are not sampled",
}
"""What the weights of the suite ``ablations`` are: those of the presets ``ablation-NAME``."""


def find_suite(name: str) -> Suite:
    """The suite of this name.

    Raises:
        ConfigError: no such suite; the message has the near misses.
    """
    if name not in SUITES:
        raise ConfigError(unknown_name("suite", name, SUITES))
    return SUITES[name]


def tasks_of(suite: Suite, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The suite's tasks whose names match a pattern, all of them without patterns.

    Raises:
        ConfigError: a pattern that matches none of them; the message has the near misses, and the
            suites with tasks that it matches.
    """
    if not patterns:
        return suite.tasks
    chosen: set[str] = set()
    for pattern in patterns:
        found = set(fnmatch.filter(suite.tasks, pattern))
        if not found:
            others = [
                other.name for other in SUITES.values() if fnmatch.filter(other.tasks, pattern)
            ]
            raise ConfigError(
                unknown_name(f"task of the suite {suite.name}", pattern, suite.tasks)
                + (f" (it is in: {', '.join(others)})" if others else "")
            )
        chosen |= found
    return tuple(name for name in suite.tasks if name in chosen)
