"""Errors that a user can cause; the command line prints them as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch


class HyperAdamError(Exception):
    """Base of every error that names a mistake in the input, not in the program."""


class ConfigError(HyperAdamError, ValueError):
    """A setting has an unknown name, a wrong type or an impossible value."""


class WeightsError(HyperAdamError, ValueError):
    """A weights file or name can't be used: unknown, damaged, or of another rule."""


class DataError(HyperAdamError, ValueError):
    """A data set is unknown, missing or not of the expected form."""


class RunError(HyperAdamError, RuntimeError):
    """A run's folder can't be used: it holds another run, or a damaged one."""


class OutOfMemoryError(HyperAdamError, torch.OutOfMemoryError):
    """An optimizer's state does not fit; the message names the bytes that it needs."""


class MissingDependencyError(HyperAdamError, ImportError):
    """An optional library is needed; the message says how to install it."""


MAX_LISTED = 12


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for a name that is not in a table: the near misses, or what the table has."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    parts = [f"unknown {kind} {name!r}"]
    if near:
        parts.append(f"did you mean {' or '.join(map(repr, near))}?")
    if len(names) <= MAX_LISTED or not near:
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        parts.append(f"known: {', '.join(names[:MAX_LISTED])}{more}")
    return ": ".join([parts[0], " ".join(parts[1:])])


def missing_extra(what: str, extra: str) -> MissingDependencyError:
    """Says what needs a library that is not installed, and which extra brings it."""
    return MissingDependencyError(f"{what}: pip install '.[{extra}]' in hyperadam's folder")
