"""Inner runs of a rule whose learning rate is calibrated."""

import dataclasses

import pytest
import torch

from hyperadam import VariationalHyperAdam
from hyperadam.errors import ConfigError
from hyperadam.metatrain import MetaTrainer
from hyperadam.presets import preset
from hyperadam.rule import coherence, in_rows_with_gradient
from hyperadam.rule.coherence import STEPS
from hyperadam.tasks import derive_seed, make_generator
from hyperadam.weights import Weights

SETTINGS = ["rule.calibrated=true", "unroll_length=20", "trajectory_length=60", "inner_runs=4"]
CONFIG = preset("smoke").with_overrides(SETTINGS)


@pytest.mark.parametrize("task_name", ["digits-mlp1-tanh", "digits-cnn2-dropout"])
@pytest.mark.parametrize("decays", ["[0.95]", "[0.5, 0.9, 0.99]"])
def test_an_inner_run_is_what_the_optimizer_does(task_name, decays, monkeypatch):
    """But for the rounding of a running product in place of a power."""
    # As if all gradients swung.
    monkeypatch.setattr(coherence, "independent_coherence", lambda decays: 1.0)
    plain = [f"rule.moment_decays={decays}", "random_scaling=0", "convex_dim=0", "meta_lr=1e-30"]
    config = CONFIG.with_overrides([*plain, f"task={task_name}", "meta_weight_decay=0", "lr=0.01"])
    trainer = MetaTrainer(config)
    (runs,) = trainer.in_flight
    (task,) = runs.group.tasks
    run_seed = derive_seed(config.seed, "inner run", 0)
    initial = task.init_params(make_generator(run_seed, "params"))
    params = {name: value.requires_grad_() for name, value in initial.items()}
    theta = {name: value.detach() for name, value in trainer.theta.items()}
    optimizer = VariationalHyperAdam(
        params.values(),
        weights=Weights(config.rule, theta, lr=config.lr),
        seed=derive_seed(run_seed, "noise"),
    )
    uncalibrated = MetaTrainer(config.with_overrides(["rule.calibrated=false"]))
    silent = False
    for number in range(2):
        trainer.meta_step()
        uncalibrated.meta_step()
        for step in range(20 * number, 20 * (number + 1)):
            optimizer.zero_grad()
            task.loss(params, task.batch(derive_seed(run_seed, "data"), step)).backward()
            silent |= any(not in_rows_with_gradient(p.grad).all() for p in params.values())
            optimizer.step()
    (total,) = runs.carry.coherence_B
    state = optimizer.state[next(iter(params.values()))]
    assert float(state["coherence"]) == pytest.approx(float(total), rel=1e-4)
    moved = torch.cat([param.detach().flatten() for param in params.values()])
    torch.testing.assert_close(runs.carry.params_BN[0], moved, rtol=1e-3, atol=1e-4)
    other = uncalibrated.in_flight[0].carry.params_BN[0]
    assert float((other - moved).abs().max()) > 0.01  # it does something here
    assert silent == (task_name == "digits-cnn2-dropout")  # some rows without a gradient


def test_inner_runs_with_attention_are_not_calibrated():
    settings = ["task=digits-vit", "rule.attention_scale=0.2", "random_scaling=0", "convex_dim=0"]
    config = CONFIG.with_overrides([*settings, "trajectory_length=20", "inner_runs=1"])
    trainer = MetaTrainer(config)
    assert trainer.in_flight[0].carry.coherence_B is None
    uncalibrated = MetaTrainer(config.with_overrides(["rule.calibrated=false"]))
    assert trainer.meta_step() == uncalibrated.meta_step()


@pytest.mark.parametrize("pairs", [0, 2])
@pytest.mark.parametrize("tasks", [1, 2])
def test_each_run_and_copy_has_its_own(tasks, pairs):
    trainer = MetaTrainer(
        CONFIG.with_overrides([f"tasks_per_step={tasks}", f"perturbations={pairs}"])
    )
    trainer.meta_step()
    total_B = trainer.in_flight[0].carry.coherence_B
    assert len(total_B) == tasks * max(1, 2 * pairs)
    assert bool((total_B > 0).all())
    assert bool((total_B < STEPS - 1).all())
    assert len(set(total_B.tolist())) == len(total_B)
    trainer.meta_step()
    assert torch.equal(trainer.in_flight[0].carry.coherence_B, total_B)


@pytest.mark.parametrize("pairs", [0, 2])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_it_is_part_of_the_state(at, pairs):
    config = CONFIG.with_overrides(["interleaved_runs=2", f"perturbations={pairs}"])
    undisturbed, resumed = MetaTrainer(config), MetaTrainer(config)
    for _ in range(at):
        undisturbed.meta_step()
    resumed.load_state({name: value.clone() for name, value in undisturbed.state().items()})
    while not undisturbed.finished:
        assert undisturbed.meta_step() == resumed.meta_step()
    assert resumed.finished


def test_a_state_without_it_is_refused():
    plain = MetaTrainer(CONFIG.with_overrides(["rule.calibrated=false"]))
    plain.meta_step()
    assert not any("coherence" in name for name in plain.state())
    with pytest.raises(KeyError):
        MetaTrainer(CONFIG).load_state(plain.state())


def test_the_first_steps_are_in_one_unroll():
    with pytest.raises(ConfigError, match="unroll_length must be at least 20 with a rule that is"):
        CONFIG.with_overrides(["unroll_length=10"])


def test_weights_to_begin_with_may_be_without():
    rule = dataclasses.replace(preset("broad-lite").rule, calibrated=True)
    config = dataclasses.replace(CONFIG, init="lite", rule=rule)
    assert MetaTrainer(config).theta
