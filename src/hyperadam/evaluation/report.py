"""What is said of a folder of training runs, and the files that say it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hyperadam.baselines import COMPARED, describe_learned
from hyperadam.errors import RunError
from hyperadam.evaluation import look, plots
from hyperadam.evaluation.ablation_section import ablation_blocks
from hyperadam.evaluation.document import (
    FIGURES_FOLDER,
    Block,
    Bullets,
    Cell,
    Code,
    Document,
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
    bin_means,
    bin_size,
    bootstrap_interval,
)
from hyperadam.evaluation.paired_section import paired_blocks
from hyperadam.evaluation.paper_figures import AAAI_2019, paper_figures
from hyperadam.evaluation.records import Record, read_records
from hyperadam.evaluation.rule_section import rule_blocks
from hyperadam.evaluation.series import (
    DEFAULT,
    TUNED,
    Entry,
    Estimate,
    Group,
    Series,
    final_window,
    make_groups,
)
from hyperadam.evaluation.suites import ABLATIONS, SUITES
from hyperadam.evaluation.summary_section import summary_blocks
from hyperadam.evaluation.targets_section import targets_blocks
from hyperadam.files import atomic_write

MAX_POINTS = 100
"""Of a plotted curve."""


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
        why = (
            "its runs only tune learning rates" if records else "; ".join(remarks) or "it is empty"
        )
        raise RunError(f"{name} has no runs to report: {why}")
    lines = look.Lines(groups)
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
            "parameters and the order of the data. {} {} reported here{}.",
            Strong("run"), look.plural(len(reported), "run"),
            "is" if len(reported) == 1 else "are",
            f"; {look.plural(len(tuning), 'run')} with other seeds chose learning rates, and "
            "are not" if tuning else "",
        ),
        say(
            "The {} of a run is the mean training loss over its last {}, each measured on "
            "the step's own batch after the update, as the papers have it. Lower is better. It "
            "says what an update does for its own batch; the loss {}, on a batch that the network "
            "has not been fitted to yet (a {}), and that on {} data say what it does for others.",
            Strong("final loss"),
            look.plural(final_window(max(group.steps for group in groups)), "step"),
            Strong("before the update"), Strong("new batch"), Strong("validation"),
        ),
        say(
            "An optimizer appears on a {}. {}: at the learning rate that was best of a grid, "
            "chosen task by task. {}: the one that it comes with.{} Learned optimizers are "
            "meant to be used at their default, without any tuning; hand-designed ones are tuned. "
            "Which of the tasks the learned ones' weights were trained or chosen on, the project's "
            "documentation of its weights says.",
            Strong("track"), Strong("Tuned"), Strong("Default lr"),
            " A track named by a learning rate: the one that all were given."
            if any(s.track not in (TUNED, DEFAULT) for group in groups for s in group.series)
            else "",
        ),
        say(
            "{} and shaded bands are 95% intervals of the mean over seeds, by a percentile "
            "bootstrap: what other seeds would change. A single run has none. Those of few seeds "
            "are too narrow: with three, about three of four hold the true mean. Intervals of "
            "ratios leave out that the reference's mean is uncertain too.",
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
            "Measured by hyperadam {}; this page is by {}. The machine{}:",
            look.join(versions), Code("hyperadam report"), "s" if len(machines) > 1 else "",
        )
    )  # fmt: skip
    yield Bullets(tuple(say("{}", machine) for machine in machines))
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
                say(
                    "{}: {}{}; {}",
                    Code(name),
                    describe_learned(name, digest),
                    _ablation(name, reported),
                    Code(digest[:12]),
                )
                for name, digest in digests
            )
        )
    if remarks:
        yield Paragraph(say("Some results could not be read:"))
        yield Bullets(tuple(say("{}", remark) for remark in remarks))


def _ablation(name: str, runs: Sequence[Record]) -> str:
    """What the weights of an ablation lack, where a suite's own weights are named so."""
    words = ABLATIONS.get(name.partition("@")[2])
    suites = {run.suite for run in runs if run.optimizer == name}
    return f", where {words}" if words and suites == {"ablations"} else ""


