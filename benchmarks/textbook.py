"""Variational HyperAdam as its equations read, one line each: the plain program to be faster than.

Notation of the paper: N coordinates, H channels; ``g`` gradient, ``h, c`` state cell, ``m, v``
moments, ``β, γ`` predicted decay rates, ``a`` candidate directions, ``ρ`` their weights,
``μ, log σ²`` of the update, ``d`` its sample, ``w`` parameters. Nothing is shared with the package.
Works under autograd, by theta, and without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import elu

Theta = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Variant:
    """Departures from the paper that the bundled weights have.

    Attributes:
        rms: divide columns by their root mean square, not by their Euclidean norm.
        bound: with a number b, candidates become ``b tanh(a / b)``.
        decays: of the K fixed moments.
    """

    rms: bool = False
    bound: float | None = None
    decays: tuple[float, ...] = (0.95,)


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """What is kept between steps: ``t`` steps taken; (N, K) fixed moments; (N, H) all else."""

    t: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    h: Tensor
    c: Tensor
    m: Tensor
    v: Tensor
    m_corr: Tensor
    v_corr: Tensor

    def detach(self) -> State:
        """The same values without a graph."""
        tensors = [getattr(self, field.name) for field in dataclasses.fields(self)[1:]]
        return State(self.t, *(tensor.detach() for tensor in tensors))


def init(theta: Theta, n: int) -> State:
    """The state before the first step, in theta's dtype and on its device."""
    zeros = theta["post_linear.bias"].detach().new_zeros
    channels = len(theta["post_linear.bias"])
    moments = theta["pre_linear.weight"].shape[1] // 2
    fixed = {name: zeros(n, moments) for name in ("exp_avg", "exp_avg_sq")}
    names = ("h", "c", "m", "v", "m_corr", "v_corr")
    return State(t=0, **fixed, **{name: zeros(n, channels) for name in names})


def u(y: Tensor, rms: bool) -> Tensor:
    """Each column over its norm."""
    total = y.square().mean(dim=0) if rms else y.square().sum(dim=0)
    return y * torch.rsqrt(total + 1e-16)


def update(
    theta: Theta, s: State, g: Tensor, variant: Variant = Variant()
) -> tuple[Tensor, Tensor, State]:
    """One step: ``μ`` and ``log σ²`` of the update, both (N,), and the new state."""
    t = s.t + 1
    decay = g.new_tensor(variant.decays)
    exp_avg = decay * s.exp_avg + (1 - decay) * g[:, None]
    exp_avg_sq = decay * s.exp_avg_sq + (1 - decay) * g[:, None] ** 2
    corr = 1 - g.new_tensor([d**t for d in variant.decays])
    scale = torch.sqrt(exp_avg_sq / corr) + 1e-8
    features = torch.stack([g[:, None] / scale, exp_avg / corr / scale], dim=2).flatten(1)
    x = elu(features @ theta["pre_linear.weight"].T + theta["pre_linear.bias"])

    z = torch.cat([u(x, variant.rms), u(s.h, variant.rms)], dim=1)
    i, j, f, o = (z @ theta["lstm1.weight"].T + theta["lstm1.bias"]).chunk(4, dim=1)
    c = torch.sigmoid(f + 1) * s.c + torch.sigmoid(i) * torch.tanh(j)
    h = torch.sigmoid(o) * torch.tanh(c)

    z = torch.cat([u(s.m, variant.rms), u(h, variant.rms)], dim=1)
    rates = torch.sigmoid(z @ theta["adamcell.weight"].T + theta["adamcell.bias"])
    β, γ = rates.chunk(2, dim=1)
    m = β * s.m + (1 - β) * g[:, None]
    v = γ * s.v + (1 - γ) * g[:, None] ** 2
    m_corr = β * s.m_corr + (1 - β)
    v_corr = γ * s.v_corr + (1 - γ)
    a = m / (m_corr + 1e-24) / torch.sqrt(v / (v_corr + 1e-24) + 1e-24)
    if variant.bound is not None:
        a = variant.bound * torch.tanh(a / variant.bound)

    ρ = elu(h @ theta["post_linear.weight"].T + theta["post_linear.bias"])
    μ = (ρ * a).sum(dim=1)
    log_var = (h @ theta["linear_var1.weight"].T + theta["linear_var1.bias"])[:, 0]
    return μ, log_var, State(t, exp_avg, exp_avg_sq, h, c, m, v, m_corr, v_corr)


def sample(μ: Tensor, log_var: Tensor, ε: Tensor) -> Tensor:
    """The update ``d``, from standard normal ``ε``."""
    return μ + torch.exp(log_var / 2) * ε


def kl(log_var: Tensor) -> Tensor:
    """KL of the update's distribution from N(0, 1) in its variance, summed over coordinates."""
    return (-log_var / 2 + torch.exp(log_var) / (2 + 1e-6) - 0.5 + 1e-6).sum()


class TextbookOptimizer:
    """The equations applied to one flat parameter.

    Args:
        w: the parameters, (N,).
        theta: meta-parameters.
        lr: learning rate.
        variant: of the rule.
    """

    def __init__(self, w: Tensor, theta: Theta, lr: float, variant: Variant) -> None:
        self.w, self.theta, self.lr, self.variant = w, theta, lr, variant
        self.state = init(theta, len(w))

    @torch.no_grad()
    def step(self) -> None:
        """One sampled update with ``w.grad``; the noise is torch's own."""
        assert self.w.grad is not None
        μ, log_var, self.state = update(self.theta, self.state, self.w.grad, self.variant)
        self.w -= self.lr * sample(μ, log_var, torch.randn_like(μ))
