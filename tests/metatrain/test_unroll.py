from __future__ import annotations

import pytest
import torch

from conftest import random_theta
from hyperadam.kernels import ReferenceRule
from hyperadam.metatrain import InnerState, unroll
from hyperadam.rule import VariationalHyperAdamRule, standard_normal

F64 = torch.float64
RULE = ReferenceRule(VariationalHyperAdamRule(channels=3))
N = 5


def loss(w, batch):
    return (w - batch).pow(4).mean(dim=-1)


def theta_with_grad(dtype=F64, seed=0):
    theta = random_theta(RULE.rule, dtype, seed)
    return {name: value.requires_grad_() for name, value in theta.items()}


def start(tasks=1):
    """Parameters that differ between the tasks."""
    params = torch.linspace(-1, 1, tasks * N, dtype=F64).reshape(tasks, N)
    return InnerState(params, RULE.init_state(tasks, N, F64))


def do_unroll(theta, length, carry=None, first=0, **settings):
    carry = carry or start()
    steps = torch.arange(first, first + length)
    seeds = range(len(carry.params_BN))
    noise = torch.stack([standard_normal(b, steps, 0, N, dtype=F64) for b in seeds], dim=1)
    batches = [torch.tensor(0.1 * step, dtype=F64) for step in steps.tolist()]
    settings = {"lrs": [0.05] * length, "kl_weight": 1e-2} | settings
    return unroll(RULE, theta, carry, loss, batches, noise, **settings)


def test_meta_loss_counts_loss_after_the_update_and_kl():
    theta = random_theta(RULE.rule, F64)
    result = do_unroll(theta, 4, start(tasks=2), kl_weight=0.5)
    assert result.loss_TB.shape == result.kl_TB.shape == (4, 2)
    torch.testing.assert_close(result.meta_loss, (result.loss_TB + 0.5 * result.kl_TB).mean())
    last = loss(result.carry.params_BN, torch.tensor(0.3, dtype=F64))
    torch.testing.assert_close(result.loss_TB[-1], last)


def test_the_logarithm_is_of_each_tasks_mean():
    """A task whose losses are a hundred times another's counts as much."""
    theta = theta_with_grad()
    result = do_unroll(theta, 4, start(tasks=2), kl_weight=0.5, objective="log-loss")
    mean_B = result.loss_TB.mean(dim=0)
    expected = mean_B.log().mean() + 0.5 * result.kl_TB.mean()
    torch.testing.assert_close(result.meta_loss.detach(), expected)


def test_the_loss_after_an_update_may_be_of_other_batches():
    """The trajectory stays; the losses and the meta-gradient are those of the other batches."""
    theta, other = theta_with_grad(), [torch.full((), 1.0 + step, dtype=F64) for step in range(3)]
    alone = [[batch] for batch in other]
    result = do_unroll(theta, 3, kl_weight=0.0, meta_batches=alone)
    same = do_unroll(theta, 3, kl_weight=0.0)
    torch.testing.assert_close(result.carry.params_BN, same.carry.params_BN, rtol=0, atol=0)
    for step in range(3):
        reached = do_unroll(theta, step + 1).carry.params_BN
        torch.testing.assert_close(result.loss_TB[step], loss(reached, other[step]))
    # The meta-gradient is that of these losses: a small step against it lowers them as it says.
    name = "post_linear.bias"
    (gradient,) = torch.autograd.grad(result.meta_loss, [theta[name]])
    (of_same,) = torch.autograd.grad(same.meta_loss, [theta[name]])
    assert not torch.allclose(gradient, of_same)
    moved = {key: value.detach().clone() for key, value in theta.items()}
    moved[name] -= 1e-6 * gradient
    lower = do_unroll(moved, 3, kl_weight=0.0, meta_batches=alone)
    fell = float((result.meta_loss - lower.meta_loss).detach())
    assert fell == pytest.approx(1e-6 * float(gradient.square().sum()), rel=0.01)


