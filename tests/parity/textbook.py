"""Variational HyperAdam in the paper's notation, one line an equation: the twin to compare with.

Written against docs/method.md and sharing nothing with the package.
"""

from __future__ import annotations

import torch


def unit_columns(y):
    return y / torch.sqrt((y * y).sum(dim=0, keepdim=True) + 1e-16)


def elu(y):
    return torch.where(y > 0, y, torch.exp(y) - 1)


def textbook_step(theta, state, g):
    """One step; ``state`` is a dict that is changed. Returns mean and log-variance."""
    n, channels = len(g), theta["post_linear.bias"].numel()
    if not state:
        state["t"] = 0
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(n, dtype=g.dtype)
        for name in ("h", "c", "m", "v", "m_corr", "v_corr"):
            state[name] = torch.zeros(n, channels, dtype=g.dtype)
    state["t"] += 1
    state["exp_avg"] = 0.95 * state["exp_avg"] + 0.05 * g
    state["exp_avg_sq"] = 0.95 * state["exp_avg_sq"] + 0.05 * g**2
    correction = 1 - 0.95 ** state["t"]
    s = torch.sqrt(state["exp_avg_sq"] / correction) + 1e-8
    features = torch.stack([g / s, state["exp_avg"] / correction / s], dim=1)
    x = elu(features @ theta["pre_linear.weight"].T + theta["pre_linear.bias"])

    gates = torch.cat([unit_columns(x), unit_columns(state["h"])], dim=1)
    i, j, f, o = (gates @ theta["lstm1.weight"].T + theta["lstm1.bias"]).chunk(4, dim=1)
    state["c"] = torch.sigmoid(f + 1) * state["c"] + torch.sigmoid(i) * torch.tanh(j)
    state["h"] = torch.sigmoid(o) * torch.tanh(state["c"])

    rates = torch.cat([unit_columns(state["m"]), unit_columns(state["h"])], dim=1)
    rates = torch.sigmoid(rates @ theta["adamcell.weight"].T + theta["adamcell.bias"])
    beta, gamma = rates.chunk(2, dim=1)
    state["m"] = beta * state["m"] + (1 - beta) * g[:, None]
    state["v"] = gamma * state["v"] + (1 - gamma) * g[:, None] ** 2
    state["m_corr"] = beta * state["m_corr"] + (1 - beta)
    state["v_corr"] = gamma * state["v_corr"] + (1 - gamma)
    v_hat = state["v"] / (state["v_corr"] + 1e-24)
    a = state["m"] / (state["m_corr"] + 1e-24) / torch.sqrt(v_hat + 1e-24)

    rho = elu(state["h"] @ theta["post_linear.weight"].T + theta["post_linear.bias"])
    mean = (rho * a).sum(dim=1)
    log_var = (state["h"] @ theta["linear_var1.weight"].T + theta["linear_var1.bias"])[:, 0]
    return mean, log_var
