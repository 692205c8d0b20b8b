from __future__ import annotations

import pytest

from hyperadam.errors import ConfigError
from hyperadam.kernels import step_function
from hyperadam.rule import VariationalHyperAdamRule


def test_auto_and_reference_are_the_rules_own_step():
    rule = VariationalHyperAdamRule()
    assert step_function(rule) == rule.step
    assert step_function(rule, "reference") == rule.step


def test_unknown_backend():
    with pytest.raises(ConfigError, match="unknown backend 'referense': did you mean 'reference'"):
        step_function(VariationalHyperAdamRule(), "referense")
