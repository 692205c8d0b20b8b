"""Learning rates on grids of half decades, the same for every optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from hyperadam.evaluation.records import FIRST_TUNING_SEED, Record

START = range(-2, 3)
"""Places of the grid that are always tried: a decade around the default."""

FARTHEST = 8
"""Places from the default at which extending ends: four decades."""


def grid_lr(default: float, place: int) -> float:
    """The grid's learning rate at a place: the default times 1, 3, 10, 30, ... or 0.3, 0.1, ..."""
    decades, half = divmod(place, 2)
    return float(f"{default * 10.0**decades * (3 if half else 1):.6g}")


def places_and_lrs(default: float) -> list[tuple[int, float]]:
    """All places that a grid may come to, with their learning rates."""
    return [(place, grid_lr(default, place)) for place in range(-FARTHEST, FARTHEST + 1)]


def more_places(losses: Mapping[int, float]) -> list[int]:
    """Places of the grid to try next; empty when the best is inside of it.

    Args:
        losses: mean final loss by place; NaN counts as infinite.
    """
    missing = [place for place in START if place not in losses]
    if missing:
        return missing
    best = best_place(losses)
    low, high = min(losses), max(losses)
    if best == low and low > -FARTHEST:
        return [low - 1]
    if best == high and high < FARTHEST:
        return [high + 1]
    return []


def best_place(losses: Mapping[int, float]) -> int:
    """The place of the least loss; of equal ones the smaller learning rate's."""

    def order(place: int) -> tuple[float, int]:
        loss = losses[place]
        return (math.inf if math.isnan(loss) else loss), place

    return min(losses, key=order)


def tune(default: float, loss: Callable[[float], float]) -> float:
    """The best learning rate of the grid.

    Args:
        default: around which the grid lies.
        loss: mean final loss at a learning rate.
    """
    losses: dict[int, float] = {}
    while places := more_places(losses):
        losses |= {place: loss(grid_lr(default, place)) for place in places}
    return grid_lr(default, best_place(losses))


def tuning_losses(records: Iterable[Record]) -> dict[float, float]:
    """Mean final loss over tuning seeds, by learning rate.

    Args:
        records: of one task, optimizer, number of steps and schedule; others than tuning runs
            are left out, and so are learning rates with fewer seeds than others have: where a
            grid was begun with fewer, its means are not comparable.
    """
    by_lr: dict[float, list[float]] = defaultdict(list)
    for record in records:
        if record.is_tuning:
            by_lr[record.lr].append(record.final_loss)
    most = max(map(len, by_lr.values()), default=0)
    return {lr: sum(losses) / most for lr, losses in sorted(by_lr.items()) if len(losses) == most}


def best_lr(records: Iterable[Record]) -> float | None:
    """The learning rate of the least mean final loss over tuning seeds; None without such runs.

    Args:
        records: see :func:`tuning_losses`.
    """
    losses = tuning_losses(records)
    order = dict(enumerate(losses))
    return order[best_place(dict(enumerate(losses.values())))] if losses else None


def tuning_seeds(count: int) -> range:
    """The first seeds that are for tuning."""
    return range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + count)
