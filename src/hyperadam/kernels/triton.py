"""The Triton kernel for NVIDIA GPUs: lays out what the passes of :mod:`.triton_passes` read.

Nothing in a step waits for the GPU or depends on a tensor's value on the host, so a step can be
captured in a CUDA graph. Sums are in one order always: each block's in its own row of a buffer,
which is then added up in float64.

Suffixes: S segments, M blocks of the largest segment, H channels, G groups of 4 channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperadam.kernels.fused import Passes
from hyperadam.kernels.tiled import Lanes
from hyperadam.kernels.tiles import TILE, Part, TileLayout
from hyperadam.rule import Theta, VariationalHyperAdamRule

# One warp with two coordinates a thread: inputs and gates of both fit a thread's registers.
BLOCK_TILES = 2
NUM_WARPS = 1
GROUP = 4
LEAST_CAPABILITY = (7, 0)
"""Of a GPU, for Triton."""


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU, to test them where there is no GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel can't compute in ``dtype`` on ``device``; None where it can."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"it needs a CUDA device, not {device}"
    if dtype != torch.float32:
        return f"it computes in float32, not in {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install '.[triton]' in hyperadam's folder"
    return _why_not_gpu(device) if device.type == "cuda" else None


def _why_not_gpu(device: torch.device) -> str | None:
    """What a GPU, or the system around it, lacks for the kernel; None for nothing."""
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, not for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        return f"it needs a GPU of compute capability {least}; {device} has {found}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler when it runs: install gcc or clang, or set CC"
    return None


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments' device is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Parts as the kernels read them, on the device.

    A slot is one tile of a part; a block is up to ``BLOCK_TILES`` slots of one segment, so tiles
    of small parts share a block.

    Attributes:
        num_blocks: the size of a launch.
        blocks: int32 (blocks, 4): first slot, number of slots, segment, row in ``sums_SMH``.
        slots: int64 (slots, 2): tile, part.
        parts: int64 (P, 5): first tile, count, start in the noise, seed, whether to sample.
        sums_SMH: float32, each block's sums in its row. Rows that are no block's stay 0.
        sums_SM2: likewise, what the variance's shape asks for.
        finite: int32, one number a block.
    """

    num_blocks: int
    blocks: Tensor
    slots: Tensor
    parts: Tensor
    sums_SMH: Tensor
    sums_SM2: Tensor
    finite: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part], channels: int, device: torch.device) -> Plan:
        """Lay out the blocks of each segment, one segment behind the other."""
        num_segments = 1 + max((part.segment for part in parts), default=0)
        tiles_of: list[list[Tensor]] = [[] for _ in range(num_segments)]
        for index, part in enumerate(parts):
            tile = torch.arange(part.tiles.start, part.tiles.stop)
            tiles_of[part.segment].append(torch.stack([tile, torch.full_like(tile, index)], -1))
        slots, blocks, first_slot = [], [], 0
        none = torch.empty(0, 2, dtype=torch.int64)
        sizes = [sum(map(len, pieces)) for pieces in tiles_of]
        most = max(1, -(-max(sizes) // BLOCK_TILES))
        for segment, (pieces, size) in enumerate(zip(tiles_of, sizes, strict=True)):
            slots.append(torch.cat([none, *pieces]))
            start = torch.arange(0, size, BLOCK_TILES)
            blocks.append(
                torch.stack(
                    [
                        first_slot + start,
                        (size - start).clamp_max(BLOCK_TILES),
                        torch.full_like(start, segment),
                        segment * most + start // BLOCK_TILES,
                    ],
                    dim=-1,
                )
            )
            first_slot += size
        block_table = torch.cat(blocks).to(torch.int32)
        part_table = [
            (part.first_tile, part.count, part.noise_start, part.seed, int(part.sample))
            for part in parts
        ]
        return cls(
            len(block_table),
            block_table.to(device),
            torch.cat(slots).to(device),
            torch.tensor(part_table, dtype=torch.int64).reshape(-1, 5).to(device),
            torch.zeros(num_segments, most, channels, device=device),
            torch.zeros(num_segments, most, 2, device=device),
            torch.ones(len(block_table), dtype=torch.int32, device=device),
        )

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.blocks, self.slots, self.parts

    def total(self) -> Tensor:
        """The blocks' sums added up: float64 of shape (S, H)."""
        return self.sums_SMH.sum(dim=1, dtype=torch.float64)


class TritonPasses(Passes):
    """The passes in Triton.

    Args:
        rule: the rule.
        theta: its meta-parameters, float32 on the device; copied.
        state_dtype: of the tiles: float32 or bfloat16; None: that of theta.
    """

    def __init__(
        self,
        rule: VariationalHyperAdamRule,
        theta: Theta,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        from hyperadam.kernels import triton_passes

        self.kernels: Any = triton_passes
        self.rule = rule
        self.layout = TileLayout.of(rule)
        theta = {name: value.detach() for name, value in theta.items()}
        self.device = theta["pre_linear.weight"].device
        self._settings = {
            "H": rule.channels,
            "K": len(rule.moment_decays),
            "BFLOAT16": state_dtype == torch.bfloat16,
            "BLOCK": BLOCK_TILES * TILE,
            "num_warps": NUM_WARPS,
            "enable_fp_fusion": False,
        }
        decay_K = torch.tensor(rule.moment_decays, dtype=torch.float64)
        keep_K = decay_K.to(torch.float32)
        self._log_decay_K = decay_K.log().to(self.device)
        self._moments = torch.stack([keep_K, 1 - keep_K], dim=-1).to(self.device)
        self._pre = theta["pre_linear.weight"].contiguous(), theta["pre_linear.bias"].contiguous()
        channels = rule.channels
        self._state_weights = (
            _pack(theta["lstm1.weight"], channels),
            _pack(theta["lstm1.bias"].unsqueeze(-1), channels),
        )
        bias = torch.cat([theta["adamcell.bias"], theta["post_linear.bias"]])
        self._adam_weights = (
            _pack(theta["adamcell.weight"], channels),
            _pack(theta["post_linear.weight"], channels),
            _pack(bias.unsqueeze(-1), channels),
        )
        # Where there is no VarBlock, any pointer does: the kernel does not follow it.
        self._var_weights = tuple(
            theta.get(f"linear_var1.{name}", self._pre[1]).contiguous()
            for name in ("weight", "bias")
        )

    def plan(self, parts: Sequence[Part]) -> Plan:
        return Plan.of(parts, self.rule.channels, self.device)

    def _corrections(self, steps_P: Tensor) -> Tensor:
        """``1 / (1 - decay^step)``, made in float64; shape (P, K)."""
        power_PK = steps_P.unsqueeze(-1) * self._log_decay_K
        return power_PK.expm1().neg().reciprocal().to(torch.float32)

    def _launch(self, kernel: str, plan: Plan, *arguments: Any, **settings: Any) -> None:
        if plan.num_blocks > 0:
            grid = (plan.num_blocks,)
            with _on(self.device):
                getattr(self.kernels, kernel)[grid](*arguments, **self._settings, **settings)

    def features(
        self, plan: Plan, steps_P: Tensor, tiles: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        self._launch(
            "features_pass",
            plan,
            _numbers(tiles),
            grad,
            *plan.tables(),
            self._corrections(steps_P),
            self._moments,
            *self._pre,
            plan.sums_SMH,
            plan.finite,
        )
        return plan.total(), plan.finite.all()

    def squares(self, plan: Plan, tiles: Tensor, field: str) -> Tensor:
        first_row = self.layout.rows[field].start
        self._launch(
            "squares_pass", plan, _numbers(tiles), *plan.tables(), plan.sums_SMH, first_row
        )
        return plan.total()

    def state_cell(
        self,
        plan: Plan,
        steps_P: Tensor,
        tiles: Tensor,
        new_tiles: Tensor,
        grad: Tensor,
        scale_SC: Tensor,
        finite: Tensor,
    ) -> Tensor:
        weight, bias = self._state_weights
        self._launch(
            "state_cell_pass",
            plan,
            _numbers(tiles),
            _numbers(new_tiles),
            grad,
            finite,
            *plan.tables(),
            steps_P,
            self._corrections(steps_P),
            self._moments,
            *self._pre,
            _scaled(weight, scale_SC),
            bias,
            plan.sums_SMH,
        )
        return plan.total()

    def adam_cell(
        self,
        plan: Plan,
        steps_P: Tensor,
        tiles: Tensor,
        new_tiles: Tensor,
        lanes: Lanes,
        scale_SC: Tensor,
        finite: Tensor,
    ) -> Tensor:
        bound = self.rule.candidate_bound
        rates, rho, bias = self._adam_weights
        self._launch(
            "adam_cell_pass",
            plan,
            _numbers(tiles),
            _numbers(new_tiles),
            lanes.grad,
            lanes.mean,
            lanes.mean if lanes.log_var is None else lanes.log_var,
            lanes.mean if lanes.direction is None else lanes.direction,
            finite,
            *plan.tables(),
            steps_P,
            _scaled(rates, scale_SC),
            rho,
            bias,
            *self._var_weights,
            math.inf if bound is None else bound,
            plan.sums_SMH,
            BOUNDED=bound is not None,
            VAR_BLOCK=self.rule.var_block,
            DIRECTION=lanes.direction is not None,
        )
        return plan.total()

    def variance_sums(self, plan: Plan, steps_P: Tensor, tiles: Tensor, lanes: Lanes) -> Tensor:
        self._launch(
            "variance_sums_pass",
            plan,
            _numbers(tiles),
            lanes.mean,
            *plan.tables(),
            self._corrections(steps_P),
            plan.sums_SM2,
            self.rule.longest_memory,
        )
        return plan.sums_SM2.sum(dim=1, dtype=torch.float64)

    def shape_variance(
        self,
        plan: Plan,
        steps_P: Tensor,
        tiles: Tensor,
        lanes: Lanes,
        moment_S: Tensor,
        level_S: Tensor,
        finite: Tensor,
    ) -> None:
        self._launch(
            "shape_variance_pass",
            plan,
            _numbers(tiles),
            lanes.mean,
            lanes.log_var,
            lanes.mean if lanes.direction is None else lanes.direction,
            finite,
            *plan.tables(),
            self._corrections(steps_P),
            moment_S.to(torch.float32),
            level_S.to(torch.float32),
            self.rule.longest_memory,
            self.rule.variance_base,
            self.rule.variance_floor,
            DIRECTION=lanes.direction is not None,
        )


def standard_normal(seed: int, step: int, start: int, count: int, device: torch.device) -> Tensor:
    """The kernel's noise by itself; bit for bit :func:`hyperadam.rule.standard_normal`."""
    from hyperadam.kernels import triton_passes

    # Numbers travel in a tensor: an argument of the kernel would be 32 or 64 bits wide by value.
    counter = torch.tensor([seed, step, start], dtype=torch.int64).to(device)
    out = torch.empty(count, device=device)
    block = BLOCK_TILES * TILE
    kernel: Any = triton_passes.noise_pass
    with _on(out.device):
        kernel[(-(-count // block),)](
            out, counter, count, BLOCK=block, num_warps=NUM_WARPS, enable_fp_fusion=False
        )
    return out


def _pack(weight: Tensor, channels: int) -> Tensor:
    """(Q H, C) as (G, C, Q, 4): what a thread reads for one input and four channels together.

    Channels behind the last are 0.
    """
    padded = -(-channels // GROUP) * GROUP
    weight_QHC = weight.reshape(-1, channels, weight.shape[-1])
    packed = weight.new_zeros(len(weight_QHC), padded, weight.shape[-1])
    packed[:, :channels] = weight_QHC
    grouped: Tensor = packed.unflatten(1, (-1, GROUP))  # (Q, G, 4, C)
    return grouped.permute(1, 3, 0, 2).contiguous()


def _scaled(weight_GCQ4: Tensor, scale_SC: Tensor) -> Tensor:
    """The weights of each segment, its column norms in them: a kernel reads its inputs raw."""
    scaled: Tensor = weight_GCQ4 * scale_SC[:, None, :, None, None]
    return scaled


def _numbers(tiles: Tensor) -> Tensor:
    """Tiles as the kernels take them, which round to bfloat16 by themselves."""
    return tiles.view(torch.int16) if tiles.dtype == torch.bfloat16 else tiles
