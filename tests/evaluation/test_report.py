"""The report of made-up runs with known answers."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hyperadam.errors import RunError
from hyperadam.evaluation import plots
from hyperadam.evaluation.document import (
    Code,
    Document,
    Figure,
    Paragraph,
    say,
    to_html,
    to_markdown,
)
from hyperadam.evaluation.records import read_records
from hyperadam.evaluation.report import make_report, write_report
from hyperadam.evaluation.series import make_groups
from hyperadam.evaluation.suites import ABLATIONS, SUITES
from hyperadam.presets import PRESETS
from hyperadam.weights import RELEASED_DIGEST

TASK = "mnist-mlp1-sigmoid"
STEPS = 100
DIGEST = "ab12" * 16


def run(optimizer="adam", final=1.0, *, seed=0, lr=1e-2, diverged_at=None, **changes):
    """A run whose loss falls from 2 and stays at ``final`` over its second half."""
    steps = changes.get("steps", STEPS)
    losses = np.concatenate(
        [np.linspace(2, final, steps // 2), np.full(steps - steps // 2, final)]
    ).tolist()
    if diverged_at is not None:
        losses[diverged_at:] = [None] * (steps - diverged_at)
    learned = optimizer.startswith("variational")
    return {
        "task": TASK,
        "optimizer": optimizer,
        "weights": DIGEST if learned else None,
        "lr": lr,
        "default_lr": 1e-3,
        "seed": seed,
        "steps": steps,
        "schedule": "none",
        "train_loss": losses,
        "train_loss_post": losses,
        "val_loss": None if diverged_at is not None else 1.0,
        "val_accuracy": None if diverged_at is not None else 0.9,
        "wall_s": 2.0,
        "optimizer_s": 0.5,
        "peak_mb": 10.0,
        "diverged": diverged_at is not None,
        "suite": "tiny",
        "version": "0.1.0",
        "machine": "a machine",
        "learned": learned,
        **changes,
    }


def ours(final=0.5, **changes):
    return run("variational-hyperadam", final, **{"lr": 1e-3, **changes})


def tuning(optimizer="adam", lrs=((1e-3, 3.0), (1e-2, 1.0), (1e-1, 2.0)), **changes):
    return [run(optimizer, final, seed=1_000_000, lr=lr, **changes) for lr, final in lrs]


def small():
    """Two seeds: tuned Adam at 0.9 and 1.1, at its default at 1.9, ours at 0.4 and 0.6."""
    return [
        *tuning(),
        run(final=0.9),
        run(final=1.1, seed=1),
        run(final=1.9, lr=1e-3),
        ours(0.4),
        ours(0.6, seed=1),
    ]


def trace(steps=4, channels=7, layers=("0.weight", "0.bias")):
    at = np.linspace(1, STEPS, steps).astype(int).tolist()
    rates = np.linspace(0.5, 0.9, channels) * np.ones((steps, 1))
    quantiles = [[0.5, 0.6, 0.75, 0.8, 0.9]] * steps
    by_layer = [[0.5, 2.0]] * steps
    return {
        "at": at, "layers": list(layers), "beta": rates.tolist(), "gamma": rates.tolist(),
        "beta_quantiles": quantiles, "gamma_quantiles": quantiles, "rho": (rates - 0.7).tolist(),
        "rho_std": rates.tolist(), "beta_layers": by_layer, "gamma_layers": by_layer,
        "rho_layers": by_layer, "std": by_layer, "snr": by_layer, "update_rms": by_layer,
    }  # fmt: skip


def report(folder, runs):
    folder.joinpath("runs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in runs))
    paths = write_report(folder)
    return paths.html.read_text(), paths.markdown.read_text()


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of words alone: a plot takes half a second, and a trace has ten."""

    def draw(name, description, *_, **__):
        return Figure(name, description, "<svg></svg>", "<svg></svg>")

    monkeypatch.setattr(plots, "_draw", draw)


@dataclasses.dataclass(frozen=True)
class Made:
    """A report, read."""

    folder: Path
    page: str
    markdown: str


@pytest.fixture(scope="module")
def small_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    return Made(folder, *report(folder, small()))


