from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits

from hyperadam.errors import ConfigError, DataError
from hyperadam.tasks import (
    TASKS,
    ConvexTask,
    MLPTask,
    RandomScaling,
    SumOfTasks,
    derive_seed,
    load_data,
    make_generator,
    make_task,
    stack_batches,
)
from hyperadam.tasks.base import batch_indices


def digits_mlp(**settings):
    return MLPTask(load_data("digits"), **settings)


def wrapped():
    return SumOfTasks(
        RandomScaling(digits_mlp(), 3.0, seed=1), RandomScaling(ConvexTask(20, 2), 1.0, seed=2)
    )


CONFORMING = {
    "mlp1": lambda: digits_mlp(),
    "mlp10 relu": lambda: digits_mlp(depth=10, activation="relu"),
    "convex": lambda: ConvexTask(20, 1),
    "scaled": lambda: RandomScaling(digits_mlp(), 3.0, seed=1),
    "sum": wrapped,
}


@pytest.fixture(params=sorted(CONFORMING))
def task(request):
    return CONFORMING[request.param]()


def init(task, seed=0):
    return task.init_params(make_generator(seed))


# -- what every task does ------------------------------------------------------------------------


def test_pure_functions_of_their_seeds(task):
    a, b, c = init(task, 1), init(task, 1), init(task, 2)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    if not isinstance(task, ConvexTask):
        assert any(not torch.equal(a[name], c[name]) for name in a)
    losses = [task.loss(a, task.batch(5, step)) for step in (0, 3, 0)]
    assert torch.equal(losses[0], losses[2])
    again = CONFORMING_AGAIN[task.name]()
    assert torch.equal(again.loss(a, again.batch(5, 3)), losses[1])


CONFORMING_AGAIN = {make().name: make for make in CONFORMING.values()}


def test_loss_is_differentiable_and_falls(task):
    params = {name: value.requires_grad_() for name, value in init(task).items()}
    batch = task.batch(0, 0)
    before = task.loss(params, batch)
    assert before.shape == ()
    grads = torch.autograd.grad(before, list(params.values()))
    norm = torch.nn.utils.get_total_norm(grads)
    assert 0 < float(norm) < math.inf
    with torch.no_grad():
        moved = {
            name: value - 1e-3 * grad / norm
            for (name, value), grad in zip(params.items(), grads, strict=True)
        }
        assert task.loss(moved, batch) < before


def test_loss_takes_the_parameters_dtype(task):
    params = {name: value.double() for name, value in init(task).items()}
    assert task.loss(params, task.batch(0, 0)).dtype == torch.float64


def test_losses_side_by_side(task):
    """All that the loss depends on is in parameters and batch, so vmap gives each one's loss."""
    params = [init(task, seed) for seed in range(3)]
    batches = [task.batch(seed, step=seed) for seed in range(3)]
    stacked = {name: torch.stack([own[name] for own in params]) for name in params[0]}
    together = torch.func.vmap(task.loss)(stacked, stack_batches(batches))
    alone = torch.stack([task.loss(*pair) for pair in zip(params, batches, strict=True)])
    torch.testing.assert_close(together, alone)


def test_validate_gives_plain_numbers(task):
    with torch.no_grad():
        metrics = task.validate(init(task))
    assert all(isinstance(value, float) for value in metrics.values())
    assert ("val_accuracy" in metrics) == (not isinstance(task, ConvexTask))


# -- each task -----------------------------------------------------------------------------------


def test_the_papers_task_has_15930_coordinates():
    """784-20-10 and a convex term of 20."""
    images = torch.zeros(200, 28, 28, dtype=torch.uint8)
    labels = torch.zeros(200, dtype=torch.int64)
    data = type(load_data("digits"))("mnist", images, labels, images, labels, 255, 10)
    task = SumOfTasks(MLPTask(data), ConvexTask(20, 0))
    assert sum(value.numel() for value in init(task).values()) == 15930


def test_mlp_starts_as_the_papers_do():
    params = init(digits_mlp(depth=3))
    assert [tuple(value.shape) for value in params.values()] == [
        (20, 64), (20,), (20, 20), (20,), (20, 20), (20,), (10, 20), (10,),
    ]  # fmt: skip
    flat = torch.cat([value.flatten() for value in params.values()])
    assert float(flat.mean()) == pytest.approx(0, abs=0.01)
    assert float(flat.std()) == pytest.approx(0.1, abs=0.005)


