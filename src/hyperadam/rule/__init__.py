"""The learned update rules: pure functions of theta, state and gradient. Torch only."""

from hyperadam.rule.ancestors import DMoptimizerRule, HyperAdamRule, RNNpropRule
from hyperadam.rule.noise import (
    MAX_SEED,
    round_stochastically,
    rounding_words,
    standard_normal,
)
from hyperadam.rule.normalize import ColumnNorm, Reduce, unit_columns
from hyperadam.rule.rule import (
    BY_LAYER,
    AdamCandidatesRule,
    Explanation,
    Rule,
    RuleState,
    Theta,
    UpdateDistribution,
    VariationalHyperAdamRule,
    cat_states,
)

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (VariationalHyperAdamRule, HyperAdamRule, RNNpropRule, DMoptimizerRule)
}

__all__ = [
    "BY_LAYER",
    "MAX_SEED",
    "RULES",
    "AdamCandidatesRule",
    "ColumnNorm",
    "DMoptimizerRule",
    "Explanation",
    "HyperAdamRule",
    "RNNpropRule",
    "Reduce",
    "Rule",
    "RuleState",
    "Theta",
    "UpdateDistribution",
    "VariationalHyperAdamRule",
    "cat_states",
    "round_stochastically",
    "rounding_words",
    "standard_normal",
    "unit_columns",
]