class Tables(HTMLParser):
    """The page's tables as lists of rows of cells, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.tags, self.ids, self._in_cell = [], [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self._in_cell = True
        elif tag == "small" and self._in_cell:
            self.tables[-1][-1][-1] += " | "

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def losses_row(page, task=TASK):
    """The final losses by series."""
    for table in Tables(page).tables:
        header, *rows = table
        if "variational-hyperadam | default lr" in header and "adam | tuned" in header:
            return dict(zip(header, next(row for row in rows if row[0] == task), strict=True))
    raise AssertionError("no table of losses")


def test_means_tracks_and_comparisons(small_report):
    page, markdown = small_report.page, small_report.markdown
    row = losses_row(page)
    assert row["variational-hyperadam | default lr"] == "0.500 ± 0.100"
    assert row["adam | tuned"] == "1.00 ± 0.10"
    assert row["adam | default lr"] == "1.90 | 1 seed"
    (standing,) = [t for t in Tables(page).tables if t[0][0] == "optimizer"]
    by_name = {row[0]: row[1:] for row in standing[1:]}
    assert next(iter(by_name)) == "variational-hyperadam, default lr"
    assert by_name["variational-hyperadam, default lr"][0] == (
        "0.49× | 0.40× to 0.60×"  # sqrt(0.4 * 0.6)
    )
    assert by_name["variational-hyperadam, default lr"][1:] == [
        "1 of 1 | 1 clear, 0 above",
        "0.49× | 1 of 1",
        "1.00× | 0 of 1",
        "0.49× / 0.49× / 1.00×",
        "0 of 2",
    ]
    assert by_name["adam, default lr"][1] == "0 of 1 | 0 clear, 0 above"  # one seed
    assert "**0.500 ± 0.100**" in markdown


@pytest.mark.usefixtures("undrawn")
def test_fitting_each_batch_alone_shows(tmp_path):
    """Half of Adam's loss after the update, twice before it, three times on validation data."""
    greedy = ours(0.5) | {"train_loss": run(final=2.0)["train_loss"], "val_loss": 3.0}
    page, _ = report(tmp_path, [*tuning(), run(final=1.0), greedy])
    (standing,) = [t for t in Tables(page).tables if t[0][0] == "optimizer"]
    row = next(row for row in standing if row[0].startswith("variational"))
    named = dict(zip(standing[0], row, strict=True))
    assert named["final loss | over that of adam, tuned"] == "0.50×"
    assert named["new batches | before the update"] == "2.00× | 0 of 1"
    assert named["validation | loss"] == "3.00× | 0 of 1"
    # Without validation data there is no such ratio.
    runs = [one | {"val_loss": None} for one in (*tuning(), run(final=1.0), greedy)]
    page, _ = report(tmp_path, runs)
    (standing,) = [t for t in Tables(page).tables if t[0][0] == "optimizer"]
    row = next(row for row in standing if row[0].startswith("variational"))
    assert dict(zip(standing[0], row, strict=True))["validation | loss"] == "—"
    assert row[5] == "0.50× / 2.00× / —"
    assert "on validation data —." in re.sub("<[^>]+>", "", page)


def test_both_renderings_say_the_same(small_report):
    page, markdown = small_report.page, small_report.markdown
    plain = markdown.replace("\\", "").replace("*", "").replace("`", "")
    for table in Tables(page).tables:
        for cells in table:
            for cell in cells:
                for part in cell.split(" | "):
                    assert part.strip() in plain, part
    figures = set(re.findall(r"\]\(figures/([^)]+)\)", markdown))
    assert figures == {path.name for path in (small_report.folder / "figures").iterdir()}
    assert len(figures) == page.count("<svg") > 4


def test_the_paper_stands_beside_ours(small_report, tmp_path):
    page = small_report.page
    (table,) = [t for t in Tables(page).tables if "adam | printed" in t[0]]
    row = dict(zip(table[0], table[1], strict=True))
    assert row["adam | printed"] == "0.35"
    assert row["hyperadam | printed"] == "0.33"
    assert row["adam | ours, tuned"] == "1.00 ± 0.10"
    assert row["variational-hyperadam | ours, default lr"] == "0.500 ± 0.100"
    page, _ = report(tmp_path, [run(steps=20)])
    assert "printed" not in page


def test_steps_to_the_target(small_report):
    """Ours falls from 2 to 0.5 over 50 steps; a trailing mean of ten is at 1 some steps later."""
    page = small_report.page
    steps = next(t for t in Tables(page).tables if t[1][-1] == "never")
    row = dict(zip(steps[0], steps[1], strict=True))
    curve = np.linspace(2, 0.5, 50)
    expected = next(t + 1 for t in range(9, 50) if curve[t - 9 : t + 1].mean() <= 1.0)
    assert row["variational-hyperadam | default lr"] == str(expected)
    assert row["adam | tuned"] == "59"
    assert row["adam | default lr"] == "never"


