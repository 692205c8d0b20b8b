"""What is said of a folder of training runs, and the files that say it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hyperadam.baselines import describe_learned
from hyperadam.errors import RunError
from hyperadam.evaluation import plots
from hyperadam.evaluation.document import (
    FIGURES_FOLDER,
    Block,
    Bullets,
    Cell,
    Code,
    Document,
    Facts,
    Figure,
    Figures,
    Heading,
    Link,
    Paragraph,
    Strong,
    Table,
    Text,
    say,
    to_html,
    to_markdown,
)
from hyperadam.evaluation.metrics import (
    LOSS_FLOOR,
    bin_means,
    bin_size,
    bootstrap_interval,
    geometric,
    interquartile_interval,
    interquartile_mean,
    performance_profile,
    performance_ratios,
)
from hyperadam.evaluation.paired_section import paired_blocks
from hyperadam.evaluation.paper_figures import AAAI_2019, paper_figures
from hyperadam.evaluation.records import Record, read_records
from hyperadam.evaluation.rule_section import rule_blocks
from hyperadam.evaluation.series import (
    REFERENCE,
    TUNED,
    Entry,
    Estimate,
    Group,
    Series,
    final_window,
    make_groups,
)
from hyperadam.files import atomic_write

MAX_POINTS = 100
"""Of a plotted curve."""

MAX_FACTOR = 100.0
MISSING = Cell("—")
TINTS = ((1.05, 1), (1.25, 2), (2.0, 3))
"""From which ratio to the reference a cell is tinted, and how strongly; likewise below 1."""


@dataclasses.dataclass(frozen=True)
class ReportPaths:
    """The files of a report.

    Attributes:
        html: the page, whole.
        markdown: the same in Markdown.
        figures: the folder of the Markdown's plots.
        remarks: what of the results could not be read.
    """

    html: Path
    markdown: Path
    figures: Path
    remarks: tuple[str, ...]


def write_report(folder: Path) -> ReportPaths:
    """Say what the training runs in a folder show, in HTML and in Markdown.

    Args:
        folder: holds ``runs.jsonl``; the report is written beside it, over an older one.

    Raises:
        RunError: there are no runs to report.
    """
    records, remarks = read_records(folder)
    document = make_report(records, folder.resolve().name, remarks)
    figures = folder / FIGURES_FOLDER
    paths = ReportPaths(folder / "report.html", folder / "report.md", figures, tuple(remarks))
    figures.mkdir(exist_ok=True)
    drawn = {f"{figure.name}.svg": figure.file_svg for figure in document.figures()}
    for old in figures.glob("g[0-9]*-*.svg"):  # of an older report; others are not ours
        if old.name not in drawn:
            old.unlink()
    for file_name, svg in drawn.items():
        atomic_write(figures / file_name, svg.encode())
    atomic_write(paths.html, to_html(document).encode())
    atomic_write(paths.markdown, to_markdown(document).encode())
    return paths


def make_report(records: Sequence[Record], name: str, remarks: Sequence[str] = ()) -> Document:
    """The report of these records.

    Args:
        records: tuning runs among them.
        name: of their folder.
        remarks: of :func:`~hyperadam.evaluation.records.read_records`.

    Raises:
        RunError: none of them is to be reported.
    """
    groups = make_groups(records)
    if not groups:
        why = "its runs only tune learning rates" if records else "; ".join(remarks)
        raise RunError(f"{name} has no runs to report: {why}")
    lines = _Lines(groups)
    blocks = [*_reading(records, groups, remarks)]
    for index, group in enumerate(groups):
        blocks += _group_blocks(group, f"g{index}", lines)
    return Document(
        title=f"Optimizers compared: {name}",
        lead=say(
            "Small neural networks are trained from scratch with learned optimizers, whose update "
            "rule was itself trained beforehand, and with hand-designed ones such as Adam. "
            "This page says how low each gets the training loss in a fixed number of steps, how "
            "fast, and what the learned rules do."
        ),
        blocks=tuple(blocks),
    )


# How it looks: numbers, names, colours.


def _significant(value: float, digits: int = 3) -> int:
    """Decimals that show so many digits of a positive number."""
    return max(0, digits - 1 - math.floor(math.log10(value)))


def _number(mean: float, half: float = math.nan) -> str:
    """A figure with half of its interval, to the same decimals."""
    if not math.isfinite(mean):
        return "diverged"
    scale = max(abs(mean), half if math.isfinite(half) else 0.0)
    if scale and not 1e-3 <= scale < 1e4:
        text = f"{mean:.2e}"
        return f"{text} ± {half:.0e}" if math.isfinite(half) else text
    decimals = min(5, _significant(scale)) if scale else 3
    text = f"{mean:.{decimals}f}"
    return f"{text} ± {half:.{decimals}f}" if math.isfinite(half) else text


def _percent(mean: float, half: float = math.nan) -> str:
    text = f"{100 * mean:.1f}"
    return f"{text} ± {100 * half:.1f} %" if math.isfinite(half) else f"{text} %"


def _ratio(value: float) -> str:
    if not math.isfinite(value):
        return "diverges"
    return f"{value:.2f}×" if 0.01 <= value < 10 else f"{value:.3g}×"


def _seconds(value: float) -> str:
    if value >= 120:
        return f"{value / 60:.1f} min"
    return f"{value:.2g} s" if value < 9.95 else f"{value:.0f} s"


def _version(source: str) -> str:
    """A commit by its first digits; other words as they are."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", source)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts)


