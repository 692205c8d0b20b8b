"""The command line. Users' mistakes are one line and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from rich.progress import TextColumn

from hyperadam.baselines import HAND_DESIGNED, OPTIMIZER_NAMES
from hyperadam.console import (
    demo_table,
    estimate_remarks,
    estimate_table,
    evaluation_progress,
    meta_train_progress,
    print_table,
    progress_bar,
    tasks_table,
    weights_details,
    weights_table,
)
from hyperadam.demo import DEFAULT_TASK, draw_demo, run_demo, total_work
from hyperadam.errors import HyperAdamError
from hyperadam.estimate import STATE_DTYPES, estimate, parse_count
from hyperadam.evaluation import SUITES, EvaluationConfig, evaluate, write_report
from hyperadam.metatrain import MetaTrainConfig, RunLabel, run_meta_training
from hyperadam.metatrain.run import UNSPECIFIED
from hyperadam.presets import PRESETS, preset
from hyperadam.ranks import launched_ranks
from hyperadam.rule import RULES, VariationalHyperAdamRule
from hyperadam.schedule import SCHEDULES
from hyperadam.source import source_version
from hyperadam.tasks import make_task, match_tasks
from hyperadam.weights import (
    bundled_weights,
    import_official,
    join_weights,
    load_weights,
    push_weights,
    save_weights,
)

USAGE_ERROR = 2
INTERRUPTED = 130


class UsageError(HyperAdamError):
    """The command line's arguments don't fit together."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help)")


def _at_least(minimum: int | float) -> Callable[[str], int | float]:
    """A converter for numbers of the type of ``minimum`` and not below it."""
    kind = type(minimum)

    def convert(text: str) -> int | float:
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}; got {text}")
        return value

    convert.__name__ = "number" if kind is float else "integer"  # argparse names it in errors
    return convert


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hyperadam",
        description="Variational HyperAdam: an optimizer that was itself meta-trained.",
    )
    parser.add_argument("--version", action="version", version=f"hyperadam {version('hyperadam')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_estimate(commands)
    _add_evaluate(commands)
    _add_meta_train(commands)
    _add_report(commands)
    _add_tasks(commands)
    _add_weights(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small network with the bundled weights, beside Adam",
        description="Train a small network with the bundled weights, beside Adam; print a table "
        "and draw a picture.",
    )
    demo.add_argument(
        "--task",
        default=DEFAULT_TASK,
        metavar="NAME",
        help="what to train (%(default)s)",
    )
    _add_data_dir(demo)
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo.png"),
        metavar="PNG",
        help="the picture to write (%(default)s)",
    )
    demo.add_argument(
        "--weights",
        default="default",
        metavar="NAME|PATH|hf://...",
        help="bundled weights, a file, or an address of the hub (%(default)s)",
    )
    demo.add_argument(
        "--seeds",
        type=_at_least(1),
        default=5,
        metavar="N",
        help="initialisations to average (%(default)s)",
    )
    demo.add_argument(
        "--steps",
        type=_at_least(1),
        default=100,
        metavar="N",
        help="steps of each run (%(default)s)",
    )
    demo.set_defaults(run=_demo)


def _add_estimate(commands: argparse._SubParsersAction[_Parser]) -> None:
    cost = commands.add_parser(
        "estimate",
        help="tell memory and step time for a number of parameters",
        description="Tell, before anything is allocated, the memory and the step time for a "
        "number of parameters, beside Adam's.",
    )
    cost.add_argument(
        "--params", required=True, metavar="N", help="parameters, such as 11200000, 11.2M or 270k"
    )
    cost.add_argument(
        "--weights",
        default="default",
        metavar="NAME|PATH|hf://...",
        help="bundled weights, a file, or an address of the hub (%(default)s)",
    )
    cost.add_argument(
        "--state-dtype",
        choices=list(STATE_DTYPES),
        default="float32",
        help="of the optimizer's state (%(default)s)",
    )
    cost.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (%(default)s)")
    cost.set_defaults(run=_estimate)