def test_a_loss_that_the_reference_begins_at_is_no_target(tmp_path):
    other = "mnist-mlp2-sigmoid"
    stuck = [run(final=1.95, seed=seed, task=other) for seed in range(2)]
    runs = [*small(), *tuning(task=other), *stuck, ours(1.9, task=other)]
    page, _ = report(tmp_path, runs)
    steps = next(t for t in Tables(page).tables if t[1][-1] == "never")
    assert [row[0] for row in steps[1:]] == [TASK]
    text = re.sub("<[^>]+>", "", page)
    assert f"Without {other}: there adam, tuned ends less than 5 % below its first loss" in text


def test_time_is_compared_on_one_machine_only(tmp_path):
    """Here batch and gradient take 6 ms a step in the fastest run, which is Adam's, and so for all;
    Adam's part is 4 ms, that of ``@slow`` 30 ms in a run where the rest took 10."""
    fastest = run(final=1.1, seed=2, wall_s=1.0, optimizer_s=0.4)
    slow = run("variational-hyperadam@slow", 0.5, lr=1e-3, wall_s=4.0, optimizer_s=3.0)
    away = run("variational-hyperadam@away", 0.5, lr=1e-3, machine="another")
    runs = [*small(), fastest, slow, away]
    page, _ = report(tmp_path, runs)
    tables = Tables(page).tables
    first = next(n for n, table in enumerate(tables) if "never" in table[1])
    steps, times, costs = (dict(zip(t[0], t[1], strict=True)) for t in tables[first : first + 3])
    reached = int(steps["variational-hyperadam@slow | default lr"])
    own = int(steps["adam | tuned"])
    ratio = f"{36 * reached / (10 * own):.2f}×"
    assert times["variational-hyperadam@slow | default lr"] == ratio
    assert times["variational-hyperadam@away | default lr"] == "other machine"
    assert times["adam | tuned"] == f"{0.01 * own:.2g} s"
    assert times["adam | default lr"] == "never"
    shown = {name: re.findall(r"[\d.]+", cell) for name, cell in costs.items()}
    assert shown["variational-hyperadam@slow | default lr"] == ["30", "36"]
    assert shown["variational-hyperadam@away | default lr"] == ["5", "20"]
    assert shown["adam | tuned"] == ["4", "10"]


@pytest.mark.usefixtures("undrawn")
def test_optimizers_are_compared_on_the_tasks_that_all_have(tmp_path):
    """SGD was run on one task of two, where it is level with Adam as ours is; on the other ours
    ends at half. RMSprop's one task of three is too few to count."""
    tasks = [TASK, "mnist-mlp2-sigmoid", "mnist-mlp3-sigmoid"]
    runs = [*small()[:3]]
    for task, final in zip(tasks, (1.0, 1.0, 0.5), strict=True):
        runs += [run(final=1.0, task=task, lr=1e-3), ours(final, task=task)]
    runs += [run("sgd", 1.0, task=task) for task in tasks[:2]]
    runs += [run("rmsprop", 4.0, task=TASK)]
    page, _ = report(tmp_path, runs)
    (standing,) = [t for t in Tables(page).tables if t[0][0] == "optimizer"]
    assert standing[0][5] == "2 common tasks | all three"
    by_name = {row[0]: row[1:] for row in standing[1:]}
    assert by_name["variational-hyperadam, default lr"][4] == "1.00× / 1.00× / 1.00×"
    assert by_name["sgd, lr 0.01"][4] == "1.00× / 1.00× / 1.00×"
    assert by_name["rmsprop, lr 0.01"][4] == "—"


def test_diverged_runs_are_counted_and_never_win(tmp_path):
    runs = [*small(), ours(0.1, seed=2, diverged_at=60), run("sgd", diverged_at=3)]
    page, _ = report(tmp_path, runs)
    row = losses_row(page)
    assert row["variational-hyperadam | default lr"].endswith("| 1 of 3 diverged, 3 seeds")
    assert row["sgd | lr 0.01"] == "diverged | all of 1"
    standing = next(t for t in Tables(page).tables if t[0][0] == "optimizer")
    by_name = {row[0]: row[1:] for row in standing[1:]}
    # Three runs are too few for a middle half without the diverged one.
    assert by_name["variational-hyperadam, default lr"][1:] == [
        "0 of 1 | 0 clear, 1 above",
        "diverges | 0 of 1",
        "diverges | 0 of 1",
        "diverges / diverges / diverges",
        "1 of 3",
    ]
    assert by_name["sgd, lr 0.01"][0] == "diverges"
    assert "2 of 7 runs diverged" in page


