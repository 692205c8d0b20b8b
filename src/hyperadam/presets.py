"""Meta-training recipes by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from hyperadam.errors import ConfigError, unknown_name
from hyperadam.metatrain.config import MetaTrainConfig
from hyperadam.rule import (
    DMoptimizerRule,
    HyperAdamRule,
    RNNpropRule,
    Rule,
    VariationalHyperAdamRule,
)

# Departs from the paper where that makes meta-training stable and fast.
_STABLE = MetaTrainConfig(
    task="digits-mlp1-sigmoid",
    rule=VariationalHyperAdamRule(column_norm="rms", candidate_bound=5.0),
    trajectory_length=400,
    inner_runs=60,
    kl_weight=1e-6,
    meta_lr=1e-3,
    meta_weight_decay=0.0,
    meta_grad_clip=1.0,
)

_BROAD_RULE = VariationalHyperAdamRule(
    column_norm="rms",
    candidate_bound=5.0,
    fan_in_base=16.0,
    row_mean_base=1.0,
    vector_scale=0.3,
    attention_scale=0.2,
    moment_decays=(0.5, 0.9, 0.99, 0.999),
)

# For weights to bundle: many small tasks, none of them reported; runs of all lengths up to 2,000
# steps, at constant and falling learning rates; losses on the batch of an update and on the next.
_BROAD = dataclasses.replace(
    _STABLE,
    task="mnist8-*,mnist28-*,clutter16-*,autoregressive-*,unicode-names-*",
    rule=_BROAD_RULE,
    min_random_scaling=0.0,
    min_trajectory_length=100,
    trajectory_length=2000,
    inner_runs=1000,
    schedule="inverse-sqrt,none,cosine",
    kl_weight=1e-7,
    meta_schedule="cosine",
    meta_objective="log-loss",
    next_batch_weight=0.5,
)

_BROAD_LITE = dataclasses.replace(
    _BROAD,
    rule=dataclasses.replace(_BROAD_RULE, channels=7, moment_decays=(0.5, 0.9, 0.99)),
)


def _evolution(recipe: MetaTrainConfig, **settings: Any) -> MetaTrainConfig:
    """To go on with weights (``init``) by what an update does to the rest of a run."""
    return dataclasses.replace(
        recipe,
        random_scaling=1.0,
        interleaved_runs=16,
        perturbations=4,
        perturbation_scale=0.02,
        meta_lr=3e-4,
        **settings,
    )


def _baselines() -> dict[str, MetaTrainConfig]:
    """The paper's recipe for the rules that Variational HyperAdam descends from.

    No kernel serves them: the reference is named, so that nothing warns of it.
    """
    rules: tuple[Rule, ...] = (HyperAdamRule(), RNNpropRule(), DMoptimizerRule())
    return {f"paper-{rule.name}": MetaTrainConfig(rule=rule, backend="reference") for rule in rules}


def _ablations() -> dict[str, MetaTrainConfig]:
    """The recipe of ``digits-stable``, each with one thing taken away."""

    def without(backend: str = "auto", **settings: Any) -> MetaTrainConfig:
        rule = dataclasses.replace(_STABLE.rule, **settings)
        return dataclasses.replace(_STABLE, rule=rule, backend=backend)

    return {
        "ablation-full": _STABLE,
        "ablation-no-lstm": without("reference", lstm=False),
        "ablation-no-preprocessing": without("reference", preprocessing=False),
        "ablation-no-random-scaling": dataclasses.replace(_STABLE, random_scaling=0.0),
        "ablation-no-convex": dataclasses.replace(_STABLE, convex_dim=0),
        **{
            f"ablation-candidates-{channels}": without(channels=channels) for channels in (1, 5, 10)
        },
        "ablation-no-varblock": without(var_block=False),
    }


PRESETS: dict[str, MetaTrainConfig] = {
    # As published: 10,000 inner runs of 100 steps, 50,000 meta-steps.
    "paper": MetaTrainConfig(),
    # The paper's recipe on a data set that comes with the package, at a tenth of the length.
    "digits": MetaTrainConfig(task="digits-mlp1-sigmoid", inner_runs=1000),
    "digits-stable": _STABLE,
    "broad": _BROAD,
    # 192 bytes of state a parameter in place of the 512 of `broad`.
    "broad-lite": _BROAD_LITE,
    "broad-evolution": _evolution(_BROAD, inner_runs=230),
    "broad-lite-evolution": _evolution(_BROAD_LITE, inner_runs=250, next_batch_weight=0.75),
    # The VarBlock alone, of weights (`init`) whose mean stays as it is.
    "broad-variance": dataclasses.replace(
        _BROAD,
        rule=dataclasses.replace(
            _BROAD_RULE, variance_base=0.001, variance_floor=0.01, kl_prior_scale=100.0
        ),
        meta_parameters="linear_var1.*",
        random_scaling=1.0,
        interleaved_runs=16,
        inner_runs=40,
        kl_weight=4e-6,
        meta_lr=0.03,
    ),
    # Seconds: for tests and for trying out the command.
    "smoke": MetaTrainConfig(
        task="digits-mlp1-sigmoid",
        rule=VariationalHyperAdamRule(channels=4),
        unroll_length=5,
        trajectory_length=10,
        inner_runs=10,
    ),
    **_baselines(),
    **_ablations(),
}


def preset(name: str) -> MetaTrainConfig:
    """The preset of this name.

    Raises:
        ConfigError: no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, PRESETS))
    return PRESETS[name]
