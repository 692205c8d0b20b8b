"""The demonstration: a task trained with the bundled weights, beside Adam."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from hyperadam.baselines import HAND_DESIGNED
from hyperadam.evaluation import OptimizerFactory, TrainingRun, train, tune
from hyperadam.evaluation.tuning import tuning_seeds
from hyperadam.files import atomic_write
from hyperadam.optim import VariationalHyperAdam
from hyperadam.tasks import Task
from hyperadam.weights import Weights

DEFAULT_TASK = "digits-mlp1-sigmoid"
TUNING_SEEDS = tuning_seeds(3)
POSTERIOR_DRAWS = 10
BAND = (5, 95)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One optimizer's runs in the demonstration.

    Attributes:
        name: with its learning rate, for tables and legends.
        lr: the learning rate.
        runs: one a seed.
    """

    name: str
    lr: float
    runs: list[TrainingRun]

    def final_losses(self) -> np.ndarray:
        return np.array([run.final_loss for run in self.runs])

    def accuracies(self) -> np.ndarray | None:
        """None where the task has none."""
        if "val_accuracy" not in self.runs[0].metrics:
            return None
        return np.array([run.metrics["val_accuracy"] for run in self.runs])

    def step_milliseconds(self) -> float:
        """Median over runs of the optimizer's own time for a step."""
        steps = len(self.runs[0].train_loss_T)
        return float(np.median([1e3 * run.optimizer_seconds / steps for run in self.runs]))


@dataclasses.dataclass(frozen=True)
class Demo:
    """All runs of a demonstration.

    Attributes:
        task: its name.
        ours: Variational HyperAdam.
        adam_tuned: Adam at the best learning rate of its grid, chosen on other seeds.
        adam_default: Adam at its default.
        posterior: runs of ours from one initialisation and data order, with other noise.
    """

    task: str
    ours: Entry
    adam_tuned: Entry
    adam_default: Entry
    posterior: list[TrainingRun]

    def entries(self) -> list[Entry]:
        return [self.ours, self.adam_tuned, self.adam_default]


def total_work(seeds: int) -> int:
    """How often :func:`run_demo` calls ``advance``."""
    return 1 + 3 * seeds + POSTERIOR_DRAWS


def run_demo(
    task: Task, weights: Weights, *, seeds: int, steps: int, advance: Callable[[str], None]
) -> Demo:
    """Train a task with each optimizer.

    Args:
        task: what to train.
        weights: of Variational HyperAdam.
        seeds: how many initialisations and data orders, 0 to ``seeds - 1``.
        steps: of each run.
        advance: called after each piece of work with what comes next.
    """

    def ours(noise_seed: int) -> OptimizerFactory:
        return lambda params: VariationalHyperAdam(params, weights=weights, seed=noise_seed)

    def entry(name: str, lr: float, factory: Callable[[int], OptimizerFactory]) -> Entry:
        runs = []
        for seed in range(seeds):
            runs.append(train(task, factory(seed), seed=seed, steps=steps))
            advance(name)
        return Entry(name, lr, runs)

    def adam(lr: float) -> OptimizerFactory:
        return lambda params: HAND_DESIGNED["adam"].build(params, lr, 0)

    def mean_final_loss(lr: float) -> float:
        runs = [
            train(task, adam(lr), seed=seed, steps=steps, validate=False) for seed in TUNING_SEEDS
        ]
        return float(np.mean([run.final_loss for run in runs]))

    default_lr = HAND_DESIGNED["adam"].default_lr
    best_lr = tune(default_lr, mean_final_loss)
    advance("Adam's grid")
    demo = Demo(
        task=task.name,
        ours=entry("Variational HyperAdam", weights.lr, ours),
        adam_tuned=entry("Adam, best lr", best_lr, lambda _: adam(best_lr)),
        adam_default=entry("Adam, default lr", default_lr, lambda _: adam(default_lr)),
        posterior=[],
    )
    run = partial(train, task, seed=0, steps=steps)
    for draw in range(POSTERIOR_DRAWS):
        demo.posterior.append(run(ours(seeds + draw)))
        advance("posterior")
    return demo


def draw_demo(demo: Demo, path: Path) -> None:
    """Write the picture: mean curves over seeds, and the posterior's band.

    The band is the spread of the loss over runs that differ in nothing but the noise of the
    sampled updates, relative to their mean: beside the curves' own range it would be a line.

    Args:
        demo: the runs.
        path: of a PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, len(demo.ours.runs[0].train_loss_T) + 1)
    for color, entry in zip(("C3", "C0", "C7"), demo.entries(), strict=True):
        curves = np.stack([run.train_loss_post_T for run in entry.runs])
        label = f"{entry.name} ({entry.lr:g})"
        left.plot(steps, curves.mean(axis=0), color=color, label=label)
        left.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.15)
    left.set_title(f"{demo.task}, {len(demo.ours.runs)} seeds: mean and range", fontsize=10)
    left.set_ylabel("training loss after the update")
    left.set_yscale("log")

    sampled = np.stack([run.train_loss_post_T for run in demo.posterior])
    relative = 100 * (sampled / sampled.mean(axis=0) - 1)
    low, high = np.percentile(relative, BAND, axis=0)
    right.plot(steps, relative.T, color="C3", alpha=0.3, linewidth=0.7)
    right.fill_between(
        steps, low, high, color="C3", alpha=0.3, label=f"posterior, {BAND[0]} to {BAND[1]} %"
    )
    right.set_title(f"the same run, {len(sampled)} draws of its sampled updates", fontsize=10)
    right.set_ylabel("training loss against the draws' mean, %")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    atomic_write(path, buffer.getvalue())
