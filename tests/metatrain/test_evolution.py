from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import random_theta
from hyperadam.kernels import differentiable_rule
from hyperadam.metatrain import InnerState, MetaTrainer, unroll
from hyperadam.metatrain.evolution import Perturbations, PerturbedRule
from hyperadam.presets import preset
from hyperadam.rule import HyperAdamRule, VariationalHyperAdamRule

F64 = torch.float64
SMOKE = preset("smoke")
RULES = (VariationalHyperAdamRule(channels=3), HyperAdamRule(channels=3))
N, PAIRS, RUNS = 5, 2, 3
SEEDS = [11, 12, 13]


def loss(w_BN, batch):
    return (w_BN - batch).pow(4).mean(dim=-1)


def starts():
    return torch.linspace(-1, 1, RUNS * N, dtype=F64).reshape(RUNS, N)


def unrolled(rule, theta, carry, first, noise_TBN):
    steps = range(first, first + len(noise_TBN))
    batches = [torch.tensor(0.1 * step, dtype=F64) for step in steps]
    return unroll(
        rule, theta, carry, loss, batches, noise_TBN, lrs=[0.05] * len(noise_TBN), kl_weight=0.1,
        objective="log-loss", meta_batches=[[one, one + 1] for one in batches],
        batch_weights=[0.25, 0.75],
    )  # fmt: skip


def noises():
    return torch.randn(2, 4, RUNS, N, dtype=F64, generator=torch.Generator().manual_seed(3))


