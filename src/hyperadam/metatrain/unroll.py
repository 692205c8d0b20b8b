"""One truncated unroll: inner steps, the meta-loss, and what is carried to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyperadam.kernels import StepFunction
from hyperadam.rule import Rule, RuleState, Theta
from hyperadam.tasks import Batch

LossFunction = Callable[[Tensor, Batch], Tensor]
"""An inner task's loss as a function of its N coordinates in one vector, and a batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class InnerState:
    """What an inner run carries from step to step.

    Attributes:
        params_N: the network's parameters, flat.
        rule_state: the rule's state.
    """

    params_N: Tensor
    rule_state: RuleState

    def detach(self) -> InnerState:
        """The same values, with no graph behind them."""
        return InnerState(self.params_N.detach(), self.rule_state.map(Tensor.detach))


@dataclasses.dataclass(frozen=True, eq=False)
class Unroll:
    """The result of an unroll of T steps.

    Attributes:
        meta_loss: mean over steps of ``loss + kl_weight KL``; differentiable by theta.
        loss_T: inner loss after each update, on the batch that the update was made from.
        kl_T: KL term of each step.
        carry: the state after the last step, cut from the graph.
    """

    meta_loss: Tensor
    loss_T: Tensor
    kl_T: Tensor
    carry: InnerState


def unroll(
    rule: Rule,
    step: StepFunction,
    theta: Theta,
    carry: InnerState,
    loss: LossFunction,
    batches: Sequence[Batch],
    noise_TN: Tensor,
    *,
    lr: float,
    kl_weight: float,
) -> Unroll:
    """Train for ``len(batches)`` inner steps, as a function of theta.

    The gradient that the rule reads is a constant, so that no second derivatives are needed; the
    loss that counts is the one after the update, on the same batch. State and parameters come in
    without a graph and leave without one.

    Source: Wang et al., TPAMI 2022; truncation as in Andrychowicz et al., NeurIPS 2016.

    Args:
        rule: the update rule.
        step: its step, in some backend.
        theta: meta-parameters.
        carry: the inner run so far.
        loss: the inner task's loss.
        batches: one a step.
        noise_TN: standard normal numbers for the sampled updates.
        lr: inner learning rate.
        kl_weight: λ, the weight of the KL term.
    """
    params_N, state = carry.params_N, carry.rule_state
    losses: list[Tensor] = []
    kls: list[Tensor] = []
    for batch, noise_N in zip(batches, noise_TN, strict=True):
        with torch.enable_grad():
            point_N = params_N.detach().requires_grad_()
            (grad_N,) = torch.autograd.grad(loss(point_N, batch), point_N)
        update, state = step(theta, state, grad_N, None)
        params_N = params_N - lr * update.sample(noise_N)
        losses.append(loss(params_N, batch))
        kls.append(rule.kl(update))
    loss_T, kl_T = torch.stack(losses), torch.stack(kls)
    return Unroll(
        meta_loss=(loss_T + kl_weight * kl_T).mean(),
        loss_T=loss_T.detach(),
        kl_T=kl_T.detach(),
        carry=InnerState(params_N, state).detach(),
    )
