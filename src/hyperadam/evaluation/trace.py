"""What a learned optimizer predicts along a training run, in summary.

Shapes: K traced steps, L parameter tensors, H channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperadam.errors import ConfigError
from hyperadam.optim import LearnedOptimizer
from hyperadam.rule import Explanation

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
POINTS = 20

TABLES = (
    "beta",
    "gamma",
    "beta_quantiles",
    "gamma_quantiles",
    "rho",
    "rho_std",
    "beta_layers",
    "gamma_layers",
    "rho_layers",
    "std",
    "snr",
    "update_rms",
)


def trace_steps(total: int) -> list[int]:
    """Up to 20 step numbers from 0 to ``total - 1``, evenly spaced in log(step + 1).

    Args:
        total: steps of the run.
    """
    wanted = min(POINTS, max(total, 0))
    points = wanted
    steps: list[int] = []
    while len(steps) < wanted:  # the first few fall together
        steps = sorted({round(step) - 1 for step in np.geomspace(1, total, points)})
        points += 1
    return steps


class Tracer:
    """Records what a learned optimizer predicts at chosen steps.

    The training loop calls :meth:`before_step` at each step, after ``backward()`` and before
    ``optimizer.step()``.

    Args:
        steps: which steps to record, counted from 0.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = frozenset(steps)
        self._layers: list[str] | None = None
        self._at: list[int] = []
        self._rows: dict[str, list[list[float] | None]] = {name: [] for name in TABLES}

    def before_step(
        self, step: int, optimizer: torch.optim.Optimizer, names: Sequence[str]
    ) -> None:
        """Record, where this is a chosen step and there is a gradient; nothing is changed.

        Args:
            step: number of the step to come, from 0.
            optimizer: VariationalHyperAdam or HyperAdam.
            names: of the optimizer's parameters, in the order of its groups.

        Raises:
            ConfigError: the optimizer has nothing to explain, or the names are of other
                parameters.
        """
        if step not in self.steps:
            return
        if not isinstance(optimizer, LearnedOptimizer) or not optimizer.explains:
            raise ConfigError(
                f"{type(optimizer).__name__} can't be traced: it has no predicted candidates"
            )
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if len(names) != len(params):
            raise ConfigError(f"{len(names)} names were given for {len(params)} parameters")
        if self._layers not in (None, list(names)):
            raise ConfigError("a Tracer records one run; take a new one for another network")
        explanations = optimizer.explain()
        if not any(each.mean_N.numel() for each in explanations.values()):
            return
        self._layers = list(names)
        self._at.append(step)
        summary = _summary([explanations.get(param) for param in params])
        for name, row in summary.items():
            self._rows[name].append(row)

    def to_record(self) -> dict[str, Any]:
        """The record as plain JSON values.

        Returns:
            ``at`` (K step numbers); ``layers`` (L names); ``beta``, ``gamma``, ``rho`` (K by H,
            means over all coordinates) and ``rho_std`` (standard deviations); ``beta_quantiles``
            and ``gamma_quantiles`` (K by 5: 5, 25, 50, 75 and 95 %, over coordinates and
            channels); ``beta_layers``, ``gamma_layers`` and ``rho_layers`` (K by L, means over a
            parameter's coordinates and channels); ``update_rms`` (K by L, root mean square of the
            update's mean); ``std`` (K by L, mean of the update's standard deviation) and ``snr``
            (K by L, ``update_rms`` over the root mean square of the standard deviation), both
            None without a VarBlock. A number that is not finite, or of a parameter without a
            gradient or elements, is None.
        """
        record: dict[str, Any] = {"at": list(self._at), "layers": list(self._layers or [])}
        for name, rows in self._rows.items():
            plain = [None if row is None else [_plain(number) for number in row] for row in rows]
            record[name] = None if plain and plain[0] is None else plain
        return record


def _plain(number: float) -> float | None:
    """A number for JSON, of six digits, since float32 has no more."""
    return float(f"{number:.6g}") if math.isfinite(number) else None


def _summary(found: Sequence[Explanation | None]) -> dict[str, list[float] | None]:
    """One row of each table; ``found`` has an entry for each parameter."""
    present = [each for each in found if each is not None]

    def columns(name: str) -> Tensor:
        values = [getattr(each, name) for each in present]
        return torch.cat([value.reshape(-1, value.shape[-1]) for value in values])

    def by_layer(name: str) -> list[float]:
        return [
            math.nan if each is None else float(getattr(each, name).mean(dtype=torch.float64))
            for each in found
        ]

    beta_NH, gamma_NH, rho_NH = map(columns, ("beta_NH", "gamma_NH", "rho_NH"))
    update_rms = [math.nan if each is None else _rms(each.mean_N) for each in found]
    has_variance = any(each.log_var_N is not None for each in present)
    empty = torch.empty(0)
    stds = [
        empty if each is None or each.log_var_N is None else torch.exp(each.log_var_N / 2)
        for each in found
    ]
    std_rms = [_rms(std) for std in stds]
    snr = [m / s if s > 0 else math.nan for m, s in zip(update_rms, std_rms, strict=True)]
    return {
        "beta": _means(beta_NH),
        "gamma": _means(gamma_NH),
        "beta_quantiles": _quantiles(beta_NH),
        "gamma_quantiles": _quantiles(gamma_NH),
        "rho": _means(rho_NH),
        "rho_std": rho_NH.double().std(dim=0, correction=0).tolist(),
        "beta_layers": by_layer("beta_NH"),
        "gamma_layers": by_layer("gamma_NH"),
        "rho_layers": by_layer("rho_NH"),
        "std": [float(std.mean(dtype=torch.float64)) for std in stds] if has_variance else None,
        "snr": snr if has_variance else None,
        "update_rms": update_rms,
    }


def _means(values_NH: Tensor) -> list[float]:
    return values_NH.mean(dim=0, dtype=torch.float64).tolist()


def _quantiles(values_NH: Tensor) -> list[float]:
    # torch.quantile takes no more than 16 million numbers.
    return [float(value) for value in np.quantile(values_NH.cpu().numpy(), QUANTILES)]


def _rms(values: Tensor) -> float:
    """Root mean square; NaN of no numbers."""
    return float(values.double().square().mean().sqrt())
