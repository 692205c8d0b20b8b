"""The learned baselines, what an optimizer says of its step, and the ablation of the noise."""

from __future__ import annotations

import copy
import inspect
import math

import numpy as np
import pytest
import torch

from conftest import GOLDEN, make_weights
from hyperadam import VariationalHyperAdam, Weights, load_weights, save_weights
from hyperadam.errors import ConfigError, WeightsError
from hyperadam.optim import (
    OPTIMIZERS,
    HyperAdam,
    IsotropicNoise,
    RNNprop,
    optimizer_class,
)
from hyperadam.rule import RULES, VariationalHyperAdamRule, standard_normal

ANCESTORS = sorted(set(RULES) - {"variational-hyperadam"})
SHAPES = [(3, 2), (), (5,)]


@pytest.fixture(params=ANCESTORS)
def ancestor(request):
    rule = RULES[request.param](channels=4)
    return optimizer_class(request.param), make_weights(rule)


def make_params(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def set_grads(params, step):
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + index)
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        set_grads(params, step)
        optimizer.step()


def values(params):
    return [param.detach().clone() for param in params]


def assert_equal(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(x, y)


# -- the learned baselines -----------------------------------------------------------------------


def test_each_rule_has_its_optimizer():
    assert set(OPTIMIZERS) == set(RULES)
    for name, cls in OPTIMIZERS.items():
        assert optimizer_class(name) is cls
        assert cls.rule_name == name
    with pytest.raises(ConfigError, match="unknown rule 'rnnprob': did you mean 'rnnprop'"):
        optimizer_class("rnnprob")


@pytest.mark.parametrize("name", ANCESTORS)
def test_they_apply_the_golden_updates(name):
    with np.load(GOLDEN / f"{name}_trajectory.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files}
    theta = {k.removeprefix("theta."): v for k, v in golden.items() if k.startswith("theta.")}
    count = golden["grads"].shape[1]
    param = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    weights = Weights(RULES[name](), theta, lr=0.25)
    optimizer = optimizer_class(name)([param], weights=weights)
    expected = torch.zeros(count, dtype=torch.float64)
    for grad, update in zip(golden["grads"], golden["updates"], strict=True):
        param.grad = grad
        optimizer.step()
        expected -= 0.25 * update
        torch.testing.assert_close(param.detach(), expected, rtol=1e-9, atol=1e-9)


def test_the_signature(ancestor):
    cls, weights = ancestor
    parameters = inspect.signature(cls).parameters
    assert list(parameters) == [
        "params",
        "lr",
        "weights",
        "weight_decay",
        "decoupled_weight_decay",
        "state_dtype",
        "nonfinite",
        "maximize",
    ]
    assert cls.default_weights == cls.rule_name == weights.rule.name
    assert cls(make_params(), weights=weights).param_groups[0]["lr"] == weights.lr


def test_the_bundled_weights_are_asked_for_by_the_rules_name(ancestor, monkeypatch):
    cls, weights = ancestor
    asked = []
    module = "hyperadam.optim.learned_optimizer.load_weights"
    monkeypatch.setattr(module, lambda name: asked.append(name) or weights)
    assert cls(make_params()).weights is weights
    assert asked == [weights.rule.name]


def test_what_means_nothing_is_refused(ancestor):
    cls, weights = ancestor
    for name, value in (("sample", False), ("seed", 1), ("backend", "cpu")):
        with pytest.raises(TypeError, match=name):
            cls(make_params(), weights=weights, **{name: value})
        group = {"params": make_params(), name: value}
        with pytest.raises(ConfigError, match="draws no noise" if name != "backend" else name):
            cls([group], weights=weights)
    assert not {"sample", "seed"} & set(cls(make_params(), weights=weights).param_groups[0])
    with pytest.raises(WeightsError, match=f"{cls.__name__} takes weights of the rule"):
        cls(make_params(), weights=make_weights())


def test_a_run_goes_on_from_its_state_dict(ancestor):
    cls, weights = ancestor
    params = make_params()
    optimizer = cls(params, weights=weights)
    train(optimizer, params, 3)
    twin = [value.requires_grad_() for value in values(params)]
    other = cls(twin, weights=weights)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, 2, start=3)
    train(other, twin, 2, start=3)
    assert_equal(values(params), values(twin))
    with pytest.raises(ConfigError, match="this is not a state dict of this"):
        VariationalHyperAdam(params, weights=make_weights()).load_state_dict(other.state_dict())


def test_bfloat16_state_repeats(ancestor):
    """Its stochastic rounding has a fixed seed."""
    cls, weights = ancestor
    runs = []
    for state_dtype in ("bfloat16", "bfloat16", "float32"):
        params = make_params()
        optimizer = cls(params, weights=weights, state_dtype=state_dtype)
        train(optimizer, params, 3)
        runs.append(values(params))
    assert_equal(runs[0], runs[1])
    assert not torch.equal(runs[0][0], runs[2][0])


# -- the ablations of the rule -------------------------------------------------------------------


@pytest.mark.parametrize("option", ["lstm", "preprocessing"])
def test_an_ablated_rule_is_stored_trained_with_and_resumed(option, tmp_path):
    rule = VariationalHyperAdamRule(channels=4, **{option: False})
    weights = make_weights(rule)
    save_weights(weights, tmp_path / "w.safetensors")
    again = load_weights(tmp_path / "w.safetensors")
    assert again.rule == rule
    assert again.digest() == weights.digest() != make_weights(VariationalHyperAdamRule(4)).digest()
    params = make_params([(3, 2), (), (0,)])
    optimizer = VariationalHyperAdam(params, weights=again)
    train(optimizer, params, 3)
    twin = [value.requires_grad_() for value in values(params)]
    other = VariationalHyperAdam(twin, weights=weights)
    saved = optimizer.state_dict()
    assert ("h" in saved["state"][0]) == (option != "lstm")
    other.load_state_dict(copy.deepcopy(saved))
    set_grads(params, 4)
    set_grads(twin, 4)
    inside = optimizer.explain()[params[0]]
    optimizer.step()
    other.step()
    assert_equal(values(params), values(twin))
    torch.testing.assert_close(inside.mean_N, optimizer.update_distribution(params[0]).mean)
    for backend in ("cpu", "triton"):
        with pytest.raises(ConfigError, match="can't serve"):
            VariationalHyperAdam(params, weights=weights, backend=backend)


# -- looking inside ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hyperadam", "variational-hyperadam"])
@pytest.mark.parametrize("moment", ["new", "stepped", "loaded", "joined"])
def test_explain_tells_the_step_and_changes_nothing(name, moment):
    weights = make_weights(RULES[name](channels=4))
    params = make_params(dtype=torch.float64)
    make = optimizer_class(name)
    settings = {"sample": False} if make is VariationalHyperAdam else {}
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]
    optimizer = make(groups, weights=weights, **settings)
    if moment != "new":
        train(optimizer, params, 3)
    if moment == "loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if moment == "joined":
        params += make_params([(2, 2)], dtype=torch.float64, seed=4)
        optimizer.add_param_group({"params": params[3:]})
    set_grads(params, 9)
    params[2].grad = None
    before = copy.deepcopy((optimizer.state_dict(), values(params)))
    inside = optimizer.explain()
    again = optimizer.state_dict()
    assert again["state"].keys() == before[0]["state"].keys()
    for key, entry in before[0]["state"].items():
        assert_equal(again["state"][key].values(), entry.values())
    assert_equal(values(params), before[1])
    assert set(inside) == {param for index, param in enumerate(params) if index != 2}
    optimizer.step()
    for param, each in inside.items():
        for matrix in (each.beta_NH, each.gamma_NH, each.rho_NH, each.a_NH):
            assert matrix.shape == (*param.shape, 4)
        assert 0 < float(each.beta_NH.min()) <= float(each.beta_NH.max()) < 1
        torch.testing.assert_close((each.rho_NH * each.a_NH).sum(-1), each.mean_N)
        (old,) = (v for p, v in zip(params, before[1], strict=True) if p is param)
        torch.testing.assert_close(param.detach(), old - weights.lr * each.mean_N)
        assert (each.log_var_N is None) == (name == "hyperadam")
        if name != "hyperadam":
            std = optimizer.update_distribution(param).stddev
            torch.testing.assert_close(torch.exp(each.log_var_N / 2), std)


