from __future__ import annotations

import pytest
import torch

from conftest import random_theta
from hyperadam.errors import ConfigError
from hyperadam.kernels import ReferenceRule, differentiable_rule
from hyperadam.kernels.cpu_unroll import CpuRule
from hyperadam.rule import RULES, VariationalHyperAdamRule

F64 = torch.float64
N, STEPS = 7, 3


def unroll(rule, theta, grads_TBN, state=None):
    """The unrolled updates and the steps."""
    steps, tasks, count = grads_TBN.shape
    state = state or rule.init_state(tasks, count, grads_TBN.dtype)
    unrolled = rule.begin(theta, state, steps)
    return [unrolled.step(grad_BN) for grad_BN in grads_TBN], unrolled


def theta_with_grad(rule, dtype):
    return {k: v.requires_grad_() for k, v in random_theta(rule, dtype).items()}


@pytest.fixture
def rule(rule_name):
    return RULES[rule_name](channels=4)


@pytest.fixture(params=["reference", "cpu"])
def differentiable(request, rule):
    if request.param == "cpu" and not isinstance(rule, VariationalHyperAdamRule):
        pytest.skip("the kernel serves one rule")
    return differentiable_rule(rule, request.param)


def test_the_choice_of_a_backend():
    rule = VariationalHyperAdamRule()
    assert isinstance(differentiable_rule(rule, "reference"), ReferenceRule)
    for backend in ("auto", "cpu"):
        made = differentiable_rule(rule, backend)
        assert isinstance(made, CpuRule)
        assert made.rule is rule
    with pytest.raises(ConfigError, match="unknown backend 'referense': did you mean 'reference'"):
        differentiable_rule(rule, "referense")
    with pytest.raises(ConfigError, match="can't serve"):
        differentiable_rule(RULES["rnnprop"](), "cpu")


def test_the_first_state_is_zero_with_a_dimension_for_tasks(rule):
    state = ReferenceRule(rule).init_state(3, N, F64).unpack()
    assert state.step.shape == ()
    for name, value in rule.init_state(N, dtype=F64).tensors().items():
        if name != "step":
            assert torch.equal(state.tensors()[name], torch.stack([value] * 3)), name


@pytest.mark.parametrize("count", [0, 1, 3, 257, 1030])
def test_noise_has_the_same_bits_in_every_program(count):
    seeds, steps = [0, 5, 2**62 + 12345], torch.tensor([1, 2, 2**33])
    rule = VariationalHyperAdamRule()
    expected = ReferenceRule(rule).noise(seeds, steps, count)
    assert expected.shape == (3, 3, count)
    assert torch.equal(CpuRule(rule).noise(seeds, steps, count), expected)


def test_one_task_has_the_bits_of_the_rules_own_step(rule):
    theta = theta_with_grad(rule, torch.float32)
    grads = torch.randn(STEPS, 1, N)
    updates, unrolled = unroll(ReferenceRule(rule), theta, grads)
    state = rule.init_state(N)
    for update, grad in zip(updates, grads, strict=True):
        plain, state = rule.step(theta, state, grad[0])
        assert torch.equal(update.mean_N, plain.mean_N.unsqueeze(0))
    carry = unrolled.carry().unpack()
    for name, value in state.tensors().items():
        assert torch.equal(carry.tensors()[name], value if name == "step" else value.unsqueeze(0))


def test_the_kernel_narrows_the_variance_as_the_rule_does():
    rule = VariationalHyperAdamRule(
        channels=4, moment_decays=(0.99, 0.9), variance_base=0.03, variance_floor=0.01
    )
    scale = torch.tensor([0.0, 1e-3, 0.1, 0.1, 1.0, 1.0, 30.0], dtype=F64)
    grads = scale * torch.randn(2, STEPS, 2, N, dtype=F64)
    grads[1] /= 10  # so that the second unroll has to know of the first one's peaks
    found = {}
    for backend in ("reference", "cpu"):
        program = differentiable_rule(rule, backend)
        theta, state, updates = theta_with_grad(rule, F64), None, []
        for own in grads:  # the second unroll goes on with the state of the first
            own_updates, unrolled = unroll(program, theta, own, state)
            updates += own_updates
            state = unrolled.carry()
            assert not any(value.requires_grad for value in state.unpack().tensors().values())
        log_var_TBN = torch.stack([update.log_var_N for update in updates])
        torch.stack(
            [rule.kl(update) + update.mean_N.sum(-1) for update in updates]
        ).sum().backward()
        peak_B1 = state.unpack().peak_1
        found[backend] = [log_var_TBN.detach(), peak_B1, *(v.grad for v in theta.values())]
    torch.testing.assert_close(found["cpu"], found["reference"])
    log_var_TBN = found["reference"][0]
    assert bool((log_var_TBN[..., 0] > log_var_TBN[..., -1] + 3).all())


