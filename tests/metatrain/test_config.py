from __future__ import annotations

import json

import pytest
import torch

from hyperadam.errors import ConfigError
from hyperadam.metatrain import MetaTrainConfig, MetaTrainer
from hyperadam.presets import PRESETS, preset
from hyperadam.rule import RULES, RNNpropRule, VariationalHyperAdamRule


def test_the_paper_preset_is_the_papers_recipe():
    paper = preset("paper")
    assert paper.to_dict() == {
        "task": "mnist-mlp1-sigmoid",
        "random_scaling": 3.0,
        "convex_dim": 20,
        "convex_scaling": 1.0,
        "rule": VariationalHyperAdamRule().to_dict(),
        "init": None,
        "meta_parameters": "*",
        "unroll_length": 20,
        "trajectory_length": 100,
        "min_trajectory_length": None,
        "min_random_scaling": None,
        "meta_schedule": "constant",
        "inner_runs": 10_000,
        "tasks_per_step": 1,
        "interleaved_runs": 1,
        "lr": 1e-3,
        "schedule": "none",
        "meta_objective": "loss",
        "next_batch_weight": 0.0,
        "perturbations": 0,
        "perturbation_scale": 0.01,
        "kl_weight": 1e-4,
        "meta_lr": 1e-4,
        "meta_weight_decay": 5e-4,
        "meta_grad_clip": None,
        "seed": 0,
        "backend": "auto",
        "device": "cpu",
    }
    assert paper.total_meta_steps == 50_000
    assert paper.total_meta_steps * paper.unroll_length == 10**6


def test_meta_steps_are_shared_by_the_tasks_of_a_step():
    config = preset("paper").with_overrides(["tasks_per_step=8"])
    assert config.total_meta_steps == 50_000 // 8


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name):
    config = PRESETS[name]
    assert MetaTrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def difference(config, other):
    """Settings of a configuration that are not another's, the rule's by ``rule.NAME``."""

    def flat(values):
        rule = {f"rule.{name}": value for name, value in values["rule"].items()}
        return values | rule | {"rule": None}

    ours, theirs = flat(config.to_dict()), flat(other.to_dict())
    return {name: value for name, value in ours.items() if theirs.get(name) != value}


def test_an_ablation_differs_from_the_full_recipe_in_one_thing():
    full = preset("ablation-full")
    assert full == preset("digits-stable")
    by_reference = {"backend": "reference"}  # no kernel serves them
    assert {
        name.removeprefix("ablation-"): difference(config, full)
        for name, config in PRESETS.items()
        if name.startswith("ablation-")
    } == {
        "full": {},
        "no-lstm": {"rule.lstm": False} | by_reference,
        "no-preprocessing": {"rule.preprocessing": False} | by_reference,
        "no-random-scaling": {"random_scaling": 0.0},
        "no-convex": {"convex_dim": 0},
        "candidates-1": {"rule.channels": 1},
        "candidates-5": {"rule.channels": 5},
        "candidates-10": {"rule.channels": 10},
        "no-varblock": {"rule.var_block": False},
    }


def test_the_learned_baselines_have_the_papers_recipe():
    for name in ("hyperadam", "rnnprop", "dmoptimizer"):
        config = preset(f"paper-{name}")
        assert config.rule == RULES[name]()
        changed = {key for key in difference(config, preset("paper")) if "rule." not in key}
        assert changed == {"backend"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"paper", "digits", "smoke"}))
def test_every_preset_trains(name):
    """One unroll of two inner runs side by side; what of theta is trained moves, nothing warns."""
    short = ["task=digits-mlp1-sigmoid", "unroll_length=3", "trajectory_length=3", "inner_runs=2"]
    short.append("min_trajectory_length=null")
    trainer = MetaTrainer(preset(name).with_overrides([*short, "tasks_per_step=2"]))
    before = {key: value.detach().clone() for key, value in trainer.theta.items()}
    record = trainer.meta_step()
    assert record.applied
    assert record.grad_norm > 0
    assert (record.kl != 0) == trainer.config.rule.has_variance
    moved = {key for key, value in trainer.theta.items() if not torch.equal(value, before[key])}
    assert moved == set(trainer.config.trained_parameters)


