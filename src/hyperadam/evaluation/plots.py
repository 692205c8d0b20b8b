"""The report's plots, by Matplotlib, as SVG.

In a page, ink and series take their colours from the page's variables, so that one drawing serves
a light and a dark page; as a file it has a white ground. Text stays text. Nothing in a drawing
depends on the date or on a random number.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperadam.evaluation.document import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

INK = "#23272f"
FAINT = "#d9dce1"
OTHERS = "#a3a9b3"
COLORS = (
    "#d55e00",
    "#0072b2",
    "#009e73",
    "#cc79a7",
    "#c98a00",
    "#56b4e9",
    "#6a4c93",
    "#7a5c3e",
)
"""From Okabe and Ito's palette for colour-blind readers; yellow and black, which vanish on one of
the grounds, have given way."""

_VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    OTHERS: "--others",
    **{color: f"--series-{index}" for index, color in enumerate(COLORS)},
}

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

SMALL = (3.5, 2.35)
WIDE = (4.8, 3.0)
"""Inches: with text of 9 points both are legible at a phone's width."""

LEGEND_CHARACTERS = 36
"""Longer names take a line of their own."""

MAX_LAYERS = 6
LAYER_CHARACTERS = 20
"""Of a layer's name in a legend, so that two stand side by side below a plot."""
NEVER = (104, 122)
"""Where series that never reached the target are drawn, in % of a run: each has its own place."""


