"""What the command line shows: tables and progress bars."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from hyperadam.demo import Demo
    from hyperadam.estimate import Estimate
    from hyperadam.evaluation import Progress as EvaluationProgress
    from hyperadam.metatrain import MetaStep, MetaTrainer
    from hyperadam.tasks import TaskEntry
    from hyperadam.weights import Weights

PLAIN_WIDTH = 120
"""Columns where the output is no terminal, so that tables in files are not cut."""

PLAIN_SECONDS = 60.0
"""Where there is no terminal for a bar, a line says that often how far it is."""


def print_table(table: Table) -> None:
    """Print a table to standard output."""
    console = Console()
    console = console if console.is_terminal else Console(width=PLAIN_WIDTH)
    console.print(table)


def progress_bar(*columns: ProgressColumn, shown: bool = True) -> Progress:
    """A bar on standard error, with ``columns`` beside it; one of several processes shows it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=PLAIN_WIDTH)
    return Progress(
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )


class _Log:
    """A line now and then where a bar would not be seen before its end."""

    def __init__(self, bar: Progress) -> None:
        self._console = None if bar.disable or bar.console.is_terminal else bar.console
        self._due = time.monotonic() + PLAIN_SECONDS

    def say(self, done: int, total: int, text: str) -> None:
        """Print it, if it is time."""
        if self._console is not None and time.monotonic() >= self._due:
            self._console.print(f"{done}/{total} {text}", highlight=False, soft_wrap=True)
            self._due = time.monotonic() + PLAIN_SECONDS


@contextmanager
def meta_train_progress(
    shown: bool,
) -> Iterator[tuple[Callable[[MetaTrainer], None], Callable[[MetaStep], None]]]:
    """A bar over meta-steps with meta-loss, inner loss, KL term and inner steps a second.

    Args:
        shown: whether this process shows it.

    Yields:
        What to call when the run starts and after each meta-step.
    """
    with progress_bar(TextColumn("{task.description}"), shown=shown) as bar:
        task = bar.add_task("", total=None, visible=False)
        log = _Log(bar)
        inner_steps = 0  # of a meta-step, over all its tasks

        def started(trainer: MetaTrainer) -> None:
            nonlocal inner_steps
            inner_steps = trainer.config.unroll_length * trainer.config.tasks_per_step
            done, total = len(trainer.history), trainer.config.total_meta_steps
            if done and shown:
                bar.console.print(f"resuming after meta-step {done}")
            bar.reset(task, total=total, completed=done, visible=True)

        def progress(record: MetaStep) -> None:
            rate = (bar.tasks[task].speed or math.nan) * inner_steps
            text = f"meta-loss {record.meta_loss:.3f} loss {record.inner_loss:.3f} "
            text += f"KL {record.kl:.2g} {rate:.0f} steps/s"
            bar.update(task, completed=record.index, description=text)
            log.say(record.index, round(bar.tasks[task].total or 0), text)

        yield started, progress


@contextmanager
def evaluation_progress(shown: bool) -> Iterator[Callable[[EvaluationProgress], None]]:
    """A bar over training runs, with the latest one.

    Args:
        shown: whether this process shows it.

    Yields:
        What to call after each run.
    """
    with progress_bar(TextColumn("{task.description}"), shown=shown) as bar:
        task = bar.add_task("", total=None, visible=False)
        log = _Log(bar)

        def progress(now: EvaluationProgress) -> None:
            run = now.latest
            kind = "tuning" if run.is_tuning else f"seed {run.seed}"
            text = f"{run.task} {run.optimizer} lr {run.lr:g} {kind}: {run.final_loss:.4g}"
            bar.update(task, completed=now.made, total=now.known, visible=True, description=text)
            log.say(now.made, now.known, text)

        yield progress


