"""A learned update rule as a ``torch.optim.Optimizer``: groups, state, noise, resume.

The rule sees one problem of N coordinates: the elements of every parameter that has a gradient,
in the order of groups and parameters, as in the paper. This file gathers them, calls the rule
once, and scatters the update and the new state.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hyperadam.errors import ConfigError, WeightsError, unknown_name
from hyperadam.kernels import step_function
from hyperadam.rule import MAX_SEED, RuleState, Theta, cat_states, standard_normal
from hyperadam.weights import Weights, load_weights

Nonfinite = Literal["skip", "raise"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """One parameter's share of a step.

    Attributes:
        param: the parameter, viewed as real.
        grad_N: the gradient to descend, flat, of the step's dtype, with the L2 penalty's where
            that is asked for.
        key: the parameter itself, the key of its state.
        group: its parameter group.
        start: index of its first coordinate among those of all parameters.
    """

    param: Tensor
    grad_N: Tensor
    key: Tensor
    group: dict[str, Any]
    start: int


class _Verbatim:
    """One parameter's saved state on its way through ``Optimizer.load_state_dict``, which casts
    every tensor that it can see to the parameter's dtype."""

    def __init__(self, saved: dict[str, Tensor]) -> None:
        self.saved = saved


def as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _state_dtype(param: Tensor) -> torch.dtype:
    """float64 for double precision, float32 for all else."""
    double = param.dtype in (torch.float64, torch.complex128)
    return torch.float64 if double else torch.float32


