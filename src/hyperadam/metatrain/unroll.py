"""One truncated unroll: inner steps, the meta-loss, and what is carried to the next.

Shapes: T inner steps, B inner tasks side by side, N coordinates each, M batches behind each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyperadam.kernels import Carry, DifferentiableRule
from hyperadam.metatrain.calibration import Calibration
from hyperadam.rule import Theta
from hyperadam.tasks import Batch

LossFunction = Callable[[Tensor, Batch], Tensor]
"""The losses (B,) of B independent inner tasks, of their coordinates (B, N) and their batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class InnerState:
    """What B inner runs carry from unroll to unroll; no graph is behind it.

    Attributes:
        params_BN: the networks' parameters, flat.
        rule_state: the rule's state, in the form of the
            :class:`~hyperadam.kernels.DifferentiableRule`.
        coherence_B: the sum of the first steps' coherence, of shape (B,); None where the
            learning rate is not calibrated.
    """

    params_BN: Tensor
    rule_state: Carry
    coherence_B: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Unroll:
    """The result of an unroll of T steps.

    Attributes:
        meta_loss_B: each task's: the weighted mean over batches of the objective, plus
            ``kl_weight`` times its mean KL term.
        meta_loss: their mean; differentiable by theta.
        loss_TB: inner losses after each update, the weighted mean over batches.
        kl_TB: KL term of each step.
        carry: the state after the last step, cut from the graph.
    """

    meta_loss_B: Tensor
    meta_loss: Tensor
    loss_TB: Tensor
    kl_TB: Tensor
    carry: InnerState


def unroll(
    rule: DifferentiableRule,
    theta: Theta,
    carry: InnerState,
    loss: LossFunction,
    batches: Sequence[Batch],
    noise_TBN: Tensor,
    *,
    lrs: Sequence[float | Tensor],
    first_step: int = 1,
    redirect: Callable[[Tensor], Tensor] | None = None,
    counted: Callable[[Tensor], Tensor] | None = None,
    kl_weight: float,
    objective: str = "loss",
    meta_batches: Sequence[Sequence[Batch]] | None = None,
    batch_weights: Sequence[float] = (1.0,),
) -> Unroll:
    """Train B networks for ``len(batches)`` inner steps, as a function of theta.

    The gradients that the rule reads are constants, so that no second derivatives are needed; the
    loss that counts is the one after the update. State and parameters come in without a graph and
    leave without one. Under ``torch.no_grad`` nothing is kept for a derivative by theta.

    Source: Wang et al., TPAMI 2022; truncation as in Andrychowicz et al., NeurIPS 2016.

    Args:
        rule: the update rule.
        theta: meta-parameters.
        carry: the inner runs so far.
        loss: the inner tasks' losses.
        batches: one a step.
        noise_TBN: standard normal numbers for the sampled updates.
        lrs: inner learning rates, one a step: for all coordinates, or (N,) for each; before
            calibration, if the rule has it.
        first_step: the number of the first of these steps; they count from 1.
        redirect: what the networks' layers make of a sampled direction (B, N); None: nothing.
        counted: of :class:`~hyperadam.metatrain.calibration.Calibration`, for a ``carry`` with
            coherence.
        kl_weight: λ, the weight of the KL term.
        objective: ``"loss"``, a task's mean loss over the steps; ``"log-loss"``, its logarithm.
        meta_batches: what the loss after each update is taken on, M batches a step, each of which
            has an objective of its own; None, as in the papers: the batch that the update was
            made from.
        batch_weights: what the objective on each of the M counts; their sum is 1.
    """
    params_BN = carry.params_BN
    steps = rule.begin(theta, carry.rule_state, len(batches))
    losses: list[Tensor] = []
    kls: list[Tensor] = []
    after = [[batch] for batch in batches] if meta_batches is None else meta_batches
    of_step: list[Tensor] = []  # the losses at the parameters as they are
    on_batch: Batch | None = None  # what the last of them was taken on
    by_theta = torch.is_grad_enabled()
    calibration = None
    if carry.coherence_B is not None:
        assert counted is not None
        calibration = Calibration(rule.rule, carry.coherence_B, first_step, counted)
    for batch, step_batches, noise_BN, lr in zip(batches, after, noise_TBN, lrs, strict=True):
        # A task's loss depends on its own row only: the sum's gradient is each one's.
        with torch.enable_grad():
            if on_batch is batch and params_BN.requires_grad:
                total = of_step[-1].sum()
                (grad_BN,) = torch.autograd.grad(total, params_BN, retain_graph=by_theta)
            else:
                point_BN = params_BN.detach().requires_grad_()
                (grad_BN,) = torch.autograd.grad(loss(point_BN, batch).sum(), point_BN)
        update = steps.step(grad_BN)
        direction_BN = update.sample(noise_BN)
        if redirect is not None:
            direction_BN = redirect(direction_BN)
        if calibration is not None:
            lr = lr * calibration.lr_scale(grad_BN)
        params_BN = params_BN - lr * direction_BN
        if not by_theta:
            params_BN.requires_grad_()
        with torch.enable_grad():
            of_step = [loss(params_BN, meta_batch) for meta_batch in step_batches]
        on_batch = step_batches[-1]
        losses.append(torch.stack(of_step if by_theta else [value.detach() for value in of_step]))
        kls.append(rule.rule.kl(update))
    loss_TMB, kl_TB = torch.stack(losses), torch.stack(kls)
    weight_M1 = loss_TMB.new_tensor(batch_weights).unsqueeze(1)
    loss_TB = (weight_M1 * loss_TMB).sum(1)
    if objective == "loss":
        meta_loss_B = (loss_TB + kl_weight * kl_TB).mean(0)
    else:
        meta_loss_B = (weight_M1 * loss_TMB.mean(0).log()).sum(0) + kl_weight * kl_TB.mean(0)
    return Unroll(
        meta_loss_B=meta_loss_B,
        meta_loss=meta_loss_B.mean(),
        loss_TB=loss_TB.detach(),
        kl_TB=kl_TB.detach(),
        carry=InnerState(
            params_BN.detach(),
            steps.carry(),
            None if calibration is None else calibration.coherence_B,
        ),
    )
