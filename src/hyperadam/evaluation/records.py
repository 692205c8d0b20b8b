"""Finished training runs as lines of JSON, in a folder that belongs to one process at a time."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from hyperadam.errors import RunError
from hyperadam.files import atomic_write, make_folder
from hyperadam.rule import MAX_SEED
from hyperadam.schedule import SCHEDULES, Schedule

RUNS = "runs.jsonl"
PARTS = "runs.rank*.jsonl"
DAMAGED = "runs.damaged"
LOCK = ".lock"

FINAL_STEPS = 10
"""The final loss of a run is the mean over this many last steps, as in the papers."""

FIRST_TUNING_SEED = 1_000_000
"""Seeds from here on choose learning rates; no reported figure is of them."""

MAX_BYTES = 4 * 2**30
"""Of a results file, unpacked. A run of 10,000 steps is a fifth of a megabyte."""

SIGNIFICANT_DIGITS = 4
"""Of the losses in a file: seeds differ in the third at best, and files are committed."""

DIVERGENCE = 1.2
"""A run whose final loss is above this times its first counts as diverged."""


def final_loss(losses_T: np.ndarray) -> float:
    """Mean of the last steps of a curve of losses, before or after the update; NaN where one is."""
    return float(losses_T[-FINAL_STEPS:].mean())


def has_diverged(train_loss_T: np.ndarray, train_loss_post_T: np.ndarray) -> bool:
    """Whether a loss was not finite, or the final one is above the start by a fifth, which is
    more than batches differ."""
    return not final_loss(train_loss_post_T) <= DIVERGENCE * train_loss_T[0]


@dataclasses.dataclass(frozen=True)
class RunKey:
    """What makes a run the run that it is. On one machine one version of the program gives runs of
    one key the same numbers; other machines and versions round otherwise.

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
        values = json.loads(line, parse_constant=_refuse_constant)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := names - _OPTIONAL - set(values):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if unknown := set(values) - names:
            raise ValueError(f"it has unknown fields: {', '.join(sorted(unknown)[:5])}")
        for name, is_good in _CHECKS.items():
            if name in values and not is_good(values[name]):
                raise ValueError(f"{name} is {str(values[name])[:40]!r}")
        for name in _CURVES:
            curve = values[name]
            if not isinstance(curve, list) or len(curve) != values["steps"]:
                raise ValueError(f"{name} has not one number a step")
            if not _is_row(curve, len(curve)):
                raise ValueError(f"{name} holds more than numbers")
            values[name] = np.array([math.nan if x is None else x for x in curve], np.float64)
        return cls(**values)


_KEY = tuple(field.name for field in dataclasses.fields(RunKey))
_CURVES = ("train_loss", "train_loss_post")
_OPTIONAL = {"source", "trace"}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _is_text(value: object) -> bool:
    """Whether it is words that can be shown and written again."""
    return isinstance(value, str) and value.isprintable()


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SEED


