"""The authors' layout of theta, turned into weights (docs/method.md has its names)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hyperadam.errors import WeightsError
from hyperadam.rule import (
    DMoptimizerRule,
    HyperAdamRule,
    RNNpropRule,
    Rule,
    VariationalHyperAdamRule,
)
from hyperadam.weights.store import Weights

RELEASED_DIGEST = "af65806b846e7afb34f668b61caaa6bef8a934596ab7b6e562135e0fc73c8ca1"
"""Of the Variational HyperAdam weights that the authors released, ``params-epoch-100.pkl``."""


def import_official(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    *,
    lr: float = 1e-3,
    licence: str = "GPL-3.0",
) -> Weights:
    """Weights from the authors' layout, for any of the four rules.

    The rule and its sizes are read off the names and shapes.

    Args:
        path_or_state_dict: a file of ``torch.save``, read with ``weights_only=True``, or the
            mapping that it holds.
        lr: the learning rate they were meta-trained for; 1e-3 for the released ones.
        licence: of the numbers; the authors release theirs under GPL-3.0.

    Raises:
        WeightsError: no such file, not readable, or not the layout of one of the four rules.
    """
    state_dict: object = path_or_state_dict
    source = "a state dict"
    if isinstance(path_or_state_dict, str | Path):
        source = Path(path_or_state_dict).name
        state_dict = _read(Path(path_or_state_dict))
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        for name, value in state_dict.items()
    ):
        raise WeightsError(f"{source} does not hold a mapping of names to plain tensors")
    theta = {name: value.detach().cpu().clone() for name, value in state_dict.items()}
    try:
        rule = _recognise(theta)
    except (KeyError, IndexError, ValueError):  # a name, a dimension or a size that is not theirs
        raise WeightsError(
            f"{source} has none of the four rules' layouts: it holds {sorted(theta)}"
        ) from None
    return Weights(
        rule=rule,
        theta=theta,
        lr=lr,
        preset=f"imported from {source}",
        data="see the source",
        licence=licence,
    )


def _read(path: Path) -> object:
    if not path.is_file():
        raise WeightsError(f"no file at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # what torch raises for a foreign file depends on its bytes
        raise WeightsError(
            f"{path} can't be read: it is damaged, foreign, or holds more than tensors"
        ) from None


def _recognise(theta: Mapping[str, Tensor]) -> Rule:
    layers = len({name.split(".")[0] for name in theta if name.startswith("lstm")})
    if "lstm1.weight" in theta:
        channels, features = theta["pre_linear.weight"].shape
        if "linear_var1.weight" not in theta and features == 1:
            return HyperAdamRule(channels=channels, state_layers=layers)
        if features != 2:
            raise KeyError("pre_linear.weight")
        return VariationalHyperAdamRule(
            channels=channels, state_layers=layers, var_block="linear_var1.weight" in theta
        )
    channels = theta["lstm1.weight_hh"].shape[1]
    if "pre_linear.weight" in theta:
        return RNNpropRule(channels=channels, state_layers=layers)
    return DMoptimizerRule(channels=channels, state_layers=layers)
