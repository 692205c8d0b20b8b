"""Times of steps, taken so that noise hits all programs alike."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

Step = Callable[[], object]

TURN_SECONDS = 0.05
MAX_STEPS_A_TURN = 10
WARM_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Program:
    """Something whose step is timed.

    Attributes:
        name: in tables.
        make: builds it, with all its memory, and returns its step.
        held_bytes: that it keeps between steps, about.
        step_bytes: that it needs beyond them while a step runs, about.
    """

    name: str
    make: Callable[[], Step]
    held_bytes: int = 0
    step_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: turns of each program, at most and if time allows.
        seconds: for one group of programs, about.
        least: turns of each program however long they take, so that a median rests on enough.
    """

    rounds: int
    seconds: float
    least: int = 2


def groups(programs: Sequence[Program], free_bytes: int | None) -> Iterator[list[Program]]:
    """Programs in their order, as many at a time as fit into the memory, but at least one."""
    group: list[Program] = []
    for program in programs:
        wider = [*group, program]
        needed = sum(each.held_bytes for each in wider) + max(each.step_bytes for each in wider)
        if group and free_bytes is not None and needed > free_bytes:
            yield group
            wider = [program]
        group = wider
    if group:
        yield group


def _timed(step: Step, device: torch.device) -> float:
    """Seconds of one step; on a GPU between two events on its queue."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def interleave(
    programs: Sequence[Program], effort: Effort, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of the programs' steps, in turns.

    A turn is some 50 ms of one program's steps. The first of several is dropped: its caches hold
    what the program before left there.
    """
    steps = {program.name: program.make() for program in programs}
    turn_steps = {}
    for name, step in steps.items():
        seconds = 1e-9 + min(_timed(step, device) for _ in range(WARM_STEPS))
        turn_steps[name] = min(1 + int(TURN_SECONDS / seconds), MAX_STEPS_A_TURN)
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    for finished in range(effort.rounds):
        if finished >= effort.least and time.perf_counter() - begin > effort.seconds:
            break
        for name, step in steps.items():
            turn = [_timed(step, device) for _ in range(turn_steps[name])]
            times[name] += turn[1:] or turn
    return times


def measure(
    programs: Sequence[Program], effort: Effort, device: torch.device, free_bytes: int | None
) -> dict[str, list[float]]:
    """:func:`interleave` for each group of programs that fits; memory is freed in between."""
    times: dict[str, list[float]] = {}
    for group in groups(programs, free_bytes):
        times |= interleave(group, effort, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return times


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median, minimum and count."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "steps": len(seconds),
    }
