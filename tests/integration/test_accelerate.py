"""Accelerate: what ``prepare`` wraps makes the steps of a plain loop."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_switch_optimizer_parameters
from torch.nn import Linear, Tanh
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR

from hyperadam import VariationalHyperAdam
from integration.examples import are_equal, run_example, train_plainly, values

EPOCHS, STEPS = 3, 12
SEED = 5


@pytest.fixture
def recorded(monkeypatch):
    """Each batch that a loader of Accelerate has given, in order."""
    from accelerate.data_loader import DataLoaderShard

    batches, give = [], DataLoaderShard.__iter__

    def recording(loader):
        for batch in give(loader):
            batches.append([tensor.clone() for tensor in batch])
            yield batch

    monkeypatch.setattr(DataLoaderShard, "__iter__", recording)
    return batches


@pytest.fixture
def example(recorded):
    return run_example("Accelerate", SEED)


def make_model(drawn=0):
    """The example's network as it is after so many random numbers."""
    torch.manual_seed(SEED)
    torch.randn(drawn)
    return torch.nn.Sequential(Linear(8, 16), Tanh(), Linear(16, 1))


def plain(model, batches, scheduled=True, **settings):
    optimizer = VariationalHyperAdam(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, T_max=STEPS) if scheduled else None
    losses = [lambda batch=batch: mse_loss(model(batch[0]), batch[1]) for batch in batches]
    train_plainly(model, losses, optimizer, scheduler=scheduler, **settings)
    return values(model)


def test_the_example_accumulates_clips_and_schedules(example, recorded):
    start, found = make_model(drawn=64 * 8), values(example["model"])
    assert len(recorded) == 2 * STEPS

    def of(**settings):
        return plain(
            copy.deepcopy(start), recorded, **{"accumulate": 2, "max_norm": 1.0, **settings}
        )

    assert are_equal(found, of())
    assert not are_equal(found, of(max_norm=None))
    assert not are_equal(found, of(scheduled=False))
    assert not are_equal(found, of(accumulate=1))


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_has_the_same_bits(example, epoch):
    torch.manual_seed(SEED + 1)
    resumed = example["train"]("checkpoints", resume=epoch)
    assert are_equal(values(resumed), values(example["model"]))


def make_batches(count):
    return [(torch.randn(8, 8), torch.randn(8, 1)) for _ in range(count)]


def test_bfloat16():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, other = make_model(), make_model()
    prepared, optimizer = accelerator.prepare(model, VariationalHyperAdam(model.parameters()))
    plain_optimizer = VariationalHyperAdam(other.parameters())
    for inputs, targets in make_batches(6):
        accelerator.backward(mse_loss(prepared(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            predicted = other(inputs)
        mse_loss(predicted.float(), targets).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert are_equal(values(model), values(other))
    assert not are_equal(values(model), values(make_model()))


@pytest.mark.parametrize("by_scaler", [False, True])
def test_an_overflow_in_float16(by_scaler):
    """Who passes over it decides whether Accelerate holds the schedule back (docs/trainers.md)."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, expected = make_model(), make_model()
    optimizer = VariationalHyperAdam(model.parameters(), lr=1e-2)
    if by_scaler:
        optimizer._step_supports_amp_scaling = False
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    plain_optimizer = VariationalHyperAdam(expected.parameters(), lr=1e-2)
    for number, (inputs, targets) in enumerate(make_batches(3)):
        optimizer.zero_grad()
        accelerator.backward(mse_loss(model(inputs), targets))
        if number == 1:
            model[0].weight.grad[0, 0] = torch.inf
        else:
            plain_optimizer.zero_grad()
            mse_loss(expected(inputs), targets).backward()
            plain_optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
            plain_optimizer.step()
        optimizer.step()
        assert optimizer.step_was_skipped == (by_scaler and number == 1)
        scheduler.step()
    assert accelerator.scaler.get_scale() == 2.0**9
    assert scheduler.get_last_lr() == [1e-2 * 0.5 ** (2 if by_scaler else 3)]
    assert are_equal(values(model), values(expected))


def replace_params(optimizer, old, new):
    """As ``prepare`` does for FSDP2, by Accelerate's own function, but with whole parameters."""
    (group,) = optimizer.param_groups
    mapping = {}
    for index, (before, after) in enumerate(zip(old, new, strict=True)):
        group["params"][index] = torch.empty(1)
        group["params"][index].data_ptr = before.data_ptr()
        mapping[before.data_ptr()] = after
    fsdp2_switch_optimizer_parameters(optimizer, mapping)


def steps_of(optimizer):
    return [int(state["step"]) for state in optimizer.state_dict()["state"].values()]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_replaced_parameters(prepared, asked):
    """State dicts are of the parameters that are there, from step 0, as loading needs it."""
    before, model, other = make_model(), make_model(), make_model()
    optimizer = VariationalHyperAdam(before.parameters())
    if prepared:
        optimizer = Accelerator(cpu=True).prepare(optimizer)
    replace_params(optimizer, before.parameters(), model.parameters())
    if asked:
        assert steps_of(optimizer) == [0, 0, 0, 0]
    batches = make_batches(4)
    losses = [lambda batch=batch: mse_loss(model(batch[0]), batch[1]) for batch in batches]
    train_plainly(model, losses, optimizer)
    assert are_equal(values(model), plain(other, batches, scheduled=False))
    assert not are_equal(values(model), values(before))
    assert steps_of(optimizer) == [4, 4, 4, 4]
    assert set(optimizer.state) == set(model.parameters())
