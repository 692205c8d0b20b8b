"""Full and read-only disks, as a process of its own meets them (``faulty_disk.py``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def meet(means, folder, before=()):
    path = os.pathsep.join([str(TESTS), *sys.path])
    return subprocess.run(
        [*before, sys.executable, "-m", "reliability.faulty_disk", means, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def on_tmpfs(tmp_path_factory):
    try:
        trial = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path_factory.mktemp("trial"))]
        allowed = subprocess.run(trial, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this system lets no test mount a file system")
    return meet("tmpfs", tmp_path_factory.mktemp("tmpfs"), NAMESPACE)


@pytest.fixture(scope="module")
def within_a_limit(tmp_path_factory):
    return meet("limit", tmp_path_factory.mktemp("limit"))


def assert_good(result, scenario):
    assert f"{scenario}: as it should be" in result.stdout.splitlines(), result.stderr


@pytest.mark.parametrize("scenario", ["weights", "meta_train", "results", "evaluation"])
def test_a_full_disk(on_tmpfs, scenario):
    """A tmpfs of 16 MB, filled up while the program is at work: ENOSPC."""
    assert_good(on_tmpfs, scenario)


@pytest.mark.parametrize("scenario", ["weights", "meta_train", "results"])
def test_a_limit_on_files(within_a_limit, scenario):
    """RLIMIT_FSIZE, which every system has: a write stops halfway with EFBIG."""
    assert_good(within_a_limit, scenario)


def test_a_read_only_disk(on_tmpfs):
    """The tmpfs mounted anew without writing, which binds root too."""
    assert_good(on_tmpfs, "read_only")
    told = [line for line in on_tmpfs.stderr.splitlines() if line.startswith("hyperadam: ")]
    assert len(told) == 4
    assert all("Read-only file system" in line for line in told)
