"""Frozen dataclasses from and to plain values, with errors that a user can read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from hyperadam.errors import ConfigError, unknown_name

T = TypeVar("T")


def from_values(cls: type[T], values: Mapping[str, Any], *, what: str) -> T:
    """Build the dataclass ``cls`` from plain values.

    Args:
        cls: a frozen dataclass.
        values: field values by name; strings are read as numbers, booleans and so on where the
            field's type asks for it.
        what: names the values in errors.

    Raises:
        ConfigError: no settings by name, an unknown field, a wrong type or an impossible value.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what}: settings have names; got {str(values)[:80]!r}")
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"{what}: {unknown_name('setting', name, known)}")
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except UnicodeError as error:  # of half a surrogate pair, which an error would show
        raise ConfigError(f"{what}: a text is not Unicode: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # raised by the dataclass itself
            raise ConfigError(str(first["ctx"]["error"])) from None
        place = ".".join(map(str, first["loc"])) or "value"
        raise ConfigError(f"{what}: {place}: {first['msg']}") from None
