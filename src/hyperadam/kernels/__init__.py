"""Programs that compute a rule's step, behind one signature."""

from hyperadam.kernels.dispatch import (
    BACKENDS,
    Backend,
    StepFunction,
    choose_backend,
    step_function,
    tiled_rule,
)
from hyperadam.kernels.tiled import Lanes, TiledRule, TiledState
from hyperadam.kernels.tiles import TILE, Part, TileLayout, lay_out

__all__ = [
    "BACKENDS",
    "TILE",
    "Backend",
    "Lanes",
    "Part",
    "StepFunction",
    "TileLayout",
    "TiledRule",
    "TiledState",
    "choose_backend",
    "lay_out",
    "step_function",
    "tiled_rule",
]