def _tint(ratio: float) -> int:
    if math.isnan(ratio):
        return 0
    strength = sum(max(ratio, 1 / ratio if ratio else math.inf) >= start for start, _ in TINTS)
    return strength if ratio > 1 else -strength


class _Lines:
    """Which optimizers are in colour, the same ones in all plots of a report."""

    def __init__(self, groups: Sequence[Group]) -> None:
        wins: Counter[str] = Counter()
        learned: dict[str, bool] = {}
        for group in groups:
            for series in group.series:
                learned.setdefault(series.name, series.learned)
            for task in group.tasks:
                ranked = sorted(
                    (entry.score, series.name)
                    for series in group.main_series
                    if (entry := group.entries.get((task, series)))
                )
                for place, (_, name) in enumerate(ranked):
                    wins[name] += len(ranked) - place
        ours = [name for name in learned if learned[name]]
        rest = sorted(
            (name for name in learned if not learned[name] and name != REFERENCE),
            key=lambda name: (-wins[name], name),
        )
        # Adam has its colour in every report, and the first learned one has its own.
        names = [*ours[:1], REFERENCE, *ours[1:], *rest]
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
        """Series with their lines: one track each, and every track of a learned one."""
        mains = group.main_series
        return [
            (series, self.line(group, series))
            for series in group.series
            if series in mains or (series.learned and series.name in self._colors)
        ]


# What is said of all runs.


