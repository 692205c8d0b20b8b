from __future__ import annotations

import dataclasses
import functools
import hashlib
import math

import pytest
import torch

from hyperadam.errors import ConfigError, DataError
from hyperadam.evaluation import train
from hyperadam.evaluation.suites import PRACTICE, SUITES
from hyperadam.metatrain.task_group import TaskGroup
from hyperadam.tasks import (
    TASKS,
    ClassificationData,
    ConvexTask,
    ImageExamples,
    RandomScaling,
    SumOfTasks,
    derive_seed,
    load_data,
    make_generator,
    make_task,
    stack_batches,
)
from hyperadam.tasks import data as data_module
from hyperadam.tasks.base import batch_indices
from hyperadam.tasks.catalogue import IMAGES
from hyperadam.tasks.examples import AutoregressiveExamples
from hyperadam.tasks.practice import practice_entries


def colours(count=48, classes=10):
    """Made-up images in the form of CIFAR-10's."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.arange(count) % classes
    return ClassificationData("cifar10", images, labels, images[:20], labels[:20], 255, classes)


def on_colours(name):
    task = TASKS[name].on(colours(classes=IMAGES[TASKS[name].data][2]))
    return dataclasses.replace(task, examples=dataclasses.replace(task.examples, batch_size=16))


def wrapped():
    return SumOfTasks(
        RandomScaling(make_task("digits-mlp1-sigmoid"), 3.0, seed=1),
        RandomScaling(ConvexTask(20, 2), 1.0, seed=2),
    )


CONFORMING = {
    **{
        name: functools.partial(make_task, name)
        for name in (
            "digits-mlp1-sigmoid", "digits-mlp10-relu", "digits-cnn1", "digits-cnn2-bn",
            "digits-cnn2-dropout", "sine-lstm1", "sine-lstm2-smallnoise", "digits-autoencoder",
            "digits-vit", "pydoc-transformer",
        )
    },
    **{
        name: functools.partial(on_colours, name)
        for name in ("cifar10-cnn2", "cifar10-resnet20", "cifar100-resnet20", "cifar10-vit")
    },
    "convex": lambda: ConvexTask(20, 1),
    "scaled": lambda: RandomScaling(make_task("digits-mlp1-sigmoid"), 3.0, seed=1),
    "sum": wrapped,
}  # fmt: skip


def on_a_folder(name, folder):
    task = make_task(name, folder)
    examples = dataclasses.replace(task.examples, batch_size=8, size=32)
    return dataclasses.replace(task, examples=examples)


@pytest.fixture(params=[*sorted(CONFORMING), "imagenet-resnet18"])
def make(request):
    if request.param in CONFORMING:
        return CONFORMING[request.param]
    return functools.partial(on_a_folder, request.param, request.getfixturevalue("image_dir"))


@pytest.fixture
def task(make):
    return make()


def init(task, seed=0):
    return task.init_params(make_generator(seed))


# -- what every task does ------------------------------------------------------------------------


def test_pure_functions_of_their_seeds(task, make):
    a, b, c = init(task, 1), init(task, 1), init(task, 2)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    if not isinstance(task, ConvexTask):
        assert any(not torch.equal(a[name], c[name]) for name in a)
    losses = [task.loss(a, task.batch(5, step)) for step in (0, 3, 0)]
    assert torch.equal(losses[0], losses[2])
    again = make()
    assert torch.equal(again.loss(a, again.batch(5, 3)), losses[1])


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


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention under vmap
def test_losses_side_by_side(task):
    """All that the loss depends on is in parameters and batch, so vmap gives each one's loss."""
    params = [init(task, seed) for seed in range(3)]
    batches = [task.batch(seed, step=seed) for seed in range(3)]
    stacked = {name: torch.stack([own[name] for own in params]) for name in params[0]}
    together = torch.func.vmap(task.loss)(stacked, stack_batches(batches))
    alone = torch.stack([task.loss(*pair) for pair in zip(params, batches, strict=True)])
    torch.testing.assert_close(together, alone, rtol=2e-5, atol=1e-5)


def test_validate_gives_plain_numbers(task):
    with torch.no_grad():
        metrics = task.validate(init(task))
    assert all(isinstance(value, float) for value in metrics.values())
    if isinstance(task, ConvexTask):
        assert metrics == {}
    else:
        regression = task.name.startswith("sine") or task.name.endswith("autoencoder")
        assert set(metrics) == {"val_loss"} | (set() if regression else {"val_accuracy"})
        assert metrics["val_loss"] > 0
        assert 0 <= metrics.get("val_accuracy", 0) <= 1


# -- each task -----------------------------------------------------------------------------------


def test_the_papers_task_has_15930_coordinates():
    """784-20-10 and a convex term of 20."""
    assert TASKS["mnist-mlp1-sigmoid"].num_params() + 20 == 15930


