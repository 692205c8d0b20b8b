"""Figures over runs, against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hyperadam.evaluation.metrics import (
    LOSS_FLOOR,
    bin_means,
    bin_size,
    bootstrap_interval,
    geometric,
    interquartile_interval,
    interquartile_mean,
    log_ratios,
    median_task_interval,
    paired_sign,
    performance_profile,
    performance_ratios,
    steps_to_target,
    trailing_mean,
)
from hyperadam.evaluation.paper_figures import PAPER_FIGURES, paper_figures
from hyperadam.tasks import TASKS


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    samples = generator.normal(3.0, 2.0, size=(30, 400))  # seeds, repetitions
    low, high = bootstrap_interval(samples)
    assert low.shape == high.shape == (400,)
    covered = ((low <= 3.0) & (high >= 3.0)).mean()
    assert 0.89 < covered < 0.98
    # The standard error is 2 / sqrt(30), and an interval of 95% is 2 x 1.96 of them.
    assert np.mean(high - low) == pytest.approx(2 * 1.96 * 2 / math.sqrt(30), rel=0.06)


def test_the_bootstrap_is_repeatable_and_exact_where_it_can_be():
    values = np.array([1.0, 2.0, 4.0])
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(np.full(5, 7.0)) == (7.0, 7.0)
    # Of two seeds a quarter of the draws each have twice the one and twice the other.
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0.0, 1.0)
    low, high = bootstrap_interval(np.ones((1, 3)))
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_the_interquartile_mean():
    assert interquartile_mean(np.arange(8.0)) == 3.5  # of 2, 3, 4, 5
    assert interquartile_mean(np.array([0.0, 1, 2, 3, 4, 5, 6, math.inf])) == 3.5
    assert interquartile_mean(np.array([1.0, 2, math.inf, math.inf])) == math.inf
    assert geometric(interquartile_mean, np.log([0.1, 2.0, 8.0, 50.0])) == pytest.approx(4.0)


def test_its_interval_draws_seeds_within_tasks():
    # Whatever is drawn, each task gives one value: there is nothing to vary.
    constant = [np.full(3, 1.0), np.full(3, 2.0), np.full(5, 9.0)]
    everything = interquartile_mean(np.concatenate(constant))
    assert interquartile_interval(constant) == (everything, everything)
    low, high = interquartile_interval([np.array([0.0, 1.0]), np.array([0.0, 1.0])])
    assert low == 0.0
    assert high == 1.0
    assert all(map(math.isnan, interquartile_interval([np.array([1.0])])))
    low, high = interquartile_interval([np.array([1.0, math.inf]), np.array([1.0, math.inf])])
    assert low == 1.0
    assert high == math.inf


def test_the_interval_of_the_median_task():
    assert median_task_interval([np.full(3, 1.0), np.full(2, 4.0)]) == (2.5, 2.5)
    low, high = median_task_interval([np.array([0.0, 1.0]), np.array([0.0, 1.0])])
    assert (low, high) == (0.0, 1.0)
    # A task counts by its mean, however many seeds it has.
    low, high = median_task_interval([np.zeros(50), np.array([0.0, 1.0])])
    assert (low, high) == (0.0, 0.5)
    assert all(map(math.isnan, median_task_interval([np.ones(2), np.ones(1)])))


def test_log_ratios():
    ratios = log_ratios(np.array([1.0, 4.0, math.nan, math.inf, 0.0]), 2.0)
    assert ratios[:2] == pytest.approx([-math.log(2), math.log(2)])
    assert (ratios[2:4] == math.inf).all()
    assert ratios[4] == pytest.approx(math.log(LOSS_FLOOR / 2))


def test_the_performance_profile():
    losses = np.array(
        [
            [1.0, 2.0, math.nan],
            [3.0, 1.0, 1.0],
            [math.inf, math.nan, math.inf],  # nobody's
        ]
    )
    assert performance_ratios(losses).tolist() == [
        [1.0, 2.0, math.inf],
        [3.0, 1.0, 1.0],
        [math.inf] * 3,
    ]
    profile = performance_profile(losses, np.array([1.0, 2.0, 3.0, 1e9]))
    third = 1 / 3
    assert profile == pytest.approx(
        np.array(
            [
                [third, third, 2 * third, 2 * third],
                [third, 2 * third, 2 * third, 2 * third],
                [third, third, third, third],
            ]
        )
    )


def test_the_trailing_mean():
    curve = np.random.default_rng(0).normal(size=25)
    expected = [curve[max(0, t - 9) : t + 1].mean() for t in range(25)]
    assert trailing_mean(curve, 10) == pytest.approx(expected)
    assert trailing_mean(np.array([2.0, 4.0]), 10) == pytest.approx([2.0, 3.0])


def test_steps_to_a_target():
    fall = np.concatenate([np.full(5, 4.0), np.full(15, 1.0)])
    curves = np.stack([fall + 0.5, fall - 0.5])  # their mean falls after step 5
    # Ten steps that average 2.5 are five at 4 and five at 1: steps 1 to 10.
    assert steps_to_target(curves, 2.5) == 10
    assert steps_to_target(curves, 4.0) == 10  # a final loss is a mean of ten steps
    assert steps_to_target(curves[:, :4], 4.0) == 4
    assert steps_to_target(curves, 1.0) == 15
    assert steps_to_target(curves, 0.99) is None
    assert steps_to_target(np.stack([fall, np.full(20, math.nan)]), 4.0) is None


def test_lower_beyond_the_scatter_of_seeds():
    theirs = np.array([1.0, 2.0, 3.0, 4.0])
    assert paired_sign(theirs - 0.1, theirs) == -1  # in pairs: seeds differ by more
    assert paired_sign(theirs + 0.1, theirs) == 1
    assert paired_sign(theirs[::-1], theirs) == 0
    assert paired_sign(theirs[:1] - 0.9, theirs[:1]) == 0


def test_a_series_reaches_its_own_final_loss_at_the_latest_at_the_end():
    curves = np.random.default_rng(1).gamma(2.0, size=(7, 60))
    target = float(np.mean([curve[-10:].mean() for curve in curves]))
    reached = steps_to_target(curves, target)
    assert reached is not None
    assert reached <= 60


def test_bins():
    at, means = bin_means(np.arange(1.0, 11.0)[None], 5)
    assert at.tolist() == means[0].tolist() == [1.5, 3.5, 5.5, 7.5, 9.5]
    at, means = bin_means(np.array([[5.0, 7.0]]), 80)
    assert at.tolist() == [1.0, 2.0]
    assert means.tolist() == [[5.0, 7.0]]
    at, means = bin_means(np.arange(1.0, 8.0)[None], 3)  # 3, 3 and 1 steps
    assert at.tolist() == means[0].tolist() == [2.0, 5.0, 7.0]
    assert bin_size(7, 3) == 3


def test_the_papers_figures_are_of_our_tasks():
    assert {figure.task for figure in PAPER_FIGURES} <= set(TASKS)
    assert len(PAPER_FIGURES) == 9 * 4
    assert paper_figures("mnist-mlp1-tanh", 100)["hyperadam"].loss == 0.36
    assert paper_figures("mnist-cnn2", 10_000)["adam"].accuracy == 0.9898
    assert paper_figures("mnist-cnn2", 100) == {}