def test_diverged_runs_are_left_out_of_validation_and_counted(tmp_path):
    good = [ours(0.1, seed=seed, val_loss=3.0, val_accuracy=0.8) for seed in (0, 1)]
    bad = ours(9.0, seed=2, val_loss=1e18, val_accuracy=0.1, diverged=True)
    lost = [run("sgd", 9.0, val_loss=1e18, val_accuracy=0.1, diverged=True)]
    lowest = [run("adam", seed=seed, val_loss=4.0, val_accuracy=0.7) for seed in (0, 1)]
    page, markdown = report(tmp_path, [*good, bad, *lost, *lowest])
    tables = Tables(page).tables
    for measured in ("80.0 ± 0.0 %", "3.00 ± "):
        (row,) = [row for t in tables for row in t if any(c.startswith(measured) for c in row)]
        (cell,) = [cell for cell in row if cell.startswith(measured)]
        assert cell.endswith("| 1 of 3 diverged")
        assert "diverged | all of 1" in row
        assert f"**{measured}" not in markdown  # one that diverges is not the best


def test_optimizers_without_runs_are_named(tmp_path):
    page, _ = report(tmp_path, [*small(), run("sgd"), run("rnnprop@mine", lr=1e-3)])
    (note,) = re.findall(r"Not run, of the \d+ optimizers meant to be compared: .*?</li>", page)
    assert "<code>hyperadam</code>" in note
    assert "<code>rnnprop</code>" not in note
    assert "<code>momentum</code>" in note
    assert "<code>sgd</code>" not in note
    assert "isotropic" not in note


def test_the_best_of_those_by_hand_is_in_short(tmp_path):
    runs = [*small(), run("sgd", 0.5), run("momentum", 0.25)]
    page, _ = report(tmp_path, runs)
    short = page[page.index("In short") : page.index("interquartile mean")]
    assert "momentum, lr 0.01" in short
    assert "sgd, lr 0.01" not in short


def test_what_is_missing_is_said(tmp_path):
    runs = [*small(), run(task="sine-lstm1", val_accuracy=None), run("sgd")]
    page, _ = report(tmp_path, runs)
    assert losses_row(page, "sine-lstm1")["variational-hyperadam | default lr"] == "—"
    assert "of 10 cells of the table are missing" in re.sub(r"<[^>]+>", "", page)
    assert "Without tuning runs" in page


def test_the_grids_ends_are_marked(tmp_path):
    low = tuning("sgd", ((1e-3, 1.0), (1e-2, 2.0)))
    page, _ = report(tmp_path, [*small(), *low, run("sgd", lr=1e-3)])
    (table,) = [t for t in Tables(page).tables if t[0] == ["task", "adam", "sgd"]]
    assert table[1] == [TASK, "0.01", "0.001 | lowest of the grid"]
    # A default that is also the best counts as tuned.
    assert losses_row(page)["sgd | tuned"].startswith("1.00")
    assert "sgd, default lr" not in page


def test_tuning_runs_are_not_reported(tmp_path):
    with pytest.raises(RunError, match="only tune"):
        report(tmp_path, tuning())
    with pytest.raises(RunError, match="no results in"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "runs.jsonl").write_text("damaged\n")
    with pytest.raises(RunError, match="line 1"):
        write_report(tmp_path)


def test_without_adam_there_is_no_common_scale(tmp_path):
    page, _ = report(tmp_path, [ours(), ours(seed=1)])
    assert "Adam was not run here" in page
    assert "<svg" in page


@pytest.mark.usefixtures("undrawn")
def test_horizons_and_schedules_are_groups(tmp_path):
    runs = [*small(), ours(0.2, steps=20), run("adam", 0.3, steps=20, schedule="cosine")]
    page, _ = report(tmp_path, runs)
    titles = [re.sub("<[^>]+>", "", title) for title in re.findall("<h2.*?</h2>", page)]
    assert titles[1:] == [
        "20 steps, suite tiny, constant learning rate",
        "20 steps, suite tiny, cosine schedule of the learning rate",
        "100 steps, suite tiny, constant learning rate",
    ]
    parsed = Tables(page)
    assert len(set(parsed.ids)) == len(parsed.ids)


@pytest.mark.usefixtures("undrawn")
def test_weights_of_one_name_are_told_apart(tmp_path):
    page, _ = report(tmp_path, [*small(), ours(0.7, seed=0, weights="cd34" * 16)])
    assert "variational-hyperadam #ab12ab12" in page
    assert "variational-hyperadam #cd34cd34" in page


