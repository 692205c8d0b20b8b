"""Meta-training recipes by name."""

from __future__ import annotations

from hyperadam.errors import ConfigError, unknown_name
from hyperadam.metatrain.config import MetaTrainConfig
from hyperadam.rule import VariationalHyperAdamRule

PRESETS: dict[str, MetaTrainConfig] = {
    # As published: 10,000 inner runs of 100 steps, 50,000 meta-steps.
    "paper": MetaTrainConfig(),
    # The paper's recipe on a data set that comes with the package, at a tenth of the length.
    "digits": MetaTrainConfig(task="digits-mlp1-sigmoid", inner_runs=1000),
    # The bundled weights': departs from the paper where that makes meta-training stable and fast.
    "digits-stable": MetaTrainConfig(
        task="digits-mlp1-sigmoid",
        rule=VariationalHyperAdamRule(column_norm="rms", candidate_bound=5.0),
        trajectory_length=400,
        inner_runs=60,
        kl_weight=1e-6,
        meta_lr=1e-3,
        meta_weight_decay=0.0,
        meta_grad_clip=1.0,
    ),
    # Seconds: for tests and for trying out the command.
    "smoke": MetaTrainConfig(
        task="digits-mlp1-sigmoid",
        rule=VariationalHyperAdamRule(channels=4),
        unroll_length=5,
        trajectory_length=10,
        inner_runs=10,
    ),
}


def preset(name: str) -> MetaTrainConfig:
    """The preset of this name.

    Raises:
        ConfigError: no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, PRESETS))
    return PRESETS[name]