def test_explain_where_there_is_nothing_to_say():
    weights = make_weights(RULES["rnnprop"](channels=4))
    optimizer = RNNprop(make_params(), weights=weights)
    assert not optimizer.explains
    with pytest.raises(ConfigError, match="rnnprop has no candidate directions"):
        optimizer.explain()
    other = HyperAdam(make_params(), weights=make_weights(RULES["hyperadam"](channels=4)))
    assert other.explains
    assert other.explain() == {}


@pytest.mark.parametrize(("state_dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_explain_of_a_complex_parameter_and_of_each_state(state_dtype, tolerance):
    params = [torch.tensor([1 + 2j, -0.5j, 3.0], dtype=torch.complex64).requires_grad_()]
    optimizer = VariationalHyperAdam(params, weights=make_weights(), state_dtype=state_dtype)
    for step in range(3):
        params[0].grad = torch.tensor([1j**step, 0.5, 2j - step], dtype=torch.complex64)
        inside = optimizer.explain()[params[0]]
        optimizer.step()
        mean = optimizer.update_distribution(params[0]).mean
        torch.testing.assert_close(inside.mean_N, mean, rtol=tolerance, atol=tolerance)
    assert inside.beta_NH.shape == (3, 2, 6)
    assert inside.beta_NH.dtype == torch.float32


# -- the ablation of the noise -------------------------------------------------------------------


def isotropic(params, weights=None, **settings):
    return IsotropicNoise(params, weights=weights or make_weights(), lr=1.0, **settings)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_isotropic_noise_has_the_average_variance(backend):
    weights = make_weights(VariationalHyperAdamRule(channels=6, column_norm="rms"))
    weights.theta["linear_var1.weight"].mul_(10)  # so that variances differ
    params, twin = make_params([(40, 10), (5,)]), make_params([(40, 10), (5,)])
    optimizer = isotropic(params, weights, backend=backend, seed=3)
    plain = VariationalHyperAdam(twin, weights=weights, lr=1.0, sample=False)
    for step in range(2):
        set_grads(params, step)
        set_grads(twin, step)
        with torch.no_grad():
            for x, y in zip(params, twin, strict=True):
                y.copy_(x)
        optimizer.step()
        plain.step()
        variances = [plain.update_distribution(p).variance for p in twin]
        variance = torch.cat([v.flatten() for v in variances]).mean()
        assert float(variances[0].std()) > 0.1 * float(variance)
        start = 0
        for x, y in zip(params, twin, strict=True):
            noise = standard_normal(3, step + 1, start, x.numel()).view(x.shape)
            expected = y.detach() - variance.sqrt() * noise
            torch.testing.assert_close(x.detach(), expected, rtol=1e-4, atol=1e-4)
            said = optimizer.update_distribution(x)
            torch.testing.assert_close(said.variance, variance.expand(x.shape))
            torch.testing.assert_close(said.mean, plain.update_distribution(y).mean)
            start += x.numel()


def test_isotropic_noise_of_a_constant_variance_is_sampling():
    weights = make_weights()
    weights.theta["linear_var1.weight"].zero_()
    weights.theta["linear_var1.bias"].fill_(math.log(0.25))
    params, twin, mean = make_params(), make_params(), make_params()
    one = isotropic(params, weights)
    two = VariationalHyperAdam(twin, weights=weights, lr=1.0)
    three = isotropic(mean, weights, sample=False)
    for optimizer, its in ((one, params), (two, twin), (three, mean)):
        train(optimizer, its, 3)
    for x, y, z in zip(params, twin, mean, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(x, z, atol=1e-2)


def test_isotropic_noise_needs_a_variance():
    weights = make_weights(VariationalHyperAdamRule(channels=4, var_block=False))
    with pytest.raises(WeightsError, match="with a VarBlock"):
        isotropic(make_params(), weights)
