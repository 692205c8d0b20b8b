"""The command line as a user meets it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import hyperadam
import hyperadam.estimate
from conftest import make_weights, random_theta
from hyperadam import load_weights, save_weights
from hyperadam.cli import run
from hyperadam.rule import VariationalHyperAdamRule


def refused(capsys, *arguments):
    """The one line that a mistake gives."""
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("hyperadam: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: COMMAND"),
        ("dmeo", "invalid choice: 'dmeo'"),
        ("demo --seeds 0", "--seeds: must be at least 1"),
        ("demo --seeds two", "--seeds: invalid integer value: 'two'"),
        ("demo --steps -5", "--steps: must be at least 1"),
        ("demo --out picture.gif", "must end in .png"),
        ("demo --out no/such/folder/a.png", "no folder"),
        ("demo --task digits-mlp1-reluu", "did you mean 'digits-mlp1-relu'"),
        ("demo --data-dir nowhere", "no folder nowhere"),
        ("demo --out .", "must end in .png"),
        ("estimate", "required: --params"),
        ("estimate --params many", "such as 11200000, 11.2M, 270k or 1.5B; got 'many'"),
        ("estimate --params 0", "a whole number from 1"),
        ("estimate --params 1k --weights mine", "unknown weights 'mine'"),
        ("estimate --params 1k --state-dtype int8", "invalid choice: 'int8'"),
        ("estimate --params 1k --device abacus", "the device 'abacus' can't be used"),
        ("estimate --params 1k --device meta", "must be cpu or cuda"),
        ("meta-train --out OUT --resume --licence MIT", "go with a preset"),
        ("meta-train --out OUT --preset smoke --set rule=[1]", "unknown rule"),
        ("demo --weights mine", "unknown weights 'mine'"),
        ("evaluate --out OUT", "required: --suite"),
        ("evaluate --suite digits", "required: --out"),
        ("evaluate --suite digts --out OUT", "did you mean 'digits'"),
        ("evaluate --suite digits --out OUT --seeds 0", "--seeds: must be at least 1"),
        ("evaluate --suite digits --out OUT --jobs 0", "--jobs: must be at least 1"),
        ("evaluate --suite digits --out OUT --optimizers adma", "did you mean 'adam'"),
        ("evaluate --suite digits --out OUT --optimizers ,", "name one or more optimizers"),
        (
            "evaluate --suite digits --out OUT --tasks nope",
            "unknown task of the suite digits 'nope'",
        ),
        (
            "evaluate --suite digits --out OUT --tasks sine-lstm2",
            "'sine-lstm2': did you mean 'sine-lstm1'? (it is in: paper-100, paper-2000, ",
        ),
        (
            "evaluate --suite digits --out OUT --tasks digits-*,mnist-*",
            "task of the suite digits 'mnist-*'",
        ),
        (
            "evaluate --suite paper-100 --out OUT --tasks cifar10-resnet20",
            "(it is in: resnet)",
        ),
        ("evaluate --suite digits --out /proc/out", "/proc/out can't be made a folder: "),
        ("evaluate --suite digits --out OUT --tasks ,", "--tasks: must be names or patterns"),
        ("evaluate --suite digits --out OUT --lr fast", "must be default, grid or a number"),
        ("evaluate --suite digits --out OUT --lr 0", "lr must be a positive number"),
        ("evaluate --suite digits --out OUT --schedule step", "invalid choice: 'step'"),
        ("evaluate --suite digits --out OUT --data-dir nowhere", "no folder nowhere"),
        ("report", "required: DIR"),
        ("report nowhere", "no results in nowhere"),
        ("meta-train --preset smoke", "required: --out"),
        ("meta-train --out OUT", "name a recipe with --preset"),
        ("meta-train --out OUT --preset smok", "unknown preset 'smok': did you mean 'smoke'"),
        ("meta-train --out OUT --preset smoke --set lr", "given as key=value"),
        ("meta-train --out OUT --preset smoke --set lr=-1", "lr must be a positive number"),
        ("meta-train --out OUT --preset smoke --set rule.x=1", "unknown setting 'x'"),
        ("meta-train --out OUT --resume --set lr=1", "go with a preset"),
        ("meta-train --out OUT --resume", "holds no run to resume"),
        ("meta-train --out OUT --preset smoke --data-dir nowhere", "no folder nowhere"),
        ("meta-train --out OUT --preset paper --data-dir .", "mnist-train.parquet"),
        ("meta-train --out OUT --preset smoke --checkpoint-seconds -1", "must be at least 0.0"),
        ("weights", "required: COMMAND"),
        ("weights show nobody", "unknown weights 'nobody'"),
        ("weights show ./none.safetensors", "no file at"),
        ("weights show some/where.pkl", "import-official some/where.pkl where.safetensors"),
        ("weights show there", "(the file of that name is ./there)"),
        ("weights join lite nobody OUT.safetensors", "unknown weights 'nobody'"),
        ("weights join lite rnnprop OUT.safetensors", "with candidates and preprocessing"),
        ("weights import-official none.pkl OUT.safetensors", "no file at none.pkl"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    assert message in refused(capsys, *arguments.split())
    assert not (tmp_path / "OUT").exists() or not any(
        path.name != ".lock" for path in (tmp_path / "OUT").iterdir()
    )


def test_a_file_where_a_folder_should_be(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(capsys, "meta-train", "--preset", "smoke", "--out", str(tmp_path / "file"))
    assert "file" in line


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["demo"],
        ["estimate"],
        ["meta-train"],
        ["weights"],
        ["weights", "show"],
        ["weights", "join"],
        ["weights", "import-official"],
    ],
    ids=" ".join,
)
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run([*arguments, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: hyperadam")
    assert max(map(len, text.splitlines())) <= 100
    if arguments == ["meta-train"]:
        for name in ("digits-stable", "trajectory_length", "candidate_bound", "rnnprop"):
            assert name in text.replace("-\n", "-")


def test_version(capsys):
    with pytest.raises(SystemExit):
        run(["--version"])
    assert capsys.readouterr().out == f"hyperadam {hyperadam.__version__}\n"


def test_meta_train_then_show_then_use(capsys, tmp_path):
    out = tmp_path / "run"
    settings = ["--preset", "smoke", "--set", "inner_runs=2", "--set", "seed=4"]
    assert run(["meta-train", *settings, "--licence", "MIT", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"weights: {out / 'weights.safetensors'}",
        f"curve: {out / 'meta_loss.png'}",
    ]
    for shown in ("meta-loss", "loss", "KL", "steps/s", "4/4"):
        assert shown in captured.err.replace("\n", "")
    assert run(["weights", "show", str(out / "weights.safetensors")]) == 0
    text = capsys.readouterr().out
    for shown in ("smoke inner_runs=2 seed=4", "MIT", "lstm1.weight", "(16, 8)", "channels"):
        assert shown in text
    param = torch.ones(3, requires_grad=True)
    optimizer = hyperadam.VariationalHyperAdam([param], weights=out / "weights.safetensors")
    param.square().sum().backward()
    optimizer.step()
    assert "holds a run" in refused(capsys, "meta-train", *settings, "--out", str(out))


def test_weights_list(capsys):
    assert run(["weights", "list"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"default\W+variational-hyperadam\W+9937", text)


def test_import_official(capsys, tmp_path):
    theta = random_theta(VariationalHyperAdamRule())
    torch.save(theta, tmp_path / "theta.pkl")
    source, target = str(tmp_path / "theta.pkl"), str(tmp_path / "w.safetensors")
    assert run(["weights", "import-official", source, target]) == 0
    assert "variational-hyperadam, 5421 numbers" in capsys.readouterr().out
    assert torch.equal(load_weights(target).theta["lstm1.weight"], theta["lstm1.weight"])
    (tmp_path / "bad.pkl").write_bytes(b"no tensors")
    line = refused(capsys, "weights", "import-official", str(tmp_path / "bad.pkl"), target)
    assert "can't be read" in line
    assert "weights_only" not in line
    assert run(["weights", "import-official", source, target, "--licence", "MIT"]) == 0
    assert load_weights(target).licence == "MIT"
    capsys.readouterr()
    line = refused(capsys, "weights", "import-official", source, str(tmp_path / "w.pt"))
    assert "ends in .safetensors" in line


def test_join(capsys, tmp_path):
    target = str(tmp_path / "joint.safetensors")
    assert run(["weights", "join", "lite", "lite", target]) == 0
    assert "14 channels, to be used at lr 0.0005" in capsys.readouterr().out
    assert load_weights(target).licence == "Apache-2.0"
    line = refused(capsys, "weights", "join", "lite", "lite", str(tmp_path / "joint.pt"))
    assert "ends in .safetensors" in line


def test_demo(capsys, tmp_path):
    picture = tmp_path / "demo.png"
    save_weights(make_weights(), tmp_path / "w.safetensors")
    assert (
        run(f"demo --seeds 2 --steps 3 --out {picture} --weights {tmp_path}/w.safetensors".split())
        == 0
    )
    captured = capsys.readouterr()
    for shown in ("Variational HyperAdam", "Adam, best lr ", "Adam, default lr", "±", "0.01"):
        assert shown in captured.out
    assert "17/17" in captured.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_estimate(capsys):
    assert run(["estimate", "--params", "2.5k", "--state-dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    for shown in ("2,500 parameters", "bfloat16", "170 numbers, 340 bytes", "2 numbers, 8 bytes"):
        assert shown in text
    for shown in ("850 kB", "30 kB", "880 kB", "20 kB", "it fits", "measured here with 2,500"):
        assert shown in text
    assert "linearly" not in text


def test_estimate_warns_of_what_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr(hyperadam.estimate, "MEASURED_PARAMS", 1000)
    monkeypatch.setattr(hyperadam.estimate, "MEASURED_PARAMS_REFERENCE", 1000)
    assert run(["estimate", "--params", "1000B"]) == 0
    text = capsys.readouterr().out
    assert "WARNING: it does not fit: 692 TB are needed" in text
    assert "--state-dtype bfloat16 would need 352 TB" in text
    assert "measured here with 1,000 parameters" in text
    assert "scaled linearly" in text


def test_tasks(capsys):
    assert run(["tasks", "cifar10-cnn2*", "sine-*1"]) == 0
    text = capsys.readouterr().out
    lines = [line.split("│")[1:4] for line in text.splitlines() if line.startswith("│")]
    cifar10 = "cifar10-{train,test}.parquet, or the hub's uoft-cs/cifar10"
    assert [tuple(cell.strip() for cell in cells) for cells in lines] == [
        ("cifar10-cnn2", "148,442", cifar10),
        ("cifar10-cnn2-bn", "148,634", cifar10),
        ("cifar10-cnn2-dropout", "148,442", cifar10),
        ("sine-lstm1", "1,781", "none"),
    ]
    assert run(["tasks"]) == 0
    assert "digits-vit" in capsys.readouterr().out
    assert run(["tasks", "mnist-cnn3"]) == 2
    assert "did you mean 'mnist-cnn2'" in capsys.readouterr().err


def test_demo_of_a_task_without_accuracy(tmp_path, capsys):
    out = str(tmp_path / "a.png")
    assert run(["demo", "--task", "sine-lstm1", "--seeds", "1", "--steps", "2", "--out", out]) == 0
    assert "–" in capsys.readouterr().out


def test_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "hyperadam", "weights", "show", "nobody"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("hyperadam: unknown weights 'nobody'")
    assert "Traceback" not in result.stderr


def test_evaluate_and_report(tmp_path, capsys):
    command = [
        "evaluate", "--suite", "digits", "--tasks", "digits-mlp1-*", "--optimizers",
        "adam,variational-hyperadam", "--lr", "default", "--steps", "12", "--seeds", "2",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert run(command) == 0
    assert "16 runs made, 0 were in the folder" in capsys.readouterr().out
    assert run(command) == 0
    assert "0 runs made, 16 were in the folder" in capsys.readouterr().out
    assert run(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "digits-mlp1-tanh" in page
    assert "variational-hyperadam" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