def _is_bad(value: object) -> bool:
    """Whether a learning rate or weight decay is no finite number at or above 0."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            return True
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        return True
    number = float(value)
    return not math.isfinite(number) or number < 0


class LearnedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that apply a meta-trained rule; see :class:`VariationalHyperAdam`."""

    rule_name: ClassVar[str]
    """Name of the rule whose weights the class takes."""

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
        nonfinite: Nonfinite = "skip",
        maximize: bool = False,
    ) -> None:
        if not isinstance(weights, Weights):
            weights = load_weights(weights)
        if weights.rule.name != self.rule_name:
            raise WeightsError(
                f"{type(self).__name__} takes weights of the rule {self.rule_name}; these are of "
                f"{weights.rule.name}"
            )
        if nonfinite not in get_args(Nonfinite):
            raise ConfigError(unknown_name("nonfinite", str(nonfinite), get_args(Nonfinite)))
        self.weights = weights
        self.nonfinite = nonfinite
        self.backend = backend
        self.skipped_steps = 0
        self._start_caches()
        defaults = {
            "lr": weights.lr if lr is None else lr,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "sample": sample,
            "seed": seed,
            "maximize": maximize,
            "weights_id": weights.digest(),
        }
        super().__init__(params, defaults)

    def _start_caches(self) -> None:
        """What is not state: made again from the rest wherever it is missing."""
        self._rule_step = step_function(self.weights.rule, self.backend)
        self._theta_cache: dict[tuple[torch.dtype, torch.device], Theta] = {}
        self._last_update: dict[Tensor, tuple[Tensor, Tensor | None]] = {}

    def _theta(self, dtype: torch.dtype, device: torch.device) -> Theta:
        """The meta-parameters, converted once for each dtype and device."""
        key = (dtype, device)
        if key not in self._theta_cache:
            self._theta_cache[key] = {
                name: value.to(device=device, dtype=dtype)
                for name, value in self.weights.theta.items()
            }
        return self._theta_cache[key]

    # -- groups ---------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its coordinates come after those of the groups before it.

        Raises:
            ValueError: a hyperparameter is out of range, or a parameter is not of a floating or
                complex dtype; nothing is added.
        """
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            if group["lr"] is None:
                group["lr"] = self.weights.lr
            self._check_hyperparameters(group)
            misplaced = sorted({"weights", "backend", "nonfinite"} & set(group))
            if misplaced:
                raise ConfigError(f"{misplaced[0]} is a setting of the optimizer, not of a group")
            # Plain numbers: NumPy's would not pass torch.load(weights_only=True).
            group["seed"] = int(group["seed"])
            for name in ("lr", "weight_decay"):
                if not isinstance(group[name], Tensor):
                    group[name] = float(group[name])
            param_group = group
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not (param.is_floating_point() or param.is_complex()):
                self.param_groups.pop()
                raise ConfigError(
                    f"parameters must be of a floating or complex dtype; got {param.dtype}"
                )

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            if _is_bad(group[name]):
                raise ConfigError(f"{name} must be a number, at or above 0; got {group[name]!r}")
        seed = group["seed"]
        integral = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
        if not integral or not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"seed must be an integer from 0 to 2^63 - 1; got {seed!r}")
        for name in ("decoupled_weight_decay", "sample", "maximize"):
            if not isinstance(group[name], bool):
                raise ConfigError(f"{name} must be True or False; got {group[name]!r}")

    # -- step -----------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step, over every parameter whose ``.grad`` is not None.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a sparse gradient, parameters on several devices, or, with
                ``nonfinite="raise"``, a gradient that is not finite; nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = self._gather()
        if parts and self._all_finite(parts):
            self._apply(parts)
        return loss

    def _numbered_params(self) -> Iterator[tuple[Tensor, dict[str, Any], int]]:
        """Each parameter with its group and its first coordinate's index."""
        start = 0
        for group in self.param_groups:
            for param in group["params"]:
                yield param, group, start
                start += as_real(param).numel()

    def _gather(self) -> list[_Part]:
        active = [entry for entry in self._numbered_params() if entry[0].grad is not None]
        if not active:
            return []
        devices = {param.device for param, _, _ in active}
        if len(devices) > 1:
            raise RuntimeError(
                f"{type(self).__name__} needs all parameters on one device, since its column "
                f"norms run over all of them; got {sorted(map(str, devices))}"
            )
        double = any(_state_dtype(param) == torch.float64 for param, _, _ in active)
        dtype = torch.float64 if double else torch.float32
        parts = []
        for param, group, start in active:
            grad = param.grad
            assert grad is not None
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients; got {grad.layout}"
                )
            real = as_real(param)
            grad_N = as_real(grad).reshape(-1).to(dtype)
            grad_N = -grad_N if group["maximize"] else grad_N
            if group["weight_decay"] != 0 and not group["decoupled_weight_decay"]:
                grad_N = grad_N + group["weight_decay"] * real.reshape(-1).to(dtype)
            parts.append(_Part(real, grad_N, param, group, start))
        return parts

    def _all_finite(self, parts: list[_Part]) -> bool:
        finite = torch.stack([torch.isfinite(part.grad_N).all() for part in parts])
        if bool(finite.all()):
            return True
        if self.nonfinite == "raise":
            first = int((~finite).nonzero()[0])
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(parts[first].key.shape)} holds NaN "
                f"or infinity ({int((~finite).sum())} parameters in all)"
            )
        self.skipped_steps += 1
        if self.skipped_steps == 1:
            warnings.warn(
                "a gradient holds NaN or infinity: this step is skipped, parameters and state "
                "stay as they are; later ones are skipped without a word and counted in "
                "optimizer.skipped_steps",
                RuntimeWarning,
                stacklevel=5,
            )
        return False

    def _apply(self, parts: list[_Part]) -> None:
        sizes = [part.grad_N.numel() for part in parts]
        dtype, device = parts[0].grad_N.dtype, parts[0].grad_N.device
        grad_N = torch.cat([part.grad_N for part in parts])
        state = cat_states([self._flat_state(part, dtype) for part in parts], sizes)
        with torch.autocast(device.type, enabled=False):  # step() may stand in a user's autocast
            update, state = self._rule_step(self._theta(dtype, device), state, grad_N, None)

        mean_N, log_var_N = update.mean_N, update.log_var_N
        direction_N = mean_N
        if log_var_N is not None and any(part.group["sample"] for part in parts):
            direction_N = update.sample(self._noise(parts, sizes, dtype, device))

        new = state.tensors()
        end = 0
        for part, size in zip(parts, sizes, strict=True):
            here = slice(end, end := end + size)
            self._move(part, direction_N[here])
            saved = self.state[part.key]
            saved["step"] += 1
            for name, field in self._state_names().items():
                saved[name].copy_(new[field][here].view_as(saved[name]))
            log_var = None if log_var_N is None else log_var_N[here]
            self._last_update[part.key] = (mean_N[here], log_var)

    @staticmethod
    def _move(part: _Part, direction_N: Tensor) -> None:
        """``params = params - lr d``, after decoupled weight decay, in the step's dtype."""
        lr, decay = part.group["lr"], part.group["weight_decay"]
        value = part.param.to(direction_N.dtype)
        if decay != 0 and part.group["decoupled_weight_decay"]:
            value = value * (1 - lr * decay)
        part.param.copy_(value - lr * direction_N.view_as(value))

    def _noise(
        self, parts: list[_Part], sizes: list[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Noise for every coordinate, 0 where a group does not sample.

        Parameters that follow each other with one seed and step share a call, since a call costs
        far more than a number.
        """
        pieces: list[Tensor] = []
        run: tuple[int, int] | None = None  # seed and step of the parameters put together
        start = count = 0

        def flush() -> None:
            if run is None:
                pieces.append(torch.zeros(count, dtype=dtype, device=device))
            else:
                noise = standard_normal(*run, start, count, dtype=dtype, device=device)
                pieces.append(noise)

        for part, size in zip(parts, sizes, strict=True):
            group = part.group
            step = int(self.state[part.key]["step"]) + 1
            this = (group["seed"], step) if group["sample"] else None
            if this != run or part.start != start + count:
                flush()
                run, start, count = this, part.start, 0
            count += size
        flush()
        return torch.cat(pieces)

    # -- state ----------------------------------------------------------------------------------

    def _state_names(self) -> dict[str, str]:
        """Keys of a parameter's state, and the rule's names of the same tensors."""
        return {name.rsplit("_", 1)[0]: name for name in self.weights.rule.state_widths()}

    def _saved_state(self, part: _Part) -> dict[str, Tensor]:
        """A parameter's entry in ``self.state``; zeros are made before its first step."""
        saved: dict[str, Tensor] = self.state[part.key]
        if not saved:
            param = part.param
            saved["step"] = torch.zeros((), dtype=torch.int64, device="cpu")
            widths = self.weights.rule.state_widths()
            for name, field in self._state_names().items():
                shape = (*param.shape, *widths[field])
                saved[name] = torch.zeros(shape, dtype=_state_dtype(param), device=param.device)
        return saved

    def _flat_state(self, part: _Part, dtype: torch.dtype) -> RuleState:
        """A parameter's state as the rule has it."""
        saved, count = self._saved_state(part), part.param.numel()
        widths = self.weights.rule.state_widths()
        unused = torch.empty(count, 0, dtype=dtype, device=part.param.device)
        tensors = {field.name: unused for field in dataclasses.fields(RuleState)}
        for name, field in self._state_names().items():
            tensors[field] = saved[name].reshape(count, *widths[field]).to(dtype)
        return RuleState(**{**tensors, "step": saved["step"]})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state: the run goes on bit for bit as if it had never stopped.

        The state keeps its own dtype, also beside parameters of half precision.

        Raises:
            ValueError: the state dict is of another optimizer, other weights or another model;
                nothing is changed.
        """

        def check_and_wrap(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            # Registered last, so that hooks of users have had their turn. Options that came after
            # the state was saved take their defaults.
            self._check_state_dict(saved)
            groups = [{**self.defaults, **group} for group in saved["param_groups"]]
            wrapped = {key: _Verbatim(value) for key, value in saved["state"].items()}
            return {**saved, "param_groups": groups, "state": wrapped}

        if not isinstance(state_dict, dict):
            raise ConfigError(f"a state dict is a dict; got {type(state_dict).__name__}")
        handle = self.register_load_state_dict_pre_hook(check_and_wrap)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._last_update.clear()

    def _check_state_dict(self, saved: dict[str, Any]) -> None:
        def require(condition: bool, reason: str) -> None:
            if not condition:
                name = type(self).__name__
                raise ConfigError(f"this is not a state dict of this {name}: {reason}")

        groups, states = saved.get("param_groups"), saved.get("state")
        require(
            isinstance(groups, list)
            and all(isinstance(group, dict) for group in groups)
            and all(isinstance(group.get("params"), list) for group in groups),
            "param_groups is no list of groups with params",
        )
        require(isinstance(states, dict), "state is no dict")
        assert isinstance(groups, list)
        assert isinstance(states, dict)
        sizes = [len(group["params"]) for group in groups]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        require(sizes == own_sizes, f"its groups have {sizes} parameters, not {own_sizes}")
        own_id = self.weights.digest()
        for group in groups:
            found = str(group.get("weights_id"))
            require(
                found == own_id,
                f"it was made with the weights {found[:12]}, the optimizer has {own_id[:12]}; "
                f"construct it with the same weights",
            )
            self._check_hyperparameters({**self.defaults, **group})
        keys = [key for group in groups for key in group["params"]]
        require(set(states) <= set(keys), "it has state of parameters that are in no group")
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            if key in states:
                self._check_param_state(states[key], as_real(param), require)

    def _check_param_state(
        self, saved: object, param: Tensor, require: Callable[[bool, str], None]
    ) -> None:
        """Refuse what is not one parameter's state; an empty one is of no step yet."""
        tensors = isinstance(saved, dict) and all(isinstance(t, Tensor) for t in saved.values())
        require(tensors, "a parameter's state is no dict of tensors")
        assert isinstance(saved, dict)
        if not saved:
            return
        widths = self.weights.rule.state_widths()
        shapes = {
            name: (*param.shape, *widths[field]) for name, field in self._state_names().items()
        }
        shapes["step"] = ()
        require(
            set(saved) == set(shapes),
            f"a parameter's state holds {sorted(map(str, saved))}, expected {sorted(shapes)}",
        )
        for name, shape in shapes.items():
            require(
                tuple(saved[name].shape) == shape,
                f"{name} has shape {tuple(saved[name].shape)}, expected {shape} for a parameter "
                f"of shape {tuple(param.shape)}",
            )
            if name == "step":
                require(
                    saved[name].dtype == torch.int64 and int(saved[name]) >= 0,
                    "step is no count",
                )
            else:
                require(saved[name].is_floating_point(), f"{name} is {saved[name].dtype}")

    def __getstate__(self) -> dict[str, Any]:
        kept = ("weights", "nonfinite", "backend", "skipped_steps")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for param, saved in state["state"].items():
            if isinstance(saved, _Verbatim):
                state["state"][param] = {
                    name: value.detach().clone()
                    if name == "step"
                    else value.detach().to(param.device, _state_dtype(param), copy=True)
                    for name, value in saved.saved.items()
                }
        super().__setstate__(state)
        self._start_caches()