def _reading(
    records: Sequence[Record], groups: Sequence[Group], remarks: Sequence[str]
) -> Iterator[Block]:
    reported = [run for group in groups for run in group.runs]
    tuning = [record for record in records if record.is_tuning]
    yield Heading(2, say("How to read this"), "reading")
    items = [
        say(
            "A {} is one training of one task from one seed, which sets the initial "
            "parameters and the order of the data. {} are reported here; {} with "
            "other seeds chose learning rates and are not.",
            Strong("run"), _plural(len(reported), "run").capitalize(),
            _plural(len(tuning), "run"),
        ),
        say(
            "The {} of a run is the mean training loss over its last {} steps, each measured on "
            "the step's own batch after the update, as the papers have it. Lower is better. It "
            "says what an update does for its own batch; the loss {}, on a batch that the network "
            "has not been fitted to yet, and that on {} data say what it does for others.",
            Strong("final loss"), str(final_window(max(group.steps for group in groups))),
            Strong("before the update"), Strong("validation"),
        ),
        say(
            "An optimizer appears on a {}. {}: at the learning rate that was best of a grid, "
            "chosen task by task. {}: the one that it comes with. Learned optimizers are "
            "meant to be used at their default, without any tuning; hand-designed ones are tuned. "
            "Which of the tasks the learned ones' weights were trained or chosen on, the project's "
            "documentation of evaluation says.",
            Strong("track"), Strong("Tuned"), Strong("Default lr"),
        ),
        say(
            "{} and shaded bands are 95% intervals of the mean over seeds, by a percentile "
            "bootstrap: what other seeds would change. A single run has none, and those of few "
            "seeds are too narrow: of three they hold the mean in three of four cases. Intervals "
            "of ratios take the mean that is divided by as exact.",
            Strong("±"),
        ),
        say(
            "A run {} when its loss stops being a finite number or ends a fifth above its first "
            "one. Such runs are left out of a cell's mean, and counted in it; in every "
            "comparison they count as infinitely bad.",
            Strong("diverges"),
        ),
        say(
            "Tasks are named by data, network and variant: {} is a perceptron with one hidden "
            "layer of sigmoid units on MNIST's digits.",
            Code("mnist-mlp1-sigmoid"),
        ),
    ]  # fmt: skip
    yield Bullets(tuple(items))
    machines = sorted({run.machine for run in reported})
    versions = sorted({run.version for run in reported})
    yield Paragraph(
        say(
            "Measured on {}, by hyperadam {}; this page by {}.",
            _join(machines), _join(versions), Code("hyperadam report"),
        )
    )  # fmt: skip
    digests = sorted({(run.optimizer, run.weights) for run in reported if run.weights})
    if digests:
        yield Paragraph(
            say(
                "The learned optimizers, and the digests of their weights. What they were "
                "trained on, at what cost, is in the project's {}.",
                Code("docs/weights.md"),
            )
        )
        yield Bullets(
            tuple(
                say("{}: {}; {}", Code(name), describe_learned(name, digest), Code(digest[:12]))
                for name, digest in digests
            )
        )
    if remarks:
        yield Paragraph(say("Some results could not be read:"))
        yield Bullets(tuple(say("{}", remark) for remark in remarks))


def _group_blocks(group: Group, key: str, lines: _Lines) -> Iterator[Block]:
    suites = "suite" if len(group.suites) == 1 else "suites"
    title = f"{_plural(group.steps, 'step')}, {suites} "
    if group.schedule == "none":
        end = ", constant learning rate"
    else:
        end = f", {group.schedule} schedule of the learning rate"
    names = _join(["{}"] * len(group.suites))
    yield Heading(2, say("{}" + names + "{}", title, *map(Code, group.suites), end), key)
    yield from _summary(group, key, lines)
    yield from _losses(group, key)
    yield from paired_blocks(group, key)
    yield from _paper(group, key)
    yield from _curves(group, key, lines)
    yield from _targets(group, key, lines)
    yield from _rates(group, key)
    yield from rule_blocks(group, key)
    yield from _notes(group, key)


# Summary.


def _below(group: Group, series: Series) -> tuple[int, int]:
    """On how many tasks a series ends below the reference, and of how many."""
    both = [
        entry.score < group.target(task)
        for task in group.compared_tasks
        if (entry := group.entries.get((task, series)))
    ]
    return sum(both), len(both)


@dataclasses.dataclass(frozen=True)
class _Standing:
    """A series over all tasks that can be compared."""

    series: Series
    below: int
    tasks: int
    ratio: float
    low: float
    high: float
    before: float
    validation: float


def _interquartile(log_ratios: Sequence[np.ndarray]) -> float:
    """Of ratios over tasks and seeds; NaN without any."""
    return geometric(interquartile_mean, np.concatenate(log_ratios)) if log_ratios else math.nan