def _group_blocks(group: Group, key: str, lines: look.Lines) -> Iterator[Block]:
    suites = "suite" if len(group.suites) == 1 else "suites"
    title = f"{look.plural(group.steps, 'step')}, {suites} "
    if group.schedule == "none":
        end = ", constant learning rate"
    else:
        end = f", {group.schedule} schedule of the learning rate"
    names = look.join(["{}"] * len(group.suites))
    yield Heading(2, say("{}" + names + "{}", title, *map(Code, group.suites), end), key)
    yield from ablation_blocks(group, key)
    yield from summary_blocks(group, key, lines)
    yield from _losses(group, key)
    yield from paired_blocks(group, key)
    yield from _paper(group, key)
    yield from _curves(group, key, lines)
    yield from targets_blocks(group, key, lines)
    yield from _rates(group, key)
    yield from rule_blocks(group, key)
    yield from _notes(group, key)


def _losses(group: Group, key: str) -> Iterator[Block]:
    usual = look.usual_seeds(group)
    scores = {
        task: [group.entries[task, s].score for s in group.series if (task, s) in group.entries]
        for task in group.tasks
    }

    def small(entry: Entry) -> str:
        seeds = [look.plural(len(entry.runs), "seed")] if len(entry.runs) != usual else []
        return look.join([*_diverged(entry), *seeds])

    def loss(task: str, series: Series) -> Cell:
        entry = group.entries.get((task, series))
        if entry is None:
            return look.MISSING
        target = group.target(task)
        return Cell(
            look.number(entry.loss.mean, entry.loss.half_width),
            strong=math.isfinite(entry.score) and look.is_best(entry.score, scores[task], min),
            tint=0 if series == group.reference else look.tint(entry.score / target),
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
        f"Mean final training loss ± 95% over {look.plural(usual, 'seed')}, unless a cell says "
        f"otherwise; each task's lowest in bold; — was not run.{tints}"
    )
    yield look.matrix(group, loss, say("{}", caption))
    yield from _validation(
        group,
        lambda entry: entry.accuracy,
        look.percent,
        max,
        "Validation accuracy at the end ± 95%, each task's highest in bold",
    )
    yield from _validation(
        group,
        lambda entry: entry.val_loss,
        look.number,
        min,
        "Validation loss at the end ± 95%, each task's lowest in bold",
    )


def _diverged(entry: Entry) -> list[str]:
    """How many runs did, in words; none where none did."""
    if entry.diverged == len(entry.runs):
        return [f"all of {entry.diverged}"]
    return [f"{entry.diverged} of {len(entry.runs)} diverged"] if entry.diverged else []


