"""kill -9 at the places where it could do harm; what is left is gone on from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hyperadam import load_weights
from hyperadam.metatrain import run_meta_training
from metatrain.test_run import assert_same_run
from reliability.killed import CONFIG, LABEL, PLACES, UNDISTURBED

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with what each killed run has left."""
    folder = tmp_path_factory.mktemp("killed")
    result = subprocess.run(
        [sys.executable, "-m", "reliability.killed", str(folder)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        },
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{place}: {int(signal.SIGKILL)}" for place in PLACES]
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_killed_while_it_writes(killed, place):
    """Files are whole or not there; the run resumed ends with the bits of one undisturbed."""
    out, undisturbed = killed / place, killed / UNDISTURBED
    if (out / "weights.safetensors").exists():
        load_weights(out / "weights.safetensors")
    run_meta_training(out, CONFIG, LABEL, resume=True)
    assert_same_run(out, undisturbed)
    assert (out / "meta_loss.png").read_bytes() == (undisturbed / "meta_loss.png").read_bytes()
    left = {path.name for path in out.iterdir()} - {".lock"}
    assert left == {path.name for path in undisturbed.iterdir()} - {".lock"}
