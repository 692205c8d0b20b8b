"""Figures that sum up training runs: pure functions of arrays.

Shapes: S seeds, T steps, K tasks, O optimizers. A loss that is not finite is a run that diverged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hyperadam.evaluation.records import FINAL_STEPS

CONFIDENCE = 0.95
RESAMPLES = 1000
TRIMMED = 0.25
"""What the interquartile mean leaves out at each end."""

LOSS_FLOOR = 1e-6
"""Losses below it count as it in ratios: past it, a ratio compares rounding errors."""


def bootstrap_interval(
    values_S: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """95% interval of the mean over seeds, by the percentile bootstrap (Efron, 1979).

    Args:
        values_S: one value a seed along the first dimension; further dimensions are kept.
        resamples: how many times the seeds are drawn with replacement.
        seed: of those draws; the same for all further dimensions.

    Returns:
        Lower and upper ends, without the first dimension; NaN where there is one seed only.
    """
    if len(values_S) < 2:
        unknown = np.full(values_S.shape[1:], np.nan)
        return unknown, unknown
    from scipy.stats import bootstrap

    result = bootstrap(
        (values_S,),
        np.mean,
        axis=0,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return result.confidence_interval.low, result.confidence_interval.high


def paired_sign(ours_S: np.ndarray, theirs_S: np.ndarray) -> int:
    """Whether one of two is lower beyond the scatter of seeds.

    Args:
        ours_S: a loss a seed, finite.
        theirs_S: the other's, of the same seeds.

    Returns:
        -1 where the 95% interval of the mean difference is below 0, 1 where it is above 0, else 0,
        also where there is one seed only.
    """
    low, high = bootstrap_interval(ours_S - theirs_S)
    return int(low > 0) - int(high < 0)


def interquartile_mean(values: np.ndarray) -> float:
    """Mean of the middle half of all values (Agarwal et al., NeurIPS 2021).

    Runs that diverged (infinite) are left out like any others as long as they are less than a
    quarter; with more, the mean is infinite.

    >>> interquartile_mean(np.array([0.0, 1.0, 3.0, 90.0]))
    2.0
    """
    from scipy.stats import trim_mean

    return float(trim_mean(np.ravel(values), TRIMMED))


def interquartile_interval(
    values_KS: Sequence[np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95% interval of :func:`interquartile_mean`, drawing seeds within each task.

    Args:
        values_KS: the values of each task; tasks may differ in their numbers of seeds.
        resamples: how many times.
        seed: of the draws.

    Returns:
        Lower and upper end; NaN where no task has two seeds.
    """
    if max(len(values) for values in values_KS) < 2:
        return np.nan, np.nan
    from scipy.stats import trim_mean

    generator = np.random.default_rng(seed)
    drawn = [
        values[generator.integers(len(values), size=(resamples, len(values)))]
        for values in values_KS
    ]
    means = trim_mean(np.concatenate(drawn, axis=1), TRIMMED, axis=1)
    tail = 50 * (1 - CONFIDENCE)
    # Of the values themselves, since a mean between an infinite and a finite one is not defined.
    low, high = np.percentile(means, (tail, 100 - tail), method="closest_observation")
    return float(low), float(high)


