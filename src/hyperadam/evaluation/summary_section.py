"""A report's section on the whole: each optimizer over all tasks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from hyperadam.evaluation import look, plots
from hyperadam.evaluation.document import (
    Block,
    Cell,
    Code,
    Facts,
    Figures,
    Heading,
    Paragraph,
    Strong,
    Table,
    Text,
    say,
)
from hyperadam.evaluation.metrics import (
    LOSS_FLOOR,
    geometric,
    interquartile_interval,
    interquartile_mean,
    performance_profile,
    performance_ratios,
)
from hyperadam.evaluation.series import MEASURES, Group, Measure, Series

MAX_FACTOR = 100.0


def _interquartile(log_ratios: Sequence[np.ndarray]) -> float:
    """Of ratios over tasks and seeds; NaN without any."""
    return geometric(interquartile_mean, np.concatenate(log_ratios)) if log_ratios else math.nan


@dataclasses.dataclass(frozen=True)
class _Standing:
    """A series over all tasks that can be compared.

    Attributes:
        series: which.
        tasks: on how many it was run.
        ratios: interquartile means of its losses over the reference's, by measure.
        interval: 95%, of the first of them.
        below: on how many tasks its mean over seeds is below the reference's, by measure.
        signs: on how many tasks it ends below, and above, beyond the scatter of seeds.
        common: as ``ratios``, over the tasks that all have; NaN where it does not have them.
    """

    series: Series
    tasks: int
    ratios: tuple[float, ...]
    interval: tuple[float, float]
    below: tuple[int, ...]
    signs: tuple[int, int]
    common: tuple[float, ...]


def _standing(group: Group, series: Series) -> _Standing | None:
    reference = group.reference
    assert reference is not None
    tasks = [task for task in group.compared_tasks if (task, series) in group.entries]
    if not tasks:
        return None
    logs = [group.log_ratios(series, measure) for measure in MEASURES]
    low, high = interquartile_interval(logs[0])
    common = group.common_tasks if set(group.common_tasks) <= set(tasks) else []

    def below(measure: Measure) -> int:
        pairs = [(group.entries[task, series], group.entries[task, reference]) for task in tasks]
        return sum(
            float(getattr(ours, measure).mean()) < float(getattr(theirs, measure).mean())
            for ours, theirs in pairs
        )

    signs = [group.sign(task, series) for task in tasks]
    return _Standing(
        series,
        len(tasks),
        tuple(map(_interquartile, logs)),
        (math.exp(low), math.exp(high)),
        tuple(map(below, MEASURES)),
        (signs.count(-1), signs.count(1)),
        tuple(_interquartile(group.log_ratios(series, m, common)) for m in MEASURES),
    )


def _ratio_cell(ratio: float, small: str = "") -> Cell:
    """A ratio; what is missing where it was not measured."""
    if math.isnan(ratio):
        return look.MISSING
    return Cell(look.ratio(ratio), tint=look.tint(ratio), small=small)


def _words(ratios: Sequence[float]) -> list[str]:
    return [_ratio_cell(ratio).text for ratio in ratios]


def _row(group: Group, standing: _Standing) -> tuple[str, tuple[Cell, ...]]:
    series, (low, high) = standing.series, standing.interval
    counted = [entry for task in group.tasks if (entry := group.entries.get((task, series)))]
    below, above = standing.signs
    lower = [f"{n} of {standing.tasks}" for n in standing.below]
    interval = ""
    if math.isfinite(standing.ratios[0]) and not math.isnan(low):
        end = f"to {look.ratio(high)}" if math.isfinite(high) else "or more"
        interval = f"{look.ratio(low)} {end}"
    itself = series == group.reference
    return series.label, (
        _ratio_cell(standing.ratios[0], interval),
        look.MISSING
        if itself
        else Cell(
            f"{standing.below[0]} of {standing.tasks}", small=f"{below} clear, {above} above"
        ),
        *(
            _ratio_cell(standing.ratios[n], "" if itself else lower[n])
            for n in range(1, len(MEASURES))
        ),
        Cell(" / ".join(_words(standing.common)))
        if not math.isnan(standing.common[0])
        else look.MISSING,
        Cell(f"{sum(e.diverged for e in counted)} of {sum(len(e.runs) for e in counted)}"),
    )


def summary_blocks(group: Group, key: str, lines: look.Lines) -> Iterator[Block]:
    """The section on the whole.

    Args:
        group: whose runs.
        key: how anchors and files of plots begin.
        lines: how series are drawn.
    """
    yield Heading(3, say("In short"), f"{key}-short")
    reference = group.reference
    if reference is None or not group.compared_tasks:
        yield Paragraph(
            say(
                "Adam was not run here, or diverged on every task, so tasks can't be put on one "
                "scale: there is no summary over them."
            )
        )
        return
    if group.names == (reference.name,):
        yield Paragraph(say("Only {} was run: there is nothing to compare.", Code(reference.name)))
        return
    name, common = reference.label, group.common_tasks
    standings = [found for series in group.series if (found := _standing(group, series))]
    standings.sort(key=lambda standing: (-standing.tasks, standing.ratios[0]))
    contenders = group.contenders
    by_hand = [s.series for s in standings if not s.series.learned and s.series in contenders]
    best_by_hand = [series for series in by_hand if series != reference][:1]
    told = [series for series in contenders if series.learned] + best_by_hand
    facts: list[tuple[str, Text]] = []
    for standing in standings:
        series = standing.series
        if series not in told:
            continue
        after, before, validation = _words(standing.ratios)
        if not math.isfinite(standing.ratios[0]):
            words = say(
                "{}: in a quarter of its runs over {}, or in more",
                Code(series.label), look.plural(standing.tasks, "task"),
            )  # fmt: skip
            facts.append((after, words))
            continue
        what = say(
            "final loss of {} relative to {} over {}: lower on {}, on {} beyond the scatter of "
            "seeds. On new batches {}, on validation data {}.",
            Code(series.label), Code(name), look.plural(standing.tasks, "task"),
            str(standing.below[0]), str(standing.signs[0]), before, validation,
        )  # fmt: skip
        facts.append((after, what))
    if facts:
        yield Facts(tuple(facts))
    yield Paragraph(
        say(
            "Losses of different tasks are not on one scale, so each run's final loss is first "
            "divided by the mean final loss of {} on the same task: 0.5× is half of it. "
            "The {} is the mean of the middle half of these ratios' logarithms, over all tasks and "
            "seeds, so that a few extreme runs don't decide it. As it is no plain mean, that of {} "
            "itself need not be 1×. Losses below {} count as that.",
            Code(name), Strong("interquartile mean"), Code(name), f"{LOSS_FLOOR:g}",
        )
    )  # fmt: skip
    drawn = dict(lines.drawn(group))
    whole = [s for s in standings if s.series in drawn and not math.isnan(s.common[0])]
    if len(whole) > 1:
        yield _overview(group, key, [(s.series, drawn[s.series]) for s in whole])
    yield Table(
        (
            ("optimizer", ""), ("final loss", f"over that of {name}"), ("below it", "tasks"),
            ("new batches", "before the update"), ("validation", "loss"),
            (look.plural(len(common), "common task"), "all three"), ("diverged", "runs"),
        ),
        tuple(_row(group, standing) for standing in standings),
        say(
            "Every optimizer over the tasks that {} was run on; those with fewer stand last. "
            "Ratios are interquartile means, the first with its 95% interval; with them, on how "
            "many tasks the loss is lower. Clear: on how many it is lower, and above: on how many "
            "higher, by the 95% interval of the mean difference of seeds. An optimizer can fit "
            "each batch at the expense of the others: the loss on new batches, before the update "
            "made from them, and that on validation data show it. The common tasks are those that "
            "all optimizers have which were run on half of the tasks or more; only over these can "
            "two rows be compared.{}",
            Code(name), _OF_ONE_TRAINING if any(s.series.learned for s in standings) else "",
        ),
    )  # fmt: skip


def _overview(group: Group, key: str, drawn: Sequence[tuple[Series, plots.Line]]) -> Block:
    """Ratios and performance profile, over the tasks that all have."""
    tasks, reference = group.common_tasks, group.reference
    assert reference is not None
    rows: list[tuple[plots.Line, float, float, float]] = []
    for series, line in drawn:
        logs = group.log_ratios(series, tasks=tasks)
        low, high = interquartile_interval(logs)
        rows.append((line, _interquartile(logs), math.exp(low), math.exp(high)))
    best_first = sorted(rows, key=lambda row: row[1])
    losses_KO = np.array([[group.entries[task, s].score for s, _ in drawn] for task in tasks])
    ratios_KO = performance_ratios(losses_KO)
    furthest = float(np.max(ratios_KO, where=np.isfinite(ratios_KO), initial=1.5))
    factors = np.geomspace(1, min(1.1 * furthest, MAX_FACTOR), 200)
    shares = list(performance_profile(losses_KO, factors))
    figures = (
        plots.ratio_plot(f"{key}-ratios", best_first, reference.label),
        plots.performance_profile_plot(
            f"{key}-profile", factors, shares, [line for _, line in drawn]
        ),
    )
    words = say(
        "The first plot has interquartile means of the final loss with 95% intervals, over the {} "
        "that these optimizers have in common; left of 1× is better than {}. The second, in the "
        "same colours, is the performance profile: on what share of these tasks the final loss is "
        "within a factor of the best one's; a higher line is better.",
        look.plural(len(tasks), "task"), Code(reference.label),
    )  # fmt: skip
    return Figures(figures, words, wide=True)


_OF_ONE_TRAINING = (
    " A learned optimizer is one outcome of one meta-training, from one seed: the intervals are "
    "over the runs' seeds, and do not say what another meta-training would have given."
)
