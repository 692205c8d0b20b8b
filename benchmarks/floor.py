"""What the machine could do: its own rates, and from them a floor for the rule's step.

The floor adds up the times that the rule's arithmetic, memory traffic and exponentials would take
at the rates of a large matrix product, a large copy and ``torch.exp``, one after the other and with
the same threads. A program that overlaps them may come below it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.report import number, table
from hyperadam import load_weights
from hyperadam.estimate import STATE_DTYPES
from hyperadam.kernels import TileLayout
from hyperadam.rule import VariationalHyperAdamRule


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of a device, in units a second; those that don't matter there are infinite.

    Attributes:
        flop: of a float32 matrix product, a multiplication and an addition counting two.
        copy_bytes: of a copy between arrays far larger than caches, read and written.
        exponentials: of ``torch.exp`` on arrays that stay in the cache.
    """

    flop: float
    copy_bytes: float
    exponentials: float

    def best(self, other: Rates) -> Rates:
        """The better of two measurements, rate by rate."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Rates(*(max(pair) for pair in pairs))


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one step of the rule needs for one parameter.

    Attributes:
        flop: of its matrix products and of the sum over candidates.
        exponentials: including those of sigmoid, tanh and elu.
        bytes: read and written.
    """

    flop: int
    exponentials: int
    bytes: int


def counts(rule: VariationalHyperAdamRule, state_itemsize: int = 4) -> Counts:
    """Counts from a rule's configuration.

    With H channels, L state layers, F features and R numbers of state:

    - flop, two for each multiplication with its addition: ``F H`` (preprocessing), ``8 H² L`` (4H
      gates of 2H inputs), ``4 H²`` (2H decay rates of 2H inputs), ``H²`` (weights), ``H`` (their
      sum with the candidates), ``H`` (variance). 10,560 at H = 20.
    - exponentials, one for each elu, sigmoid and tanh: ``H`` (x), ``5 H L`` (gates and tanh c),
      ``2 H`` (decay rates), ``H`` (weights), ``H`` where candidates are bounded, 1 (standard
      deviation). 181 at H = 20; what the noise takes is left out.
    - bytes: the state read and written once, the gradient read, the parameter read and written.
      988 at H = 20 in float32. The column norms need parts of it twice; that is left out.
    """
    H, L, F = rule.channels, rule.state_layers, rule.num_features
    R = TileLayout.of(rule).num_rows
    var, bound = int(rule.has_variance), int(rule.candidate_bound is not None)
    return Counts(
        flop=2 * (F * H + 8 * H * H * L + 4 * H * H + H * H + H + H * var),
        exponentials=(4 + 5 * L + bound) * H + var,
        bytes=2 * R * state_itemsize + 12,
    )


def floor_seconds(needed: Counts, rates: Rates) -> float:
    """Seconds for one parameter, at these rates."""
    return (
        needed.flop / rates.flop
        + needed.bytes / rates.copy_bytes
        + needed.exponentials / rates.exponentials
    )


def plain_rates(rates: Rates) -> dict[str, float]:
    """The rates by name, without those that don't matter on the device."""
    return {name: rate for name, rate in vars(rates).items() if math.isfinite(rate)}


UNITS = {
    "flop": (1e9, "GFLOP/s sgemm"),
    "copy_bytes": (1e9, "GB/s copy"),
    "exponentials": (1e9, "10^9 exp/s"),
}


def describe_rates(rates: Mapping[str, float]) -> str:
    """The rates of :func:`plain_rates` in words."""
    return ", ".join(
        f"{number(rate / UNITS[name][0])} {UNITS[name][1]}" for name, rate in rates.items()
    )


def run(*, device: torch.device, quick: bool) -> tuple[dict[str, Any], list[str]]:
    """The device's rates, and the floor of the bundled weights' rule and of the paper's."""
    rates = measure_rates(device, quick=quick)
    bundled = load_weights("default").rule
    assert isinstance(bundled, VariationalHyperAdamRule)
    rules = {"bundled weights": bundled, "paper": VariationalHyperAdamRule()}
    floors: dict[str, dict[str, float]] = {}
    for name, rule in rules.items():
        for dtype, kind in STATE_DTYPES.items():
            needed = counts(rule, kind.itemsize)
            floors[f"{name}, {dtype}"] = {
                **vars(needed),
                "ns_a_param": 1e9 * floor_seconds(needed, rates),
                "flop_ns": 1e9 * needed.flop / rates.flop,
                "copy_ns": 1e9 * needed.bytes / rates.copy_bytes,
                "exp_ns": 1e9 * needed.exponentials / rates.exponentials,
            }
    header = ["rule, state", *next(iter(floors.values()))]
    rows = [[name, *map(number, found.values())] for name, found in floors.items()]
    found = plain_rates(rates)
    results = {"rates": found, "floors": floors}
    return results, [f"Rates: {describe_rates(found)}.", table(header, rows)]


def _best_seconds(run: Callable[[], object], seconds: float, device: torch.device) -> float:
    """The least time of a call, over some calls."""
    best, begin = math.inf, time.perf_counter()
    run()
    while math.isinf(best) or time.perf_counter() - begin < seconds:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _copy_rate(size: int, seconds: float, device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of ``size`` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), seconds, device)


def measure_rates(device: torch.device, *, quick: bool = False) -> Rates:
    """A few seconds of measurement with PyTorch's own number of threads.

    On a GPU the copy alone: there a step is bound by the traffic of its state.
    """
    seconds = 0.1 if quick else 1.5
    copy = _copy_rate(1 << (22 if quick else 28), seconds, device)
    if device.type == "cuda":
        return Rates(math.inf, copy, math.inf)
    edge = 512 if quick else 2048
    left, right = torch.randn(edge, edge), torch.randn(edge, edge)
    product = torch.empty(edge, edge)
    flop = 2 * edge**3 / _best_seconds(lambda: torch.mm(left, right, out=product), seconds, device)
    # As many elements a thread as PyTorch gives one at least: they stay in its cache.
    count = (1 << 15) * torch.get_num_threads()
    values, results = torch.randn(count), torch.empty(count)
    exponentials = count / _best_seconds(lambda: torch.exp(values, out=results), seconds, device)
    return Rates(flop, copy, exponentials)