def test_mlp_loss_by_hand():
    task = digits_mlp(depth=2, activation="tanh")
    params = init(task)
    pixels, labels = task.batch(0, 0)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, (16 * pixels).round() / 16)
    assert float(pixels.max()) == 1
    x = pixels.double().numpy()
    p = {name: value.double().numpy() for name, value in params.items()}
    import numpy as np

    for layer in (1, 2):
        x = np.tanh(x @ p[f"linear{layer}.weight"].T + p[f"linear{layer}.bias"])
    logits = x @ p["linear3.weight"].T + p["linear3.bias"]
    expected = np.mean(
        np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), labels.numpy()]
    )
    assert float(task.loss(params, (pixels, labels))) == pytest.approx(expected, rel=1e-5)


def test_convex_term():
    task = ConvexTask(20, seed=3)
    targets = task.batch(0, 0)
    assert torch.equal(targets, task.batch(9, 9))
    assert float(targets.abs().max()) <= 1
    assert float(targets.min()) < 0 < float(targets.max())
    assert not torch.equal(targets, ConvexTask(20, seed=4).batch(0, 0))
    assert float(task.loss({"z": targets}, targets)) == 0
    far = {"z": targets + torch.tensor([1.0] * 10 + [100.0] * 10)}
    assert float(task.loss(far, targets)) == pytest.approx((10 * 1 + 10 * 10) / 20)


def test_random_scaling_leaves_the_network_as_it_was():
    plain = digits_mlp()
    scaled = RandomScaling(plain, 3.0, seed=7)
    torch.testing.assert_close(
        scaled.loss(init(scaled), scaled.batch(0, 0)),
        plain.loss(init(plain), plain.batch(0, 0)),
        rtol=1e-5,
        atol=1e-6,
    )
    flat = torch.cat([scale.flatten() for scale in scaled.scales.values()]).log()
    assert -3 <= float(flat.min()) < -2.9
    assert 2.9 < float(flat.max()) <= 3
    assert float(flat.std()) == pytest.approx(math.sqrt(3), rel=0.05)  # uniform, not shared
    other = RandomScaling(plain, 3.0, seed=8)
    assert not torch.equal(other.scales["linear1.bias"], scaled.scales["linear1.bias"])


def test_a_sum_is_the_sum():
    one, two = digits_mlp(), ConvexTask(5, 1)
    both = SumOfTasks(one, two)
    params = init(both)
    batch = both.batch(3, 4)
    expected = one.loss(
        {name.removeprefix("0."): value for name, value in params.items() if name[0] == "0"},
        one.batch(3, 4),
    ) + two.loss({"z": params["1.z"]}, two.batch(3, 4))
    torch.testing.assert_close(both.loss(params, batch), expected)


# -- batches and seeds ---------------------------------------------------------------------------


def test_an_epoch_has_every_example_once():
    for epoch in (0, 1):
        steps = range(7 * epoch, 7 * epoch + 7)
        seen = torch.cat([batch_indices(70, 10, seed=3, step=step) for step in steps])
        assert sorted(seen.tolist()) == list(range(70))
    first, second = (batch_indices(70, 70, seed=3, step=epoch) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, batch_indices(70, 70, seed=4, step=0))


def test_incomplete_batches_are_left_out():
    assert len(batch_indices(25, 10, seed=0, step=1)) == 10
    third = batch_indices(25, 10, seed=0, step=2)  # the first of the second epoch
    assert len(third) == 10
    assert len(batch_indices(7, 10, seed=0, step=0)) == 7


def test_batches_are_stacked_in_their_form():
    one = {"a": (torch.zeros(2), [torch.tensor(1)])}
    stacked = stack_batches([one, one, one])
    assert stacked["a"][0].shape == (3, 2)
    assert isinstance(stacked["a"], tuple)
    assert stacked["a"][1][0].tolist() == [1, 1, 1]


def test_derived_seeds_are_known_and_apart():
    assert derive_seed(0, "theta") == derive_seed(0, "theta")
    seeds = {derive_seed(seed, use, n) for seed in range(5) for use in "ab" for n in range(5)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)


# -- data ----------------------------------------------------------------------------------------


def test_digits():
    data = load_data("digits")
    source = load_digits()
    assert (len(data.train_labels), len(data.val_labels)) == (1438, 359)
    assert data.train_images.dtype == torch.uint8
    assert int(data.train_images.max()) == data.max_value == 16
    assert data.val_images[0].tolist() == source.images[4].tolist()
    assert data.val_labels[0] == source.target[4]
    assert torch.bincount(data.val_labels).min() > 20


def test_task_names():
    assert len(TASKS) == 2 * 10 * 4
    assert make_task("digits-mlp3-elu").name == "digits-mlp3-elu"
    with pytest.raises(ConfigError, match=r"did you mean .*'digits-mlp1-relu'"):
        make_task("digits-mlp1-rellu")
    with pytest.raises(DataError, match="unknown data set 'minst'"):
        load_data("minst")
