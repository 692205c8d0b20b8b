"""GradScaler over gloo processes: an overflow in one of them is one of all."""

from __future__ import annotations

import pytest
import torch

from parallel import jobs

STEPS, BAD_STEP = 8, 3


@pytest.mark.parametrize("size", [2, 4])
def test_an_overflow_in_one_process_skips_all(pools, size):
    """As one process without a scale, to rounding."""
    expected = jobs.alone(STEPS)
    for params, scale, skipped in pools[size].run(jobs.scaled, STEPS, BAD_STEP):
        for one, other in zip(params, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert (scale, skipped) == (2.0**9, 1)