def in_two_unrolls(program, theta, run):
    """The meta-losses of one run's two unrolls, under one theta."""
    carry = InnerState(starts()[run : run + 1], program.init_state(1, N, F64))
    losses = []
    for number, noise_TBN in enumerate(noises()):
        with torch.no_grad():
            result = unrolled(program, theta, carry, 4 * number, noise_TBN[:, run : run + 1])
        carry = result.carry
        losses.append(result.meta_loss)
    return losses


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_estimate_is_of_the_whole_run_so_far(rule, backend):
    """Each copy has its theta from the first step on, in the first unroll and in the second."""
    program = differentiable_rule(rule, backend if rule is RULES[0] else "reference")
    theta = random_theta(rule, F64)
    perturbations = Perturbations(theta, SEEDS, PAIRS, scale=0.01)
    perturbed = PerturbedRule(program, perturbations)
    params = starts().repeat_interleave(2 * PAIRS, dim=0)
    carry = InnerState(params, perturbed.init_state(len(params), N, F64))
    thetas = perturbations.thetas(theta)
    each = [in_two_unrolls(program, own, copy // (2 * PAIRS)) for copy, own in enumerate(thetas)]
    for number, noise_TBN in enumerate(noises()):
        free = {name: value.clone().requires_grad_() for name, value in theta.items()}
        noise_TCN = noise_TBN.repeat_interleave(2 * PAIRS, dim=1)
        with torch.no_grad():
            result = unrolled(perturbed, free, carry, 4 * number, noise_TCN)
        carry = result.carry
        expected = torch.stack([losses[number] for losses in each])
        torch.testing.assert_close(result.meta_loss_B, expected)
        meta_loss = perturbations.meta_loss(free, result.meta_loss_B)
        torch.testing.assert_close(meta_loss.detach(), expected.mean())
        meta_loss.backward()
        plus, minus = expected.view(-1, 2).unbind(1)
        for name, value in free.items():
            epsilons = (torch.stack([own[name] for own in thetas[::2]]) - theta[name]) / 0.01
            slopes = ((plus - minus) / 0.02).view(-1, *[1] * theta[name].dim())
            torch.testing.assert_close(value.grad, (slopes * epsilons).mean(0))


def test_small_perturbations_find_the_slope_of_backpropagation(monkeypatch):
    """Where the gradients do not depend on theta: that part backpropagation leaves out."""
    slope_N = torch.linspace(-2, 1, N, dtype=F64)
    monkeypatch.setitem(globals(), "loss", lambda w_BN, batch: 9 + batch + w_BN @ slope_N)
    program = differentiable_rule(RULES[0], "reference")
    theta = {name: value.requires_grad_() for name, value in random_theta(RULES[0], F64).items()}
    perturbations = Perturbations(theta, SEEDS, PAIRS, scale=1e-4)
    carry = InnerState(starts(), program.init_state(RUNS, N, F64))
    losses = unrolled(program, theta, carry, 0, noises()[0]).meta_loss_B
    slopes = []
    for pair, own in enumerate(perturbations.thetas(theta)[::2]):
        grads = torch.autograd.grad(losses[pair // PAIRS], list(theta.values()), retain_graph=True)
        step = torch.cat([(own[name] - value).flatten() for name, value in theta.items()])
        slopes.append(torch.cat([grad.flatten() for grad in grads]) @ step)
    perturbed = PerturbedRule(program, perturbations)
    params = starts().repeat_interleave(2 * PAIRS, dim=0)
    carry = InnerState(params, perturbed.init_state(len(params), N, F64))
    noise_TCN = noises()[0].repeat_interleave(2 * PAIRS, dim=1)
    with torch.no_grad():
        losses = unrolled(perturbed, theta, carry, 0, noise_TCN).meta_loss_B
    differences = (losses[::2] - losses[1::2]) / 2
    torch.testing.assert_close(differences, torch.stack(slopes), rtol=1e-4, atol=1e-12)


def test_runs_have_perturbations_of_their_own():
    theta = random_theta(RULES[0], F64)
    both = Perturbations(theta, SEEDS[:2], PAIRS, 0.01).thetas(theta)
    second = Perturbations(theta, SEEDS[1:2], PAIRS, 0.01).thetas(theta)
    assert len(both) == 2 * len(second) == 8
    for own, same in zip(both[4:], second, strict=True):
        assert all(torch.equal(own[name], same[name]) for name in theta)
    assert not any(torch.equal(both[0][name], both[4][name]) for name in theta)
    for plus, minus in zip(both[::2], both[1::2], strict=True):
        for name, value in theta.items():
            torch.testing.assert_close((plus[name] + minus[name]) / 2, value)


def test_it_learns():
    """On one inner run again and again, the meta-loss falls."""
    config = SMOKE.with_overrides(
        [
            "inner_runs=100", "meta_lr=0.02", "meta_weight_decay=0", "lr=0.01",
            "meta_grad_clip=1", "perturbations=8", "perturbation_scale=0.05",
        ]
    )  # fmt: skip
    trainer = MetaTrainer(config)
    while not trainer.finished:
        trainer.meta_step()
    last = [record.inner_loss for record in trainer.history if record.inner_step == 10]
    assert sum(last[-20:]) < 0.9 * sum(last[:20])


@pytest.mark.parametrize(("tasks", "turns", "at"), [(1, 1, 7), (2, 2, 3), (5, 1, 1)])
def test_state_is_everything(tasks, turns, at):
    config = SMOKE.with_overrides(
        [f"tasks_per_step={tasks}", f"interleaved_runs={turns}", "perturbations=2"]
    )
    undisturbed = MetaTrainer(config)
    for _ in range(at):
        undisturbed.meta_step()
    saved = {name: value.clone() for name, value in undisturbed.state().items()}
    resumed = MetaTrainer(config)
    resumed.meta_step()  # whatever it held before is gone
    resumed.load_state(saved)
    while not undisturbed.finished:
        assert undisturbed.meta_step() == resumed.meta_step()
    assert resumed.history == undisturbed.history
    for name, value in undisturbed.state().items():
        assert torch.equal(value, resumed.state()[name]), name


def test_a_state_of_other_copies_is_refused():
    saved = MetaTrainer(SMOKE.with_overrides(["perturbations=2"])).state()
    with pytest.raises(ValueError, match="is not"):
        MetaTrainer(SMOKE.with_overrides(["perturbations=3"])).load_state(saved)


def test_copies_that_are_not_finite_are_left():
    trainer = MetaTrainer(SMOKE.with_overrides(["perturbations=2"]))
    (runs,) = trainer.in_flight
    params = runs.carry.params_BN.clone()
    params[-1] = torch.nan
    runs.carry = dataclasses.replace(runs.carry, params_BN=params)
    record = trainer.meta_step()
    assert not record.applied
    following = trainer.meta_step()
    assert (following.run, following.inner_step, following.applied) == (1, 5, True)


def test_every_rule_can_be_meta_trained(rule_name):
    config = SMOKE.with_overrides(
        [f"rule={rule_name}", "rule.channels=3", "inner_runs=2", "perturbations=1"]
    )
    trainer = MetaTrainer(config)
    before = {name: value.detach().clone() for name, value in trainer.theta.items()}
    while not trainer.finished:
        assert trainer.meta_step().applied
    assert not any(torch.equal(before[name], value) for name, value in trainer.theta.items())
