"""The benchmarks compare like with like, and run."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import floor, machine, meta, plain_meta, step, textbook
from benchmarks.__main__ import main
from benchmarks.measure import Effort, Program, groups, interleave
from benchmarks.resnet import resnet20_shapes
from conftest import random_theta
from hyperadam.kernels import cpu, differentiable_rule
from hyperadam.metatrain import InnerState, MetaTrainConfig, unroll
from hyperadam.rule import VariationalHyperAdamRule
from hyperadam.source import source_version
from hyperadam.tasks import TASKS


@pytest.mark.parametrize(
    "rule",
    [
        VariationalHyperAdamRule(),
        VariationalHyperAdamRule(channels=6, column_norm="rms", candidate_bound=5.0),
    ],
    ids=["paper", "bundled"],
)
def test_textbook_is_the_rule(rule):
    theta = random_theta(rule, torch.float64)
    variant = textbook.Variant(rule.column_norm == "rms", rule.candidate_bound, rule.moment_decays)
    generator = torch.Generator().manual_seed(0)
    ours, plain = rule.init_state(50, dtype=torch.float64), textbook.init(theta, 50)
    for _ in range(5):
        g = torch.randn(50, generator=generator, dtype=torch.float64)
        update, ours = rule.step(theta, ours, g)
        mean, log_var, plain = textbook.update(theta, plain, g, variant)
        torch.testing.assert_close(mean, update.mean_N, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(log_var, update.log_var_N, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(textbook.kl(log_var), rule.kl(update))


def test_textbook_optimizer_moves_the_parameters():
    rule = VariationalHyperAdamRule(channels=6)
    theta, w = random_theta(rule), torch.nn.Parameter(torch.ones(9))
    w.grad = torch.linspace(-1, 1, 9)
    mean, log_var, _ = textbook.update(theta, textbook.init(theta, 9), w.grad)
    torch.manual_seed(0)
    textbook.TextbookOptimizer(w, theta, 0.1, textbook.Variant()).step()
    torch.manual_seed(0)
    expected = 1 - 0.1 * (mean + torch.exp(log_var / 2) * torch.randn(9))
    torch.testing.assert_close(w.detach(), expected)


def test_plain_meta_gradient_is_the_packages(monkeypatch):
    """The same unroll, without noise, by the benchmark's program and by the package's."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    rule = VariationalHyperAdamRule(channels=4)
    config = MetaTrainConfig(task="digits-mlp1-sigmoid", unroll_length=3, trajectory_length=3)
    theta = random_theta(rule)
    trainer = plain_meta.PlainMetaTrainer(config, plain_meta.TextbookRule(), theta)
    (inner,) = trainer.inner
    start, batches = inner.w, [inner.task.batch(inner.data_seed, t) for t in range(3)]
    trainer.unroll(inner).backward()

    ours = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
    differentiable = differentiable_rule(rule)
    result = unroll(
        differentiable,
        ours,
        InnerState(start[None], differentiable.init_state(1, len(start))),
        lambda params_BN, batch: inner.loss(params_BN[0], batch)[None],
        batches,
        torch.zeros(3, 1, len(start)),
        lrs=[config.lr] * config.unroll_length,
        kl_weight=config.kl_weight,
    )
    result.meta_loss.backward()
    torch.testing.assert_close(inner.w, result.carry.params_BN[0])
    for name, value in ours.items():
        scale = float(value.grad.abs().max())
        torch.testing.assert_close(theta[name].grad, value.grad, rtol=1e-3, atol=1e-4 * scale)


def test_trivial_rule_trains_the_same_task():
    config = MetaTrainConfig(task="digits-mlp1-sigmoid", unroll_length=2, trajectory_length=2)
    theta = plain_meta.trivial_theta()
    trainer = plain_meta.PlainMetaTrainer(config, plain_meta.TrivialRule(), theta, tasks=2)
    first = trainer.inner
    assert math.isfinite(trainer.meta_step())
    assert theta["scale"] != 1
    assert trainer.inner is not first


