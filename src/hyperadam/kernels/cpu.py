"""The C++ kernel for CPUs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperadam.errors import ConfigError, unknown_name
from hyperadam.kernels.fused import Passes
from hyperadam.kernels.tiled import Lanes
from hyperadam.kernels.tiles import Part, TileLayout
from hyperadam.rule import Theta, VariationalHyperAdamRule

_cpu: Any = None
_reason: str | None = None
try:
    _cpu = importlib.import_module("hyperadam.kernels._cpu")
except ImportError as error:  # installed where there was no compiler
    _reason = (
        f"it was not built when hyperadam was installed ({error}): install a C++ compiler and run "
        f"pip install --force-reinstall --no-deps . in hyperadam's folder"
    )

THETA_ORDER = (
    "pre_linear.weight",
    "pre_linear.bias",
    "lstm1.weight",
    "lstm1.bias",
    "adamcell.weight",
    "adamcell.bias",
    "post_linear.weight",
    "post_linear.bias",
    "linear_var1.weight",
    "linear_var1.bias",
)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel can't compute in ``dtype`` on ``device``; None where it can."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 or float64, not in {str(dtype).removeprefix('torch.')}"
    return _reason


_preferred: str | None = None


def instruction_sets() -> list[str]:
    """The instruction sets that the kernel has and this processor too, the best first."""
    return list(_cpu.instruction_sets())


def prefer(instruction_set: str | None) -> None:
    """Have kernels that are made from now on use an instruction set; None: the best. To measure.

    Raises:
        ConfigError: the kernel or this processor does not have it.
    """
    global _preferred
    known = instruction_sets() if _cpu is not None else []
    if instruction_set is not None and instruction_set not in known:
        raise ConfigError(unknown_name("instruction set", instruction_set, known))
    _preferred = instruction_set


def standard_normal(seeds: Sequence[int], steps_T: Tensor, count: int) -> Tensor:
    """The numbers of :func:`hyperadam.rule.standard_normal` for B seeds, of shape (T, B, count)."""
    out_TBN = torch.empty(len(steps_T), len(seeds), count)
    seeds_B = torch.tensor(seeds, dtype=torch.int64)
    _cpu.standard_normal(seeds_B, steps_T.to(torch.int64), out_TBN, torch.get_num_threads())
    return out_TBN


class CpuPasses(Passes):
    """The passes in C++.

    Args:
        rule: the rule.
        theta: its meta-parameters, on the CPU, of float32 or float64: the dtype of the computation.
        state_dtype: of the tiles: that of theta, or bfloat16 beside float32; None: that of theta.
        instruction_set: of :func:`instruction_sets`; None: that of :func:`prefer`.
    """

    def __init__(
        self,
        rule: VariationalHyperAdamRule,
        theta: Theta,
        state_dtype: torch.dtype | None = None,
        instruction_set: str | None = None,
    ) -> None:
        self.rule = rule
        double = theta[THETA_ORDER[0]].dtype == torch.float64
        self.program = (_cpu.Program64 if double else _cpu.Program32)(
            rule.channels,
            list(rule.moment_decays),
            rule.candidate_bound or 0.0,
            state_dtype == torch.bfloat16,
            [theta[name].detach().contiguous() for name in THETA_ORDER if name in theta],
            instruction_set or _preferred or instruction_sets()[0],
        )
        self.layout = TileLayout.of(rule)

    def plan(self, parts: Sequence[Part]) -> Any:
        columns = [(p.first_tile, p.count, p.segment, p.noise_start) for p in parts]
        self._segments = 1 + max(part.segment for part in parts)
        return _cpu.Plan(
            torch.tensor(columns, dtype=torch.int64).reshape(-1, 4),
            torch.tensor([part.seed for part in parts], dtype=torch.int64),
            torch.tensor([part.sample for part in parts], dtype=torch.bool),
        )

    def _sums(self) -> Tensor:
        return torch.empty(self._segments, self.rule.channels, dtype=torch.float64)

    def features(
        self, plan: Any, steps_P: Tensor, tiles: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums = self._sums()
        finite = self.program.features(
            plan, steps_P, _bytes(tiles), grad, sums, torch.get_num_threads()
        )
        return sums, torch.tensor(finite)

    def squares(self, plan: Any, tiles: Tensor, field: str) -> Tensor:
        sums = self._sums()
        self.program.squares(plan, _bytes(tiles), field[0], sums, torch.get_num_threads())
        return sums

    def state_cell(
        self,
        plan: Any,
        steps_P: Tensor,
        tiles: Tensor,
        new_tiles: Tensor,
        grad: Tensor,
        scale_SC: Tensor,
        finite: Tensor,
    ) -> Tensor:
        sums = self._sums()
        self.program.state_cell(
            plan,
            steps_P,
            _bytes(tiles),
            _bytes(new_tiles),
            grad,
            scale_SC,
            sums,
            torch.get_num_threads(),
        )
        return sums

    def adam_cell(
        self,
        plan: Any,
        steps_P: Tensor,
        tiles: Tensor,
        new_tiles: Tensor,
        lanes: Lanes,
        scale_SC: Tensor,
        finite: Tensor,
    ) -> Tensor:
        sums = self._sums()
        self.program.adam_cell(
            plan,
            steps_P,
            _bytes(tiles),
            _bytes(new_tiles),
            lanes.grad,
            scale_SC,
            sums,
            lanes.mean,
            lanes.log_var,
            lanes.direction,
            torch.get_num_threads(),
        )
        return sums

    def variance_sums(self, plan: Any, steps_P: Tensor, tiles: Tensor, lanes: Lanes) -> Tensor:
        sums = torch.empty(self._segments, 2, dtype=torch.float64)
        self.program.variance_sums(
            plan,
            steps_P,
            _bytes(tiles),
            self.rule.longest_memory,
            lanes.mean,
            sums,
            torch.get_num_threads(),
        )
        return sums

    def shape_variance(
        self,
        plan: Any,
        steps_P: Tensor,
        tiles: Tensor,
        lanes: Lanes,
        moment_S: Tensor,
        level_S: Tensor,
        finite: Tensor,
    ) -> None:
        self.program.shape_variance(
            plan,
            steps_P,
            _bytes(tiles),
            self.rule.longest_memory,
            self.rule.variance_base,
            self.rule.variance_floor,
            moment_S,
            level_S,
            lanes.mean,
            lanes.log_var,
            lanes.direction,
            torch.get_num_threads(),
        )


def _bytes(tiles: Tensor) -> Tensor:
    return tiles.view(torch.uint8)
