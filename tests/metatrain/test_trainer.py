from __future__ import annotations

import dataclasses

import pytest
import torch

from hyperadam.metatrain import MetaTrainer
from hyperadam.presets import preset
from hyperadam.tasks import RandomScaling, SumOfTasks

SMOKE = preset("smoke")


def theta_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.theta.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_it_learns():
    """On one inner run again and again, the meta-loss falls."""
    config = SMOKE.with_overrides(
        ["inner_runs=40", "meta_lr=0.02", "meta_weight_decay=0", "lr=0.01", "meta_grad_clip=1"]
    )
    trainer = MetaTrainer(config)
    while not trainer.finished:
        trainer.meta_step()
    last = [record.inner_loss for record in trainer.history if record.inner_step == 10]
    assert sum(last[-10:]) < 0.9 * sum(last[:10])


def test_runs_are_fresh_and_repeatable():
    one, two = MetaTrainer(SMOKE), MetaTrainer(SMOKE)
    first = one.carry.params_N.clone()
    while not one.finished:
        assert one.meta_step() == two.meta_step()
    assert_same(theta_of(one), theta_of(two))
    assert [record.run for record in one.history] == [n // 2 for n in range(20)]
    assert [record.inner_step for record in one.history[:4]] == [5, 10, 5, 10]
    assert not torch.equal(one.task.tasks[0].scales["linear1.bias"],
                           MetaTrainer(SMOKE).task.tasks[0].scales["linear1.bias"])  # fmt: skip
    assert torch.equal(first, MetaTrainer(SMOKE).carry.params_N)
    other = MetaTrainer(dataclasses.replace(SMOKE, seed=1))
    assert not torch.equal(first, other.carry.params_N)


@pytest.mark.parametrize("at", [0, 1, 2, 7, 19, 20])
def test_state_is_everything(at):
    undisturbed = MetaTrainer(SMOKE)
    for _ in range(at):
        undisturbed.meta_step()
    saved = {name: value.clone() for name, value in undisturbed.state().items()}
    resumed = MetaTrainer(SMOKE)
    if at < 20:
        resumed.meta_step()  # whatever it held before is gone
    resumed.load_state(saved)
    while not undisturbed.finished:
        assert undisturbed.meta_step() == resumed.meta_step()
    assert resumed.finished
    assert resumed.history == undisturbed.history
    assert_same(resumed.state(), undisturbed.state())


def test_the_meta_optimizer_is_adam_with_l2():
    trainer = MetaTrainer(SMOKE)
    group = trainer.meta_optimizer.param_groups[0]
    assert isinstance(trainer.meta_optimizer, torch.optim.Adam)
    assert (group["lr"], group["weight_decay"]) == (1e-4, 5e-4)
    before = theta_of(trainer)
    trainer.meta_step()
    moved = max(float((value - before[n]).abs().max()) for n, value in theta_of(trainer).items())
    assert moved == pytest.approx(1e-4, rel=1e-3)  # Adam's first step


def test_clipping():
    config = SMOKE.with_overrides(["meta_grad_clip=1e-3"])
    trainer = MetaTrainer(config)
    record = trainer.meta_step()
    assert record.grad_norm > 1e-3
    norm = torch.nn.utils.get_total_norm([value.grad for value in trainer.theta.values()])
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_a_meta_gradient_that_is_not_finite_is_left_out():
    trainer = MetaTrainer(SMOKE)
    trainer.carry = dataclasses.replace(trainer.carry, params_N=trainer.carry.params_N * torch.nan)
    before = theta_of(trainer)
    record = trainer.meta_step()
    assert not record.applied
    assert_same(theta_of(trainer), before)
    following = trainer.meta_step()
    assert (following.run, following.inner_step, following.applied) == (1, 5, True)


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        ([], "sum scaled scaled"),
        (["random_scaling=0"], "sum MLPTask scaled"),
        (["convex_scaling=0"], "sum scaled ConvexTask"),
        (["convex_dim=0"], "scaled"),
        (["convex_dim=0", "random_scaling=0"], "MLPTask"),
    ],
)
def test_inner_tasks(overrides, kinds):
    def kind(task):
        if isinstance(task, SumOfTasks):
            return " ".join(["sum", *map(kind, task.tasks)])
        return "scaled" if isinstance(task, RandomScaling) else type(task).__name__

    trainer = MetaTrainer(SMOKE.with_overrides(overrides))
    assert kind(trainer.task) == kinds
    assert trainer.meta_step().applied


def test_every_rule_can_be_meta_trained(rule_name):
    config = SMOKE.with_overrides([f"rule={rule_name}", "rule.channels=3", "inner_runs=2"])
    trainer = MetaTrainer(config)
    before = theta_of(trainer)
    while not trainer.finished:
        assert trainer.meta_step().applied
    assert any(not torch.equal(before[name], value) for name, value in theta_of(trainer).items())