def _validation(
    group: Group,
    estimate: Callable[[Entry], Estimate],
    show: Callable[[float, float], str],
    best: Callable[[Sequence[float]], float],
    caption: str,
) -> Iterator[Block]:
    """A table of what was measured on held-out data, of the tasks that have it."""
    found = {cell: estimate(entry) for cell, entry in group.entries.items()}
    tasks = [
        task
        for task in group.tasks
        if any(not math.isnan(found[task, s].mean) for s in group.series if (task, s) in found)
    ]
    if not tasks:
        return
    whole = {
        task: [
            found[task, series].mean
            for series in group.series
            if (entry := group.entries.get((task, series)))
            and not entry.diverged
            and not math.isnan(found[task, series].mean)
        ]
        for task in tasks
    }

    def cell(task: str, series: Series) -> Cell:
        entry = group.entries.get((task, series))
        if entry is None:
            return look.MISSING
        mean, half_width = found[task, series].mean, found[task, series].half_width
        if math.isnan(mean) and entry.diverged < len(entry.runs):
            return look.MISSING
        strong = not entry.diverged and look.is_best(mean, whole[task], best)
        text = "diverged" if math.isnan(mean) else show(mean, half_width)
        return Cell(text, strong=strong, small=look.join(_diverged(entry)))

    yield look.matrix(group, cell, say("{}", caption), tasks=tasks, folded=True)


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
            yield Cell(f"{figure.loss:.2f}", small=small) if figure else look.MISSING
            yield from (measured(task, series) for series in ours if series.name == name)
        yield from (measured(task, series) for series in new)

    def measured(task: str, series: Series) -> Cell:
        entry = group.entries.get((task, series))
        if entry is None:
            return look.MISSING
        shown = any(figure.accuracy is not None for figure in printed[task].values())
        accuracy = entry.accuracy.mean
        small = f"{100 * accuracy:.2f} %" if shown and not math.isnan(accuracy) else ""
        if entry.diverged:
            small = f"{entry.diverged} of {len(entry.runs)} diverged"
        return Cell(look.number(entry.loss.mean, entry.loss.half_width), small=small)

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
            "Final training loss as printed in {}, beside ours{}. The "
            "printed figures are means over initialisations, without intervals. The figures of "
            "learned rules depend on their weights, which differ.",
            Link(AAAI_2019, "https://arxiv.org/abs/1811.08996"),
            "; a second line is accuracy"
            if any(f.accuracy is not None for task in tasks for f in printed[task].values())
            else "",
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


def _curves(group: Group, key: str, lines: look.Lines) -> Iterator[Block]:
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
        name = f"{key}-curve-{len(panels)}-{look.slug(task)}"
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
    grey = [line.label for _, line in drawn if line.background]
    if grey:
        words += f" Grey: {look.join(grey)}."
    shown = [line for _, line in drawn]
    yield Figures((plots.legend(f"{key}-legend", shown),), say("{}", words), wide=True)
    yield Figures(tuple(panels), ())


def _rates(group: Group, key: str) -> Iterator[Block]:
    names = [n for n in group.names if any((task, n) in group.grids for task in group.tasks)]
    if not names:
        return
    marks = {"lowest": "lowest of the grid", "highest": "highest of the grid", "": ""}

    def cell(task: str, name: str) -> Cell:
        grid = group.grids.get((task, name))
        if grid is None:
            return look.MISSING
        return Cell(f"{grid.best:g}", small=marks[grid.end])

    yield Heading(3, say("Tuned learning rates"), f"{key}-rates")
    tried: dict[tuple[float, ...], list[str]] = {}
    for name in names:
        counts = Counter(
            group.grids[task, name].tried for task in group.tasks if (task, name) in group.grids
        )
        for grid, count in counts.items():
            tried.setdefault(grid, []).append(f"{name} ({look.plural(count, 'task')})")
    ends = sum(bool(grid.end) for grid in group.grids.values())
    if ends:
        words = f"at an end of its grid in {ends} of {look.plural(len(group.grids), 'cell')}: there"
        words += ", a still better one may lie beyond it"
    else:
        words = f"inside of its grid in all of {look.plural(len(group.grids), 'cell')}"
    yield Paragraph(
        say(
            "Grids are of half decades around an optimizer's default, and go on while the best is "
            f"at an end. The best is {words}."
        )
    )
    yield Table(
        (("optimizers", ""), ("learning rates", "")),
        tuple(
            (look.join(who), (Cell(look.join([f"{rate:g}" for rate in grid])),))
            for grid, who in tried.items()
        ),
        say("The grids that were tried"),
        folded=True,
    )
    yield Table(
        (("task", ""), *((name, "") for name in names)),
        tuple((task, tuple(cell(task, name) for name in names)) for task in group.tasks),
        say("The learning rate of the lowest mean final loss over the tuning seeds"),
        folded=len(names) * len(group.tasks) > 60,
    )


# What has to be known.


