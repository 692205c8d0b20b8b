"""The command line. Users' mistakes are one line and exit code 2."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from hyperadam.errors import HyperAdamError

app = typer.Typer(
    help="Variational HyperAdam: an optimizer that was itself meta-trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
weights_app = typer.Typer(help="Bundled and saved weights.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")

INTERRUPTED = 130


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hyperadam {version('hyperadam')}")
        raise typer.Exit


@app.callback()
def _root(
    version_: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _progress(*columns: TextColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("demo.png"),
    weights: Annotated[str, typer.Option(help="Bundled weights, or a file.")] = "default",
    seeds: Annotated[int, typer.Option(min=1, help="Initialisations to average over.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 100,
) -> None:
    """Train a small network beside Adam; prints a table and draws a picture."""
    from hyperadam.demo import TASK, draw_demo, run_demo, total_work
    from hyperadam.weights import load_weights

    loaded = load_weights(weights)
    if out.suffix != ".png":
        raise click.BadParameter(f"the picture's name must end in .png; got {out}")
    if not out.absolute().parent.is_dir():
        raise click.BadParameter(f"no folder {out.absolute().parent} to write the picture to")
    with _progress() as bar:
        task = bar.add_task("Adam's grid", total=total_work(seeds))
        result = run_demo(
            loaded,
            seeds=seeds,
            steps=steps,
            advance=lambda now: bar.update(task, advance=1, description=now),
        )
        bar.update(task, description="done")
    draw_demo(result, out)
    table = Table(title=f"{TASK}, {steps} steps, {seeds} seeds: mean ± standard deviation")
    table.add_column("optimizer")
    for name in ("lr", "final training loss", "validation accuracy", "ms a step"):
        table.add_column(name, justify="right")
    for entry in result.entries():
        loss, accuracy = entry.final_losses(), 100 * entry.accuracies()
        table.add_row(
            entry.name,
            f"{entry.lr:g}",
            f"{loss.mean():.3f} ± {loss.std():.3f}",
            f"{accuracy.mean():.1f} ± {accuracy.std():.1f} %",
            f"{entry.step_milliseconds():.2f}",
        )
    _print(table)
    typer.echo(f"picture: {out}")


def _print(table: Table) -> None:
    """A table to standard output, never cut where that is no terminal."""
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(table)


@app.command("meta-train")
def meta_train(
    out: Annotated[Path, typer.Option(help="The run's folder.")],
    preset: Annotated[
        str | None, typer.Option(help="The recipe: paper, digits or smoke.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a setting of the preset; repeatable."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder.")
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the data set's parquet files.")
    ] = None,
    licence: Annotated[
        str, typer.Option(help="Licence to write into the exported weights.")
    ] = "unspecified",
    checkpoint_seconds: Annotated[
        float, typer.Option(min=0, help="Time between two checkpoints.")
    ] = 30.0,
) -> None:
    """Meta-train weights by truncated backpropagation through inner training runs.

    Interrupted or killed, the same command with --resume goes on where it was.
    """
    from hyperadam.metatrain import MetaStep, MetaTrainer, RunLabel, run_meta_training
    from hyperadam.presets import preset as find_preset

    overrides = set_ or []
    config = label = None
    if preset is not None:
        config = find_preset(preset).with_overrides(overrides)
        label = RunLabel(preset=" ".join([preset, *overrides]), licence=licence)
    elif overrides:
        raise click.UsageError("--set changes a preset: name one with --preset")
    elif not resume:
        raise click.UsageError("name a recipe with --preset, or go on with a run by --resume")
    if data_dir is not None and not data_dir.is_dir():
        raise click.BadParameter(f"--data-dir: no folder {data_dir}")

    fields = (
        "loss {task.fields[loss]:.3f}  kl {task.fields[kl]:.3g}  {task.fields[rate]:.0f} steps/s"
    )
    with _progress(TextColumn(fields)) as bar:
        task = bar.add_task("meta-training", total=None, loss=float("nan"), kl=0.0, rate=0.0)
        unroll_length = 1

        def started(trainer: MetaTrainer) -> None:
            nonlocal unroll_length
            unroll_length = trainer.config.unroll_length
            done, total = len(trainer.history), trainer.config.total_meta_steps
            bar.reset(task, total=total, completed=done)
            if done:
                bar.console.print(f"resuming at meta-step {done} of {total}")

        def progress(record: MetaStep) -> None:
            bar.update(
                task,
                completed=record.index,
                description=f"meta-loss {record.meta_loss:.3f}",
                loss=record.inner_loss,
                kl=record.kl,
                rate=(bar.tasks[task].speed or 0.0) * unroll_length,
            )

        trainer = run_meta_training(
            out,
            config,
            label,
            resume=resume,
            data_dir=data_dir,
            checkpoint_seconds=checkpoint_seconds,
            started=started,
            progress=progress,
        )
    skipped = sum(not record.applied for record in trainer.history)
    if skipped:
        typer.echo(f"{skipped} meta-steps had a meta-gradient that was not finite; left out")
    if not trainer.finished:
        place = "" if data_dir is None else f" --data-dir {data_dir}"
        typer.echo(
            f"stopped after meta-step {len(trainer.history)}; all is saved. To go on:\n"
            f"  hyperadam meta-train --resume --out {out}{place}"
        )
        raise typer.Exit(INTERRUPTED)
    typer.echo(f"weights: {out / 'weights.safetensors'}\ncurve: {out / 'meta_loss.png'}")


@weights_app.command("list")
def weights_list() -> None:
    """List the bundled weights."""
    from hyperadam.weights import bundled_weights, load_weights

    table = Table()
    for name in ("name", "rule", "numbers", "lr", "data", "date", "licence"):
        table.add_column(name)
    for name, path in bundled_weights().items():
        weights = load_weights(path)
        table.add_row(
            name,
            weights.rule.name,
            str(weights.rule.num_theta()),
            f"{weights.lr:g}",
            weights.data,
            weights.date,
            weights.licence,
        )
    _print(table)


@weights_app.command("show")
def weights_show(name_or_path: Annotated[str, typer.Argument(metavar="NAME|PATH")]) -> None:
    """Show all that a weights file says of itself."""
    from hyperadam.weights import load_weights

    weights = load_weights(name_or_path)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in weights.rule.to_dict().items():
        table.add_row(key, str(value))
    table.add_section()
    for key in ("lr", "preset", "data", "steps", "date", "commit", "licence"):
        table.add_row(key, str(getattr(weights, key)))
    table.add_row("sha256", weights.digest())
    table.add_section()
    for key, tensor in weights.theta.items():
        spread = f"mean {tensor.mean():+.4f}, rms {tensor.square().mean().sqrt():.4f}"
        table.add_row(key, f"{tuple(tensor.shape)!s:10} {spread}")
    _print(table)


@weights_app.command("import-official")
def weights_import_official(
    source: Annotated[Path, typer.Argument(help="A file of the authors' program.")],
    destination: Annotated[Path, typer.Argument(help="The weights file to write.")],
    lr: Annotated[
        float, typer.Option(help="The learning rate that they were meta-trained for.")
    ] = 1e-3,
) -> None:
    """Turn weights in the authors' layout into a weights file."""
    from hyperadam.weights import import_official, save_weights

    weights = import_official(source, lr=lr)
    save_weights(weights, destination)
    typer.echo(f"{destination}: {weights.rule.name}, {weights.rule.num_theta()} numbers")


def main() -> None:
    """Run the command line."""
    try:
        code = app(standalone_mode=False)
    except (HyperAdamError, click.ClickException, OSError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        print(f"hyperadam: {' '.join(message.split())}", file=sys.stderr)
        code = 2
    except (click.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    sys.exit(code)
