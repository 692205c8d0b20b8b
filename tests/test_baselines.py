from __future__ import annotations

import sys

import pytest
import torch

from conftest import make_weights
from hyperadam import save_weights
from hyperadam.baselines import (
    HAND_DESIGNED,
    LEARNED,
    OPTIMIZER_NAMES,
    describe_learned,
    make_baseline,
    make_baselines,
)
from hyperadam.errors import ConfigError, HyperAdamError, MissingDependencyError, WeightsError
from hyperadam.rule import HyperAdamRule
from hyperadam.weights import bundled_weights, load_weights

BUNDLED = set(bundled_weights())


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_every_optimizer_descends_at_its_learning_rate(name):
    baseline = make_baseline(name)
    assert baseline.name == name
    assert baseline.learned == (name in LEARNED)
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    lr = baseline.default_lr if baseline.learned else 1e-2
    optimizer = baseline.build([param], lr, 0)
    assert {group["lr"] for group in optimizer.param_groups} == {lr}
    if hasattr(optimizer, "train"):
        optimizer.train()
    start = float(param.detach().square().sum())
    for _ in range(30):
        optimizer.zero_grad()
        param.square().sum().backward()
        optimizer.step()
    assert float(param.detach().square().sum()) < start


@pytest.mark.parametrize(
    "name", [name for name in HAND_DESIGNED if name not in ("schedulefree-adamw", "adabound")]
)
def test_the_default_is_the_librarys(name):
    param = torch.nn.Parameter(torch.ones(1))
    own = HAND_DESIGNED[name].build([param], 1.0, 0)
    default = type(own)([param]).defaults["lr"]
    assert HAND_DESIGNED[name].default_lr == default


def test_other_defaults_are_their_libraries():
    from pytorch_optimizer import AdaBound
    from schedulefree import AdamWScheduleFree

    param = torch.nn.Parameter(torch.ones(1))
    assert (
        HAND_DESIGNED["schedulefree-adamw"].default_lr == AdamWScheduleFree([param]).defaults["lr"]
    )
    assert HAND_DESIGNED["adabound"].default_lr == AdaBound([param]).defaults["lr"]


def test_momentum_and_amsgrad_are_what_they_say():
    param = torch.nn.Parameter(torch.ones(1))
    assert HAND_DESIGNED["momentum"].build([param], 1.0, 0).defaults["momentum"] == 0.9
    assert HAND_DESIGNED["amsgrad"].build([param], 1.0, 0).defaults["amsgrad"]


def moved(name, seed):
    param = torch.nn.Parameter(torch.zeros(50))
    param.grad = torch.ones(50)
    make_baseline(name).build([param], 1.0, seed).step()
    return param.detach()


def test_noise_comes_from_the_seed():
    assert torch.equal(moved("variational-hyperadam", 1), moved("variational-hyperadam", 1))
    assert not torch.equal(moved("variational-hyperadam", 1), moved("variational-hyperadam", 2))
    mean = moved("variational-hyperadam-mean", 1)
    assert torch.equal(mean, moved("variational-hyperadam-mean", 2))
    isotropic = moved("variational-hyperadam-isotropic", 1)
    assert not torch.equal(isotropic, mean)


def test_settings_reach_the_optimizer():
    param = torch.nn.Parameter(torch.zeros(3))
    for name, calibrate in (
        ("variational-hyperadam", True),
        ("variational-hyperadam-uncalibrated", False),
    ):
        assert make_baseline(name).build([param], 1.0, 0).calibrate is calibrate


def test_weights_of_a_file(tmp_path):
    save_weights(make_weights(), tmp_path / "mine.safetensors")
    baseline = make_baseline(f"variational-hyperadam@{tmp_path}/mine.safetensors")
    assert (baseline.name, baseline.default_lr) == ("variational-hyperadam@mine", 1e-2)
    assert baseline.weights == make_weights().digest()
    (tmp_path / "run7").mkdir()
    save_weights(make_weights(), tmp_path / "run7" / "weights.safetensors")
    of_a_run = make_baseline(f"variational-hyperadam@{tmp_path}/run7/weights.safetensors")
    assert of_a_run.name == "variational-hyperadam@run7"
    assert make_baseline("variational-hyperadam@default").name == "variational-hyperadam@default"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("adma", ConfigError, "did you mean 'adam'"),
        ("adam@default", ConfigError, "adam takes no weights"),
        ("variational-hyperadam@nowhere", WeightsError, "unknown weights 'nowhere'"),
        ("variational-hyperadam@no/file.safetensors", WeightsError, "no/file.safetensors"),
        ("hyperadam@default", WeightsError, "these are weights of variational-hyperadam"),
    ],
)
def test_bad_names(text, error, message):
    with pytest.raises(error, match=message):
        make_baseline(text)


def test_one_name_for_two_files_is_refused(tmp_path):
    for folder, seed in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        save_weights(make_weights(seed=seed), tmp_path / folder / "mine.safetensors")
    names = [f"variational-hyperadam@{tmp_path}/{folder}/mine.safetensors" for folder in "ab"]
    with pytest.raises(ConfigError, match="both be called variational-hyperadam@mine"):
        make_baselines(names)
    assert [each.name for each in make_baselines(["adam", "sgd", "adam"])] == ["adam", "sgd"]
    with pytest.raises(HyperAdamError, match="name one or more optimizers: sgd, "):
        make_baselines([])


@pytest.mark.parametrize("name", ["schedulefree-adamw", "adabound"])
def test_a_missing_library_says_how_to_get_it(name, monkeypatch):
    for library in ("schedulefree", "pytorch_optimizer"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[baselines\]'"):
        make_baseline(name).build([torch.nn.Parameter(torch.ones(1))], 1e-3, 0)


def test_the_ancestors_weights_are_their_own():
    for name in ("hyperadam", "rnnprop", "dmoptimizer"):
        if name in BUNDLED:
            assert make_baseline(name).default_lr == 1e-3
    assert HyperAdamRule.name in BUNDLED


def test_weights_are_described_by_their_digest():
    lite, default = (load_weights(name).digest() for name in ("lite", "default"))
    vh = "variational-hyperadam"
    assert describe_learned(vh, default).endswith("with the bundled weights default")
    assert "changed in channels, fan_in_base, " in describe_learned(vh, default)
    paper = describe_learned(f"{vh}@paper", load_weights("paper").digest())
    assert "Variational HyperAdam (Wang et al., TPAMI 2022), with the" in paper
    assert describe_learned(f"{vh}@lite", lite).endswith("with the bundled weights lite")
    rnnprop = load_weights("rnnprop").digest()
    assert describe_learned("rnnprop", rnnprop).endswith(
        "with the bundled weights rnnprop, of 100,000 inner steps of the papers' recipe"
    )
    assert describe_learned(vh, lite).endswith("weights that were bundled before as default")
    assert describe_learned(f"{vh}@default", lite).endswith("weights from a file named default")
