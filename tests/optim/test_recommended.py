from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import hyperadam
from conftest import make_weights
from hyperadam import VariationalHyperAdam, load_weights, recommended_scheduler
from hyperadam.errors import ConfigError, WeightsError
from hyperadam.rule import VariationalHyperAdamRule
from hyperadam.schedule import lr_factor


def optimizer_with(schedule, lr=None):
    weights = dataclasses.replace(make_weights(VariationalHyperAdamRule()), schedule=schedule)
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(3))]},
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.5},
    ]
    return VariationalHyperAdam(groups, lr=lr, weights=weights)


def learning_rates(optimizer, scheduler, steps):
    lrs = []
    for _ in range(steps):
        lrs.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()
        scheduler.step()
    return lrs


def test_cosine_takes_every_group_to_zero_and_stays():
    optimizer = optimizer_with("cosine", lr=0.01)
    lrs = learning_rates(optimizer, recommended_scheduler(optimizer, 8), 12)
    for step, (first, second) in enumerate(lrs):
        factor = (1 + math.cos(math.pi * min(step, 8) / 8)) / 2
        assert first == pytest.approx(0.01 * factor, abs=1e-12)
        assert second == pytest.approx(0.5 * factor, abs=1e-12)


def test_cooldown_stays_for_half_of_the_run_and_falls_to_zero():
    optimizer = optimizer_with("cooldown", lr=0.01)
    lrs = learning_rates(optimizer, recommended_scheduler(optimizer, 8), 12)
    factors = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0]
    assert [first for first, _ in lrs] == pytest.approx([0.01 * factor for factor in factors])
    assert [second for _, second in lrs] == pytest.approx([0.5 * factor for factor in factors])


@pytest.mark.parametrize("steps", [1, 3])
def test_cooldown_of_a_short_or_odd_run(steps):
    optimizer = optimizer_with("cooldown", lr=0.01)
    lrs = learning_rates(optimizer, recommended_scheduler(optimizer, steps), steps)
    expected = {1: [1], 3: [1, 1, 2 / 3]}[steps]
    assert [first for first, _ in lrs] == pytest.approx([0.01 * factor for factor in expected])


def test_inverse_sqrt_stays_for_a_hundred_steps_and_falls_whatever_the_length():
    optimizer = optimizer_with("inverse-sqrt", lr=0.01)
    lrs = learning_rates(optimizer, recommended_scheduler(optimizer, 400), 403)
    assert lrs[:101] == [[0.01, 0.5]] * 101
    for step in (101, 144, 399, 400, 401, 402):
        factor = math.sqrt(100 / min(step, 400))
        assert lrs[step] == pytest.approx([0.01 * factor, 0.5 * factor])


def test_none_leaves_the_learning_rates():
    optimizer = optimizer_with("none", lr=0.01)
    lrs = learning_rates(optimizer, recommended_scheduler(optimizer, 4), 6)
    assert lrs == [[0.01, 0.5]] * 6


def test_a_run_goes_on_with_its_learning_rates():
    whole = optimizer_with("cosine")
    expected = learning_rates(whole, recommended_scheduler(whole, 9), 9)
    first = optimizer_with("cosine")
    scheduler = recommended_scheduler(first, 9)
    learning_rates(first, scheduler, 4)
    saved = first.state_dict(), scheduler.state_dict()
    second = optimizer_with("cosine")
    going_on = recommended_scheduler(second, 9)
    second.load_state_dict(saved[0])
    going_on.load_state_dict(saved[1])
    assert learning_rates(second, going_on, 5) == expected[4:]


def test_it_is_the_schedule_of_the_bundled_weights():
    optimizer = VariationalHyperAdam([torch.nn.Parameter(torch.ones(2))])
    lrs = learning_rates(optimizer, recommended_scheduler(optimizer, 2), 2)
    assert optimizer.weights.schedule == load_weights("default").schedule
    factor = lr_factor(1, schedule=optimizer.weights.schedule, total_steps=2)
    assert lrs[1][0] == pytest.approx(factor * optimizer.weights.lr)


@pytest.mark.parametrize("steps", [0, -1, 2.5, None])
def test_impossible_lengths_are_refused(steps):
    with pytest.raises(ConfigError, match="total_steps must be a whole number above 0"):
        recommended_scheduler(optimizer_with("cosine"), steps)


def test_other_optimizers_have_none():
    with pytest.raises(TypeError, match="Adam has no weights"):
        recommended_scheduler(torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]), 5)


def test_unknown_schedules_are_no_weights():
    with pytest.raises(WeightsError, match=r"unknown schedule 'cosin'.*did you mean 'cosine'"):
        optimizer_with("cosin")
    assert "recommended_scheduler" in hyperadam.__all__


def test_a_wrapped_optimizer():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups
            self.defaults = optimizer.defaults

        def step(self, closure=None):
            return self.optimizer.step(closure)

    own, wrapped = optimizer_with("cosine"), optimizer_with("cosine")
    expected = learning_rates(own, recommended_scheduler(own, 4), 6)
    outer = Wrapper(Wrapper(wrapped))
    assert learning_rates(outer, recommended_scheduler(outer, 4), 6) == expected
    with pytest.raises(TypeError, match="SGD has no weights"):
        recommended_scheduler(Wrapper(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])), 4)