def test_tasks_are_independent(rule, differentiable):
    theta = theta_with_grad(rule, F64)
    grads = torch.randn(STEPS, 2, N, dtype=F64)
    updates, unrolled = unroll(differentiable, theta, grads)
    for task in range(2):
        alone, alone_unrolled = unroll(differentiable, theta, grads[:, task : task + 1])
        for update, own in zip(updates, alone, strict=True):
            torch.testing.assert_close(update.mean_N[task], own.mean_N[0])
            torch.testing.assert_close(rule.kl(update)[task], rule.kl(own)[0])
        for name, value in alone_unrolled.carry().unpack().tensors().items():
            if name != "step":
                torch.testing.assert_close(
                    unrolled.carry().unpack().tensors()[name][task], value[0]
                )


@pytest.mark.parametrize("tasks", [1, 2])
def test_an_unroll_goes_on_from_a_carry_without_its_graph(rule, differentiable, tasks):
    theta = theta_with_grad(rule, F64)
    grads = torch.randn(STEPS, tasks, N, dtype=F64)
    whole, _ = unroll(differentiable, theta, grads)
    _, first = unroll(differentiable, theta, grads[:-1])
    carry = first.carry()
    assert not any(value.requires_grad for value in carry.unpack().tensors().values())
    (last,), second = unroll(differentiable, theta, grads[-1:], carry)
    torch.testing.assert_close(last.mean_N, whole[-1].mean_N)
    assert last.mean_N.requires_grad
    assert int(second.carry().unpack().step) == STEPS


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_carry_keeps_its_numbers_through_all_that_follows(rule, differentiable, steps):
    """Whoever holds one may begin from it again, whatever memory the unrolls share."""
    theta = theta_with_grad(rule, F64)
    grads = torch.randn(9, 2, N, dtype=F64)
    start = unroll(differentiable, theta, grads[:steps])[1]
    carry = start.carry()
    numbers = {name: value.clone() for name, value in carry.unpack().tensors().items()}
    found = []
    for go_on in (start, differentiable.begin(theta, carry, 9)):
        for _ in range(3):
            updates = [go_on.step(grad) for grad in grads[steps:]]
            sum(update.mean_N.sum() for update in updates).backward(retain_graph=True)
            go_on = differentiable.begin(theta, carry, 9)
            found.append(updates[-1].mean_N.detach().clone())
    for name, value in carry.unpack().tensors().items():
        assert torch.equal(value, numbers[name]), name
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_a_carry_taken_amid_an_unroll_outlives_it(rule, differentiable):
    theta = theta_with_grad(rule, F64)
    grads = torch.randn(3, 2, N, dtype=F64)
    first = differentiable.begin(theta, differentiable.init_state(2, N, F64), 2)
    first.step(grads[0])
    carry = first.carry()
    numbers = {name: value.clone() for name, value in carry.unpack().tensors().items()}
    first.step(grads[1])
    del first  # and with it what it kept
    unroll(differentiable, theta, grads.flip(0))
    for name, value in carry.unpack().tensors().items():
        assert torch.equal(value, numbers[name]), name


def test_the_kernel_and_the_reference_agree():
    """Updates, KL with a prior mean, state and the gradient of all of them."""
    rule = VariationalHyperAdamRule(
        channels=6, kl_prior_mean="fixed_moments", column_norm="rms", moment_decays=(0.9, 0.99)
    )
    grads = torch.randn(4, 3, 40, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = []
    for backend in ("reference", "cpu"):
        theta = theta_with_grad(rule, F64)
        updates, unrolled = unroll(differentiable_rule(rule, backend), theta, grads)
        loss = sum((rule.kl(update) + update.mean_N.sin().sum(-1)).sum() for update in updates)
        loss.backward()
        carry = unrolled.carry().unpack()
        assert not any(value.requires_grad for value in carry.tensors().values())
        found.append(
            [
                loss.detach(),
                *[update.mean_N.detach() for update in updates],
                *[value.grad for value in theta.values()],
                *carry.tensors().values(),
            ]
        )
    for reference, kernel in zip(*found, strict=True):
        torch.testing.assert_close(kernel, reference, rtol=1e-9, atol=1e-11)
