"""Safetensors files that say what they are and notice damage.

The metadata of such a file names its format and version and holds a SHA-256 of all the rest, so
that truncated, foreign or altered files are refused. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hyperadam.errors import HyperAdamError
from hyperadam.files import atomic_write


def digest(tensors: Mapping[str, Tensor], notes: Mapping[str, object]) -> str:
    """SHA-256, in hexadecimal, of tensors (on the CPU) and notes, whatever their order."""
    sha = hashlib.sha256(json.dumps(dict(notes), sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, str],
    *,
    format_: str,
    version: int,
) -> None:
    """Write tensors and notes, whole or not at all.

    Args:
        path: of the file; its folder exists.
        tensors: by name, on the CPU.
        notes: the metadata.
        format_, version: what :func:`read` will insist on.
    """
    notes = {**notes, "format": format_, "format_version": str(version)}
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    metadata = {**notes, "sha256": digest(contiguous, notes)}
    atomic_write(path, safetensors.torch.save(contiguous, metadata))


def read(
    path: Path,
    *,
    format_: str,
    version: int,
    error: type[HyperAdamError],
    max_bytes: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`write` wrote.

    Args:
        path: of the file.
        format_, version: that it must have.
        error: class of what is raised.
        max_bytes: a larger file is refused without reading it; None: any size.

    Returns:
        Tensors by name and notes.

    Raises:
        error: no such file, too large, truncated or damaged, or of another format or version.
    """
    if not path.is_file():
        raise error(f"no file at {path}")
    size = path.stat().st_size
    if max_bytes is not None and size > max_bytes:
        raise error(f"{path} has {size:,} bytes; such files have at most {max_bytes:,}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as reason:
        raise error(f"{path} is not a readable safetensors file: {reason}") from None
    if metadata.get("format") != format_:
        raise error(f"{path} is not a {format_} file: its metadata does not say so")
    if metadata.get("format_version") != str(version):
        raise error(
            f"{path} has format version {metadata.get('format_version')}; this program reads "
            f"version {version}"
        )
    recorded = metadata.pop("sha256", None)
    if recorded != digest(tensors, metadata):
        raise error(f"{path} is damaged: its content does not match the digest in its metadata")
    return tensors, metadata
