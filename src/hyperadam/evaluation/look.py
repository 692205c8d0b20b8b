"""How a report says and shows things: numbers, names, colours, tables of tasks and optimizers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from hyperadam.evaluation import plots
from hyperadam.evaluation.document import Cell, Table, Text
from hyperadam.evaluation.series import REFERENCE, Group, Series

MISSING = Cell("—")
TINTS = ((1.05, 1), (1.25, 2), (2.0, 3))
"""From which ratio to the reference a cell is tinted, and how strongly; likewise below 1."""


def significant(value: float, digits: int = 3) -> int:
    """Decimals that show so many digits of a positive number."""
    return max(0, digits - 1 - math.floor(math.log10(value)))


def number(mean: float, half: float = math.nan) -> str:
    """A figure with half of its interval, to the same decimals."""
    if not math.isfinite(mean):
        return "diverged"
    scale = max(abs(mean), half if math.isfinite(half) else 0.0)
    if scale and not 1e-3 <= scale < 1e4:
        text = f"{mean:.2e}"
        return f"{text} ± {half:.0e}" if math.isfinite(half) else text
    decimals = min(5, significant(scale)) if scale else 3
    text = f"{mean:.{decimals}f}"
    return f"{text} ± {half:.{decimals}f}" if math.isfinite(half) else text


def percent(mean: float, half: float = math.nan) -> str:
    text = f"{100 * mean:.1f}"
    return f"{text} ± {100 * half:.1f} %" if math.isfinite(half) else f"{text} %"


def ratio(value: float) -> str:
    if not math.isfinite(value):
        return "diverges"
    return f"{value:.2f}×" if 0.01 <= value < 10 else f"{value:.3g}×"


def seconds(value: float) -> str:
    if value >= 120:
        return f"{value / 60:.1f} min"
    return f"{value:.2g} s" if value < 9.95 else f"{value:.0f} s"


def version(source: str) -> str:
    """A commit by its first digits; other words as they are."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", source)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


def join(parts: Sequence[str]) -> str:
    return ", ".join(parts)


def tint(ratio: float) -> int:
    if math.isnan(ratio):
        return 0
    strength = sum(max(ratio, 1 / ratio if ratio else math.inf) >= start for start, _ in TINTS)
    return strength if ratio > 1 else -strength


class Lines:
    """Which optimizers are in colour, the same ones in all plots of a report."""

    def __init__(self, groups: Sequence[Group]) -> None:
        wins: Counter[str] = Counter()
        learned: dict[str, bool] = {}
        for group in groups:
            for series in group.contenders:
                learned.setdefault(series.name, series.learned)
            for task in group.tasks:
                ranked = sorted(
                    (entry.score, series.name)
                    for series in group.contenders
                    if (entry := group.entries.get((task, series)))
                )
                for place, (_, name) in enumerate(ranked):
                    wins[name] += len(ranked) - place
        ours = [name for name in learned if learned[name]]
        rest = sorted(
            (name for name in learned if not learned[name] and name != REFERENCE),
            key=lambda name: (-wins[name], name),
        )
        # Adam has its colour in every report, and the first learned one has its own; the best of
        # those by hand always has one.
        names = [*ours[:1], REFERENCE, *rest[:1], *ours[1:], *rest[1:]]
        if not ours:
            names = ["", *names]
        self._colors = dict(zip(names, plots.COLORS, strict=False))

    def line(self, group: Group, series: Series) -> plots.Line:
        """How a series is drawn."""
        color = self._colors.get(series.name)
        if color is None:
            return plots.Line(series.label, background=True)
        return plots.Line(series.label, color, dashed=series != group.main(series.name))

    def drawn(self, group: Group) -> list[tuple[Series, plots.Line]]:
        """Contenders with their lines: one track each, and every track of a learned one."""
        contenders = group.contenders
        return [
            (series, self.line(group, series))
            for series in group.series
            if series in contenders or (series.learned and series.name in self._colors)
        ]


def matrix(
    group: Group,
    cell: Callable[[str, Series], Cell],
    caption: Text,
    *,
    tasks: Sequence[str] | None = None,
    folded: bool = False,
) -> Table:
    return Table(
        (("task", ""), *((one.name, one.track) for one in group.series)),
        tuple(
            (task, tuple(cell(task, one) for one in group.series))
            for task in (group.tasks if tasks is None else tasks)
        ),
        caption,
        folded,
    )


def usual_seeds(group: Group) -> int:
    counts = Counter(len(entry.runs) for entry in group.entries.values())
    return max(counts, key=lambda count: (counts[count], count))


def is_best(
    value: float, values: Sequence[float], best: Callable[[Sequence[float]], float]
) -> bool:
    """Whether a value is the best of several; one alone is not."""
    return len(values) > 1 and value == best(values)