def _ratio_cell(ratio: float) -> Cell:
    return MISSING if math.isnan(ratio) else Cell(_ratio(ratio), tint=_tint(ratio))


def _standings(group: Group) -> list[_Standing]:
    standings = []
    for series in group.series:
        ratios = group.log_ratios(series)
        if not ratios:
            continue
        below, tasks = _below(group, series)
        low, high = interquartile_interval(ratios)
        before, validation = (
            _interquartile(group.log_ratios(series, measure))
            for measure in ("losses_before", "val_losses")
        )
        ratio = _interquartile(ratios)
        standings.append(
            _Standing(series, below, tasks, ratio, np.exp(low), np.exp(high), before, validation)
        )
    return sorted(standings, key=lambda standing: (-standing.tasks, standing.ratio))


def _summary(group: Group, key: str, lines: _Lines) -> Iterator[Block]:
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
    name, total = reference.label, len(group.compared_tasks)
    standings = _standings(group)
    facts: list[tuple[str, Text]] = []
    for standing in standings:
        series = standing.series
        if not series.learned or series not in group.main_series:
            continue
        what = say(
            "final loss of {} relative to {}; lower on {} of {} ({} before the update, {} on "
            "validation data)",
            Code(series.label), Code(name), str(standing.below), _plural(standing.tasks, "task"),
            _ratio_cell(standing.before).text, _ratio_cell(standing.validation).text,
        )  # fmt: skip
        facts.append((_ratio(standing.ratio), what))
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
    rows = []
    for standing in standings:
        counted = [
            entry for task in group.tasks if (entry := group.entries.get((task, standing.series)))
        ]
        interval = (
            f"{_ratio(standing.low)} to {_ratio(standing.high)}"
            if not math.isnan(standing.low)
            else "—"
        )
        cells = (
            _ratio_cell(standing.ratio),
            Cell(interval),
            MISSING
            if standing.series == reference
            else Cell(f"{standing.below} of {standing.tasks}"),
            _ratio_cell(standing.before),
            _ratio_cell(standing.validation),
            Cell(f"{sum(e.diverged for e in counted)} of {sum(len(e.runs) for e in counted)}"),
        )
        rows.append((standing.series.label, cells))
    drawn = dict(lines.drawn(group))
    whole = [s for s in standings if s.tasks == total and s.series in drawn]
    plotted = [(drawn[s.series], s.ratio, s.low, s.high) for s in whole]
    if len(plotted) > 1:
        figure = plots.ratio_plot(f"{key}-ratios", plotted, name)
        ordered = [s.series for s in whole]
        losses_KO = np.array(
            [[group.entries[task, s].score for s in ordered] for task in group.compared_tasks]
        )
        ratios_KO = performance_ratios(losses_KO)
        furthest = float(np.max(ratios_KO, where=np.isfinite(ratios_KO), initial=1.5))
        factors = np.geomspace(1, min(1.1 * furthest, MAX_FACTOR), 200)
        profile = plots.performance_profile_plot(
            f"{key}-profile",
            factors,
            list(performance_profile(losses_KO, factors)),
            [drawn[s] for s in ordered],
        )
        yield Figures(
            (figure, profile),
            say(
                "First: interquartile means with 95% intervals; left of 1× is better than {}. "
                "Second, in the same colours, the performance profile: on what share of the {} "
                "the final loss is within a factor of the best one's; a higher line is better.",
                Code(name), _plural(total, "task"),
            ),
            wide=True,
        )  # fmt: skip
    yield Table(
        (
            ("optimizer", ""), ("loss ratio", "interquartile mean"), ("95% interval", ""),
            (f"below {name}", "tasks"), ("before the update", "loss ratio"),
            ("validation", "loss ratio"), ("diverged", "runs"),
        ),
        tuple(rows),
        say(
            "Every optimizer over the tasks that {} was run on; those with fewer stand last. An "
            "optimizer can fit each batch at the expense of the others: the loss before the "
            "update, on a batch to come, and that on validation data, show it.{}",
            Code(name), _OF_ONE_TRAINING if any(s.series.learned for s in standings) else "",
        ),
    )  # fmt: skip


