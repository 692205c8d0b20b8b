"""A meta-training run in a folder: checkpoints, events, resuming, and what it leaves behind.

The folder holds ``config.json`` (what the run is), ``checkpoint.safetensors`` (where it is),
``tensorboard/``, and at the end ``weights.safetensors``, ``history.csv`` and ``meta_loss.png``.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from hyperadam.config import from_values
from hyperadam.errors import ConfigError, RunError
from hyperadam.files import atomic_write, make_folder
from hyperadam.interrupt import interruption
from hyperadam.metatrain.checkpoint import load_checkpoint, save_checkpoint
from hyperadam.metatrain.config import MetaTrainConfig
from hyperadam.metatrain.trainer import HISTORY_COLUMNS, MetaStep, MetaTrainer
from hyperadam.ranks import ALONE, Ranks
from hyperadam.weights import Weights, save_weights

CONFIG = "config.json"
CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "weights.safetensors"
HISTORY = "history.csv"
CURVE = "meta_loss.png"
EVENTS = "tensorboard"
LOCK = ".lock"
FILES = (CONFIG, CHECKPOINT, WEIGHTS, HISTORY, CURVE, EVENTS)


UNSPECIFIED = "unspecified"


@dataclasses.dataclass(frozen=True)
class RunLabel:
    """What a run says of itself in the weights that it exports.

    Attributes:
        preset: the preset's name, with the settings that were changed.
        licence: of the exported numbers; ``"unspecified"`` where none is given.
        commit: of the program that started the run.

    Raises:
        ConfigError: a text that can't be shown, such as bytes that are not UTF-8.
    """

    preset: str
    licence: str
    commit: str

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            if not all(map(str.isprintable, text.splitlines())):
                raise ConfigError(f"{name} is no printable text: {text!a}")


class RunFolder:
    """A folder that belongs to one run, and to one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, which is made where it is missing.

        Raises:
            RunError: another process holds it.
            OSError: it can't be made or written.
        """
        make_folder(self.path)
        try:
            with filelock.FileLock(self / LOCK, timeout=0):
                for name in FILES:  # half-written files of a process that was killed
                    for path in self.path.glob(f".{name}.*"):
                        path.unlink()
                yield
        except filelock.Timeout:
            raise RunError(f"another process is at work in {self.path}") from None

    def holds_run(self) -> bool:
        return any((self / name).exists() for name in FILES)

    def read_config(self) -> tuple[MetaTrainConfig, RunLabel]:
        """The configuration and label of the run that the folder holds.

        Raises:
            RunError: there is none, or it can't be read.
        """
        try:
            values = json.loads((self / CONFIG).read_text(encoding="utf-8"))
            label = from_values(RunLabel, values["label"], what="label")
            return MetaTrainConfig.from_dict(values["config"]), label
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"{self / CONFIG} can't be read: {error}") from None

    def write_config(self, config: MetaTrainConfig, label: RunLabel) -> None:
        values = {"config": config.to_dict(), "label": dataclasses.asdict(label)}
        atomic_write(self / CONFIG, (json.dumps(values, indent=2) + "\n").encode())


def differences(ours: MetaTrainConfig, theirs: MetaTrainConfig) -> list[str]:
    """The settings in which two configurations differ, as ``key: theirs, not ours``."""

    def flat(config: MetaTrainConfig) -> dict[str, Any]:
        values = config.to_dict()
        rule = values.pop("rule")
        return values | {f"rule.{name}": value for name, value in rule.items()}

    a, b = flat(ours), flat(theirs)
    return [
        f"{key}: {b.get(key)}, not {a.get(key)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def run_meta_training(
    out: Path,
    config: MetaTrainConfig | None,
    label: RunLabel | None,
    *,
    resume: bool = False,
    data_dir: Path | None = None,
    checkpoint_seconds: float = 30.0,
    ranks: Ranks = ALONE,
    started: Callable[[MetaTrainer], None] = lambda _: None,
    progress: Callable[[MetaStep], None] = lambda _: None,
) -> MetaTrainer:
    """Meta-train in a folder, from the start or from where it was left.

    Killed at any moment and resumed, the run ends with the same bits as an undisturbed one. On
    Ctrl-C it saves a checkpoint and returns early.

    Args:
        out: the run's folder.
        config: the recipe; None with ``resume`` takes the one in the folder.
        label: what to write into the weights; None likewise.
        resume: go on with the run in the folder. Where there is none yet, start it.
        data_dir: see :func:`hyperadam.tasks.load_data`.
        checkpoint_seconds: time between two checkpoints.
        ranks: the processes that share the work; the first one writes the folder.
        started: called once with the trainer, at the place where it starts.
        progress: called after each meta-step.

    Returns:
        The trainer; ``finished`` tells whether the run came to its end.

    Raises:
        RunError: the folder holds another run or a damaged one, or another process is at work
            in it.
        ConfigError: there is nothing to resume and no configuration to start with.
    """
    folder = RunFolder(out)
    with contextlib.ExitStack() as held:

        def begin() -> _Beginning:
            held.enter_context(folder.locked())
            return _begin(folder, config, label, resume=resume)

        beginning = ranks.agree(begin)
        trainer = MetaTrainer(beginning.config, data_dir, ranks)
        if beginning.has_checkpoint:
            load_checkpoint(folder / CHECKPOINT, trainer)
        if ranks.first and beginning.is_new:
            folder.write_config(beginning.config, beginning.label)
        started(trainer)
        _train(trainer, folder, checkpoint_seconds, progress)
        if trainer.finished and ranks.first:
            _export(trainer, folder, beginning.label)
        return trainer


@dataclasses.dataclass(frozen=True)
class _Beginning:
    """How a run begins.

    Attributes:
        config: what it is.
        label: what it will say of itself.
        is_new: whether the folder does not have it yet.
        has_checkpoint: whether there is one to go on from.
    """

    config: MetaTrainConfig
    label: RunLabel
    is_new: bool
    has_checkpoint: bool


def _begin(
    folder: RunFolder, config: MetaTrainConfig | None, label: RunLabel | None, *, resume: bool
) -> _Beginning:
    """How a run begins in a folder; see :func:`run_meta_training`."""
    out = folder.path
    if not folder.holds_run():
        if config is None or label is None:
            raise ConfigError(f"{out} holds no run to resume; name a preset to start one")
        return _Beginning(config, label, is_new=True, has_checkpoint=False)
    if not resume:
        raise RunError(f"{out} holds a run; --resume goes on with it")
    found, found_label = folder.read_config()
    if config is not None and config != found:
        other = "; ".join(differences(config, found))
        raise RunError(f"{out} holds a run with other settings: {other}")
    if label is not None and label.licence not in (UNSPECIFIED, found_label.licence):
        raise RunError(f"{out} holds a run with the licence {found_label.licence}")
    there = (folder / CHECKPOINT).exists()
    return _Beginning(found, found_label, is_new=False, has_checkpoint=there)


def _train(
    trainer: MetaTrainer,
    folder: RunFolder,
    checkpoint_seconds: float,
    progress: Callable[[MetaStep], None],
) -> None:
    if trainer.finished:
        return
    ranks = trainer.ranks
    first_step = len(trainer.history) + 1
    events = _Events(folder / EVENTS, first_step) if ranks.first else None

    def save() -> None:
        if events is not None:
            events.flush()  # first: what the checkpoint has behind it never comes again
        save_checkpoint(folder / CHECKPOINT, trainer)

    try:
        with interruption() as stopped:
            saved_at = time.monotonic()
            stop = stopped.is_set()
            while not trainer.finished and not stop:
                record = trainer.meta_step()
                if events is not None:
                    events.write(record)
                progress(record)
                old = time.monotonic() - saved_at >= checkpoint_seconds
                stop, due = ranks.any(stopped.is_set(), old)
                if due:
                    save()
                    saved_at = time.monotonic()
            save()
    finally:
        if events is not None:
            events.close()


class _Events:
    """A TensorBoard event file, written in step: what :meth:`flush` has seen is in the file."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        # The name has the second in it; the step keeps two starts in one second apart.
        self._writer = EventsWriter(str(folder / "events"), f".{first_step}")
        # Events of later steps, from before a kill, are purged: those steps come again.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=first_step, session_log=start))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def write(self, record: MetaStep) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name in ("meta_loss", "inner_loss", "kl", "grad_norm"):
            summary = scalar(f"meta_train/{name}", getattr(record, name))
            self._write(Event(step=record.index, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _export(trainer: MetaTrainer, folder: RunFolder, label: RunLabel) -> None:
    """Write what a finished run leaves; weights last, so that they say that all is there."""
    if (folder / WEIGHTS).exists():
        return
    config = trainer.config
    weights = Weights(
        rule=config.rule,
        theta={name: value.detach().clone() for name, value in trainer.theta.items()},
        lr=config.lr,
        schedule=config.schedules[0],
        preset=label.preset,
        data=config.task,
        steps=len(trainer.history) * config.unroll_length * config.tasks_per_step,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=label.commit,
        licence=label.licence,
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HISTORY_COLUMNS)
    writer.writerows(dataclasses.astuple(record) for record in trainer.history)
    atomic_write(folder / HISTORY, text.getvalue().encode())
    atomic_write(folder / CURVE, _curve(trainer.history))
    save_weights(weights, folder / WEIGHTS)


def _curve(history: list[MetaStep]) -> bytes:
    """A picture of the meta-loss over meta-steps, as PNG."""
    import numpy as np
    from matplotlib.figure import Figure

    steps = np.array([record.index for record in history])
    losses = np.array([record.meta_loss for record in history])
    runs = np.array([record.run for record in history])
    last = np.sort(len(runs) - 1 - np.unique(runs[::-1], return_index=True)[1])  # of each run
    means = [losses[runs == run].mean() for run in runs[last]]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8, label="each unroll")
    axes.plot(steps[last], means, color="C0", label="mean of an inner run")
    finite = losses[np.isfinite(losses)]
    if finite.size and finite.min() > 0:
        axes.set_yscale("log")
    axes.set_xlabel("meta-step")
    axes.set_ylabel("meta-loss")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
