"""The one-way map of docs/architecture.md, enforced on every import statement."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import hyperadam

ROOT = Path(hyperadam.__file__).parent

BASE = {"errors"}

# Each part of the package, and the parts that it may import.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": BASE,
    "interrupt": set(),
    "schedule": set(),
    "source": set(),
    "device": BASE,
    "ranks": BASE,
    "config": BASE,
    "tensor_file": BASE | {"files"},
    "rule": BASE,
    "tasks": BASE,
    "kernels": BASE | {"rule"},
    "weights": BASE | {"rule", "config", "schedule", "tensor_file"},
    "optim": BASE | {"rule", "kernels", "schedule", "weights"},
    "metatrain": BASE
    | {
        "config",
        "device",
        "files",
        "interrupt",
        "kernels",
        "ranks",
        "rule",
        "schedule",
        "tasks",
        "tensor_file",
        "weights",
    },
    "presets": BASE | {"rule", "metatrain"},
    "evaluation": BASE
    | {
        "baselines",
        "device",
        "files",
        "interrupt",
        "optim",
        "ranks",
        "rule",
        "schedule",
        "source",
        "tasks",
    },
    "baselines": BASE | {"optim", "weights"},
    "demo": BASE | {"baselines", "evaluation", "optim", "tasks", "weights", "files"},
    "estimate": BASE | {"kernels", "optim", "weights"},
    "console": BASE | {"demo", "estimate", "evaluation", "metatrain", "tasks", "weights"},
    "cli": BASE
    | {
        "baselines",
        "console",
        "demo",
        "estimate",
        "evaluation",
        "metatrain",
        "presets",
        "ranks",
        "rule",
        "schedule",
        "source",
        "tasks",
        "weights",
    },
    "__main__": {"cli"},
    "__init__": {"optim", "weights"},
}

# What may be imported from outside, where that is restricted.
OUTSIDE = {
    "rule": {"torch"},
    "tasks": {"torch"},
    "optim": {"torch"},
    "kernels": {"torch", "triton"},
}

# Libraries that tasks import inside the functions that load data.
LAZY = {"tasks": {"datasets", "numpy", "pyarrow", "PIL"}}


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules():
    return sorted(ROOT.rglob("*.py"))


def imported(path):
    """Full names that a module imports, each with whether that happens at import time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "hyperadam":
                for alias in node.names:
                    yield f"hyperadam.{alias.name}", id(node) in at_top
            else:
                yield node.module, id(node) in at_top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in at_top


def test_every_part_has_a_place_on_the_map():
    assert {part_of(path) for path in modules()} == set(ALLOWED)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    part = part_of(path)
    for name, top in imported(path):
        root, *rest = name.split(".")
        if root == "hyperadam":
            assert rest, f"{path}: imports the package's public names"
            assert rest[0] in ALLOWED[part] | {part}, f"{part} imports {name}"
        elif part in OUTSIDE and root not in sys.stdlib_module_names:
            allowed = OUTSIDE[part] | (LAZY.get(part, set()) if not top else set())
            assert root in allowed, f"{part} imports {name}"


def test_the_map_has_no_cycle():
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        free = {part for part, uses in ALLOWED.items() if uses <= done} - done
        assert free, f"a cycle among {set(ALLOWED) - done}"
        done |= free


def test_the_optimizer_pulls_in_no_data_sets():
    """Importing the package loads neither tasks nor training nor what they use."""
    import subprocess

    code = (
        "import sys, hyperadam\n"
        "bad = [m for m in ('hyperadam.tasks', 'hyperadam.metatrain', 'datasets', "
        "'triton', 'matplotlib', 'tensorboardX', 'rich', 'huggingface_hub') if m in sys.modules]\n"
        "sys.exit(', '.join(bad) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_nothing_is_pickled():
    for path in modules():
        names = [name.split(".")[0] for name, _ in imported(path)]
        assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve"} & set(names), path
        text = path.read_text(encoding="utf-8").replace("safetensors.torch.save(", "")
        for call in ("torch.save(", "weights_only=False"):
            assert call not in text, path
