"""Training a task with an optimizer, as a function of seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.optim.optimizer import ParamsT

from hyperadam.evaluation.records import final_loss, has_diverged
from hyperadam.evaluation.trace import Tracer
from hyperadam.schedule import Schedule, lr_scheduler
from hyperadam.tasks import Task, derive_seed, make_generator, move_batch

CPU = torch.device("cpu")

OptimizerFactory = Callable[[ParamsT], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRun:
    """One training run of T steps.

    Attributes:
        train_loss_T: loss of each step's batch before its update; NaN behind the first that is
            not finite, where the run ends.
        train_loss_post_T: loss of the same batch after its update; likewise.
        metrics: of the task's held-out data, at the end.
        wall_seconds: of training: batches, gradients, updates. What only measures does not count.
        optimizer_seconds: in ``optimizer.step()`` among them.
        peak_bytes: peak memory during the run: the process's, or on a GPU its tensors' there.
    """

    train_loss_T: np.ndarray
    train_loss_post_T: np.ndarray
    metrics: dict[str, float]
    wall_seconds: float
    optimizer_seconds: float
    peak_bytes: int

    @property
    def final_loss(self) -> float:
        """See :func:`~hyperadam.evaluation.records.final_loss`."""
        return final_loss(self.train_loss_post_T)

    @property
    def diverged(self) -> bool:
        """See :func:`~hyperadam.evaluation.records.has_diverged`."""
        return has_diverged(self.train_loss_T, self.train_loss_post_T)


def train(
    task: Task,
    factory: OptimizerFactory,
    *,
    seed: int,
    steps: int,
    schedule: Schedule = "none",
    validate: bool = True,
    tracer: Tracer | None = None,
    device: torch.device = CPU,
) -> TrainingRun:
    """Train from scratch.

    Args:
        task: what to train.
        factory: makes the optimizer for a list of parameters with their names.
        seed: of the initial parameters and of the data order.
        steps: how many.
        schedule: of the learning rate; see :func:`hyperadam.schedule.lr_factor`.
        validate: compute the task's metrics at the end.
        tracer: records what a learned optimizer predicts.
        device: where; parameters and batches are drawn on the CPU, the same for all devices.
    """
    initial = task.init_params(make_generator(seed, "params"))
    params = {name: value.to(device).requires_grad_() for name, value in initial.items()}
    optimizer = factory(list(params.items()))
    scheduler = lr_scheduler(optimizer, schedule, steps)
    data_seed = derive_seed(seed, "data")
    before, after = np.full(steps, math.nan), np.full(steps, math.nan)
    wall = in_optimizer = 0.0
    _forget_peak(device)
    _set_mode(optimizer, training=True)
    for step in range(steps):
        start = time.perf_counter()
        batch = move_batch(task.batch(data_seed, step), device)
        optimizer.zero_grad()
        loss = task.loss(params, batch)
        loss.backward()
        _wait_for(device)
        wall += time.perf_counter() - start
        if tracer is not None:
            tracer.before_step(step, optimizer, list(params))
        start = time.perf_counter()
        optimizer.step()
        _wait_for(device)
        seconds = time.perf_counter() - start
        in_optimizer, wall = in_optimizer + seconds, wall + seconds
        scheduler.step()
        before[step] = float(loss.detach())
        with torch.no_grad(), _evaluating(optimizer):
            after[step] = float(task.loss(params, batch))
        if not (math.isfinite(before[step]) and math.isfinite(after[step])):
            break  # what was never reached is NaN, as it was made
    peak = _peak_bytes(device)
    metrics: dict[str, float] = {}
    if validate:
        with torch.no_grad(), _evaluating(optimizer):
            metrics = task.validate(params)
    return TrainingRun(before, after, metrics, wall, in_optimizer, peak)


def _set_mode(optimizer: torch.optim.Optimizer, *, training: bool) -> None:
    """Schedule-free optimizers hold one point in training and another one to be used."""
    change = getattr(optimizer, "train" if training else "eval", None)
    if change is not None:
        change()


@contextlib.contextmanager
def _evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    _set_mode(optimizer, training=False)
    try:
        yield
    finally:
        _set_mode(optimizer, training=True)


def _wait_for(device: torch.device) -> None:
    """Let a GPU finish, so that its time is counted where it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    """Start the account of the peak memory anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_bytes(device: torch.device) -> int:
    """Peak memory since :func:`_forget_peak`; where the system can't tell, the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
