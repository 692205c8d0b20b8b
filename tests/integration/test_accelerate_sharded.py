"""FSDP2 by Accelerate, which exchanges the optimizer's parameters for their shards."""

from __future__ import annotations

import pytest
import torch

from hyperadam import VariationalHyperAdam
from integration import jobs
from integration.examples import values
from parallel.pool import Pool

STEPS, SAVED_AT = 8, 3


@pytest.fixture
def pool(tmp_path):
    made = Pool(2, tmp_path)
    yield made
    made.close()


def test_it_goes_like_one_process_and_resumes(pool, tmp_path):
    """One process to rounding; the resumed run bit for bit."""
    model = jobs.make_model()
    jobs.train(model, VariationalHyperAdam(model.named_parameters()), range(STEPS))
    folder = str(tmp_path / "saved")
    for end, resumed_equal, sharded in pool.run(
        jobs.sharded_by_accelerate, folder, STEPS, SAVED_AT
    ):
        torch.testing.assert_close(end, values(model), rtol=1e-9, atol=1e-9)
        assert resumed_equal
        assert sharded
