"""Which program computes a rule's step."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from hyperadam.errors import ConfigError, unknown_name
from hyperadam.kernels import cpu, fused, triton
from hyperadam.kernels.cpu_unroll import CpuRule
from hyperadam.kernels.differentiable import CPU, DifferentiableRule, ReferenceRule
from hyperadam.kernels.tiled import ReferenceTiledRule, TiledRule
from hyperadam.rule import Rule, Theta, VariationalHyperAdamRule

Backend = Literal["auto", "reference", "cpu", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "cpu", "triton")

_told: set[str] = set()


def why_not(backend: str, rule: Rule, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a backend can't serve; None where it can.

    Args:
        backend: a name of :data:`BACKENDS` but ``"auto"``.
        rule: the update rule.
        dtype: of the computation.
        device: of the state.
    """
    if backend == "reference":
        return None
    kernel = triton if backend == "triton" else cpu
    return kernel.why_not(device, dtype) or fused.why_not(rule)


def choose_backend(backend: str, rule: Rule, dtype: torch.dtype, device: torch.device) -> str:
    """The backend that a choice means: the choice itself, or for ``"auto"`` the device's kernel,
    and where that can't serve, with one warning for each reason, the reference.

    Args:
        backend: a name of :data:`BACKENDS`.
        rule, dtype, device: see :func:`why_not`.

    Raises:
        ConfigError: an unknown backend, or one that can't serve.
    """
    if backend not in BACKENDS:
        raise ConfigError(unknown_name("backend", backend, BACKENDS))
    kernel = "triton" if device.type == "cuda" else "cpu"
    reason = why_not(kernel if backend == "auto" else backend, rule, dtype, device)
    if backend != "auto":
        if reason is not None:
            raise ConfigError(f"backend {backend!r} can't serve: {reason}")
        return backend
    if reason is None:
        return kernel
    if reason not in _told:
        _told.add(reason)
        warnings.warn(
            f"hyperadam uses its reference backend, many times slower than the {kernel} kernel: "
            f"{reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return "reference"


def tiled_rule(
    rule: Rule,
    theta: Theta,
    *,
    backend: str = "auto",
    state_dtype: torch.dtype | None = None,
) -> TiledRule:
    """A rule with its theta in the chosen backend, to be applied to tiles.

    Args:
        rule: the update rule.
        theta: meta-parameters, in the dtype of the computation and on the device of the state.
        backend: see :func:`choose_backend`.
        state_dtype: of the tiles; None: that of theta.

    Raises:
        ConfigError: an unknown backend, or one that can't serve.
    """
    example = next(iter(theta.values()))
    chosen = choose_backend(backend, rule, example.dtype, example.device)
    if chosen == "reference":
        return ReferenceTiledRule(rule, theta)
    assert isinstance(rule, VariationalHyperAdamRule)
    passes = triton.TritonPasses if chosen == "triton" else cpu.CpuPasses
    return fused.FusedTiledRule(passes(rule, theta, state_dtype))


def differentiable_rule(
    rule: Rule, backend: str = "auto", device: torch.device = CPU
) -> DifferentiableRule:
    """The steps of a rule that can be differentiated by theta, in the chosen backend.

    Args:
        rule: the update rule.
        backend: see :func:`choose_backend`. Only the CPU has a kernel with a backward pass: on
            another device ``"auto"`` is the reference under autograd.
        device: where the state is.

    Raises:
        ConfigError: an unknown backend, or one that can't serve.
    """
    if backend == "triton":
        raise ConfigError("backend 'triton' can't serve: it has no backward pass")
    if backend == "auto" and device.type != "cpu":
        backend = "reference"
    if choose_backend(backend, rule, torch.float32, device) == "reference":
        return ReferenceRule(rule, device)
    assert isinstance(rule, VariationalHyperAdamRule)
    return CpuRule(rule)
