"""Meta-training: inner steps a second and peak memory, of ours, the reference and the textbook."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.floor import Counts, Rates, counts, describe_rates, measure_rates, plain_rates
from benchmarks.meta_worker import OURS, TEXTBOOK, TRIVIAL, Job
from benchmarks.report import number, table
from hyperadam.errors import HyperAdamError
from hyperadam.kernels.cpu_unroll import states_to_keep
from hyperadam.metatrain import MetaTrainConfig
from hyperadam.rule import VariationalHyperAdamRule
from hyperadam.tasks import TASKS

BATCHED = 8
GPU_TASKS = (1, 8, 64)
"""Inner runs side by side on a GPU."""


class WorkerError(HyperAdamError):
    """A process that measures failed."""


def jobs(backend: str, device: str, data_dir: Path, *, quick: bool) -> dict[str, Job]:
    """The programs by name, on a CPU the trivial ones among them."""
    task = "digits-mlp1-sigmoid" if quick else MetaTrainConfig().task
    common = Job(
        program=OURS,
        backend=backend,
        device=device,
        tasks=1,
        task=task,
        data_dir=None if quick else str(data_dir),
        warm_steps=1,
        # Whole inner runs of five unrolls, so that what begins a run counts as often as it is.
        meta_steps=2 if quick else 15,
    )
    if device != "cpu":
        of_gpu = {f"ours, B={tasks}": tasks for tasks in GPU_TASKS}
        return {name: dataclasses.replace(common, tasks=tasks) for name, tasks in of_gpu.items()}
    batched = 2 if quick else BATCHED
    fewer = 2 if quick else 5
    plain = dataclasses.replace(common, meta_steps=fewer)
    return {
        f"ours, B={batched}": dataclasses.replace(plain, tasks=batched),
        "ours, B=1": common,
        "reference": dataclasses.replace(plain, backend="reference"),
        TEXTBOOK: dataclasses.replace(plain, program=TEXTBOOK),
        f"{TRIVIAL}, B={batched}": dataclasses.replace(plain, program=TRIVIAL, tasks=batched),
        f"{TRIVIAL}, B=1": dataclasses.replace(plain, program=TRIVIAL),
    }


def run_job(job: Job) -> dict[str, Any]:
    """What a job's process has measured, or the first of its processes.

    Raises:
        WorkerError: it failed.
    """
    command = [sys.executable]
    if job.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(job.processes)]
    command += ["-m", "benchmarks.meta_worker"]
    done = subprocess.run(
        [*command, json.dumps(dataclasses.asdict(job))], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise WorkerError(f"{job.program} failed: {done.stderr.strip() or 'no message'}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(
    *, backend: str, device: str, data_dir: Path, quick: bool
) -> tuple[dict[str, Any], list[str]]:
    """All numbers, and the sections of the Markdown file."""
    rounds = 1 if quick else 3
    chosen = jobs(backend, device, data_dir, quick=quick)
    raw: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    left_out: dict[str, str] = {}
    for done in range(rounds):
        for name, job in chosen.items():
            if name in left_out:
                continue
            print(f"meta: {name}, round {done + 1} of {rounds}")
            found = run_job(job)
            if "unavailable" in found:
                left_out[name] = found["unavailable"]
            else:
                raw[name].append(found)
    results = summarise(chosen, raw) | {
        "task": next(iter(chosen.values())).task,
        "unroll_length": MetaTrainConfig().unroll_length,
        "left_out": left_out,
        "raw": raw,
    }
    if device == "cpu":
        rates = measure_rates(torch.device(device), quick=quick)
        results["floor"] = floor(results, rates)
    return results, sections(results)


def needed(rule: VariationalHyperAdamRule, unroll_length: int) -> Counts:
    """What the rule needs for one parameter and inner step of an unroll that keeps few states.

    The step itself; its inside made again on the way back; two products, for the gradients of its
    inputs and of theta, for each of its own; and of the states that are made again their share,
    which leaves out the weights' cell, the candidates' sum and the variance.
    """
    step = counts(rule)
    H, bound = rule.channels, int(rule.candidate_bound is not None)
    state = Counts(
        flop=step.flop - 2 * (H * H + H + H * int(rule.has_variance)),
        exponentials=step.exponentials - (1 + bound) * H - int(rule.has_variance),
        bytes=step.bytes,
    )
    made_again = (unroll_length - len(states_to_keep(unroll_length))) / unroll_length
    return Counts(
        flop=round(4 * step.flop + made_again * state.flop),
        exponentials=round(2 * step.exponentials + made_again * state.exponentials),
        bytes=round(3 * step.bytes + made_again * state.bytes),
    )


def floor(results: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """What an inner step would take at the machine's rates, one after the other, in milliseconds,
    and how much faster than the textbook that would be.

    The inner task's time is that of the trivial rule, measured; traffic is left out, since an
    unroll of a small network stays in the caches.
    """
    config = MetaTrainConfig(task=results["task"])
    assert isinstance(config.rule, VariationalHyperAdamRule)
    params = TASKS[config.task].num_params() + config.convex_dim
    count = needed(config.rule, results["unroll_length"])
    inner_ms = 1e3 / results["programs"][f"{TRIVIAL}, B=1"]["inner_steps_s"]
    products_ms = 1e3 * params * count.flop / rates.flop
    exponentials_ms = 1e3 * params * count.exponentials / rates.exponentials
    textbook_ms = 1e3 / results["programs"][TEXTBOOK]["inner_steps_s"]
    ours_ms = 1e3 / results["programs"]["ours, B=1"]["inner_steps_s"]
    without = inner_ms + products_ms
    return {
        "rates": plain_rates(rates),
        "flop_a_param": count.flop,
        "exponentials_a_param": count.exponentials,
        "inner_ms": inner_ms,
        "products_ms": products_ms,
        "exponentials_ms": exponentials_ms,
        "ours_ms": ours_ms,
        "ours_over_floor": ours_ms / (without + exponentials_ms),
        "textbook_over_floor": textbook_ms / (without + exponentials_ms),
        "textbook_over_products": textbook_ms / without,
    }


def summarise(jobs: dict[str, Job], raw: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds, and ratios to the textbook.

    Returns:
        ``programs`` by name: ``inner_steps_s``, of all inner runs together; ``peak_bytes``;
        ``above_inner_bytes``, the peak without that of the trivial rule with as many inner runs,
        where that was measured.
        ``ratios`` by name: ``speed`` over the textbook's, ``memory`` (above the inner task) of the
        textbook over the program's.
    """
    unroll_length = MetaTrainConfig().unroll_length
    peaks = {
        name: statistics.median(found["peak_bytes"] for found in rounds)
        for name, rounds in raw.items()
        if rounds
    }
    trivial = {
        job.tasks: peaks[name]
        for name, job in jobs.items()
        if job.program == TRIVIAL and name in peaks
    }
    programs: dict[str, dict[str, float]] = {}
    for name, peak in peaks.items():
        seconds = statistics.median(statistics.mean(found["seconds"]) for found in raw[name])
        programs[name] = {
            "inner_steps_s": jobs[name].tasks * unroll_length / seconds,
            "peak_bytes": peak,
        }
        if (tasks := jobs[name].tasks) in trivial:
            programs[name]["above_inner_bytes"] = peak - trivial[tasks]
    ratios = {}
    plain = programs.get(TEXTBOOK)
    for name, found in programs.items():
        if plain is not None and jobs[name].program == OURS:
            ratios[name] = {"speed": found["inner_steps_s"] / plain["inner_steps_s"]}
            if found["above_inner_bytes"] > 0:
                ratios[name]["memory"] = plain["above_inner_bytes"] / found["above_inner_bytes"]
    return {"programs": programs, "ratios": ratios}