_OF_ONE_TRAINING = (
    " A learned optimizer is one outcome of one meta-training, from one seed: the intervals are "
    "over the runs' seeds, and do not say what another meta-training would have given."
)


# Tables of tasks and optimizers.


def _matrix(
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


def _usual_seeds(group: Group) -> int:
    counts = Counter(len(entry.runs) for entry in group.entries.values())
    return max(counts, key=lambda count: (counts[count], count))


def _is_best(
    value: float, values: Sequence[float], best: Callable[[Sequence[float]], float]
) -> bool:
    """Whether a value is the best of several; one alone is not."""
    return len(values) > 1 and value == best(values)


def _losses(group: Group, key: str) -> Iterator[Block]:
    usual = _usual_seeds(group)
    scores = {
        task: [group.entries[task, s].score for s in group.series if (task, s) in group.entries]
        for task in group.tasks
    }

    def small(entry: Entry) -> str:
        parts = [f"{entry.diverged} of {len(entry.runs)} diverged"] if entry.diverged else []
        parts += [_plural(len(entry.runs), "seed")] if len(entry.runs) != usual else []
        return _join(parts)

    def loss(task: str, series: Series) -> Cell:
        entry = group.entries.get((task, series))
        if entry is None:
            return MISSING
        target = group.target(task)
        return Cell(
            _number(entry.loss.mean, entry.loss.half_width),
            strong=math.isfinite(entry.score) and _is_best(entry.score, scores[task], min),
            tint=0 if series == group.reference else _tint(entry.score / target),
            small=small(entry),
        )

    yield Heading(3, say("Final losses"), f"{key}-losses")
    tints = ""
    if group.reference:
        tints = (
            f" In the HTML page blue is at least 5% below {group.reference.label}, and orange "
            "at least 5% above; stronger from 25% and from a factor of 2 on."
        )
    caption = (
        f"Mean final training loss ± 95% over {_plural(usual, 'seed')}, unless a cell says "
        f"otherwise; each task's lowest in bold; — was not run.{tints}"
    )
    yield _matrix(group, loss, say("{}", caption))
    yield from _validation(
        group,
        lambda entry: entry.accuracy,
        _percent,
        np.nanmax,
        "Validation accuracy at the end ± 95%, each task's highest in bold",
    )
    yield from _validation(
        group,
        lambda entry: entry.val_loss,
        _number,
        np.nanmin,
        "Validation loss at the end ± 95%, each task's lowest in bold",
    )


def _validation(
    group: Group,
    estimate: Callable[[Entry], Estimate],
    show: Callable[[float, float], str],
    best: Callable[[Sequence[float]], float],
    caption: str,
) -> Iterator[Block]:
    """A table of what was measured on held-out data, of the tasks that have it."""
    means = {
        task: [
            estimate(entry).mean
            for series in group.series
            if (entry := group.entries.get((task, series)))
        ]
        for task in group.tasks
    }
    tasks = [task for task, values in means.items() if not np.isnan(values).all()]
    if not tasks:
        return

    def cell(task: str, series: Series) -> Cell:
        entry = group.entries.get((task, series))
        if entry is None or math.isnan(estimate(entry).mean):
            return MISSING
        found = estimate(entry)
        strong = _is_best(found.mean, means[task], best)
        return Cell(show(found.mean, found.half_width), strong=strong)

    yield _matrix(group, cell, say("{}", caption), tasks=tasks, folded=True)


def _paper(group: Group, key: str) -> Iterator[Block]:
    printed = {task: paper_figures(task, group.steps) for task in group.tasks}
    tasks = [task for task in group.tasks if printed[task]]
    if not tasks or group.schedule != "none":
        return
    names = list(dict.fromkeys(name for task in tasks for name in printed[task]))
    ours = [s for s in group.main_series if s.name in names]
    new = [s for s in group.main_series if s.learned and s.name not in names]

    def cells(task: str) -> Iterator[Cell]:
        for name in names:
            figure = printed[task].get(name)
            accuracy = figure.accuracy if figure else None
            small = f"{100 * accuracy:.2f} %" if accuracy is not None else ""
            yield Cell(f"{figure.loss:.2f}", small=small) if figure else MISSING
            yield from (measured(task, series) for series in ours if series.name == name)
        yield from (measured(task, series) for series in new)

    def measured(task: str, series: Series) -> Cell:
        entry = group.entries.get((task, series))
        if entry is None:
            return MISSING
        shown = any(figure.accuracy is not None for figure in printed[task].values())
        accuracy = entry.accuracy.mean
        small = f"{100 * accuracy:.2f} %" if shown and not math.isnan(accuracy) else ""
        if entry.diverged:
            small = f"{entry.diverged} of {len(entry.runs)} diverged"
        return Cell(_number(entry.loss.mean, entry.loss.half_width), small=small)

    header = [("task", "")]
    for name in names:
        header.append((name, "printed"))
        header += [(s.name, f"ours, {s.track}") for s in ours if s.name == name]
    header += [(s.name, f"ours, {s.track}") for s in new]
    yield Heading(3, say("Beside the paper's figures"), f"{key}-paper")
    yield Table(
        tuple(header),
        tuple((task, tuple(cells(task))) for task in tasks),
        say(
            "Final training loss as printed in {}, beside ours; a second line is accuracy. The "
            "printed figures are means over initialisations, without intervals. The figures of "
            "learned rules depend on their weights, which differ.",
            Link(AAAI_2019, "https://arxiv.org/abs/1811.08996"),
        ),
    )


# Curves.


def _curve(entry: Entry, line: plots.Line) -> tuple[np.ndarray, plots.Curve] | None:
    """Points of a series' mean curve, over the runs that did not diverge."""
    kept = [run for run, loss in zip(entry.runs, entry.losses, strict=True) if np.isfinite(loss)]
    curves = [run.train_loss_post for run in kept if np.isfinite(run.train_loss_post).all()]
    if not curves:
        return None
    at, binned = bin_means(np.stack(curves), MAX_POINTS)
    if line.background:
        low = high = np.full(binned.shape[1], np.nan)
    else:
        low, high = bootstrap_interval(binned)
    return at, plots.Curve(line, binned.mean(axis=0), low, high)


def _curves(group: Group, key: str, lines: _Lines) -> Iterator[Block]:
    drawn = lines.drawn(group)
    panels: list[Figure] = []
    for task in group.tasks:
        pairs = [
            pair
            for series, line in drawn
            if (entry := group.entries.get((task, series))) and (pair := _curve(entry, line))
        ]
        if not pairs:
            continue
        at, curves = pairs[0][0], [curve for _, curve in pairs]
        top = 1.6 * float(np.median([curve.mean[0] for curve in curves]))
        name = f"{key}-curve-{len(panels)}-{_slug(task)}"
        panels.append(
            plots.learning_curves(
                name, task, at, curves, total=group.steps, top=top, target=group.target(task)
            )
        )
    if not panels:
        return
    yield Heading(3, say("Learning curves"), f"{key}-curves")
    size = bin_size(group.steps, MAX_POINTS)
    each = f"; each point is a mean over {size} steps" if size > 1 else ""
    words = f"Training loss after the update, mean over seeds with 95% bands{each}; logarithmic."
    words += " Runs that diverged are left out. Dashed: another track of the same colour."
    if group.reference:
        words += f" Dotted: the final loss of {group.reference.label}."
    others = any(line.background for _, line in drawn)
    shown = [line for _, line in drawn]
    yield Figures((plots.legend(f"{key}-legend", shown, others),), say("{}", words), wide=True)
    yield Figures(tuple(panels), ())


def _targets(group: Group, key: str, lines: _Lines) -> Iterator[Block]:
    reference, tasks = group.reference, group.compared_tasks
    if reference is None or not tasks:
        return
    steps = {pair: entry.steps_to(group.target(pair[0])) for pair, entry in group.entries.items()}

    def share(task: str, series: Series) -> float:
        if (task, series) not in group.entries:
            return math.nan
        reached = steps[task, series]
        return math.inf if reached is None else 100 * reached / group.steps

    def slowness(task: str, series: Series) -> float:
        entry, target = group.entries.get((task, series)), group.target(task)
        seconds = entry.seconds_to(target) if entry else None
        own = group.entries[task, reference].seconds_to(target)
        return seconds / own if seconds is not None and own else math.nan

    def steps_cell(task: str, series: Series) -> Cell:
        if (task, series) not in group.entries:
            return MISSING
        reached = steps[task, series]
        return Cell("never" if reached is None else f"{reached:,}")

    def seconds_cell(task: str, series: Series) -> Cell:
        if (task, series) not in group.entries:
            return MISSING
        seconds = group.entries[task, series].seconds_to(group.target(task))
        return Cell("never" if seconds is None else _seconds(seconds))

    yield Heading(3, say("Steps and time to {}", Code(reference.label)), f"{key}-targets")
    drawn = [(series, line) for series, line in lines.drawn(group) if not line.background]
    shares = [(line, [share(task, series) for task in tasks]) for series, line in drawn]
    times = [(line, [slowness(task, series) for task in tasks]) for series, line in drawn]
    yield Figures(
        (
            plots.steps_plot(f"{key}-steps", tasks, shares, reference.label),
            plots.time_plot(f"{key}-time", tasks, times, reference.label),
        ),
        say(
            "When the mean loss over seeds (a trailing mean over {} steps) first is as low as the "
            "final loss of {}. First in steps, where a cross means not within the run, or that a "
            "run diverged; second in wall-clock time. Further left is faster; colours as above.",
            str(final_window(group.steps)), Code(reference.label),
        ),
        wide=True,
    )  # fmt: skip
    yield _matrix(
        group,
        steps_cell,
        say("The same in steps, for every optimizer; never: not within the run, or a run diverged"),
        tasks=tasks,
        folded=True,
    )
    yield _matrix(
        group,
        seconds_cell,
        say(
            "Wall-clock time to the same loss: those steps at the runs' median time a step, of "
            "the whole training loop without measurements. Runs share the machine where several "
            "are made at a time, and were made on different days: factors count, some ten percent "
            "do not"
        ),
        tasks=tasks,
        folded=True,
    )

    def cost(task: str, series: Series) -> Cell:
        entry = group.entries.get((task, series))
        if entry is None:
            return MISSING
        own = np.median([run.optimizer_s for run in entry.runs]) / group.steps
        loop = np.median([run.wall_s for run in entry.runs]) / group.steps
        return Cell(f"{1e3 * own:.3g} ms", small=f"of {1e3 * loop:.3g} ms")

    yield _matrix(
        group,
        cost,
        say("Time a step: the optimizer's own, of the whole loop's (medians over seeds)"),
        folded=True,
    )

    def memory(task: str, series: Series) -> Cell:
        entry = group.entries.get((task, series))
        if entry is None:
            return MISSING
        return Cell(f"{np.median([run.peak_mb for run in entry.runs]):,.0f} MB")

    yield _matrix(
        group,
        memory,
        say(
            "Peak memory of the process in a run (medians over seeds), libraries and data among it"
        ),
        folded=True,
    )


def _rates(group: Group, key: str) -> Iterator[Block]:
    names = [n for n in group.names if any((task, n) in group.grids for task in group.tasks)]
    if not names:
        return
    marks = {"lowest": "lowest of the grid", "highest": "highest of the grid", "": ""}

    def cell(task: str, name: str) -> Cell:
        grid = group.grids.get((task, name))
        if grid is None:
            return MISSING
        return Cell(f"{grid.best:g}", small=marks[grid.end])

    yield Heading(3, say("Tuned learning rates"), f"{key}-rates")
    tried: dict[tuple[float, ...], list[str]] = {}
    for name in names:
        for grid in dict.fromkeys(
            group.grids[task, name].tried for task in group.tasks if (task, name) in group.grids
        ):
            tried.setdefault(grid, []).append(name)
    ends = sum(bool(grid.end) for grid in group.grids.values())
    yield Bullets(
        tuple(
            say(
                f"{_join(['{}'] * len(who))}: {_join([f'{rate:g}' for rate in grid])}",
                *map(Code, who),
            )
            for grid, who in tried.items()
        )
    )
    yield Paragraph(
        say(
            "These grids were tried. The best is at an end of its grid in {} of {} cells: there, "
            "a still better one may lie beyond it.",
            str(ends), str(len(group.grids)),
        )
    )  # fmt: skip
    yield Table(
        (("task", ""), *((name, "") for name in names)),
        tuple((task, tuple(cell(task, name) for name in names)) for task in group.tasks),
        say("The learning rate of the lowest mean final loss over the tuning seeds"),
        folded=len(names) * len(group.tasks) > 60,
    )


# What has to be known.


def _notes(group: Group, key: str) -> Iterator[Block]:
    notes: list[Text] = []
    usual = _usual_seeds(group)
    missing = {
        series: [task for task in group.tasks if (task, series) not in group.entries]
        for series in group.series
    }
    cells = len(group.tasks) * len(group.series)
    absent = sum(map(len, missing.values()))
    if absent:
        lacking = [
            (Code(series.label), f" ({_plural(len(tasks), 'task')})")
            for series, tasks in missing.items()
            if tasks
        ]
        notes.append(
            say(
                f"{absent} of {_plural(cells, 'cell')} of the table are missing: "
                f"{_join(['{}{}'] * len(lacking))}.",
                *(span for pair in lacking for span in pair),
            )
        )
    else:
        notes.append(say("Every optimizer of the table was run on every task."))
    odd = sum(len(entry.runs) != usual for entry in group.entries.values())
    count = f"{_plural(usual, 'seed').capitalize()} a cell"
    notes.append(
        say(f"{count}, except in {_plural(odd, 'cell')}, where the number is written.")
        if odd
        else say(f"{count}, everywhere.")
    )
    diverged = sum(run.diverged or not math.isfinite(run.final_loss) for run in group.runs)
    notes.append(say(f"{diverged} of {_plural(len(group.runs), 'run')} diverged."))
    untuned = [
        series for series in group.main_series if not series.learned and series.track != TUNED
    ]
    if untuned:
        notes.append(
            say(f"Without tuning runs, so not at their best: {_join(['{}'] * len(untuned))}.",
                *(Code(series.label) for series in untuned))
        )  # fmt: skip
    sources = Counter(run.source or "unrecorded" for run in group.runs)
    if len(sources) > 1:
        made = [f"{_version(source)} ({_plural(n, 'run')})" for source, n in sources.most_common()]
        notes.append(say("Runs are from several versions of the program: {}.", _join(made)))
    if len({run.machine for run in group.runs}) > 1:
        notes.append(say("Runs are from several machines: times are not comparable."))
    yield Heading(3, say("What to keep in mind"), f"{key}-notes")
    notes.append(
        say(
            "Intervals cover seeds only: not the choice of tasks, nor the chance in tuning, nor, "
            "for a learned rule, that its weights are one outcome of meta-training."
        )
    )
    yield Bullets(tuple(notes))
