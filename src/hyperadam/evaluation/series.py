"""Records sorted for a report: groups of comparable runs, series of an optimizer, entries."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from hyperadam.evaluation.metrics import (
    bootstrap_interval,
    log_ratios,
    paired_sign,
    steps_to_target,
)
from hyperadam.evaluation.records import FINAL_STEPS, Record, final_loss
from hyperadam.evaluation.tuning import best_lr, tuning_losses
from hyperadam.tasks import TASKS

TUNED = "tuned"
DEFAULT = "default lr"
REFERENCE = "adam"

BEGUN = 0.95
"""Of its first loss: an optimizer that ends above has not begun to learn a task."""

Measure = Literal["losses", "losses_before", "val_losses"]
"""Attributes of an :class:`Entry`: losses (S)."""
MEASURES: tuple[Measure, ...] = ("losses", "losses_before", "val_losses")


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
        """As :attr:`losses`, each step's loss taken before the update: on a new batch."""
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
        """Validation accuracy of the runs that did not diverge."""
        return Estimate.of(run.val_accuracy for run in self._kept)

    @functools.cached_property
    def val_loss(self) -> Estimate:
        """Validation loss of the runs that did not diverge."""
        return Estimate.of(run.val_loss for run in self._kept)

    @property
    def _kept(self) -> list[Record]:
        """The runs that did not diverge."""
        return [run for run, loss in zip(self.runs, self.losses, strict=True) if loss < math.inf]

    @property
    def first_loss(self) -> float:
        """Mean loss before the first update."""
        return float(np.mean([run.train_loss[0] for run in self.runs]))

    def curves(self) -> np.ndarray:
        """Losses after each update (S, T); NaN from where a run diverged."""
        return np.stack([run.train_loss_post for run in self.runs])

    def paired_logs(self, base: Entry, measure: Measure = "losses") -> np.ndarray:
        """Log ratios to another series' runs of the same seeds (P); not finite where one of a pair
        diverged."""
        of_base, own = (
            {
                run.seed: log_ratios(loss, 1.0)
                for run, loss in zip(entry.runs, getattr(entry, measure), strict=True)
            }
            for entry in (base, self)
        )
        with np.errstate(invalid="ignore"):  # both diverged
            return np.array([own[seed] - of_base[seed] for seed in sorted(own.keys() & of_base)])

    def steps_to(self, target: float) -> int | None:
        """See :func:`~hyperadam.evaluation.metrics.steps_to_target`."""
        return steps_to_target(self.curves(), target)


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