def test_counts_of_the_papers_rule():
    needed = floor.counts(VariationalHyperAdamRule())
    assert (needed.flop, needed.exponentials, needed.bytes) == (10_560, 181, 988)
    assert floor.counts(VariationalHyperAdamRule(), 2).bytes == 500
    assert floor.counts(VariationalHyperAdamRule(candidate_bound=5.0)).exponentials == 201
    rates = floor.Rates(flop=10_560.0, copy_bytes=988.0, exponentials=math.inf)
    assert floor.floor_seconds(needed, rates) == 2
    wider = floor.counts(VariationalHyperAdamRule(moment_decays=(0.9, 0.99)))
    assert (wider.flop, wider.bytes) == (10_640, 1004)


def test_programs_are_measured_together_where_they_fit():
    programs = [Program(str(size), lambda: print, size, 5) for size in (10, 10, 80, 1)]
    assert [len(group) for group in groups(programs, None)] == [4]
    assert [[p.held_bytes for p in group] for group in groups(programs, 30)] == [
        [10, 10],
        [80],
        [1],
    ]
    assert list(groups([], 30)) == []


def test_slow_programs_have_enough_turns():
    effort = Effort(rounds=9, seconds=0, least=4)
    times = interleave([Program("slow", lambda: lambda: None)], effort, torch.device("cpu"))
    assert len(times["slow"]) == 4 * 9  # of ten steps a turn the first is dropped


def test_the_source_is_named():
    assert machine.describe(torch.device("cpu"))["source"] == source_version()


def test_resnet20():
    shapes = resnet20_shapes()
    assert sum(math.prod(shape) for shape in shapes) == 269_722
    assert sum(len(shape) == 4 for shape in shapes) == 19


def test_step_ratios():
    def entry(**ns):
        return {"programs": {name: {"median_ns_a_param": value} for name, value in ns.items()}}

    ours = "cpu float32"
    measured = {
        "160k": entry(**{"Adam": 2.0, "textbook": 60.0, ours: 20.0}),
        "16M": entry(**{"Adam": 4.0, ours: 30.0}),
        step.RESNET: entry(**{"Adam": 4.0, ours: 22.0}),
        step.RESNET_FLAT: entry(**{"Adam": 4.0, ours: 20.0}),
    }
    found = step.ratios(measured, {"float32": 10.0, "bfloat16": 8.0}, ["cpu"])
    assert list(found) == [ours]
    assert found[ours]["160k"] == {"ours/floor": 2, "textbook/ours": 3, "ours/Adam": 10}
    assert found[ours]["16M"] == {"ours/floor": 3, "ours/Adam": 7.5}
    assert found[ours]["16M over 160k"] == {"growth": 1.5}
    assert found[ours][step.RESNET]["list/flat"] == 1.1


def test_meta_summary(tmp_path):
    jobs = meta.jobs("auto", "cpu", tmp_path, quick=False)
    peaks = {"ours, B=8": 130, "ours, B=1": 110, "textbook": 200}
    raw = {name: [{"seconds": [2.0], "peak_bytes": peaks.get(name, 100)}] * 2 for name in jobs}
    raw["reference"] = []
    found = meta.summarise(jobs, raw)
    assert "reference" not in found["programs"]
    assert found["programs"]["ours, B=8"]["inner_steps_s"] == 80
    assert found["programs"]["textbook"]["above_inner_bytes"] == 100
    assert found["ratios"]["ours, B=1"] == {"speed": 1, "memory": 10}


def test_meta_floor_counts_what_an_unroll_needs(tmp_path):
    rule = VariationalHyperAdamRule()
    step = floor.counts(rule)
    # Of two steps every state is kept: the step, its inside again, and two gradients.
    assert meta.needed(rule, 2).flop == 4 * step.flop
    assert meta.needed(rule, 2).exponentials == 2 * step.exponentials
    # Of twenty, seven: thirteen states are made again, all but what comes behind the candidates.
    assert meta.needed(rule, 20).flop == 4 * step.flop + round(0.65 * (step.flop - 880))
    jobs = meta.jobs("auto", "cpu", tmp_path, quick=True)
    raw = {name: [{"seconds": [4.0], "peak_bytes": 1}] for name in jobs}
    raw["textbook"] = [{"seconds": [12.0], "peak_bytes": 1}]
    raw["trivial, B=1"] = [{"seconds": [1.0], "peak_bytes": 1}]
    results = meta.summarise(jobs, raw) | {"task": "digits-mlp1-sigmoid", "unroll_length": 20}
    params = TASKS["digits-mlp1-sigmoid"].num_params() + 20
    needed = meta.needed(rule, 20)
    found = meta.floor(  # products take twice the inner task's time, exponentials as long
        results,
        floor.Rates(params * needed.flop / 0.1, 1.0, params * needed.exponentials / 0.05),
    )
    assert found["inner_ms"] == pytest.approx(50)
    assert found["products_ms"] == pytest.approx(100)
    assert found["ours_over_floor"] == pytest.approx(1)
    assert found["textbook_over_floor"] == pytest.approx(3)
    assert found["textbook_over_products"] == pytest.approx(4)
    words = "\n".join(meta.sections(results | {"left_out": {}, "floor": found}))
    assert "| products | 100 |" in words


