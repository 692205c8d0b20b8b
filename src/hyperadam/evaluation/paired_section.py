"""One set of weights used in several ways: what is the predicted variance worth?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from hyperadam.evaluation.document import (
    Block,
    Cell,
    Code,
    Heading,
    Paragraph,
    Table,
    say,
)
from hyperadam.evaluation.metrics import median_task_interval
from hyperadam.evaluation.series import Entry, Group, Series


def paired_blocks(group: Group, key: str) -> Iterator[Block]:
    """The section on series that share their weights; nothing where no two do.

    Args:
        group: whose runs.
        key: how anchors begin.
    """
    tables = [_table(group, family) for family in group.families]
    if not tables:
        return
    yield Heading(3, say("The same weights, used in several ways"), f"{key}-paired")
    yield Paragraph(
        say(
            "Of a learned update that is drawn at random, one may also take the mean, or spread "
            "the noise evenly over all parameters ({}). Such runs have the weights, the initial "
            "parameters and the order of the data in common, so they are compared in pairs, seed "
            "by seed: each figure is the geometric mean of the ratios of final losses. Where "
            "its interval leaves out 1× it is bold. This is the test of whether the predicted "
            "variance is worth anything.",
            Code("-isotropic"),
        )
    )
    yield from tables


def _differences(base: Entry, other: Entry) -> tuple[np.ndarray, int]:
    """Log ratios of final losses by seed, and how many pairs are left out, as one diverged."""
    logs = other.paired_logs(base)
    kept = logs[np.isfinite(logs)]
    return kept, len(logs) - len(kept)


def _cell(differences_KS: list[np.ndarray], left_out: int) -> Cell:
    middle = float(np.median([values.mean() for values in differences_KS]))
    low, high = median_task_interval(differences_KS)
    small = [] if math.isnan(low) else [f"{math.exp(low):.2f} to {math.exp(high):.2f}"]
    if left_out:
        small.append(f"{left_out} with a diverged run left out")
    return Cell(f"{math.exp(middle):.2f}×", strong=low > 0 or high < 0, small="; ".join(small))


def _table(group: Group, family: list[Series]) -> Table:
    base, others = family[0], family[1:]
    tasks = [
        task for task in group.tasks if all((task, series) in group.entries for series in family)
    ]
    found = {
        (task, series): _differences(group.entries[task, base], group.entries[task, series])
        for task in tasks
        for series in others
    }

    def cell(series: Series, own: list[str]) -> Cell:
        pairs = [found[task, series] for task in own]
        values = [differences for differences, _ in pairs if len(differences)]
        left_out = sum(count for _, count in pairs)
        return _cell(values, left_out) if values else Cell("diverged")

    rows = [(task, tuple(cell(series, [task]) for series in others)) for task in tasks]
    if len(tasks) > 1:
        rows.append(("median task", tuple(cell(series, tasks) for series in others)))
    return Table(
        (("task", ""), *((series.name, f"{series.track}, over {base.name}") for series in others)),
        tuple(rows),
        say(
            "Final loss over that of {} from the same seed: geometric mean and 95% interval",
            Code(base.label),
        ),
    )
