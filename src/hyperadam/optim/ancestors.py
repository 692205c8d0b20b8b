"""The rules that Variational HyperAdam descends from, as optimizers: learned baselines.

None of them draws noise, so they have neither ``sample`` nor ``seed``, and none has a kernel, so
there is no ``backend`` to choose: plain PyTorch computes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hyperadam.optim.learned_optimizer import LearnedOptimizer, Nonfinite, StateDtype
from hyperadam.rule import DMoptimizerRule, HyperAdamRule, RNNpropRule
from hyperadam.weights import Weights


class LearnedBaseline(LearnedOptimizer):
    """Base of the optimizers of the earlier rules.

    Args:
        params: parameters, or groups with their own ``lr``, ``weight_decay``,
            ``decoupled_weight_decay`` and ``maximize``.
        lr: learning rate; None takes the one that the weights were meta-trained for.
        weights: a bundled name, a path to a weights file, or :class:`hyperadam.Weights`; None
            takes the bundled weights of the rule, :attr:`default_weights`.
        weight_decay, decoupled_weight_decay, state_dtype, nonfinite, maximize: see
            :class:`VariationalHyperAdam`.

    Raises:
        ValueError: an empty parameter list, a hyperparameter out of range, unknown or damaged
            weights, or weights of another rule.
    """

    default_weights: ClassVar[str]
    """Name of the bundled weights."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        *,
        weights: str | Path | Weights | None = None,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        state_dtype: StateDtype = "float32",
        nonfinite: Nonfinite = "skip",
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            weights=self.default_weights if weights is None else weights,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            backend="reference",
            state_dtype=state_dtype,
            nonfinite=nonfinite,
            maximize=maximize,
        )


class HyperAdam(LearnedBaseline):
    """HyperAdam: the mean of H Adam-like candidates with predicted decay rates and weights.

    State: 120 numbers a parameter at H = 20. Arguments: see :class:`LearnedBaseline`.

    Reference:
        Wang, Sun, Xu, "HyperAdam: A Learnable Task-Adaptive Adam for Network Training",
        AAAI 2019.
    """

    rule_name = HyperAdamRule.name
    default_weights = "hyperadam"


class RNNprop(LearnedBaseline):
    """RNNprop: two LSTM layers over the directions of RMSprop and Adam.

    State: 82 numbers a parameter at H = 20. Arguments: see :class:`LearnedBaseline`.

    Reference:
        Lv, Jiang, Li, "Learning gradient descent: better generalization and longer horizons",
        ICML 2017.
    """

    rule_name = RNNpropRule.name
    default_weights = "rnnprop"


class DMoptimizer(LearnedBaseline):
    """DMoptimizer: two LSTM layers over the gradient's logarithm and sign.

    State: 80 numbers a parameter at H = 20. Arguments: see :class:`LearnedBaseline`.

    Reference:
        Andrychowicz et al., "Learning to learn by gradient descent by gradient descent",
        NeurIPS 2016.
    """

    rule_name = DMoptimizerRule.name
    default_weights = "dmoptimizer"
