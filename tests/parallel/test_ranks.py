"""Meta-training and evaluation by several processes, as torchrun starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from hyperadam import load_weights, ranks
from hyperadam.errors import ConfigError, HyperAdamError
from hyperadam.evaluation import read_records
from hyperadam.metatrain import MetaTrainer
from hyperadam.presets import preset
from hyperadam.ranks import Ranks, fresh_store
from parallel import jobs

SMOKE = preset("smoke").with_overrides(["tasks_per_step=4", "inner_runs=16", "meta_lr=1e-2"])

PERTURBED = SMOKE.with_overrides(["perturbations=2", "perturbation_scale=0.1", "meta_lr=1e-3"])
either = pytest.mark.parametrize("config", [SMOKE, PERTURBED], ids=["backprop", "perturbations"])


def assert_same_run(state, expected, tolerance):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=tolerance, atol=tolerance, msg=name)


@either
def test_many_ranks_are_one_rank_of_all_tasks(pools, config):
    expected = jobs.meta_train(0, 1, config, 5)
    for size in (2, 4):
        states = pools[size].run(jobs.meta_train, config, 5)
        assert_same_run(states[0], expected, 2e-4)  # float32, and Adam's first steps
        for state in states:  # the same bits everywhere
            for name, value in state.items():
                if not name.startswith("inner."):
                    assert torch.equal(value, states[0][name]), name


@either
def test_any_number_of_ranks_goes_on(pools, config):
    two = pools[2].run(jobs.meta_train, config, 3)[0]
    expected = pools[2].run(jobs.meta_train, config, 5)[0]
    assert_same_run(pools[2].run(jobs.meta_train, config, 2, two)[0], expected, 0)
    assert_same_run(pools[4].run(jobs.meta_train, config, 2, two)[0], expected, 2e-4)
    assert_same_run(jobs.meta_train(0, 1, config, 2, two), expected, 2e-4)


def test_tasks_that_cannot_be_shared():
    three = Ranks()
    three.count = 3
    with pytest.raises(ConfigError, match="set tasks_per_step, 4, to a multiple of 3"):
        MetaTrainer(SMOKE, None, three)


def test_what_ranks_tell_each_other(pools):
    assert pools[2].run(jobs.decide) == [(0, (True, False), "no such run")] * 2


def test_what_an_earlier_start_has_left_is_not_seen():
    """torchrun's store outlives the processes: addresses of the dead are still in it."""
    store = HashStore()
    for value in ("dead", "living"):
        # Ticket 1 of the first start is still there in the second.
        with ThreadPoolExecutor(3) as pool:
            parts = list(pool.map(lambda rank: fresh_store(store, rank, 3), range(3)))
        assert not parts[1].check(["address"])
        parts[0].set("address", value)
        assert [part.get("address").decode() for part in parts] == [value] * 3


def test_processes_that_do_not_come(monkeypatch):
    monkeypatch.setattr(ranks, "ASSEMBLY", timedelta(seconds=0.1))
    with pytest.raises(HyperAdamError, match="only 1 of 2 processes have come"):
        fresh_store(HashStore(), 0, 2)


def torchrun(*arguments, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", str(restarts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "hyperadam", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process):
    with process:  # its pipes are closed in the end
        try:
            out, err = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # torchrun ends its processes
            raise
    assert process.returncode == 0, err
    return out, err


def meta_train(out, inner_runs):
    return [
        "meta-train", "--preset", "smoke", "--set", "tasks_per_step=2",
        "--set", f"inner_runs={inner_runs}", "--out", out, "--resume", "--checkpoint-seconds", 0,
    ]  # fmt: skip


def processes_of(rank, out):
    """Processes of this rank that work on the folder."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if str(out).encode() in words and f"RANK={rank}".encode() in variables:
            yield int(entry.name)


def test_a_rank_that_is_killed(tmp_path):
    """The elastic restart goes on from the last checkpoint, and ends with the same bits."""
    undisturbed = torchrun(*meta_train(tmp_path / "whole", 60))
    out, _ = finished(undisturbed)
    assert out.count("weights: ") == 1  # one of the two talks
    process = torchrun(*meta_train(tmp_path / "killed", 60), restarts=1)
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (victim,) = processes_of(1, tmp_path / "killed")
    os.kill(victim, signal.SIGKILL)
    _, err = finished(process)
    assert "resuming after meta-step" in err
    whole, killed = (
        load_weights(tmp_path / name / "weights.safetensors") for name in ("whole", "killed")
    )
    assert whole.digest() != load_weights("default").digest()
    for name, value in whole.theta.items():
        assert torch.equal(value, killed.theta[name]), name


def test_an_evaluation_by_two(tmp_path):
    words = [
        "evaluate", "--suite", "digits", "--tasks", "digits-mlp1-*", "--optimizers",
        "adam,variational-hyperadam", "--seeds", 2, "--steps", 3, "--lr", "default",
    ]  # fmt: skip
    out, _ = finished(torchrun(*words, "--out", tmp_path / "two"))
    assert out.count("16 runs made, 0 were in the folder") == 1
    assert not list((tmp_path / "two").glob("runs.rank*"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "hyperadam", *map(str, words), "--out", tmp_path / "one"],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    two, one = (
        {run.key: run.train_loss_post.tolist() for run in read_records(tmp_path / name)[0]}
        for name in ("two", "one")
    )
    assert two == one
    assert len(one) == 16
