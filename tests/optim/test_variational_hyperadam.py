from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from conftest import GOLDEN, make_weights, random_theta
from hyperadam import VariationalHyperAdam, Weights, save_weights
from hyperadam.errors import OutOfMemoryError, WeightsError
from hyperadam.kernels import TileLayout
from hyperadam.optim.arena import Arena
from hyperadam.rule import RULES, VariationalHyperAdamRule, standard_normal

WEIGHTS = make_weights()


def make(params, **settings):
    return VariationalHyperAdam(params, **{"weights": WEIGHTS, **settings})


def make_params(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def set_grads(params, step, scale=1.0):
    """Gradients that depend on the step and on the values, as in training."""
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + index)
        noise = torch.randn(param.shape, generator=generator)
        param.grad = (scale * (param.detach() + 0.1 * noise.to(param.dtype))).to(param.dtype)


def train(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        set_grads(params, step)
        optimizer.step()


def values(params):
    return [param.detach().clone() for param in params]


def assert_equal(xs, ys):
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(x, y)


def state_of(optimizer, param):
    """A parameter's state by name, as state dicts have it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    (index,) = (i for i, p in enumerate(params) if p is param)
    return optimizer.state_dict()["state"].get(index, {})


def snapshot(optimizer, params):
    """All that a refused call must leave as it was."""
    return copy.deepcopy((optimizer.state_dict(), values(params)))


def assert_unchanged(optimizer, params, before):
    state_dict, old = before
    now = optimizer.state_dict()
    assert now["param_groups"] == state_dict["param_groups"]
    assert now["state"].keys() == state_dict["state"].keys()
    for key, saved in state_dict["state"].items():
        assert_equal(list(now["state"][key].values()), list(saved.values()))
    assert_equal(values(params), old)


def test_the_signature():
    parameters = inspect.signature(VariationalHyperAdam).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "params": inspect.Parameter.empty,
        "lr": None,
        "weights": "default",
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
        "sample": True,
        "seed": 0,
        "backend": "auto",
        "state_dtype": "float32",
        "nonfinite": "skip",
        "maximize": False,
        "shard_of": None,
        "process_group": None,
        "calibrate": None,
    }
    keywords = [n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keywords == list(parameters)[2:]


# -- the rule ------------------------------------------------------------------------------------


def test_it_applies_the_golden_updates():
    with np.load(GOLDEN / "variational_hyperadam_trajectory.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files}
    theta = {k.removeprefix("theta."): v for k, v in golden.items() if k.startswith("theta.")}
    weights = Weights(VariationalHyperAdamRule(), theta, lr=1e-3)
    param = torch.zeros(257, dtype=torch.float64, requires_grad=True)
    other = torch.zeros(257, dtype=torch.float64)
    optimizer = make([param], weights=weights)
    for t, grad in enumerate(golden["grads"]):
        param.grad = grad
        optimizer.step()
        distribution = optimizer.update_distribution(param)
        mean = golden["updates"][t] - distribution.stddev * golden["noise"][t]
        torch.testing.assert_close(distribution.mean, mean, rtol=1e-9, atol=1e-9)
        noise = standard_normal(0, t + 1, 0, 257, dtype=torch.float64)
        other -= 1e-3 * (mean + distribution.stddev * noise)
        torch.testing.assert_close(param.detach(), other, rtol=1e-9, atol=1e-9)


def test_lr_comes_from_the_weights():
    params = make_params(3, 2)
    optimizer = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}])
    assert [group["lr"] for group in optimizer.param_groups] == [WEIGHTS.lr, 0.5]
    assert type(optimizer.param_groups[0]["lr"]) is float
    optimizer.add_param_group({"params": make_params(2), "lr": None})
    assert optimizer.param_groups[2]["lr"] == WEIGHTS.lr
    assert make(make_params(2), lr=0.25).param_groups[0]["lr"] == 0.25


def test_each_group_has_its_own_lr():
    """lr scales the step and nothing else: the rule sees one problem."""

    def after(lr):
        params = make_params(4, 3)
        optimizer = make([{"params": params[:1], "lr": lr}, {"params": params[1:]}])
        start = values(params)
        train(optimizer, params, 1)
        return [new - old for new, old in zip(values(params), start, strict=True)]

    small, large = after(1e-3), after(1e-1)
    torch.testing.assert_close(large[0], 100 * small[0], rtol=1e-3, atol=1e-6)
    assert torch.equal(large[1], small[1])


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_the_fan_in_scales_a_parameters_step(lr):
    """A fan-in of four times the base: half the step. A vector's has a scale of its own."""
    scaled_rule = dataclasses.replace(WEIGHTS.rule, fan_in_base=4.0, vector_scale=0.25)

    def moves(weights):
        params = make_params((3, 16), (2, 4), (16,))
        start = values(params)
        train(make(params, lr=lr, weights=weights), params, 1)
        return [new - old for new, old in zip(values(params), start, strict=True)]

    plain = moves(WEIGHTS)
    scaled = moves(dataclasses.replace(WEIGHTS, rule=scaled_rule))
    for move, expected in zip(scaled, (plain[0] / 2, plain[1], plain[2] / 4), strict=True):
        torch.testing.assert_close(move, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_row_means_are_scaled(dtype):
    """Of (3, 4, 4), sixteen inputs: a half of what a row's step has in common. Not of vectors."""
    rule = dataclasses.replace(WEIGHTS.rule, row_mean_base=4.0)

    def moves(weights):
        params = make_params((3, 4, 4), (2, 4), (16,), (5, 0), dtype=dtype)
        start = values(params)
        train(make(params, weights=weights), params, 1)
        return [new - old for new, old in zip(values(params), start, strict=True)]

    plain, scaled = moves(WEIGHTS), moves(dataclasses.replace(WEIGHTS, rule=rule))
    mean = plain[0].mean((1, 2), keepdim=True)
    assert float(mean.abs().max()) > 1e-4
    torch.testing.assert_close(scaled[0], plain[0] - mean / 2, rtol=1e-3, atol=1e-6)
    for number in (1, 2, 3):
        assert torch.equal(scaled[number], plain[number])


NAMES = ("attn.in_proj_weight", "attn.in_proj_bias", "mlp.weight")


def attention_weights(scale=0.1):
    rule = dataclasses.replace(WEIGHTS.rule, attention_scale=scale)
    return dataclasses.replace(WEIGHTS, rule=rule)


def attention_moves(named, weights, steps=1):
    """How a layer's parameters move in a step, by what is made of names and parameters."""
    params = make_params((12, 4), (12,), (4, 4))
    start = values(params)
    optimizer = make(named(list(zip(NAMES, params, strict=True))), weights=weights)
    train(optimizer, params, steps)
    return [new - old for new, old in zip(values(params), start, strict=True)]


def in_groups(pairs):
    return [{"params": pairs[1:]}, {"params": pairs[:1], "weight_decay": 0.0}]


@pytest.mark.parametrize("named", [list, iter, in_groups], ids=["list", "iterator", "groups"])
def test_names_tell_attentions_projections(named):
    plain = attention_moves(named, WEIGHTS)
    scaled = attention_moves(named, attention_weights())
    torch.testing.assert_close(scaled[0], 0.1 * plain[0], rtol=1e-3, atol=1e-6)
    assert_equal(scaled[1:], plain[1:])


def test_a_query_and_its_key_may_be_in_two_groups():
    def moves(weights):
        params = make_params((4, 4), (4, 4), (4, 4))
        start = values(params)
        names = ("attn.q_proj.weight", "attn.k_proj.weight", "attn.o_proj.weight")
        groups = [{"params": [pair]} for pair in zip(names, params, strict=True)]
        train(make(groups, weights=weights), params, 1)
        return [new - old for new, old in zip(values(params), start, strict=True)]

    plain, scaled = moves(WEIGHTS), moves(attention_weights())
    for own, whole in zip(scaled, plain, strict=True):
        torch.testing.assert_close(own, 0.1 * whole, rtol=1e-3, atol=1e-6)


def test_without_names_no_parameter_is_attentions():
    def nameless(pairs):
        return [param for _, param in pairs]

    plain = attention_moves(nameless, WEIGHTS)
    assert_equal(attention_moves(nameless, attention_weights()), plain)
    assert_equal(attention_moves(list, WEIGHTS), plain)


@pytest.mark.parametrize(
    "through",
    ["state_dict", "nameless_state_dict", "into_a_nameless_optimizer", "deepcopy", "pickle"],
)
def test_attentions_projections_are_known_after_a_resume(through):
    weights = attention_weights()

    def begin(names=True):
        params = make_params((12, 4), (12,), (4, 4))
        pairs = list(zip(NAMES, params, strict=True))
        return params, make(pairs if names else params, weights=weights)

    params, optimizer = begin()
    train(optimizer, params, 4)
    first, stopped = begin()
    train(stopped, first, 2)
    if through in ("deepcopy", "pickle"):
        if through == "deepcopy":
            resumed = copy.deepcopy(stopped)
        else:
            buffer = io.BytesIO()
            torch.save(stopped, buffer)
            buffer.seek(0)
            resumed = torch.load(buffer, weights_only=False)
        again = resumed.param_groups[0]["params"]
    else:
        again, resumed = begin(names=through != "into_a_nameless_optimizer")
        with torch.no_grad():
            for new, old in zip(again, first, strict=True):
                new.copy_(old)
        saved = stopped.state_dict()
        if through == "nameless_state_dict":
            del saved["param_groups"][0]["param_names"]
        resumed.load_state_dict(saved)
    train(resumed, again, 2, start=2)
    assert_equal(values(again), values(params))


@given(
    cuts=st.lists(st.integers(0, 24), max_size=4),
    groups=st.integers(1, 3),
    sample=st.booleans(),
)
def test_splitting_parameters_changes_nothing(cuts, groups, sample):
    """However 24 coordinates are cut into tensors and groups, empty ones included."""
    whole = make_params(24, dtype=torch.float64)
    edges = [0, *sorted(cuts), 24]
    sizes = [high - low for low, high in itertools.pairwise(edges)]
    parts = [part.clone().requires_grad_() for part in whole[0].detach().split(sizes)]
    one = make(whole, sample=sample)
    share = math.ceil(len(parts) / groups)
    many = make(
        [{"params": parts[at : at + share]} for at in range(0, len(parts), share)], sample=sample
    )
    for step in range(3):
        set_grads(whole, step)
        for part, grad in zip(parts, whole[0].grad.split(sizes), strict=True):
            part.grad = grad.clone()
        one.step()
        many.step()
    torch.testing.assert_close(torch.cat(values(parts)), values(whole)[0], rtol=1e-10, atol=1e-12)


def test_strides_do_not_matter():
    plain = make_params((3, 5))
    turned = [plain[0].detach().t().contiguous().t().requires_grad_()]
    assert not turned[0].is_contiguous()
    one, two = make(plain), make(turned)
    for step in range(3):
        set_grads(plain, step)
        turned[0].grad = plain[0].grad.t().contiguous().t()
        assert not turned[0].grad.is_contiguous()
        one.step()
        two.step()
    assert torch.equal(plain[0], turned[0])


def test_weight_decay():
    """L2 adds to the gradient; the decoupled one shrinks the parameters beside the step."""
    decay, lr = 0.1, 0.01

    def after(add_by_hand=0.0, shrink=1.0, **settings):
        params = make_params(6, dtype=torch.float64)
        optimizer = make(params, lr=lr, **settings)
        for step in range(3):
            set_grads(params, 7 * step)
            params[0].grad += add_by_hand * params[0].detach()
            frozen_grad = params[0].grad.clone()
            with torch.no_grad():
                params[0].mul_(shrink)
            params[0].grad = frozen_grad
            optimizer.step()
        return values(params)[0]

    torch.testing.assert_close(after(weight_decay=decay), after(add_by_hand=decay))
    decoupled = after(weight_decay=decay, decoupled_weight_decay=True)
    torch.testing.assert_close(decoupled, after(shrink=1 - lr * decay))
    assert not torch.allclose(decoupled, after(weight_decay=decay))


def test_maximize():
    down, up = make_params(5), make_params(5)
    minimizer, maximizer = make(down), make(up, maximize=True)
    for step in range(3):
        set_grads(down, step)
        up[0].grad = -down[0].grad
        minimizer.step()
        maximizer.step()
    assert torch.equal(down[0], up[0])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_viewed_as_real(dtype):
    complex_params = [torch.randn(3, 2, dtype=dtype).requires_grad_()]
    real_params = [torch.view_as_real(complex_params[0].detach()).clone().requires_grad_()]
    one, two = make(complex_params), make(real_params)
    for step in range(3):
        set_grads(real_params, step)
        complex_params[0].grad = torch.view_as_complex(real_params[0].grad.clone())
        one.step()
        two.step()
    assert torch.equal(torch.view_as_real(complex_params[0].detach()), real_params[0].detach())
    assert one.update_distribution(complex_params[0]).mean.shape == (3, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_float32_state(dtype):
    params = make_params(40, dtype=dtype)
    twin = [params[0].detach().float().requires_grad_()]
    optimizer, reference = make(params), make(twin)
    set_grads(params, 0)
    twin[0].grad = params[0].grad.float()
    optimizer.step()
    reference.step()
    for name, value in state_of(optimizer, params[0]).items():
        assert value.dtype == (torch.int64 if name == "step" else torch.float32)
        assert torch.equal(value, state_of(reference, twin[0])[name])
    assert torch.equal(params[0], twin[0].to(dtype))


def test_double_precision_is_computed_in_double_precision():
    params = make_params(9, dtype=torch.float64)
    optimizer = make(params, sample=False)
    train(optimizer, params, 3)
    assert state_of(optimizer, params[0])["m"].dtype == torch.float64
    mean = optimizer.update_distribution(params[0]).mean
    assert not torch.equal(mean, mean.float().double())


def test_mixed_precision_runs_in_the_widest():
    params = [*make_params(4, dtype=torch.float64), *make_params(4, dtype=torch.float32)]
    optimizer = make(params)
    train(optimizer, params, 2)
    assert state_of(optimizer, params[0])["m"].dtype == torch.float64
    assert state_of(optimizer, params[1])["m"].dtype == torch.float64


# -- the contract of torch.optim -----------------------------------------------------------------


def test_a_parameter_without_gradient_is_left_out():
    """Its value and state stay, and the others' norms run without it."""
    params, alone = make_params(4, 3), make_params(4)
    both, one = make(params), make(alone)
    train(both, params, 2)
    before = state_of(both, params[1])
    frozen = values(params)[1]
    set_grads(params, 5)
    params[1].grad = None
    both.step()
    assert torch.equal(params[1], frozen)
    assert_equal(list(state_of(both, params[1]).values()), list(before.values()))
    assert int(both.state[params[0]]["step"]) == 3
    never = make_params(4, 3)
    optimizer = make(never)
    for step in range(3):
        set_grads(never[:1], step)
        set_grads(alone, step)
        optimizer.step()
        one.step()
    assert torch.equal(never[0], alone[0])
    assert int(optimizer.state[never[1]]["step"]) == 0


def test_no_gradients_at_all():
    params = make_params(3)
    optimizer = make(params)
    before = snapshot(optimizer, params)
    optimizer.step()
    assert_unchanged(optimizer, params, before)


def test_parameters_of_no_and_of_one_element():
    params = [torch.zeros(0, requires_grad=True), torch.zeros((), requires_grad=True)]
    optimizer = make(params)
    params[0].grad = torch.zeros(0)
    optimizer.step()  # there may be no coordinate at all
    assert int(optimizer.state[params[0]]["step"]) == 1
    train(optimizer, params, 2)
    assert optimizer.update_distribution(params[1]).mean.shape == ()
    assert float(params[1].detach()) != 0
    again = make(params)
    again.load_state_dict(optimizer.state_dict())


def test_looking_at_the_state_does_not_spoil_the_state_dict():
    params = [*make_params(3), torch.zeros(2)]  # the second is frozen
    optimizer = make(params)
    assert [optimizer.state[param] == {} for param in params] == [False, True]
    make(params).load_state_dict(optimizer.state_dict())


def test_a_state_dict_has_its_own_memory():
    """Also what lies in one tile, which needs no copy to be in order."""
    params = make_params(10, 3000)
    optimizer = make(params)
    train(optimizer, params, 2)
    saved = optimizer.state_dict()["state"]
    before = copy.deepcopy(saved)
    train(optimizer, params, 1)
    for number, fields in saved.items():
        for name, value in fields.items():
            assert torch.equal(value, before[number][name]), name
            assert value.untyped_storage().nbytes() < 2 * value.nbytes + 4096, name


def test_a_group_added_later_joins():
    first, second = make_params(4), make_params(3, seed=1)
    optimizer = make(first)
    train(optimizer, first, 2)
    optimizer.add_param_group({"params": second, "lr": 0.5})
    start = values(second)
    train(optimizer, [*first, *second], 2)
    assert [int(optimizer.state[p]["step"]) for p in (*first, *second)] == [4, 2]
    assert not torch.equal(second[0], start[0])


def test_closure():
    param = torch.tensor([2.0, -3.0], requires_grad=True)
    optimizer = make([param])
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    first = optimizer.step(closure)
    assert float(first.detach()) == 13.0
    optimizer.step(closure)
    assert len(calls) == 2
    set_grads([param], 0)
    assert optimizer.step() is None


def test_schedulers():
    params = make_params(3)
    optimizer = make(params)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    rates = []
    for step in range(4):
        train(optimizer, params, 1, step)
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(
        [WEIGHTS.lr * (1 + math.cos(math.pi * t / 4)) / 2 for t in (1, 2, 3, 4)]
    )
    frozen = values(params)
    train(optimizer, params, 1, 9)  # the schedule ends at lr 0
    assert_equal(values(params), frozen)


def test_tensor_lr():
    plain, tensor = make_params(3), make_params(3)
    train(make(plain, lr=0.125), plain, 2)
    train(make(tensor, lr=torch.tensor(0.125)), tensor, 2)
    assert_equal(values(plain), values(tensor))


def test_clip_grad_norm_and_training():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    weights = make_weights(VariationalHyperAdamRule())
    optimizer = VariationalHyperAdam(model.parameters(), lr=1e-3, weights=weights)
    x = torch.randn(64, 8)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_hooks_and_named_parameters():
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.named_parameters())
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(optimizer, list(model.parameters()), 1)
    assert seen == ["post"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_torch_generators_are_left_alone():
    params = make_params(10)
    optimizer = make(params)
    before = torch.get_rng_state()
    train_params = values(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(params[0], train_params[0])


# -- noise ---------------------------------------------------------------------------------------


def directions(seed=0, sample=True, shapes=(400,), steps=2):
    params = make_params(*shapes, dtype=torch.float64)
    optimizer = make(params, lr=1.0, seed=seed, sample=sample)
    train(optimizer, params, steps - 1)
    set_grads(params, steps)
    before = values(params)
    optimizer.step()
    moved = [old - new for old, new in zip(before, values(params), strict=True)]
    return moved, [optimizer.update_distribution(param) for param in params]


def test_the_update_is_the_distribution_and_the_noise():
    moved, (normal,) = directions(seed=5)
    noise = standard_normal(5, 2, 0, 400, dtype=torch.float64)
    torch.testing.assert_close(moved[0], normal.mean + normal.stddev * noise)
    mean_only, (same,) = directions(seed=5, sample=False, steps=1)
    torch.testing.assert_close(mean_only[0], same.mean)


def test_same_seed_same_run():
    for seed, other, equal in ((3, 3, True), (3, 4, False)):
        a, _ = directions(seed)
        b, _ = directions(other)
        assert torch.equal(a[0], b[0]) == equal


def test_noise_follows_the_coordinate_not_the_tensor():
    """Also where a tensor in between has no gradient."""
    params = make_params(5, 6, 7)
    optimizer = make(params, lr=1.0, seed=2)
    set_grads(params, 0)
    params[1].grad = None
    before = values(params)
    optimizer.step()
    noise = standard_normal(2, 1, 0, 18)
    for index, piece in ((0, noise[:5]), (2, noise[11:])):
        normal = optimizer.update_distribution(params[index])
        moved = before[index] - params[index].detach()
        torch.testing.assert_close(moved, normal.mean + normal.stddev * piece, rtol=1e-4, atol=1e-5)


def test_groups_can_choose_to_sample():
    params = make_params(5, 6)
    optimizer = make([{"params": params[:1], "sample": False}, {"params": params[1:]}], lr=1.0)
    set_grads(params, 0)
    before = values(params)
    optimizer.step()
    errors = [
        old - param.detach() - optimizer.update_distribution(param).mean
        for old, param in zip(before, params, strict=True)
    ]
    assert float(errors[0].abs().max()) < 1e-5
    assert float(errors[1].abs().max()) > 1e-2


def test_update_distribution_errors():
    params = make_params((2, 3))
    optimizer = make(params)
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.update_distribution(params[0])
    with pytest.raises(ValueError, match="not a parameter"):
        optimizer.update_distribution(torch.zeros(6))
    train(optimizer, params, 1)
    normal = optimizer.update_distribution(params[0])
    assert isinstance(normal, torch.distributions.Normal)
    assert normal.batch_shape == (2, 3)
    plain = make_weights(VariationalHyperAdamRule(channels=4, var_block=False))
    without = make(params, weights=plain)
    train(without, params, 1)
    with pytest.raises(RuntimeError, match="no VarBlock"):
        without.update_distribution(params[0])


# -- resume --------------------------------------------------------------------------------------


def through_memory(state_dict):
    return copy.deepcopy(state_dict)


def through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("carry", [through_memory, through_a_file])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
def test_resume_is_bit_for_bit(carry, dtype):
    def groups(params):
        return [
            {"params": params[:1], "lr": 0.02, "weight_decay": 0.1},
            {"params": params[1:], "decoupled_weight_decay": True, "weight_decay": 0.2},
        ]

    params = make_params((4, 3), 5, dtype=dtype)
    undisturbed = make(groups(params), seed=77)
    train(undisturbed, params, 3)
    saved, copies = carry(undisturbed.state_dict()), values(params)
    train(undisturbed, params, 4, start=3)

    resumed_params = [copied.requires_grad_() for copied in copies]
    resumed = make(groups(resumed_params), seed=1)
    resumed.load_state_dict(saved)
    train(resumed, resumed_params, 4, start=3)
    assert_equal(values(resumed_params), values(params))
    for ours, theirs in zip(resumed_params, params, strict=True):
        for name, value in state_of(resumed, ours).items():
            assert torch.equal(value, state_of(undisturbed, theirs)[name])
            assert value.dtype in (torch.int64, torch.float32, torch.float64)


def test_loaded_state_is_a_copy():
    params, others = make_params(4), make_params(4)
    one, two = make(params), make(others)
    train(one, params, 2)
    two.load_state_dict(one.state_dict())
    before = snapshot(one, params)
    train(two, others, 2)
    assert_unchanged(one, params, before)


def test_loading_float32_state_beside_bfloat16_parameters():
    params = make_params(6)
    optimizer = make(params)
    train(optimizer, params, 2)
    half = [params[0].detach().bfloat16().requires_grad_()]
    loaded = make(half)
    loaded.load_state_dict(optimizer.state_dict())
    for name, value in state_of(loaded, half[0]).items():
        assert torch.equal(value, state_of(optimizer, params[0])[name])
    train(loaded, half, 1)
    assert state_of(loaded, half[0])["m"].dtype == torch.float32


def test_users_hooks_still_see_the_state_dict():
    params = make_params(4)
    optimizer = make(params)
    train(optimizer, params, 1)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    target = make(params)
    seen = []

    def rename(_, state_dict):
        seen.append(sorted(state_dict["state"][0]))
        return {**state_dict, "state": {0: state_dict["state"].pop("old")}}

    def post(loaded):
        seen.append(loaded.state[params[0]]["m"].shape)

    broken = {**saved, "state": {"old": saved["state"][0], 0: saved["state"][0]}}
    target.register_load_state_dict_pre_hook(rename)
    target.register_load_state_dict_post_hook(post)
    target.load_state_dict(broken)
    assert len(seen) == 2
    assert seen[1] == (4, 6)
    assert target.param_groups[0]["lr"] == 0.5


def test_deepcopy_goes_its_own_way():
    params = make_params(4)
    optimizer = make(params, seed=3, nonfinite="raise")
    train(optimizer, params, 2)
    twin_params, twin = copy.deepcopy((params, optimizer))
    train(optimizer, params, 2, start=2)
    train(twin, twin_params, 2, start=2)
    assert_equal(values(params), values(twin_params))
    assert twin.nonfinite == "raise"
    assert twin.update_distribution(twin_params[0]).mean.shape == (4,)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be a number"),
        ({"lr": math.nan}, "lr must be a number"),
        ({"lr": math.inf}, "lr must be a number"),
        ({"lr": "lite"}, "at or above 0; got 'lite'; weights are given by name: weights=..."),
        ({"lr": torch.tensor(-1.0)}, "lr must be a number"),
        ({"weight_decay": -0.1}, "weight_decay must be a number"),
        ({"weight_decay": math.nan}, "weight_decay must be a number"),
        ({"weight_decay": None}, "weight_decay must be a number"),
        ({"seed": -1}, "seed must be an integer"),
        ({"seed": 2**63}, "seed must be an integer"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"seed": True}, "seed must be an integer"),
        ({"lr": torch.tensor([1e-3])}, r"lr must be a number \(a Tensor of shape \(\)\)"),
        ({"lr": torch.ones(2)}, "lr must be a number"),
        ({"sample": "no"}, "sample must be True or False"),
        ({"maximize": 1}, "maximize must be True or False"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"nonfinite": "ignore"}, "unknown nonfinite 'ignore'"),
        ({"weights": "nobody's"}, "unknown weights"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(make_params(2), **settings)


def test_bad_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    with pytest.raises(TypeError, match="Tensors"):
        make([1.0])
    with pytest.raises(ValueError, match="floating or complex"):
        make([torch.zeros(2, dtype=torch.int64)])


def test_a_bad_group_is_not_added():
    params = make_params(3)
    optimizer = make(params)
    for bad in (
        {"params": make_params(2), "lr": -1.0},
        {"params": make_params(2), "weight_decay": math.nan},
        {"params": make_params(2), "weights": WEIGHTS},
        {"params": make_params(2), "nonfinite": "raise"},
        {"params": [torch.zeros(2, dtype=torch.int64)]},
        {"params": params},
    ):
        with pytest.raises(ValueError, match=r"must be|of the optimizer|more than one"):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError):
        optimizer.add_param_group(params)


@pytest.mark.parametrize("name", sorted(set(RULES) - {"variational-hyperadam"}))
def test_weights_of_another_rule(name, tmp_path):
    weights = make_weights(RULES[name](channels=4))
    save_weights(weights, tmp_path / "other.safetensors")
    for given_as in (weights, tmp_path / "other.safetensors", str(tmp_path / "other.safetensors")):
        with pytest.raises(WeightsError, match=f"these are of {name}"):
            make(make_params(2), weights=given_as)


def test_damaged_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="not a readable"):
        make(make_params(2), weights=path)
    rule = VariationalHyperAdamRule(channels=5)
    with pytest.raises(WeightsError, match="has shape"):
        Weights(rule, random_theta(VariationalHyperAdamRule(channels=4)), lr=1.0)


def test_sparse_gradients():
    params = make_params((3, 3), 4)
    optimizer = make(params)
    train(optimizer, params, 1)
    before = snapshot(optimizer, params)
    params[0].grad = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert_unchanged(optimizer, params, before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e19, -2e15])
