"""Every optimizer that can be evaluated, by name."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from hyperadam.errors import (
    ConfigError,
    WeightsError,
    missing_extra,
    unknown_name,
)
from hyperadam.optim import (
    AdamByLayer,
    DMoptimizer,
    HyperAdam,
    IsotropicNoise,
    LearnedOptimizer,
    RNNprop,
    VariationalHyperAdam,
)
from hyperadam.weights import RELEASED_DIGEST, HubAddress, bundled_weights, load_weights, pin
from hyperadam.weights.hub import PREFIX

Build = Callable[[ParamsT, float, int], torch.optim.Optimizer]
"""Makes an optimizer of parameters, with or without names, a learning rate, and a seed for what it
draws."""


@dataclasses.dataclass(frozen=True, eq=False)
class Baseline:
    """An optimizer that can be evaluated.

    Attributes:
        name: as on the command line; a weights file by its stem, or by the folder of
            the run that made it; weights of the hub without what is usual in their address.
        text: what :func:`make_baseline` makes the same of, later and elsewhere.
        default_lr: the library's default, or the one that comes with learned weights.
        build: makes it.
        weights: digest of a learned optimizer's weights; None for a hand-designed one.
    """

    name: str
    text: str
    default_lr: float
    build: Build
    weights: str | None = None

    @property
    def learned(self) -> bool:
        """Whether it was meta-trained; otherwise it was designed by hand."""
        return self.weights is not None


def _of_torch(kind: Callable[..., torch.optim.Optimizer], **settings: object) -> Build:
    return lambda params, lr, _: kind(params, lr=lr, **settings)


def _of_library(library: str, kind: str) -> Build:
    def build(params: ParamsT, lr: float, _: int) -> torch.optim.Optimizer:
        try:
            module = importlib.import_module(library)
        except ImportError:
            raise missing_extra(f"{kind} comes from the library {library}", "baselines") from None
        optimizer: torch.optim.Optimizer = getattr(module, kind)(params, lr=lr)
        return optimizer

    return build


HAND_DESIGNED: dict[str, Baseline] = {
    name: Baseline(name, name, default_lr, build)
    for name, default_lr, build in (
        ("sgd", 1e-3, _of_torch(torch.optim.SGD)),
        ("momentum", 1e-3, _of_torch(torch.optim.SGD, momentum=0.9)),
        ("adagrad", 1e-2, _of_torch(torch.optim.Adagrad)),
        ("adadelta", 1.0, _of_torch(torch.optim.Adadelta)),
        ("rmsprop", 1e-2, _of_torch(torch.optim.RMSprop)),
        ("adam", 1e-3, _of_torch(torch.optim.Adam)),
        ("amsgrad", 1e-3, _of_torch(torch.optim.Adam, amsgrad=True)),
        ("adamw", 1e-3, _of_torch(torch.optim.AdamW)),
        ("nadam", 2e-3, _of_torch(torch.optim.NAdam)),
        ("schedulefree-adamw", 2.5e-3, _of_library("schedulefree", "AdamWScheduleFree")),
        ("adabound", 1e-3, _of_library("pytorch_optimizer", "AdaBound")),
        ("adam-by-layer", 1e-3, _of_torch(AdamByLayer)),
    )
}
"""Hand-designed optimizers, with the defaults of their libraries. The last is a control: Adam with
the scales by layer that bundled weights have."""


@dataclasses.dataclass(frozen=True)
class Learned:
    """A learned optimizer by name.

    Attributes:
        kind: its class.
        weights: its own, bundled.
        draws_noise: whether it has a seed.
        about: in words, for reports.
        settings: of the class.
    """

    kind: type[LearnedOptimizer]
    weights: str
    draws_noise: bool
    about: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_DM = "the LSTM on the gradient of Andrychowicz et al. (NeurIPS 2016)"
_RNN = "the LSTM on Adam's and RMSprop's directions of Lv et al. (ICML 2017)"
_HYPER = "HyperAdam (Wang et al., AAAI 2019), which combines Adam-like candidates"
_VARIATIONAL = "Variational HyperAdam (Wang et al., TPAMI 2022)"
_MEAN = "the same rule, but each update is the mean of its distribution"
_UNCALIBRATED = "the same rule, its learning rate not lowered where the first gradients swing"
_ISOTROPIC = "the same mean, with noise of one variance for all coordinates"

LEARNED: dict[str, Learned] = {
    "dmoptimizer": Learned(DMoptimizer, "dmoptimizer", False, _DM),
    "rnnprop": Learned(RNNprop, "rnnprop", False, _RNN),
    "hyperadam": Learned(HyperAdam, "hyperadam", False, _HYPER),
    "variational-hyperadam": Learned(VariationalHyperAdam, "default", True, _VARIATIONAL),
    "variational-hyperadam-mean": Learned(
        VariationalHyperAdam, "default", True, _MEAN, {"sample": False}
    ),
    "variational-hyperadam-isotropic": Learned(IsotropicNoise, "default", True, _ISOTROPIC),
    "variational-hyperadam-uncalibrated": Learned(
        VariationalHyperAdam, "default", True, _UNCALIBRATED, {"calibrate": False}
    ),
}
"""Learned optimizers. The mean and the isotropic one are for the question what the predicted
variance is worth."""

RUN_WEIGHTS = "weights.safetensors"
"""What every meta-training run calls its weights."""

OPTIMIZER_NAMES = (*HAND_DESIGNED, *LEARNED)

COMPARED = tuple(name for name in OPTIMIZER_NAMES if not name.startswith("variational-hyperadam-"))
"""Those that are no variant of another; with Adam's control."""