@dataclasses.dataclass(frozen=True)
class StepTime:
    """What a step takes on one machine, in seconds.

    Other work may have been on the machine, so each part is that of the fastest run.

    Attributes:
        own: the optimizer's part.
        network: batch and gradient, which are the same whatever the optimizer.
    """

    own: float
    network: float

    @property
    def whole(self) -> float:
        """Of the training loop, without what only measures."""
        return self.own + self.network


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs that can be compared: of one horizon and schedule.

    Attributes:
        suites: that the runs were made for; a run that several share names only one.
        steps: of each run.
        schedule: of the learning rate.
        tasks: in the order of ``hyperadam tasks``.
        series: the bundled weights, then Adam, other learned ones, and the rest by name.
        entries: by task and series; a missing one was not run.
        grids: by task and optimizer (with the digits of its weights).
        step_times: by task and optimizer (likewise), by machine.
    """

    suites: tuple[str, ...]
    steps: int
    schedule: str
    tasks: tuple[str, ...]
    series: tuple[Series, ...]
    entries: dict[tuple[str, Series], Entry]
    grids: dict[tuple[str, str], Grid]
    step_times: dict[tuple[str, str], dict[str, StepTime]]

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

    @functools.cached_property
    def families(self) -> list[list[Series]]:
        """Series of one set of weights and one track, where there are several: the rule as it is
        used first, then its mean alone or other noise."""
        found: dict[tuple[str, str], list[Series]] = {}
        for (_, series), entry in self.entries.items():
            weights = entry.runs[0].weights
            if weights is not None:
                members = found.setdefault((weights, series.track), [])
                if series not in members:
                    members.append(series)
        place = {series: index for index, series in enumerate(self.series)}
        families = [sorted(members, key=place.__getitem__) for members in found.values()]
        return [members for members in families if len(members) > 1]

    @property
    def contenders(self) -> list[Series]:
        """One track of each optimizer, without other uses of weights that one of them has."""
        others = {series for family in self.families for series in family[1:]}
        return [series for series in self.main_series if series not in others]

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

    @property
    def common_tasks(self) -> list[str]:
        """Those of :attr:`compared_tasks` that all contenders were run on, but for those that were
        run on less than half of them."""
        ran = {
            series: {task for task in self.compared_tasks if (task, series) in self.entries}
            for series in self.contenders
        }
        half = len(self.compared_tasks) / 2
        broad = [tasks for tasks in ran.values() if len(tasks) >= half]
        return [task for task in self.compared_tasks if all(task in tasks for tasks in broad)]

    @property
    def begun_tasks(self) -> list[str]:
        """Those of :attr:`compared_tasks` on which the reference has begun to learn: others have no
        loss that it would take long to reach."""
        assert self.reference is not None
        return [
            task
            for task in self.compared_tasks
            if self.target(task) <= BEGUN * self.entries[task, self.reference].first_loss
        ]

    def sign(self, task: str, series: Series) -> int:
        """Whether a series ends below the reference (-1) or above it (1) beyond the scatter of the
        seeds that both have (:func:`~hyperadam.evaluation.metrics.paired_sign`); one with a
        diverged run ends above."""
        assert self.reference is not None
        if self.entries[task, series].diverged:
            return 1
        ours, theirs = (
            {run.seed: loss for run, loss in zip(entry.runs, entry.losses, strict=True)}
            for entry in (self.entries[task, series], self.entries[task, self.reference])
        )
        seeds = sorted(ours.keys() & theirs.keys())
        return paired_sign(
            np.array([ours[seed] for seed in seeds]), np.array([theirs[seed] for seed in seeds])
        )

    def seconds_to(self, task: str, series: Series) -> tuple[float, float] | None:
        """Wall-clock time until a series, and the reference, are at the reference's final loss.

        Returns:
            Both in seconds, on one machine; None where they have no machine in common, or one does
            not get there.
        """
        assert self.reference is not None
        pair = (series, self.reference)
        steps = [self.entries[task, one].steps_to(self.target(task)) for one in pair]
        machines = self._common_machines(task, series)
        if not machines or steps[0] is None or steps[1] is None:
            return None
        ours, theirs = (self.step_times[task, one.name][machines[0]].whole for one in pair)
        return steps[0] * ours, steps[1] * theirs

    def step_time(self, task: str, series: Series) -> StepTime | None:
        """On a machine that the reference has runs on, where there is one; None where no run came
        to its end."""
        times = self.step_times[task, series.name]
        machines = [*self._common_machines(task, series), *sorted(times)]
        return times[machines[0]] if machines else None

    def _common_machines(self, task: str, series: Series) -> list[str]:
        of_reference = self.step_times.get((task, self.reference.name)) if self.reference else None
        return sorted(self.step_times[task, series.name].keys() & (of_reference or {}).keys())

    def log_ratios(
        self, series: Series, measure: Measure = "losses", tasks: Sequence[str] | None = None
    ) -> list[np.ndarray]:
        """Each run's log ratio to the reference's mean, on the tasks that can be compared.

        Args:
            series: whose.
            measure: which of an entry's losses; tasks where the reference's are not finite are left
                out.
            tasks: some of :attr:`compared_tasks`; None: all.
        """
        found = []
        for task in self.compared_tasks if tasks is None else tasks:
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


_Probe = tuple[str, str, str | None]
"""Task, optimizer and weights."""


def _step_times(records: Iterable[Record]) -> dict[_Probe, dict[str, StepTime]]:
    """On each machine, from runs of any seed and length."""
    own: dict[_Probe, dict[str, float]] = {}
    network: dict[tuple[str, str], float] = {}
    for run in records:
        machines = own.setdefault((run.task, run.optimizer, run.weights), {})
        if not run.diverged:
            seconds = run.optimizer_s / run.steps
            machines[run.machine] = min(seconds, machines.get(run.machine, math.inf))
            rest, place = (run.wall_s - run.optimizer_s) / run.steps, (run.task, run.machine)
            network[place] = min(rest, network.get(place, math.inf))
    return {
        probe: {
            machine: StepTime(seconds, network[probe[0], machine])
            for machine, seconds in machines.items()
        }
        for probe, machines in own.items()
    }


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
    times = _step_times(records)
    return [
        _make_group(*key, reported[key], tuning, times)
        for key in sorted(reported, key=lambda key: (key[0], key[1] != "none", key[1]))
    ]


def _make_group(
    steps: int,
    schedule: str,
    records: Sequence[Record],
    tuning: dict[tuple[str, str, int, str], list[Record]],
    times: Mapping[_Probe, dict[str, StepTime]],
) -> Group:
    digests: dict[str, set[str]] = {}
    by_probe: dict[_Probe, list[Record]] = {}
    for record in records:
        digests.setdefault(record.optimizer, set()).add(record.weights or "")
        by_probe.setdefault((record.task, record.optimizer, record.weights), []).append(record)

    def several(record: Record) -> str:
        many = len(digests[record.optimizer]) > 1
        return (record.weights or "none")[:8] if many else ""

    grids: dict[tuple[str, str], Grid] = {}
    step_times: dict[tuple[str, str], dict[str, StepTime]] = {}
    placed: list[tuple[Record, str, list[str]]] = []
    for runs in by_probe.values():
        probe = runs[0]
        tried = tuning.get((probe.task, probe.optimizer, steps, schedule), [])
        grid = _grid(tried, probe)
        weights = several(probe)
        name = Series(probe.optimizer, weights, "", probe.learned).name
        if grid:
            grids[probe.task, name] = grid
        step_times[probe.task, name] = times[probe.task, probe.optimizer, probe.weights]
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
        bundled = series.optimizer == "variational-hyperadam"
        return (
            not bundled, series.optimizer != REFERENCE, not series.learned, not ours, series.name,
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
        step_times=step_times,
    )


def _in_order(tasks: Iterable[str]) -> tuple[str, ...]:
    places = {name: place for place, name in enumerate(TASKS)}
    return tuple(sorted(set(tasks), key=lambda task: (places.get(task, len(places)), task)))


def final_window(steps: int) -> int:
    """How many last steps a final loss is a mean of."""
    return min(FINAL_STEPS, steps)
