"""Meta-training runs that are killed while they write: ``python -m reliability.killed FOLDER``.

After a run that nothing disturbs, for each place in :data:`PLACES` a process is forked that runs in
a folder of that name, and kills itself (SIGKILL) there.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from hyperadam.metatrain import RunLabel, run_meta_training
from hyperadam.presets import preset

CONFIG = preset("smoke").with_overrides(["inner_runs=2"])
LABEL = RunLabel("smoke", "MIT", "abc")
UNDISTURBED = "undisturbed"
SECOND = 2

PLACES = {
    "config half written": ("config.json", "fsync", 1),
    "checkpoint half written": ("checkpoint.safetensors", "fsync", SECOND),
    "checkpoint before it is renamed": ("checkpoint.safetensors", "replace", SECOND),
    "checkpoint after it is renamed": ("checkpoint.safetensors", "replaced", SECOND),
    "history before it is renamed": ("history.csv", "replace", 1),
    "picture half written": ("meta_loss.png", "fsync", 1),
    "weights half written": ("weights.safetensors", "fsync", 1),
    "weights before they are renamed": ("weights.safetensors", "replace", 1),
    "weights after they are renamed": ("weights.safetensors", "replaced", 1),
}
"""Name of a place: the file, the moment of its writing, and at which time."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(file_name: str, moment: str, time: int) -> None:
    """Have this process end where a file is written for that time."""
    fsync, replace = os.fsync, os.replace
    times = 0

    def name_of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    def dying_fsync(descriptor: int) -> None:
        nonlocal times
        if moment == "fsync" and name_of(descriptor).startswith(f".{file_name}."):
            times += 1
            if times == time:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                die()
        fsync(descriptor)

    def dying_replace(source: str, target: Path) -> None:
        nonlocal times
        if moment == "fsync" or Path(target).name != file_name:
            replace(source, target)
            return
        times += 1
        if moment == "replaced" or times < time:
            replace(source, target)
        if times == time:
            die()

    os.fsync, os.replace = dying_fsync, dying_replace


def fork(act: Callable[[], object]) -> int:
    """What ended a process that acts: a signal's number, or 0."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def main(folder: Path) -> None:
    run_meta_training(folder / UNDISTURBED, CONFIG, LABEL)
    for place, where in PLACES.items():

        def act(place: str = place, where: tuple[str, str, int] = where) -> None:
            kill_at(*where)
            run_meta_training(folder / place, CONFIG, LABEL, checkpoint_seconds=0)

        print(f"{place}: {fork(act)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
