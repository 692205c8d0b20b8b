"""What a learned rule does along a run, from its traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hyperadam.evaluation import plots
from hyperadam.evaluation.document import (
    Block,
    Code,
    Figure,
    Figures,
    Heading,
    Paragraph,
    Strong,
    Text,
    say,
)
from hyperadam.evaluation.records import Record
from hyperadam.evaluation.series import Group

MAX_TRACES = 6
"""Per group: beyond it the page would become too large."""

PRIOR_STD = 1.0
"""Standard deviation of the update's prior, as the papers have it."""

NEAR_PRIOR = 0.02
"""How far from the prior's a standard deviation is still called the prior's, relatively."""


def rule_blocks(group: Group, key: str) -> Iterator[Block]:
    """The section on traced runs; nothing where there are none.

    Args:
        group: whose runs.
        key: how anchors and files of plots begin.
    """
    traced = [run for run in group.runs if run.trace and run.trace["at"]]
    if not traced:
        return
    yield Heading(3, say("What the learned rule does"), f"{key}-rule")
    yield Paragraph(
        say(
            "The rule keeps, for every parameter, moving averages of the gradient and of its "
            "square in several channels, as Adam does in one. A network shared by all parameters "
            "chooses at every step how slowly each average forgets (the decay rates {} and {}, "
            "where Adam has 0.9 and 0.999), and how much each channel's direction weighs in the "
            "update ({}). A variational rule draws its update from a normal distribution: its "
            "standard deviation and the {}, the mean's size over it, say how sure it is.",
            Strong("β"), Strong("γ"), Strong("ρ"), Strong("signal-to-noise ratio"),
        )
    )  # fmt: skip
    yield Paragraph(
        say(
            "In the plots of decay rates the coloured line is the median over coordinates and "
            "channels, the shades hold 50% and 90% of them, and grey lines are the channels' "
            "means. Of the weights, the three channels that end highest are orange, the three "
            "lowest blue."
        )
    )
    yield from _prior_words(traced)
    chosen = _spread(group, traced, MAX_TRACES)
    if len(traced) > len(chosen):
        yield Paragraph(
            say(
                "Shown are {} of {} traced runs, of as many kinds of network and optimizers as "
                "there is room for.",
                str(len(chosen)), str(len(traced)),
            )
        )  # fmt: skip
    for index, run in enumerate(chosen):
        assert run.trace is not None
        panels = tuple(_trace_panels(run.trace, f"{key}-trace-{index}"))
        yield Figures(panels, _trace_words(run, run.trace))


def _spread(group: Group, traced: Sequence[Record], count: int) -> list[Record]:
    """So many traces, of different networks and optimizers: of weights that are used in several
    ways first, for they are what the comparison is about, then in the order of the series."""
    bases = [family[0] for family in group.families]
    number = {s: index for index, s in enumerate(dict.fromkeys([*bases, *group.series]))}
    place: dict[tuple[str, str | None], int] = {}
    for (_, series), entry in group.entries.items():
        weights = entry.runs[0].optimizer, entry.runs[0].weights
        place[weights] = min(number[series], place.get(weights, number[series]))
    by_place: dict[tuple[str, str, str | None], Record] = {}
    for run in sorted(traced, key=lambda run: run.lr != run.default_lr):  # the default's track
        by_place.setdefault((run.task, run.optimizer, run.weights), run)

    def order(run: Record) -> int:
        return place[run.optimizer, run.weights]

    left = sorted(by_place.values(), key=order)
    chosen: list[Record] = []
    while left and len(chosen) < count:
        kinds = Counter(_kind(run.task) for run in chosen)
        optimizers = Counter((run.optimizer, run.weights) for run in chosen)
        first = order(chosen[0]) if chosen else order(left[0])
        own = [run for run in left if order(run) == first and not kinds[_kind(run.task)]]
        # A run of the first optimizer on each kind of network, then the rarest of what is left.
        rarest = (
            own[0]
            if own
            else min(
                left,
                key=lambda run: (
                    kinds[_kind(run.task)] + optimizers[run.optimizer, run.weights],
                    kinds[_kind(run.task)],
                ),
            )
        )
        left.remove(rarest)
        chosen.append(rarest)
    return sorted(chosen, key=order)


