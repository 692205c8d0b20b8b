"""The time of ``optimizer.step()``: ours, the reference, the textbook and Adam."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import floor
from benchmarks.measure import Effort, Program, Step, measure, summary
from benchmarks.report import number, table
from benchmarks.resnet import resnet20_shapes
from benchmarks.textbook import TextbookOptimizer, Variant
from hyperadam import VariationalHyperAdam, load_weights
from hyperadam.estimate import STATE_DTYPES, memory_estimate
from hyperadam.kernels import choose_backend
from hyperadam.optim.memory import free_memory
from hyperadam.rule import VariationalHyperAdamRule
from hyperadam.weights import Weights

SIZES = {"16k": 16_000, "160k": 160_000, "1M": 1_000_000, "4M": 4_000_000, "16M": 16_000_000}
QUICK_SIZES = {"1k": 1_000, "4k": 4_000}
GROWTH_FROM = "160k"
MAX_PLAIN = 1_000_000
"""Parameters beyond which the reference and the textbook are left out: they need several
kilobytes and, without AVX-512, some ten microseconds for each."""
PLAIN_STEP_BYTES = 2_000
"""That the intermediate results of plain PyTorch take for one parameter, about."""
MEMORY_SHARE = 0.8

RESNET, RESNET_FLAT = "ResNet-20", "ResNet-20, flat"
LITE = "lite"
ADAM, ADAM_DEFAULT, TEXTBOOK = "Adam", "Adam, default", "textbook"


@dataclasses.dataclass(frozen=True)
class Case:
    """A list of parameters.

    Attributes:
        name: in tables.
        shapes: of the parameters.
    """

    name: str
    shapes: Sequence[tuple[int, ...]]

    @property
    def num_params(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def cases(*, quick: bool) -> list[Case]:
    """Flat tensors of several sizes, a ResNet-20's parameters, and a flat tensor of as many."""
    sizes = QUICK_SIZES if quick else SIZES
    resnet = Case(RESNET, resnet20_shapes())
    return [
        *(Case(name, [(size,)]) for name, size in sizes.items()),
        resnet,
        Case(RESNET_FLAT, [(resnet.num_params,)]),
    ]


def random_params(case: Case, device: torch.device) -> list[torch.nn.Parameter]:
    """Parameters with gradients that stay the same, the same for every program."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    params = [torch.nn.Parameter(0.1 * normal(shape)) for shape in case.shapes]
    for param in params:
        param.grad = 1e-2 * normal(tuple(param.shape))
    return params


def ours_name(backend: str, state_dtype: str) -> str:
    return f"{backend} {state_dtype}"


def available_backends(
    wanted: str, rule: VariationalHyperAdamRule, device: torch.device
) -> list[str]:
    """The backend that is wanted, then the device's own where that is another."""
    chosen = (choose_backend(name, rule, torch.float32, device) for name in (wanted, "auto"))
    return list(dict.fromkeys(chosen))


def programs(case: Case, backends: Sequence[str], device: torch.device) -> list[Program]:
    """What is timed on a case."""
    weights = load_weights("default")
    rule = weights.rule
    assert isinstance(rule, VariationalHyperAdamRule)
    count = case.num_params

    def ours(backend: str, state_dtype: Any, weights: str | Weights = weights) -> Step:
        return VariationalHyperAdam(
            random_params(case, device), weights=weights, backend=backend, state_dtype=state_dtype
        ).step

    def textbook() -> Step:
        (param,) = random_params(case, device)
        theta = {name: value.to(device) for name, value in weights.theta.items()}
        variant = Variant(rule.column_norm == "rms", rule.candidate_bound, rule.moment_decays)
        return TextbookOptimizer(param, theta, weights.lr, variant).step

    def adam(*, foreach: bool | None) -> Step:
        return torch.optim.Adam(random_params(case, device), foreach=foreach).step

    params_bytes = 8 * count
    held = {name: memory_estimate(weights, count, name).total for name in STATE_DTYPES}
    adam_bytes = params_bytes + memory_estimate(weights, count, "float32").adam
    listed = [Program(ADAM, lambda: adam(foreach=True), adam_bytes, 8 * count)]
    if len(case.shapes) > 1:  # with one tensor both are the same
        listed.append(Program(ADAM_DEFAULT, lambda: adam(foreach=None), adam_bytes, 8 * count))
    for backend in backends:
        if backend == "reference":
            continue
        for dtype, nbytes in held.items():
            listed.append(
                Program(
                    ours_name(backend, dtype),
                    functools.partial(ours, backend, dtype),
                    params_bytes + nbytes,
                )
            )
        listed.append(
            Program(
                ours_name(backend, LITE),
                functools.partial(ours, backend, "float32", LITE),
                params_bytes + memory_estimate(load_weights(LITE), count, "float32").total,
            )
        )
    if count <= MAX_PLAIN:
        plain = params_bytes + held["float32"], PLAIN_STEP_BYTES * count
        name = ours_name("reference", "float32")
        listed.append(Program(name, lambda: ours("reference", "float32"), *plain))
        if len(case.shapes) == 1:
            listed.append(Program(TEXTBOOK, textbook, *plain))
    return listed


