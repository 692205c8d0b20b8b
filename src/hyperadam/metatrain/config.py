"""A meta-training run's whole configuration, as one frozen value."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hyperadam.config import from_values
from hyperadam.device import is_device_name
from hyperadam.errors import ConfigError, unknown_name
from hyperadam.kernels import BACKENDS
from hyperadam.rule import MAX_SEED, SIZES, VARIANCE, Rule, VariationalHyperAdamRule
from hyperadam.rule.coherence import STEPS as CALIBRATION_STEPS
from hyperadam.schedule import SCHEDULES, lr_factor
from hyperadam.tasks import derive_seed, make_generator, match_tasks
from hyperadam.weights import load_weights, rule_from_dict

MAX_CONVEX_DIM = 1_000_000
META_SCHEDULES = ("constant", "cosine")
META_OBJECTIVES = ("loss", "log-loss")


def _draw(seed: int, *purpose: str | int) -> float:
    """A number from 0 to 1, a function of the seed and the purpose."""
    generator = make_generator(seed, *purpose)
    return float(torch.rand((), dtype=torch.float64, generator=generator))


@dataclasses.dataclass(frozen=True)
class MetaTrainConfig:
    """The recipe of a meta-training run. The defaults are the paper's.

    Attributes:
        task: the inner task, by name; or several, by names and patterns with commas between, of
            which the inner runs of a meta-step draw one. Patterns are written out as the names of
            today, so that tasks of later days don't change what a configuration says.
        random_scaling: the inner network's coordinates get scales ``exp(U(-s, s))``; 0: none.
        min_random_scaling: inner runs draw s, evenly from here to ``random_scaling``; null: all
            have the same.
        convex_dim: size of the convex term added to the inner loss; 0: none.
        convex_scaling: the spread of the convex term's own scales.
        rule: the update rule to meta-train.
        init: weights to begin with, as :func:`hyperadam.load_weights` takes them, of the same rule
            but for what scales its steps or their variance (``fan_in_base``, ``row_mean_base``,
            ``vector_scale``, ``attention_scale``, ``calibrated``, ``variance_base``,
            ``variance_floor``, ``kl_prior_scale``); null: random ones, as in the papers. As a
            ``--set`` it takes their ``lr``, channels, moments and variance too
            (:meth:`with_overrides`).
        meta_parameters: what of theta is trained, by names and patterns with commas between; the
            rest stays what ``init`` has.
        unroll_length: inner steps that are backpropagated through; at least 20 where the rule is
            calibrated.
        trajectory_length: inner steps of an inner run; a multiple of ``unroll_length``.
        min_trajectory_length: the inner runs of a meta-step draw their length, log-uniformly from
            here to ``trajectory_length``; likewise a multiple. Null: all have the same.
        inner_runs: how many inner runs.
        tasks_per_step: B, how many inner runs are unrolled side by side, for one meta-gradient;
            ``inner_runs`` is a multiple of it.
        interleaved_runs: K, how many inner runs (or groups of ``tasks_per_step``) are in flight, of
            which the meta-steps take turns, so that those that follow each other are of other tasks
            and at other places of their runs; 1, as in the papers: one run after the other.
        lr: inner learning rate, which the weights will recommend.
        schedule: of the inner learning rate, and what the weights will recommend: ``"none"``;
            ``"cooldown"``, it falls to 0 over the second half of an inner run; ``"cosine"``, it
            does over the whole; ``"inverse-sqrt"``, it falls with the root of the steps beyond
            100; or several, with a comma between, of which the inner runs of a meta-step draw one,
            and the weights recommend the first.
        meta_objective: of an unroll: ``"loss"``, the mean inner loss; or ``"log-loss"``, its
            logarithm, so that all tasks count alike, whatever the size of their losses, and the end
            of an inner run as much as its beginning.
        next_batch_weight: w, from 0 to 1. The objective is taken of the loss after an update on the
            batch that it was made from, as in the papers, with a weight of 1 - w, and on the batch
            that the next will be made from, which the network has not seen yet, with a weight of w.
        perturbations: P. Where it is above 0, each inner run has P pairs of copies under perturbed
            thetas, from whose losses the meta-gradient is estimated
            (:mod:`hyperadam.metatrain.evolution`); 0, as in the papers: backpropagation through
            the unroll.
        perturbation_scale: the standard deviation of the perturbations.
        kl_weight: λ, the weight of the KL term in the meta-loss.
        meta_lr: learning rate of the meta-optimizer, Adam.
        meta_schedule: ``"constant"``, or ``"cosine"``: it falls to 0 over the whole run.
        meta_weight_decay: its weight decay, added to the meta-gradient.
        meta_grad_clip: clips the meta-gradient's Euclidean norm; None: no clipping.
        seed: of everything random.
        backend: what computes the rule: ``"auto"``, ``"cpu"`` or ``"reference"``; they differ in
            rounding and speed.
        device: where the inner networks are trained and the rule is computed: ``"cpu"``,
            ``"cuda"`` or ``"cuda:1"``. What is random is the same on all; rounding is not.
    """

    task: str = "mnist-mlp1-sigmoid"
    random_scaling: float = 3.0
    min_random_scaling: float | None = None
    convex_dim: int = 20
    convex_scaling: float = 1.0
    rule: Rule = dataclasses.field(default_factory=VariationalHyperAdamRule)
    init: str | None = None
    meta_parameters: str = "*"
    unroll_length: int = 20
    trajectory_length: int = 100
    min_trajectory_length: int | None = None
    inner_runs: int = 10_000
    tasks_per_step: int = 1
    interleaved_runs: int = 1
    lr: float = 1e-3
    schedule: str = "none"
    meta_objective: str = "loss"
    next_batch_weight: float = 0.0
    perturbations: int = 0
    perturbation_scale: float = 0.01
    kl_weight: float = 1e-4
    meta_lr: float = 1e-4
    meta_schedule: str = "constant"
    meta_weight_decay: float = 5e-4
    meta_grad_clip: float | None = None
    seed: int = 0
    backend: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        names = [entry.name for entry in match_tasks(self.task.split(","))]
        object.__setattr__(self, "task", ",".join(names))
        counts = ("trajectory_length", "inner_runs", "tasks_per_step", "interleaved_runs")
        for name in ("unroll_length", *counts):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require(
            "trajectory_length",
            self.trajectory_length % self.unroll_length == 0,
            f"a multiple of unroll_length, {self.unroll_length}",
        )
        shortest = self.min_trajectory_length
        if shortest is not None:
            good = 1 <= shortest <= self.trajectory_length and shortest % self.unroll_length == 0
            self._require(
                "min_trajectory_length",
                good,
                f"a multiple of unroll_length, {self.unroll_length}, up to trajectory_length",
            )
        parts = self.rule.theta_shapes()
        for pattern in self.meta_parameters.split(","):
            if not fnmatch.filter(parts, pattern):
                raise ConfigError(unknown_name("meta-parameter", pattern, parts))
        if self.rule.calibrated:
            self._require(
                "unroll_length",
                self.unroll_length >= CALIBRATION_STEPS,
                f"at least {CALIBRATION_STEPS} with a rule that is calibrated",
            )
        least = self.min_random_scaling
        good = least is None or 0 <= least <= self.random_scaling
        self._require("min_random_scaling", good, "from 0 to random_scaling, or null")
        for name, values, known in (
            ("meta_schedule", [self.meta_schedule], META_SCHEDULES),
            ("meta_objective", [self.meta_objective], META_OBJECTIVES),
            ("schedule", self.schedules, SCHEDULES),
        ):
            for value in values:
                if value not in known:
                    raise ConfigError(unknown_name(name, value, known))
        self._require(
            "inner_runs",
            self.inner_runs % self.tasks_per_step == 0,
            f"a multiple of tasks_per_step, {self.tasks_per_step}",
        )
        if self.backend not in BACKENDS:
            raise ConfigError(unknown_name("backend", self.backend, BACKENDS))
        self._require("device", is_device_name(self.device), "cpu, cuda or cuda:N")
        self._require("perturbations", self.perturbations >= 0, "at least 0")
        for name in ("lr", "meta_lr", "perturbation_scale"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value > 0, "a positive number")
        for name in ("random_scaling", "convex_scaling", "kl_weight", "meta_weight_decay"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "a number at or above 0")
        good_weight = 0 <= self.next_batch_weight <= 1
        self._require("next_batch_weight", good_weight, "from 0 to 1")
        good_dim = 0 <= self.convex_dim <= MAX_CONVEX_DIM
        self._require("convex_dim", good_dim, f"at least 0 and at most {MAX_CONVEX_DIM}")
        clip = self.meta_grad_clip
        good_clip = clip is None or (math.isfinite(clip) and clip > 0)
        self._require("meta_grad_clip", good_clip, "a positive number or null")
        self._require("seed", 0 <= self.seed <= MAX_SEED, "from 0 to 2^63 - 1")

    def _require(self, name: str, condition: bool, what: str) -> None:
        if not condition:
            raise ConfigError(f"{name} must be {what}; got {getattr(self, name)}")

    @property
    def task_names(self) -> list[str]:
        """The inner tasks, in the order that the catalogue had when they were written out."""
        return self.task.split(",")

    def task_of(self, run: int) -> str:
        """The inner task of the runs that a meta-step begins with this one."""
        names = self.task_names
        return names[derive_seed(self.seed, "task of run", run) % len(names)]

    @property
    def trained_parameters(self) -> list[str]:
        """The names of the meta-parameters that are trained."""
        patterns = self.meta_parameters.split(",")
        names = self.rule.theta_shapes()
        return [name for name in names if any(fnmatch.fnmatch(name, own) for own in patterns)]

    @property
    def schedules(self) -> list[str]:
        """The inner learning rate's."""
        return self.schedule.split(",")

    def lr_at(self, run: int, inner_step: int) -> float:
        """The inner learning rate of the runs that a meta-step begins with this one.

        Args:
            run: the first of them.
            inner_step: from 0.
        """
        names = self.schedules
        name = names[derive_seed(self.seed, "schedule of run", run) % len(names)]
        length = self.unrolls_of(run) * self.unroll_length
        return self.lr * lr_factor(inner_step, schedule=name, total_steps=length)

    def unrolls_of(self, run: int) -> int:
        """How many unrolls they have."""
        longest = self.trajectory_length // self.unroll_length
        if self.min_trajectory_length is None:
            return longest
        shortest = self.min_trajectory_length // self.unroll_length
        length = shortest * math.pow(longest / shortest, _draw(self.seed, "length of run", run))
        return round(length)

    def scaling_of(self, run_seed: int) -> float:
        """``random_scaling`` of one inner run."""
        least, most = self.min_random_scaling, self.random_scaling
        if least is None:
            return most
        return least + (most - least) * _draw(run_seed, "random scaling")

    @functools.cached_property
    def total_meta_steps(self) -> int:
        return sum(map(self.unrolls_of, range(0, self.inner_runs, self.tasks_per_step)))

    def meta_lr_at(self, meta_step: int) -> float:
        """The meta-optimizer's learning rate at a meta-step, which count from 0 here."""
        name = "none" if self.meta_schedule == "constant" else "cosine"
        return self.meta_lr * lr_factor(meta_step, schedule=name, total_steps=self.total_meta_steps)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return dataclasses.asdict(self) | {"rule": self.rule.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MetaTrainConfig:
        """The configuration of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown setting, a wrong type or an impossible value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration is a table of settings; got {str(values)[:80]!r}")
        rule = values.get("rule", {"rule": VariationalHyperAdamRule.name})
        if not isinstance(rule, Mapping):
            raise ConfigError(f"rule must be a table of settings; got {rule!r}")
        return from_values(cls, {**values, "rule": rule_from_dict(rule)}, what="configuration")

    def with_overrides(self, overrides: Sequence[str]) -> MetaTrainConfig:
        """The configuration changed by ``key=value`` texts, in their order but for ``init``.

        Keys are field names, ``rule.NAME`` for the rule's own; ``rule=NAME`` takes another rule
        with its default settings. Values are read as JSON, or else as text. ``init=WEIGHTS`` comes
        first and takes the weights' ``lr`` and, of their rule, channels, moments, ``calibrated``
        and, where this configuration has no ``variance_base`` of its own, what says how large the
        variance is (:data:`~hyperadam.rule.VARIANCE`); the others may then change that.

        Raises:
            ConfigError: no ``=`` in a text, an unknown key or an impossible value.
            WeightsError: the weights to begin with can't be read.
        """
        values = self.to_dict()
        for override in sorted(overrides, key=lambda text: not text.startswith("init=")):
            key, equals, text = override.partition("=")
            if not equals:
                raise ConfigError(f"a setting is given as key=value; got {override!r}")
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):  # no JSON, or an absurd one
                value = text
            if key == "rule":
                values["rule"] = {"rule": value}
            elif key.startswith("rule."):
                values["rule"] = {**values["rule"], key.removeprefix("rule."): value}
            else:
                values[key] = value
            if key == "init" and isinstance(value, str):
                weights = load_weights(value)
                values["lr"] = weights.lr
                if weights.rule.name == values["rule"]["rule"]:
                    begun = weights.rule.to_dict()
                    own = values["rule"].get("variance_base") is not None
                    taken = (*SIZES, "calibrated", *(() if own else VARIANCE))
                    found = {name: begun[name] for name in taken if name in begun}
                    values["rule"] = {**values["rule"], **found}
        return MetaTrainConfig.from_dict(values)
