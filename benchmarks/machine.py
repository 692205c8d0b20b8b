"""The machine in words, without names or paths."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path

import torch

import hyperadam
from hyperadam.source import source_version


def _first(path: str, pattern: str) -> str | None:
    """The first match of a pattern's group in a file of the system."""
    try:
        match = re.search(pattern, Path(path).read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return match[1] if match else None


def describe(device: torch.device) -> dict[str, str | int | float]:
    """What a figure depends on: processor, memory, versions, the source's commit, threads, date."""
    memory_kb = _first("/proc/meminfo", r"^MemTotal:\s+(\d+)")
    description: dict[str, str | int | float] = {
        "cpu": _first("/proc/cpuinfo", r"^model name\s*:\s*(.+)$") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(int(memory_kb or 0) * 1024 / 1e9, 1),
        "os": _first("/etc/os-release", r'^PRETTY_NAME="?([^"\n]+)') or platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hyperadam": hyperadam.__version__,
        "source": source_version(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if device.type == "cuda":
        description["gpu"] = torch.cuda.get_device_name(device)
    return description
