from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from hyperadam import Weights
from hyperadam.rule import RULES, Rule, VariationalHyperAdamRule
from hyperadam.tasks import make_generator

# Derandomized: a test that fails, fails for everyone.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")

# Before anything imports Triton, as PyTorch does when first an optimizer is made.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests' tensors are small: a second thread only costs.
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


def random_theta(rule: Rule, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """Theta at which every part of a rule acts: initial values, with biases that are not 0."""
    generator = make_generator(seed, "theta")
    theta = rule.init_theta(generator, torch.float64)
    return {
        name: (value + 0.1 * torch.randn(value.shape, generator=generator)).to(dtype)
        for name, value in theta.items()
    }


def make_weights(rule: Rule | None = None, seed: int = 0) -> Weights:
    rule = rule if rule is not None else VariationalHyperAdamRule(channels=6)
    return Weights(rule=rule, theta=random_theta(rule, seed=seed), lr=1e-2)


@pytest.fixture
def weights() -> Weights:
    return make_weights()


@pytest.fixture(params=sorted(RULES))
def rule_name(request: pytest.FixtureRequest) -> str:
    return request.param


def _shared(*names: str) -> Path:
    """A file of the material that lies beside a checkout; the test is skipped where it doesn't."""
    root = Path(os.environ.get("HYPERADAM_SHARED", Path(__file__).parents[2] / "shared"))
    path = root.joinpath(*names)
    if not path.exists():
        pytest.skip(f"no {'/'.join(names)} in {root}")
    return path


@pytest.fixture
def official_path() -> Path:
    return _shared("official", "params-epoch-100.pkl")


@pytest.fixture
def data_dir() -> Path:
    _shared("data", "mnist-train.parquet")
    return _shared("data")


COLOURS = {"n01": (200, 0, 0), "n02": (0, 200, 0), "n03": (0, 0, 200)}


@pytest.fixture(scope="session")
def image_dir(tmp_path_factory):
    """A folder with ``imagenet``: three classes of one colour each, files of many kinds."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("data")
    for number, (name, colour) in enumerate(COLOURS.items()):
        for split, count in (("train", 4), ("val", 2)):
            folder = root / "imagenet" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                plain = image.new("RGB", (60 + 20 * index, 80 + 10 * number), colour)
                plain.save(folder / f"{name}_{index}.JPEG", quality=95)
            (folder / "notes.txt").write_text("no image")
            (folder / "._a.JPEG").write_text("no image")
    train = root / "imagenet" / "train"
    image.new("CMYK", (90, 70), (0, 255, 255, 55)).save(train / "n01" / "ink.jpg")
    image.new("RGBA", (70, 90), (0, 200, 0, 255)).save(train / "n02" / "clear.png")
    (train / "list.txt").write_text("no class")
    (train / ".cache").mkdir()
    return root
