"""Weights: the only bridge from meta-training to use."""

from hyperadam.weights.hub import HubAddress, pin
from hyperadam.weights.join import join_weights
from hyperadam.weights.official import RELEASED_DIGEST, import_official
from hyperadam.weights.publish import push_weights
from hyperadam.weights.store import (
    Weights,
    bundled_weights,
    load_weights,
    rule_from_dict,
    save_weights,
)

__all__ = [
    "RELEASED_DIGEST",
    "HubAddress",
    "Weights",
    "bundled_weights",
    "import_official",
    "join_weights",
    "load_weights",
    "pin",
    "push_weights",
    "rule_from_dict",
    "save_weights",
]
