"""The Trainer of transformers: its steps are those of a plain loop over what it fed the model."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

from hyperadam import VariationalHyperAdam
from hyperadam.rule import attention_projections
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


@pytest.mark.parametrize(
    ("kind", "settings", "count"),
    [
        ("Bert", {"num_attention_heads": 2, "intermediate_size": 8}, 8),
        ("GPT2", {}, 4),
        ("GPTNeoX", {"num_attention_heads": 2, "intermediate_size": 8}, 4),
        ("Llama", {"num_attention_heads": 2, "intermediate_size": 8}, 8),
        ("ViT", {"num_attention_heads": 2, "intermediate_size": 8}, 8),
        ("T5", {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 8}, 24),
        ("RoFormer", {"num_attention_heads": 2, "intermediate_size": 8}, 8),
        ("Mamba", {}, 0),
        ("Rwkv", {"attention_hidden_size": 8}, 0),
    ],
)
def test_names_of_its_models_tell_attentions_projections(kind, settings, count):
    """Of two layers; what else a layer has is not taken for one."""
    layers = {"num_layers": 2} if kind == "T5" else {"num_hidden_layers": 2, "hidden_size": 8}
    config = getattr(transformers, f"{kind}Config")(**{**layers, **settings, "vocab_size": 16})
    if kind == "GPT2":
        config = GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=16)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(config)
    matrices = {name for name, param in model.named_parameters() if param.dim() > 1}
    found = attention_projections(name for name, _ in model.named_parameters()) & matrices
    assert len(found) == count, sorted(found)