def sections(results: dict[str, Any]) -> list[str]:
    """A table and what was left out."""
    rows = []
    for name, found in results["programs"].items():
        ratio = results["ratios"].get(name, {})
        rows.append(
            [
                name,
                number(found["inner_steps_s"]),
                number(found["peak_bytes"] / 1e6),
                number(found["above_inner_bytes"] / 1e6 if "above_inner_bytes" in found else None),
                number(ratio.get("speed")),
                number(ratio.get("memory")),
            ]
        )
    header = [
        "program",
        "inner steps a second",
        "peak, MB",
        "above the inner task, MB",
        "speed over textbook",
        "memory, textbook over it",
    ]
    texts = [
        f"Task {results['task']} with random scaling and convex term, unrolls of "
        f"{results['unroll_length']}; B inner runs a meta-step:",
        table(header, rows),
    ]
    if "floor" in results:
        found = results["floor"]
        texts += [
            f"An inner step at the machine's own rates ({describe_rates(found['rates'])}), in "
            f"milliseconds, for the {found['flop_a_param']:,} operations of products and "
            f"{found['exponentials_a_param']} exponentials a parameter of an unroll that keeps few "
            f"states:",
            table(
                ["what", "ms"],
                [
                    ["the inner task, measured", number(found["inner_ms"])],
                    ["products", number(found["products_ms"])],
                    ["exponentials", number(found["exponentials_ms"])],
                    ["ours, B=1, measured", number(found["ours_ms"])],
                ],
            ),
            f"Ours takes {number(found['ours_over_floor'])} times their sum. The textbook takes "
            f"{number(found['textbook_over_floor'])} times it, and "
            f"{number(found['textbook_over_products'])} times the inner task and the products "
            f"alone: no program with these products is faster by more.",
        ]
    texts += [f"Left out: {name}: {reason}" for name, reason in results["left_out"].items()]
    return texts
