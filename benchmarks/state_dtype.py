"""Whether training with a state of bfloat16 ends where training with float32 does.

The same seeds (initial parameters, data, noise) with either state; what float32's own seeds scatter
by is the measure of a difference.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.report import table
from hyperadam.evaluation import train
from hyperadam.optim import VariationalHyperAdam
from hyperadam.tasks import make_task

TASKS = ("digits-mlp1-sigmoid", "mnist-mlp1-sigmoid", "mnist-mlp1-relu", "mnist-mlp3-sigmoid")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Final losses of one task, one a seed."""

    task: str
    steps: int
    float32: list[float]
    bfloat16: list[float]

    def t_statistic(self) -> float:
        """Welch's t of the difference of the means: beyond about 2 to 3, more than seed noise."""
        one, two = np.array(self.float32), np.array(self.bfloat16)
        scatter = one.var(ddof=1) / len(one) + two.var(ddof=1) / len(two)
        return float((two.mean() - one.mean()) / math.sqrt(scatter)) if scatter > 0 else 0.0


def compare(task_name: str, steps: int, seeds: int, data_dir: Path | None) -> Comparison:
    """Train with both states from ``seeds`` seeds."""
    task = make_task(task_name, data_dir)
    losses: dict[Literal["float32", "bfloat16"], list[float]] = {"float32": [], "bfloat16": []}
    for seed in range(seeds):
        for dtype, found in losses.items():
            factory = partial(VariationalHyperAdam, seed=seed, state_dtype=dtype)
            found.append(train(task, factory, seed=seed, steps=steps).final_loss)
    return Comparison(task_name, steps, losses["float32"], losses["bfloat16"])


def run(*, data_dir: Path, quick: bool) -> tuple[dict[str, Any], list[str]]:
    """All numbers, and the sections of the Markdown file."""
    tasks, steps, seeds = (TASKS[:1], 20, 2) if quick else (TASKS, 1000, 10)
    found = []
    for task in tasks:
        print(f"state-dtype: {task}")
        found.append(compare(task, steps, seeds, data_dir))
    rows = []
    for each in found:
        cells = [
            f"{np.mean(losses):.5f} ± {np.std(losses, ddof=1):.5f}"
            for losses in (each.float32, each.bfloat16)
        ]
        rows.append([each.task, str(each.steps), str(seeds), *cells, f"{each.t_statistic():+.2f}"])
    header = ["task", "steps", "seeds", "float32 state", "bfloat16 state", "Welch's t"]
    text = "Final training loss with the bundled weights, mean ± standard deviation over seeds:"
    return {"comparisons": [dataclasses.asdict(each) for each in found]}, [
        text,
        table(header, rows),
    ]
