"""Records sorted for a report: groups of comparable runs, series of an optimizer, entries."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from hyperadam.evaluation.metrics import (
    bootstrap_interval,
    log_ratios,
    seconds_to_target,
    steps_to_target,
)
from hyperadam.evaluation.records import FINAL_STEPS, Record, final_loss
from hyperadam.evaluation.tuning import best_lr, tuning_losses
from hyperadam.tasks import TASKS

TUNED = "tuned"
DEFAULT = "default lr"
REFERENCE = "adam"

Measure = Literal["losses", "losses_before", "val_losses"]
"""Attributes of an :class:`Entry`: losses (S)."""


@dataclasses.dataclass(frozen=True, order=True)
class Series:
    """An optimizer on one track; a column of a table.

    Attributes:
        optimizer: as named on the command line.
        weights: a few digits of their digest where one name stands for several; else empty.
        track: ``tuned``, ``default lr`` or ``lr X``.
        learned: whether its rule was meta-trained.
    """

    optimizer: str
    weights: str
    track: str
    learned: bool

    @property
    def name(self) -> str:
        """Without the track."""
        return f"{self.optimizer} #{self.weights}" if self.weights else self.optimizer

    @property
    def label(self) -> str:
        """With the track."""
        return f"{self.name}, {self.track}"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: NaN where there is no value.
        half_width: half of its 95% interval; NaN with fewer than two values.
    """

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Estimate:
        """Of the values that are there and finite."""
        found_S = np.array([x for x in values if x is not None and math.isfinite(x)])
        low, high = bootstrap_interval(found_S)
        mean = float(found_S.mean()) if len(found_S) else math.nan
        return cls(mean, float(high - low) / 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A series' runs on one task, one a seed."""

    runs: tuple[Record, ...]

    @functools.cached_property
    def losses(self) -> np.ndarray:
        """Final losses (S); infinite where a run diverged."""
        return self._of_finished([run.final_loss for run in self.runs])

    @functools.cached_property
    def losses_before(self) -> np.ndarray:
        """As :attr:`losses`, each step's loss taken before the update: on a batch to come."""
        return self._of_finished([final_loss(run.train_loss) for run in self.runs])

    @functools.cached_property
    def val_losses(self) -> np.ndarray:
        """Validation losses (S); infinite where a run diverged or none was measured."""
        found = [math.inf if run.val_loss is None else run.val_loss for run in self.runs]
        return self._of_finished(found)

    def _of_finished(self, losses: Sequence[float]) -> np.ndarray:
        finals = np.where([run.diverged for run in self.runs], math.inf, losses)
        return np.where(np.isfinite(finals), finals, np.inf)

    @property
    def diverged(self) -> int:
        """How many runs did."""
        return int(np.isinf(self.losses).sum())

    @property
    def score(self) -> float:
        """Mean final loss; infinite where any run diverged. This is what is compared."""
        return float(self.losses.mean())

    @functools.cached_property
    def loss(self) -> Estimate:
        """Final loss of the runs that did not diverge."""
        return Estimate.of(self.losses)

    @functools.cached_property
    def accuracy(self) -> Estimate:
        """Validation accuracy."""
        return Estimate.of(run.val_accuracy for run in self.runs)

    @functools.cached_property
    def val_loss(self) -> Estimate:
        """Validation loss."""
        return Estimate.of(run.val_loss for run in self.runs)

    def curves(self) -> np.ndarray:
        """Losses after each update (S, T); NaN from where a run diverged."""
        return np.stack([run.train_loss_post for run in self.runs])

    def steps_to(self, target: float) -> int | None:
        """See :func:`~hyperadam.evaluation.metrics.steps_to_target`."""
        return steps_to_target(self.curves(), target)

    def seconds_to(self, target: float) -> float | None:
        """See :func:`~hyperadam.evaluation.metrics.seconds_to_target`."""
        seconds_S = np.array([run.wall_s for run in self.runs])
        return seconds_to_target(self.steps_to(target), seconds_S, self.runs[0].steps)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Learning rates that were tried, and the best of them."""

    tried: tuple[float, ...]
    best: float

    @property
    def end(self) -> str:
        """``lowest`` or ``highest`` where the best is at an end, so that a better one may lie
        beyond it; else empty."""
        if len(self.tried) < 2:
            return ""
        if math.isclose(self.best, self.tried[0]):
            return "lowest"
        return "highest" if math.isclose(self.best, self.tried[-1]) else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs that can be compared: of one horizon and schedule.

    Attributes:
        suites: that the runs were made for; a run that several share names only one.
        steps: of each run.
        schedule: of the learning rate.
        tasks: in the order of ``hyperadam tasks``.
        series: learned ones first, then Adam, then by name.
        entries: by task and series; a missing one was not run.
        grids: by task and optimizer (with the digits of its weights).
    """

    suites: tuple[str, ...]
    steps: int
    schedule: str
    tasks: tuple[str, ...]
    series: tuple[Series, ...]
    entries: dict[tuple[str, Series], Entry]
    grids: dict[tuple[str, str], Grid]

    @property
    def runs(self) -> list[Record]:
        """All that are reported, once each."""
        return list(
            {id(run): run for entry in self.entries.values() for run in entry.runs}.values()
        )

    def main(self, name: str) -> Series:
        """The track of an optimizer that is shown where there is room for one."""
        mine = [series for series in self.series if series.name == name]
        wanted = DEFAULT if mine[0].learned else TUNED
        return min(mine, key=lambda series: (series.track != wanted, series.track != DEFAULT))

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Optimizers, in the order of the series."""
        return tuple(dict.fromkeys(series.name for series in self.series))

    @property
    def main_series(self) -> list[Series]:
        """One track of each optimizer."""
        return [self.main(name) for name in self.names]

    @property
    def reference(self) -> Series | None:
        """Adam, tuned if it was; None where Adam was not run."""
        return self.main(REFERENCE) if REFERENCE in self.names else None

    def target(self, task: str) -> float:
        """The reference's mean final loss; NaN where it has none."""
        entry = self.entries.get((task, self.reference)) if self.reference else None
        return entry.score if entry and math.isfinite(entry.score) else math.nan

    @property
    def compared_tasks(self) -> list[str]:
        """Those that the reference was run on, without diverging."""
        return [task for task in self.tasks if math.isfinite(self.target(task))]

    def log_ratios(self, series: Series, measure: Measure = "losses") -> list[np.ndarray]:
        """Each run's log ratio to the reference's mean, on the tasks that can be compared.

        Args:
            series: whose.
            measure: which of an entry's losses; tasks where the reference's are not finite are left
                out.
        """
        found = []
        for task in self.compared_tasks:
            entry = self.entries.get((task, series))
            of_reference = self.entries.get((task, self.reference)) if self.reference else None
            if entry is None or of_reference is None:
                continue
            mean = float(getattr(of_reference, measure).mean())
            if math.isfinite(mean):
                found.append(log_ratios(getattr(entry, measure), mean))
        return found


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def _unique(runs: Iterable[Record]) -> list[Record]:
    """One run a seed and learning rate: the last."""
    return list({(run.seed, run.lr): run for run in runs}.values())


def _grid(tuning: Sequence[Record], probe: Record) -> Grid | None:
    """What was tried for an optimizer on a task; None where nothing was."""
    of_probe = [run for run in tuning if run.weights == probe.weights]
    best = best_lr(of_probe)
    return None if best is None else Grid(tuple(tuning_losses(of_probe)), best)


def _tracks(run: Record, grid: Grid | None) -> list[str]:
    tracks = [TUNED] if grid and _same(run.lr, grid.best) else []
    tracks += [DEFAULT] if _same(run.lr, run.default_lr) else []
    return tracks or [f"lr {run.lr:g}"]


def make_groups(records: Sequence[Record]) -> list[Group]:
    """Sort records into groups, by horizon and schedule.

    A run whose learning rate is both the default and the best of the grid stands on each track that
    its optimizer has on other tasks too; where it has neither, on its own: the default's for a
    learned one, the tuned one for any other.

    Args:
        records: of a folder; tuning runs choose learning rates and are not in the groups.
    """
    tuning: dict[tuple[str, str, int, str], list[Record]] = {}
    reported: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        if record.is_tuning:
            key = (record.task, record.optimizer, record.steps, record.schedule)
            tuning.setdefault(key, []).append(record)
        else:
            reported.setdefault((record.steps, record.schedule), []).append(record)
    return [
        _make_group(*key, reported[key], tuning)
        for key in sorted(reported, key=lambda key: (key[0], key[1] != "none", key[1]))
    ]


def _make_group(
    steps: int,
    schedule: str,
    records: Sequence[Record],
    tuning: dict[tuple[str, str, int, str], list[Record]],
) -> Group:
    digests: dict[str, set[str]] = {}
    by_probe: dict[tuple[str, str, str | None], list[Record]] = {}
    for record in records:
        digests.setdefault(record.optimizer, set()).add(record.weights or "")
        by_probe.setdefault((record.task, record.optimizer, record.weights), []).append(record)

    def several(record: Record) -> str:
        many = len(digests[record.optimizer]) > 1
        return (record.weights or "none")[:8] if many else ""

    grids: dict[tuple[str, str], Grid] = {}
    placed: list[tuple[Record, str, list[str]]] = []
    for runs in by_probe.values():
        probe = runs[0]
        tried = tuning.get((probe.task, probe.optimizer, steps, schedule), [])
        grid = _grid(tried, probe)
        weights = several(probe)
        if grid:
            name = Series(probe.optimizer, weights, "", probe.learned).name
            grids[probe.task, name] = grid
        placed += [(run, weights, _tracks(run, grid)) for run in _unique(runs)]

    own_tracks: dict[tuple[str, str], set[str]] = {}
    for run, weights, tracks in placed:
        own = own_tracks.setdefault((run.optimizer, weights), set())
        own.update(tracks if len(tracks) == 1 else [DEFAULT if run.learned else TUNED])

    entries: dict[tuple[str, Series], list[Record]] = {}
    for run, weights, tracks in placed:
        for track in tracks:
            if track in own_tracks[run.optimizer, weights]:
                series = Series(run.optimizer, weights, track, run.learned)
                entries.setdefault((run.task, series), []).append(run)

    def order(series: Series) -> tuple[object, ...]:
        ours = series.optimizer.split("@")[0] == "variational-hyperadam"
        return (
            not series.learned, not ours, series.optimizer != REFERENCE, series.name,
            series.track != (DEFAULT if series.learned else TUNED), series.track,
        )  # fmt: skip

    return Group(
        suites=tuple(sorted({record.suite for record in records})),
        steps=steps,
        schedule=schedule,
        tasks=_in_order(record.task for record in records),
        series=tuple(sorted({series for _, series in entries}, key=order)),
        entries={
            key: Entry(tuple(sorted(runs, key=lambda run: run.seed)))
            for key, runs in entries.items()
        },
        grids=grids,
    )


def _in_order(tasks: Iterable[str]) -> tuple[str, ...]:
    places = {name: place for place, name in enumerate(TASKS)}
    return tuple(sorted(set(tasks), key=lambda task: (places.get(task, len(places)), task)))


def final_window(steps: int) -> int:
    """How many last steps a final loss is a mean of."""
    return min(FINAL_STEPS, steps)
