"""A suite under several optimizers: learning rates are tuned, then the reported runs are made.

Which runs are wanted is a pure function of those that are there, so an evaluation that was stopped
anywhere goes on by being started again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from hyperadam.baselines import Baseline, make_baseline, make_baselines
from hyperadam.device import existing_device, is_device_name
from hyperadam.errors import ConfigError, RunError, unknown_name
from hyperadam.evaluation.harness import CPU, train
from hyperadam.evaluation.records import (
    FIRST_TUNING_SEED,
    Record,
    RunKey,
    RunStore,
    read_records,
)
from hyperadam.evaluation.suites import find_suite, tasks_of
from hyperadam.evaluation.trace import Tracer, trace_steps
from hyperadam.evaluation.tuning import (
    best_place,
    grid_lr,
    more_places,
    places_and_lrs,
    tuning_seeds,
)
from hyperadam.interrupt import interruption
from hyperadam.optim import LearnedOptimizer
from hyperadam.ranks import ALONE, Ranks
from hyperadam.schedule import SCHEDULES, Schedule
from hyperadam.source import source_version
from hyperadam.tasks import TASKS, make_task

Track = Literal["standard", "default", "grid"]
"""How learning rates are chosen. ``standard``: hand-designed optimizers on the grid, learned ones
at their default."""

TRACED_SEED = 0
"""The reported run in which it is recorded what a learned optimizer predicts."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate.

    Attributes:
        suite: by name.
        optimizers: by name, see :func:`hyperadam.baselines.make_baseline`.
        seeds: how many reported runs, of seeds 0 to ``seeds - 1``.
        tasks: patterns of task names, to take a part of the suite; empty takes all.
        lr: a :data:`Track`, or one learning rate for all.
        steps: of each run; None takes the suite's.
        schedule: of the learning rate.
        tuning_seeds: runs for each learning rate of a grid; None takes the suite's.
    """

    suite: str
    optimizers: tuple[str, ...]
    seeds: int = 10
    tasks: tuple[str, ...] = ()
    lr: Track | float = "standard"
    steps: int | None = None
    schedule: Schedule = "none"
    tuning_seeds: int | None = None

    def __post_init__(self) -> None:
        suite = find_suite(self.suite)
        for name, value in (
            ("steps", suite.steps if self.steps is None else self.steps),
            (
                "tuning_seeds",
                suite.tuning_seeds if self.tuning_seeds is None else self.tuning_seeds,
            ),
        ):
            object.__setattr__(self, name, value)
            if value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}")
        if not 1 <= self.seeds <= FIRST_TUNING_SEED:
            raise ConfigError(f"seeds must be from 1 to {FIRST_TUNING_SEED}; got {self.seeds}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(unknown_name("schedule", str(self.schedule), SCHEDULES))
        if isinstance(self.lr, str):
            if self.lr not in ("standard", "default", "grid"):
                raise ConfigError(f"lr must be default, grid or a number; got {self.lr!r}")
        elif not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr must be a positive number; got {self.lr}")
        else:
            object.__setattr__(self, "lr", float(self.lr))


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One task under one optimizer.

    Attributes:
        config: of the evaluation.
        task: by name.
        baseline: the optimizer.
    """

    config: EvaluationConfig
    task: str
    baseline: Baseline

    def key(self, lr: float, seed: int) -> RunKey:
        """The key of one of its runs."""
        config = self.config
        assert config.steps is not None
        return RunKey(
            task=self.task,
            optimizer=self.baseline.name,
            weights=self.baseline.weights,
            lr=lr,
            seed=seed,
            steps=config.steps,
            schedule=config.schedule,
        )

    def wanted(self, done: Mapping[RunKey, Record]) -> list[RunKey]:
        """The runs that can be made next; empty when the cell is complete.

        Args:
            done: the runs that are there.
        """
        lr = self._chosen_lr(done)
        if isinstance(lr, list):
            return lr
        reported = [self.key(lr, seed) for seed in range(self.config.seeds)]
        return [key for key in reported if key not in done]

    def _chosen_lr(self, done: Mapping[RunKey, Record]) -> float | list[RunKey]:
        """The learning rate to report, or the runs that are missing to choose it."""
        config, baseline = self.config, self.baseline
        if isinstance(config.lr, float):
            return config.lr
        if config.lr == "default" or (config.lr == "standard" and baseline.learned):
            return baseline.default_lr
        assert config.tuning_seeds is not None
        lrs = dict(places_and_lrs(baseline.default_lr))

        def row(place: int, seeds: int) -> list[RunKey]:
            return [self.key(lrs[place], seed) for seed in tuning_seeds(seeds)]

        def is_there(place: int, seeds: int) -> bool:
            return all(key in done for key in row(place, seeds))

        # Where an older search took more seeds, a report judges by those, and so does this one; all
        # learning rates that it came to count.
        count = config.tuning_seeds
        while any(is_there(place, count + 1) for place in lrs):
            count += 1
        keys = {place: row(place, count) for place in lrs}
        losses = {
            place: sum(done[key].final_loss for key in keys[place]) / count
            for place in lrs
            if is_there(place, count)
        }
        if places := more_places(losses):
            return [key for place in places for key in keys[place] if key not in done]
        return grid_lr(baseline.default_lr, best_place(losses))


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an evaluation is.

    Attributes:
        made: runs made so far by this process.
        known: runs made and runs known to be missing; more come up while grids are extended.
        latest: the run that has just been made.
    """

    made: int
    known: int
    latest: Record


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an evaluation did.

    Attributes:
        made: runs that it made.
        kept: runs that were in the folder before.
        diverged: diverged runs among those made that are not for tuning.
        finished: False where it was interrupted.
    """

    made: int
    kept: int
    diverged: int
    finished: bool