@dataclasses.dataclass(frozen=True)
class Line:
    """How a series is drawn.

    Attributes:
        label: its name.
        color: the same in every plot of a report.
        dashed: another track of the same optimizer.
        background: drawn thin and grey, to show the field.
    """

    label: str
    color: str = OTHERS
    dashed: bool = False
    background: bool = False

    def style(self) -> dict[str, Any]:
        """Arguments of Matplotlib's ``plot``."""
        if self.background:
            return {"color": OTHERS, "linewidth": 0.7, "alpha": 0.8, "zorder": 1}
        dashes = (0, (3, 1.5)) if self.dashed else "solid"
        return {"color": self.color, "linewidth": 1.5, "linestyle": dashes, "zorder": 3}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One series of a plot: a mean, and a band where there are seeds for one."""

    line: Line
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _draw(
    name: str,
    description: str,
    paint: Callable[[Axes], None],
    size: tuple[float, float] = SMALL,
) -> Figure:
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "path.simplify": True,
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": FAINT,
        "grid.linewidth": 0.5,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    with mpl.rc_context(style):
        figure = Canvas(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    drawing = _tidy(buffer.getvalue(), name)
    return Figure(name, description, _for_page(drawing), _for_file(drawing))


def _tidy(svg: str, name: str) -> str:
    """Shorter, and with ids of its own, since a page holds many drawings."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)

    def rounded(match: re.Match[str]) -> str:
        return re.sub(r"(-?\d+\.\d)\d+", r"\1", match.group(0))

    svg = re.sub(r'\b(?:d|x|y|x1|y1|x2|y2)="[^"]*"', rounded, svg)
    svg = re.sub(r"'DejaVu Sans'(?:, (?:'[^']*'|[\w-]+))*", FONT, svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _for_page(svg: str) -> str:
    # The page gives the width; the view box keeps the proportions.
    svg = re.sub(r'^<svg ([^>]*?)\bwidth="[^"]*"', r"<svg \1", svg)
    svg = re.sub(r'^<svg ([^>]*?)\bheight="[^"]*"', r"<svg \1", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)


def _for_file(svg: str) -> str:
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return re.sub(r"^(<svg [^>]*>)", rf"\1\n{ground}", svg) + "\n"


def _log_ticks(axis: Axis, plain: bool = False, most: int = 6) -> None:
    """Few and round tick labels on a logarithmic axis, far enough apart for ``most`` of them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    low, high = sorted(axis.get_view_interval())
    roundest_first = (1.0, 3.0, 2.0, 5.0, 1.5, 7.0, 4.0, 6.0, 8.0, 9.0, 1.2, 2.5)
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    chosen: list[float] = []
    for value in (sub * power for sub in roundest_first for power in powers):
        apart = [abs(np.log(value / other)) for other in chosen]
        if low <= value <= high and min(apart, default=np.inf) >= np.log(high / low) / most:
            chosen.append(value)
    ends = "×" if plain else ""
    axis.set_major_locator(FixedLocator(sorted(chosen)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}{ends}"))
    axis.set_minor_formatter(NullFormatter())


def legend(name: str, lines: Sequence[Line]) -> Figure:
    """The lines' names, once for all plots of a group; of grey ones together.

    Args:
        name: of the file.
        lines: those of the plots.
    """
    shown = [line for line in lines if not line.background]
    grey = [line.label for line in lines if line.background]
    if grey:
        words = ", ".join(grey)
        if len(words) > LEGEND_CHARACTERS:
            words = f"{len(grey)} others"
        shown = [*shown, Line(words, background=True)]
    columns = 2 if max(len(line.label) for line in shown) <= LEGEND_CHARACTERS else 1
    rows = -(-len(shown) // columns)

    def paint(axes: Axes) -> None:
        axes.set_axis_off()
        handles = [axes.plot([], [], label=line.label, **line.style())[0] for line in shown]
        axes.legend(handles=handles, loc="center left", ncols=columns, borderpad=0, mode="expand")

    names = ", ".join(line.label for line in shown)
    return _draw(name, f"legend: {names}", paint, (WIDE[0], 0.1 + 0.21 * rows))


def learning_curves(
    name: str,
    task: str,
    steps: np.ndarray,
    curves: Sequence[Curve],
    *,
    total: int,
    top: float,
    target: float,
) -> Figure:
    """Loss over steps, with bands.

    Args:
        name: of the file.
        task: the title.
        steps: of each point.
        curves: those in colour are drawn last, and of them the first one on top.
        total: steps of a run.
        top: where the axis of losses ends, so that a diverging series does not flatten the others.
        target: a loss that gets a fine line; NaN for none.
    """

    def paint(axes: Axes) -> None:
        for curve in reversed(curves):
            axes.plot(steps, curve.mean, **curve.line.style())
            if not curve.line.background and np.isfinite(curve.low).any():
                axes.fill_between(
                    steps, curve.low, curve.high, color=curve.line.color, alpha=0.18, linewidth=0
                )
        if np.isfinite(target):
            axes.axhline(target, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_yscale("log")
        least = min((np.nanmin(curve.mean) for curve in curves), default=top)
        axes.set_ylim(max(least * 0.8, top * 1e-7), top)
        axes.set_xlim(0, total)
        axes.locator_params(axis="x", nbins=5)
        _log_ticks(axes.yaxis)
        axes.set_title(task, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.grid(axis="y")

    names = ", ".join(curve.line.label for curve in curves if not curve.line.background)
    return _draw(name, f"training loss over steps on {task}: {names}", paint)


def performance_profile_plot(
    name: str, factors: np.ndarray, shares: Sequence[np.ndarray], lines: Sequence[Line]
) -> Figure:
    """Share of tasks within a factor of the best, one line a series.

    Args:
        name: of the file.
        factors: of the best loss.
        shares: of tasks, for each line.
        lines: the series.
    """

    def paint(axes: Axes) -> None:
        for share, line in reversed(list(zip(shares, lines, strict=True))):
            axes.step(factors, 100 * share, where="post", **line.style())
        axes.set_xscale("log")
        axes.set_xlim(1, factors[-1])
        axes.set_ylim(0, 103)
        _log_ticks(axes.xaxis, plain=True)
        axes.set_xlabel("final loss, as a multiple of the best on the task")
        axes.set_ylabel("% of tasks")
        axes.grid()

    return _draw(name, "performance profile: " + ", ".join(x.label for x in lines), paint, WIDE)


def ratio_plot(
    name: str,
    rows: Sequence[tuple[Line, float, float, float]],
    reference: str,
) -> Figure:
    """Ratios with intervals, one row a series, the best on top.

    Args:
        name: of the file.
        rows: line, ratio, lower and upper end.
        reference: the name of what is at 1.
    """
    finite = [value for row in rows for value in row[1:] if np.isfinite(value)] or [1.0]
    low, high = 0.85 * min(*finite, 1.0), 1.18 * max(*finite, 1.0)

    def paint(axes: Axes) -> None:
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        for row, (line, ratio, left, right) in enumerate(rows):
            color = OTHERS if line.background else line.color
            if not np.isfinite(ratio):
                axes.text(high, row, "diverges ", ha="right", va="center", fontsize=8)
                continue
            if np.isfinite(left):
                axes.plot([left, min(right, high)], [row, row], color=color, linewidth=1.4)
            fill = "none" if line.dashed else color
            axes.plot(ratio, row, "o", color=color, markersize=5, markerfacecolor=fill)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        _log_ticks(axes.xaxis, plain=True, most=5)
        axes.set_yticks(range(len(rows)), [row[0].label for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        # Long names of series leave the axis little room: the label ends where it does.
        axes.set_xlabel(f"final loss as a multiple of {reference}", loc="right")
        axes.grid(axis="x")

    words = ", ".join(f"{line.label} {ratio:.2f}" for line, ratio, _, _ in rows)
    return _draw(
        name, f"interquartile mean of loss ratios: {words}", paint, (WIDE[0], 0.7 + 0.2 * len(rows))
    )


def _dots(
    axes: Axes, tasks: Sequence[str], series: Sequence[tuple[Line, Sequence[float] | np.ndarray]]
) -> None:
    """One row a task, one dot a series, the first one on top; NaN is not drawn."""
    for row in range(len(tasks)):
        axes.axhline(row, color=FAINT, linewidth=0.5, zorder=0)
    for line, values in reversed(series):
        fill = "none" if line.dashed else line.color
        style: dict[str, Any] = {
            "color": line.color,
            "markerfacecolor": fill,
            "markersize": 5,
            "alpha": 0.9,
        }
        axes.plot(values, range(len(tasks)), "o", zorder=3, **style)
    axes.set_ylim(len(tasks) - 0.4, -0.6)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def steps_plot(
    name: str,
    tasks: Sequence[str],
    series: Sequence[tuple[Line, Sequence[float] | np.ndarray]],
    reference: str,
) -> Figure:
    """Steps to the target in % of the run, one row a task.

    Args:
        name: of the file.
        tasks: the rows.
        series: a line, and a value for each task: infinite for never, NaN for not run.
        reference: the name of whose loss is the target.
    """
    places = np.linspace(*NEVER, len(series) + 2)[1:-1]

    def paint(axes: Axes) -> None:
        reached = [(line, np.where(np.isfinite(v), v, np.nan)) for line, v in series]
        _dots(axes, tasks, reached)
        axes.axvspan(*NEVER, color=FAINT, alpha=0.4, linewidth=0)
        for place, (line, values) in zip(places, series, strict=True):
            rows = np.flatnonzero(np.isinf(values))
            axes.plot([place] * len(rows), rows, "x", color=line.color, markersize=3.5, zorder=2)
        axes.set_xlim(0, NEVER[1])
        axes.set_xticks(
            [0, 25, 50, 75, 100, sum(NEVER) / 2], ["0", "25", "50", "75", "100", "never"]
        )
        axes.set_xlabel("% of the run's steps")

    names = ", ".join(line.label for line, _ in series)
    description = f"steps until the final loss of {reference}: {names}"
    return _draw(name, description, paint, (WIDE[0], 0.7 + 0.2 * len(tasks)))


def time_plot(
    name: str,
    tasks: Sequence[str],
    series: Sequence[tuple[Line, Sequence[float] | np.ndarray]],
    reference: str,
) -> Figure:
    """Wall-clock time to the target over the reference's own, one row a task.

    Args:
        name: of the file.
        tasks: the rows.
        series: a line, and a ratio for each task; NaN for never.
        reference: the name of whose loss is the target.
    """
    known = [value for _, values in series for value in values if np.isfinite(value)] or [1.0]

    def paint(axes: Axes) -> None:
        _dots(axes, tasks, series)
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_xscale("log")
        axes.set_xlim(min(*known, 0.8) * 0.85, max(*known, 1.25) * 1.18)
        _log_ticks(axes.xaxis, plain=True)
        axes.set_xlabel(f"time, as a multiple of that of {reference}")

    names = ", ".join(line.label for line, _ in series)
    description = f"wall-clock time until the final loss of {reference}: {names}"
    return _draw(name, description, paint, (WIDE[0], 0.7 + 0.2 * len(tasks)))


def quantiles_plot(
    name: str, title: str, at: np.ndarray, mean_KH: np.ndarray, quantiles_K5: np.ndarray, color: int
) -> Figure:
    """Decay rates over a run: channels' means, and quantiles over coordinates and channels.

    Args:
        name: of the file.
        title: of the plot.
        at: steps.
        mean_KH: thin lines.
        quantiles_K5: 5, 25, 50, 75 and 95%.
        color: index of :data:`COLORS`.
    """
    ink = COLORS[color]

    def paint(axes: Axes) -> None:
        axes.fill_between(at, quantiles_K5[:, 0], quantiles_K5[:, 4], color=ink, alpha=0.15, lw=0)
        axes.fill_between(at, quantiles_K5[:, 1], quantiles_K5[:, 3], color=ink, alpha=0.25, lw=0)
        axes.plot(at, mean_KH, color=OTHERS, linewidth=0.5)
        axes.plot(at, quantiles_K5[:, 2], color=ink, linewidth=1.8)
        axes.set_ylim(0.1 * np.floor(10 * min(np.nanmin(quantiles_K5), np.nanmin(mean_KH))), 1)
        _over_steps(axes, at, title)

    return _draw(name, f"{title} over steps: channels, median and quantiles", paint)


def channels_plot(name: str, title: str, at: np.ndarray, mean_KH: np.ndarray) -> Figure:
    """One thin line a channel; those that end highest and lowest are in colour.

    Args:
        name: of the file.
        title: of the plot.
        at: steps.
        mean_KH: one column a channel.
    """
    order = np.argsort(mean_KH[-1])

    def paint(axes: Axes) -> None:
        axes.axhline(0, color=INK, linewidth=0.6, linestyle=(0, (1, 2)))
        axes.plot(at, mean_KH[:, order[3:-3]], color=OTHERS, linewidth=0.7)
        axes.plot(at, mean_KH[:, order[:3]], color=COLORS[1], linewidth=1.3)
        axes.plot(at, mean_KH[:, order[-3:]], color=COLORS[0], linewidth=1.3)
        _over_steps(axes, at, title)

    return _draw(name, f"{title} over steps, one line a channel", paint)


def layers_plot(
    name: str, title: str, at: np.ndarray, values_KL: np.ndarray, layers: Sequence[str], log: bool
) -> Figure:
    """One line a layer, the first ones and the last ones of the network named.

    Args:
        name: of the file.
        title: of the plot.
        at: steps.
        values_KL: one column a layer.
        layers: their names.
        log: whether the axis is logarithmic.
    """
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(MAX_LAYERS, len(layers))).astype(int))

    def paint(axes: Axes) -> None:
        for layer in range(len(layers)):
            if layer not in chosen:
                axes.plot(at, values_KL[:, layer], color=OTHERS, linewidth=0.5)
        for color, layer in zip(COLORS, chosen, strict=False):
            label = _shorten(layers[layer])
            axes.plot(at, values_KL[:, layer], color=color, linewidth=1.3, label=label)
        if log and np.nanmin(values_KL) > 0:
            axes.set_yscale("log")
            _log_ticks(axes.yaxis)
        else:
            axes.ticklabel_format(axis="y", useOffset=False)
        _over_steps(axes, at, title)
        axes.legend(
            fontsize=7.5, ncols=2, loc="upper left", bbox_to_anchor=(-0.02, -0.24), borderpad=0
        )

    rows = -(-len(chosen) // 2)
    size = (SMALL[0], SMALL[1] + 0.17 * rows)
    return _draw(name, f"{title} over steps, one line a layer", paint, size)


def _shorten(name: str) -> str:
    """A layer's name without its middle, if it is long."""
    if len(name) <= LAYER_CHARACTERS:
        return name
    start = LAYER_CHARACTERS // 2 - 1
    return f"{name[:start]}…{name[start + 1 - LAYER_CHARACTERS :]}"


def _over_steps(axes: Axes, at: np.ndarray, title: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xscale("log")
    axes.set_xlim(at[0], max(at[-1], at[0] + 1))
    _log_ticks(axes.xaxis)
    axes.set_xlabel("step")
    axes.grid(axis="y")