def _kind(task: str) -> str:
    """Of network: ``mnist-mlp6-sigmoid`` is an ``mlp``, ``digits-cnn2-bn`` a ``cnn``."""
    _, _, network = task.partition("-")
    return network.split("-")[0].rstrip("0123456789")


def _prior_words(traced: Sequence[Record]) -> Iterator[Block]:
    """That the variance tells nothing, where it is the prior's in all traces."""
    stds = [std for run in traced if (std := _array(run.trace or {}, "std")) is not None]
    known = [std[np.isfinite(std)] for std in stds]
    with_variance = [std for std in known if std.size]
    if not with_variance:
        return
    farthest = max(float(np.abs(std / PRIOR_STD - 1).max()) for std in with_variance)
    if farthest <= NEAR_PRIOR:
        yield Paragraph(
            say(
                "In all of these runs the posterior's standard deviation is that of its prior, "
                "within {} %, at every step and in every layer: {}. Its plots show a flat line.",
                f"{100 * farthest:.1g}",
                Strong("the predicted variance says nothing here about where the rule is sure"),
            )
        )


def _array(trace: Mapping[str, Any], name: str) -> np.ndarray | None:
    """One of a trace's tables; NaN where it has nothing, None where it is left out."""
    values = trace.get(name)
    return None if values is None else np.array(values, dtype=float)


def _trace_panels(trace: Mapping[str, Any], key: str) -> Iterator[Figure]:
    at = np.array(trace["at"], dtype=float) + 1  # steps are counted from 0 in a trace
    layers = [str(layer) for layer in trace["layers"]]
    for color, (name, title) in enumerate(
        (("beta", "decay β of the gradient's mean"), ("gamma", "decay γ of its square"))
    ):
        mean, quantiles = _array(trace, name), _array(trace, f"{name}_quantiles")
        if mean is not None and quantiles is not None and np.isfinite(quantiles).any():
            index = (0, 1)[color]
            yield plots.quantiles_plot(f"{key}-{name}", title, at, mean, quantiles, index)
    rho = _array(trace, "rho")
    if rho is not None:
        yield plots.channels_plot(f"{key}-rho", "weight ρ of each channel", at, rho)
    for name, title in (
        ("beta_layers", "decay β by layer"),
        ("gamma_layers", "decay γ by layer"),
        ("rho_layers", "weight ρ by layer"),
        ("std", "posterior's standard deviation"),
        ("snr", "signal-to-noise ratio"),
        ("update_rms", "size of the update (rms)"),
    ):
        values = _array(trace, name)
        if values is not None and np.isfinite(values).any():
            log = name in ("snr", "update_rms")
            yield plots.layers_plot(f"{key}-{name}", title, at, values, layers, log)


def _range(values_L: np.ndarray) -> str:
    low, high = (f"{value:.3g}" for value in (np.nanmin(values_L), np.nanmax(values_L)))
    return f"at {low} in every layer" if low == high else f"between {low} and {high} by layer"


def _trace_words(run: Record, trace: Mapping[str, Any]) -> Text:
    sentences = []
    beta, gamma = _array(trace, "beta_quantiles"), _array(trace, "gamma_quantiles")
    if beta is not None and gamma is not None:
        sentences.append(
            f" At the end the median β is {beta[-1, 2]:.3f}, an average over about "
            f"{1 / max(1 - beta[-1, 2], 1e-6):.3g} steps, and the median γ is {gamma[-1, 2]:.3f}."
        )
    std, snr = _array(trace, "std"), _array(trace, "snr")
    if std is not None and np.isfinite(std[-1]).any():
        sentences.append(f" The posterior's standard deviation ends {_range(std[-1])}")
        if snr is not None and np.isfinite(snr[-1]).any():
            sentences.append(f", the signal-to-noise ratio {_range(snr[-1])}")
        sentences.append(".")
    return say(
        "{} on {} at lr {} from seed {}.{}", Code(run.optimizer), Code(run.task), f"{run.lr:g}",
        str(run.seed), "".join(sentences),
    )  # fmt: skip
