"""The rules that Variational HyperAdam descends from: HyperAdam, RNNprop, DMoptimizer."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadam.rule.features import fixed_moments, log_and_sign, preprocess, unit_gradient
from hyperadam.rule.normalize import Reduce
from hyperadam.rule.rule import (
    AdamCandidatesRule,
    Explanation,
    Rule,
    RuleState,
    Shapes,
    Theta,
    UpdateDistribution,
    init_linear,
)


@dataclasses.dataclass(frozen=True)
class HyperAdamRule(AdamCandidatesRule):
    """HyperAdam (Wang, Sun, Xu, AAAI 2019): no fixed moments, no variance."""

    name: ClassVar[str] = "hyperadam"

    @property
    def num_features(self) -> int:
        return 1

    def _features(
        self, state: RuleState, grad_N: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return unit_gradient(grad_N, reduce), {}

    def _distribution(self, explanation: Explanation, features_NF: Tensor) -> UpdateDistribution:
        return UpdateDistribution(explanation.mean_N)


@dataclasses.dataclass(frozen=True)
class PlainLSTMRule(Rule):
    """What RNNprop and DMoptimizer share: stacked plain LSTM cells and a linear output."""

    state_layers: int = 2

    @property
    @abc.abstractmethod
    def num_inputs(self) -> int:
        """Columns that the first LSTM layer reads."""

    def _lstm_shapes(self) -> Shapes:
        shapes: Shapes = {}
        for layer in range(1, self.state_layers + 1):
            inputs = self.num_inputs if layer == 1 else self.channels
            shapes[f"lstm{layer}.weight_ih"] = (4 * self.channels, inputs)
            shapes[f"lstm{layer}.weight_hh"] = (4 * self.channels, self.channels)
            shapes[f"lstm{layer}.bias_ih"] = (4 * self.channels,)
            shapes[f"lstm{layer}.bias_hh"] = (4 * self.channels,)
        return shapes

    def init_theta(
        self, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(self.channels)

        def init(name: str, shape: tuple[int, ...]) -> Tensor:
            if name.startswith("lstm"):  # as torch.nn.LSTMCell starts
                values = torch.empty(shape, dtype=dtype, device=generator.device)
                return values.uniform_(-bound, bound, generator=generator)
            if name.endswith(".bias"):
                return torch.zeros(shape, dtype=dtype, device=generator.device)
            return init_linear(shape, generator, dtype)

        return {name: init(name, shape) for name, shape in self.theta_shapes().items()}

    def state_widths(self) -> dict[str, tuple[int, ...]]:
        layers = (self.state_layers, self.channels)
        return {"h_NLH": layers, "c_NLH": layers}

    def _lstm(self, theta: Theta, state: RuleState, x_NC: Tensor) -> tuple[Tensor, RuleState]:
        """The stacked cells of ``torch.nn.LSTMCell``; the top layer's h and the new state."""
        layers: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.state_layers):
            name = f"lstm{layer + 1}"
            gates = F.linear(x_NC, theta[f"{name}.weight_ih"], theta[f"{name}.bias_ih"])
            gates = gates + F.linear(
                state.h_NLH[..., layer, :], theta[f"{name}.weight_hh"], theta[f"{name}.bias_hh"]
            )
            i_NH, f_NH, g_NH, o_NH = gates.chunk(4, dim=-1)
            c_NH = torch.sigmoid(f_NH) * state.c_NLH[..., layer, :]
            c_NH = c_NH + torch.sigmoid(i_NH) * torch.tanh(g_NH)
            x_NC = torch.sigmoid(o_NH) * torch.tanh(c_NH)
            layers.append((x_NC, c_NH))
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            h_NLH=torch.stack([h for h, _ in layers], dim=-2),
            c_NLH=torch.stack([c for _, c in layers], dim=-2),
        )
        return x_NC, state


@dataclasses.dataclass(frozen=True)
class RNNpropRule(PlainLSTMRule):
    """RNNprop (Lv, Jiang, Li, "Learning gradient descent: better generalization and longer
    horizons", ICML 2017).

    Attributes:
        moment_decays: decay rates of the fixed moments; each adds two features.
    """

    name: ClassVar[str] = "rnnprop"

    moment_decays: tuple[float, ...] = (0.95,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_decays("moment_decays")

    @property
    def num_inputs(self) -> int:
        return self.channels

    def theta_shapes(self) -> Shapes:
        return {
            "pre_linear.weight": (self.channels, 2 * len(self.moment_decays)),
            "pre_linear.bias": (self.channels,),
            **self._lstm_shapes(),
            "post_linear.weight": (1, self.channels),
            "post_linear.bias": (1,),
        }

    def state_widths(self) -> dict[str, tuple[int, ...]]:
        moments = (len(self.moment_decays),)
        return super().state_widths() | {"exp_avg_NK": moments, "exp_avg_sq_NK": moments}

    def step(
        self, theta: Theta, state: RuleState, grad_N: Tensor, reduce: Reduce | None = None
    ) -> tuple[UpdateDistribution, RuleState]:
        features_NF, exp_avg_NK, exp_avg_sq_NK = fixed_moments(
            grad_N, state.exp_avg_NK, state.exp_avg_sq_NK, state.step + 1, self.moment_decays
        )
        x_NH = preprocess(features_NF, theta["pre_linear.weight"], theta["pre_linear.bias"])
        h_NH, state = self._lstm(theta, state, x_NH)
        out_N1 = F.linear(h_NH, theta["post_linear.weight"], theta["post_linear.bias"])
        state = dataclasses.replace(state, exp_avg_NK=exp_avg_NK, exp_avg_sq_NK=exp_avg_sq_NK)
        return UpdateDistribution(out_N1.squeeze(-1)), state


@dataclasses.dataclass(frozen=True)
class DMoptimizerRule(PlainLSTMRule):
    """DMoptimizer (Andrychowicz et al., "Learning to learn by gradient descent by gradient
    descent", NeurIPS 2016)."""

    name: ClassVar[str] = "dmoptimizer"

    @property
    def num_inputs(self) -> int:
        return 2

    def theta_shapes(self) -> Shapes:
        return {
            **self._lstm_shapes(),
            "linear.weight": (1, self.channels),
            "linear.bias": (1,),
        }

    def step(
        self, theta: Theta, state: RuleState, grad_N: Tensor, reduce: Reduce | None = None
    ) -> tuple[UpdateDistribution, RuleState]:
        h_NH, state = self._lstm(theta, state, log_and_sign(grad_N))
        out_N1 = F.linear(h_NH, theta["linear.weight"], theta["linear.bias"])
        return UpdateDistribution(out_N1.squeeze(-1)), state