def evaluate(
    config: EvaluationConfig,
    folder: Path,
    *,
    jobs: int = 1,
    data_dir: Path | None = None,
    device: str = "cpu",
    ranks: Ranks = ALONE,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Outcome:
    """Make the runs of an evaluation that its folder does not have yet.

    Ctrl-C and SIGTERM end it early; what was running then is lost, what was finished is kept.

    Args:
        config: what to evaluate.
        folder: of the results, ``runs.jsonl``.
        jobs: how many runs at a time, each in a process with its share of the cores.
        data_dir: see :func:`hyperadam.tasks.load_data`.
        device: where networks are trained: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        ranks: the processes that share the tasks and optimizers, each with ``jobs`` of its own, and
            write one folder.
        progress: called after each run.

    Returns:
        What was done, by all ranks together.

    Raises:
        ConfigError: an unknown name, an impossible value, or a device that is not there.
        DataError: a data set can't be had.
        RunError: another process is at work in the folder, a worker died, or runs failed; the
            others are kept.
        MissingDependencyError: an optimizer's library is not installed.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1; got {jobs}")
    if not is_device_name(device):
        raise ConfigError(f"device must be cpu, cuda or cuda:N; got {device!r}")
    existing_device(device)
    baselines = make_baselines(config.optimizers)
    for baseline in baselines:  # a library that is missing is told before hours have gone by
        baseline.build([torch.nn.Parameter(torch.zeros(1))], baseline.default_lr, 0)
    tasks = tasks_of(find_suite(config.suite), config.tasks)
    cells = [
        Cell(config, task, baseline)
        for number, task in enumerate(tasks)
        for place, baseline in enumerate(baselines)
        if (number + place) % ranks.count == ranks.rank  # each has some of every optimizer
    ]
    store = RunStore(folder, ranks.rank)
    with contextlib.ExitStack() as held:
        there = _open_for_all(store, ranks, held)
        pool = held.enter_context(_workers(jobs, data_dir, device))
        stopped = held.enter_context(interruption())
        done = {record.key: record for record in there}
        made: list[Record] = []
        failures: list[str] = []
        pending: dict[Future[Record], Cell] = {}
        waiting: deque[tuple[RunKey, Cell]] = deque()
        asked: set[RunKey] = set()

        def new_runs(cell: Cell) -> list[tuple[RunKey, Cell]]:
            new = [key for key in cell.wanted(done) if key not in asked]
            asked.update(new)
            return [(key, cell) for key in new]

        for cell in cells:
            waiting.extend(new_runs(cell))
        try:
            if waiting:
                _probe(pool, sorted({cell.task for _, cell in waiting}))
            while (waiting or pending) and not stopped.is_set():
                while waiting and len(pending) < jobs + 1:
                    key, cell = waiting.popleft()
                    pending[pool.submit(_run, key, cell.baseline.text, config.suite)] = cell
                finished, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    cell = pending.pop(future)
                    try:
                        record = future.result()
                    except BrokenProcessPool:
                        raise
                    except Exception as error:  # whatever a run raises, others go on
                        failures.append(f"{cell.task} under {cell.baseline.name}: {error!r}")
                        continue
                    store.add(record)
                    done[record.key] = record
                    made.append(record)
                    waiting.extendleft(reversed(new_runs(cell)))  # a task's runs stay together
                    known = len(made) + len(waiting) + len(pending)
                    progress(Progress(len(made), known, record))
        except BrokenProcessPool:
            if not stopped.is_set():  # Ctrl-C reaches workers that are not yet set up, too
                raise RunError(
                    "a worker process died (out of memory?); what was finished is kept, and the "
                    "same command goes on"
                ) from None
        finished_all = not waiting and not pending and not stopped.is_set()
        # When all have answered, all have written what they have.
        unfinished, failed = ranks.any(not finished_all, bool(failures))
        if ranks.first:
            store.join_parts()
        if failed:
            first = f"{len(failures)} runs failed, the first: {failures[0]}"
            where = first if failures else "runs of another process failed"
            raise RunError(f"{where}; the others were made and are kept")
    diverged = sum(record.diverged and not record.is_tuning for record in made)
    counts = ranks.mean(torch.tensor([len(made), diverged], dtype=torch.float64)) * ranks.count
    all_made, all_diverged = (round(count) for count in counts.tolist())
    return Outcome(made=all_made, kept=len(there), diverged=all_diverged, finished=not unfinished)


def _open_for_all(store: RunStore, ranks: Ranks, held: contextlib.ExitStack) -> list[Record]:
    """Have the first rank hold the folder; the runs that are there."""
    there: list[Record] = []

    def open_store() -> None:
        there.extend(held.enter_context(store.opened()))

    ranks.agree(open_store)
    if not ranks.first and store.runs.exists():
        there.extend(read_records(store.folder)[0])
    return there


def _probe(pool: ProcessPoolExecutor, tasks: Sequence[str]) -> None:
    """Load one task of each data set, so that missing data are told before hours have gone by."""
    by_data = {TASKS[name].data: name for name in tasks}
    for future in [pool.submit(_load, name) for name in by_data.values()]:
        future.result()


# -- in the workers --------------------------------------------------------------------------------

_data_dir: Path | None = None
_device = CPU


@contextlib.contextmanager
def _workers(jobs: int, data_dir: Path | None, device: str) -> Iterator[ProcessPoolExecutor]:
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
        initargs=(threads, data_dir, device, os.getpid()),
    )
    try:
        yield pool
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # runs take minutes; nobody waits for what is not kept
            process.terminate()
        for process in processes:
            process.join()


def _begin_worker(threads: int, data_dir: Path | None, device: str, parent: int) -> None:
    global _data_dir, _device
    _data_dir, _device = data_dir, torch.device(device)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent was killed: nobody takes the results

    threading.Thread(target=watch, daemon=True).start()


_task = functools.lru_cache(maxsize=8)(make_task)
_baseline = functools.lru_cache(maxsize=64)(make_baseline)


def _load(task: str) -> None:
    _task(task, _data_dir)


def _run(key: RunKey, text: str, suite: str) -> Record:
    """Make one run."""
    baseline = _baseline(text)
    reported = key.seed < FIRST_TUNING_SEED
    tracer = None
    if baseline.learned and key.seed == TRACED_SEED:
        probe = baseline.build([torch.nn.Parameter(torch.zeros(1))], key.lr, 0)
        if isinstance(probe, LearnedOptimizer) and probe.explains:
            tracer = Tracer(trace_steps(key.steps))
    run = train(
        _task(key.task, _data_dir),
        lambda params: baseline.build(params, key.lr, key.seed),
        seed=key.seed,
        steps=key.steps,
        schedule=key.schedule,
        validate=reported,
        tracer=tracer,
        device=_device,
    )
    record = Record(
        **dataclasses.asdict(key),
        learned=baseline.learned,
        default_lr=baseline.default_lr,
        train_loss=run.train_loss_T,
        train_loss_post=run.train_loss_post_T,
        val_loss=_finite(run.metrics.get("val_loss")),
        val_accuracy=_finite(run.metrics.get("val_accuracy")),
        wall_s=round(run.wall_seconds, 4),
        optimizer_s=round(run.optimizer_seconds, 4),
        peak_mb=round(run.peak_bytes / 1e6, 1),
        diverged=run.diverged,
        suite=suite,
        version=version("hyperadam"),
        machine=machine(_device),
        source=source_version(),
        trace=None if tracer is None else tracer.to_record(),
    )
    # As it will be read again: what is chosen by it must not depend on whether it was.
    return Record.from_json(record.to_json())


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def machine(device: torch.device = CPU) -> str:
    """The machine in words: a GPU that is the device, processor, cores, threads of a run, torch."""
    name = platform.machine()
    if sys.platform == "linux":
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = found[1] if found else name
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {name}"
    threads = torch.get_num_threads()
    return f"{name}, {os.cpu_count()} cores, threads a run: {threads}, torch {torch.__version__}"
