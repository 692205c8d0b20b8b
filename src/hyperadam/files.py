"""Folders that are made, and files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hyperadam.errors import RunError


def make_folder(path: Path) -> None:
    """Make a folder where it is missing, and those above it.

    Raises:
        RunError: there is a file in its place, or the system does not allow it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RunError(f"{path} can't be made a folder: there is a file in its place") from None
    except OSError as error:
        raise RunError(f"{path} can't be made a folder: {error.strerror}") from None


def atomic_write(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, force it to disk, then rename it into place.

    Whatever stops the program, ``path`` holds either its old content or all of the new.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