def test_mlp_starts_as_the_papers_do():
    params = init(make_task("digits-mlp3-sigmoid"))
    assert [tuple(value.shape) for value in params.values()] == [
        (20, 64), (20,), (20, 20), (20,), (20, 20), (20,), (10, 20), (10,),
    ]  # fmt: skip
    flat = torch.cat([value.flatten() for value in params.values()])
    assert float(flat.mean()) == pytest.approx(0, abs=0.01)
    assert float(flat.std()) == pytest.approx(0.1, abs=0.005)


def test_mlp_loss_by_hand():
    task = make_task("digits-mlp2-tanh")
    params = init(task)
    pixels, labels, masks = task.batch(0, 0)
    assert masks == []
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, (16 * pixels).round() / 16)
    assert float(pixels.max()) == 1
    x = pixels.flatten(1).double().numpy()
    p = {name: value.double().numpy() for name, value in params.items()}
    import numpy as np

    for layer in (1, 2):
        x = np.tanh(x @ p[f"linear{layer}.weight"].T + p[f"linear{layer}.bias"])
    logits = x @ p["linear3.weight"].T + p["linear3.bias"]
    expected = np.mean(
        np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), labels.numpy()]
    )
    assert float(task.loss(params, (pixels, labels, []))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mnist-mlp6-sigmoid", 784 * 20 + 20 + 5 * 420 + 210),
        ("mnist-cnn1", 160 + 2320 + 14 * 14 * 16 * 10 + 10),
        ("cifar10-cnn2", 448 + 2320 + 4640 + 9248 + 8 * 8 * 32 * 64 + 64 + 650),
        ("cifar10-cnn2-bn", 448 + 2320 + 4640 + 9248 + 8 * 8 * 32 * 64 + 64 + 650 + 2 * 96),
        ("sine-lstm1", 4 * 20 * 22 + 21),
        ("sine-lstm2", 4 * 20 * 22 + 4 * 20 * 41 + 21),
        # He et al., 2016, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M
        ("cifar10-resnet20", 269_722),
        ("cifar10-resnet32", 464_154),
        ("cifar10-resnet44", 658_586),
        ("cifar10-resnet56", 853_018),
        ("cifar10-resnet110", 1_727_962),
        ("cifar100-resnet20", 269_722 + 90 * 65),
        # The field's, of torchvision and timm.
        ("imagenet-resnet18", 11_689_512),
        ("imagenet-resnet34", 21_797_672),
        ("imagenet-resnet50", 25_557_032),
        ("imagenet-resnet101", 44_549_160),
        ("imagenet-resnet152", 60_192_808),
        ("pydoc-transformer", (97 + 64) * 64 + 4 * 12 * 64**2 + 4 * 13 * 64 + 2 * 64 + 65 * 97),
    ],
)
def test_numbers_of_parameters(name, count):
    assert TASKS[name].num_params() == count


def test_a_convolutional_network_starts_as_the_papers_do():
    task = make_task("digits-cnn2-bn")
    assert isinstance(task.network.training.features[11], torch.nn.BatchNorm2d)
    params = init(task)
    for number in (1, 4, 8, 11):
        assert params[f"features.{number}.weight"].unique().tolist() == [1]
        assert params[f"features.{number}.bias"].unique().tolist() == [0]
    flat = torch.cat([value.flatten() for value in params.values() if value.dim() > 1])
    assert float(flat.std()) == pytest.approx(0.1, abs=0.005)


