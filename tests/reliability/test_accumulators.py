"""The correction accumulators over long runs.

A short version. ``scripts/million-steps`` takes a million.
"""

from __future__ import annotations

import os

import pytest
import torch

from hyperadam import VariationalHyperAdam
from hyperadam.rule.adam_cell import adam_cell

DTYPES = (torch.float32, torch.float64)
STEPS = int(os.environ.get("HYPERADAM_STEPS", "0"))


def test_the_recurrence_keeps_to_its_closed_form():
    """At constant decay rates the accumulators are 1 - decay^t. In float32 they stay within two
    roundings over 1 - decay of it, however long the run."""
    decay_H = 1 - torch.logspace(-5, -0.01, 64, dtype=torch.float64)
    decay_1H = decay_H.float()[None]
    exact_H = decay_1H[0].double()
    bound_H = 2 * torch.finfo(torch.float32).eps / (1 - exact_H)
    m, v, m_corr, v_corr = (torch.zeros(1, 64) for _ in range(4))
    grad_N = torch.ones(1)
    steps = STEPS or 20_000
    for step in range(1, steps + 1):
        _, m, v, m_corr, v_corr = adam_cell(grad_N, decay_1H, decay_1H, m, v, m_corr, v_corr)
        if step % (steps // 20) == 0:
            for found in (m_corr, v_corr):
                assert ((found[0].double() - (1 - exact_H**step)).abs() <= bound_H).all(), step
                assert (found <= 1 + 1e-6).all()
            torch.testing.assert_close(m / m_corr, torch.ones_like(m), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_real_steps_do_not_drift(backend):
    """Beside the same run in float64: on each channel the accumulators agree all along."""
    params = [torch.zeros(4, dtype=dtype, requires_grad=True) for dtype in DTYPES]
    optimizers = [
        VariationalHyperAdam([param], sample=False, backend=backend, lr=1e-4) for param in params
    ]
    generator = torch.Generator().manual_seed(0)
    steps = STEPS or 1000
    worst = 0.0
    for step in range(1, steps + 1):
        grad = 1 + torch.randn(4, generator=generator, dtype=torch.float64)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.to(param.dtype)
            optimizer.step()
        if step % (steps // 50) == 0:
            single, double = (optimizer.state_dict()["state"][0] for optimizer in optimizers)
            for name in ("m_corr", "v_corr"):
                error = (single[name].double() - double[name]).abs().max()
                worst = max(worst, float(error))
                assert error < 1e-4, (step, name)
                assert (single[name] <= 1 + 1e-6).all()
    print(f"{steps} steps by {backend}: at most {worst:.1e} from float64")
    assert int(optimizers[0].state[params[0]]["step"]) == steps
