"""Programs that compute a rule's step, behind one signature."""

from hyperadam.kernels.differentiable import Carry, DifferentiableRule, ReferenceRule, RuleUnroll
from hyperadam.kernels.dispatch import (
    BACKENDS,
    Backend,
    choose_backend,
    differentiable_rule,
    tiled_rule,
)
from hyperadam.kernels.tiled import Lanes, TiledRule, TiledState, is_finite
from hyperadam.kernels.tiles import TILE, Part, TileLayout, lay_out

__all__ = [
    "BACKENDS",
    "TILE",
    "Backend",
    "Carry",
    "DifferentiableRule",
    "Lanes",
    "Part",
    "ReferenceRule",
    "RuleUnroll",
    "TileLayout",
    "TiledRule",
    "TiledState",
    "choose_backend",
    "differentiable_rule",
    "is_finite",
    "lay_out",
    "tiled_rule",
]
