"""Parameters, gradients, learning rates and programs that an optimizer is not made for."""

from __future__ import annotations

import copy
import pickle
import threading
import time

import pytest
import torch

from conftest import make_weights
from hyperadam import VariationalHyperAdam
from optim.test_variational_hyperadam import (
    assert_equal,
    assert_unchanged,
    make,
    make_params,
    set_grads,
    snapshot,
    state_of,
    train,
    values,
)

# -- learning rates and gradients ------------------------------------------------------------------


def test_a_learning_rate_of_0():
    """Parameters stay; the state goes on as with any other."""
    params, others = make_params(5), make_params(5)
    optimizer, other = make(params, lr=0.0), make(others, lr=0.1)
    start = values(params)
    for step in range(3):
        set_grads(params, step)
        others[0].grad = params[0].grad.clone()
        optimizer.step()
        other.step()
    assert_equal(values(params), start)
    for name, value in state_of(optimizer, params[0]).items():
        assert torch.equal(value, state_of(other, others[0])[name])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_learning_rate_of_1e30(backend):
    """Parameters become large, and then their gradients; steps are left out, nothing is NaN."""
    params = make_params(40)
    optimizer = make(params, lr=1e30, backend=backend)
    train(optimizer, params, 1)
    before = snapshot(optimizer, params)
    assert float(params[0].detach().abs().max()) > 1e28
    with pytest.warns(RuntimeWarning, match="skipped"):
        train(optimizer, params, 3, start=1)
    assert_unchanged(optimizer, params, before)
    assert optimizer.skipped_steps == 3
    assert all(bool(torch.isfinite(value).all()) for value in (*values(params),))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("tiny", [1e-38, 1e-45])
