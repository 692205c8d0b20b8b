"""Weights whose rule has a ``variance_base``: the state keeps how large gradients have been."""

import copy
import io
import math

import pytest
import torch

from conftest import make_weights
from hyperadam import VariationalHyperAdam
from hyperadam.rule import VariationalHyperAdamRule

WEIGHTS = make_weights(
    VariationalHyperAdamRule(channels=4, moment_decays=(0.5, 0.9), variance_base=0.1)
)


def make(params, **settings):
    return VariationalHyperAdam(params, **{"weights": WEIGHTS, **settings})


def make_params(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def copies(params):
    return [param.detach().clone().requires_grad_() for param in params]


def train(optimizer, params, steps):
    """With gradients that halve from step to step."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) * 0.5**step
        optimizer.step()


def peak(optimizer, param):
    return float(optimizer.state[param]["peak"])


def assert_equal(xs, ys):
    assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_is_the_largest_mean_square_of_all_gradients(backend):
    params = make_params((4, 3), 5)
    optimizer = make(params, backend=backend)
    train(optimizer, params, range(1))
    grads = torch.cat([param.grad.flatten() for param in params])
    first = float(grads.square().mean())
    train(optimizer, params, range(1, 12))
    for param in params:
        assert peak(optimizer, param) == pytest.approx(first)


def test_one_that_joins_later_has_it_too():
    first, second = make_params(4, 5)
    optimizer = make([first])
    train(optimizer, [first], range(4))
    before = peak(optimizer, first)
    optimizer.add_param_group({"params": [second]})
    train(optimizer, [first, second], range(4, 5))
    assert peak(optimizer, first) == peak(optimizer, second) == before > 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_steps_of_empty_parameters_leave_it(backend):
    params = make_params(4, 0, (0, 3))
    optimizer = make(params, backend=backend)
    train(optimizer, params, range(2))
    before = peak(optimizer, params[0])
    params[0].grad = None
    optimizer.step()
    assert peak(optimizer, params[0]) == before > 0


def test_dropped_with_the_state_of_all_parameters():
    params = make_params(4, 5)
    optimizer = make(params)
    train(optimizer, params, range(2))
    optimizer.state.clear()
    train(optimizer, params, range(4, 5))
    grads = torch.cat([param.grad.flatten() for param in params])
    assert peak(optimizer, params[0]) == pytest.approx(float(grads.square().mean()))


def test_optimizers_without_it_have_none():
    params = make_params(5)
    optimizer = VariationalHyperAdam(params, weights=make_weights(VariationalHyperAdamRule()))
    train(optimizer, params, range(2))
    assert "peak" not in optimizer.state[params[0]]


def test_a_state_without_it_is_refused():
    params = make_params(5)
    optimizer = make(params)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    del saved["state"][0]["peak"]
    with pytest.raises(ValueError, match=r"state holds .* expected .*'peak'"):
        make(copies(params)).load_state_dict(saved)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_state_with_an_impossible_one_is_refused(bad):
    params = make_params(5)
    optimizer = make(params)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    saved["state"][0]["peak"] = torch.tensor(bad, dtype=torch.float64)
    with pytest.raises(ValueError, match="peak is no mean square"):
        make(copies(params)).load_state_dict(saved)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_resume_is_bit_for_bit(state_dtype):
    params = make_params((4, 3), 5)
    undisturbed = make(params, state_dtype=state_dtype)
    train(undisturbed, params, range(3))
    buffer = io.BytesIO()
    torch.save(undisturbed.state_dict(), buffer)
    buffer.seek(0)
    others, forgetful = copies(params), copies(params)
    train(undisturbed, params, range(3, 9))
    resumed = make(others, state_dtype=state_dtype)
    saved = torch.load(buffer, weights_only=True)
    resumed.load_state_dict(saved)
    train(resumed, others, range(3, 9))
    assert_equal(params, others)
    assert peak(resumed, others[0]) == peak(undisturbed, params[0])
    for state in saved["state"].values():
        state["peak"] = torch.zeros_like(state["peak"])
    without = make(forgetful, state_dtype=state_dtype)
    without.load_state_dict(saved)
    train(without, forgetful, range(3, 9))
    assert not torch.equal(params[0], forgetful[0])


def test_a_copy_goes_its_own_way():
    params = make_params(5)
    optimizer = make(params)
    train(optimizer, params, range(2, 4))
    copied, others = copy.deepcopy((optimizer, params))
    train(optimizer, params, range(3))
    assert peak(copied, others[0]) < peak(optimizer, params[0])
    train(copied, others, range(3))
    assert_equal(params, others)


def test_skipped_steps_do_not_count():
    params, others = make_params(4), make_params(4)
    disturbed, undisturbed = make(params), make(others)
    train(disturbed, params, range(3))
    params[0].grad = torch.full_like(params[0], math.nan)
    with pytest.warns(RuntimeWarning, match="skipped"):
        disturbed.step()
    train(disturbed, params, range(3, 6))
    train(undisturbed, others, range(6))
    assert_equal(params, others)


def test_what_explains_the_next_step_knows_of_it():
    params = make_params((4, 3), 5)
    optimizer = make(params)
    train(optimizer, params, range(6))
    for param in params:
        param.grad = torch.full_like(param, 0.5**6)
    explained = optimizer.explain()
    optimizer.step()
    for param in params:
        update = optimizer.update_distribution(param)
        torch.testing.assert_close(explained[param].log_var_N, update.stddev.log() * 2)
