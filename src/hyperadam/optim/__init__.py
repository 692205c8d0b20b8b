"""The rules as torch optimizers."""

from hyperadam.errors import ConfigError, unknown_name
from hyperadam.optim.ancestors import DMoptimizer, HyperAdam, LearnedBaseline, RNNprop
from hyperadam.optim.by_layer import AdamByLayer
from hyperadam.optim.isotropic import IsotropicNoise
from hyperadam.optim.learned_optimizer import LearnedOptimizer
from hyperadam.optim.recommended import recommended_scheduler
from hyperadam.optim.variational_hyperadam import VariationalHyperAdam

OPTIMIZERS: dict[str, type[VariationalHyperAdam] | type[LearnedBaseline]] = {
    optimizer.rule_name: optimizer
    for optimizer in (VariationalHyperAdam, HyperAdam, RNNprop, DMoptimizer)
}
"""The optimizer that applies each rule, by the rule's name."""


def optimizer_class(rule_name: str) -> type[VariationalHyperAdam] | type[LearnedBaseline]:
    """The optimizer that applies the rule of this name.

    Raises:
        ConfigError: no such rule.
    """
    if rule_name not in OPTIMIZERS:
        raise ConfigError(unknown_name("rule", rule_name, OPTIMIZERS))
    return OPTIMIZERS[rule_name]


__all__ = [
    "OPTIMIZERS",
    "AdamByLayer",
    "DMoptimizer",
    "HyperAdam",
    "IsotropicNoise",
    "LearnedBaseline",
    "LearnedOptimizer",
    "RNNprop",
    "VariationalHyperAdam",
    "optimizer_class",
    "recommended_scheduler",
]
