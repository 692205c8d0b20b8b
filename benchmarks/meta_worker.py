"""One program's meta-training in a process of its own, so that its peak memory is its own.

``python -m benchmarks.meta_worker '{"program": ..., ...}'`` prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.plain_meta import PlainMetaTrainer, TextbookRule, TrivialRule, trivial_theta
from hyperadam.errors import HyperAdamError
from hyperadam.metatrain import MetaTrainConfig, MetaTrainer
from hyperadam.ranks import Ranks, launched_ranks
from hyperadam.tasks import make_generator

OURS, TEXTBOOK, TRIVIAL = "ours", "textbook", "trivial"


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process measures.

    Attributes:
        program: ``"ours"``, ``"textbook"`` or ``"trivial"``.
        backend: of ours.
        device: of ours.
        tasks: inner runs of a meta-step.
        task: the inner task.
        data_dir: where its data are; None: it needs none.
        warm_steps: meta-steps that are not timed.
        meta_steps: meta-steps that are.
        processes: that share the inner runs, under ``torchrun``.
        threads: of each; None: PyTorch's choice.
    """

    program: str
    backend: str
    device: str
    tasks: int
    task: str
    data_dir: str | None
    warm_steps: int
    meta_steps: int
    processes: int = 1
    threads: int | None = None


def _trainer(job: Job, ranks: Ranks) -> Callable[[], object]:
    """A program's meta-step."""
    data_dir = None if job.data_dir is None else Path(job.data_dir)
    config = MetaTrainConfig(task=job.task)
    if job.program == OURS:
        chosen = [
            f"backend={job.backend}",
            f"device={job.device}",
            f"tasks_per_step={job.tasks}",
        ]
        return MetaTrainer(config.with_overrides(chosen), data_dir, ranks).meta_step
    if job.program == TRIVIAL:
        theta, rule = trivial_theta(), TrivialRule()
        return PlainMetaTrainer(config, rule, theta, job.tasks, data_dir).meta_step
    theta = config.rule.init_theta(make_generator(config.seed, "theta"))
    return PlainMetaTrainer(config, TextbookRule(), theta, job.tasks, data_dir).meta_step


def _status(name: str) -> int:
    """A size of this process in bytes, from the kernel's account."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    assert match is not None
    return 1024 * int(match[1])


def _forget_peak() -> None:
    """Give back what decoding the data set left, and start the account of the peak anew.

    Loading takes more memory than some programs' meta-training: without this it would be what is
    measured. ``getrusage`` will not do, since its peak also counts the parent's before exec.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(job: Job, ranks: Ranks) -> dict[str, Any]:
    """Times of meta-steps, and the peak of memory in meta-training, in bytes: the process's
    resident memory, on a GPU what PyTorch has allocated there."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    meta_step = _trainer(job, ranks)
    _forget_peak()
    start = _status("VmRSS")
    for _ in range(job.warm_steps):
        meta_step()
    seconds = []
    for _ in range(job.meta_steps):
        begin = time.perf_counter()
        meta_step()
        seconds.append(time.perf_counter() - begin)
    on_gpu = job.device != "cpu"
    return {
        "seconds": seconds,
        "start_bytes": start,
        "peak_bytes": torch.cuda.max_memory_allocated(job.device) if on_gpu else _status("VmHWM"),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """The process."""
    with launched_ranks() as ranks:
        try:
            found = measure(Job(**json.loads(sys.argv[1])), ranks)
        except HyperAdamError as error:
            found = {"unavailable": str(error)}
        if ranks.first:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