def test_overrides():
    config = preset("paper").with_overrides(
        [
            "lr=0.5",
            "seed=3",
            "task=digits-mlp2-relu",
            "meta_grad_clip=1",
            "rule.channels=8",
            "rule.moment_decays=[0.9,0.99]",
            "rule.candidate_bound=5",
        ]
    )
    assert (config.lr, config.seed, config.task, config.meta_grad_clip) == (
        0.5, 3, "digits-mlp2-relu", 1.0,
    )  # fmt: skip
    assert config.rule == VariationalHyperAdamRule(
        channels=8, moment_decays=(0.9, 0.99), candidate_bound=5.0
    )
    assert config.with_overrides(["meta_grad_clip=null"]).meta_grad_clip is None
    other = preset("paper").with_overrides(["rule=rnnprop", "rule.channels=8"])
    assert other.rule == RNNpropRule(channels=8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr", "given as key=value"),
        ("learning_rate=1", "unknown setting 'learning_rate'"),
        ("meta_lrr=1", "did you mean 'meta_lr'"),
        ("rule.chanels=4", "did you mean 'channels'"),
        ("rule=adam", "unknown rule 'adam'"),
        ("rule=[1]", "unknown rule"),
        ('rule={"a":1}', "unknown rule"),
        ("seed=" + "[" * 100_000, "valid integer"),
        ("seed=" + "9" * 5_000, "as an integer"),
        ("seed=99999999999999999999", "seed must be"),
        ("rule.channels=100000000", "channels must be an integer, at least 1 and at most 1024"),
        ("rule.state_layers=99", "state_layers must be"),
        ("rule.moment_decays=0.9", "moment_decays"),
        ("convex_dim=100000000000000", "convex_dim must be"),
        ("task=mnist", "unknown task 'mnist'"),
        ("task=", "unknown task ''"),
        ("lr=fast", "valid number"),
        ("lr=-1", "lr must be a positive number; got -1.0"),
        ("lr=NaN", "lr must be a positive number"),
        ("meta_lr=0", "meta_lr must be"),
        ("kl_weight=-1", "kl_weight must be"),
        ("unroll_length=0", "unroll_length must be at least 1"),
        ("trajectory_length=30", "multiple of unroll_length, 20"),
        ("min_trajectory_length=30", "min_trajectory_length must be a multiple of unroll"),
        ("min_trajectory_length=120", "up to trajectory_length; got 120"),
        ("min_trajectory_length=0", "min_trajectory_length must be"),
        ("min_random_scaling=4", "min_random_scaling must be from 0 to random_scaling"),
        ("min_random_scaling=NaN", "min_random_scaling must be"),
        ("meta_schedule=linear", "unknown meta_schedule 'linear'"),
        ("schedule=cosin", "unknown schedule 'cosin': did you mean 'cosine'"),
        ("meta_parameters=linear_var.*", "unknown meta-parameter 'linear_var.*': did you mean"),
        ("meta_parameters=lstm1.*,", "unknown meta-parameter ''"),
        ("schedule=none,", "unknown schedule ''"),
        ("meta_objective=log", "unknown meta_objective 'log'"),
        ("next_batch_weight=1.5", "next_batch_weight must be from 0 to 1; got 1.5"),
        ("next_batch_weight=NaN", "next_batch_weight must be from 0 to 1"),
        ("task=digits-mlp1-sigmoid,digit*z", "unknown task 'digit\\*z'"),
        ("inner_runs=0", "inner_runs must be at least 1"),
        ("inner_runs=1.5", "valid integer"),
        ("tasks_per_step=0", "tasks_per_step must be at least 1"),
        ("perturbations=-1", "perturbations must be at least 0"),
        ("perturbation_scale=0", "perturbation_scale must be a positive number"),
        ("interleaved_runs=0", "interleaved_runs must be at least 1"),
        ("tasks_per_step=3", "inner_runs must be a multiple of tasks_per_step, 3; got 10000"),
        ("convex_dim=-1", "convex_dim must be at least 0"),
        ("meta_grad_clip=0", "meta_grad_clip must be"),
        ("seed=-1", "seed must be"),
        ("device=gpu", "device must be cpu, cuda or cuda:N; got gpu"),
        ("device=cuda:x", "device must be"),
        ("rule.channels=0", "channels must be an integer, at least 1"),
        ("rule.column_norm=max", "euclidean"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError, match=message):
        preset("paper").with_overrides([override])


def test_a_rule_that_is_no_table():
    with pytest.raises(ConfigError, match="rule must be a table"):
        MetaTrainConfig.from_dict({"rule": "hyperadam"})


def test_patterns_of_tasks_are_written_out():
    config = MetaTrainConfig(task="digits-mlp6-s*,digits-mlp1-[rt]*")
    assert sorted(config.task_names) == [
        "digits-mlp1-relu",
        "digits-mlp1-tanh",
        "digits-mlp6-sigmoid",
    ]
    assert config.task == ",".join(config.task_names)
    assert MetaTrainConfig.from_dict(config.to_dict()) == config


def test_unknown_preset():
    with pytest.raises(ConfigError, match="unknown preset 'papper': did you mean 'paper'"):
        preset("papper")