@pytest.mark.parametrize("objective", ["loss", "log-loss"])
def test_each_batch_behind_an_update_has_its_objective(objective):
    batches = [torch.full((), 1.0 + step, dtype=F64) for step in range(4)]
    theta, gradients, losses = theta_with_grad(), [], []
    for offsets, weights in (([0], [1]), ([1], [1]), ([0, 1], [0.25, 0.75])):
        after = [[batches[step + offset] for offset in offsets] for step in range(3)]
        result = unroll(
            RULE, theta, start(), loss, batches[:3], torch.zeros(3, 1, N, dtype=F64),
            lrs=[0.05] * 3, kl_weight=0.0, objective=objective, meta_batches=after,
            batch_weights=weights,
        )  # fmt: skip
        losses.append(result.loss_TB)
        gradients.append(torch.autograd.grad(result.meta_loss, [theta["post_linear.bias"]])[0])
    torch.testing.assert_close(losses[2], losses[0] / 4 + 3 * losses[1] / 4)
    torch.testing.assert_close(gradients[2], gradients[0] / 4 + 3 * gradients[1] / 4)
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("objective", ["loss", "log-loss"])
def test_a_loss_on_the_next_batch_serves_its_gradient_too(objective):
    """Where the same batch comes next its loss is taken once; the bits stay."""
    results, calls = [], []
    for copied in (False, True):
        theta, taken = theta_with_grad(), 0

        def counted(w, batch):
            nonlocal taken
            taken += 1
            return loss(w, batch)

        batches = [torch.tensor(0.1 * step, dtype=F64) for step in range(5)]
        to_come = [batch.clone() for batch in batches[1:]] if copied else batches[1:]
        noise = torch.zeros(4, 2, N, dtype=F64)
        result = unroll(
            RULE, theta, start(tasks=2), counted, batches[:4], noise, lrs=[0.05] * 4,
            kl_weight=0.1, objective=objective, meta_batches=[[batch] for batch in to_come],
        )  # fmt: skip
        result.meta_loss.backward()
        results.append([result.meta_loss.detach(), *(value.grad for value in theta.values())])
        calls.append(taken)
    assert calls == [5, 8]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_learning_rate_is_of_its_step():
    theta = random_theta(RULE.rule, F64)
    first = do_unroll(theta, 2)
    still = do_unroll(theta, 3, lrs=[0.05, 0.05, 0.0])
    torch.testing.assert_close(still.carry.params_BN, first.carry.params_BN)
    assert not torch.equal(do_unroll(theta, 3).carry.params_BN, first.carry.params_BN)


def test_cutting_does_not_change_the_inner_run():
    theta = random_theta(RULE.rule, F64)
    whole = do_unroll(theta, 6)
    first = do_unroll(theta, 4)
    second = do_unroll(theta, 2, first.carry, first=4)
    torch.testing.assert_close(second.carry.params_BN, whole.carry.params_BN)
    torch.testing.assert_close(torch.cat([first.loss_TB, second.loss_TB]), whole.loss_TB)
    assert int(second.carry.rule_state.unpack().step) == 6


def test_the_graph_is_cut():
    theta = theta_with_grad()
    first = do_unroll(theta, 3)
    assert not first.carry.params_BN.requires_grad
    assert not any(t.requires_grad for t in first.carry.rule_state.unpack().tensors().values())
    first.meta_loss.backward()  # a second backward below must not reach into this graph
    do_unroll(theta, 2, first.carry, first=3).meta_loss.backward()


def test_meta_gradient_with_constant_gradients_by_finite_differences():
    """Of one step: there the gradient that the rule reads does not depend on theta."""
    names = list(RULE.rule.theta_shapes())

    def function(*values):
        return do_unroll(dict(zip(names, values, strict=True)), 1).meta_loss

    assert torch.autograd.gradcheck(function, list(theta_with_grad(seed=2).values()))


def test_the_meta_gradient_of_many_is_the_mean_of_each():
    theta = theta_with_grad()
    together = start(tasks=4)
    result = do_unroll(theta, 5, together)
    batched = torch.autograd.grad(result.meta_loss, list(theta.values()))
    noise = [standard_normal(b, torch.arange(5), 0, N, dtype=F64) for b in range(4)]
    batches = [torch.tensor(0.1 * step, dtype=F64) for step in range(5)]
    total = [torch.zeros_like(value) for value in theta.values()]
    for b in range(4):
        alone = unroll(
            RULE, theta, InnerState(together.params_BN[b : b + 1], RULE.init_state(1, N, F64)),
            loss, batches, noise[b].unsqueeze(1), lrs=[0.05] * 5, kl_weight=1e-2,
        )  # fmt: skip
        torch.testing.assert_close(result.loss_TB[:, b], alone.loss_TB[:, 0])
        grads = torch.autograd.grad(alone.meta_loss, list(theta.values()))
        total = [sum_ + grad / 4 for sum_, grad in zip(total, grads, strict=True)]
    for ours, mean in zip(batched, total, strict=True):
        torch.testing.assert_close(ours, mean, rtol=1e-10, atol=1e-13)


def test_no_second_derivatives():
    """A loss whose gradient can't be differentiated again."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum(dim=-1)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * grad.unsqueeze(-1) * ctx.saved_tensors[0]

    theta = theta_with_grad()
    noise = torch.zeros(3, 1, N, dtype=F64)
    result = unroll(
        RULE, theta, start(), lambda w, _: Once.apply(w), [None] * 3, noise,
        lrs=[0.01] * 3, kl_weight=0.0,
    )  # fmt: skip
    result.meta_loss.backward()
    assert float(theta["post_linear.weight"].grad.abs().max()) > 0


def test_one_noise_and_batch_a_step():
    theta = random_theta(RULE.rule, F64)
    with pytest.raises(ValueError, match="zip"):
        unroll(
            RULE, theta, start(), loss, [torch.zeros((), dtype=F64)] * 2,
            torch.zeros(3, 1, N, dtype=F64), lrs=[0.1] * 3, kl_weight=0.0,
        )  # fmt: skip