def test_nonfinite_gradients_are_skipped(bad, backend):
    params = make_params(4, 3)
    optimizer = make(params, backend=backend)
    train(optimizer, params, 1)
    before = snapshot(optimizer, params)
    set_grads(params, 1)
    params[1].grad[2] = bad
    with pytest.warns(RuntimeWarning, match="NaN or infinity") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    for _ in range(8):
        optimizer.step()  # without a word: warnings are errors here
    with pytest.warns(RuntimeWarning, match=r"skipped \(10 have been by now\)"):
        optimizer.step()
    assert optimizer.skipped_steps == 10
    assert_unchanged(optimizer, params, before)
    train(optimizer, params, 1, start=2)
    assert int(optimizer.state[params[0]]["step"]) == 2

    fresh = make_params(3)
    first = make(fresh)
    fresh[0].grad = torch.full((3,), bad)
    start = snapshot(first, fresh)
    with pytest.warns(RuntimeWarning):
        first.step()
    assert_unchanged(first, fresh, start)


def test_an_overflowing_penalty_is_skipped_too():
    params = make_params(3)
    optimizer = make(params, weight_decay=3e38)
    with torch.no_grad():
        params[0].fill_(10.0)
    params[0].grad = torch.ones(3)
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step()
    assert torch.equal(params[0].detach(), torch.full((3,), 10.0))


