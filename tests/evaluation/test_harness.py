from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from hyperadam.baselines import make_baseline
from hyperadam.evaluation import Tracer, train
from hyperadam.optim.names import attention_parameters
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


def build(name, lr, seed=0):
    return lambda params: make_baseline(name).build(params, lr, seed)


def test_optimizers_are_told_the_names():
    """So that attention's projections get the learning rate that is theirs."""
    task, made = make_task("unicode-names-transformer2x32-b16"), []

    def factory(params):
        made.append(build("adam-by-layer", 1e-3)(params))
        return made[0]

    train(task, factory, seed=0, steps=1, validate=False)
    names = made[0].param_groups[0]["param_names"]
    assert names == list(task.init_params(make_generator(0, "params")))
    assert len(attention_parameters(made[0])) == 4


def test_final_loss_is_the_mean_of_the_last_ten():
    run = train(ConvexTask(4, 1), build("adam", 0.1), seed=0, steps=30)
    assert run.final_loss == pytest.approx(run.train_loss_post_T[20:].mean())
    assert run.final_loss < run.train_loss_T[0] / 2
    assert not run.diverged


def test_what_is_not_finite_ends_the_run():
    run = train(make_task("sine-lstm1"), build("sgd", 1e30), seed=0, steps=30)
    assert np.isfinite(run.train_loss_T[0])
    assert np.isnan(run.train_loss_post_T[-1])
    assert np.isnan(run.final_loss)
    assert run.diverged


def test_an_end_above_the_start_is_a_divergence():
    run = train(ConvexTask(4, 1), build("sgd", 1e3), seed=0, steps=30)
    assert np.isfinite(run.final_loss)
    assert run.diverged


def test_cosine_anneals_to_zero():
    task, lrs = ConvexTask(4, 1), []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            lrs.append(self.param_groups[0]["lr"])
            return super().step(closure)

    train(task, lambda p: Watched(p, lr=0.5), seed=0, steps=20, schedule="cosine")
    expected = 0.25 * (1 + np.cos(np.pi * np.arange(20) / 20))
    assert lrs == pytest.approx(expected)


def test_schedule_free_is_judged_at_its_average():
    """Gradients are taken at one point, what is used is another."""
    from schedulefree import AdamWScheduleFree

    task = make_task("digits-mlp1-tanh")
    run = train(task, build("schedulefree-adamw", 0.1), seed=0, steps=20)
    params = {
        name: value.requires_grad_()
        for name, value in task.init_params(make_generator(0, "params")).items()
    }
    optimizer = AdamWScheduleFree(params.values(), lr=0.1)
    optimizer.train()
    for step in range(20):
        batch = task.batch(derive_seed(0, "data"), step)
        optimizer.zero_grad()
        task.loss(params, batch).backward()
        optimizer.step()
    in_training = float(task.loss(params, batch).detach())
    optimizer.eval()
    assert run.train_loss_post_T[-1] == pytest.approx(
        float(task.loss(params, batch).detach()), rel=1e-3
    )
    assert run.train_loss_post_T[-1] != pytest.approx(in_training, rel=1e-2)
    with torch.no_grad():
        assert run.metrics == pytest.approx(task.validate(params), rel=1e-3)


def test_measuring_is_no_part_of_the_time():
    class Slow(ConvexTask):
        def validate(self, params):
            time.sleep(0.3)
            return {}

    run = train(Slow(4, 1), build("adam", 0.1), seed=0, steps=3)
    assert 0 < run.optimizer_seconds < run.wall_seconds < 0.3
    assert run.peak_bytes > 10**7


def test_tracing_changes_nothing():
    task, tracer = make_task("digits-mlp1-relu"), Tracer([0, 3])
    make = build("variational-hyperadam", 1e-3)
    traced = train(task, make, seed=0, steps=5, tracer=tracer)
    plain = train(task, make, seed=0, steps=5)
    assert np.array_equal(traced.train_loss_post_T, plain.train_loss_post_T)
    record = tracer.to_record()
    assert record["at"] == [0, 3]
    assert record["layers"] == list(task.init_params(make_generator(0)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["digits-cnn1-bn", "digits-mlp1-sigmoid", "sine-lstm1"])
@pytest.mark.parametrize("optimizer", ["adam", "variational-hyperadam"])
def test_a_gpu_agrees_but_for_rounding(name, optimizer):
    factory = build(optimizer, 1e-3)
    cpu, gpu = (
        train(make_task(name), factory, seed=0, steps=10, device=torch.device(device))
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(gpu.train_loss_T, cpu.train_loss_T, rtol=1e-3)
    for metric, value in cpu.metrics.items():
        assert gpu.metrics[metric] == pytest.approx(value, rel=1e-2)
    assert 0 < gpu.peak_bytes < cpu.peak_bytes
