"""A learned update rule as a ``torch.optim.Optimizer``: groups, state, noise, resume.

The rule sees one problem of N coordinates: the elements of every parameter that has a gradient,
in the order of groups and parameters, as in the paper. This file gathers their gradients into the
arena, steps the rule there, in place, and moves the parameters.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from hyperadam.errors import ConfigError, WeightsError, unknown_name
from hyperadam.kernels import BACKENDS, TILE, Lanes, Part, TileLayout, is_finite, tiled_rule
from hyperadam.optim.arena import SCALARS, Arena, Entry, Unmade, keys, scalars_of
from hyperadam.optim.names import attention_parameters, named
from hyperadam.optim.sharding import (
    GroupSum,
    count_everywhere,
    first_coordinate,
    is_dtensor,
    local,
    own_share,
    real_shape,
    spread_like,
    sum_over_shards,
)
from hyperadam.rule import (
    MAX_SEED,
    AdamCandidatesRule,
    Explanation,
    Reduce,
    RuleState,
    Theta,
    VariationalHyperAdamRule,
    calibrated_lr_scale,
    cat_states,
    coherence_sums,
    in_rows_with_gradient,
    mean_coherence,
)
from hyperadam.rule.coherence import STEPS, counts
from hyperadam.weights import Weights, load_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Nonfinite = Literal["skip", "raise"]
StateDtype = Literal["float32", "bfloat16"]

_COHERENCE_TILES = 4096
"""How many tiles' moments are taken out of the state at a time, for their coherence."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Active:
    """A parameter that takes part in a step.

    Attributes:
        key: the parameter.
        group: its parameter group.
        start: index of its first local coordinate among those of all parameters.
    """

    key: Tensor
    group: dict[str, Any]
    start: int


class _Verbatim:
    """One parameter's saved state on its way through ``Optimizer.load_state_dict``, which casts
    every tensor that it can see to the parameter's dtype."""

    def __init__(self, saved: dict[str, Tensor]) -> None:
        self.saved = saved


def _is_bad(value: object) -> bool:
    """Whether a learning rate or weight decay is no finite number at or above 0."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            return True
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        return True
    number = float(value)
    return not math.isfinite(number) or number < 0


def _copy_beside(value: Tensor, param: Tensor) -> Tensor:
    """A copy on the parameter's device; where it was, if the parameter has no memory yet."""
    return value.to(value.device if param.is_meta else param.device, copy=True)


def _level_of_caller() -> int:
    """The ``stacklevel`` of whoever called PyTorch or this package."""
    frame, level = sys._getframe(1), 1
    own = (__name__.partition(".")[0], "torch")
    while frame.f_globals.get("__name__", "").partition(".")[0] in own and frame.f_back:
        frame, level = frame.f_back, level + 1
    return level


class LearnedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that apply a meta-trained rule.

    Args:
        own_defaults: settings of the class's groups that others don't have, with their defaults.

    The other arguments: see :class:`VariationalHyperAdam`.
    """

    rule_name: ClassVar[str]
    """Name of the rule whose weights the class takes."""

    _step_supports_amp_scaling = True
    """``GradScaler`` leaves it to :meth:`step` to divide by the scale and to skip overflows."""

    _unexpected_skips = 0
    """Skipped steps that no ``GradScaler`` deals with, as far as they were seen."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        *,
        weights: str | Path | Weights,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        backend: str = "auto",
        state_dtype: StateDtype = "float32",
        nonfinite: Nonfinite = "skip",
        maximize: bool = False,
        shard_of: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | None = None,
        process_group: ProcessGroup | None = None,
        calibrate: bool | None = None,
        own_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(weights, Weights):
            weights = load_weights(weights)
        self._check_weights(weights)
        if nonfinite not in get_args(Nonfinite):
            raise ConfigError(unknown_name("nonfinite", str(nonfinite), get_args(Nonfinite)))
        if state_dtype not in get_args(StateDtype):
            raise ConfigError(unknown_name("state_dtype", str(state_dtype), get_args(StateDtype)))
        if backend not in BACKENDS:
            raise ConfigError(unknown_name("backend", str(backend), BACKENDS))
        if not (calibrate is None or isinstance(calibrate, bool)):
            raise ConfigError(f"calibrate must be True, False or None; got {calibrate!r}")
        self.weights = weights
        self.nonfinite = nonfinite
        self.backend = backend
        self.state_dtype = state_dtype
        self.calibrate = weights.rule.calibrated if calibrate is None else calibrate
        self._calibrate_attention = calibrate is True
        self._asked = itertools.count(1)
        self._skipped = torch.zeros((), dtype=torch.int64)  # on the parameters' device
        self._arena: Arena | None = None
        self._first: dict[Tensor, int] = {}
        everywhere = None if shard_of is None else named(shard_of)
        self._everywhere = None if everywhere is None else [param for _, param in everywhere]
        self._names_everywhere = everywhere or []
        self._process_group = process_group
        if self._everywhere is None and process_group is not None:
            raise ConfigError("process_group goes with shard_of: the parameters of all processes")
        defaults = {
            "lr": weights.lr if lr is None else lr,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "weights_id": weights.digest(),
            **(own_defaults or {}),
        }
        super().__init__(params, defaults)
        # Memory is taken here, so that what does not fit fails before the first step.
        self._prepare(self._trained([]))

    def _check_weights(self, weights: Weights) -> None:
        if weights.rule.name != self.rule_name:
            raise WeightsError(
                f"{type(self).__name__} takes weights of the rule {self.rule_name}; these are of "
                f"{weights.rule.name}"
            )

    @property
    def skipped_steps(self) -> int:
        """Steps left out because of a gradient that was not finite; reading it waits for a GPU."""
        return int(self._skipped)

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
            misplaced = sorted(
                {"weights", "backend", "nonfinite", "state_dtype", "calibrate"} & set(group)
            )
            if misplaced:
                raise ConfigError(f"{misplaced[0]} is a setting of the optimizer, not of a group")
            # Plain numbers: NumPy's would not pass torch.load(weights_only=True).
            if "seed" in group:
                group["seed"] = int(group["seed"])
            for name in ("lr", "weight_decay"):
                if not isinstance(group[name], Tensor):
                    group[name] = float(group[name])
            param_group = group
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if getattr(param, "_fsdp_flattened", False):  # as FSDP1 marks them
                self.param_groups.pop()
                raise ConfigError(
                    "the parameters of FullyShardedDataParallel (FSDP1) lie in pieces that don't "
                    "tell their place: use fully_shard (FSDP2)"
                )
            if not (param.is_floating_point() or param.is_complex()):
                self.param_groups.pop()
                raise ConfigError(
                    f"parameters must be of a floating or complex dtype; got {param.dtype}"
                )
        self._announce()

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            if _is_bad(group[name]):
                form = " (a Tensor of shape ())" if isinstance(group[name], Tensor) else ""
                hint = "; weights are given by name: weights=..." if name == "lr" else ""
                raise ConfigError(
                    f"{name} must be a number{form}, at or above 0; got {group[name]!r}"
                    + (hint if isinstance(group[name], str) else "")
                )
        for name in ("sample", "seed"):
            if name in group and name not in self.defaults:
                raise ConfigError(f"{type(self).__name__} draws no noise: it has no {name!r}")
        seed = group.get("seed", 0)
        integral = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
        if not integral or not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"seed must be an integer from 0 to 2^63 - 1; got {seed!r}")
        for name in ("decoupled_weight_decay", "sample", "maximize"):
            if not isinstance(group.get(name, False), bool):
                raise ConfigError(f"{name} must be True or False; got {group[name]!r}")

    # -- step -----------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @_disable_dynamo  # torch.compile runs it as it is, between its graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step, over every parameter whose ``.grad`` is not None.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a sparse gradient, parameters on several devices or on "meta", or, with
                ``nonfinite="raise"``, a gradient that is not finite; nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = self._active()
        if active or self._is_spread():  # where others may have something to move
            self._apply(active)
        return loss

    def _is_spread(self) -> bool:
        """Whether the parameters are spread over processes."""
        return self._everywhere is not None or any(map(is_dtensor, self._trained([])))

    def _numbered_params(self) -> Iterator[tuple[Tensor, dict[str, Any], int]]:
        """Each parameter with its group and its first local coordinate's index."""
        pairs = [(param, group) for group in self.param_groups for param in group["params"]]
        everywhere = self._everywhere
        starts: dict[Tensor, int] = {}
        end = 0
        for param in [param for param, _ in pairs] if everywhere is None else everywhere:
            starts[param] = end
            end += count_everywhere(param)
        for param, group in pairs:
            if param not in starts:
                raise ConfigError("a parameter of this optimizer is not among those of shard_of")
            if param not in self._first:
                self._first[param] = first_coordinate(param)
            yield param, group, starts[param] + self._first[param]

    def _active(self) -> list[_Active]:
        active = [
            _Active(param, group, start)
            for param, group, start in self._numbered_params()
            if param.grad is not None
        ]
        for each in active:
            grad: Any = each.key.grad
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients; got {grad.layout}"
                )
            spread = grad.placements if is_dtensor(grad) else None
            if spread != getattr(each.key, "placements", None):
                raise RuntimeError(
                    f"a gradient is spread over processes as {spread}, its parameter as "
                    f"{getattr(each.key, 'placements', None)}"
                )
        return active

    # -- arena ----------------------------------------------------------------------------------

    def _prepare(self, params: list[Tensor]) -> None:
        """Make an arena for these parameters if they have memory, on one device."""
        devices = {param.device for param in [*params, *(self._everywhere or ())]}
        if len(devices) == 1 and torch.device("meta") not in devices:
            self._allocate(params)
        else:
            self._announce()

    @property
    def _scalars(self) -> tuple[str, ...]:
        """Those of :data:`~hyperadam.optim.arena.SCALARS` that the state has."""
        return scalars_of(self.weights.rule, calibrate=self.calibrate)

    def _announce(self) -> None:
        """Give each parameter without state an entry that says what it will be, or
        torch.distributed.checkpoint would make a step to find out."""
        names = [*self._scalars, *keys(TileLayout.of(self.weights.rule)).values()]
        for param in (param for group in self.param_groups for param in group["params"]):
            if param.requires_grad and not self.state.get(param):
                self.state[param] = Unmade(dict.fromkeys(names, torch.empty(0)))

    def _allocate(self, params: list[Tensor]) -> None:
        """Make an arena for these parameters, with the state that they have."""
        self._drop_replaced()
        device = self._only_device([*params, *(self._everywhere or ())])
        dtype = self._compute_dtype(self._everywhere or params)
        self._reduce = self._reduction(params)
        state_dtype = torch.bfloat16 if self.state_dtype == "bfloat16" else dtype
        if state_dtype == torch.bfloat16 and dtype != torch.float32:
            raise ConfigError("state_dtype='bfloat16' does not go with parameters of float64")
        rule = self.weights.rule
        theta = self._theta(device, dtype)
        tiled = tiled_rule(rule, theta, backend=self.backend, state_dtype=state_dtype)
        old = self._arena
        if old is not None and not bool(old.steps_P.any()):
            # Nothing in it is needed: its memory is free for the new one.
            old = self._arena = None
            for param in [key for key, entry in self.state.items() if isinstance(entry, Entry)]:
                del self.state[param]
        arena = Arena(params, device, rule, dtype, state_dtype, calibrate=self.calibrate)
        if arena.peak_S is not None and old is not None and old.peak_S is not None:
            arena.peak_S.copy_(old.peak_S)
        for param, number in arena.index.items():
            entry = self.state.get(param)
            if entry:
                arena.load(number, self._fields(param, entry))
            # Also before the first step, or torch.distributed.checkpoint would make one.
            self.state[param] = arena.entry(number)
        self._arena, self._tiled_rule = arena, tiled
        self._skipped = self._skipped.to(device)
        self._parts_key: tuple[Any, ...] = ()
        self._stepped: set[Tensor] = set()

    def _drop_replaced(self) -> bool:
        """Drop the state of parameters that are in no group any more; whether there was any."""
        present = {param for group in self.param_groups for param in group["params"]}
        replaced = [param for param in self.state if param not in present]
        for param in replaced:
            del self.state[param]
        self._first = {param: n for param, n in self._first.items() if param in present}
        return bool(replaced)

    def _reduction(self, params: Iterable[Tensor]) -> Reduce | None:
        """How to sum over all processes; None where each has all parameters."""
        if self._everywhere is None:
            return sum_over_shards(params)
        return GroupSum(self._process_group)

    def _only_device(self, params: Iterable[Tensor]) -> torch.device:
        devices = {param.device for param in params}
        if len(devices) > 1:
            raise RuntimeError(
                f"{type(self).__name__} needs all parameters on one device, since its column "
                f"norms run over all of them; got {sorted(map(str, devices))}"
            )
        (device,) = devices
        if device.type == "meta":
            raise RuntimeError(
                "parameters on the meta device have no values to step; give them memory first"
            )
        return device

    def _theta(self, device: torch.device, dtype: torch.dtype) -> Theta:
        theta = self.weights.theta
        return {name: value.to(device=device, dtype=dtype) for name, value in theta.items()}

    @staticmethod
    def _compute_dtype(params: Iterable[Tensor]) -> torch.dtype:
        """float64 where a parameter is of double precision, else float32."""
        double = (torch.float64, torch.complex128)
        return torch.float64 if any(p.dtype in double for p in params) else torch.float32

    def _arena_for(self, active: list[_Active]) -> Arena:
        """The arena, made anew where a parameter is new in it, has moved or changed its dtype."""
        arena = self._arena
        if arena is not None and all(each.key in arena.index for each in active):
            same_device = all(each.key.device == arena.steps_P.device for each in active)
            dtype = self._compute_dtype(self._everywhere or arena.index)
            if same_device and dtype == arena.lanes.grad.dtype:
                return arena
        arena = None  # or it would outlive what _allocate gives up
        self._allocate(self._trained(active))
        assert self._arena is not None
        return self._arena

    def _trained(self, active: list[_Active]) -> list[Tensor]:
        """The parameters that an arena is for."""
        wanted = {each.key for each in active}
        return [
            param
            for param, _, _ in self._numbered_params()
            if param in wanted or param.requires_grad or self.state.get(param)
        ]

    def _parts(self, arena: Arena, active: list[_Active]) -> tuple[Part, ...]:
        """What takes a step, for the kernels; made anew when something about it changes."""
        key = tuple(
            (arena.index[each.key], each.start, *self._noise_settings(each.group))
            for each in active
        )
        if key != self._parts_key:
            self._active_parts = tuple(
                dataclasses.replace(
                    arena.parts[number], noise_start=start, seed=seed, sample=sample
                )
                for number, start, seed, sample in key
            )
            numbers = torch.tensor([number for number, *_ in key], device=arena.steps_P.device)
            self._active_numbers = numbers
            self._parts_key = key
            self._calibrating = self.calibrate
        return self._active_parts

    def _noise_settings(self, group: dict[str, Any]) -> tuple[int, bool]:
        """A group's seed, of the noise and of stochastic rounding, and whether it is sampled."""
        return group.get("seed", 0), group.get("sample", False)

    # -- the parts of a step --------------------------------------------------------------------

    def _apply(self, active: list[_Active]) -> None:
        arena = self._arena_for(active)
        for each in active:
            self._take_up(arena, each.key)
        if not active:
            self._take_part(arena)
            return
        parts = self._parts(arena, active)
        directions = [arena.view(arena.lanes.grad, arena.index[each.key]) for each in active]
        self._gather(active, directions)
        counted = self._counted(directions)
        steps_P = arena.steps_P[self._active_numbers] + 1
        with torch.autocast(steps_P.device.type, enabled=False):  # a user's may be around step()
            finite = self._tiled_rule.step(
                arena.state, parts, steps_P, arena.lanes, self._reduce, arena.peak_S
            )
        if self._stopped_by(finite, active):
            return
        on_cpu = finite.device.type == "cpu"
        self._redirect(arena.lanes, parts, steps_P)
        if not on_cpu:  # without waiting for the device: where it is not finite, a direction of 0
            self._skipped += ~finite
            arena.lanes.grad.masked_fill_(~finite, 0)
        arena.steps_P.index_add_(0, self._active_numbers, finite.to(torch.int64).expand(len(parts)))
        projections = attention_parameters(self, self._names_everywhere)
        if self.calibrate:
            self._add_coherence(arena, parts, finite, counted)
            if self._calibrate_attention or not projections:
                self._scale_by_coherence(arena, directions)
        self._move(active, directions, finite, projections)
        self._stepped.update(each.key for each in active)

    def _take_up(self, arena: Arena, param: Tensor) -> None:
        """Have the arena agree with a parameter's entry, where that was changed from outside."""
        entry = self.state.get(param)
        if isinstance(entry, Entry):
            return
        number = arena.index[param]
        self._calibrating = self.calibrate
        if entry:  # as ZeroRedundancyOptimizer loads it
            arena.load(number, entry)
        else:  # dropped
            arena.reset(number)
        self.state[param] = arena.entry(number)

    def _take_part(self, arena: Arena) -> None:
        """The sums of a step in which this process has nothing to move, and others may have."""
        nothing = (Part(0, 0),)
        steps_P = torch.ones(1, dtype=torch.int64, device=arena.steps_P.device)
        finite = self._tiled_rule.step(
            arena.state, nothing, steps_P, arena.lanes, self._reduce, arena.peak_S
        )
        if self._stopped_by(finite, []):
            return
        self._redirect(arena.lanes, nothing, steps_P)
        if self.calibrate and self._reduce is not None:
            self._reduce(torch.zeros(2, dtype=torch.float64, device=steps_P.device))
        if finite.device.type != "cpu":
            self._skipped += ~finite

    def _stopped_by(self, finite: Tensor, active: list[_Active]) -> bool:
        """Whether the step is not to be taken, as far as that is known without a GPU's answer."""
        on_cpu = finite.device.type == "cpu"
        if not on_cpu and self.nonfinite == "skip":
            return False
        if bool(finite):
            return False
        found_inf = getattr(self, "found_inf", None)
        expected = found_inf is not None and bool(found_inf)  # GradScaler deals with it
        if self.nonfinite == "raise" and not expected:
            self._raise_nonfinite(active)
        if on_cpu:
            self._skip(warn=not expected)
        return on_cpu

    @property
    def _moment_decays(self) -> tuple[float, ...]:
        rule = self.weights.rule
        assert isinstance(rule, VariationalHyperAdamRule)
        return rule.moment_decays

    def _counted(self, grads: list[Tensor]) -> list[Tensor]:
        """Which coordinates are part of this step's coherence, which its directions overwrite."""
        return [in_rows_with_gradient(grad) for grad in grads] if self._calibrating else []

    def _add_coherence(
        self, arena: Arena, parts: Sequence[Part], finite: Tensor, counted: list[Tensor]
    ) -> None:
        """Add this step's coherence to those of the first steps before it."""
        if self._calibrating or self._reduce is not None:  # where others may still be at it
            steps_P = arena.steps_P[self._active_numbers]
            found = self._coherence(arena, parts, steps_P, counted)
            found_P = torch.where(counts(steps_P) & finite, found, 0)
            arena.scalars["coherence"].index_add_(0, self._active_numbers, found_P)

    def _scale_by_coherence(self, arena: Arena, directions: list[Tensor]) -> None:
        """Scale the directions by what the coherence of the first steps tells."""
        steps_P = arena.steps_P[self._active_numbers]
        total_P = arena.scalars["coherence"][self._active_numbers]
        scale_P = calibrated_lr_scale(total_P, steps_P, self._moment_decays)
        torch._foreach_mul_(directions, list(scale_P.to(directions[0].dtype).unbind()))

    def _coherence(
        self, arena: Arena, parts: Sequence[Part], steps_P: Tensor, counted: list[Tensor]
    ) -> Tensor:
        """This step's coherence, over all parameters that are in their first steps."""
        sums = torch.zeros(2, dtype=torch.float64, device=steps_P.device)
        if self._calibrating:
            for part, step, does_count, counted_part in zip(
                parts, steps_P, counts(steps_P), counted, strict=True
            ):
                pieces = arena.state.tiles_TRx[part.tiles].split(_COHERENCE_TILES)
                counted_pieces = counted_part.flatten().split(_COHERENCE_TILES * TILE)
                for tiles_TRx, counted_N in zip(pieces, counted_pieces, strict=True):
                    first = arena.layout.field("exp_avg_NK", tiles_TRx, len(counted_N))
                    second = arena.layout.field("exp_avg_sq_NK", tiles_TRx, len(counted_N))
                    own = coherence_sums(first, second, step, arena.decay_K, counted_N)
                    sums += torch.where(does_count, own, 0)
            # A GPU is seldom waited for, and not at all while a graph of it is captured.
            on_cpu = steps_P.device.type == "cpu"
            capturing = steps_P.is_cuda and torch.cuda.is_current_stream_capturing()
            if on_cpu or (next(self._asked) % STEPS == 0 and not capturing):
                self._calibrating = not bool((steps_P >= STEPS).all())
        if self._reduce is not None:
            sums = self._reduce(sums)
        return mean_coherence(sums, self._moment_decays)

    def _redirect(self, lanes: Lanes, parts: Sequence[Part], steps_P: Tensor) -> None:
        """Where a subclass can change the rule's directions in place before they are applied."""

    def _gather(self, active: list[_Active], lanes: list[Tensor]) -> None:
        """The gradients to descend, with the L2 penalty's where that is asked for.

        Those that a ``GradScaler`` has scaled are divided by ``grad_scale``; where it has found
        an infinity in any of them (``found_inf``), they count as not finite, without a look at it
        that would wait for a GPU.
        """
        torch._foreach_copy_(lanes, [local(each.key.grad) for each in active])
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:
            torch._foreach_mul_(lanes, scale.double().reciprocal().to(lanes[0]))
        if found_inf is not None:
            torch._foreach_mul_(lanes, torch.where(found_inf.to(lanes[0]) > 0, math.nan, 1.0))
        for each, lane in zip(active, lanes, strict=True):
            if each.group["maximize"]:
                lane.neg_()
            decay = each.group["weight_decay"]
            if decay != 0 and not each.group["decoupled_weight_decay"]:
                lane.add_(local(each.key) * decay)

    def _move(
        self,
        active: list[_Active],
        directions: list[Tensor],
        finite: Tensor,
        projections: Container[Tensor],
    ) -> None:
        """``params = params - lr d``, after decoupled weight decay, in the step's dtype; lr is the
        group's, scaled by what the parameter is if the rule says so, as are d's row means."""
        rule = self.weights.rule
        in_place: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for each, direction in zip(active, directions, strict=True):
            lr, decay = each.group["lr"], each.group["weight_decay"]
            param = local(each.key)
            value = param.to(direction.dtype)
            if decay != 0 and each.group["decoupled_weight_decay"]:
                value = value * (1 - lr * decay * finite)
            rule.scale_row_means_(direction, each.key.shape)
            lr = lr * rule.lr_scale(each.key.shape, attention=each.key in projections)
            if value is param and not isinstance(lr, Tensor):
                for tensors, tensor in zip(
                    in_place.setdefault(lr, ([], [])), (param, direction), strict=True
                ):
                    tensors.append(tensor)
            else:
                param.copy_(value - lr * direction)
        for lr, (params, moves) in in_place.items():
            torch._foreach_sub_(params, moves, alpha=lr)

    def _raise_nonfinite(self, active: list[_Active]) -> None:
        active_params = [each.key for each in active]
        bad = [
            each.key
            for each in active
            if each.key.grad is not None
            and not bool(is_finite(local(each.key.grad).to(self._compute_dtype(active_params))))
        ]
        first = f"of shape {tuple(bad[0].shape)} " if bad else ""
        where = f"{len(bad)} parameters in all" if bad else "in another process"
        raise RuntimeError(
            f"the gradient of a parameter {first}holds NaN or infinity, or a number too large to "
            f"be squared ({where})"
        )

    def _skip(self, *, warn: bool) -> None:
        self._skipped += 1
        if not warn:
            return
        self._unexpected_skips += 1
        count = self._unexpected_skips
        if count in (10**digits for digits in range(len(str(count)))):
            so_far = "" if count == 1 else f" ({count} have been by now)"
            warnings.warn(
                "a gradient holds NaN or infinity, or a number too large to be squared: this step "
                f"is skipped{so_far}, parameters and state stay as they are; optimizer."
                "skipped_steps counts, and the 10th, 100th, ... are told again",
                RuntimeWarning,
                stacklevel=_level_of_caller(),
            )

    # -- looking inside -------------------------------------------------------------------------

    @property
    def explains(self) -> bool:
        """Whether :meth:`explain` has something to say: whether the rule has candidates."""
        return isinstance(self.weights.rule, AdamCandidatesRule)

    @torch.no_grad()
    def explain(self) -> dict[Tensor, Explanation]:
        """What is inside the step that :meth:`step` would make of the present gradients.

        Nothing is changed. The rule's own code computes it, so it agrees with a kernel's step up
        to rounding. Gradients that are not finite give numbers that mean nothing.

        Returns:
            For each parameter that has a gradient, the rule's explanation, whose tensors have the
            parameter's shape (a complex one's viewed as real) in place of N.

        Raises:
            ValueError: the rule has no candidate directions.
            RuntimeError: a sparse gradient, or parameters on several devices.

        Where parameters are spread over processes, all of them have to call it, and each sees its
        own coordinates.
        """
        rule = self.weights.rule
        if not isinstance(rule, AdamCandidatesRule):
            raise ConfigError(f"{rule.name} has no candidate directions to explain")
        active = self._active()
        if not active and not self._is_spread():
            return {}
        trained = self._trained(active)
        everywhere = self._everywhere or trained
        device, dtype = self._only_device(everywhere), self._compute_dtype(everywhere)
        if not active:  # the sums, for others that have something to explain
            state = rule.init_state(0, dtype=dtype, device=device)
            nothing = torch.empty(0, dtype=dtype, device=device)
            rule.explain(self._theta(device, dtype), state, nothing, self._reduction(trained))
            return {}
        params = [local(each.key) for each in active]
        lanes = [torch.empty(param.shape, dtype=dtype, device=device) for param in params]
        self._gather(active, lanes)
        grad_N = torch.cat([lane.flatten() for lane in lanes])
        states = [self._rule_state(each.key, dtype) for each in active]
        sizes = [param.numel() for param in params]
        state = cat_states(states, sizes)
        with torch.autocast(device.type, enabled=False):
            whole = rule.explain(
                self._theta(device, dtype), state, grad_N, self._reduction(trained)
            )
        pieces: list[dict[str, Tensor]] = [{} for _ in params]
        for name, values in vars(whole).items():
            if values is not None:
                for piece, part, param in zip(pieces, values.split(sizes), params, strict=True):
                    piece[name] = part.view((*param.shape, *part.shape[1:]))
        return {each.key: Explanation(**piece) for each, piece in zip(active, pieces, strict=True)}

    def _rule_state(self, param: Tensor, dtype: torch.dtype) -> RuleState:
        """A parameter's state in the rule's own form, a copy."""
        layout = TileLayout.of(self.weights.rule)
        count = local(param).numel()
        state = self.weights.rule.init_state(count, dtype=dtype, device=param.device)
        entry = self.state.get(param)
        if not entry:
            return state
        fields = self._fields(param, entry)
        columns = {
            field: own_share(fields[key], param).reshape(count, *layout.widths[field]).to(dtype)
            for field, key in keys(layout).items()
        }
        if "peak" in fields:
            columns["peak_1"] = fields["peak"].to(param.device).reshape(1)
        return dataclasses.replace(state, step=fields["step"].to(param.device), **columns)

    # -- state ----------------------------------------------------------------------------------

    def _fields(self, param: Tensor, entry: dict[str, Tensor]) -> dict[str, Tensor]:
        """A parameter's state in the form of a state dict, from its entry in ``self.state``."""
        if not isinstance(entry, Entry):  # loaded and no step since, or still to be made
            return dict(entry) if entry else {}
        assert self._arena is not None
        return self._arena.fields(self._arena.index[param])

    def _named_state(self) -> defaultdict[Tensor, Any]:
        """``self.state`` in the form of a state dict."""
        found = {param: self._fields(param, entry) for param, entry in self.state.items()}
        return defaultdict(dict, found)

    def state_dict(self) -> dict[str, Any]:
        """The state as ``torch.optim`` has it: for each parameter the number of its ``step`` and
        one tensor of shape (*param.shape, ...) for each field, with memory of their own."""
        replaced = self._drop_replaced()  # as Accelerate replaces parameters by their shards
        trained = self._trained([])
        if not trained:
            self._arena = None
        elif replaced or not all(self.state.get(param) for param in trained):
            self._prepare(trained)  # they may have been given memory
        in_arena, named = dict(self.state), self._named_state()
        # In its place: Lightning's wrapper, on which this may be called, would keep another dict.
        self.state.update(named)
        try:
            return super().state_dict()
        finally:
            self.state.update(in_arena)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state: the run goes on bit for bit as if it had never stopped.

        The state keeps its own dtype, also beside parameters of half precision. The optimizer's
        present state is given up before the saved one is copied.

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
            require("weights_id" in group, "it is another optimizer's")
            found = str(group["weights_id"])
            require(
                found == own_id,
                f"it was made with the weights {found[:12]}, the optimizer has {own_id[:12]}; "
                f"construct it with the same weights",
            )
            self._check_hyperparameters({**self.defaults, **group})
            names = group.get("param_names", group["params"])
            require(
                isinstance(names, list) and len(names) == len(group["params"]),
                "a group's param_names are no list of a name for each parameter",
            )
        keys = [key for group in groups for key in group["params"]]
        require(set(states) <= set(keys), "it has state of parameters that are in no group")
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            if key in states:
                self._check_param_state(states[key], real_shape(param), require)

    def _check_param_state(
        self, saved: object, shape: tuple[int, ...], require: Callable[[bool, str], None]
    ) -> None:
        """Refuse what is not one parameter's state; an empty one is of no step yet."""
        tensors = isinstance(saved, dict) and all(isinstance(t, Tensor) for t in saved.values())
        require(tensors, "a parameter's state is no dict of tensors")
        assert isinstance(saved, dict)
        if not saved:
            return
        layout = TileLayout.of(self.weights.rule)
        shapes = {key: (*shape, *layout.widths[field]) for field, key in keys(layout).items()}
        shapes |= dict.fromkeys(self._scalars, ())
        hint = " (made with another calibrate)" if set(saved) ^ set(shapes) == {"coherence"} else ""
        require(
            set(saved) == set(shapes),
            f"a parameter's state holds {sorted(map(str, saved))}, expected {sorted(shapes)}{hint}",
        )
        for name, expected in shapes.items():
            require(
                tuple(saved[name].shape) == expected,
                f"{name} has shape {tuple(saved[name].shape)}, expected {expected} for a "
                f"parameter of shape {shape}",
            )
            if name == "step":
                require(
                    saved[name].dtype == torch.int64 and int(saved[name]) >= 0,
                    "step is no count",
                )
            else:
                require(saved[name].is_floating_point(), f"{name} is {saved[name].dtype}")
            if name == "peak":
                require(0 <= float(saved[name]) < math.inf, "peak is no mean square")

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "weights",
            "nonfinite",
            "backend",
            "state_dtype",
            "calibrate",
            "_calibrate_attention",
            "_skipped",
            "_everywhere",
            "_names_everywhere",
            "_process_group",
        )
        state = super().__getstate__() | {name: getattr(self, name) for name in kept}
        return state | {"state": self._named_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._arena = None  # made from the state at the next step
        self._asked = itertools.count(1)
        self._first = {}
        self.state = defaultdict(dict)  # it holds the arena's memory
        for param, saved in state["state"].items():
            if isinstance(saved, _Verbatim):
                state["state"][param] = {
                    name: value.detach().clone()
                    if name in SCALARS
                    else spread_like(_copy_beside(own_share(value.detach(), param), param), param)
                    for name, value in saved.saved.items()
                }
        super().__setstate__(state)
        self._announce()