def test_autocast_does_not_reach_the_rule():
    outside, inside = make_params(30), make_params(30)
    train(make(outside), outside, 2)
    optimizer = make(inside)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(optimizer, inside, 2)
    assert torch.equal(outside[0], inside[0])


def test_numbers_of_numpy_become_plain():
    params = make_params(3)
    optimizer = make(params, lr=np.float32(0.5), weight_decay=np.int64(0), seed=np.int64(3))
    group = optimizer.param_groups[0]
    assert (type(group["lr"]), type(group["weight_decay"]), type(group["seed"])) == (
        float, float, int,
    )  # fmt: skip
    train(optimizer, params, 1)
    assert_equal(
        [through_a_file(optimizer.state_dict())["state"][0]["m"]],
        [state_of(optimizer, params[0])["m"]],
    )


def test_nonfinite_gradients_raise():
    params = make_params(4, (3, 2))
    optimizer = make(params, nonfinite="raise")
    train(optimizer, params, 1)
    before = snapshot(optimizer, params)
    set_grads(params, 1)
    for bad in (math.nan, 2e15):
        params[1].grad[0, 0] = bad
        with pytest.raises(RuntimeError, match=r"shape \(3, 2\) holds NaN.*\(1 parameters"):
            optimizer.step()
    assert_unchanged(optimizer, params, before)
    assert optimizer.skipped_steps == 0


