from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_weights
from evaluation.making import make_record
from hyperadam import save_weights
from hyperadam.baselines import make_baseline, make_baselines
from hyperadam.errors import ConfigError, DataError, MissingDependencyError, RunError
from hyperadam.evaluation import (
    SUITES,
    Cell,
    EvaluationConfig,
    best_lr,
    evaluate,
    find_suite,
    grid_lr,
    read_records,
    train,
)
from hyperadam.evaluation.records import FIRST_TUNING_SEED, RUNS
from hyperadam.evaluation.suites import PAPER_TASKS, tasks_of
from hyperadam.tasks import TASKS, make_task

module = sys.modules["hyperadam.evaluation.evaluate"]

TASK = "digits-mlp1-sigmoid"


def config(**changes):
    values = {"suite": "digits", "tasks": (TASK,), "steps": 12, "seeds": 2, "optimizers": ("adam",)}
    return EvaluationConfig(**(values | changes))


# -- suites --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_suites_have_tasks_of_the_catalogue(suite):
    assert suite.tasks
    assert set(suite.tasks) <= set(TASKS)
    assert find_suite(suite.name) is suite


def test_the_papers_tasks_are_all_there():
    assert len(PAPER_TASKS) == 26
    assert [SUITES[f"paper-{steps}"].steps for steps in (100, 2000, 10000)] == [100, 2000, 10000]
    assert sum("imagenet" in name for name in SUITES["resnet"].tasks) == 5
    assert {"pydoc-transformer", "mnist-vit", "mnist-autoencoder"} <= set(SUITES["modern"].tasks)


def test_offline_suites_need_no_data():
    for name in ("digits", "ablations"):
        assert {TASKS[task].data for task in SUITES[name].tasks} <= {None, "digits"}