def test_a_run_repeated_counts_once(tmp_path):
    lines = "".join(json.dumps(ours(final)) + "\n" for final in (0.5, 0.8))
    (tmp_path / "runs.jsonl").write_text(lines + "damaged\n")
    records, remarks = read_records(tmp_path)
    (group,) = make_groups(records)
    (entry,) = group.entries.values()
    assert entry.score == pytest.approx(0.8)
    assert "Some results could not be read" in to_html(make_report(records, "x", remarks))
    assert write_report(tmp_path).remarks == tuple(remarks)


@pytest.mark.usefixtures("undrawn")
def test_learned_optimizers_are_described(tmp_path):
    file = {"weights": "cd34" * 16}
    page, _ = report(
        tmp_path,
        [
            *small(),
            run("variational-hyperadam@mine", **file),
            run("variational-hyperadam@lite", weights=RELEASED_DIGEST),
            run("variational-swarm", **file),
        ],
    )
    text = re.sub(r"<[^>]+>", "", page)
    assert (
        "(Wang et al., TPAMI 2022), with weights that were bundled before as default; ab12" in text
    )
    assert "with weights from a file named mine; cd34cd34cd34" in text
    assert "with the weights that the authors released; af65806b846e" in text
    assert "variational-swarm: not known here; cd34" in text


@pytest.fixture(scope="module")
def traced_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / ("a_long_name_of_a_folder" * 4)
    folder.mkdir()
    return Made(folder, *report(folder, [*small()[:-2], ours(trace=trace()), ours(seed=1)]))


def test_what_the_rule_does(traced_report):
    page, markdown, folder = traced_report.page, traced_report.markdown, traced_report.folder
    text = re.sub("<[^>]+>", "", page)
    assert "the median β is 0.750, an average over about 4 steps" in text
    assert "standard deviation ends between 0.5 and 2 by layer" in text
    by_layer = ("beta_layers", "gamma_layers", "rho_layers", "std", "snr", "update_rms")
    for name in ("beta", "gamma", "rho", *by_layer):
        assert f"trace-0-{name}.svg" in markdown
    no_posterior = {**trace(), "std": None, "snr": None}
    assert list((folder / "figures").glob("*trace-0-std*"))
    _, markdown = report(folder, [ours(trace=no_posterior)])
    assert "trace-0-rho.svg" in markdown
    assert "trace-0-std" not in markdown
    assert not list((folder / "figures").glob("*trace-0-std*"))  # of the first report


def test_long_names_of_layers_leave_room_for_the_plot(tmp_path):
    layers = [f"blocks.{n}.attention.in_projection.weight" for n in range(6)]
    by_layer = [[float(n + 1) for n in range(6)]] * 4
    tables = ("beta_layers", "gamma_layers", "rho_layers", "std", "snr", "update_rms")
    long = trace() | {"layers": layers} | dict.fromkeys(tables, by_layer)
    report(tmp_path, [ours(trace=long)])
    (svg,) = (tmp_path / "figures").glob("*trace-0-std.svg")
    text = svg.read_text()
    assert "blocks.0.…ion.weight" in text
    ground = text[text.index('axes_1"') :]
    left, right = map(float, re.search(r'd="M (\S+) \S+ \nL (\S+) ', ground).groups())
    width = float(re.search(r'viewBox="0 0 (\S+) ', text).group(1))
    assert right - left > 0.6 * width


@pytest.mark.usefixtures("undrawn")
def test_the_first_optimizers_trace_comes_first(tmp_path):
    one = trace(layers=("w", "b"))
    other = {"lr": 1e-3, "weights": "cd34" * 16, "trace": one}
    runs = [
        run("variational-hyperadam@other", **other),
        run("variational-hyperadam@other", task="sine-lstm1", **other),
        ours(trace=one, task="sine-lstm1"),
        ours(trace=one),
    ]
    _, markdown = report(tmp_path, runs)
    shown = re.findall(r"`(variational-hyperadam\S*)` on `(\S+)` at lr", markdown)
    assert shown[:2] == [("variational-hyperadam", "sine-lstm1"), ("variational-hyperadam", TASK)]
    assert {name for name, _ in shown[2:]} == {"variational-hyperadam@other"}


@pytest.mark.usefixtures("undrawn")
def test_a_variance_at_its_prior_is_said(tmp_path):
    words = "the predicted variance says nothing here"
    flat = {**trace(), "std": [[1.0, 0.99]] * 4}
    page, _ = report(tmp_path, [ours(trace=flat)])
    assert "within 1 %" in page
    assert words in page
    page, _ = report(tmp_path, [ours(trace=flat), ours(trace=trace(), task="sine-lstm1")])
    assert words not in page
    page, _ = report(tmp_path, [ours(trace={**trace(), "std": None, "snr": None})])
    assert words not in page


