"""Devices by name."""

from __future__ import annotations

import torch

from hyperadam.errors import ConfigError


def existing_device(name: str) -> torch.device:
    """The device of a name, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``, if it is there.

    Raises:
        ConfigError: it is not.
    """
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device {name!r} is not there: PyTorch sees {count} CUDA devices")
    return device


def is_device_name(name: str) -> bool:
    """Whether it is one of those forms."""
    kind, colon, index = name.partition(":")
    return name == "cpu" or (kind == "cuda" and (index.isdecimal() if colon else True))
