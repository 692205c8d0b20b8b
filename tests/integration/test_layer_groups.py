"""Groups of the kind that timm makes: weight decay and a scale of the learning rate by layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import LayerNorm, Linear, Sequential, Tanh

from hyperadam import VariationalHyperAdam
from integration.examples import are_equal, run_example, values

LR, STEPS = 1e-2, 6


@pytest.fixture
def layer_groups():
    return run_example("Groups by layer")["layer_groups"]


def make_model():
    torch.manual_seed(0)
    return Sequential(Linear(4, 8), LayerNorm(8), Tanh(), Linear(8, 2))


def named(groups, model):
    """With parameters and their names apart, as timm has them."""
    names = {param: name for name, param in model.named_parameters()}
    found = []
    for group in groups:
        assert all(name == names[param] for name, param in group["params"])
        apart = {
            "params": [param for _, param in group["params"]],
            "param_names": [name for name, _ in group["params"]],
        }
        found.append({**group, **apart})
    return found


def set_grads(model, step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 4, generator=generator)
    model.zero_grad()
    (model(inputs) - inputs[:, :2]).square().mean().backward()


def test_the_example():
    names = run_example("Groups by layer")
    groups = names["optimizer"].param_groups
    assert [group["lr_scale"] for group in groups] == [0.25, 0.25, 0.5, 1.0, 1.0]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.0, 0.01, 0.0]
    assert [group["initial_lr"] for group in groups] == [
        names["optimizer"].weights.lr * group["lr_scale"] for group in groups
    ]
    assert all(group["lr"] == pytest.approx(0, abs=1e-12) for group in groups)


def test_each_group_moves_by_its_own_settings(layer_groups):
    model = make_model()
    groups = named(layer_groups(model, weight_decay=0.1, layer_decay=0.5), model)
    optimizer = VariationalHyperAdam(groups, lr=LR, sample=False, decoupled_weight_decay=True)
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    before = copy.deepcopy(model)
    set_grads(model, 0)
    optimizer.step()
    old = dict(before.named_parameters())
    lrs, rule = set(), optimizer.weights.rule
    for group in optimizer.param_groups:
        lr, decay = LR * group["lr_scale"], group["weight_decay"]
        lrs.add(lr)
        for name, param in zip(group["param_names"], group["params"], strict=True):
            direction = optimizer.update_distribution(param).mean
            rule.scale_row_means_(direction, param.shape)
            expected = old[name] * (1 - lr * decay) - lr * rule.lr_scale(param.shape) * direction
            torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)
            assert not torch.equal(param, old[name])
    assert len(lrs) == 3


def test_directions_do_not_depend_on_the_grouping(layer_groups):
    """The rule sees one problem: groups in the order of the parameters change no direction."""
    model, other = make_model(), make_model()
    groups = [
        {"params": [param], "lr_scale": 0.5**number}
        for number, param in enumerate(model.parameters())
    ]
    optimizers = [VariationalHyperAdam(groups), VariationalHyperAdam(other.parameters())]
    for network, optimizer in zip((model, other), optimizers, strict=True):
        set_grads(network, 0)
        optimizer.step()
    assert are_equal(values(model), values(other))


def scale_as_timm(optimizer, step):
    """timm's schedulers set a group's learning rate as the schedule's value times its scale."""
    value = LR * (1 + math.cos(math.pi * step / STEPS)) / 2
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"]


def test_a_resumed_run_has_the_same_bits(layer_groups, tmp_path):
    def make(model):
        groups = named(layer_groups(model, weight_decay=0.1, layer_decay=0.5), model)
        return VariationalHyperAdam(groups, lr=LR)

    def train(model, optimizer, steps):
        for step in steps:
            scale_as_timm(optimizer, step)
            set_grads(model, step)
            optimizer.step()

    whole, part = make_model(), make_model()
    train(whole, make(whole), range(STEPS))
    half = make(part)
    train(part, half, range(3))
    torch.save(half.state_dict(), tmp_path / "optimizer.pt")
    resumed = make(part)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for saved, loaded in zip(half.param_groups, resumed.param_groups, strict=True):
        assert loaded["lr_scale"] == saved["lr_scale"]
        assert loaded["param_names"] == saved["param_names"]
    train(part, resumed, range(3, STEPS))
    assert are_equal(values(whole), values(part))
