from __future__ import annotations

import math

import pytest

from evaluation.making import make_record
from hyperadam.evaluation import best_lr, grid_lr, tune
from hyperadam.evaluation.records import FIRST_TUNING_SEED
from hyperadam.evaluation.tuning import FARTHEST, more_places, tuning_losses


def test_half_decades():
    assert [grid_lr(1e-3, place) for place in range(-2, 5)] == [
        1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1
    ]  # fmt: skip
    assert [grid_lr(2.5e-3, place) for place in (-1, 0, 1)] == [7.5e-4, 2.5e-3, 7.5e-3]


def tried(loss):
    lrs = []

    def watched(lr):
        lrs.append(lr)
        return loss(lr)

    return tune(1e-3, watched), lrs


def test_a_best_inside_ends_it():
    best, lrs = tried(lambda lr: abs(math.log10(lr / 3e-3)))
    assert best == 3e-3
    assert lrs == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


def test_an_end_is_extended_while_it_is_best():
    best, lrs = tried(lambda lr: abs(math.log10(lr / 0.3)))
    assert best == 0.3
    assert lrs == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0]
    best, lrs = tried(lambda lr: abs(math.log10(lr / 3e-5)))
    assert best == 3e-5
    assert lrs[5:] == [3e-5, 1e-5]


def test_extending_comes_to_an_end():
    best, lrs = tried(lambda lr: -lr)
    assert best == grid_lr(1e-3, FARTHEST) == 10.0
    assert len(lrs) == 5 + FARTHEST - 2


def test_what_diverges_is_never_best():
    best, _ = tried(lambda lr: math.nan if lr > 1e-3 else -lr)
    assert best == 1e-3
    assert more_places(dict.fromkeys(range(-2, 3), math.nan)) == [-3]


def test_the_best_of_recorded_runs():
    losses = {
        1e-3: [(3.0, 3.0), (1.0, 1.0)],
        3e-3: [(1.5, 1.5), (1.5, 1.5)],
        1e-2: [(math.nan, 1), (0.1, 0.1)],
        3e-2: [(0.1, 0.1)],  # of fewer seeds: not comparable
    }
    records = [
        make_record(FIRST_TUNING_SEED + number, run, lr=lr)
        for lr, runs in losses.items()
        for number, run in enumerate(runs)
    ]
    reported = make_record(0, (0.0, 0.0), lr=1e-4)
    assert best_lr([*records, reported]) == 3e-3
    found = tuning_losses(records)
    assert found[1e-3] == pytest.approx(1.0)
    assert math.isnan(found[1e-2])
    assert 3e-2 not in found
    assert best_lr([reported]) is None
