"""The interface of a learned update rule, its state, and Variational HyperAdam itself.

Shapes are named by suffixes: N coordinates, H channels, L stacked state layers, K fixed-moment
decays, F = 2K features. A rule is a frozen dataclass: its fields are its whole configuration,
its methods pure functions of theta, state and gradient, in any floating dtype, differentiable
with respect to theta and state.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from hyperadam.errors import ConfigError
from hyperadam.rule.adam_cell import adam_cell, decay_rates
from hyperadam.rule.features import fixed_moments, preprocess
from hyperadam.rule.normalize import ColumnNorm, Reduce
from hyperadam.rule.state_cell import state_cell
from hyperadam.rule.var_block import (
    SMALLEST_SQUARE,
    kl_divergence,
    level,
    mean_squares,
    narrowing,
    sample_update,
    var_block,
)
from hyperadam.rule.weight_cell import weight_cell

Theta = Mapping[str, Tensor]
"""Meta-parameters by name; the names are the authors'."""

Shapes = dict[str, tuple[int, ...]]

MAX_CHANNELS = 1024
MAX_STATE_LAYERS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class RuleState:
    """What a rule remembers between steps; zeros before the first.

    Every tensor but ``step`` and ``peak_1`` has the coordinates as its first dimension, so that
    states can be split by parameter and joined again. What a rule does not use of them has a last
    dimension of 0.

    Attributes:
        step: number of steps taken, int64, of shape () or, where it differs, (N,).
        exp_avg_NK, exp_avg_sq_NK: fixed moments, uncorrected.
        h_NLH, c_NLH: LSTM state.
        m_NH, v_NH: moments of the candidate directions, uncorrected.
        m_corr_NH, v_corr_NH: their correction accumulators.
        peak_1: the largest mean square of the gradient so far, which ``variance_base`` asks for
            (:func:`~hyperadam.rule.var_block.level`); float64 of shape (1,).
    """

    step: Tensor
    exp_avg_NK: Tensor
    exp_avg_sq_NK: Tensor
    h_NLH: Tensor
    c_NLH: Tensor
    m_NH: Tensor
    v_NH: Tensor
    m_corr_NH: Tensor
    v_corr_NH: Tensor
    peak_1: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> RuleState:
        """The state with ``function`` applied to each of its tensors."""
        return RuleState(**{name: function(value) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, ``step`` first."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


SCALAR_FIELDS = ("step", "peak_1")
"""The fields of :class:`RuleState` that are not of the coordinates."""


@dataclasses.dataclass(frozen=True, eq=False)
class UpdateDistribution:
    """The distribution of one step's update direction d; ``params = params - lr d``.

    Attributes:
        mean_N: its mean.
        log_var_N: log of its variance; None for a deterministic rule.
        prior_mean_N: mean of the prior in the KL term; None where the mean has no prior.
    """

    mean_N: Tensor
    log_var_N: Tensor | None = None
    prior_mean_N: Tensor | None = None

    def sample(self, noise_N: Tensor) -> Tensor:
        """A draw, from standard normal ``noise_N``; the mean for a deterministic rule."""
        if self.log_var_N is None:
            return self.mean_N
        return sample_update(self.mean_N, self.log_var_N, noise_N)

    def map(self, function: Callable[[Tensor], Tensor]) -> UpdateDistribution:
        """The distribution with ``function`` applied to each of its tensors."""
        present = {name: value for name, value in vars(self).items() if value is not None}
        return UpdateDistribution(**{name: function(value) for name, value in present.items()})


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """What is inside one step of a rule with candidate directions; N may be several dimensions.

    Attributes:
        beta_NH, gamma_NH: predicted decay rates of each candidate's moments.
        rho_NH: the candidates' weights.
        a_NH: the candidate directions.
        mean_N: the mean of the update, ``sum over H of rho a``.
        log_var_N: log of its variance; None for a deterministic rule.
    """

    beta_NH: Tensor
    gamma_NH: Tensor
    rho_NH: Tensor
    a_NH: Tensor
    mean_N: Tensor
    log_var_N: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Explanation:
        """The explanation with ``function`` applied to each of its tensors."""
        present = {name: value for name, value in vars(self).items() if value is not None}
        return Explanation(**{name: function(value) for name, value in present.items()})


BY_LAYER = ("fan_in_base", "row_mean_base", "vector_scale", "attention_scale")
"""Settings of a rule that scale its steps by what a parameter is in its network."""

VARIANCE = ("variance_base", "variance_floor", "kl_prior_scale")
"""Settings of a rule that say what its VarBlock's numbers mean and are meta-trained for."""

APART_FROM_THETA = (*BY_LAYER, "calibrated", *VARIANCE)
"""Settings that scale a rule's steps or their variance without theta's knowing: rules that differ
in these alone can have the same theta."""

SIZES = ("channels", "moment_decays")
"""Settings that say how large theta is, while its parts and what they do stay the same: in these
alone rules that are joined may differ, and these come with weights that meta-training begins with.
"""


@dataclasses.dataclass(frozen=True)
class Rule(abc.ABC):
    """A learned update rule. Subclasses add their settings as fields.

    Attributes:
        name: of the rule, as in weights files and on the command line.
        channels: H.
        state_layers: L, stacked LSTM layers.
        fan_in_base: with f, parameters with a fan-in above f have a lower learning rate
            (:meth:`lr_scale`); None, as in the papers: all have the same.
        row_mean_base: with r, what the inputs of one output have in common in a step is less where
            they are more than r (:meth:`row_mean_scale`); None, as in the papers: it is not.
        vector_scale: what the learning rate of biases and other vectors is multiplied by
            (:meth:`lr_scale`); 1 in the papers.
        attention_scale: what the learning rate of attention's matrices is multiplied by
            (:meth:`lr_scale`); 1 in the papers.
        calibrated: lower the learning rate where the first gradients swing to and fro
            (:mod:`hyperadam.rule.coherence`); not in the papers. For rules with fixed moments.
    """

    name: ClassVar[str]

    channels: int = 20
    state_layers: int = 1
    fan_in_base: float | None = None
    row_mean_base: float | None = None
    vector_scale: float = 1.0
    attention_scale: float = 1.0
    calibrated: bool = False

    def __post_init__(self) -> None:
        for name in BY_LAYER:
            self._normalise(name, float)
            value = getattr(self, name)
            optional = name in ("fan_in_base", "row_mean_base")
            good = (value is None and optional) or (value is not None and 0 < value < math.inf)
            self._require(good, f"{name} must be {'None or ' if optional else ''}a positive number")
        for name, most in (("channels", MAX_CHANNELS), ("state_layers", MAX_STATE_LAYERS)):
            value = getattr(self, name)
            good = isinstance(value, int) and 1 <= value <= most
            self._require(good, f"{name} must be an integer, at least 1 and at most {most}")
        self._require(isinstance(self.calibrated, bool), "calibrated must be True or False")
        good = self.has_fixed_moments or not self.calibrated
        self._require(good, "calibrated takes a rule with fixed moments, which this has not")

    def _normalise(self, name: str, convert: Callable[[Any], object]) -> None:
        """Give a field its plain type, so that equal rules are equal in every way."""
        value = getattr(self, name)
        try:
            object.__setattr__(self, name, None if value is None else convert(value))
        except (TypeError, ValueError):
            self._require(False, f"{name} has a wrong type")

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"{self.name}: {message}; got {self}")

    def _require_decays(self, name: str) -> None:
        self._normalise(name, lambda values: tuple(float(value) for value in values))
        decays = getattr(self, name)
        self._require(
            decays is not None and len(decays) >= 1 and all(0 < decay < 1 for decay in decays),
            "moment_decays must be one or more numbers between 0 and 1",
        )

    @abc.abstractmethod
    def theta_shapes(self) -> Shapes:
        """Shape of each meta-parameter by name."""

    @abc.abstractmethod
    def init_theta(
        self, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Initial meta-parameters, drawn from ``generator`` on its device."""

    @abc.abstractmethod
    def state_widths(self) -> dict[str, tuple[int, ...]]:
        """Dimensions after N of each state tensor that the rule uses, by field name."""

    @abc.abstractmethod
    def step(
        self, theta: Theta, state: RuleState, grad_N: Tensor, reduce: Reduce | None = None
    ) -> tuple[UpdateDistribution, RuleState]:
        """One step.

        Args:
            theta: meta-parameters, of the gradient's dtype and device.
            state: from :meth:`init_state` or the step before.
            grad_N: the gradient, a constant: no derivative is taken with respect to it.
            reduce: sums over shards, where these are not all coordinates
                (:func:`~hyperadam.rule.normalize.unit_columns`).

        Returns:
            The distribution of the update direction and the new state.
        """

    def init_state(
        self,
        num_coordinates: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> RuleState:
        """The state before the first step."""
        widths = self.state_widths()
        zeros = {
            field.name: torch.zeros(
                num_coordinates, *widths.get(field.name, (0,)), dtype=dtype, device=device
            )
            for field in dataclasses.fields(RuleState)
            if field.name not in SCALAR_FIELDS
        }
        return RuleState(
            step=torch.zeros((), dtype=torch.int64, device=device),
            peak_1=torch.zeros(1, dtype=torch.float64, device=device),
            **zeros,
        )

    def lr_scale(self, shape: Sequence[int], *, attention: bool = False) -> float:
        """What the learning rate of a parameter of this shape is multiplied by.

        With ``fan_in_base`` f it is ``min(1, sqrt(f / fan_in))`` for two and more dimensions, of
        which the first are the outputs: in proportion to the size that layers' weights are
        initialised with (LeCun et al., "Efficient BackProp", 1998), so that one learning rate
        serves narrow layers and wide ones. Without, it is 1. For biases and other vectors, and for
        single numbers, it is ``vector_scale``.

        Args:
            shape: the parameter's.
            attention: whether it is one of attention's projections, of its inputs or outputs
                (:func:`~hyperadam.rule.attention.attention_projections`): the learning rate of
                their weights is multiplied by ``attention_scale`` too, not that of their biases.
        """
        if len(shape) < 2:
            return self.vector_scale
        scale = _fan_in_scale(self.fan_in_base, shape)
        return scale * self.attention_scale if attention else scale

    def row_mean_scale(self, shape: Sequence[int]) -> float:
        """What the row means of a step of a parameter of this shape are multiplied by.

        A row has the weights of one output, all dimensions but the first. With ``row_mean_base`` r
        the mean of its step is multiplied by ``min(1, sqrt(r / fan_in))``: behind a ReLU all inputs
        are positive, so that what a row's step has in common adds up over ``fan_in`` inputs, the
        rest of it over ``sqrt(fan_in)``; some steps of the first kind and the unit never answers
        again. Without, and for biases and other vectors, it is 1. Multiplied by 0, it would be what
        Yong et al., "Gradient Centralization", ECCV 2020, do to gradients.
        """
        return _fan_in_scale(self.row_mean_base, shape)

    def scale_row_means_(self, direction: Tensor, shape: Sequence[int]) -> None:
        """Multiply the row means of a parameter's step by :meth:`row_mean_scale`, in place.

        Args:
            direction: of the parameter's shape, a complex one's as pairs of real numbers.
            shape: the parameter's.
        """
        if (scale := self.row_mean_scale(shape)) < 1:
            inputs = tuple(range(1, len(shape)))
            direction.sub_(direction.mean(inputs, keepdim=True), alpha=1 - scale)

    def kl(self, update: UpdateDistribution) -> Tensor:
        """KL of the update from its prior, summed over coordinates; 0 for deterministic rules."""
        return update.mean_N.new_zeros(update.mean_N.shape[:-1])

    @property
    def has_variance(self) -> bool:
        """Whether updates have a variance; otherwise the rule is deterministic."""
        return False

    @property
    def has_fixed_moments(self) -> bool:
        """Whether the state has moments of the gradient with fixed decay rates."""
        return False

    @property
    def has_peak(self) -> bool:
        """Whether ``peak_1`` of the state is used."""
        return False

    def to_dict(self) -> dict[str, object]:
        """The configuration as plain values, with the rule's name under ``rule``."""
        return {"rule": self.name, **dataclasses.asdict(self)}

    def identity(self) -> dict[str, object]:
        """The rule's name and the settings that are not at their defaults."""
        changed = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return {"rule": self.name, **changed}

    def num_theta(self) -> int:
        """How many numbers theta has."""
        return sum(math.prod(shape) for shape in self.theta_shapes().values())


def _fan_in_scale(base: float | None, shape: Sequence[int]) -> float:
    if base is None or len(shape) < 2:
        return 1.0
    return min(1.0, math.sqrt(base / max(1, math.prod(shape[1:]))))


def cat_states(states: Sequence[RuleState], sizes: Sequence[int]) -> RuleState:
    """Join states of ``sizes`` coordinates; their steps may differ."""
    columns = {
        name: torch.cat([state.tensors()[name] for state in states])
        for name in states[0].tensors()
        if name not in SCALAR_FIELDS
    }
    peak_1 = torch.stack([state.peak_1 for state in states]).amax(0)
    steps = torch.stack([state.step for state in states])
    if bool((steps == steps[0]).all()):
        return RuleState(step=steps[0], peak_1=peak_1, **columns)
    device = columns["h_NLH"].device
    repeats = torch.tensor(sizes, device=device)
    return RuleState(step=steps.to(device).repeat_interleave(repeats), peak_1=peak_1, **columns)


def init_linear(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A linear layer's initial weight: normal, std 0.1, cut at two standard deviations."""
    weight = torch.empty(shape, dtype=dtype, device=generator.device)
    return torch.nn.init.trunc_normal_(weight, std=0.1, a=-0.2, b=0.2, generator=generator)


def init_cell(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A state cell's or Adam cell's initial weight: Xavier uniform."""
    weight = torch.empty(shape, dtype=dtype, device=generator.device)
    return torch.nn.init.xavier_uniform_(weight, generator=generator)


@dataclasses.dataclass(frozen=True)
class AdamCandidatesRule(Rule):
    """What HyperAdam and Variational HyperAdam share: state cell, Adam cell, weight cell.

    Attributes:
        column_norm: the norm in ``unit_columns``; the papers' is ``"euclidean"``.
        candidate_bound: with b, candidate directions become ``b tanh(a / b)``; None in the papers.
        lstm: have a state cell; without it, h is the preprocessed features x and no LSTM state is
            kept: an ablation of the AAAI paper.
        preprocessing: have the preprocessing layer; without it, the features enter the state cell
            as they are: another.
    """

    column_norm: ColumnNorm = "euclidean"
    candidate_bound: float | None = None
    lstm: bool = True
    preprocessing: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        norms = get_args(ColumnNorm)
        self._require(self.column_norm in norms, f"column_norm must be one of {norms}")
        self._normalise("candidate_bound", float)
        bound = self.candidate_bound
        good_bound = bound is None or (bound > 0 and math.isfinite(bound))
        self._require(good_bound, "candidate_bound must be None or a positive number")
        for name in ("lstm", "preprocessing"):
            self._require(isinstance(getattr(self, name), bool), f"{name} must be True or False")
        self._require(
            self.lstm or self.preprocessing,
            "lstm and preprocessing can't both be False: h would have no channels",
        )
        self._require(
            self.lstm or self.state_layers == 1,
            "state_layers has no meaning with lstm=False; leave it at 1",
        )

    @property
    @abc.abstractmethod
    def num_features(self) -> int:
        """F, the columns of the features."""

    @property
    def _num_cells(self) -> int:
        """LSTM layers that there are."""
        return self.state_layers if self.lstm else 0

    @abc.abstractmethod
    def _features(
        self, state: RuleState, grad_N: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``features_NF``, and the new state's tensors that they were made from, by name."""

    @abc.abstractmethod
    def _distribution(self, explanation: Explanation, features_NF: Tensor) -> UpdateDistribution:
        """The distribution of the update."""

    def _log_var(
        self,
        theta: Theta,
        h_NH: Tensor,
        mean_N: Tensor,
        moments: Mapping[str, Tensor],
        state: RuleState,
        reduce: Reduce | None,
    ) -> tuple[Tensor | None, Tensor]:
        """``log_var_N`` of the new h, the update's mean and the new fixed moments, None for a
        deterministic rule; and the new ``peak_1``.

        Args:
            state: before the step.
        """
        return None, state.peak_1

    def theta_shapes(self) -> Shapes:
        channels, inputs = self.channels, self.num_features
        shapes: Shapes = {}
        if self.preprocessing:
            shapes["pre_linear.weight"] = (channels, inputs)
            shapes["pre_linear.bias"] = (channels,)
            inputs = channels
        for layer in range(1, self._num_cells + 1):
            shapes[f"lstm{layer}.weight"] = (4 * channels, inputs + channels)
            shapes[f"lstm{layer}.bias"] = (4 * channels,)
            inputs = channels
        shapes["adamcell.weight"] = (2 * channels, 2 * channels)
        shapes["adamcell.bias"] = (2 * channels,)
        shapes["post_linear.weight"] = (channels, channels)
        shapes["post_linear.bias"] = (channels,)
        return shapes

    def init_theta(
        self, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        def init(name: str, shape: tuple[int, ...]) -> Tensor:
            if name.endswith(".bias"):
                return torch.zeros(shape, dtype=dtype, device=generator.device)
            cell = name.startswith(("lstm", "adamcell"))
            return (init_cell if cell else init_linear)(shape, generator, dtype)

        return {name: init(name, shape) for name, shape in self.theta_shapes().items()}

    def state_widths(self) -> dict[str, tuple[int, ...]]:
        layers, channels = (self.state_layers, self.channels), (self.channels,)
        cells = {"h_NLH": layers, "c_NLH": layers} if self.lstm else {}
        return cells | dict.fromkeys(("m_NH", "v_NH", "m_corr_NH", "v_corr_NH"), channels)

    def step(
        self, theta: Theta, state: RuleState, grad_N: Tensor, reduce: Reduce | None = None
    ) -> tuple[UpdateDistribution, RuleState]:
        features_NF, moments = self._features(state, grad_N, reduce)
        explanation, state = self._step_from_features(
            theta, state, grad_N, features_NF, moments, reduce
        )
        return self._distribution(explanation, features_NF), state

    def explain(
        self, theta: Theta, state: RuleState, grad_N: Tensor, reduce: Reduce | None = None
    ) -> Explanation:
        """What is inside the step that :meth:`step` would make of the same arguments."""
        features_NF, moments = self._features(state, grad_N, reduce)
        return self._step_from_features(theta, state, grad_N, features_NF, moments, reduce)[0]

    def _step_from_features(
        self,
        theta: Theta,
        state: RuleState,
        grad_N: Tensor,
        features_NF: Tensor,
        moments: dict[str, Tensor],
        reduce: Reduce | None,
    ) -> tuple[Explanation, RuleState]:
        """Features and what they were made from to the inside of the step and the new state."""
        x_NC = features_NF
        if self.preprocessing:
            x_NC = preprocess(x_NC, theta["pre_linear.weight"], theta["pre_linear.bias"])
        layers: list[tuple[Tensor, Tensor]] = []
        for layer in range(self._num_cells):
            x_NC, c_NH = state_cell(
                x_NC,
                state.h_NLH[..., layer, :],
                state.c_NLH[..., layer, :],
                theta[f"lstm{layer + 1}.weight"],
                theta[f"lstm{layer + 1}.bias"],
                self.column_norm,
                reduce,
            )
            layers.append((x_NC, c_NH))
        h_NH = x_NC
        beta_NH, gamma_NH = decay_rates(
            h_NH,
            state.m_NH,
            theta["adamcell.weight"],
            theta["adamcell.bias"],
            self.column_norm,
            reduce,
        )
        a_NH, m_NH, v_NH, m_corr_NH, v_corr_NH = adam_cell(
            grad_N,
            beta_NH,
            gamma_NH,
            state.m_NH,
            state.v_NH,
            state.m_corr_NH,
            state.v_corr_NH,
            self.candidate_bound,
        )
        rho_NH = weight_cell(h_NH, theta["post_linear.weight"], theta["post_linear.bias"])
        mean_N = (rho_NH * a_NH).sum(dim=-1)
        log_var_N, peak_1 = self._log_var(theta, h_NH, mean_N, moments, state, reduce)
        explanation = Explanation(beta_NH, gamma_NH, rho_NH, a_NH, mean_N, log_var_N)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            **moments,
            m_NH=m_NH,
            v_NH=v_NH,
            m_corr_NH=m_corr_NH,
            v_corr_NH=v_corr_NH,
            peak_1=peak_1,
        )
        if layers:
            new_state = dataclasses.replace(
                new_state,
                h_NLH=torch.stack([h for h, _ in layers], dim=-2),
                c_NLH=torch.stack([c for _, c in layers], dim=-2),
            )
        return explanation, new_state


@dataclasses.dataclass(frozen=True)
class VariationalHyperAdamRule(AdamCandidatesRule):
    """Variational HyperAdam (Wang, Yang, Sun, Xu, TPAMI 2022). The defaults are the paper's.

    Attributes:
        moment_decays: decay rates of the fixed moments; each adds two features.
        var_block: predict the update's variance; without it the rule is deterministic.
        variance_base: with b, the variance is multiplied by the mean square of the update's mean
            and by what is left of the largest mean square of the gradient, and divided by
            ``1 + r/b``, where r is a coordinate's second moment of the longest memory over the
            mean of all (:mod:`hyperadam.rule.var_block`); None, as in the paper: it is neither.
        variance_floor: what is left at least of the variance where r is large, a part of that
            where r is small; 0 to below 1, and 0 without ``variance_base``.
        kl_prior_mean: the prior's mean in the KL term. ``"none"`` leaves the mean out of the
            term, as the paper's experiments do; ``"fixed_moments"`` takes the direction of the
            first fixed moment.
        kl_prior_scale: the prior's standard deviation.
    """

    name: ClassVar[str] = "variational-hyperadam"

    moment_decays: tuple[float, ...] = (0.95,)
    var_block: bool = True
    variance_base: float | None = None
    variance_floor: float = 0.0
    kl_prior_mean: Literal["none", "fixed_moments"] = "none"
    kl_prior_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_decays("moment_decays")
        for name in ("variance_base", "variance_floor", "kl_prior_scale"):
            self._normalise(name, float)
        base = self.variance_base
        self._require(
            base is None or (self.var_block and 0 < base < math.inf),
            "variance_base must be None or, with var_block, a positive number",
        )
        floor = self.variance_floor
        self._require(
            floor is not None and (floor == 0 or (base is not None and 0 < floor < 1)),
            "variance_floor must be 0 or, with variance_base, a number between 0 and 1",
        )
        self._require(
            self.kl_prior_mean in ("none", "fixed_moments"),
            "kl_prior_mean must be 'none' or 'fixed_moments'",
        )
        self._require(
            self.kl_prior_scale > 0 and math.isfinite(self.kl_prior_scale),
            "kl_prior_scale must be a positive number",
        )

    @property
    def num_features(self) -> int:
        return 2 * len(self.moment_decays)

    @property
    def has_variance(self) -> bool:
        return self.var_block

    @property
    def has_fixed_moments(self) -> bool:
        return True

    @property
    def has_peak(self) -> bool:
        return self.variance_base is not None

    def theta_shapes(self) -> Shapes:
        shapes = super().theta_shapes()
        if self.var_block:
            shapes["linear_var1.weight"] = (1, self.channels)
            shapes["linear_var1.bias"] = (1,)
        return shapes

    def state_widths(self) -> dict[str, tuple[int, ...]]:
        moments = (len(self.moment_decays),)
        return super().state_widths() | {"exp_avg_NK": moments, "exp_avg_sq_NK": moments}

    def _features(
        self, state: RuleState, grad_N: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        features_NF, exp_avg_NK, exp_avg_sq_NK = fixed_moments(
            grad_N, state.exp_avg_NK, state.exp_avg_sq_NK, state.step + 1, self.moment_decays
        )
        return features_NF, {"exp_avg_NK": exp_avg_NK, "exp_avg_sq_NK": exp_avg_sq_NK}

    @property
    def longest_memory(self) -> int:
        """The place among ``moment_decays`` of the one nearest to 1."""
        return max(range(len(self.moment_decays)), key=self.moment_decays.__getitem__)

    def moment_correction(self, step: Tensor) -> Tensor:
        """What corrects the moment of :attr:`longest_memory`, float64 of the shape of ``step``."""
        return 1 / (1 - self.moment_decays[self.longest_memory] ** step.to(torch.float64))

    def _log_var(
        self,
        theta: Theta,
        h_NH: Tensor,
        mean_N: Tensor,
        moments: Mapping[str, Tensor],
        state: RuleState,
        reduce: Reduce | None,
    ) -> tuple[Tensor | None, Tensor]:
        if not self.var_block:
            return None, state.peak_1
        log_var_N = var_block(h_NH, theta["linear_var1.weight"], theta["linear_var1.bias"])
        if self.variance_base is None:
            return log_var_N, state.peak_1
        moment_N = moments["exp_avg_sq_NK"][..., self.longest_memory]
        added_N, peak_1 = self.log_shape(moment_N, mean_N, state.step + 1, state.peak_1, reduce)
        return log_var_N + added_N, peak_1

    def log_shape(
        self,
        exp_avg_sq_N: Tensor,
        mean_N: Tensor,
        step: Tensor,
        peak_1: Tensor,
        reduce: Reduce | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What ``variance_base`` adds to the log-variance, and the new ``peak_1``.

        Args:
            exp_avg_sq_N: the moment of :attr:`longest_memory`, uncorrected; leading dimensions are
                independent problems.
            mean_N: the update's mean.
            step: the number of the step, of shape () or (N,).
            peak_1: the largest mean square before it, of shape (1,), behind the leading dimensions.
            reduce: sums over shards, where these are not all coordinates.
        """
        assert self.variance_base is not None
        moment_N = exp_avg_sq_N * self.moment_correction(step).to(exp_avg_sq_N.dtype)
        total = moment_N.sum(-1, dtype=torch.float64)
        squares = mean_N.double().square().sum(-1)
        count = torch.full_like(total, moment_N.shape[-1])
        found = mean_squares(total, squares, count, reduce)
        moment_1, mean_1 = (value.unsqueeze(-1) for value in found)
        peak_1 = torch.maximum(peak_1, moment_1)
        moment_1, highest_1, mean_1 = (
            value.to(moment_N.dtype) for value in (moment_1, peak_1, mean_1)
        )
        base, floor = self.variance_base, self.variance_floor
        narrowing_N = narrowing(moment_N, moment_1.clamp_min(SMALLEST_SQUARE), base, floor)
        return level(moment_1, highest_1, mean_1).log() + narrowing_N.log(), peak_1

    def _distribution(self, explanation: Explanation, features_NF: Tensor) -> UpdateDistribution:
        fixed = self.kl_prior_mean == "fixed_moments"
        prior_mean_N = features_NF[..., 1] if fixed else None
        return UpdateDistribution(explanation.mean_N, explanation.log_var_N, prior_mean_N)

    def kl(self, update: UpdateDistribution) -> Tensor:
        if update.log_var_N is None:
            return super().kl(update)
        mean_error_N = None if update.prior_mean_N is None else update.mean_N - update.prior_mean_N
        return kl_divergence(update.log_var_N, mean_error_N, self.kl_prior_scale)
