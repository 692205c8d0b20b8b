from __future__ import annotations

import warnings

import pytest
import torch

from conftest import random_theta
from hyperadam.errors import ConfigError
from hyperadam.kernels import (
    ReferenceRule,
    choose_backend,
    cpu,
    differentiable_rule,
    dispatch,
    tiled_rule,
    triton,
)
from hyperadam.kernels.fused import FusedTiledRule
from hyperadam.kernels.tiled import ReferenceTiledRule
from hyperadam.rule import RULES, HyperAdamRule, VariationalHyperAdamRule

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())


def choose(backend, rule, dtype=torch.float32, device=CPU):
    return choose_backend(backend, rule, dtype, device)


def test_auto_takes_the_kernel_where_it_serves():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for channels in (1, 4, 20, 32):
            assert choose("auto", VariationalHyperAdamRule(channels=channels)) == "cpu"
        assert choose("auto", VariationalHyperAdamRule(), torch.float64) == "cpu"


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (VariationalHyperAdamRule(channels=33), "at most 32 channels, not 33"),
        (VariationalHyperAdamRule(state_layers=2), "one state layer, not 2"),
        (VariationalHyperAdamRule(moment_decays=(0.5,) * 9), "at most 8 moment decays, not 9"),
        (VariationalHyperAdamRule(lstm=False), "does not have lstm=False"),
        (VariationalHyperAdamRule(preprocessing=False), "does not have preprocessing=False"),
        (HyperAdamRule(), "serves variational-hyperadam only, not hyperadam"),
    ],
)
def test_auto_takes_the_reference_for_others_and_says_so_once(rule, reason):
    with pytest.warns(RuntimeWarning, match=f"reference backend.*{reason}"):
        assert choose("auto", rule) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", rule) == "reference"
    with pytest.raises(ConfigError, match=f"backend 'cpu' can't serve: .*{reason}"):
        choose("cpu", rule)


def test_where_the_kernel_was_not_built(monkeypatch):
    monkeypatch.setattr(cpu, "_reason", "it was not built")
    rule = VariationalHyperAdamRule(channels=4)
    with pytest.warns(RuntimeWarning, match="it was not built"):
        tiled = tiled_rule(rule, random_theta(rule))
    assert isinstance(tiled, ReferenceTiledRule)
    with pytest.raises(ConfigError, match="can't serve: it was not built"):
        tiled_rule(rule, random_theta(rule), backend="cpu")


def test_the_reference_serves_all():
    for rule_class in RULES.values():
        for dtype in (torch.float32, torch.float64):
            assert choose("reference", rule_class(), dtype) == "reference"


def test_a_backend_is_refused_on_another_device():
    with pytest.raises(ConfigError, match="runs on the CPU, not on cuda"):
        choose("cpu", VariationalHyperAdamRule(), device=torch.device("cuda"))


def test_a_gpu_has_the_triton_kernel(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: name == "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("CC", "cc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in ("auto", "triton"):
            assert choose(backend, VariationalHyperAdamRule(), device=cuda) == "triton"
    with pytest.raises(ConfigError, match="at most 32 channels, not 33"):
        choose("triton", VariationalHyperAdamRule(channels=33), device=cuda)
    with pytest.warns(RuntimeWarning, match="slower than the triton kernel: .* in float32, not"):
        assert choose("auto", VariationalHyperAdamRule(), torch.float64, cuda) == "reference"


def test_a_gpu_without_triton(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match=r"reference backend.*pip install '\.\[triton\]'"):
        assert choose("auto", VariationalHyperAdamRule(), device=cuda) == "reference"
    with pytest.raises(ConfigError, match="backend 'triton' can't serve: Triton is not installed"):
        choose("triton", VariationalHyperAdamRule(), device=cuda)


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="backend 'triton' can't serve: it needs a CUDA device"):
        choose("triton", VariationalHyperAdamRule())


def test_meta_training_has_no_triton_kernel():
    with pytest.raises(ConfigError, match="'triton' can't serve: it has no backward pass"):
        differentiable_rule(VariationalHyperAdamRule(), "triton")


def test_meta_training_on_a_gpu_is_the_reference():
    cuda, rule = torch.device("cuda"), VariationalHyperAdamRule()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in ("auto", "reference"):
            assert isinstance(differentiable_rule(rule, backend, cuda), ReferenceRule)
    with pytest.raises(ConfigError, match="'cpu' can't serve: it runs on the CPU, not on cuda"):
        differentiable_rule(rule, "cpu", cuda)


def test_tiled_rule_of_each_backend():
    rule = VariationalHyperAdamRule(channels=4)
    theta = random_theta(rule)
    assert isinstance(tiled_rule(rule, theta, backend="reference"), ReferenceTiledRule)
    for backend in ("auto", "cpu"):
        assert isinstance(tiled_rule(rule, theta, backend=backend), FusedTiledRule)


def test_unknown_backend():
    with pytest.raises(ConfigError, match="unknown backend 'referense': did you mean 'reference'"):
        choose("referense", VariationalHyperAdamRule())
