"""Finished training runs as lines of JSON, in a folder that belongs to one process at a time."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import filelock
import numpy as np

from hyperadam.errors import RunError
from hyperadam.files import atomic_write

Schedule = Literal["none", "cosine"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

RUNS = "runs.jsonl"
DAMAGED = "runs.damaged"
LOCK = ".lock"

FINAL_STEPS = 10
"""The final loss of a run is the mean over this many last steps, as in the papers."""

FIRST_TUNING_SEED = 1_000_000
"""Seeds from here on choose learning rates; no reported figure is of them."""

SIGNIFICANT_DIGITS = 6
"""Of the losses in a file; float32, which they were computed in, has seven."""

DIVERGENCE = 1.2
"""A run whose final loss is above this times its first counts as diverged."""


def final_loss(train_loss_post_T: np.ndarray) -> float:
    """Mean post-update loss of a run's last steps; NaN where one of them is."""
    return float(train_loss_post_T[-FINAL_STEPS:].mean())


def has_diverged(train_loss_T: np.ndarray, train_loss_post_T: np.ndarray) -> bool:
    """Whether a loss was not finite, or the final one is above the start by a fifth, which is
    more than batches differ."""
    return not final_loss(train_loss_post_T) <= DIVERGENCE * train_loss_T[0]


@dataclasses.dataclass(frozen=True)
class RunKey:
    """What makes a run the run that it is: two runs with one key have the same numbers.

    Attributes:
        task: by name.
        optimizer: as on the command line, a weights file by its stem.
        weights: digest of a learned optimizer's weights.
        lr: learning rate, at the start where it is scheduled.
        seed: of initial parameters, data order and noise.
        steps: T.
        schedule: of the learning rate.
    """

    task: str
    optimizer: str
    weights: str | None
    lr: float
    seed: int
    steps: int
    schedule: Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Record(RunKey):
    """One finished training run of T steps: the line of a results file.

    Attributes:
        learned: whether the optimizer was meta-trained.
        default_lr: the optimizer's.
        train_loss: (T,) loss of each step's batch before its update; NaN where not finite.
        train_loss_post: (T,) loss of the same batch after its update, as the papers have it.
        val_loss: on held-out data at the end; None where it was not asked for or not finite.
        val_accuracy: likewise, from 0 to 1; None where the task has none.
        wall_s: seconds of training, without the measurements.
        optimizer_s: seconds in ``optimizer.step()`` among them.
        peak_mb: peak of the process's memory, in 10^6 bytes.
        diverged: a loss was not finite, or the final loss is above the first by a fifth.
        suite: that the run was made for.
        version: of the package.
        machine: in words.
        source: the commit that the run was made by; None in runs from before it was recorded.
        trace: what the rule did inside, see :class:`hyperadam.evaluation.trace.Tracer`.
    """

    learned: bool
    default_lr: float
    train_loss: np.ndarray
    train_loss_post: np.ndarray
    val_loss: float | None
    val_accuracy: float | None
    wall_s: float
    optimizer_s: float
    peak_mb: float
    diverged: bool
    suite: str
    version: str
    machine: str
    source: str | None = None
    trace: dict[str, Any] | None = None

    @property
    def key(self) -> RunKey:
        return RunKey(**{name: getattr(self, name) for name in _KEY})

    @property
    def is_tuning(self) -> bool:
        """Whether the run was made to choose a learning rate."""
        return self.seed >= FIRST_TUNING_SEED

    @property
    def final_loss(self) -> float:
        """Mean post-update loss of the last steps; NaN where one of them is."""
        return final_loss(self.train_loss_post)

    def to_json(self) -> str:
        """The run as one line, without its end; what is not finite is null."""
        values = vars(self) | {name: _rounded(getattr(self, name)) for name in _CURVES}
        for name in _OPTIONAL:
            if values[name] is None:
                del values[name]
        return json.dumps(values, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The run of :meth:`to_json`.

        Raises:
            ValueError: it is not one.
        """
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := names - _OPTIONAL - set(values):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if unknown := set(values) - names:
            raise ValueError(f"it has unknown fields: {', '.join(sorted(unknown)[:5])}")
        for name, kinds in _KINDS.items():
            if name in _OPTIONAL and name not in values:
                continue
            good = isinstance(values[name], kinds) and not isinstance(values[name], bool)
            if not (isinstance(values[name], bool) if kinds is bool else good):
                raise ValueError(f"{name} is {str(values[name])[:40]!r}")
        for name in _CURVES:
            curve = values[name]
            if not isinstance(curve, list) or len(curve) != values["steps"]:
                raise ValueError(f"{name} has not one number a step")
            try:
                values[name] = np.array([math.nan if x is None else x for x in curve], np.float64)
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"{name} holds more than numbers") from None
        return cls(**values)


_KEY = tuple(field.name for field in dataclasses.fields(RunKey))
_CURVES = ("train_loss", "train_loss_post")
_OPTIONAL = {"source", "trace"}
_NUMBER = (int, float)
_KINDS: Mapping[str, Any] = {
    "task": str,
    "optimizer": str,
    "weights": (str, type(None)),
    "lr": _NUMBER,
    "seed": int,
    "steps": int,
    "schedule": str,
    "learned": bool,
    "default_lr": _NUMBER,
    "val_loss": (*_NUMBER, type(None)),
    "val_accuracy": (*_NUMBER, type(None)),
    "wall_s": _NUMBER,
    "optimizer_s": _NUMBER,
    "peak_mb": _NUMBER,
    "diverged": bool,
    "suite": str,
    "version": str,
    "machine": str,
    "source": str,
}


def _rounded(values: np.ndarray) -> list[float | None]:
    return [
        float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
        for value in values.tolist()
    ]


def _parse(text: str) -> tuple[list[Record], list[tuple[int, str, str]]]:
    """The records of a file's text, and its damaged lines: number, line, what is wrong."""
    records, damaged = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(line))
        except (ValueError, RecursionError) as error:
            damaged.append((number, line, str(error)))
    return records, damaged


