"""What PyTorch asks of an optimizer: entries for ours in its table, and its schedulers.

``torch.testing._internal.common_optimizers`` describes each optimizer by an ``OptimizerInfo``, from
which PyTorch's tests take inputs, errors and abilities.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hyperadam import load_weights
from hyperadam.optim import OPTIMIZERS, VariationalHyperAdam
from hyperadam.rule import BY_LAYER


def load_table():
    """PyTorch's module, without what its import does to the process: flags of backends that can't
    be set any more, a cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        return importlib.import_module("torch.testing._internal.common_optimizers")


table = load_table()


def inputs(samples, device, dtype=None):
    settings = [
        ({}, "default"),
        ({"lr": 0.02}, "another lr"),
        ({"lr": torch.tensor(0.02)}, "Tensor lr"),
        ({"weight_decay": 0.1}, "L2 penalty"),
        ({"weight_decay": 0.1, "decoupled_weight_decay": True}, "decoupled weight decay"),
        ({"weight_decay": 0.1, "maximize": True}, "maximize"),
        ({"state_dtype": "bfloat16"}, "state of bfloat16"),
    ]
    if samples:
        settings.append(({"sample": False}, "the mean"))
        settings.append(({"seed": 5, "backend": "reference"}, "the reference"))
    return [table.OptimizerInput(None, kwargs, desc) for kwargs, desc in settings]


def error_inputs(device, dtype):
    def refused(kwargs, error_regex, error_type=ValueError):
        found = table.OptimizerInput(None, kwargs, error_regex)
        return table.ErrorOptimizerInput(found, error_type=error_type, error_regex=error_regex)

    return [
        refused({"lr": -1e-2}, "lr must be a number, at or above 0; got -0.01"),
        refused({"weight_decay": -0.5}, "weight_decay must be a number, at or above 0"),
        refused({"maximize": "up"}, "maximize must be True or False"),
        refused({"state_dtype": "float16"}, "unknown state_dtype 'float16'"),
        refused({"nonfinite": "stop"}, "unknown nonfinite 'stop'"),
        refused({"foreach": True}, "unexpected keyword", TypeError),
        *table.get_error_inputs_for_all_optims(device, dtype),
    ]


@functools.cache
def info_of(rule_name):
    samples = rule_name == "variational-hyperadam"
    return table.OptimizerInfo(
        OPTIMIZERS[rule_name],
        optim_inputs_func=functools.partial(inputs, samples),
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=(
            [lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10)],
            [lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, total_iters=4)],
            [
                lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10),
                lambda opt: lr_scheduler.ReduceLROnPlateau(opt),
            ],
        ),
        supported_impls=(),  # foreach, fused and differentiable are of PyTorch's own kernels
        not_og_supported_flags=(),
        supports_sparse=False,
        supports_complex=True,
        step_requires_closure=False,
        supports_param_groups=True,
        supports_multiple_devices=False,
    )


@pytest.fixture
def info(rule_name):
    return info_of(rule_name)


def every_input(info):
    """The settings of each entry, for an optimizer each."""
    for found in table._get_optim_inputs_including_global_cliquey_kwargs("cpu", None, info):
        yield copy.deepcopy(found.kwargs)


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((10, 5), 7)
    ]


def set_grads(params, number=0):
    generator = torch.Generator().manual_seed(number)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def train(optimizer, params, numbers):
    for number in numbers:
        set_grads(params, number)
        optimizer.step()


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# -- construction --------------------------------------------------------------------------------

OWN_WORDS = {"Tensor lr must be 1-element": r"lr must be a number \(a Tensor of shape \(\)\)"}
"""Where a message of ours stands for PyTorch's."""


def test_errors(info):
    found = info.optim_error_inputs_func("cpu", torch.float32)
    assert len(found) > len(table.get_error_inputs_for_all_optims("cpu", torch.float32)) > 0
    for error_input in found:
        given = error_input.optimizer_error_input
        message = OWN_WORDS.get(error_input.error_regex, error_input.error_regex)
        params = make_params() if given.params is None else given.params
        assert error_input.error_on is table.OptimizerErrorEnum.CONSTRUCTION_ERROR
        if issubclass(error_input.error_type, Warning):
            with pytest.warns(error_input.error_type, match=message):
                info.optim_cls(params, **given.kwargs)
        else:
            with pytest.raises(error_input.error_type, match=message):
                info.optim_cls(params, **given.kwargs)