@pytest.mark.usefixtures("undrawn")
def test_traces_are_of_many_kinds(tmp_path):
    """Of eight perceptrons, an LSTM and a network with convolutions, under two optimizers."""
    tasks = [f"mnist-mlp{depth}-sigmoid" for depth in range(1, 9)] + ["sine-lstm1", "mnist-cnn1"]
    runs = [
        run(f"variational-hyperadam@{name}", task=task, lr=lr, weights=name * 32, trace=trace())
        for name in ("aa", "bb")
        for task in tasks
        for lr in (1e-2, 1e-3)
    ]
    page, _ = report(tmp_path, runs)
    words = re.findall(r"@(aa|bb) on (\S+) at lr (\S+) from", re.sub("<[^>]+>", "", page))
    assert len(words) == 6
    assert {lr for _, _, lr in words} == {"0.001"}  # one track each: the default's
    assert {name for name, _, _ in words} == {"aa", "bb"}
    for task in ("sine-lstm1", "mnist-cnn1"):
        assert sum(task == own for _, own, _ in words) == 2


def variants(task=TASK, factors=((2.0, 0.5), (2.0, 2.0))):
    """Two seeds of one set of weights in three uses; factors of the loss by use and seed."""
    return [
        run(f"variational-hyperadam{use}", 0.1 * (1 + seed) * factor, seed=seed, lr=1e-3, task=task)
        for use, by_seed in zip(("", "-mean", "-isotropic"), [(1, 1), *factors], strict=True)
        for seed, factor in enumerate(by_seed)
    ]


def paired_table(page):
    """The cells of the mean and of the isotropic noise, by task."""
    wanted = [
        f"variational-hyperadam-{use} | default lr, over variational-hyperadam"
        for use in ("mean", "isotropic")
    ]
    (table,) = [t for t in Tables(page).tables if wanted[0] in t[0]]
    places = [table[0].index(name) for name in wanted]
    return {row[0]: [row[place] for place in places] for row in table}


def test_uses_of_the_same_weights_are_compared_in_pairs(tmp_path):
    page, markdown = report(tmp_path, [*variants(), *variants("sine-lstm1", ((1, 1), (8, 8)))])
    rows = paired_table(page)
    assert rows[TASK] == ["1.00× | 0.50 to 2.00", "2.00× | 2.00 to 2.00"]
    assert rows["sine-lstm1"] == ["1.00× | 1.00 to 1.00", "8.00× | 8.00 to 8.00"]
    mean, isotropic = rows["median task"]
    assert mean == "1.00× | 0.71 to 1.41"
    assert isotropic == "4.00× | 4.00 to 4.00"
    assert "**4.00×**" in markdown
    assert "**1.00×**" not in markdown


def test_pairs_with_a_diverged_run_are_left_out(tmp_path):
    runs = variants()
    runs[2] = {**runs[2], "diverged": True}
    page, _ = report(tmp_path, runs)
    assert paired_table(page)[TASK][0] == "0.50× | 1 with a diverged run left out"


def test_other_weights_are_no_pair(tmp_path):
    runs = [one for one in variants() if "-isotropic" not in one["optimizer"]]
    runs[2:] = [{**one, "weights": "cd34" * 16} for one in runs[2:]]
    page, _ = report(tmp_path, runs)
    assert "used in several ways" not in page


def test_versions_of_the_program_are_told_apart(tmp_path):
    commit = "0123456789abcdef" * 2 + "01234567"
    page, _ = report(tmp_path, [ours(source=commit), ours(seed=1, source=commit)])
    assert "several versions" not in page
    page, _ = report(tmp_path, [ours(source=f"{commit}+changes"), ours(seed=1), ours(seed=2)])
    assert "unrecorded (2 runs), 0123456789+changes (1 run)" in page


@pytest.mark.usefixtures("undrawn")
def test_tables_have_no_rows_of_dashes(tmp_path):
    page, _ = report(tmp_path, [*small(), run(task="sine-lstm1", val_accuracy=None, val_loss=2.0)])
    tables = Tables(page).tables
    (accuracies,) = [t for t in tables if any("90.0 ±" in cell for cell in t[1])]
    assert [row[0] for row in accuracies[1:]] == [TASK]
    (losses,) = [t for t in tables if t[-1][0] == "sine-lstm1" and "2.00" in t[-1]]
    assert losses[1][1:] == ["1.00 ± 0.00", "1.00 ± 0.00", "1.00", "—"]


HOSTILE = "<script>alert(1)</script> {} | `x` *b* [a](b) $x$"