def test_meta_training_on_a_gpu_is_timed_by_the_inner_runs_side_by_side(tmp_path):
    jobs = meta.jobs("auto", "cuda", tmp_path, quick=False)
    assert [job.tasks for job in jobs.values()] == [1, 8, 64]
    assert {job.device for job in jobs.values()} == {"cuda"}
    raw = {name: [{"seconds": [1.0], "peak_bytes": 2e6}] for name in jobs}
    found = meta.summarise(jobs, raw)
    assert found["programs"]["ours, B=64"] == {"inner_steps_s": 64 * 20, "peak_bytes": 2e6}
    results = {**found, "task": "t", "unroll_length": 20, "left_out": {}}
    assert "| ours, B=8 | 160 | 2 | – | – | – |" in "\n".join(meta.sections(results))


def test_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "QUICK_SIZES", {"tiny": 50, "small": 100})
    monkeypatch.setattr(step, "resnet20_shapes", lambda: [(3, 4), (5,)])
    for name in ("floor", "step"):
        assert main([name, "--quick", "--out", str(tmp_path / "out")]) == 0
        text = (tmp_path / "out" / f"{name}.json").read_text()
        values = json.loads(text)
        assert values["command"].startswith(f"python -m benchmarks {name} ")
        assert str(tmp_path) not in text
        assert (tmp_path / "out" / f"{name}.md").read_text().startswith(f"# {name}\n")
    ours = f"{values['results']['ours']} float32"
    assert set(values["results"]["cases"]) == {"tiny", "small", step.RESNET, step.RESNET_FLAT}
    assert step.ADAM_DEFAULT in values["results"]["cases"][step.RESNET]["programs"]
    for case in values["results"]["cases"].values():
        assert {"Adam", ours} <= set(case["programs"])
        assert all(len(p["seconds"]) == p["steps"] for p in case["programs"].values())
    assert values["results"]["ratios"][ours]["small over tiny"]["growth"] > 0
    assert "textbook/ours" in capsys.readouterr().out


def test_two_processes_are_timed(tmp_path):
    assert main(["ranks", "--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "ranks.json").read_text())["results"]
    assert results["speed_over_first"]["1 process, 1 thread"] == 1
    assert results["inner_steps_s"]["2 processes, 1 thread each"] > 0


def test_mistakes_are_one_line(tmp_path, capsys):
    arguments = ["step", "--quick", "--out", str(tmp_path), "--backend", "abacus"]
    assert main(arguments) == 2
    assert "unknown backend 'abacus'" in capsys.readouterr().err
    arguments = ["step", "--quick", "--out", str(tmp_path), "--instruction-set", "abacus"]
    assert main(arguments) == 2
    assert "unknown instruction set 'abacus'" in capsys.readouterr().err


def test_the_instruction_set_is_what_runs(monkeypatch):
    used = []
    program = cpu._cpu.Program32

    def spy(*arguments):
        used.append(arguments[-1])
        return program(*arguments)

    monkeypatch.setattr(cpu._cpu, "Program32", spy)
    rule = VariationalHyperAdamRule(channels=4)
    for name in cpu.instruction_sets():
        cpu.prefer(name)
        try:
            cpu.CpuPasses(rule, random_theta(rule))
        finally:
            cpu.prefer(None)
    assert used == cpu.instruction_sets()
