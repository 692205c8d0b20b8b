"""What is written is true: examples run, names exist, public things are explained."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hyperadam
from hyperadam.baselines import OPTIMIZER_NAMES
from hyperadam.tasks import TASKS

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
PACKAGES = ["hyperadam"] + [
    f"hyperadam.{name}"
    for name in ("rule", "weights", "optim", "kernels", "tasks", "metatrain", "evaluation")
]


def code_blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


PYTHON = [
    pytest.param(block, id=f"{path.name}-{index}")
    for path in DOCUMENTS
    for index, block in enumerate(code_blocks(path, "python"))
]


def test_the_counts_are_true():
    text = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert f"`hyperadam tasks` lists {len(TASKS)} tasks" in text
    assert f"the suites and {len(OPTIMIZER_NAMES)} optimizers" in text


@pytest.mark.parametrize("block", PYTHON)
def test_python_examples_run(block, tmp_path, monkeypatch):
    (tmp_path / "results").symlink_to(REPOSITORY / "results")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {"__name__": "example"})


def test_there_is_an_example_of_ten_lines():
    (first, *_) = code_blocks(REPOSITORY / "README.md", "python")
    assert "hyperadam.VariationalHyperAdam" in first
    assert len(first.strip().splitlines()) <= 14


def test_the_figures_are_the_reports():
    made = subprocess.run(
        [sys.executable, "scripts/readme-table", "results/paper-100/report.md"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout in (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_parse(path):
    """Each ``hyperadam ...`` line of a shell block has known commands and options."""
    from hyperadam.cli import _parser

    for block in code_blocks(path, "(?:bash|sh|console)"):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split()
            if words[:1] == ["hyperadam"] and not {"--help", "--version"} & set(words):
                _parser().parse_args(words[1:])


def modules():
    for info in pkgutil.walk_packages(hyperadam.__path__, "hyperadam."):
        optional = info.name.endswith("triton_passes") and not importlib.util.find_spec("triton")
        if not info.name.endswith("__main__") and not optional:
            yield importlib.import_module(info.name)


def test_docstring_examples():
    attempted = 0
    for module in modules():
        result = doctest.testmod(module)
        assert result.failed == 0, module
        attempted += result.attempted
    assert attempted > 0


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_explained(name):
    package = importlib.import_module(name)
    assert package.__doc__
    for public in package.__all__:
        thing = getattr(package, public)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        if not thing.__module__.startswith("hyperadam"):
            continue  # an alias of something of another library
        doc = thing.__doc__ or ""
        assert doc
        assert not doc.startswith(f"{public}("), f"{public} has a generated docstring only"
        if inspect.isfunction(thing):
            for parameter in inspect.signature(thing).parameters:
                short = len(inspect.signature(thing).parameters) == 1
                assert short or re.search(rf"\b{parameter}\b", doc), f"{public}: {parameter}"
        elif dataclasses.is_dataclass(thing):
            for field in dataclasses.fields(thing):
                inherited = any(field.name in (base.__doc__ or "") for base in thing.__mro__)
                assert inherited, f"{public}.{field.name}"


def test_the_changelog_has_this_version():
    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {hyperadam.__version__}" in text
