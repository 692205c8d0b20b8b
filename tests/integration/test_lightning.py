"""Lightning: the loop is Lightning's, the steps are those of a plain loop."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as lightning
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR

from hyperadam import VariationalHyperAdam
from integration.examples import are_equal, run_example, train_plainly, values

EPOCHS, STEPS = 3, 12
SEED = 3


@pytest.fixture
def example():
    return run_example("Lightning", SEED)


def fit(model, loader, **settings):
    trainer = lightning.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "logger": False, **settings},
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, loader)
    return trainer


def plain(model, loader, epochs=EPOCHS, scheduled=True, **settings):
    optimizer = VariationalHyperAdam(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, T_max=STEPS) if scheduled else None
    losses = [
        lambda batch=batch: mse_loss(model.network(batch[0]), batch[1])
        for _ in range(epochs)
        for batch in loader
    ]
    train_plainly(model, losses, optimizer, scheduler=scheduler, **settings)
    return values(model)


def test_the_example_accumulates_clips_and_schedules(example):
    torch.manual_seed(SEED)
    torch.randn(64, 8)
    start = example["Regression"]()
    found, loader = values(example["model"]), example["loader"]

    def of(**settings):
        return plain(copy.deepcopy(start), loader, **{"accumulate": 2, "max_norm": 1.0, **settings})

    assert are_equal(found, of())
    assert not are_equal(found, of(max_norm=None))
    assert not are_equal(found, of(scheduled=False))
    assert not are_equal(found, of(accumulate=1, epochs=1))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_has_the_same_bits(example, epoch):
    torch.manual_seed(SEED + 1)
    resumed = example["train"](f"checkpoints/epoch={epoch}.ckpt")
    assert resumed.trainer.global_step == STEPS
    assert are_equal(values(resumed), values(example["model"]))


class Counted(VariationalHyperAdam):
    """Counts steps, and how often a closure runs."""

    steps = closures = 0

    def step(self, closure=None):
        def counted():
            self.closures += 1
            return closure()

        self.steps += 1
        return super().step(counted if closure is not None else None)


def counted(base):
    class Module(base):
        passes = 0

        def configure_optimizers(self):
            self.optimizer = Counted(self.parameters())
            return self.optimizer

        def training_step(self, *arguments):
            self.passes += 1
            return super().training_step(*arguments)

    return Module()


def test_the_closure_runs_once_a_step(example):
    model = counted(example["Regression"])
    start = copy.deepcopy(model)
    fit(model, example["loader"])
    assert model.passes == model.optimizer.steps == model.optimizer.closures == 8
    assert are_equal(values(model), plain(start, example["loader"], 1, scheduled=False))


def test_manual_optimization(example):
    class Manual(example["Regression"]):
        closures = 0

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.losses = []

        def training_step(self, batch, batch_index):
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()

            def closure():
                self.closures += 1
                optimizer.zero_grad()
                loss = super(Manual, self).training_step(batch, batch_index)
                self.manual_backward(loss)
                return loss.detach()

            self.losses.append(optimizer.step(closure))
            scheduler.step()

    model = Manual()
    start = copy.deepcopy(model)
    trainer = fit(model, example["loader"])
    assert model.closures == len(model.losses) == trainer.global_step == 8
    assert all(isinstance(loss, torch.Tensor) for loss in model.losses)
    assert are_equal(values(model), plain(start, example["loader"], epochs=1))


def test_the_wrapped_optimizer_answers(example):
    """What ``self.optimizers()`` gives is an object of Lightning's own around ours."""
    found = []

    class Asking(example["Regression"]):
        def on_train_batch_end(self, *_):
            wrapped = self.optimizers()
            layer = self.network[0].weight
            found.append(wrapped.update_distribution(layer).mean.shape == layer.shape)
            saved = copy.deepcopy(wrapped.state_dict())
            wrapped.optimizer.load_state_dict(saved)
            again = wrapped.state_dict()
            for key, state in saved["state"].items():
                found.append(are_equal(again["state"][key].values(), state.values()))

    model = Asking()
    start = copy.deepcopy(model)
    fit(model, example["loader"])
    assert len(found) == 8 * 5
    assert all(found)
    assert are_equal(values(model), plain(start, example["loader"], epochs=1))


class Half(MixedPrecision):
    """float16 with a scaler that overflows at first, on a CPU, where Lightning takes bfloat16."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**14))


def plain_half(model, loader, max_norm):
    optimizer, scaler = VariationalHyperAdam(model.parameters()), Half().scaler
    for inputs, targets in loader:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = mse_loss(model.network(inputs), targets)
        scaler.scale(loss).backward()
        if max_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
    return values(model), scaler.get_scale()


def test_float16(example):
    model = counted(example["Regression"])
    start = copy.deepcopy(model)
    plugin = Half()
    fit(model, example["loader"], plugins=[plugin])
    expected, scale = plain_half(start, example["loader"], None)
    assert plugin.scaler.get_scale() == scale < 2.0**14
    assert 0 < model.optimizer.skipped_steps < 8
    assert are_equal(values(model), expected)


def test_float16_clipped_by_lightning(example):
    class Plain(example["Regression"]):
        def configure_optimizers(self):
            optimizer = VariationalHyperAdam(self.named_parameters())
            optimizer._step_supports_amp_scaling = False
            return optimizer

    model = Plain()
    start = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(example["Regression"](), example["loader"], plugins=[Half()], gradient_clip_val=1.0)
    plugin = Half()
    fit(model, example["loader"], plugins=[plugin], gradient_clip_val=1.0)
    expected, scale = plain_half(copy.deepcopy(start), example["loader"], 1.0)
    assert plugin.scaler.get_scale() == scale < 2.0**14
    assert are_equal(values(model), expected)
    assert not are_equal(values(model), plain_half(start, example["loader"], None)[0])