def _not_run(group: Group) -> Iterator[Text]:
    """What of the suites there is no run of, and, where Adam was run, of which optimizers."""
    ran = {name.partition("@")[0] for name in group.names}
    absent = [name for name in COMPARED if name not in ran]
    if group.reference and absent:
        yield say(
            f"Not run, of the {look.plural(len(COMPARED), 'optimizer')} meant to be compared: "
            f"{look.join(['{}'] * len(absent))}.",
            *map(Code, absent),
        )
    for suite in (SUITES[name] for name in group.suites if name in SUITES):
        lacking = [task for task in suite.tasks if task not in group.tasks]
        if lacking:
            count = f"{len(lacking)} of the {look.plural(len(suite.tasks), 'task')}"
            names = look.join(["{}"] * len(lacking))
            yield say(
                f"Of the suite {{}} {count} were not run: {names}.",
                Code(suite.name), *map(Code, lacking),
            )  # fmt: skip
        if group.steps != suite.steps:
            yield say(
                f"The suite {{}} has runs of {look.plural(suite.steps, 'step')}; these are of "
                f"{group.steps:,}.",
                Code(suite.name),
            )
        printed = [task for task in suite.tasks if paper_figures(task, group.steps)]
        alone = [task for task in printed if group.schedule != "none" or task in lacking]
        if alone:
            yield say(
                f"The papers print figures for {look.join(['{}'] * len(alone))} at "
                f"{look.plural(group.steps, 'step')} and a constant learning rate: such runs are "
                "not here.",
                *map(Code, alone),
            )


def _notes(group: Group, key: str) -> Iterator[Block]:
    notes: list[Text] = []
    usual = look.usual_seeds(group)
    missing = {
        series: [task for task in group.tasks if (task, series) not in group.entries]
        for series in group.series
    }
    cells = len(group.tasks) * len(group.series)
    absent = sum(map(len, missing.values()))
    if absent:
        lacking = [
            (Code(series.label), f" ({look.plural(len(tasks), 'task')})")
            for series, tasks in missing.items()
            if tasks
        ]
        notes.append(
            say(
                f"{absent} of {look.plural(cells, 'cell')} of the table are missing: "
                f"{look.join(['{}{}'] * len(lacking))}.",
                *(span for pair in lacking for span in pair),
            )
        )
    else:
        notes.append(say("Every optimizer of the table was run on every task of it."))
    notes += _not_run(group)
    odd = sum(len(entry.runs) != usual for entry in group.entries.values())
    count = f"{look.plural(usual, 'seed').capitalize()} a cell"
    notes.append(
        say(f"{count}, except in {look.plural(odd, 'cell')}, where the number is written.")
        if odd
        else say(f"{count}, everywhere.")
    )
    diverged = sum(run.diverged or not math.isfinite(run.final_loss) for run in group.runs)
    notes.append(say(f"{diverged} of {look.plural(len(group.runs), 'run')} diverged."))
    untuned = [
        series for series in group.main_series if not series.learned and series.track != TUNED
    ]
    if untuned:
        notes.append(
            say(f"Without tuning runs, so not at their best: {look.join(['{}'] * len(untuned))}.",
                *(Code(series.label) for series in untuned))
        )  # fmt: skip
    sources = Counter(run.source or "unrecorded" for run in group.runs)
    if len(sources) > 1:
        made = [
            f"{look.version(source)} ({look.plural(n, 'run')})"
            for source, n in sources.most_common()
        ]
        notes.append(say("Runs are from several versions of the program: {}.", look.join(made)))
    if len({run.machine for run in group.runs}) > 1:
        notes.append(say("Runs are from several machines: only times of one are compared."))
    yield Heading(3, say("What to keep in mind"), f"{key}-notes")
    notes.append(
        say(
            "Intervals cover seeds only: not the choice of tasks, nor the chance in tuning, nor, "
            "for a learned rule, that its weights are one outcome of meta-training."
        )
    )
    yield Bullets(tuple(notes))
