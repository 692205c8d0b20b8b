"""How much memory is free, so that what does not fit is refused before it is taken.

A failing allocation alone does not tell: Linux lends more than there is, and ends the process once
the memory is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")

# Files of limit and usage, and the line of memory.stat with the cache that would be given back.
CGROUP_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated now; None where the system does not tell.

    On the CPU within the limits of the process's control groups, without swap; on a GPU with what
    PyTorch holds there unused.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    known = [free for free in (_free_of_system(), *_free_of_groups()) if free is not None]
    return min(known, default=None)


def _free_of_system() -> int | None:
    # What the page cache would give back counts as free, which sysconf does not know.
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _read(PROC / "meminfo"), re.MULTILINE)
    if available is not None:
        return 1024 * int(available[1])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _free_of_groups() -> Iterator[int]:
    """Below each limit on the process's control groups and those around them."""
    for line in _read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, CGROUPS / "memory") if controllers else (2, CGROUPS)
        group = root / path.lstrip("/")
        limit_file, usage_file, cache_line = CGROUP_FILES[version]
        # In a container the path may be one of the host's: then only the root is there.
        for folder in (group, *group.parents):
            limit, usage = (_read(folder / name).strip() for name in (limit_file, usage_file))
            if limit.isdigit() and usage.isdigit():  # no limit is "max", or a number beyond all
                cache = re.search(rf"^{cache_line} (\d+)", _read(folder / "memory.stat"), re.M)
                used = int(usage) - (int(cache[1]) if cache else 0)
                yield max(0, int(limit) - used)
            if folder == root:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
