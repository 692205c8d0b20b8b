from __future__ import annotations

import pytest
import torch

from conftest import make_weights, random_theta
from hyperadam import import_official
from hyperadam.errors import WeightsError
from hyperadam.rule import RULES, VariationalHyperAdamRule


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("as_file", [False, True])
def test_each_rule_is_recognised(rule_name, layers, as_file, tmp_path):
    rule = RULES[rule_name](channels=5, state_layers=layers)
    theta = random_theta(rule)
    source = theta
    if as_file:
        source = tmp_path / "theta.pkl"
        torch.save(theta, source)
    weights = import_official(source, lr=0.5, licence="mine")
    assert weights.rule == rule
    assert (weights.lr, weights.licence) == (0.5, "mine")
    for name, value in theta.items():
        assert torch.equal(weights.theta[name], value)


def test_without_var_block():
    rule = VariationalHyperAdamRule(channels=4, var_block=False)
    assert import_official(random_theta(rule)).rule == rule


def test_the_numbers_are_copied():
    theta = random_theta(VariationalHyperAdamRule(channels=4))
    weights = import_official(theta)
    theta["lstm1.bias"].zero_()
    assert weights.theta["lstm1.bias"].any()


class Other:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(2)}, "none of the four rules' layouts"),
        ({}, "none of the four rules' layouts"),
        ({"lstm1.weight": torch.zeros(8, 4)}, "none of the four rules' layouts"),
        (torch.zeros(3), "does not hold a mapping"),
        ({"a": 1}, "does not hold a mapping"),
        ({1: torch.zeros(2)}, "does not hold a mapping"),
        ({"lstm1.weight": torch.eye(3).to_sparse()}, "does not hold a mapping"),
        ({"lstm1.weight": torch.zeros(8, 4, device="meta")}, "does not hold a mapping"),
        (
            {"lstm1.weight": torch.zeros(8, 4), "pre_linear.weight": torch.zeros(20)},
            "none of the four rules' layouts",
        ),
        ({"lstm1.weight_hh": torch.zeros(8)}, "none of the four rules' layouts"),
        ({"lstm1.weight_hh": torch.zeros(8, 0)}, "none of the four rules' layouts"),
        (Other(), "can't be read"),
    ],
)
def test_foreign_files(tmp_path, content, message):
    path = tmp_path / "x.pkl"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=message):
        import_official(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(WeightsError, match="no file at"):
        import_official(tmp_path / "none.pkl")
    (tmp_path / "text.pkl").write_text("hello")
    with pytest.raises(WeightsError, match="can't be read"):
        import_official(tmp_path / "text.pkl")


def test_four_features_are_not_theirs():
    rule = VariationalHyperAdamRule(channels=4, moment_decays=(0.9, 0.99))
    with pytest.raises(WeightsError, match="none of the four"):
        import_official(make_weights(rule).theta)