def demo_table(demo: Demo) -> Table:
    """Each optimizer's final loss, accuracy and time."""
    seeds, steps = len(demo.ours.runs), len(demo.ours.runs[0].train_loss_T)
    table = Table(title=f"{demo.task}, {steps} steps, {seeds} seeds: mean ± standard deviation")
    table.add_column("optimizer")
    for name in ("lr", "final training loss", "validation accuracy", "ms a step"):
        table.add_column(name, justify="right")
    for entry in demo.entries():
        loss, accuracies = entry.final_losses(), entry.accuracies()
        accuracy = "–"
        if accuracies is not None:
            accuracy = f"{100 * accuracies.mean():.1f} ± {100 * accuracies.std():.1f} %"
        table.add_row(
            entry.name,
            f"{entry.lr:g}",
            f"{loss.mean():.4f} ± {loss.std():.4f}",
            accuracy,
            f"{entry.step_milliseconds():.2f}",
        )
    return table


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """A quantity to three digits in the largest unit that it reaches, or else the smallest."""
    size, unit = next((entry for entry in units if value >= entry[0]), units[-1])
    number = value / size
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def _bytes(value: float) -> str:
    return _scaled(value, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")))


def _seconds(value: float) -> str:
    return _scaled(value, ((1, "s"), (1e-3, "ms"), (1e-6, "µs")))


def estimate_table(estimate: Estimate) -> Table:
    """Memory and step time beside Adam's."""
    memory = estimate.memory
    table = Table(title=f"{estimate.num_params:,} parameters, state in {estimate.state_dtype}")
    table.add_column("")
    table.add_column("Variational HyperAdam", justify="right")
    table.add_column("Adam", justify="right")
    table.add_row(
        "state a parameter",
        f"{memory.numbers} numbers, {memory.bytes_a_param} bytes",
        f"2 numbers, {memory.adam // estimate.num_params} bytes",
    )
    table.add_row("state", _bytes(memory.state), _bytes(memory.adam))
    table.add_row("working buffers", _bytes(memory.buffers), "")
    table.add_row("state and buffers", _bytes(memory.total), _bytes(memory.adam))
    table.add_row(
        "one step, about", _seconds(estimate.step_seconds), _seconds(estimate.adam_step_seconds)
    )
    return table


def estimate_remarks(estimate: Estimate) -> list[str]:
    """Whether it fits, and how the times were come by; a line each."""
    memory, lines = estimate.memory, []
    if estimate.free_bytes is None:
        lines.append(f"free memory of {estimate.device}: not known")
    elif estimate.fits:
        lines.append(f"free memory of {estimate.device}: {_bytes(estimate.free_bytes)}; it fits")
    else:
        lines.append(
            f"WARNING: it does not fit: {_bytes(memory.peak)} are needed, "
            f"{_bytes(estimate.free_bytes)} of {estimate.device} memory are free"
        )
        if estimate.state_dtype == "float32":
            smaller = memory.state / 2 + memory.buffers + memory.step
            lines.append(f"--state-dtype bfloat16 would need {_bytes(smaller)}")
    if estimate.backend == "reference":
        lines.append(
            f"the reference backend needs about {_bytes(memory.step)} of that only while it steps"
            if estimate.fits is False
            else f"the reference backend needs about {_bytes(memory.step)} more while it steps"
        )
    threads = f", {estimate.threads} threads" if estimate.device == "cpu" else ""
    scaled = estimate.measured_params < estimate.num_params
    lines.append(
        f"times: measured here with {estimate.measured_params:,} parameters in one tensor "
        f"({estimate.backend} backend{threads}), Adam's with {estimate.adam_measured_params:,}"
        + (", scaled linearly" if scaled else "")
    )
    return lines


def tasks_table(entries: Sequence[TaskEntry]) -> Table:
    """One row a task."""
    table = Table()
    table.add_column("task", no_wrap=True)
    table.add_column("parameters", justify="right")
    table.add_column("data")
    for entry in entries:
        table.add_row(entry.name, f"{entry.num_params():,}", entry.data_needs())
    return table


def weights_table(bundled: Mapping[str, Weights]) -> Table:
    """One row a weights file."""
    table = Table()
    for name in ("name", "rule", "numbers", "lr", "data", "date", "licence"):
        table.add_column(name)
    for name, weights in bundled.items():
        table.add_row(
            name,
            weights.rule.name,
            str(weights.rule.num_theta()),
            f"{weights.lr:g}",
            weights.data,
            weights.date,
            weights.licence,
        )
    return table


def weights_details(weights: Weights) -> Table:
    """All that a weights file says of itself."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in weights.rule.to_dict().items():
        table.add_row(key, str(value))
    table.add_section()
    for key in ("lr", "schedule", "preset", "data", "steps", "date", "commit", "licence"):
        table.add_row(key, str(getattr(weights, key)))
    table.add_row("sha256", weights.digest())
    table.add_section()
    for key, tensor in weights.theta.items():
        spread = f"mean {tensor.mean():+.4f}, rms {tensor.square().mean().sqrt():.4f}"
        table.add_row(key, f"{tuple(tensor.shape)!s:10} {spread}")
    return table
