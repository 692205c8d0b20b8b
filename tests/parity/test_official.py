"""The authors' released weights: imported, they do what the released program does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import GOLDEN
from hyperadam import VariationalHyperAdam, import_official, load_weights, save_weights
from hyperadam.evaluation import train
from hyperadam.rule import VariationalHyperAdamRule
from hyperadam.tasks import make_task
from hyperadam.weights import RELEASED_DIGEST
from parity.textbook import textbook_step


def test_every_number_is_taken_over(official_path, tmp_path):
    weights = import_official(official_path)
    raw = torch.load(official_path, weights_only=True, map_location="cpu")
    assert weights.rule == VariationalHyperAdamRule()
    assert weights.lr == 1e-3
    assert weights.licence == "GPL-3.0"
    assert weights.rule.num_theta() == 5421
    assert weights.digest() == RELEASED_DIGEST
    save_weights(weights, tmp_path / "official.safetensors")
    again = load_weights(tmp_path / "official.safetensors")
    assert set(again.theta) == set(raw)
    for name, value in raw.items():
        assert torch.equal(again.theta[name], value)


def test_updates_are_those_of_the_released_program(official_path):
    """The equations of the program, checked to its golden figures, with its own weights."""
    weights = import_official(official_path)
    theta = {name: value.double() for name, value in weights.theta.items()}
    with np.load(GOLDEN / "variational_hyperadam_trajectory.npz") as file:
        grads, noise = torch.from_numpy(file["grads"]), torch.from_numpy(file["noise"])
    state = weights.rule.init_state(grads.shape[1], dtype=torch.float64)
    twin: dict = {}
    for grad, eps in zip(grads, noise, strict=True):
        update, state = weights.rule.step(theta, state, grad)
        mean, log_var = textbook_step(theta, twin, grad)
        expected = mean + torch.exp(log_var / 2) * eps
        torch.testing.assert_close(update.sample(eps), expected, rtol=1e-10, atol=1e-12)
        # The released VarBlock stands at its prior.
        assert update.log_var_N.abs().max() < 0.005


def test_it_trains_as_the_released_program_does(official_path, data_dir):
    """MNIST MLP, 100 steps, lr 1e-3: the released program ends at 0.234 (mean of 3 seeds)."""
    weights = import_official(official_path)
    task = make_task("mnist-mlp1-sigmoid", data_dir)
    runs = [
        train(task, lambda p: VariationalHyperAdam(p, weights=weights), seed=seed, steps=100)
        for seed in range(3)
    ]
    assert np.mean([run.final_loss for run in runs]) == pytest.approx(0.234, abs=0.02)
