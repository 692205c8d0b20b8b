"""Which version of the program this is."""

from __future__ import annotations

import functools
import subprocess
from importlib.metadata import version
from pathlib import Path


@functools.cache
def source_version() -> str:
    """The commit of the source that runs, or the package's version where it is installed.

    Asked for once in a process: what is edited after it began does not run.
    """
    source = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)  # an installed copy is in no repository
        changed = "+changes" if git("status", "--porcelain", "--", ".") else ""
        return git("rev-parse", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return f"hyperadam {version('hyperadam')}"