def test_names_are_escaped(tmp_path):
    runs = [
        {**one, "task": HOSTILE, "suite": HOSTILE, "machine": HOSTILE, "version": HOSTILE}
        for one in [*small(), run(f"a{HOSTILE}"), *tuning(f"a{HOSTILE}")]
    ]
    page, markdown = report(tmp_path, runs)
    assert "script" not in Tables(page).tags
    assert "<script" not in markdown.replace(r"\<script", "")
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1


def test_spans():
    document = Document("T", say("{} is <b>", Code("a`b")), (Paragraph(say("{}", Code("x"))),))
    assert "<code>a`b</code> is &lt;b&gt;" in to_html(document)
    assert r"a\`b is \<b\>" in to_markdown(document)


def test_the_same_runs_make_the_same_bytes(small_report):
    page, markdown = report(small_report.folder, small())
    assert page == small_report.page
    assert markdown == small_report.markdown


def test_the_page_loads_nothing(small_report):
    page = small_report.page
    assert not re.findall(r"<(?:script|link rel=\"stylesheet\"|img|iframe)", page)
    assert set(re.findall(r'(?<!xmlns=)(?<!xmlns:xlink=)"(https?://[^"]+)"', page)) == {
        "https://arxiv.org/abs/1811.08996"
    }


def browser():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium: install Debian's package chromium")


