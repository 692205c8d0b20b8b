from __future__ import annotations

import numpy as np
import pytest
import torch

from hyperadam.baselines import ADAM_LR_GRID, adam, tune_adam
from hyperadam.evaluation import train
from hyperadam.tasks import ConvexTask, derive_seed, make_generator, make_task


def test_a_run_by_hand():
    task = make_task("digits-mlp1-tanh")
    run = train(task, lambda p: torch.optim.SGD(p, lr=0.5), seed=3, steps=4)
    params = task.init_params(make_generator(3, "params"))
    params = {name: value.requires_grad_() for name, value in params.items()}
    for step in range(4):
        batch = task.batch(derive_seed(3, "data"), step)
        loss = task.loss(params, batch)
        grads = torch.autograd.grad(loss, list(params.values()))
        with torch.no_grad():
            for value, grad in zip(params.values(), grads, strict=True):
                value -= 0.5 * grad
        assert run.train_loss_T[step] == pytest.approx(float(loss.detach()), rel=1e-5)
        post = float(task.loss(params, batch).detach())
        assert run.train_loss_post_T[step] == pytest.approx(post, rel=1e-5)
    with torch.no_grad():
        assert run.metrics == pytest.approx(task.validate(params), rel=1e-5)
    assert run.final_loss == pytest.approx(float(np.mean(run.train_loss_post_T)))
    assert run.optimizer_seconds > 0


def test_final_loss_is_the_mean_of_the_last_ten():
    run = train(ConvexTask(4, 1), adam(0.1), seed=0, steps=30)
    assert run.final_loss == pytest.approx(run.train_loss_post_T[20:].mean())
    assert run.final_loss < run.train_loss_T[0] / 2


def test_adam_is_tuned_on_its_grid():
    task = ConvexTask(4, 1)
    best = tune_adam(task, seeds=range(2), steps=15)
    losses = {
        lr: np.mean([train(task, adam(lr), seed=s, steps=15).final_loss for s in range(2)])
        for lr in ADAM_LR_GRID
    }
    assert best == min(losses, key=losses.__getitem__)
    assert ADAM_LR_GRID == (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
