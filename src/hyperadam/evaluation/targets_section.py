"""A report's section on speed: steps and time until the reference's final loss."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hyperadam.evaluation import look, plots
from hyperadam.evaluation.document import Block, Cell, Code, Figures, Heading, Paragraph, say
from hyperadam.evaluation.series import BEGUN, Group, Series, final_window


def targets_blocks(group: Group, key: str, lines: look.Lines) -> Iterator[Block]:
    """The section on speed; nothing where there is no reference.

    Args:
        group: whose runs.
        key: how anchors and files of plots begin.
        lines: how series are drawn.
    """
    reference = group.reference
    if reference is None or not group.compared_tasks:
        return
    tasks = group.begun_tasks
    yield Heading(3, say("Steps and time to {}", Code(reference.label)), f"{key}-targets")
    left_out = [task for task in group.compared_tasks if task not in tasks]
    if left_out:
        yield Paragraph(
            say(
                f"Without {look.join(['{}'] * len(left_out))}: there {{}} ends less than "
                f"{100 * (1 - BEGUN):.0f} % below its first loss, which takes no time to reach.",
                *map(Code, left_out), Code(reference.label),
            )
        )  # fmt: skip
    if tasks:
        yield from _speed(group, reference, tasks, key, lines)
    yield from _costs(group)


def _speed(
    group: Group, reference: Series, tasks: list[str], key: str, lines: look.Lines
) -> Iterator[Block]:
    """Steps and time on the tasks that the reference has begun to learn."""
    steps = {
        (task, series): entry.steps_to(group.target(task))
        for (task, series), entry in group.entries.items()
        if task in tasks
    }

    def share(task: str, series: Series) -> float:
        if (task, series) not in steps:
            return math.nan
        reached = steps[task, series]
        return math.inf if reached is None else 100 * reached / group.steps

    def slowness(task: str, series: Series) -> float:
        pair = group.seconds_to(task, series) if (task, series) in steps else None
        return pair[0] / pair[1] if pair else math.nan

    def steps_cell(task: str, series: Series) -> Cell:
        if (task, series) not in steps:
            return look.MISSING
        reached = steps[task, series]
        return Cell("never" if reached is None else f"{reached:,}")

    def seconds_cell(task: str, series: Series) -> Cell:
        if (task, series) not in steps:
            return look.MISSING
        if steps[task, series] is None:
            return Cell("never")
        pair = group.seconds_to(task, series)
        if pair is None:
            return Cell("other machine")
        ratio = pair[0] / pair[1]
        return Cell(look.seconds(pair[0]) if series == reference else look.ratio(ratio))

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
            "run diverged; second in wall-clock time, of those that have runs on a machine where "
            "it has some too. Further left is faster; colours as above.",
            str(final_window(group.steps)), Code(reference.label),
        ),
        wide=True,
    )  # fmt: skip
    yield look.matrix(
        group,
        steps_cell,
        say("The same in steps, for every optimizer; never: not within the run, or a run diverged"),
        tasks=tasks,
        folded=True,
    )
    yield look.matrix(
        group,
        seconds_cell,
        say(
            "Wall-clock time to the same loss, as a multiple of that of {}, whose own is in "
            "seconds: those steps at the time a step of the table below, on a machine that both "
            "have runs on. It was not idle, and versions of the program differ: a factor of two "
            "or three can come of that",
            Code(reference.label),
        ),
        tasks=tasks,
        folded=True,
    )


def _costs(group: Group) -> Iterator[Block]:
    """Time a step."""

    def cost(task: str, series: Series) -> Cell:
        if (task, series) not in group.entries:
            return look.MISSING
        time = group.step_time(task, series)
        if time is None:
            return Cell("diverged")
        own, whole = (f"{1e3 * seconds:.3g} ms" for seconds in (time.own, time.whole))
        return Cell(own, small=f"of {whole}")

    yield look.matrix(
        group,
        cost,
        say(
            "Time a step: the optimizer's own, of the whole training loop's without measurements. "
            "Other work may have been on the machine, so the optimizer's part is that of its "
            "fastest run, tuning included, and the rest, batch and gradient, that of the fastest "
            "run of any optimizer"
        ),
        folded=True,
    )
