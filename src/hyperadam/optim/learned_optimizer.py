"""A learned update rule as a ``torch.optim.Optimizer``: groups, state, noise, resume.

The rule sees one problem of N coordinates: the elements of every parameter that has a gradient,
in the order of groups and parameters, as in the paper. This file gathers them, calls the rule
once, and scatters the update and the new state.
"""

from __future__ import annotations

import dataclasses
import math
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
        grad_N: its gradient, flat, of the step's dtype.
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


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _state_dtype(param: Tensor) -> torch.dtype:
    """float64 for double precision, float32 for all else."""
    double = param.dtype in (torch.float64, torch.complex128)
    return torch.float64 if double else torch.float32


def _is_bad(value: object) -> bool:
    """Whether a learning rate or weight decay is no finite number at or above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
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
            if param_group.get("lr", 0) is None:
                param_group = {**param_group, "lr": self.weights.lr}
            self._check_hyperparameters({**self.defaults, **param_group})
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
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"seed must be an integer from 0 to 2^63 - 1; got {seed!r}")

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
                start += _as_real(param).numel()

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
            real = _as_real(param)
            grad_N = _as_real(grad).reshape(-1).to(dtype)
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
        grad_N = torch.cat([self._directed_gradient(part) for part in parts])
        state = cat_states([self._flat_state(part, dtype) for part in parts], sizes)
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
    def _directed_gradient(part: _Part) -> Tensor:
        """The gradient to descend, with the L2 penalty's where that is asked for."""
        grad_N = -part.grad_N if part.group["maximize"] else part.grad_N
        decay = part.group["weight_decay"]
        if decay != 0 and not part.group["decoupled_weight_decay"]:
            grad_N = grad_N + decay * part.param.reshape(-1).to(grad_N.dtype)
        return grad_N

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
            # Registered last, so that hooks of users have had their turn.
            self._check_state_dict(saved)
            wrapped = {key: _Verbatim(value) for key, value in saved["state"].items()}
            return {**saved, "state": wrapped}

        handle = self.register_load_state_dict_pre_hook(check_and_wrap)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._last_update.clear()

    def _check_state_dict(self, saved: dict[str, Any]) -> None:
        what = f"this is not a state dict of this {type(self).__name__}"
        if not {"state", "param_groups"} <= set(saved):
            raise ConfigError(f"{what}: it lacks state or param_groups")
        groups = saved["param_groups"]
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            raise ConfigError(
                f"{what}: its groups have {sizes} parameters, the optimizer's "
                f"{[len(group['params']) for group in self.param_groups]}"
            )
        for group in groups:
            missing = sorted(set(self.defaults) - {"differentiable"} - set(group))
            if missing:
                raise ConfigError(f"{what}: its groups lack {', '.join(missing)}")
            if group["weights_id"] != self.weights.digest():
                raise ConfigError(
                    f"{what}: it was made with the weights {group['weights_id'][:12]}, the "
                    f"optimizer has {self.weights.digest()[:12]}; construct it with the same "
                    f"weights"
                )
            self._check_hyperparameters(group)
        keys = [key for group in groups for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            if saved["state"].get(key):
                self._check_param_state(what, saved["state"][key], _as_real(param))

    def _check_param_state(self, what: str, saved: dict[str, Tensor], param: Tensor) -> None:
        widths = self.weights.rule.state_widths()
        expected = {
            name: (*param.shape, *widths[field]) for name, field in self._state_names().items()
        } | {"step": ()}
        if set(saved) != set(expected):
            raise ConfigError(
                f"{what}: a parameter's state holds {sorted(saved)}, expected {sorted(expected)}"
            )
        for name, shape in expected.items():
            if tuple(saved[name].shape) != shape:
                raise ConfigError(
                    f"{what}: {name} has shape {tuple(saved[name].shape)} for a parameter of "
                    f"shape {tuple(param.shape)}, expected {shape}"
                )

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