def test_it_prints_its_settings(info):
    for kwargs in every_input(info):
        optimizer = info.optim_cls(make_params(), **kwargs)
        text = repr(optimizer)
        assert text.startswith(f"{info.name} (")
        assert all(f"{name}: " in text for name in optimizer.defaults)


# -- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "contiguous"), [(None, True), (None, False), (0, True), (1, True), (2, True)]
)
def test_it_goes_in_the_right_direction(info, schedule, contiguous):
    """With each entry's settings, under each of the table's schedules."""
    for kwargs in every_input(info):
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(10, 5, 2, generator=generator)[..., 0]
        weight = nn.Parameter(weight.contiguous() if contiguous else weight)
        bias = nn.Parameter(torch.randn(10, generator=generator))
        assert weight.is_contiguous() == contiguous
        x = torch.randn(5, generator=generator)
        optimizer = info.optim_cls([weight, bias], **kwargs)
        schedulers = [] if schedule is None else info.scheduler_inputs[schedule]
        schedulers = [make(optimizer) for make in schedulers]

        def closure(weight=weight, bias=bias, x=x, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (weight.mv(x) + bias).square().sum()
            loss.backward()
            return loss

        losses = []
        for _ in range(10):
            losses.append(float(optimizer.step(closure).detach()))
            for scheduler in schedulers:
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(losses[-1])
                else:
                    scheduler.step()
        if kwargs.get("maximize", False):
            assert losses[-1] > losses[0]
        else:
            assert losses[-1] < losses[0]


def test_param_groups(info):
    """A group with lr 0 stays, one with a penalty goes another way than the one without."""
    for kwargs in every_input(info):
        still, plain, decayed = (make_params()[0] for _ in range(3))
        optimizer = info.optim_cls(
            [
                {"params": [still], "lr": 0.0},
                {"params": [plain], "weight_decay": 0.0},
                {"params": [decayed], "weight_decay": 0.5},
            ],
            **kwargs,
        )
        start = still.detach().clone()
        train(optimizer, [still, plain, decayed], range(2))
        assert torch.equal(still, start)
        assert not torch.equal(plain, start)
        assert not torch.equal(plain, decayed)


def test_a_tensor_lr_is_a_number(info):
    for kwargs in every_input(info):
        lr = kwargs.pop("lr", torch.tensor(0.125))
        params, twins = make_params(), make_params()
        tensor = torch.tensor(float(lr))
        optimizer = info.optim_cls(params, lr=tensor, **kwargs)
        train(optimizer, params, range(2))
        train(info.optim_cls(twins, lr=float(lr), **kwargs), twins, range(2))
        assert optimizer.param_groups[0]["lr"] is tensor
        torch.testing.assert_close(params, twins)


def test_without_gradients_nothing_moves(info):
    for kwargs in every_input(info):
        params = make_params()
        optimizer = info.optim_cls(params, **kwargs)
        train(optimizer, params, range(1))
        before = copy.deepcopy((params, optimizer.state_dict()["state"]))
        optimizer.zero_grad()
        optimizer.step()
        assert_same((params, optimizer.state_dict()["state"]), before)


@pytest.mark.parametrize("rule_name", ["hyperadam", "variational-hyperadam"])
def test_zero_gradients_move_nothing(rule_name):
    """Where nothing decays, no noise is drawn, and a step is a mean of candidates that are 0."""
    info, tried = info_of(rule_name), 0
    for kwargs in every_input(info):
        params = make_params()
        optimizer = info.optim_cls(params, **kwargs)
        if optimizer.param_groups[0]["weight_decay"] or optimizer.param_groups[0].get("sample"):
            continue
        for _ in range(3):
            for param in params:
                param.grad = torch.zeros_like(param)
            optimizer.step()
        assert_same(params, make_params())
        tried += 1
    assert tried > 0


def test_gradients_stay_as_they_are(info):
    for kwargs in every_input(info):
        params = make_params()
        optimizer = info.optim_cls(params, **kwargs)
        set_grads(params)
        grads = [param.grad for param in params]
        versions = [grad._version for grad in grads]
        optimizer.step()
        assert [param.grad is grad for param, grad in zip(params, grads, strict=True)] == [True] * 2
        assert [grad._version for grad in grads] == versions


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(info, dtype):
    """They are minimised, with the bits of their real and imaginary parts, where nothing depends on
    a parameter's shape."""
    weights = load_weights(info.optim_cls.rule_name.replace("variational-hyperadam", "default"))
    settings = {field.name: field.default for field in dataclasses.fields(weights.rule)}
    rule = dataclasses.replace(weights.rule, **{name: settings[name] for name in BY_LAYER})
    for kwargs in every_input(info):
        kwargs["weights"] = dataclasses.replace(weights, rule=rule)
        if kwargs.get("state_dtype") == "bfloat16" and dtype == torch.complex128:
            continue
        params = make_params(dtype)
        pairs = [nn.Parameter(torch.view_as_real(param.detach()).clone()) for param in params]
        sign = -1 if kwargs.get("maximize", False) else 1
        losses = []
        for each, view in ((params, list), (pairs, lambda ps: map(torch.view_as_complex, ps))):
            optimizer = info.optim_cls(each, **copy.deepcopy(kwargs))
            for _ in range(8):
                optimizer.zero_grad()
                loss = sum(param.abs().square().sum() for param in view(each))
                (sign * loss).backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        assert losses[7] < losses[0]
        assert_same([torch.view_as_real(param.detach()) for param in params], pairs)


def test_sparse_gradients_are_refused(info):
    assert not info.supports_sparse
    params = make_params()
    optimizer = info.optim_cls(params)
    set_grads(params)
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


# -- state ---------------------------------------------------------------------------------------


def test_a_state_dict_goes_through_a_file(info):
    """And the run goes on with the same bits; nothing in it is of a class of ours."""
    for kwargs in every_input(info):
        params = make_params()
        optimizer = info.optim_cls(params, **copy.deepcopy(kwargs))
        train(optimizer, params, range(3))
        saved = through_a_file(optimizer.state_dict())
        twins = copy.deepcopy(params)
        other = info.optim_cls(twins, **copy.deepcopy(kwargs))
        other.load_state_dict(saved)
        assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])
        train(optimizer, params, range(3, 6))
        train(other, twins, range(3, 6))
        assert_same(params, twins)


