from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The examples write beside themselves."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate's settings are one for a process, and the Trainer of transformers has them too."""
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()