def make_baseline(text: str) -> Baseline:
    """The optimizer of this name.

    Args:
        text: a name of :data:`OPTIMIZER_NAMES`; behind a learned one's, ``@`` and bundled weights
            by name, a weights file by its path, or ``hf://org/name`` with what else belongs to
            an address of the hub.

    Raises:
        ConfigError: no such optimizer, or weights behind a hand-designed one.
        WeightsError: the weights can't be used, or are of another rule.
        MissingDependencyError: weights of the hub without the extra ``hub``.
    """
    name, at, chosen = text.partition("@")
    if name in HAND_DESIGNED and not at:
        return HAND_DESIGNED[name]
    if name in HAND_DESIGNED:
        raise ConfigError(f"{name} takes no weights; got {text!r}")
    if name not in LEARNED:
        raise ConfigError(unknown_name("optimizer", name, OPTIMIZER_NAMES))
    learned = LEARNED[name]
    pinned = pin(chosen if at else learned.weights)
    weights = load_weights(pinned)
    if weights.rule.name != learned.kind.rule_name:
        raise WeightsError(f"{text}: these are weights of {weights.rule.name}")

    def build(params: ParamsT, lr: float, seed: int) -> torch.optim.Optimizer:
        make: Callable[..., torch.optim.Optimizer] = partial(
            learned.kind, weights=weights, **learned.settings
        )
        return make(params, lr, seed=seed) if learned.draws_noise else make(params, lr)

    shown = f"{name}@{_short(chosen)}" if at else name
    return Baseline(shown, f"{name}@{pinned}", weights.lr, build, weights.digest())


def describe_learned(name: str, digest: str) -> str:
    """What a learned optimizer is, in words, for reports.

    Args:
        name: of a :class:`Baseline`; what is not known is said to be so.
        digest: of its weights.
    """
    rule, _, weights = name.partition("@")
    if rule not in LEARNED:
        return "not known here"
    about = LEARNED[rule].about
    if digest == RELEASED_DIGEST:
        return f"{about}, with the weights that the authors released"
    bundled = weights or LEARNED[rule].weights
    if bundled in bundled_weights():
        found = load_weights(bundled)
        if found.digest() == digest:
            papers = re.match(r"paper\b", found.preset)
            cost = f", of {found.steps:,} inner steps of the papers' recipe" if papers else ""
            changes = _changes(found.rule.identity())
            return f"{about}{changes}, with the bundled weights {bundled}{cost}"
    if not weights:
        return f"{about}, with weights that were bundled before as {bundled}"
    return f"{about}, with weights from a file named {weights}"


def _changes(identity: Mapping[str, object]) -> str:
    """In which settings a rule departs from its paper's, in words."""
    names = [name for name in identity if name != "rule"]
    return f", changed in {', '.join(names)}" if names else ""


def _short(weights: str) -> str:
    """Weights in few words: bundled ones' name, a file's stem, a meta-training run's folder; of
    an address of the hub what is not usual.
    """
    if weights in bundled_weights():
        return weights
    if weights.startswith(PREFIX):
        return HubAddress.parse(weights).short()
    path = Path(weights)
    return path.resolve().parent.name if path.name == RUN_WEIGHTS else path.stem


def make_baselines(texts: Sequence[str]) -> list[Baseline]:
    """The optimizers of these names, each once.

    Raises:
        ConfigError: none, or two weights files that would have one name.
        HyperAdamError: see :func:`make_baseline`.
    """
    found: dict[str, Baseline] = {}
    for text in texts:
        baseline = make_baseline(text)
        twin = found.setdefault(baseline.name, baseline)
        if twin.weights != baseline.weights:
            raise ConfigError(f"two weights would both be called {baseline.name}: rename a file")
    if not found:
        raise ConfigError(f"name one or more optimizers: {', '.join(OPTIMIZER_NAMES)}")
    return list(found.values())
