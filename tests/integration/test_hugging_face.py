"""The Trainer of transformers: its steps are those of a plain loop over what it fed the model."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import (
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

from hyperadam import VariationalHyperAdam
from integration.examples import are_equal, run_example, train_plainly, values

STEPS = 12
SEED = 7


@pytest.fixture
def fed(monkeypatch):
    """What each forward pass was given, and the random state (of the dropout) at its start."""
    passes, forward = [], GPT2LMHeadModel.forward

    @functools.wraps(forward)  # the Trainer reads its signature
    def recording(model, *arguments, **inputs):
        if model.training:
            passes.append((torch.get_rng_state(), copy.deepcopy(inputs)))
        return forward(model, *arguments, **inputs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", recording)
    return passes


@pytest.fixture
def example(fed):
    return run_example("Hugging Face Trainer", SEED)


def test_the_example_accumulates_clips_and_schedules(example, fed):
    passes = list(fed)
    assert len(passes) == 2 * STEPS
    torch.manual_seed(SEED)
    torch.randint(64, (48, 16))
    start = GPT2LMHeadModel(example["config"]).train()
    found = values(example["trainer"].model)

    def of(clipped=True, scheduled=True):
        model = copy.deepcopy(start)
        optimizer = VariationalHyperAdam(model.named_parameters())
        scheduler = get_cosine_schedule_with_warmup(optimizer, 0, STEPS) if scheduled else None

        def loss(state, inputs):
            torch.set_rng_state(state)
            return 2 * model(**inputs).loss  # it is over the tokens of both batches already

        losses = [lambda one=one: loss(*one) for one in passes]
        max_norm = 0.5 if clipped else None
        train_plainly(
            model, losses, optimizer, scheduler=scheduler, accumulate=2, max_norm=max_norm
        )
        return values(model)

    assert are_equal(found, of())
    assert not are_equal(found, of(clipped=False))
    assert not are_equal(found, of(scheduled=False))


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_has_the_same_bits(example, step):
    torch.manual_seed(SEED + 1)
    resumed = example["train"](f"checkpoints/checkpoint-{step}")
    assert resumed.state.global_step == STEPS
    assert are_equal(values(resumed.model), values(example["trainer"].model))


def test_an_optimizer_that_the_trainer_makes(example, folder):
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        GPT2LMHeadModel(example["config"]),
        arguments,
        train_dataset=example["texts"],
        optimizer_cls_and_kwargs=(VariationalHyperAdam, {"decoupled_weight_decay": True}),
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, VariationalHyperAdam)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(param.dim() == 2 for param in decayed["params"])
    assert all(param.dim() == 1 for param in others["params"])
    assert {int(state["step"]) for state in optimizer.state_dict()["state"].values()} == {2}
