"""Meta-training by one and by two processes: inner steps a second."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from benchmarks.meta import run_job
from benchmarks.meta_worker import OURS, Job
from benchmarks.report import number, table
from hyperadam.metatrain import MetaTrainConfig

TASKS = 2
"""Inner runs of a meta-step, over all processes."""

ROUNDS = 3


def jobs(data_dir: Path, *, quick: bool) -> dict[str, Job]:
    """The same meta-steps by other processes and threads; the first is what others are beside."""
    one = Job(
        program=OURS,
        backend="auto",
        device="cpu",
        tasks=TASKS,
        task="digits-mlp1-sigmoid" if quick else MetaTrainConfig().task,
        data_dir=None if quick else str(data_dir),
        warm_steps=1,
        meta_steps=2 if quick else 10,
        threads=1,
    )
    return {
        "1 process, 1 thread": one,
        "1 process, 2 threads": dataclasses.replace(one, threads=2),
        "2 processes, 1 thread each": dataclasses.replace(one, processes=2),
    }


def run(*, data_dir: Path, quick: bool) -> tuple[dict[str, Any], list[str]]:
    """All numbers, and the sections of the Markdown file."""
    chosen = jobs(data_dir, quick=quick)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for done in range(1 if quick else ROUNDS):
        for name, job in chosen.items():
            print(f"ranks: {name}, round {done + 1}")
            seconds[name].append(statistics.mean(run_job(job)["seconds"]))
    task, unroll_length = next(iter(chosen.values())).task, MetaTrainConfig().unroll_length
    rates = {name: TASKS * unroll_length / statistics.median(own) for name, own in seconds.items()}
    first = next(iter(rates.values()))
    results = {
        "task": task,
        "inner_runs": TASKS,
        "seconds": seconds,
        "inner_steps_s": rates,
        "speed_over_first": {name: rate / first for name, rate in rates.items()},
    }
    rows = [[name, number(rate), number(rate / first)] for name, rate in rates.items()]
    texts = [
        f"Task {task}, {TASKS} inner runs a meta-step over all processes, unrolls of "
        f"{unroll_length}:",
        table(["program", "inner steps a second", "over the first"], rows),
    ]
    return results, texts
