"""``python -m benchmarks step|meta|ranks|floor|state-dtype|all``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import floor, machine, meta, ranks, state_dtype, step
from benchmarks.report import write
from hyperadam.errors import HyperAdamError
from hyperadam.kernels import cpu

NAMES = ("floor", "step", "meta", "ranks", "state-dtype")
ON_DEVICES = ("floor", "step", "meta")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", choices=[*NAMES, "all"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--backend", default="auto", help="of ours (%(default)s)")
    parser.add_argument(
        "--instruction-set",
        metavar="NAME",
        help="of the C++ kernel, for step: avx512, avx2 or portable (the best that there is)",
    )
    parser.add_argument("--device", default="cpu", help="for floor, step and meta (%(default)s)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("../shared/data"),
        metavar="DIR",
        help="folder with MNIST's parquet files, for meta, ranks and state-dtype (%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work?")
    return parser


def _command(arguments: argparse.Namespace, name: str) -> str:
    """The command of one benchmark, without paths."""
    words = ["python -m benchmarks", name]
    if name in ("step", "meta"):
        words += ["--backend", arguments.backend]
    if name == "step" and arguments.instruction_set is not None:
        words += ["--instruction-set", arguments.instruction_set]
    if name in ON_DEVICES:
        words += ["--device", arguments.device]
    return " ".join([*words, "--quick"] if arguments.quick else words)


def _results(arguments: argparse.Namespace, name: str) -> tuple[dict[str, Any], list[str]]:
    device, quick = torch.device(arguments.device), arguments.quick
    if name == "floor":
        return floor.run(device=device, quick=quick)
    if name == "step":
        cpu.prefer(arguments.instruction_set)
        try:
            return step.run(backend=arguments.backend, device=device, quick=quick)
        finally:
            cpu.prefer(None)
    if name == "state-dtype":
        return state_dtype.run(data_dir=arguments.data_dir, quick=quick)
    if name == "ranks":
        return ranks.run(data_dir=arguments.data_dir, quick=quick)
    return meta.run(
        backend=arguments.backend,
        device=arguments.device,
        data_dir=arguments.data_dir,
        quick=quick,
    )


def main(words: list[str] | None = None) -> int:
    """Run benchmarks, writing each one's results when it is done."""
    arguments = _parser().parse_args(words)
    for name in NAMES if arguments.benchmark == "all" else (arguments.benchmark,):
        try:
            results, sections = _results(arguments, name)
        except HyperAdamError as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 2
        described = machine.describe(torch.device(arguments.device))
        on_device = arguments.device != "cpu" and name in ON_DEVICES
        saved = f"{name}-gpu" if on_device else name
        if name == "step" and arguments.instruction_set is not None:
            saved = f"{saved}-{arguments.instruction_set}"
        write(arguments.out, saved, _command(arguments, name), described, results, sections)
        print("\n\n".join(sections))
    return 0


if __name__ == "__main__":
    sys.exit(main())