def test_parameters_on_two_devices():
    params = [torch.zeros(2, requires_grad=True), torch.zeros(2, device="meta", requires_grad=True)]
    optimizer = make(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    with pytest.raises(RuntimeError, match="one device"):
        optimizer.step()


def test_parameters_that_are_given_memory_later():
    """State is there as soon as it can be, so that torch.distributed.checkpoint makes no step."""
    later, known = make_params(4, (3, 2)), make_params(4, (3, 2))
    values = [param.detach().clone() for param in later]
    for param in later:
        torch.utils.swap_tensors(param, torch.nn.Parameter(param.detach().to("meta")))
    optimizer, expected = make(later), make(known)
    assert optimizer.state
    assert optimizer.state_dict()["state"] == {0: {}, 1: {}}
    assert copy.deepcopy(optimizer).state_dict()["state"] == {0: {}, 1: {}}
    for param, value in zip(later, values, strict=True):
        torch.utils.swap_tensors(param, torch.nn.Parameter(value))
    state = optimizer.state_dict()["state"]
    torch.testing.assert_close(state, expected.state_dict()["state"], rtol=0, atol=0)
    assert [int(entry["step"]) for entry in state.values()] == [0, 0]
    for each, params in ((optimizer, later), (expected, known)):
        train(each, params, 3)
    assert_equal(later, known)


@pytest.fixture
def keep_parameters():
    """``to_empty`` leaves a model its parameters, as it does under fully_shard."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def make_modules(device="cpu"):
    """A model and its optimizer."""
    modules = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(device)
    return modules, make(modules.parameters(), seed=3)


def give_memory(modules, values):
    modules.to_empty(device="cpu")
    with torch.no_grad():
        for param, value in zip(modules.parameters(), values, strict=True):
            param.copy_(value)


@pytest.mark.usefixtures("keep_parameters")
@pytest.mark.parametrize("flatten", [False, True])
def test_asking_for_state_after_the_meta_device_takes_no_step(flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    known, expected = make_modules()
    start = values(known.parameters())
    late, optimizer = make_modules("meta")
    give_memory(late, start)
    found = get_optimizer_state_dict(late, optimizer, options=options)
    assert found.keys() == get_optimizer_state_dict(known, expected, options=options).keys()
    assert [int(entry["step"]) for entry in optimizer.state.values()] == [0] * 4
    assert all(param.grad is None for param in late.parameters())
    assert_equal(values(late.parameters()), start)
    for modules, each in ((late, optimizer), (known, expected)):
        train(each, list(modules.parameters()), 1)
    assert_equal(values(late.parameters()), values(known.parameters()))


@pytest.mark.usefixtures("keep_parameters")
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_loading_state_around_the_meta_device(early, flatten, copied):
    """The run goes on, whether its state comes before the parameters' memory or after it."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    known, expected = make_modules()
    train(expected, list(known.parameters()), 3)
    saved = copy.deepcopy(get_optimizer_state_dict(known, expected, options=options))
    late, optimizer = make_modules("meta")
    if copied:
        late, optimizer = copy.deepcopy((late, optimizer))
    if early:
        set_optimizer_state_dict(late, optimizer, saved, options=options)
        ours, theirs = optimizer.state_dict(), expected.state_dict()
        torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
    give_memory(late, values(known.parameters()))
    if not early:
        set_optimizer_state_dict(late, optimizer, saved, options=options)
    for modules, each in ((late, optimizer), (known, expected)):
        train(each, list(modules.parameters()), 3, start=3)
    assert_equal(values(late.parameters()), values(known.parameters()))


@pytest.mark.parametrize("flatten", [False, True])
def test_a_checkpoint_of_a_group_that_was_added_later(flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    modules, _ = make_modules()

    def make_in_two():
        optimizer = make(modules[0].parameters())
        optimizer.add_param_group({"params": list(modules[1].parameters())})
        return optimizer

    saved = get_optimizer_state_dict(modules, make_in_two(), options=options)
    set_optimizer_state_dict(modules, make_in_two(), saved, options=options)  # all are there
    optimizer, resumed = make_in_two(), make_in_two()
    train(optimizer, list(modules.parameters()), 1)
    saved = get_optimizer_state_dict(modules, optimizer, options=options)
    set_optimizer_state_dict(modules, resumed, saved, options=options)
    ours, theirs = resumed.state_dict(), optimizer.state_dict()
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)


def test_what_is_frozen_and_unfrozen_before_the_first_step():
    params = make_params(4, 3)
    params[0].requires_grad_(False)
    optimizer = make(params)
    assert optimizer.state_dict()["state"].keys() == {1}
    params[0].requires_grad_(True)
    assert [int(e["step"]) for e in optimizer.state_dict()["state"].values()] == [0, 0]


def test_what_is_frozen_before_it_has_memory_takes_none():
    params = [torch.empty(3, device="meta", requires_grad=True) for _ in range(2)]
    optimizer = make(params)
    params[0].requires_grad_(False)
    for param in params:
        real = torch.nn.Parameter(torch.ones(3), requires_grad=param.requires_grad)
        torch.utils.swap_tensors(param, real)
    train(optimizer, params[1:], 1)
    before = optimizer.update_distribution(params[1]).mean
    state = optimizer.state_dict()["state"]
    assert [bool(state[number]) for number in (0, 1)] == [False, True]
    assert torch.equal(optimizer.update_distribution(params[1]).mean, before)


def test_parameters_that_are_replaced_by_some_without_memory():
    optimizer = make(make_params(4, 3))
    optimizer.param_groups[0]["params"] = [torch.empty(4, device="meta", requires_grad=True)]
    assert optimizer.state_dict()["state"] == {0: {}}
    assert optimizer.state


def other_model():
    params = make_params((4, 2))
    optimizer = make(params)
    train(optimizer, params, 1)
    return optimizer.state_dict()


def other_weights():
    params = make_params(4, 3)
    optimizer = make(params, weights=make_weights(seed=8))
    train(optimizer, params, 1)
    return optimizer.state_dict()


def adams():
    params = make_params(4, 3)
    optimizer = torch.optim.Adam(params)
    train(optimizer, params, 1)
    return optimizer.state_dict()


def swapped():
    params = make_params(3, 4)
    optimizer = make(params)
    train(optimizer, params, 1)
    return optimizer.state_dict()


def without_a_tensor():
    params = make_params(4, 3)
    optimizer = make(params)
    train(optimizer, params, 1)
    state_dict = copy.deepcopy(optimizer.state_dict())
    del state_dict["state"][0]["m"]
    return state_dict


def good():
    params = make_params(4, 3)
    optimizer = make(params)
    train(optimizer, params, 1)
    return copy.deepcopy(optimizer.state_dict())


def changed(change):
    def state_dict():
        saved = good()
        change(saved)
        return saved

    return state_dict


def put(*path):
    """A state dict with one entry replaced by the last argument."""
    *places, last, value = path

    def change(saved):
        for place in places:
            saved = saved[place]
        saved[last] = value

    return changed(change)


MALFORMED = {
    "no dict": lambda: 5,
    "nothing of it": lambda: {"epoch": 3},
    "no state": changed(lambda saved: saved.pop("state")),
    "state None": put("state", None),
    "state a list": put("state", []),
    "groups None": put("param_groups", None),
    "group None": put("param_groups", [None]),
    "group without params": changed(lambda saved: saved["param_groups"][0].pop("params")),
    "no id": put("param_groups", 0, "weights_id", None),
    "id a number": put("param_groups", 0, "weights_id", 3),
    "lr negative": put("param_groups", 0, "lr", -1.0),
    "sample a word": put("param_groups", 0, "sample", "no"),
    "entry a tensor": put("state", 0, torch.zeros(3)),
    "tensor a number": put("state", 0, "m", 3),
    "m of bool": changed(lambda saved: saved["state"][0].update(m=saved["state"][0]["m"] > 0)),
    "step negative": put("state", 0, "step", torch.tensor(-5)),
    "step a float": put("state", 0, "step", torch.tensor(1.0)),
    "unknown key": put("state", 99, {}),
    "unknown word": put("state", "foo", {}),
}


@pytest.mark.parametrize("name", sorted(MALFORMED))
def test_malformed_state_dicts_change_nothing(name):
    params = make_params(4, 3)
    optimizer = make(params)
    train(optimizer, params, 2)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"state dict|must be"):
        optimizer.load_state_dict(MALFORMED[name]())
    assert_unchanged(optimizer, params, before)
    optimizer.load_state_dict(good())