def read_records(folder: Path) -> tuple[list[Record], list[str]]:
    """All runs of a results folder, each once.

    Args:
        folder: with ``runs.jsonl``, or ``runs.jsonl.gz`` as committed results are.

    Returns:
        The runs, and what is to be said of damaged lines.

    Raises:
        RunError: there are no results, or they can't be read.
    """
    path, packed = folder / RUNS, folder / f"{RUNS}.gz"
    try:
        if path.is_file():
            content = path.read_bytes()
        elif packed.is_file():
            content = gzip.decompress(packed.read_bytes())
        else:
            raise RunError(f"no results in {folder}: it has neither {RUNS} nor {RUNS}.gz")
    except (OSError, EOFError) as error:
        raise RunError(f"the results in {folder} can't be read: {error}") from None
    records, damaged = _parse(content.decode("utf-8", errors="replace"))
    remarks = [f"{RUNS}, line {number} is damaged: {reason}" for number, _, reason in damaged]
    return list({record.key: record for record in records}.values()), remarks


class RunStore:
    """A results folder to add runs to. Each is on disk before the next is waited for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / RUNS

    @contextmanager
    def opened(self) -> Iterator[list[Record]]:
        """Hold the folder, which is made where it is missing.

        Yields:
            The runs that are there. Damaged lines, as a process leaves that was killed while it
            wrote, are told on standard error and moved to ``runs.damaged``.

        Raises:
            RunError: another process holds it.
            OSError: it can't be made or written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(self.folder / LOCK, timeout=0):
                yield self._mended()
        except filelock.Timeout:
            raise RunError(f"another process is at work in {self.folder}") from None

    def _mended(self) -> list[Record]:
        if not self.path.exists():
            if self.path.with_suffix(".jsonl.gz").exists():
                raise RunError(f"{self.folder} holds packed results: gunzip {RUNS}.gz to go on")
            return []
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        records, damaged = _parse(text)
        for number, _, reason in damaged:
            print(f"{self.path}, line {number} is damaged ({reason}): run again", file=sys.stderr)
        if damaged:
            with (self.folder / DAMAGED).open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for _, line, _ in damaged)
        if damaged or (text and not text.endswith("\n")):
            whole = "".join(f"{record.to_json()}\n" for record in records)
            atomic_write(self.path, whole.encode())
        return records

    def add(self, record: Record) -> None:
        """Append a run and force it to disk."""
        with self.path.open("ab") as file:
            file.write(f"{record.to_json()}\n".encode())
            file.flush()
            os.fsync(file.fileno())
