"""A report's section on ablations: what the rule loses with each of its parts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from hyperadam.evaluation import look
from hyperadam.evaluation.document import Block, Cell, Code, Heading, Paragraph, Table, say
from hyperadam.evaluation.metrics import geometric
from hyperadam.evaluation.series import MEASURES, Group, Series
from hyperadam.evaluation.suites import ABLATIONS

SUITE = "ablations"
RULE = "variational-hyperadam"
FULL = "full"

_USES = {
    "-mean": "the full rule, without noise",
    "-isotropic": "the full rule, with even noise",
    "-uncalibrated": "the full rule, its lr not lowered where gradients swing",
}
"""Of the full rule's weights, other than sampled updates; as optimizers' names end."""


def ablated(series: Series) -> str:
    """What a series of the suite lacks, in words; empty where it is none of its variants."""
    name, _, weights = series.optimizer.partition("@")
    if name == RULE:
        return ABLATIONS.get(weights, "")
    return _USES.get(name.removeprefix(RULE), "") if weights == FULL else ""


def ablation_blocks(group: Group, key: str) -> Iterator[Block]:
    """The section on the suite ``ablations``; nothing where the full rule is missing.

    Args:
        group: whose runs.
        key: how anchors begin.
    """
    variants = {series: words for series in group.main_series if (words := ablated(series))}
    full = next((series for series in variants if series.optimizer == f"{RULE}@{FULL}"), None)
    if SUITE not in group.suites or full is None or len(variants) == 1:
        return
    yield Heading(3, say("What each part is worth"), f"{key}-ablations")
    yield Paragraph(
        say(
            "Each variant takes one part away from the rule or from its meta-training, and was "
            "otherwise meta-trained as {} was, which has all of them; the last ones use its "
            "weights in another way. Here each is compared with it, in pairs of runs of the same "
            "task and seed: geometric means of the ratios of their losses. Above 1× the part that "
            "is missing was worth something, at this length of meta-training.",
            Code(full.label),
        )
    )
    rows = []
    for series, words in variants.items():
        if series != full:
            short = series.optimizer.removeprefix(RULE)
            rows.append((short, (Cell(words), *_cells(group, full, series))))
    yield Table(
        (
            ("variant", ""), ("what it is", ""), ("final loss", "over the full rule's"),
            ("new batches", "before the update"), ("validation", "loss"), ("lower in", "runs"),
        ),
        tuple(rows),
        say("Losses of each variant over those of {}", Code(full.label)),
    )  # fmt: skip


def _cells(group: Group, full: Series, series: Series) -> Iterator[Cell]:
    tasks = [t for t in group.tasks if {(t, full), (t, series)} <= group.entries.keys()]
    logs = {
        measure: np.concatenate(
            [
                np.empty(0),
                *(
                    group.entries[task, series].paired_logs(group.entries[task, full], measure)
                    for task in tasks
                ),
            ]
        )
        for measure in MEASURES
    }
    for measure in MEASURES:
        kept = logs[measure][np.isfinite(logs[measure])]
        ratio = geometric(lambda values: float(values.mean()), kept) if len(kept) else math.nan
        lost = len(logs[measure]) - len(kept)
        yield (
            look.MISSING
            if math.isnan(ratio)
            else Cell(
                look.ratio(ratio), tint=look.tint(ratio), small=f"{lost} not finite" if lost else ""
            )
        )
    after = logs["losses"]
    yield Cell(f"{int((after < 0).sum())} of {len(after)}")