def test_a_state_dict_from_before_an_option_takes_its_default():
    saved = good()
    del saved["param_groups"][0]["decoupled_weight_decay"]
    params = make_params(4, 3)
    optimizer = make(params)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is False


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        (other_model, "groups have"),
        (other_weights, "made with the weights"),
        (adams, "it is another optimizer's"),
        (swapped, "has shape"),
        (without_a_tensor, "state holds"),
    ],
)
def test_foreign_state_dicts_change_nothing(foreign, message):
    params = make_params(4, 3)
    optimizer = make(params)
    train(optimizer, params, 2)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign())
    assert_unchanged(optimizer, params, before)
    train(optimizer, params, 1, start=2)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_memory_that_is_not_there_is_named(weights, state_dtype):
    """More than addresses reach, so that no system lends it."""
    count = 10**13
    param = torch.nn.Parameter(torch.zeros(1).expand(count))
    numbers = TileLayout.of(weights.rule).num_rows * count
    nbytes = numbers * (4 if state_dtype == "float32" else 2)
    with pytest.raises(OutOfMemoryError, match=f"it needs {nbytes:,} bytes") as caught:
        VariationalHyperAdam([param], weights=weights, state_dtype=state_dtype)
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert "hyperadam estimate" in str(caught.value)


def test_memory_that_is_not_free_is_refused_before_it_is_taken(weights, monkeypatch):
    """Where the system would lend it and end the process later."""
    params = make_params(320)
    taken = VariationalHyperAdam(params, weights=weights)._arena
    nbytes = taken.state.tiles_TRx.nbytes + 3 * 4 * 320
    monkeypatch.setattr("hyperadam.optim.arena.free_memory", lambda device: nbytes)
    VariationalHyperAdam(params, weights=weights)
    monkeypatch.setattr("hyperadam.optim.arena.free_memory", lambda device: nbytes - 1)
    with pytest.raises(OutOfMemoryError, match=f"; {nbytes - 1:,} are free"):
        VariationalHyperAdam(params, weights=weights)


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory", "anything else"])
def test_only_an_allocators_failure_is_one_of_memory(weights, monkeypatch, message):
    zeros = torch.zeros

    def fail(*shape, **settings):
        if shape and len(shape[0] if isinstance(shape[0], tuple) else shape) == 3:  # the tiles
            raise RuntimeError(message)
        return zeros(*shape, **settings)

    params = make_params(3)
    monkeypatch.setattr("torch.zeros", fail)
    with pytest.raises(RuntimeError) as caught:
        VariationalHyperAdam(params, weights=weights)
    assert isinstance(caught.value, OutOfMemoryError) == message.startswith("Default")


@pytest.mark.parametrize("steps", [0, 1])
def test_old_memory_is_free_where_nothing_needs_it(steps, monkeypatch):
    """A group added before the first step; a state dict loaded over a state."""
    params = make_params(40)
    optimizer = make(params)
    train(optimizer, params, steps)
    saved, old = optimizer.state_dict(), weakref.ref(optimizer._arena)
    alive = []
    if steps:
        real = torch.Tensor.detach

        def detach(tensor):  # of the saved state, before its copy
            alive.append(old() is not None or bool(optimizer.state))
            return real(tensor)

        monkeypatch.setattr(torch.Tensor, "detach", detach)
        optimizer.load_state_dict(saved)
    else:
        real = Arena.__init__
        monkeypatch.setattr(
            Arena, "__init__", lambda *a, **k: (alive.append(old() is not None), real(*a, **k))[1]
        )
        optimizer.add_param_group({"params": make_params(30)})
        (new,) = optimizer.param_groups[1]["params"]
        params[0].grad, new.grad = torch.ones(40), torch.ones(30)
        optimizer.step()
    assert alive
    assert not any(alive)
