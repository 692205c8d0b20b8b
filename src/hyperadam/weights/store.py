"""Weights files: theta and all that is needed to use it, in one safetensors file.

The file's metadata holds the rule's configuration, the learning rate and schedule that the weights
recommend and where they come from.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperadam import tensor_file
from hyperadam.config import from_values
from hyperadam.errors import ConfigError, WeightsError, unknown_name
from hyperadam.rule import RULES, Rule
from hyperadam.schedule import SCHEDULES
from hyperadam.weights import hub

FORMAT = "hyperadam-weights"
FORMAT_VERSION = 1
MAX_BYTES = 2**30
"""Of a weights file; the largest of the bundled ones has some 42,000."""

_NOTES = ("preset", "data", "date", "commit", "licence")


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Meta-trained theta with its rule.

    Attributes:
        rule: the update rule, with its whole configuration.
        theta: meta-parameters by name, float32 or float64, on the CPU.
        lr: the learning rate to be used with them; of a meta-training run, the one of its inner
            runs.
        schedule: how it should go over a run: of :data:`hyperadam.schedule.SCHEDULES`.
        preset: the meta-training preset, with the settings that were changed.
        data: what they were meta-trained on.
        steps: inner steps of meta-training.
        date: when, as YYYY-MM-DD.
        commit: of the program that made them.
        licence: of the numbers.

    Raises:
        WeightsError: theta does not fit the rule, a number is not finite, or a text can't be shown.
    """

    rule: Rule
    theta: dict[str, Tensor] = dataclasses.field(repr=False)
    lr: float
    schedule: str = "none"
    preset: str = "unknown"
    data: str = "unknown"
    steps: int = 0
    date: str = "unknown"
    commit: str = "unknown"
    licence: str = "unknown"

    def __post_init__(self) -> None:
        try:
            plain = {"lr": float(self.lr), "steps": int(self.steps)}
        except (TypeError, ValueError, OverflowError) as error:
            raise WeightsError(f"lr or steps is no number: {error}") from None
        notes = {name: str(getattr(self, name)) for name in _NOTES}
        for name, note in notes.items():
            if not all(map(str.isprintable, note.splitlines())):
                raise WeightsError(f"{name} is no printable text: {note[:80]!a}")
        theta = {name: value.detach().cpu().clone() for name, value in self.theta.items()}
        for name, value in {**plain, **notes, "theta": theta}.items():
            object.__setattr__(self, name, value)
        expected = self.rule.theta_shapes()
        if set(self.theta) != set(expected):
            missing = sorted(set(expected) - set(self.theta))
            extra = sorted(set(self.theta) - set(expected))
            raise WeightsError(
                f"these are not weights of {self.rule.name}: missing {missing}, unexpected {extra}"
            )
        for name, shape in expected.items():
            value = self.theta[name]
            if tuple(value.shape) != shape:
                raise WeightsError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
            if value.dtype not in (torch.float32, torch.float64):
                raise WeightsError(f"{name} is {value.dtype}, expected float32 or float64")
            if not bool(torch.isfinite(value).all()):
                raise WeightsError(f"{name} holds numbers that are not finite")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise WeightsError(f"lr must be a positive number; got {self.lr}")
        if self.schedule not in SCHEDULES:
            raise WeightsError(unknown_name("schedule", str(self.schedule)[:80], SCHEDULES))

    def digest(self) -> str:
        """SHA-256 of the rule and of every number of theta, in hexadecimal.

        Options at their defaults don't count, so that options to come change no digest.
        """
        return tensor_file.digest(self.theta, self.rule.identity())


def rule_from_dict(values: Mapping[str, Any]) -> Rule:
    """The rule of :meth:`hyperadam.rule.Rule.to_dict`.

    Raises:
        ConfigError: unknown rule or setting, wrong type, impossible value.
    """
    settings = dict(values)
    name = settings.pop("rule", None)
    if not isinstance(name, str) or name not in RULES:
        raise ConfigError(unknown_name("rule", str(name)[:80], RULES))
    return from_values(RULES[name], settings, what=f"rule {name}")


def save_weights(weights: Weights, path: str | Path) -> None:
    """Write a weights file, whole or not at all.

    Raises:
        WeightsError: ``path`` does not end in ``.safetensors``.
        OSError: the folder does not exist or can't be written.
    """
    path = Path(path)
    if path.suffix != hub.SUFFIX:
        raise WeightsError(f"a weights file's name ends in {hub.SUFFIX}; got {path}")
    notes = {
        "rule": json.dumps(weights.rule.to_dict(), sort_keys=True),
        "num_theta": str(weights.rule.num_theta()),
        "lr": repr(weights.lr),
        "schedule": weights.schedule,
        "steps": str(weights.steps),
        **{name: getattr(weights, name) for name in _NOTES},
    }
    tensor_file.write(path, weights.theta, notes, format_=FORMAT, version=FORMAT_VERSION)


def bundled_weights() -> dict[str, Path]:
    """The weights that come with the package: name to file."""
    folder = Path(str(resources.files("hyperadam.weights")))
    return {path.stem: path for path in sorted(folder.glob(f"*{hub.SUFFIX}"))}


def load_weights(name_or_path: str | Path) -> Weights:
    """Read bundled weights by name, a weights file by its path, or one of the Hugging Face Hub.

    Args:
        name_or_path: a name of ``hyperadam weights list``; or a path, which has a ``/`` in it
            or ends in ``.safetensors``; or ``hf://org/name[@revision][/file.safetensors]``, where
            a commit for the revision makes sure that the weights stay the same.

    Raises:
        WeightsError: unknown name, no such file, truncated or damaged, not a weights file, of a
            newer format, or numbers that don't fit the rule; not to be had from the hub.
        MissingDependencyError: weights of the hub without the extra ``hub``.
    """
    name = str(name_or_path)
    if name.startswith(hub.PREFIX):
        path = hub.fetch(name).path
    elif isinstance(name_or_path, Path) or "/" in name or name.endswith(hub.SUFFIX):
        path = Path(name_or_path)
    else:
        bundled = bundled_weights()
        if name not in bundled:
            there = f" (the file of that name is ./{name})" if Path(name).is_file() else ""
            raise WeightsError(unknown_name("weights", name, bundled) + there)
        path = bundled[name]
    if path.suffix == ".pkl":
        raise WeightsError(
            f"{path} is no weights file; one of the authors' becomes one by: "
            f"hyperadam weights import-official {path} {path.stem}.safetensors"
        )
    theta, notes = tensor_file.read(
        path, format_=FORMAT, version=FORMAT_VERSION, error=WeightsError, max_bytes=MAX_BYTES
    )
    try:
        return Weights(
            rule=rule_from_dict(json.loads(notes["rule"])),
            theta=theta,
            lr=float(notes["lr"]),
            schedule=notes.get("schedule", "none"),  # files from before weights had one
            steps=int(notes["steps"]),
            **{name: notes[name] for name in _NOTES},
        )
    except KeyError as error:
        raise WeightsError(f"{path}: its metadata lacks {error}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: {error}") from None