def _names(text: str) -> tuple[str, ...]:
    """A list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _patterns(text: str) -> tuple[str, ...]:
    """A list with commas that is not empty."""
    patterns = _names(text)
    if not patterns:
        raise argparse.ArgumentTypeError("must be names or patterns, with commas between; got none")
    return patterns


def _lr(text: str) -> str | float:
    if text in ("default", "grid"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be default, grid or a number; got {text!r}"
        ) from None


def _add_evaluate(commands: argparse._SubParsersAction[_Parser]) -> None:
    suites = "; ".join(f"{suite.name}: {suite.about}" for suite in SUITES.values())
    evaluation = commands.add_parser(
        "evaluate",
        help="train a suite of tasks under several optimizers",
        description="Train a suite of tasks under several optimizers. Runs that the folder has are "
        "not made again: interrupted or killed, the same command goes on.",
        epilog=f"Suites: {suites}. Optimizers: {', '.join(OPTIMIZER_NAMES)}; behind a learned "
        "one's name, @WEIGHTS takes bundled weights by name, a weights file, or hf://org/name[@revision].",
    )
    evaluation.add_argument("--suite", required=True, metavar="NAME", help="which tasks")
    evaluation.add_argument("--out", type=Path, required=True, help="folder of the results")
    evaluation.add_argument(
        "--optimizers",
        type=_names,
        default=(*HAND_DESIGNED, "variational-hyperadam"),
        metavar="NAME[@WEIGHTS],...",
        help="which optimizers (the hand-designed ones and variational-hyperadam)",
    )
    evaluation.add_argument(
        "--tasks", type=_patterns, default=(), metavar="GLOB,...", help="a part of the suite (all)"
    )
    evaluation.add_argument(
        "--seeds",
        type=_at_least(1),
        default=10,
        metavar="N",
        help="reported runs of each task and optimizer (%(default)s)",
    )
    evaluation.add_argument(
        "--lr",
        type=_lr,
        metavar="default|grid|X",
        help="learning rates: each optimizer's default, the best of a grid, or one for all (the "
        "grid for hand-designed optimizers, the default for learned ones)",
    )
    evaluation.add_argument(
        "--tuning-seeds",
        type=_at_least(1),
        metavar="N",
        help="runs that judge a learning rate of a grid (the suite's)",
    )
    evaluation.add_argument(
        "--steps", type=_at_least(1), metavar="T", help="steps of each run (the suite's)"
    )
    evaluation.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="none",
        help="of the learning rate (%(default)s)",
    )
    evaluation.add_argument(
        "--jobs",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="runs at a time, which share the cores (%(default)s)",
    )
    evaluation.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="where to train: cpu, cuda or cuda:N (%(default)s)",
    )
    _add_data_dir(evaluation)
    evaluation.set_defaults(run=_evaluate)


def _add_report(commands: argparse._SubParsersAction[_Parser]) -> None:
    report = commands.add_parser(
        "report",
        help="write what an evaluation found",
        description="Write report.html and report.md into a folder of results.",
    )
    report.add_argument("folder", type=Path, metavar="DIR", help="folder of the results")
    report.set_defaults(run=_report)


def _add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder with the data set's parquet files"
    )


def _check_data_dir(folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--data-dir: no folder {folder}")


def _add_meta_train(commands: argparse._SubParsersAction[_Parser]) -> None:
    settings = [field.name for field in dataclasses.fields(MetaTrainConfig)]
    rule_settings = [field.name for field in dataclasses.fields(VariationalHyperAdamRule)]
    train = commands.add_parser(
        "meta-train",
        help="meta-train new weights",
        description="Meta-train weights by truncated backpropagation through inner training "
        "runs. Interrupted or killed, it goes on with --resume.",
        epilog=f"Settings: {', '.join(settings)}; rule.NAME for the rule's own: "
        f"{', '.join(rule_settings)}; rule={{{','.join(RULES)}}}.",
    )
    train.add_argument("--out", type=Path, required=True, help="the run's folder")
    train.add_argument("--preset", metavar="NAME", help=f"the recipe: {', '.join(PRESETS)}")
    train.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a setting of the preset; repeatable; settings are listed below",
    )
    train.add_argument(
        "--resume", action="store_true", help="go on with the run in the folder, if there is one"
    )
    _add_data_dir(train)
    train.add_argument(
        "--licence", default=UNSPECIFIED, help="to write into the weights (%(default)s)"
    )
    train.add_argument(
        "--checkpoint-seconds",
        type=_at_least(0.0),
        default=30.0,
        metavar="S",
        help="time between two checkpoints (%(default)s)",
    )
    train.set_defaults(run=_meta_train)


def _add_tasks(commands: argparse._SubParsersAction[_Parser]) -> None:
    tasks = commands.add_parser(
        "tasks",
        help="list the tasks",
        description="List the tasks with their numbers of parameters and the data they need.",
    )
    tasks.add_argument(
        "patterns", nargs="*", metavar="GLOB", help="names to list, such as 'mnist-cnn*' (all)"
    )
    tasks.set_defaults(run=_tasks)


def _add_weights(commands: argparse._SubParsersAction[_Parser]) -> None:
    weights = commands.add_parser("weights", help="list, show, join, import and publish weights")
    actions = weights.add_subparsers(title="commands", metavar="COMMAND", required=True)

    list_ = actions.add_parser("list", help="list the bundled weights")
    list_.set_defaults(run=_weights_list)

    show = actions.add_parser("show", help="show all that a weights file says of itself")
    show.add_argument(
        "weights",
        metavar="NAME|PATH|hf://...",
        help="bundled weights, a file, or an address of the hub: hf://org/name[@revision][/file]",
    )
    show.set_defaults(run=_weights_show)

    join = actions.add_parser(
        "join",
        help="put two thetas side by side in one rule",
        description="Put two thetas side by side in one rule: its steps have the mean that theirs "
        "have on average, and its channels are those of both. See docs/method.md.",
    )
    for name in ("first", "second"):
        join.add_argument(
            name, metavar=name.upper(), help="bundled weights, a file, or an address of the hub"
        )
    join.add_argument(
        "destination", type=Path, metavar="DESTINATION", help="the weights file to write"
    )
    join.set_defaults(run=_weights_join)

    push = actions.add_parser(
        "push",
        help="put a weights file on the Hugging Face Hub",
        description="Put a weights file on the Hugging Face Hub, with a page about it. Log in "
        "first: hf auth login, or set HF_TOKEN.",
    )
    push.add_argument("file", type=Path, metavar="FILE", help="the weights file")
    push.add_argument("repo", metavar="ORG/NAME", help="the repository; made if it is not there")
    push.add_argument("--private", action="store_true", help="make sure that others don't see it")
    push.set_defaults(run=_weights_push)

    official = actions.add_parser(
        "import-official", help="turn weights in the authors' layout into a weights file"
    )
    official.add_argument("source", type=Path, metavar="SOURCE", help="the authors' file")
    official.add_argument(
        "destination", type=Path, metavar="DESTINATION", help="the weights file to write"
    )
    official.add_argument(
        "--lr", type=float, default=1e-3, help="lr they were meta-trained for (%(default)s)"
    )
    official.add_argument(
        "--licence", default="GPL-3.0", help="of the numbers (%(default)s, as the authors')"
    )
    official.set_defaults(run=_weights_import_official)


def _demo(arguments: argparse.Namespace) -> int:
    out, seeds, steps = arguments.out, arguments.seeds, arguments.steps
    if out.suffix != ".png":
        raise UsageError(f"the picture's name must end in .png; got {out}")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; --out names the picture to write")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"no folder {out.absolute().parent} to write the picture to")
    _check_data_dir(arguments.data_dir)
    weights = load_weights(arguments.weights)
    task = make_task(arguments.task, arguments.data_dir)
    with progress_bar(TextColumn("{task.description}")) as bar:
        work = bar.add_task("Adam's grid", total=total_work(seeds))
        result = run_demo(
            task,
            weights,
            seeds=seeds,
            steps=steps,
            advance=lambda now: bar.update(work, advance=1, description=now),
        )
    draw_demo(result, out)
    print_table(demo_table(result))
    print(f"picture: {out}")
    return 0


def _estimate(arguments: argparse.Namespace) -> int:
    num_params = parse_count(arguments.params)
    weights = load_weights(arguments.weights)
    result = estimate(
        weights, num_params, state_dtype=arguments.state_dtype, device=arguments.device
    )
    print_table(estimate_table(result))
    print("\n".join(estimate_remarks(result)))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    _check_data_dir(arguments.data_dir)
    config = EvaluationConfig(
        suite=arguments.suite,
        optimizers=arguments.optimizers,
        seeds=arguments.seeds,
        tasks=arguments.tasks,
        lr="standard" if arguments.lr is None else arguments.lr,
        steps=arguments.steps,
        schedule=arguments.schedule,
        tuning_seeds=arguments.tuning_seeds,
    )
    with launched_ranks() as ranks, evaluation_progress(ranks.first) as progress:
        outcome = evaluate(
            config,
            arguments.out,
            jobs=arguments.jobs,
            data_dir=arguments.data_dir,
            device=arguments.device,
            ranks=ranks,
            progress=progress,
        )
    if not ranks.first:
        return 0 if outcome.finished else INTERRUPTED
    print(
        f"{outcome.made} runs made, {outcome.kept} were in the folder; of those to report, "
        f"{outcome.diverged} of the new ones diverged"
    )
    if not outcome.finished:
        print("stopped; the same command goes on")
        return INTERRUPTED
    print(f"to read them: {shlex.join(['hyperadam', 'report', str(arguments.out)])}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    paths = write_report(arguments.folder)
    for remark in paths.remarks:
        print(remark, file=sys.stderr)
    print(f"page: {paths.html}\nMarkdown: {paths.markdown}")
    return 0


def _meta_train(arguments: argparse.Namespace) -> int:
    out, data_dir, overrides = arguments.out, arguments.data_dir, arguments.overrides
    config = label = None
    if arguments.preset is not None:
        config = preset(arguments.preset).with_overrides(overrides)
        label = RunLabel(
            " ".join([arguments.preset, *overrides]), arguments.licence, source_version()
        )
    elif overrides or arguments.licence != UNSPECIFIED:
        raise UsageError("--set and --licence go with a preset: name one with --preset")
    elif not arguments.resume:
        raise UsageError("name a recipe with --preset, or go on with a run by --resume")
    _check_data_dir(data_dir)
    with (
        launched_ranks() as ranks,
        meta_train_progress(ranks.first) as (started, progress),
    ):
        trainer = run_meta_training(
            out,
            config,
            label,
            resume=arguments.resume,
            data_dir=data_dir,
            checkpoint_seconds=arguments.checkpoint_seconds,
            ranks=ranks,
            started=started,
            progress=progress,
        )
    if not ranks.first:
        return 0 if trainer.finished else INTERRUPTED
    skipped = sum(not record.applied for record in trainer.history)
    if skipped:
        print(f"{skipped} meta-steps had a meta-gradient that was not finite; left out")
    if not trainer.finished:
        command = ["hyperadam", "meta-train", "--resume", "--out", str(out)]
        if data_dir is not None:
            command += ["--data-dir", str(data_dir)]
        print(f"stopped after meta-step {len(trainer.history)}; all is saved. To go on:")
        print(f"  {shlex.join(command)}")
        return INTERRUPTED
    print(f"weights: {out / 'weights.safetensors'}\ncurve: {out / 'meta_loss.png'}")
    return 0


def _tasks(arguments: argparse.Namespace) -> int:
    print_table(tasks_table(match_tasks(arguments.patterns or ["*"])))
    return 0


def _weights_list(_: argparse.Namespace) -> int:
    bundled = {name: load_weights(path) for name, path in bundled_weights().items()}
    print_table(weights_table(bundled))
    return 0


def _weights_show(arguments: argparse.Namespace) -> int:
    print_table(weights_details(load_weights(arguments.weights)))
    return 0


def _weights_join(arguments: argparse.Namespace) -> int:
    joint = join_weights(load_weights(arguments.first), load_weights(arguments.second))
    save_weights(joint, arguments.destination)
    print(f"{arguments.destination}: {joint.rule.channels} channels, to be used at lr {joint.lr:g}")
    return 0


def _weights_push(arguments: argparse.Namespace) -> int:
    address = push_weights(arguments.file, arguments.repo, private=arguments.private)
    print(f"to use these weights: {address}")
    return 0


def _weights_import_official(arguments: argparse.Namespace) -> int:
    weights = import_official(arguments.source, lr=arguments.lr, licence=arguments.licence)
    save_weights(weights, arguments.destination)
    print(f"{arguments.destination}: {weights.rule.name}, {weights.rule.num_theta()} numbers")
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        The exit code.
    """
    try:
        parsed = _parser().parse_args(arguments)
        code: int = parsed.run(parsed)
    except (HyperAdamError, OSError) as error:
        print(f"hyperadam: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def main() -> NoReturn:
    """The program."""
    sys.exit(run())