def run(*, backend: str, device: torch.device, quick: bool) -> tuple[dict[str, Any], list[str]]:
    """All numbers, and the sections of the Markdown file."""
    weights = load_weights("default")
    rule = weights.rule
    assert isinstance(rule, VariationalHyperAdamRule)
    backends = available_backends(backend, rule, device)
    effort = Effort(rounds=2, seconds=1) if quick else Effort(30, seconds=60, least=15)
    rates = floor.measure_rates(device, quick=quick)
    measured: dict[str, dict[str, Any]] = {}
    for case in cases(quick=quick):
        print(f"step: {case.name}")
        free = free_memory(device)
        limit = None if free is None else int(MEMORY_SHARE * free)
        times = measure(programs(case, backends, device), effort, device, limit)
        measured[case.name] = {
            "num_params": case.num_params,
            "tensors": len(case.shapes),
            "programs": {
                name: summary(seconds)
                | {
                    "median_ns_a_param": 1e9 * summary(seconds)["median_s"] / case.num_params,
                    "min_ns_a_param": 1e9 * min(seconds) / case.num_params,
                    "seconds": seconds,
                }
                for name, seconds in times.items()
            },
        }
    rates = rates.best(floor.measure_rates(device, quick=quick))
    floors: dict[str, float] = {
        dtype: 1e9 * floor.floor_seconds(floor.counts(rule, kind.itemsize), rates)
        for dtype, kind in STATE_DTYPES.items()
    }
    results = {
        "ours": backends[0],
        "rates": floor.plain_rates(rates),
        "floor_ns_a_param": floors,
        "cases": measured,
        "ratios": ratios(measured, floors, backends),
    }
    return results, sections(results)


def ratios(
    measured: dict[str, dict[str, Any]], floors: dict[str, float], backends: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """What a program of ours costs beside others, from medians.

    Returns:
        By name of the program: ``textbook/ours``, ``ours/Adam``, ``ours/lite`` (the weights `lite`
        in float32) and ``ours/floor`` by case;
        ``growth``, the time a parameter at the largest size over that at 160k (or the smallest);
        ``list/flat``, a ResNet-20's parameters over one tensor of as many.
    """

    def median(case: str, program: str) -> float | None:
        entry = measured[case]["programs"].get(program)
        return None if entry is None else float(entry["median_ns_a_param"])

    flat = [name for name in measured if name not in (RESNET, RESNET_FLAT)]
    first = GROWTH_FROM if GROWTH_FROM in flat else flat[0]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for backend in backends:
        for dtype, floor_ns in floors.items():
            program = ours_name(backend, dtype)
            own: dict[str, dict[str, float]] = {}
            for case in measured:
                lite = median(case, ours_name(backend, LITE))
                ours, textbook, adam = (median(case, p) for p in (program, TEXTBOOK, ADAM))
                if ours is None:
                    continue
                own[case] = {"ours/floor": ours / floor_ns}
                if textbook is not None:
                    own[case]["textbook/ours"] = textbook / ours
                if adam is not None:
                    own[case]["ours/Adam"] = ours / adam
                if lite is not None:
                    own[case]["ours/lite"] = ours / lite
            start, end = median(first, program), median(flat[-1], program)
            if start is not None and end is not None:
                own[f"{flat[-1]} over {first}"] = {"growth": end / start}
            listed, joined = median(RESNET, program), median(RESNET_FLAT, program)
            if listed is not None and joined is not None:
                own[RESNET]["list/flat"] = listed / joined
            if own:
                found[program] = own
    return found


def sections(results: dict[str, Any]) -> list[str]:
    """Tables: times a parameter, and the ratios."""
    names = list(dict.fromkeys(n for case in results["cases"].values() for n in case["programs"]))
    rows = []
    for case, entry in results["cases"].items():
        cells = [f"{case} ({entry['num_params']:,} in {entry['tensors']})"]
        for name in names:
            found = entry["programs"].get(name)
            cells.append(
                "–"
                if found is None
                else f"{number(found['median_ns_a_param'])} ({number(found['min_ns_a_param'])})"
            )
        rows.append(cells)
    floors = ", ".join(f"{number(ns)} ({kind})" for kind, ns in results["floor_ns_a_param"].items())
    columns = ["textbook/ours", "ours/Adam", "ours/lite", "ours/floor", "growth", "list/flat"]
    texts = [
        "ns a parameter, median (minimum):",
        table(["parameters (in tensors)", *names], rows),
        f"Floor, ns a parameter: {floors}; rates: {floor.describe_rates(results['rates'])}.",
    ]
    for program, cases in results["ratios"].items():
        rows = [
            [case, *(number(found.get(column)) for column in columns)]
            for case, found in cases.items()
        ]
        texts += [f"Ours: {program}", table(["case", *columns], rows)]
    return texts
