"""What the bundled weights are for: ahead of Adam at its best lr on the demonstration's task."""

from __future__ import annotations

import numpy as np
import pytest

from hyperadam import VariationalHyperAdam, load_weights
from hyperadam.baselines import make_baseline
from hyperadam.demo import DEFAULT_TASK, run_demo
from hyperadam.evaluation import train
from hyperadam.tasks import make_task

HELD_OUT = range(500, 503)


def test_the_bundled_weights_beat_adam_at_its_best_lr():
    """Adam's learning rate is even chosen on the seeds that are reported."""
    task = make_task(DEFAULT_TASK)

    def final(factory):
        return np.mean([train(task, factory, seed=s, steps=100).final_loss for s in HELD_OUT])

    adam = make_baseline("adam")
    best_adam = min(
        final(lambda params, lr=lr: adam.build(params, lr, 0)) for lr in (1e-2, 3e-2, 1e-1, 3e-1)
    )
    assert final(VariationalHyperAdam) < 0.8 * best_adam


def test_the_demonstrations_runs():
    advanced = []
    demo = run_demo(
        make_task(DEFAULT_TASK), load_weights("default"), seeds=2, steps=12, advance=advanced.append
    )
    assert [len(entry.runs) for entry in demo.entries()] == [2, 2, 2]
    assert demo.adam_tuned.lr > demo.adam_default.lr
    assert demo.adam_tuned.final_losses().mean() < demo.adam_default.final_losses().mean()
    first = demo.ours.runs[0]
    again = train(
        make_task(DEFAULT_TASK),
        lambda p: VariationalHyperAdam(p, seed=0),
        seed=0,
        steps=12,
    )
    assert np.array_equal(first.train_loss_T, again.train_loss_T)
    assert demo.ours.accuracies()[0] == again.metrics["val_accuracy"]
    # The posterior's runs share initialisation and data: they part only after the first update.
    starts = {run.train_loss_T[0] for run in demo.posterior}
    assert starts == {first.train_loss_T[0]}
    assert len({run.train_loss_T[-1] for run in demo.posterior}) == len(demo.posterior)
    assert demo.ours.step_milliseconds() > 0
    assert len(advanced) == 1 + 3 * 2 + 10
    assert demo.ours.final_losses().mean() == pytest.approx(
        np.mean([run.train_loss_post_T[-10:].mean() for run in demo.ours.runs])
    )
