"""Variational HyperAdam as a drop-in optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Normal
from torch.optim.optimizer import ParamsT

from hyperadam.optim.learned_optimizer import LearnedOptimizer, Nonfinite, StateDtype
from hyperadam.rule import VariationalHyperAdamRule
from hyperadam.weights import Weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class VariationalHyperAdam(LearnedOptimizer):
    r"""Variational HyperAdam: an optimizer that was itself meta-trained.

    At each step an LSTM, shared by all coordinates, predicts decay rates and weights of H
    Adam-like candidate directions and the variance of the update, which is then sampled:

    .. math::
        d \sim \mathcal N\Big(\textstyle\sum_{k=1}^{H} \rho_k\, \hat m_k / \sqrt{\hat v_k},\;
        \sigma^2\Big), \qquad w \leftarrow w - \mathrm{lr}\; d

    State: 170 numbers a parameter with the weights ``default``: 680 bytes in float32, 340 in
    bfloat16; 48 numbers with ``lite``. Parameters of float64 have state of float64.

    Args:
        params: parameters, or groups with their own ``lr``, ``weight_decay``,
            ``decoupled_weight_decay``, ``sample``, ``seed`` and ``maximize``. Give a model that has
            attention as ``model.named_parameters()``: by their names
            (:mod:`hyperadam.rule.attention`) its projections are known, for which the learning
            rate is to be lower.
        lr: learning rate; None takes the one that comes with the weights. It is not
            on Adam's scale: a coordinate moves by many times ``lr`` a step (``docs/pytorch.md``).
            In layers with more inputs than the weights' ``fan_in_base`` it is multiplied by
            ``sqrt(fan_in_base / inputs)``, for vectors by the weights' ``vector_scale``, in
            attention's projections by their ``attention_scale``.
        weights: a bundled name, a path to a weights file, or :class:`hyperadam.Weights`.
        weight_decay: coefficient of the L2 penalty.
        decoupled_weight_decay: decay the parameters directly, by ``lr * weight_decay``, as
            AdamW does, in place of adding the penalty's gradient.
        sample: apply a sample of the update's distribution; False applies its mean.
        seed: of the noise, which is a pure function of seed, step and coordinate; torch's own
            generators are neither read nor moved.
        backend: ``"cpu"`` is the C++ kernel, ``"triton"`` that for NVIDIA GPUs, ``"reference"``
            plain PyTorch, ``"auto"`` the device's kernel, or the reference where it can't serve.
        state_dtype: of the state: ``"float32"``, or ``"bfloat16"`` for half the memory, with
            stochastic rounding of what accumulates.
        nonfinite: for a gradient that holds NaN, infinity or a number beyond 1e15 (1e140 in
            float64), whose square would spoil the state for good: ``"skip"`` leaves parameters
            and state as they are, counts in ``skipped_steps`` and, on a CPU, warns of the 1st,
            10th, 100th, ...; a GPU only counts, since a warning would have to wait for it.
            ``"raise"`` raises.
        maximize: ascend in place of descend.
        shard_of: with ``ZeroRedundancyOptimizer``, which gives each process some of the
            parameters: those of all processes, in the model's order, with their names where the
            model has attention (``docs/distributed.md``).
            DTensors, as FSDP2 makes them, need nothing.
        process_group: those processes; None: all.
        calibrate: multiply ``lr`` from the 20th step on by 0.6 to 1, less than 1 where the first 20
            gradients swing more than independent ones (:mod:`hyperadam.rule.coherence`); None: as
            the weights have it (their rule's ``calibrated``), but no scaling where parameters'
            names tell of attention. Costs a number for each parameter tensor, a pass over the
            fixed moments in these steps, and a multiplication after them; with parameters spread
            over processes one more sum over them, of two numbers, in every step.

    Raises:
        ValueError: an empty parameter list, a hyperparameter out of range, unknown or damaged
            weights, or weights of another rule.
        OutOfMemoryError: the state does not fit into the free memory.

    Reference:
        Wang, Yang, Sun, Xu, "Variational HyperAdam: A Meta-Learning Approach to Network
        Training", IEEE TPAMI 44(8), 2022.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = VariationalHyperAdam(model.named_parameters())
        >>> model(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.update_distribution(model.bias).mean.shape
        torch.Size([1])
    """

    rule_name = VariationalHyperAdamRule.name

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        *,
        weights: str | Path | Weights = "default",
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        sample: bool = True,
        seed: int = 0,
        backend: str = "auto",
        state_dtype: StateDtype = "float32",
        nonfinite: Nonfinite = "skip",
        maximize: bool = False,
        shard_of: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | None = None,
        process_group: ProcessGroup | None = None,
        calibrate: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            weights=weights,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            backend=backend,
            state_dtype=state_dtype,
            nonfinite=nonfinite,
            maximize=maximize,
            shard_of=shard_of,
            process_group=process_group,
            calibrate=calibrate,
            own_defaults={"sample": sample, "seed": seed},
        )

    def update_distribution(self, param: Tensor) -> Normal:
        """The distribution of a parameter's last update direction d, before lr, what
        scales it, and before the rule's ``row_mean_base``, where it has one, changes its row means.

        Args:
            param: a parameter of this optimizer.

        Returns:
            Independent normal distributions, of the parameter's shape (a complex parameter's
            viewed as real), in the dtype of the computation.

        Raises:
            ValueError: not a parameter of this optimizer.
            RuntimeError: it has taken no step since the optimizer was constructed, copied or
                loaded, or the weights have no VarBlock.
        """
        if not any(param is known for known, _, _ in self._numbered_params()):
            raise ValueError("this tensor is not a parameter of this optimizer")
        arena = self._arena
        if arena is None or param not in self._stepped:
            raise RuntimeError(
                "this parameter has taken no step since the optimizer was constructed, copied or "
                "loaded"
            )
        if arena.lanes.log_var is None:
            raise RuntimeError("these weights have no VarBlock: the update has no variance")
        number = arena.index[param]
        mean = arena.view(arena.lanes.mean, number).clone()
        return Normal(mean, torch.exp(arena.view(arena.lanes.log_var, number) / 2))