def open_in_browser(page, folder, width):
    """The page's DOM after its scripts, and what it wrote to the console."""
    path = folder / "opened.html"
    path.write_text(page, encoding="utf-8")
    result = subprocess.run(
        [
            browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},900", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


MEASURE = """<script>addEventListener("load", () => {
  const seen = [...document.querySelectorAll("figure svg")].filter(svg => {
    const box = svg.getBoundingClientRect();
    return box.width > 250 && box.height > 20 && box.right <= innerWidth + 1;
  });
  const page = document.documentElement;
  document.body.dataset.figures = seen.length;
  document.body.dataset.overflow = page.scrollWidth - page.clientWidth;
  document.body.dataset.ink =
    getComputedStyle(document.querySelector("figure svg path[style*=series]")).stroke;
});</script></body>"""


@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_the_page(traced_report, tmp_path, width):
    page = traced_report.page
    dom, console = open_in_browser(page.replace("</body>", MEASURE), tmp_path, width)
    assert console == []
    assert f'data-figures="{page.count("<svg")}"' in dom
    assert 'data-overflow="0"' in dom
    assert 'data-ink="rgb(' in dom  # the page's variables reach the drawings


def test_the_browser_would_tell(tmp_path):
    page = '<body><script>console.error("seen"); missing();</script></body>'
    _, console = open_in_browser(page, tmp_path, 500)
    assert len(console) == 2


def test_grey_lines_are_named(tmp_path):
    """Eight are in colour; what the others are is said, whatever they are."""
    names = ("@a", "@b", "@c", "@d", "@e", "@f", "@grey-one", "@grey-two", "@grey-three")
    others = [
        run(f"variational-hyperadam{name}", 0.5, lr=1e-3, weights=f"{index:02}" * 32)
        for index, name in enumerate(names)
    ]
    _, markdown = report(tmp_path, [*small(), *others])
    grey = markdown[markdown.index("Grey: ") :].split("\n")[0]
    assert [name for name in names if f"hyperadam{name}," in grey] == list(names[6:])
    assert "3 others" in (tmp_path / "figures/g0-legend.svg").read_text()


@pytest.mark.usefixtures("undrawn")
def test_what_an_ablation_lacks_is_said(tmp_path):
    bare = run("variational-hyperadam@no-lstm", 0.5, lr=1e-3, suite="ablations")
    page, _ = report(tmp_path, [*small(), bare])
    assert "named no-lstm, where the rule has no LSTM; ab12" in re.sub(r"<[^>]+>", "", page)
    page, _ = report(tmp_path, [*small(), {**bare, "suite": "tiny"}])
    assert "no LSTM" not in page  # somebody's file of that name
    assert {f"ablation-{name}" for name in ABLATIONS} == {
        name for name in PRESETS if name.startswith("ablation-")
    }


@pytest.mark.usefixtures("undrawn")
def test_ablations_are_compared_with_the_full_rule(tmp_path):
    """Seed by seed: without the LSTM half of the loss on one task and as much on the other; the
    mean twice as high, and one of its two runs diverged."""

    def variant(name, final, task, seed=0, **changes):
        kind = {"weights": ("11" if name == "@no-lstm" else "22") * 32, "suite": "ablations"}
        return run(
            f"variational-hyperadam{name}", final, lr=1e-3, task=task, seed=seed, **kind, **changes
        )

    tasks = (TASK, "sine-lstm1")
    full = [variant("@full", 0.5, task, seed) for task in tasks for seed in range(2)]
    bare = [
        variant("@no-lstm", final, task) for task, final in zip(tasks, (0.25, 0.5), strict=True)
    ]
    mean = [
        variant("-mean@full", 1.0, TASK),
        variant("-mean@full", 1.0, TASK, 1, diverged_at=3),
    ]
    page, _ = report(tmp_path, [*small()[:5], *full, *bare, *mean])
    (table,) = [t for t in Tables(page).tables if t[0][0] == "variant"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["@no-lstm"] == [
        "the rule has no LSTM", "0.71×", "0.71×", "1.00×", "1 of 2",
    ]  # fmt: skip
    words, *ratios, lower = rows["-mean@full"]
    assert words == "the full rule, without noise"
    assert ratios[0] == "2.00× | 1 not finite"
    assert lower == "0 of 2"
    page, _ = report(tmp_path, [*small()[:5], *full[:2], bare[1]])  # of no task in common
    (table,) = [t for t in Tables(page).tables if t[0][0] == "variant"]
    assert table[1] == ["@no-lstm", "the rule has no LSTM", "—", "—", "—", "0 of 0"]
    for alone in (bare, full):
        page, _ = report(tmp_path, [*small()[:5], *alone])
        assert "What each part is worth" not in page


@pytest.mark.usefixtures("undrawn")
def test_what_of_a_suite_was_not_run_is_said(tmp_path):
    suite = SUITES["paper-10000"]
    lacking = ("mnist-cnn1", "cifar10-cnn2")
    runs = [run(task=task, suite=suite.name) for task in suite.tasks if task not in lacking]
    _, markdown = report(tmp_path, runs)
    assert (
        "Of the suite `paper-10000` 2 of the 26 tasks were not run: `mnist-cnn1`, `cifar10-cnn2`."
        in markdown
    )
    assert "The suite `paper-10000` has runs of 10,000 steps; these are of 100." in markdown
    assert "such runs are not here" not in markdown  # of 100 steps all that is printed is there
    _, markdown = report(tmp_path, [{**made, "schedule": "cosine"} for made in runs[:1]])
    assert "The papers print figures for `mnist-mlp1-sigmoid`" in markdown
    _, markdown = report(tmp_path, [run(task=task, suite="paper-100") for task in suite.tasks])
    assert "tasks were not run" not in markdown.partition("What to keep in mind")[2]


@pytest.mark.usefixtures("undrawn")
def test_one_optimizer_alone_is_compared_with_nothing(tmp_path):
    _, markdown = report(tmp_path, [run(), run(seed=1)])
    assert "Only `adam` was run: there is nothing to compare." in markdown
    assert "interquartile mean" not in markdown
    _, markdown = report(tmp_path, [run(lr=2e-3, suite="tiny"), ours(lr=2e-3)])
    assert "A track named by a learning rate" in markdown


@pytest.mark.usefixtures("undrawn")
def test_weights_used_in_several_ways_are_traced_first(tmp_path):
    digests = {"@a": "11" * 32, "@full": "22" * 32}
    runs = small()[:5]
    for task in (TASK, "sine-lstm1"):
        for name, digest in digests.items():
            made = run(f"variational-hyperadam{name}", 0.5, lr=1e-3, task=task, weights=digest)
            runs.append({**made, "trace": trace()})
        runs.append(
            run(
                "variational-hyperadam-mean@full", 0.5, lr=1e-3, task=task, weights=digests["@full"]
            )
        )
    _, markdown = report(tmp_path, runs)
    shown = re.findall(r"`variational-hyperadam(@\w+)` on `([\w-]+)` at lr", markdown)
    assert [name for name, _ in shown] == ["@full", "@full", "@a", "@a"]


@pytest.mark.parametrize(
    ("low", "high"), [(0.63, 1.18), (0.3, 1.2), (0.5, 2.5), (0.9, 1.1), (0.01, 3), (1e-7, 10)]
)
def test_ticks_of_logarithmic_axes_are_apart(low, high):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    plots._log_ticks(axes.xaxis, most=5)
    ticks = np.log(axes.xaxis.get_ticklocs())
    assert 2 <= len(ticks) <= 6
    assert np.diff(ticks).min() >= np.log(high / low) / 5 - 1e-9


def test_a_folder_of_nothing(tmp_path):
    with pytest.raises(RunError, match="no runs to report: it is empty"):
        report(tmp_path, [])