def test_a_tiny_gradient_is_as_none(backend, tiny):
    """Its square is 0 in float32; the run goes on as one whose gradients were 0 there."""
    small, zero = make_params(40), make_params(40)
    for params, scale in ((small, tiny), (zero, 0.0)):
        optimizer = make(params, backend=backend)
        for _ in range(5):
            params[0].grad = torch.full((40,), scale)
            optimizer.step()
        assert optimizer.skipped_steps == 0
        train(optimizer, params, 3)
    torch.testing.assert_close(small[0], zero[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_gradient_of_3e38(backend):
    """Left out in float32, whose sums of squares end before it; a step in float64."""
    params = make_params(4, 3)
    optimizer = make(params, backend=backend)
    train(optimizer, params, 1)
    before = snapshot(optimizer, params)
    set_grads(params, 1)
    params[0].grad[2] = 3e38
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step()
    assert_unchanged(optimizer, params, before)
    double = make_params(4, dtype=torch.float64)
    optimizer = make(double, backend=backend)
    double[0].grad = torch.full((4,), 3e38, dtype=torch.float64)
    start = values(double)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert bool(torch.isfinite(double[0].detach()).all())
    assert not torch.equal(double[0], start[0])


# -- parameters ------------------------------------------------------------------------------------


def test_expanded_gradients():
    """One number in the memory of all elements, as ``sum().backward()`` makes it."""
    plain, summed = make_params((3, 5)), make_params((3, 5))
    one, two = make(plain), make(summed)
    for _ in range(3):
        plain[0].grad = torch.ones(3, 5)
        summed[0].grad = torch.ones(()).expand(3, 5)
        assert summed[0].grad.stride() == (0, 0)
        one.step()
        two.step()
    assert torch.equal(plain[0], summed[0])


def test_parameters_on_the_meta_device():
    """Made before their memory, as large models are; a step before that is refused."""
    params, twins = make_params(4, (3, 2)), make_params(4, (3, 2))
    empty = [torch.empty_like(param, device="meta").requires_grad_() for param in params]
    optimizer, twin = make(empty), make(twins)
    empty[0].grad = torch.empty_like(empty[0])
    with pytest.raises(RuntimeError, match="meta device have no values"):
        optimizer.step()
    empty[0].grad = None
    for param, real in zip(empty, params, strict=True):  # the same parameters, now with values
        torch.utils.swap_tensors(param, real)
    train(optimizer, empty, 3)
    train(twin, twins, 3)
    assert_equal(values(empty), values(twins))


def test_frozen_and_unfrozen_amid_a_run():
    """Frozen, a parameter keeps value and state; unfrozen, it goes on from them."""
    params = make_params(4, 3)
    optimizer = make(params)
    train(optimizer, params, 2)
    kept, state = values(params)[1], copy.deepcopy(state_of(optimizer, params[1]))
    params[1].requires_grad_(False)
    params[1].grad = None
    for step in (2, 3):
        set_grads(params[:1], step)
        optimizer.step()
    assert torch.equal(params[1], kept)
    assert_equal(list(state_of(optimizer, params[1]).values()), list(state.values()))
    params[1].requires_grad_(True)
    train(optimizer, params, 1, start=4)
    assert [int(optimizer.state[param]["step"]) for param in params] == [5, 3]


def test_a_parameter_that_was_frozen_from_the_start():
    """Unfrozen, it joins as one that only had no gradient, and the others go on undisturbed."""
    params, twins = make_params(4, 3), make_params(4, 3)
    params[1].requires_grad_(False)
    optimizer, twin = make(params), make(twins)
    for step in range(2):
        set_grads(params[:1], step)
        set_grads(twins[:1], step)
        optimizer.step()
        twin.step()
    params[1].requires_grad_(True)
    train(optimizer, params, 3, start=2)
    train(twin, twins, 3, start=2)
    assert_equal(values(params), values(twins))


def test_2000_tiny_tensors():
    """They move as the same numbers in one tensor do."""
    whole = make_params(6000, dtype=torch.float64)
    tiny = [piece.clone().requires_grad_() for piece in whole[0].detach().split(3)]
    one, many = make(whole), make(tiny)
    for step in range(3):
        set_grads(whole, step)
        for param, grad in zip(tiny, whole[0].grad.split(3), strict=True):
            param.grad = grad.clone()
        one.step()
        many.step()
    torch.testing.assert_close(torch.cat(values(tiny)), values(whole)[0], rtol=1e-9, atol=1e-12)


def test_the_time_of_many_tensors_is_in_proportion():
    """Ten times as many take some ten times as long, where a hundred would be quadratic."""

    def seconds(count):
        params = make_params(*[3] * count)
        optimizer = make(params)
        set_grads(params, 0)
        optimizer.step()
        times = []
        for _ in range(7):
            start = time.process_time()
            optimizer.step()
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(2000) < 25 * seconds(200)


# -- programs --------------------------------------------------------------------------------------


def test_two_optimizers_on_two_parts_of_a_model():
    """Each as if the other were not there."""
    params, first, second = (make_params(4, (3, 2)) for _ in range(3))
    both = [make(params[:1], seed=1), make(params[1:], seed=2)]
    alone = [make(first[:1], seed=1), make(second[1:], seed=2)]
    for step in range(3):
        for group in (params, first, second):
            set_grads(group, step)
        for optimizer in (*both, *alone):
            optimizer.step()
    assert_equal(values(params), [*values(first[:1]), *values(second[1:])])


def test_two_optimizers_on_the_same_parameters():
    """States are their own, and a parameter moves by the sum of what each alone would do."""
    shared, a, b = (make_params(6, dtype=torch.float64) for _ in range(3))
    start = values(shared)[0]
    one, two = make(shared, seed=1), make(shared, seed=2)
    one_alone, two_alone = make(a, seed=1), make(b, seed=2)
    for step in range(4):
        grad = torch.randn(6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for params in (shared, a, b):
            params[0].grad = grad
        for optimizer in (one, two, one_alone, two_alone):
            optimizer.step()
    moved = [param[0].detach() - start for param in (shared, a, b)]
    torch.testing.assert_close(moved[0], moved[1] + moved[2])
    assert_equal(list(state_of(one, shared[0]).values()), list(state_of(one_alone, a[0]).values()))


@pytest.mark.parametrize("steps", [0, 3])
def test_pickled_with_its_parameters(steps):
    params = make_params(4, (3, 2))
    optimizer = make(params, seed=3, nonfinite="raise", weight_decay=0.1)
    train(optimizer, params, steps)
    twin_params, twin = pickle.loads(pickle.dumps((params, optimizer)))
    train(optimizer, params, 2, start=steps)
    train(twin, twin_params, 2, start=steps)
    assert_equal(values(params), values(twin_params))
    assert twin.nonfinite == "raise"
    assert twin.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_two_threads(backend):
    """Two optimizers that step at the same time, each with threads of its own below it."""
    weights = make_weights()

    def run(seed, wait):
        params = make_params(3000, (20, 7), seed=seed)
        optimizer = VariationalHyperAdam(params, weights=weights, seed=seed, backend=backend)
        for step in range(60):
            wait()
            set_grads(params, step)
            optimizer.step()
        return values(params)

    alone = [run(seed, lambda: None) for seed in (1, 2)]
    barrier, together = threading.Barrier(2, timeout=60), {}
    threads = [
        threading.Thread(target=lambda s=seed: together.update({s: run(s, barrier.wait)}))
        for seed in (1, 2)
    ]
    torch.set_num_threads(2)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(1)
    for seed in (1, 2):
        if backend == "reference":  # PyTorch's sums depend on the number of threads
            torch.testing.assert_close(together[seed], alone[seed - 1])
        else:
            assert_equal(together[seed], alone[seed - 1])