def _is_number(value: object) -> bool:
    """Whether it is a number, and one that float64 holds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def _is_row(value: object, length: int) -> bool:
    """Whether it is a list of so many numbers, with None for those that were not finite."""
    if not isinstance(value, list) or len(value) != length:
        return False
    return all(x is None or _is_number(x) for x in value)


def _is_table(value: object, rows: int, columns: int | None) -> bool:
    """Whether it is a list of rows of one length; ``columns`` None: any."""
    if not isinstance(value, list) or len(value) != rows:
        return False
    if columns is None:
        columns = len(value[0]) if value and isinstance(value[0], list) else 0
    return all(_is_row(row, columns) for row in value)


def _is_trace(value: object) -> bool:
    """Whether it is what :meth:`hyperadam.evaluation.trace.Tracer.to_record` makes, or a part."""
    if not isinstance(value, dict):
        return value is None
    at, layers = value.get("at"), value.get("layers")
    if not isinstance(at, list) or not isinstance(layers, list):
        return False
    if not (all(map(_is_whole, at)) and at == sorted(set(at)) and all(map(_is_text, layers))):
        return False
    columns: dict[str, int | None] = {
        **dict.fromkeys(("beta", "gamma", "rho", "rho_std")),
        **dict.fromkeys(("beta_quantiles", "gamma_quantiles"), 5),
        **dict.fromkeys(("beta_layers", "gamma_layers", "rho_layers"), len(layers)),
        **dict.fromkeys(("std", "snr", "update_rms"), len(layers)),
    }
    return all(
        table is None or _is_table(table, len(at), columns[name])
        for name, table in value.items()
        if name in columns
    )


def _or_none(is_good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_good(value)


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "task": _is_text,
    "optimizer": _is_text,
    "weights": _or_none(_is_text),
    "lr": lambda value: _is_number(value) and value > 0,
    "seed": _is_whole,
    "steps": lambda value: _is_whole(value) and value != 0,
    "schedule": lambda value: value in SCHEDULES,
    "learned": lambda value: isinstance(value, bool),
    "default_lr": lambda value: _is_number(value) and value > 0,
    "val_loss": _or_none(_is_number),
    "val_accuracy": _or_none(_is_number),
    "wall_s": lambda value: _is_number(value) and value >= 0,
    "optimizer_s": lambda value: _is_number(value) and value >= 0,
    "peak_mb": lambda value: _is_number(value) and value >= 0,
    "diverged": lambda value: isinstance(value, bool),
    "suite": _is_text,
    "version": _is_text,
    "machine": _is_text,
    "source": _is_text,
    "trace": _is_trace,
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


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise RunError(f"{path} has {size:,} bytes; results have at most {MAX_BYTES:,}")
    return path.read_bytes()


def _unpacked(path: Path) -> bytes:
    content = bytearray()
    try:
        with gzip.open(path) as file:
            while piece := file.read(1 << 20):
                content += piece
                if len(content) > MAX_BYTES:
                    raise RunError(f"{path} unpacks to more than {MAX_BYTES:,} bytes")
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"the results in {path} can't be read: {error}") from None
    return bytes(content)


def _refuse_stale(path: Path, packed: Path) -> None:
    """Results that were packed, or fetched, after the unpacked ones were written are not passed
    over.

    Raises:
        RunError: there are both files, the packed one is newer, and they differ.
    """
    if not (path.is_file() and packed.is_file()):
        return
    newer = packed.stat().st_mtime > path.stat().st_mtime
    if newer and _unpacked(packed) != _content(path):
        raise RunError(
            f"{packed} is newer than {path.name} and differs from it: unpack it over that one "
            f"(gunzip -kf {packed.name}), or remove one of them"
        )


def read_records(folder: Path) -> tuple[list[Record], list[str]]:
    """All runs of a results folder, each once.

    Args:
        folder: with ``runs.jsonl``, or ``runs.jsonl.gz`` as committed results are, and what
            several ranks have not yet joined to it.

    Returns:
        The runs, and what is to be said of damaged lines.

    Raises:
        RunError: there are no results, or they can't be read, or newer ones are packed.
    """
    path, packed = folder / RUNS, folder / f"{RUNS}.gz"
    contents: dict[str, bytes] = {}
    try:
        _refuse_stale(path, packed)
        if path.is_file():
            contents[RUNS] = _content(path)
        elif packed.is_file():
            contents[RUNS] = _unpacked(packed)
        contents |= {part.name: _content(part) for part in sorted(folder.glob(PARTS))}
    except OSError as error:
        raise RunError(f"the results in {folder} can't be read: {error}") from None
    if not contents:
        raise RunError(f"no results in {folder}: it has neither {RUNS} nor {RUNS}.gz")
    records: list[Record] = []
    remarks: list[str] = []
    for name, content in contents.items():
        found, damaged = _parse(content.decode("utf-8", errors="replace"))
        records += found
        remarks += [f"{name}, line {number} is damaged: {reason}" for number, _, reason in damaged]
    return list({record.key: record for record in records}.values()), remarks


class RunStore:
    """A results folder to add runs to. Each is on disk before the next is waited for.

    Args:
        folder: the results folder.
        rank: of the process, where several fill the folder. The first one opens it for all; the
            others write files of their own, which it joins to ``runs.jsonl``.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.runs = folder / RUNS
        self.path = folder / PARTS.replace("*", str(rank)) if rank else self.runs

    @contextmanager
    def opened(self) -> Iterator[list[Record]]:
        """Hold the folder, which is made where it is missing.

        Yields:
            The runs that are there. Damaged lines, as a process leaves that was killed while it
            wrote, are told on standard error and moved to ``runs.damaged``.

        Raises:
            RunError: another process holds it, or newer results are packed.
            OSError: it can't be made or written.
        """
        make_folder(self.folder)
        try:
            with filelock.FileLock(self.folder / LOCK, timeout=0):
                yield self._mended()
        except filelock.Timeout:
            raise RunError(f"another process is at work in {self.folder}") from None

    def _mended(self) -> list[Record]:
        packed = self.folder / f"{RUNS}.gz"
        if not self.runs.exists() and packed.exists():
            raise RunError(f"{self.folder} holds packed results: gunzip {RUNS}.gz to go on")
        _refuse_stale(self.runs, packed)
        parts = sorted(self.folder.glob(PARTS))
        records: list[Record] = []
        changed = bool(parts)
        for path in [self.runs, *parts] if self.runs.exists() else parts:
            text = _content(path).decode("utf-8", errors="replace")
            found, damaged = _parse(text)
            records += found
            changed = changed or bool(damaged) or bool(text and not text.endswith("\n"))
            for number, _, reason in damaged:
                print(
                    f"{path}, line {number} is damaged ({reason}): kept in {DAMAGED}, run again",
                    file=sys.stderr,
                )
            if damaged:
                with (self.folder / DAMAGED).open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for _, line, _ in damaged)
        if changed:
            records = list({record.key: record for record in records}.values())
            whole = "".join(f"{record.to_json()}\n" for record in records)
            atomic_write(self.runs, whole.encode())
        for part in parts:
            part.unlink()
        return records

    def join_parts(self) -> None:
        """Add what the other ranks have written to ``runs.jsonl``; the folder is open."""
        self._mended()

    def add(self, record: Record) -> None:
        """Append a run and force it to disk."""
        with self.path.open("ab") as file:
            file.write(f"{record.to_json()}\n".encode())
            file.flush()
            os.fsync(file.fileno())