def test_loading_does_not_change_what_was_saved(info):
    params, twins = make_params(), make_params()
    optimizer, other = info.optim_cls(params), info.optim_cls(twins)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    other.load_state_dict(saved)
    train(other, twins, range(2))
    assert_same(saved["state"], before)


def test_named_parameters(info):
    """Names are kept in groups, and state dicts go between optimizers with and without them."""
    models = [nn.Linear(3, 2) for _ in range(2)]
    named = info.optim_cls(models[0].named_parameters())
    plain = info.optim_cls(models[1].parameters())
    train(named, list(models[0].parameters()), range(1))
    assert named.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    plain.load_state_dict(named.state_dict())
    assert_same(plain.state_dict()["state"], named.state_dict()["state"])
    named.load_state_dict(plain.state_dict())
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]


def test_deepcopy_has_every_public_attribute(info):
    def public(optimizer):
        return {
            name
            for name in dir(optimizer)
            if not name.startswith("_") and not callable(getattr(optimizer, name))
        }

    for kwargs in every_input(info):
        params = make_params()
        optimizer = info.optim_cls(params, **kwargs)
        train(optimizer, params, range(1))
        twin = copy.deepcopy(optimizer)
        assert public(twin) == public(optimizer)
        assert twin.weights.digest() == optimizer.weights.digest()


def test_a_pickled_optimizer_goes_on(info):
    params = make_params()
    optimizer = info.optim_cls(params)
    train(optimizer, params, range(2))
    twin = pickle.loads(pickle.dumps(optimizer))
    (group,) = twin.param_groups
    train(optimizer, params, range(2, 4))
    train(twin, group["params"], range(2, 4))
    assert_same(group["params"], params)


