from __future__ import annotations

import pytest
import torch

from conftest import random_theta
from hyperadam.metatrain import InnerState, unroll
from hyperadam.rule import VariationalHyperAdamRule, standard_normal

F64 = torch.float64
RULE = VariationalHyperAdamRule(channels=3)
N = 5


def loss(w, batch):
    return (w - batch).pow(4).mean()


def do_unroll(theta, length, carry=None, start=0, **settings):
    carry = carry or InnerState(torch.linspace(-1, 1, N, dtype=F64), RULE.init_state(N, dtype=F64))
    noise = standard_normal(0, torch.arange(start, start + length), 0, N, dtype=F64)
    batches = [torch.tensor(0.1 * step, dtype=F64) for step in range(start, start + length)]
    settings = {"lr": 0.05, "kl_weight": 1e-2} | settings
    return unroll(RULE, RULE.step, theta, carry, loss, batches, noise, **settings)


def test_meta_loss_counts_loss_after_the_update_and_kl():
    theta = random_theta(RULE, F64)
    result = do_unroll(theta, 4, kl_weight=0.5)
    torch.testing.assert_close(result.meta_loss, (result.loss_T + 0.5 * result.kl_T).mean())
    last = loss(result.carry.params_N, torch.tensor(0.3, dtype=F64))
    torch.testing.assert_close(result.loss_T[-1], last)


def test_cutting_does_not_change_the_inner_run():
    theta = random_theta(RULE, F64)
    whole = do_unroll(theta, 6)
    first = do_unroll(theta, 4)
    second = do_unroll(theta, 2, first.carry, start=4)
    torch.testing.assert_close(second.carry.params_N, whole.carry.params_N)
    torch.testing.assert_close(torch.cat([first.loss_T, second.loss_T]), whole.loss_T)
    assert int(second.carry.rule_state.step) == 6


def test_the_graph_is_cut():
    theta = {name: value.requires_grad_() for name, value in random_theta(RULE, F64).items()}
    first = do_unroll(theta, 3)
    assert not first.carry.params_N.requires_grad
    assert not any(t.requires_grad for t in first.carry.rule_state.tensors().values())
    first.meta_loss.backward()  # a second backward below must not reach into this graph
    do_unroll(theta, 2, first.carry, start=3).meta_loss.backward()


def test_meta_gradient_with_constant_gradients_by_finite_differences():
    """Of one step: there the gradient that the rule reads does not depend on theta."""
    names = list(RULE.theta_shapes())

    def function(*values):
        return do_unroll(dict(zip(names, values, strict=True)), 1).meta_loss

    theta = random_theta(RULE, F64, seed=2)
    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in theta.values()])


def test_no_second_derivatives():
    """A loss whose gradient can't be differentiated again."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * grad * ctx.saved_tensors[0]

    theta = {name: value.requires_grad_() for name, value in random_theta(RULE, F64).items()}
    carry = InnerState(torch.ones(N, dtype=F64), RULE.init_state(N, dtype=F64))
    noise = torch.zeros(3, N, dtype=F64)
    result = unroll(
        RULE, RULE.step, theta, carry, lambda w, _: Once.apply(w), [None] * 3, noise,
        lr=0.01, kl_weight=0.0,
    )  # fmt: skip
    result.meta_loss.backward()
    assert float(theta["post_linear.weight"].grad.abs().max()) > 0


def test_one_noise_and_batch_a_step():
    theta = random_theta(RULE, F64)
    carry = InnerState(torch.ones(N, dtype=F64), RULE.init_state(N, dtype=F64))
    with pytest.raises(ValueError, match="zip"):
        unroll(
            RULE, RULE.step, theta, carry, loss, [torch.zeros((), dtype=F64)] * 2,
            torch.zeros(3, N, dtype=F64), lr=0.1, kl_weight=0.0,
        )  # fmt: skip
