"""What is free is what the tightest limit leaves."""

from __future__ import annotations

import pytest
import torch

from hyperadam.optim import memory

CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system's files: 1,000 kB available, no control group."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    1000 kB\n")
    return write


def test_no_control_group(system):
    assert memory.free_memory(CPU) == 1_024_000


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/a/b", "cgroup/a", ("max", "current", "inactive_file")),
        (
            "4:cpu,memory:/a/b",
            "cgroup/memory/a",
            ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["v2", "v1"],
)
def test_the_limit_of_a_group_around(system, line, folder, names):
    limit, usage, cache = names
    system("proc/self/cgroup", f"1:cpu:/elsewhere\n{line}\n")
    system(f"{folder}/b/memory.{limit}", "max\n")
    system(f"{folder}/b/memory.{usage}", "1\n")
    assert memory.free_memory(CPU) == 1_024_000
    system(f"{folder}/memory.{limit}", "50000\n")
    system(f"{folder}/memory.{usage}", "20000\n")
    assert memory.free_memory(CPU) == 30_000
    system(f"{folder}/memory.stat", f"anon 3\n{cache} 5000\n")
    assert memory.free_memory(CPU) == 35_000
    system(f"{folder}/memory.{usage}", "90000\n")
    assert memory.free_memory(CPU) == 0


def test_a_container_sees_its_own_group_as_the_root(system):
    system("proc/self/cgroup", "0::/of/the/host\n")
    system("cgroup/memory.max", "700000")
    system("cgroup/memory.current", "100000")
    assert memory.free_memory(CPU) == 600_000


def test_other_devices_do_not_tell():
    assert memory.free_memory(torch.device("meta")) is None