def test_a_part_of_a_suite():
    suite = find_suite("paper-100")
    assert tasks_of(suite, ()) == suite.tasks
    assert tasks_of(suite, ("sine-*", "mnist-mlp2-*")) == (
        "mnist-mlp2-sigmoid", "sine-lstm1", "sine-lstm2", "sine-lstm1-smallnoise",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="unknown task of the suite paper-100"):
        tasks_of(suite, ("digits-*",))
    with pytest.raises(ConfigError, match="did you mean"):
        tasks_of(suite, ("sine-lstm",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "digit"}, "unknown suite 'digit': did you mean 'digits'"),
        ({"seeds": 0}, "seeds must be from 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"tuning_seeds": 0}, "tuning_seeds must be at least 1"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"lr": "best"}, "lr must be default, grid or a number"),
        ({"lr": -1.0}, "lr must be a positive number"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_bad_jobs_and_names(tmp_path):
    with pytest.raises(ConfigError, match="jobs must be at least 1"):
        evaluate(config(), tmp_path, jobs=0)
    with pytest.raises(ConfigError, match="did you mean 'adam'"):
        evaluate(config(optimizers=("adma",)), tmp_path)
    with pytest.raises(ConfigError, match="device must be cpu, cuda or cuda:N; got 'gpu'"):
        evaluate(config(), tmp_path, device="gpu")
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match=f"'{missing}' is not there"):
        evaluate(config(), tmp_path, device=missing)
    assert not (tmp_path / RUNS).exists()
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(RunError, match=f"{place} can't be made a folder: there is a file"):
            evaluate(config(), tmp_path / place)


# -- which runs are wanted -------------------------------------------------------------------------


def cell(name="adam", **changes):
    return Cell(config(**changes), TASK, make_baseline(name))


def finished(keys, loss):
    return {
        key: make_record(losses=[2 * loss(key.lr)] * key.steps, **dataclasses.asdict(key))
        for key in keys
    }


def test_a_grid_is_extended_and_then_reported():
    one, done, rounds = cell(tuning_seeds=1), {}, []
    while wanted := one.wanted(done):
        rounds.append(sorted({key.lr for key in wanted}))
        seeds = {key.seed for key in wanted}
        done |= finished(wanted, lambda lr: abs(np.log10(lr / 0.03)))
    assert rounds == [[1e-4, 3e-4, 1e-3, 3e-3, 1e-2], [3e-2], [1e-1], [3e-2]]
    assert seeds == {0, 1}


def test_all_of_a_grid_that_is_there_counts():
    """As in a report: an older search may have gone another way."""
    one = cell(tuning_seeds=1)
    far = [one.key(lr, FIRST_TUNING_SEED) for lr in (3e-2, 1e-1, 3e-1)]
    done = finished([*one.wanted({}), *far], lambda lr: 1.0 if lr != 1e-1 else 0.5)
    assert {key.lr for key in one.wanted(done)} == {1e-1} == {best_lr(done.values())}


def test_a_grid_is_judged_by_as_many_seeds_as_it_has():
    """By one seed 1e-2 would be best. With two of each, as a report sees them, it is 1e-3."""
    one, two = cell(tuning_seeds=1), cell(tuning_seeds=2)
    done = finished(two.wanted({}), lambda lr: 1.0 if lr == 1e-3 else 2.0)
    first = one.key(1e-2, FIRST_TUNING_SEED)
    done |= finished([first], lambda _: 0.5)
    second = one.key(1e-2, FIRST_TUNING_SEED + 1)
    done |= finished([second], lambda _: 9.0)
    assert {key.lr for key in one.wanted(done)} == {1e-3} == {best_lr(done.values())}
    # A learning rate that has one seed only is completed, if it is on the way.
    del done[second]
    assert one.wanted(done) == [second]


def test_only_what_is_missing_is_wanted():
    one = cell(tuning_seeds=2)
    wanted = one.wanted({})
    assert len(wanted) == 10
    assert {key.seed for key in wanted} == {FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1}
    assert one.wanted(finished(wanted[:4], lambda _: 1.0)) == wanted[4:]


@pytest.mark.parametrize(
    ("name", "lr", "expected"),
    [
        ("variational-hyperadam", "standard", 5e-4),
        ("adam", "default", 1e-3),
        ("nadam", "default", 2e-3),
        ("adam", 0.5, 0.5),
        ("adam", 1, 1.0),
    ],
)
def test_learning_rates_without_a_grid(name, lr, expected):
    wanted = cell(name, lr=lr).wanted({})
    assert [(key.lr, key.seed) for key in wanted] == [(expected, 0), (expected, 1)]


def test_learned_optimizers_on_the_same_grid():
    lrs = {key.lr for key in cell("variational-hyperadam", lr="grid").wanted({})}
    assert lrs == {grid_lr(5e-4, place) for place in range(-2, 3)}


# -- evaluations -----------------------------------------------------------------------------------


def test_an_evaluation_in_two_pieces(tmp_path):
    names = ("adam", "variational-hyperadam")
    settings = {"tuning_seeds": 1, "optimizers": names}
    first = evaluate(config(seeds=1, **settings), tmp_path, jobs=2)
    assert first.finished
    assert first.kept == 0
    seen = []
    second = evaluate(config(seeds=2, **settings), tmp_path, jobs=2, progress=seen.append)
    assert (second.kept, second.made) == (first.made, 2)
    assert [(now.made, now.known) for now in seen] == [(1, 2), (2, 2)]
    assert evaluate(config(seeds=2, **settings), tmp_path).made == 0

    records, _ = read_records(tmp_path)
    assert len({record.key for record in records}) == len(records) == first.made + 2
    reported = [record for record in records if not record.is_tuning]
    assert sorted((r.optimizer, r.seed) for r in reported) == [
        (name, seed) for name in names for seed in (0, 1)
    ]
    for record in reported:
        baseline = make_baseline(record.optimizer)
        run = train(
            make_task(TASK),
            lambda params, b=baseline, r=record: b.build(params, r.lr, r.seed),
            seed=record.seed,
            steps=12,
        )
        assert record.train_loss_post == pytest.approx(run.train_loss_post_T, rel=1e-3)
        assert record.val_accuracy == pytest.approx(run.metrics["val_accuracy"], rel=1e-4)
        assert record.suite == "digits"
        assert record.wall_s > record.optimizer_s > 0
        assert (record.trace is not None) == (record.learned and record.seed == 0)
    assert all(record.val_loss is None for record in records if record.is_tuning)


def test_missing_data_is_told_before_anything_runs(tmp_path):
    both = config(suite="paper-100", tasks=("sine-lstm1", "mnist-mlp1-relu"))
    with pytest.raises(DataError, match=r"mnist-train\.parquet"):
        evaluate(both, tmp_path / "out", data_dir=tmp_path)
    assert not (tmp_path / "out" / RUNS).exists()


def test_a_missing_library_is_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    both = config(optimizers=("adam", "schedulefree-adamw"))
    with pytest.raises(MissingDependencyError, match=r"'\.\[baselines\]'"):
        evaluate(both, tmp_path)
    assert not (tmp_path / RUNS).exists()


def test_a_run_that_fails_stops_no_other(tmp_path, monkeypatch):
    """Its weights are gone when the workers want them."""
    save_weights(make_weights(), tmp_path / "mine.safetensors")
    name = f"variational-hyperadam@{tmp_path}/mine.safetensors"
    found = make_baselines((name,))

    def made_and_lost(texts):
        (tmp_path / "mine.safetensors").unlink(missing_ok=True)
        return [*found, make_baseline("adam")]

    monkeypatch.setattr(module, "make_baselines", made_and_lost)
    monkeypatch.setattr(
        module, "make_baseline", lambda text: found[0] if text == name else make_baseline(text)
    )
    with pytest.raises(RunError, match="2 runs failed, the first: digits-mlp1-sigmoid under "):
        evaluate(config(optimizers=(name, "adam"), lr="default"), tmp_path / "out")
    assert [record.optimizer for record in read_records(tmp_path / "out")[0]] == ["adam"] * 2


COMMAND = [
    sys.executable, "-m", "hyperadam", "evaluate", "--suite", "digits", "--tasks", TASK,
    "--optimizers", "adam,variational-hyperadam", "--steps", "15", "--seeds", "2",
    "--tuning-seeds", "1", "--jobs", "2",
]  # fmt: skip
PATIENCE = 120
"""Seconds, on a busy machine: three processes have PyTorch to import before the first run."""


@contextlib.contextmanager
def running(folder, stderr=subprocess.DEVNULL):
    """The command at work; nothing of it is left behind, whatever becomes of the test."""
    with subprocess.Popen(
        [*COMMAND, "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for_runs(folder, process, count):
    path = folder / RUNS
    deadline = time.monotonic() + PATIENCE
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, "it ended too early for the test"
        assert time.monotonic() < deadline, "too few runs"
        time.sleep(0.05)


def children(process):
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--sid", str(process.pid)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listing.stdout.split()]


def remaining(process):
    """Its children that do not end."""
    deadline = time.monotonic() + PATIENCE
    while children(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    return children(process)


def test_killed_and_started_again(tmp_path):
    with running(tmp_path) as process:
        wait_for_runs(tmp_path, process, 3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before, remarks = read_records(tmp_path)
        assert len(before) >= 3
        assert remarks == []
        with (tmp_path / RUNS).open("ab") as file:  # as if killed amid a line
            file.write(before[0].to_json()[:100].encode())
        outcome = evaluate(
            config(optimizers=("adam", "variational-hyperadam"), steps=15, tuning_seeds=1), tmp_path
        )
        assert outcome.finished
        assert outcome.kept == len(before)
        after, remarks = read_records(tmp_path)
        assert remarks == []
        assert len(after) == outcome.made + len(before)
        assert not remaining(process)  # the workers see that nobody takes their results


def test_interrupted(tmp_path):
    with running(tmp_path) as process:
        wait_for_runs(tmp_path, process, 2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130
        assert "stopped; the same command goes on" in output
        assert not remaining(process)
    assert read_records(tmp_path)[1] == []


def test_a_worker_that_dies(tmp_path):
    with running(tmp_path, stderr=subprocess.PIPE) as process:
        wait_for_runs(tmp_path, process, 1)
        workers = [
            pid
            for pid in children(process)
            if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
        ]
        os.kill(workers[0], signal.SIGKILL)
        _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "a worker process died" in told
    assert read_records(tmp_path)[1] == []


def test_two_evaluations_of_one_folder(tmp_path):
    with running(tmp_path) as process:
        wait_for_runs(tmp_path, process, 1)
        with pytest.raises(RunError, match="another process is at work"):
            evaluate(config(), tmp_path)
