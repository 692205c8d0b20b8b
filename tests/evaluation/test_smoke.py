"""Every task under every optimizer: a few steps on small batches.

In an ordinary run each kind of network meets every optimizer, and every task one of them; with
``HYPERADAM_SMOKE=all`` (``make smoke``) every task meets every optimizer that the machine has the
memory for: the state and steps of learned ones take kilobytes a parameter.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch

from hyperadam.baselines import LEARNED, OPTIMIZER_NAMES, make_baseline
from hyperadam.evaluation import train
from hyperadam.optim.memory import free_memory
from hyperadam.tasks import TASKS, ClassificationData, TextData, load_data
from hyperadam.tasks.catalogue import IMAGES
from hyperadam.tasks.text import UNICODE_NAMES, encode_text

BATCH, STEPS = 4, 2

KINDS = (
    "digits-mlp1-sigmoid", "digits-mlp10-relu", "digits-cnn1-bn", "digits-cnn2-dropout",
    "sine-lstm2", "cifar10-resnet20", "pydoc-transformer", "digits-vit", "digits-autoencoder",
)  # fmt: skip

ALL = os.environ.get("HYPERADAM_SMOKE") == "all"
WITHOUT_KERNEL = ("rnnprop", "dmoptimizer", "hyperadam")
BYTES, BYTES_WITHOUT_KERNEL = 1_500, 5_000
"""For each parameter while a learned rule steps, and its network does; generously."""


def most_params(name):
    """Of networks that an optimizer meets here."""
    if name not in LEARNED:
        return float("inf")
    plain = name in WITHOUT_KERNEL
    if ALL:
        free = free_memory(torch.device("cpu")) or float("inf")
        return free / (BYTES_WITHOUT_KERNEL if plain else BYTES)
    return 5e5 if plain else 2e6


def pairs():
    for number, task in enumerate(TASKS):
        size = TASKS[task].num_params()
        names = [name for name in OPTIMIZER_NAMES if size <= most_params(name)]
        every = ALL or task in KINDS
        for name in names if every else [names[number % len(names)]]:
            yield task, name


def made_up(entry, image_dir):
    if entry.data in (None, "digits"):
        return entry.make(None)
    if entry.data == "imagenet":
        return entry.on(load_data("imagenet", image_dir))
    if entry.data in ("pydoc", "shakespeare", UNICODE_NAMES):
        text = encode_text("The quick brown fox jumps over the lazy dog. " * 40)
        return entry.on(TextData(entry.data, text, text))
    channels, size, classes = IMAGES[entry.data]
    shape = (40, size, size) if channels == 1 else (40, channels, size, size)
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.arange(40) % classes
    return entry.on(
        ClassificationData(entry.data, images, labels, images[:8], labels[:8], 255, classes)
    )


def small(task):
    changes = {"batch_size": BATCH} | ({"size": 32} if hasattr(task.examples, "size") else {})
    return dataclasses.replace(task, examples=dataclasses.replace(task.examples, **changes))


@pytest.mark.parametrize(("task_name", "name"), list(pairs()))
def test_every_task_trains_under_every_optimizer(task_name, name, request):
    entry = TASKS[task_name]
    image_dir = request.getfixturevalue("image_dir") if entry.data == "imagenet" else None
    task, baseline = small(made_up(entry, image_dir)), make_baseline(name)
    initial = []

    def factory(params):
        initial.extend(param.detach().clone() for _, param in params)
        made.extend(param for _, param in params)
        return baseline.build(params, baseline.default_lr, 0)

    made = []
    run = train(task, factory, seed=0, steps=STEPS, validate=False)
    assert np.isfinite(run.train_loss_post_T).all()
    assert any(not torch.equal(before, after) for before, after in zip(initial, made, strict=True))
