"""Work on a disk that is full or read-only, in a process of its own.

``python -m reliability.faulty_disk MEANS FOLDER``, where the means is ``tmpfs`` or ``limit``, plays
every scenario and prints a line for each that went as it should.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import make_weights
from evaluation.making import make_record
from hyperadam import load_weights, save_weights
from hyperadam.cli import run
from hyperadam.evaluation import EvaluationConfig, RunStore, evaluate, read_records, write_report
from hyperadam.metatrain import RunLabel, run_meta_training
from hyperadam.presets import preset
from metatrain.test_run import assert_same_run

BALLAST = "ballast"


class Tmpfs:
    """A file system in memory, mounted where only this process sees it."""

    full = errno.ENOSPC

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._mount("-t", "tmpfs", "-o", "size=16m", "tmpfs")

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self.folder)], check=True)

    def fill(self) -> None:
        with (self.folder / BALLAST).open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self.folder / BALLAST).unlink(missing_ok=True)

    def make_read_only(self) -> None:
        self._mount("-o", "remount,ro")


class Limit:
    """A limit on the size of files: a write beyond it fails halfway, as on a full disk."""

    full = errno.EFBIG

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def fails_with(number: int, act: Callable[[], object]) -> None:
    with pytest.raises(OSError, match="Errno") as caught:
        act()
    assert caught.value.errno == number, caught.value


def weights(disk: Tmpfs | Limit) -> None:
    """The old file stays, and nothing is left beside it."""
    path = disk.folder / "w.safetensors"
    save_weights(make_weights(seed=0), path)
    disk.fill()
    fails_with(disk.full, lambda: save_weights(make_weights(seed=1), path))
    assert load_weights(path).digest() == make_weights(seed=0).digest()
    assert {each.name for each in disk.folder.iterdir()} <= {"w.safetensors", BALLAST}
    disk.free()
    save_weights(make_weights(seed=1), path)
    assert load_weights(path).digest() == make_weights(seed=1).digest()


def meta_train(disk: Tmpfs | Limit) -> None:
    """With space again, the run goes on and ends with the bits of an undisturbed one."""
    config, label = preset("smoke").with_overrides(["inner_runs=2"]), RunLabel("smoke", "MIT", "a")
    run_meta_training(disk.folder / "whole", config, label)
    out = disk.folder / "run"

    def fill(record) -> None:
        if record.index == 3:
            disk.fill()

    def first() -> None:
        run_meta_training(out, config, label, checkpoint_seconds=0, progress=fill)

    fails_with(disk.full, first)
    disk.free()
    assert run_meta_training(out, None, None, resume=True).finished
    assert_same_run(out, disk.folder / "whole")


def evaluation(disk: Tmpfs | Limit) -> None:
    """What was finished is kept, a line cut off is run again."""
    out = disk.folder / "results"
    config = EvaluationConfig(
        suite="digits", tasks=("digits-mlp1-sigmoid",), optimizers=("adam",), seeds=2, steps=300,
        lr="default",
    )  # fmt: skip
    fails_with(disk.full, lambda: evaluate(config, out, progress=lambda _: disk.fill()))
    disk.free()
    kept = {record.seed for record in read_records(out)[0]}
    assert kept
    outcome = evaluate(config, out)
    assert outcome.finished
    assert outcome.kept == len(kept)
    records, remarks = read_records(out)
    assert {record.seed for record in records} == {0, 1}
    assert remarks == []


def read_only(disk: Tmpfs) -> None:
    """Every command that writes ends with one line and exit code 2; nothing changes."""
    path = disk.folder / "w.safetensors"
    save_weights(make_weights(), path)
    results = disk.folder / "results"
    with RunStore(results).opened():
        RunStore(results).add(make_record())
    before = {each: each.stat().st_mtime_ns for each in disk.folder.rglob("*")}
    disk.make_read_only()
    fails_with(errno.EROFS, lambda: save_weights(make_weights(seed=1), path))
    fails_with(errno.EROFS, lambda: write_report(results))
    out = str(disk.folder / "run")
    assert run(["meta-train", "--preset", "smoke", "--out", out]) == 2
    suite = ["--suite", "digits", "--tasks", "digits-mlp1-sigmoid", "--optimizers", "adam"]
    assert run(["evaluate", *suite, "--out", out]) == 2
    assert run(["evaluate", *suite, "--out", str(results)]) == 2
    assert run(["report", str(results)]) == 2
    assert read_records(results)[0]
    assert {each: each.stat().st_mtime_ns for each in disk.folder.rglob("*")} == before


def results(disk: Tmpfs | Limit) -> None:
    """A line that is cut off costs no other."""
    store = RunStore(disk.folder / "results")
    with store.opened():
        store.add(make_record(0))
        disk.fill()
        fails_with(disk.full, lambda: store.add(make_record(1, losses=np.linspace(2, 1, 999))))
    disk.free()
    with store.opened() as there:
        assert [record.seed for record in there] == [0]
        store.add(make_record(1))
    assert [record.seed for record in read_records(store.folder)[0]] == [0, 1]


EVERYWHERE = (weights, meta_train, results)


def main(means: str, folder: Path) -> None:
    make = {"tmpfs": Tmpfs, "limit": Limit}[means]
    scenarios = (*EVERYWHERE, evaluation, read_only) if make is Tmpfs else EVERYWHERE
    for scenario in scenarios:
        disk = make(folder / scenario.__name__)
        try:
            scenario(disk)
        except Exception:  # the others have their turn
            traceback.print_exc()
        else:
            print(f"{scenario.__name__}: as it should be", flush=True)
        finally:
            disk.free()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