def test_step_hooks(info):
    """The optimizer's own and those of all optimizers, in PyTorch's order."""
    params = make_params()
    optimizer = info.optim_cls(params)
    seen = []
    handles = [
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("pre of all")),
        register_optimizer_step_post_hook(lambda *_: seen.append("post of all")),
    ]
    train(optimizer, params, range(1))
    assert seen == ["pre of all", "pre", "post", "post of all"]
    for handle in handles:
        handle.remove()
    train(optimizer, params, range(1))
    assert len(seen) == 4


def test_a_step_hook_can_give_the_closure(info):
    params = make_params()
    optimizer = info.optim_cls(params)
    calls = []

    def give(_, args, kwargs):
        return args, {"closure": lambda: calls.append(1)}

    optimizer.register_step_pre_hook(give)
    train(optimizer, params, range(1))
    assert calls == [1]


def test_state_dict_hooks(info):
    params = make_params()
    optimizer = info.optim_cls(params)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("first"))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before it"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda _, found: {**found, "note": "mine"})
    assert optimizer.state_dict()["note"] == "mine"
    assert seen == ["before it", "first"]


def test_load_state_dict_hooks(info):
    params = make_params()
    optimizer = info.optim_cls(params)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.25
    seen = []

    def double(_, given):
        (group,) = given["param_groups"]
        return {**given, "param_groups": [{**group, "lr": 2 * group["lr"]}]}

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(saved)
    assert seen == [0.5]


# -- schedulers ----------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.95**t, lambda t: 1 / (1 + t)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 9]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.25, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.5, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, [0.1, 0.2], total_steps=14, cycle_momentum=False
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)],
        milestones=[4],
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
}


def rates_under(make_scheduler, make_optimizer, lr, steps=range(12), saved=None):
    """The groups' lr at each step, and what goes on from there."""
    params = make_params()
    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": copy.deepcopy(lr) * 2}]
    optimizer = make_optimizer(groups, lr=copy.deepcopy(lr))
    scheduler = make_scheduler(optimizer)
    if saved is not None:
        optimizer.load_state_dict(saved[0])
        scheduler.load_state_dict(saved[1])
    rates = []
    for step in steps:
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        train(optimizer, params, [step])
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0 + step // 5)  # no progress
        else:
            scheduler.step()
    return rates, (optimizer.state_dict(), scheduler.state_dict()), optimizer


def test_every_scheduler_is_among_them():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_give_the_rates_that_they_give_sgd(name, lr):
    """Without a warning, and again from state dicts in the middle."""
    expected, _, _ = rates_under(SCHEDULERS[name], torch.optim.SGD, lr)
    assert len({tuple(pair) for pair in expected}) > 1
    rates, _, optimizer = rates_under(SCHEDULERS[name], VariationalHyperAdam, lr)
    assert rates == expected
    assert {type(group["lr"]) for group in optimizer.param_groups} == {type(lr)}
    first, saved, _ = rates_under(SCHEDULERS[name], VariationalHyperAdam, lr, range(6))
    rest, _, _ = rates_under(
        SCHEDULERS[name], VariationalHyperAdam, lr, range(6, 12), copy.deepcopy(saved)
    )
    assert first + rest == expected


@pytest.mark.parametrize("make", [lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR])
def test_there_is_no_momentum_to_cycle(make):
    optimizer = VariationalHyperAdam(make_params())
    arguments = (0.1, 0.2) if make is lr_scheduler.CyclicLR else (0.1, 10)
    with pytest.raises(ValueError, match="momentum"):
        make(optimizer, *arguments)


def test_a_schedule_moves_the_steps():
    """lr scales the step that the rule would make anyway."""
    moves = []
    for factor in (1.0, 0.5):
        params = make_params()
        optimizer = VariationalHyperAdam(params, lr=0.02)
        lr_scheduler.ConstantLR(optimizer, factor=factor)
        start = copy.deepcopy(params)
        train(optimizer, params, range(1))
        moves.append([(a - b).detach() for a, b in zip(params, start, strict=True)])
    torch.testing.assert_close([0.5 * move for move in moves[0]], moves[1], rtol=1e-4, atol=1e-6)


def test_a_scheduler_before_the_first_step_warns_as_ever():
    """PyTorch notices steps of ours as it does those of its own."""
    optimizer = VariationalHyperAdam(make_params())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()
