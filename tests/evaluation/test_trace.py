from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from conftest import make_weights
from hyperadam import VariationalHyperAdam
from hyperadam.errors import ConfigError
from hyperadam.evaluation.trace import Tracer, trace_steps
from hyperadam.optim import HyperAdam, RNNprop
from hyperadam.rule import HyperAdamRule, RNNpropRule, VariationalHyperAdamRule

NAMES = ["bias", "weight"]


def make_params():
    return [torch.ones(3).requires_grad_(), torch.full((4, 2), 2.0).requires_grad_()]


def run(optimizer, tracer, steps=6, names=NAMES):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        tracer.before_step(step, optimizer, names)
        optimizer.step()
    return params


@pytest.mark.parametrize("total", [0, 1, 2, 20, 21, 57, 100, 2000, 100_000])
def test_trace_steps(total):
    steps = trace_steps(total)
    assert steps == sorted(set(steps))
    assert len(steps) == min(total, 20)
    assert all(isinstance(step, int) for step in steps)
    if steps:
        assert (steps[0], steps[-1]) == (0, total - 1)
    if total == 2000:  # half of them in the first square root of all
        assert steps[9] < math.sqrt(2000) < steps[12]


def test_the_record_says_what_the_optimizer_predicts():
    optimizer = VariationalHyperAdam(make_params(), weights=make_weights())
    tracer = Tracer([0, 3, 99])
    params = run(optimizer, tracer, steps=3)
    for param in params:
        param.grad = torch.randn_like(param)
    inside = optimizer.explain()
    tracer.before_step(3, optimizer, NAMES)
    record = tracer.to_record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["at"] == [0, 3]
    assert record["layers"] == NAMES
    for name in ("beta", "gamma", "rho"):
        parts = [getattr(inside[p], f"{name}_NH").reshape(-1, 6) for p in params]
        values = torch.cat(parts).double().numpy()
        np.testing.assert_allclose(record[name][1], values.mean(axis=0), rtol=1e-5)
        if name == "rho":
            np.testing.assert_allclose(record["rho_std"][1], values.std(axis=0), rtol=1e-5)
        else:
            quantiles = np.percentile(values, [5, 25, 50, 75, 95])
            np.testing.assert_allclose(record[f"{name}_quantiles"][1], quantiles, rtol=1e-5)
    for column, param in enumerate(params):
        for name in ("beta", "gamma", "rho"):
            own = float(getattr(inside[param], f"{name}_NH").double().mean())
            assert record[f"{name}_layers"][1][column] == pytest.approx(own, rel=1e-5)
        mean = inside[param].mean_N.double()
        std = torch.exp(inside[param].log_var_N.double() / 2)
        rms = float(mean.square().mean().sqrt())
        assert record["update_rms"][1][column] == pytest.approx(rms, rel=1e-5)
        assert record["std"][1][column] == pytest.approx(float(std.mean()), rel=1e-5)
        snr = rms / float(std.square().mean().sqrt())
        assert record["snr"][1][column] == pytest.approx(snr, rel=1e-5)
    shapes = {name: np.shape(value) for name, value in record.items()}
    assert shapes["beta"] == shapes["gamma"] == shapes["rho"] == shapes["rho_std"] == (2, 6)
    assert shapes["beta_quantiles"] == shapes["gamma_quantiles"] == (2, 5)
    assert shapes["std"] == shapes["snr"] == shapes["update_rms"] == (2, 2)
    assert shapes["beta_layers"] == shapes["gamma_layers"] == shapes["rho_layers"] == (2, 2)


def test_tracing_changes_nothing():
    one = VariationalHyperAdam(make_params(), weights=make_weights())
    other = VariationalHyperAdam(make_params(), weights=make_weights())
    traced = run(one, Tracer(range(6)))
    plain = run(other, Tracer([]))
    for x, y in zip(traced, plain, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("channels", [1, 3])
def test_without_a_variance(channels):
    rules = (HyperAdamRule(channels=channels), VariationalHyperAdamRule(channels, var_block=False))
    for rule, cls in zip(rules, (HyperAdam, VariationalHyperAdam), strict=True):
        tracer = Tracer([1])
        run(cls(make_params(), weights=make_weights(rule)), tracer)
        record = tracer.to_record()
        assert record["std"] is None
        assert record["snr"] is None
        assert np.shape(record["beta"]) == (1, channels)
        assert min(record["update_rms"][0]) > 0


def test_a_parameter_without_gradient_or_elements():
    params = [*make_params(), torch.zeros(0).requires_grad_()]
    optimizer = VariationalHyperAdam(params, weights=make_weights())
    tracer = Tracer([0, 1])
    tracer.before_step(0, optimizer, "abc")
    assert tracer.to_record()["at"] == []  # there is no gradient at all
    params[1].grad, params[2].grad = torch.ones(4, 2), torch.zeros(0)
    tracer.before_step(1, optimizer, "abc")
    record = tracer.to_record()
    assert record["at"] == [1]
    for name in ("std", "snr", "update_rms"):
        (row,) = record[name]
        assert [number is None for number in row] == [True, False, True]


def test_what_cannot_be_traced_is_refused():
    weights = make_weights(RNNpropRule(channels=3))
    for optimizer in (RNNprop(make_params(), weights=weights), torch.optim.Adam(make_params())):
        Tracer([5]).before_step(0, optimizer, NAMES)
        with pytest.raises(ConfigError, match=f"{type(optimizer).__name__} can't be traced"):
            Tracer([5]).before_step(5, optimizer, NAMES)
    optimizer = VariationalHyperAdam(make_params(), weights=make_weights())
    with pytest.raises(ConfigError, match="1 names were given for 2 parameters"):
        Tracer([0]).before_step(0, optimizer, ["only"])
    tracer = Tracer([0, 1])
    run(optimizer, tracer, steps=1)
    with pytest.raises(ConfigError, match="records one run"):
        tracer.before_step(1, optimizer, ["other", "names"])