def median_task_interval(
    values_KS: Sequence[np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95% interval of the median over tasks of their means, drawing seeds within each task.

    Args:
        values_KS: the values of each task, finite; tasks may differ in their numbers of seeds.
        resamples: how many times.
        seed: of the draws.

    Returns:
        Lower and upper end; NaN where a task has one seed only.
    """
    if min(len(values) for values in values_KS) < 2:
        return np.nan, np.nan
    generator = np.random.default_rng(seed)
    means = [
        values[generator.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
        for values in values_KS
    ]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.median(means, axis=0), (tail, 100 - tail))
    return float(low), float(high)


def log_ratios(losses: np.ndarray, reference: float) -> np.ndarray:
    """Natural logarithm of losses over a reference loss of the same task.

    This is how losses are normalised before tasks are compared: half the reference's loss is as
    far below 0 as twice its loss is above, whatever the task's scale.

    Args:
        losses: any shape; not finite becomes infinite.
        reference: for example tuned Adam's mean final loss.
    """
    clean = np.where(np.isfinite(losses), losses, np.inf)
    ratios = np.log(np.maximum(clean, LOSS_FLOOR)) - np.log(max(reference, LOSS_FLOOR))
    return np.asarray(ratios)


def performance_ratios(losses_KO: np.ndarray) -> np.ndarray:
    """Each optimizer's final loss over the best one on the same task (Dolan and Moré, 2002).

    Args:
        losses_KO: not finite where a run diverged.

    Returns:
        (K, O), 1 for the best of a row; infinite where diverged.
    """
    clean = np.maximum(np.where(np.isfinite(losses_KO), losses_KO, np.inf), LOSS_FLOOR)
    best = clean.min(axis=1, keepdims=True)
    return np.where(np.isfinite(clean), clean / np.where(np.isfinite(best), best, 1.0), np.inf)


def performance_profile(losses_KO: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Share of tasks on which an optimizer's loss is within a factor of the best one's.

    Args:
        losses_KO: see :func:`performance_ratios`.
        factors: (F), from 1 on.

    Returns:
        (O, F), between 0 and 1.
    """
    ratios_KO = performance_ratios(losses_KO)
    return np.asarray((ratios_KO[:, :, None] <= factors).mean(axis=0))


def trailing_mean(curve_T: np.ndarray, window: int = FINAL_STEPS) -> np.ndarray:
    """Mean over the last ``window`` steps at each step; over fewer at the start.

    >>> trailing_mean(np.array([4.0, 2.0, 0.0]), window=2)
    array([4., 3., 1.])
    """
    steps = np.arange(1, len(curve_T) + 1)
    sums = np.cumsum(curve_T)
    before = np.concatenate([np.zeros(min(window, len(curve_T))), sums])[: len(curve_T)]
    return np.asarray((sums - before) / np.minimum(steps, window))


def steps_to_target(curves_ST: np.ndarray, target: float) -> int | None:
    """First step at which the trailing mean of the seeds' mean loss is at or below a target.

    Args:
        curves_ST: losses after each update.
        target: for example tuned Adam's mean final loss.

    Returns:
        Counted from 1, and not before the mean is over as many steps as a final loss is; None if it
        never gets there.
    """
    smooth_T = trailing_mean(curves_ST.mean(axis=0))
    first = min(FINAL_STEPS, len(smooth_T)) - 1
    # The target is itself such a mean, added up in another order.
    (reached,) = np.nonzero(smooth_T[first:] <= target * (1 + 1e-9))
    return first + int(reached[0]) + 1 if len(reached) else None


def bin_means(curves_ST: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Curves of at most ``bins`` points, each the mean over equally many steps.

    Args:
        curves_ST: any number of curves.
        bins: how many points at most; the last may be of fewer steps.

    Returns:
        The mean step of each point, from 1, and the (S, points) means.
    """
    total = curves_ST.shape[1]
    starts = np.arange(0, total, bin_size(total, bins))
    sizes = np.diff([*starts, total])
    means = np.add.reduceat(curves_ST, starts, axis=1) / sizes
    return starts + (sizes + 1) / 2, means


def bin_size(steps: int, bins: int) -> int:
    """How many steps go into a point of :func:`bin_means`."""
    return -(-steps // bins)


def geometric(function: Callable[[np.ndarray], float], log_values: np.ndarray) -> float:
    """``function`` of logarithms, back on the scale of ratios; infinite stays infinite.

    Args:
        function: such as :func:`interquartile_mean`.
        log_values: of :func:`log_ratios`.
    """
    return float(np.exp(function(log_values)))
