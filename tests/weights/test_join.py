from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from conftest import random_theta
from hyperadam import Weights, load_weights, save_weights
from hyperadam.errors import ConfigError
from hyperadam.rule import HyperAdamRule, RNNpropRule, VariationalHyperAdamRule
from hyperadam.weights import join_weights


def weights_of(rule, seed=0, **notes):
    theta = random_theta(rule, torch.float64, seed)
    return Weights(rule=rule, theta=theta, **{"lr": 1e-2, "licence": "mine", **notes})


PAIRS = {
    "variational": (
        VariationalHyperAdamRule(channels=3, moment_decays=(0.5, 0.99), column_norm="rms"),
        VariationalHyperAdamRule(channels=4, moment_decays=(0.9, 0.99), column_norm="rms"),
    ),
    "stacked": (
        VariationalHyperAdamRule(channels=3, state_layers=2, candidate_bound=5.0),
        VariationalHyperAdamRule(channels=2, state_layers=2, candidate_bound=5.0),
    ),
    "without VarBlock and LSTM": (
        VariationalHyperAdamRule(channels=3, var_block=False, lstm=False),
        VariationalHyperAdamRule(channels=2, var_block=False, lstm=False),
    ),
    "hyperadam": (HyperAdamRule(channels=2), HyperAdamRule(channels=3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_its_mean_is_the_sum(name):
    both = [weights_of(rule, seed) for seed, rule in enumerate(PAIRS[name])]
    all_ = [*both, join_weights(*both)]
    states = [weights.rule.init_state(50, dtype=torch.float64) for weights in all_]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        grad = torch.randn(50, dtype=torch.float64, generator=generator)
        steps = [w.rule.step(w.theta, s, grad) for w, s in zip(all_, states, strict=True)]
        states = [state for _, state in steps]
        first, second, joint = (update for update, _ in steps)
        assert first.mean_N.abs().max() > 1e-3
        torch.testing.assert_close(joint.mean_N, first.mean_N + second.mean_N)
        if joint.log_var_N is not None:
            geometric = (first.log_var_N + second.log_var_N) / 2
            torch.testing.assert_close(joint.log_var_N, geometric + math.log(2))
        else:
            assert first.log_var_N is None


@pytest.mark.parametrize("calibrated", [False, True])
def test_its_calibration_is_the_firsts(calibrated):
    first, second = PAIRS["variational"]
    one = weights_of(dataclasses.replace(first, calibrated=calibrated))
    other = weights_of(dataclasses.replace(second, calibrated=not calibrated), seed=1)
    assert join_weights(one, other).rule.calibrated is calibrated


def test_what_it_says_of_itself(tmp_path):
    first, second = PAIRS["variational"]
    joint = join_weights(
        weights_of(first, preset="one", data="digits", steps=3, date="2026-01-02", commit="a"),
        weights_of(second, preset="two", data="digits", steps=4, date="2026-01-01", commit="b"),
    )
    assert joint.rule == dataclasses.replace(first, channels=7, moment_decays=(0.5, 0.9, 0.99))
    assert (joint.lr, joint.steps, joint.date) == (5e-3, 7, "2026-01-02")
    assert (joint.preset, joint.data) == ("one joined with two", "digits")
    assert (joint.commit, joint.licence) == ("a, b", "mine")
    save_weights(joint, tmp_path / "joint.safetensors")
    assert load_weights(tmp_path / "joint.safetensors").digest() == joint.digest()


@pytest.mark.parametrize(
    ("changes", "notes", "message"),
    [
        ({}, {"lr": 1e-3}, "one lr; got"),
        ({}, {"schedule": "cosine"}, "one schedule; got"),
        ({"column_norm": "euclidean"}, {}, "the same column_norm; got"),
        ({"fan_in_base": 16.0, "vector_scale": 0.5}, {}, "the same fan_in_base, vector_scale; got"),
        ({"preprocessing": False}, {}, "with candidates and preprocessing are joined; got"),
    ],
)
def test_what_does_not_go_together(changes, notes, message):
    first, second = PAIRS["variational"]
    other = weights_of(dataclasses.replace(second, **changes), **notes)
    with pytest.raises(ConfigError, match=message):
        join_weights(weights_of(first), other)


def test_other_rules():
    first = weights_of(PAIRS["variational"][0])
    with pytest.raises(ConfigError, match="the same rule"):
        join_weights(first, weights_of(HyperAdamRule(channels=3)))
    with pytest.raises(ConfigError, match="with candidates"):
        join_weights(first, weights_of(RNNpropRule(channels=3)))