def test_a_library_network_starts_as_it_is_drawn_and_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    task = make_task("digits-vit")
    params = init(task, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(params["output.weight"], init(task, 4)["output.weight"])


def test_dropout_is_in_the_batch():
    task = make_task("digits-cnn2-dropout")
    params = init(task)
    inputs, targets, (mask,) = task.batch(0, 0)
    assert mask.shape == (128, 64)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert float(mask.mean()) == pytest.approx(1, abs=0.05)
    other = task.loss(params, (inputs, targets, [2 - mask]))
    assert not torch.equal(task.loss(params, (inputs, targets, [mask])), other)
    # In validation every unit counts once.
    predict = task.network.predictor(params, iter([]))
    torch.testing.assert_close(
        predict(inputs), task.network.outputs(params, inputs, [torch.ones_like(mask)])
    )


def test_batch_normalisation_is_calibrated_on_training_data():
    """With one batch to take statistics from, validation gives that batch's training outputs."""
    task = on_colours("cifar10-resnet20")
    params = init(task)
    inputs, *_ = task.batch(0, 0)
    with torch.no_grad():
        training = task.network.outputs(params, inputs, [])
        one, two = (task.network.predictor(params, iter([inputs] * n)) for n in (1, 2))
        # Variances are of the population in training, and estimated from the sample behind it.
        torch.testing.assert_close(one(inputs), training, rtol=0.02, atol=0.02)
        torch.testing.assert_close(two(inputs), one(inputs))
        assert not torch.allclose(task.network.predictor(params, iter([]))(inputs), training)


def test_weight_decay_is_in_the_loss():
    task = on_colours("cifar10-resnet20")
    params = init(task)
    batch = task.batch(0, 0)
    without = dataclasses.replace(task, weight_decay=0.0).loss(params, batch)
    squares = sum(float(value.square().sum()) for value in params.values())
    assert float(task.loss(params, batch)) == pytest.approx(float(without) + 0.5e-4 * squares)


def test_augmented_images_are_moved_and_mirrored():
    data = colours(count=400)
    plain, moved = (ImageExamples(data, batch_size=400, augment=a) for a in (False, True))
    (before, _), (after, _) = plain.batch(0, 0), moved.batch(0, 0)
    assert before.shape == after.shape
    padded = torch.nn.functional.pad(before, (4, 4, 4, 4))
    seen = set()
    for image, source in zip(after, padded, strict=True):
        places = [
            (top, left, mirror)
            for top in range(9)
            for left in range(9)
            for mirror in (False, True)
            for window in [source[:, top : top + 32, left : left + 32]]
            if torch.equal(image, window.flip(2) if mirror else window)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert {place[0] for place in seen} == {place[1] for place in seen} == set(range(9))
    assert {place[2] for place in seen} == {False, True}
    assert torch.equal(moved.batch(0, 0)[0], after)
    assert not torch.equal(moved.batch(1, 0)[0], after)


def test_sine_waves():
    inputs, targets = make_task("sine-lstm1").examples.batch(0, 0)
    assert inputs.shape == (128, 10)
    assert targets.shape == (128,)
    # f(k - 1) + f(k + 1) = 2 cos(omega) f(k): the next value follows from the last ones.
    exact = dataclasses.replace(make_task("sine-lstm1").examples, noise=0.0)
    values, following = exact.batch(0, 0)
    cosine = (values[:, 1] + values[:, 3]) / (2 * values[:, 2])
    expected = 2 * cosine * values[:, 9] - values[:, 8]
    good = values[:, 2].abs() > 1
    torch.testing.assert_close(following[good], expected[good], rtol=1e-3, atol=1e-2)
    noise = torch.cat([inputs - values, (targets - following).unsqueeze(1)], dim=1)
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05)
    small = make_task("sine-lstm2-smallnoise").examples
    assert small.noise == 0.01


def test_an_autoencoder_aims_at_its_inputs():
    inputs, targets, _ = make_task("digits-autoencoder").batch(0, 0)
    assert torch.equal(inputs, targets)
    assert inputs.shape == (128, 1, 8, 8)


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
    plain = make_task("digits-mlp1-sigmoid")
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
    one, two = make_task("digits-mlp1-sigmoid"), ConvexTask(5, 1)
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
    assert (len(data.train_labels), len(data.val_labels)) == (1438, 359)
    assert data.train_images.dtype == torch.uint8
    assert int(data.train_images.max()) == data.max_value == 16
    assert data.val_labels[:10].tolist() == [4, 9, 4, 9, 4, 9, 6, 9, 7, 0]
    assert torch.bincount(data.val_labels).min() > 20
    # As in scikit-learn 1.9.1.
    images, labels = torch.empty(1797, 8, 8, dtype=torch.uint8), torch.empty(1797)
    held_out = torch.arange(1797) % 5 == 4
    for mask, part in ((held_out, "val"), (~held_out, "train")):
        images[mask] = getattr(data, f"{part}_images")
        labels[mask] = getattr(data, f"{part}_labels").float()
    digest = hashlib.sha256(images.numpy().tobytes() + labels.byte().numpy().tobytes()).hexdigest()
    assert digest == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_small_mnist_has_the_means_of_what_its_pixels_cover(monkeypatch):
    images = torch.randint(256, (1100, 28, 28), generator=make_generator(0)).to(torch.uint8)
    labels = torch.zeros(1100, dtype=torch.int64)
    mnist = ClassificationData("mnist", images, labels, images[:3], labels[:3], 255, 10)
    monkeypatch.setattr(data_module, "_load_images", lambda name, data_dir: mnist)
    load_data.cache_clear()
    try:
        small = load_data("mnist8")
    finally:
        load_data.cache_clear()
    assert small.train_images.shape == (1100, 8, 8)
    assert small.val_images.shape == (3, 8, 8)
    assert small.train_images.dtype == torch.uint8
    # 28 / 8 = 3.5: pixel (1, 0) covers rows 3 to 6 and columns 0 to 3.
    expected = images[1050, 3:7, 0:4].double().mean()
    assert abs(float(small.train_images[1050, 1, 0]) - float(expected)) <= 0.5


def test_clutter_is_a_digit_in_one_colour_before_others(monkeypatch):
    """Digits without holes: where one is, its colour, whatever lies behind."""
    images = torch.full((1100, 28, 28), 255, dtype=torch.uint8)
    labels = torch.arange(1100) % 10
    mnist = ClassificationData("mnist", images, labels, images[:3], labels[:3], 255, 10)
    monkeypatch.setattr(data_module, "_load_images", lambda name, data_dir: mnist)
    made = []
    for _ in range(2):
        load_data.cache_clear()
        try:
            made.append(load_data("clutter16"))
        finally:
            load_data.cache_clear()
    data, again = made
    assert torch.equal(data.train_images, again.train_images)
    assert data.train_images.shape == (1100, 3, 16, 16)
    assert data.val_images.shape == (3, 3, 16, 16)
    assert data.train_images.dtype == torch.uint8
    assert torch.equal(data.train_labels, labels)
    middle = data.train_images[:, :, 2:14, 2:14]  # covered by a digit wherever it is
    assert (middle == middle[:, :, :1, :1]).all()
    assert len(middle[:, :, 0, 0].unique(dim=0)) > 1000
    corner = data.train_images[:, :, 0, 0]
    shown = (corner == middle[:, :, 0, 0]).all(dim=1)
    assert 0.05 < shown.double().mean() < 0.2  # offsets from 0 to 2 both ways: one of nine


def test_no_reported_suite_has_what_is_meta_trained_on():
    practice = {entry.name for entry in practice_entries()}
    reported = {task for suite in SUITES.values() for task in suite.tasks if suite.name != PRACTICE}
    assert len(practice) > 25
    assert practice == set(SUITES[PRACTICE].tasks) <= set(TASKS)
    assert not practice & reported


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention under vmap
@pytest.mark.parametrize("entry", practice_entries(), ids=lambda entry: entry.name)
def test_what_is_meta_trained_on_can_be_learned_and_stacked(entry):
    """Under Adam the loss falls; B side by side are each by itself."""
    shapes = {"mnist": (28, 28), "mnist8": (8, 8), "clutter16": (3, 16, 16)}
    if entry.data in shapes:
        shape = shapes[entry.data]
        images = torch.randint(256, (256, *shape), generator=make_generator(0)).to(torch.uint8)
        labels = torch.arange(256) % 10
        own = ClassificationData("mnist", images, labels, images[:9], labels[:9], 255, 10)
        task = entry.on(own)
    else:
        task = entry.make(None)  # on data that it makes or that Python brings
    lr = 0.02 if entry.data is None else 0.005  # deep tanh on noise goes astray at more
    run = train(
        task, lambda params: torch.optim.Adam(params, lr=lr), seed=0, steps=120, validate=False
    )
    assert run.final_loss < run.train_loss_T[0]  # eight sigmoid layers take long to begin
    group = TaskGroup([task, task], [1, 2], torch.device("cpu"))
    both = group.loss(group.initial_BN, group.batch(0))
    alone = [TaskGroup([task], [seed], torch.device("cpu")) for seed in (1, 2)]
    each = [float(one.loss(one.initial_BN, one.batch(0))) for one in alone]
    assert both.tolist() == pytest.approx(each, rel=1e-4)


def test_an_autoregressive_sequence_goes_on_without_noise():
    inputs, targets = AutoregressiveExamples(noise=0.0, batch_size=50).batch(3, 0)
    assert inputs.shape == (50, 10)
    assert targets.shape == (50,)
    # Two equations of the last four values have the coefficients, which give the next one.
    x = inputs.double()
    left = torch.stack([x[:, [-2, -3]], x[:, [-3, -4]]], dim=1)
    coefficients = torch.linalg.solve(left, x[:, [-1, -2]].unsqueeze(-1)).squeeze(-1)
    going_on = (coefficients * x[:, [-1, -2]]).sum(-1)
    close = (going_on - targets).abs() < 1e-2
    assert close.double().mean() > 0.8  # where the equations can be told apart


def test_task_names():
    assert len(TASKS) == 80 + 15 + 4 + 10 + 5 + 2 + 3 + 2 + len(practice_entries())
    assert all(entry.name == name for name, entry in TASKS.items())
    assert make_task("digits-mlp3-elu").name == "digits-mlp3-elu"
    with pytest.raises(ConfigError, match=r"did you mean .*'digits-mlp1-relu'"):
        make_task("digits-mlp1-rellu")
    with pytest.raises(DataError, match="unknown data set 'minst'"):
        load_data("minst")
