"""Runs in folders: real processes, real signals, real files."""

from __future__ import annotations

import csv
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tensorboardX.proto import event_pb2

from hyperadam import load_weights
from hyperadam.errors import ConfigError, RunError
from hyperadam.metatrain import RunLabel, run_meta_training
from hyperadam.presets import preset
from hyperadam.source import source_version
from hyperadam.tensor_file import read

SMOKE = preset("smoke")
LABEL = RunLabel("smoke", "Apache-2.0", source_version())


def checkpoint(folder):
    path = folder / "checkpoint.safetensors"
    return read(path, format_="hyperadam-checkpoint", version=2, error=RunError)[0]


def assert_same_run(one, two):
    a, b = checkpoint(one), checkpoint(two)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert load_weights(one / "weights.safetensors").digest() == (
        load_weights(two / "weights.safetensors").digest()
    )
    assert (one / "history.csv").read_bytes() == (two / "history.csv").read_bytes()


def event_steps(folder):
    """Steps of the meta-loss in the event files, after purging, as a viewer shows them."""
    steps = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at + 12 <= len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
            at += size + 16
            if event.HasField("session_log"):
                steps = {step: v for step, v in steps.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "meta_train/meta_loss":
                    steps[event.step] = value.simple_value
    return steps


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    trainer = run_meta_training(out, SMOKE, LABEL)
    assert trainer.finished
    return out


def test_what_a_run_leaves(finished):
    weights = load_weights(finished / "weights.safetensors")
    assert weights.rule == SMOKE.rule
    assert weights.lr == SMOKE.lr
    assert weights.schedule == "none"
    assert (weights.preset, weights.licence, weights.data) == (
        "smoke", "Apache-2.0", "digits-mlp1-sigmoid",
    )  # fmt: skip
    assert weights.steps == 100
    assert weights.commit == source_version()
    with (finished / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert [int(row["index"]) for row in rows] == list(range(1, 21))
    assert (finished / "meta_loss.png").read_bytes().startswith(b"\x89PNG")
    steps = event_steps(finished)
    assert sorted(steps) == list(range(1, 21))
    assert steps[7] == pytest.approx(float(rows[6]["meta_loss"]), rel=1e-5)
    assert json.loads((finished / "config.json").read_text())["config"]["seed"] == 0


def test_many_tasks_a_step(tmp_path):
    """Stopped in the middle of a group of runs and resumed, as undisturbed."""
    config = SMOKE.with_overrides(["tasks_per_step=2", "inner_runs=4"])
    run_meta_training(tmp_path / "whole", config, LABEL)
    halted = tmp_path / "halted"

    def stop(record):
        if record.index == 3:
            os.kill(os.getpid(), signal.SIGINT)

    assert not run_meta_training(halted, config, LABEL, progress=stop).finished
    assert run_meta_training(halted, None, None, resume=True).finished
    assert_same_run(halted, tmp_path / "whole")
    assert load_weights(halted / "weights.safetensors").steps == 40
    with (halted / "history.csv").open() as file:
        assert [int(row["run"]) for row in csv.DictReader(file)] == [0, 0, 2, 2]


def test_another_run_is_refused(finished):
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    with pytest.raises(RunError, match="holds a run; --resume"):
        run_meta_training(finished, SMOKE, LABEL)
    other = SMOKE.with_overrides(["seed=5", "rule.channels=3"])
    with pytest.raises(RunError, match=r"rule.channels: 4, not 3; seed: 0, not 5"):
        run_meta_training(finished, other, LABEL, resume=True)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["weights.safetensors", "history.csv", "meta_loss.png"])
def test_a_folder_with_anothers_files_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(RunError, match="holds a run"):
        run_meta_training(tmp_path, SMOKE, LABEL)
    assert (tmp_path / name).read_bytes() == b"precious"


def test_another_licence_is_refused(finished):
    other = RunLabel("smoke", "MIT", "abc")
    with pytest.raises(RunError, match=r"with the licence Apache-2\.0"):
        run_meta_training(finished, SMOKE, other, resume=True)


def test_resuming_a_finished_run_changes_nothing(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    trainer = run_meta_training(finished, None, None, resume=True)
    assert trainer.finished
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_kill_before_the_export_is_made_good(tmp_path, finished):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "checkpoint.safetensors", "history.csv"):
        (out / name).write_bytes((finished / name).read_bytes())
    (out / ".weights.safetensors.h4lf").write_bytes(b"half")
    run_meta_training(out, None, None, resume=True)
    assert_same_run(out, finished)
    assert not list(out.glob(".weights*"))


def test_resuming_nothing(tmp_path, finished):
    with pytest.raises(ConfigError, match="holds no run to resume"):
        run_meta_training(tmp_path / "a", None, None, resume=True)
    run_meta_training(tmp_path / "b", SMOKE, LABEL, resume=True)  # starts
    assert_same_run(tmp_path / "b", finished)


def test_damaged_folders(tmp_path):
    out = tmp_path / "run"
    short = SMOKE.with_overrides(["inner_runs=1"])
    run_meta_training(out, short, LABEL)
    path = out / "checkpoint.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(RunError, match="not a readable safetensors file"):
        run_meta_training(out, short, LABEL, resume=True)
    flipped = bytearray(content)
    flipped[-3] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(RunError, match="is damaged"):
        run_meta_training(out, short, LABEL, resume=True)
    path.write_bytes(content)
    (out / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json can't be read"):
        run_meta_training(out, short, LABEL, resume=True)


def test_a_checkpoint_of_another_run(tmp_path, finished):
    out = tmp_path / "run"
    run_meta_training(out, SMOKE.with_overrides(["seed=1", "inner_runs=1"]), LABEL)
    (out / "checkpoint.safetensors").write_bytes((finished / "checkpoint.safetensors").read_bytes())
    with pytest.raises(RunError, match="another configuration"):
        run_meta_training(out, None, None, resume=True)


def test_one_process_at_a_time(tmp_path):
    out = tmp_path / "run"
    refused = []

    def second(_):
        if not refused:
            with pytest.raises(RunError, match="another process is at work"):
                run_meta_training(out, SMOKE, LABEL, resume=True)
            refused.append(True)

    run_meta_training(out, SMOKE.with_overrides(["inner_runs=1"]), LABEL, progress=second)
    assert refused


def test_in_a_thread(tmp_path):
    """Where signals can't be handled, a run still runs."""
    result = []
    short = SMOKE.with_overrides(["inner_runs=1"])
    thread = threading.Thread(
        target=lambda: result.append(run_meta_training(tmp_path / "run", short, LABEL).finished)
    )
    thread.start()
    thread.join()
    assert result == [True]


LONG = "inner_runs=40"


def start(out, *arguments):
    command = [sys.executable, "-m", "hyperadam", "meta-train", "--out", str(out), *arguments]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


FRESH = ("--preset", "smoke", "--set", LONG, "--checkpoint-seconds", "0.05", "--resume")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    process = start(out, *FRESH)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert f"weights: {out / 'weights.safetensors'}" in output
    return out


def test_killed_at_random_points(tmp_path, undisturbed):
    """kill -9, three times; the first time perhaps before anything is saved."""
    out = tmp_path / "run"
    chance = random.Random()
    for attempt in range(3):
        process = start(out, *FRESH)
        if attempt:
            wait_for(out / "checkpoint.safetensors", process)
        delay = chance.uniform(0, 1.5)
        print(f"kill after {delay:.3f} s")
        time.sleep(delay)
        process.kill()
        process.communicate()
    process = start(out, *FRESH)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert_same_run(out, undisturbed)
    assert sorted(event_steps(out)) == list(range(1, 81))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path, undisturbed, number):
    """Ctrl-C saves and says how to go on; what it says works."""
    out = tmp_path / "a run"
    process = start(out, *FRESH)
    wait_for(out / "checkpoint.safetensors", process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    command = shlex.split(output.splitlines()[-1])
    assert command == ["hyperadam", "meta-train", "--resume", "--out", str(out)]
    assert not (out / "weights.safetensors").exists()
    process = start(out, "--resume")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "resuming after meta-step" in errors
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize(("schedule", "expected"), [("cosine", "cosine"), ("none,cosine", "none")])
def test_the_first_schedule_is_recommended(tmp_path, schedule, expected):
    config = SMOKE.with_overrides([f"schedule={schedule}", "inner_runs=1"])
    run_meta_training(tmp_path / "run", config, LABEL)
    assert load_weights(tmp_path / "run" / "weights.safetensors").schedule == expected
