"""The learned update rules: pure functions of theta, state and gradient. Torch only."""

from hyperadam.rule.ancestors import DMoptimizerRule, HyperAdamRule, RNNpropRule
from hyperadam.rule.attention import attention_projections
from hyperadam.rule.coherence import (
    calibrated_lr_scale,
    coherence_sums,
    in_rows_with_gradient,
    mean_coherence,
)
from hyperadam.rule.noise import (
    MAX_SEED,
    round_stochastically,
    rounding_words,
    standard_normal,
)
from hyperadam.rule.normalize import ColumnNorm, Reduce, unit_columns
from hyperadam.rule.rule import (
    APART_FROM_THETA,
    BY_LAYER,
    SCALAR_FIELDS,
    SIZES,
    VARIANCE,
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
    "APART_FROM_THETA",
    "BY_LAYER",
    "MAX_SEED",
    "RULES",
    "SCALAR_FIELDS",
    "SIZES",
    "VARIANCE",
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
    "attention_projections",
    "calibrated_lr_scale",
    "cat_states",
    "coherence_sums",
    "in_rows_with_gradient",
    "mean_coherence",
    "round_stochastically",
    "rounding_words",
    "standard_normal",
    "unit_columns",
]
