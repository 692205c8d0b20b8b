from __future__ import annotations

import pytest
import torch

from hyperadam.rule import unit_columns


def test_columns_have_unit_norm():
    y = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([1.0, 1e-3, 1e3])
    euclidean = unit_columns(y)
    torch.testing.assert_close(euclidean.norm(dim=0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(unit_columns(y, "rms"), euclidean * 50**0.5)


def test_zero_columns_stay_zero():
    assert torch.equal(unit_columns(torch.zeros(4, 2)), torch.zeros(4, 2))


def test_no_coordinates():
    for norm in ("euclidean", "rms"):
        assert unit_columns(torch.zeros(0, 2), norm).shape == (0, 2)


@pytest.mark.parametrize("norm", ["euclidean", "rms"])
def test_shards_that_sum_give_the_whole(norm):
    y = torch.randn(10, 3, dtype=torch.float64)
    shards = y.split([4, 0, 6])
    contributions: list[torch.Tensor] = []

    def record(vector):
        contributions.append(vector)
        return vector

    for shard in shards:
        unit_columns(shard, norm, record)
    assert [vector.shape for vector in contributions] == [(4,)] * 3  # column sums and the count
    total = torch.stack(contributions).sum(dim=0)
    parts = [unit_columns(shard, norm, lambda _: total) for shard in shards]
    torch.testing.assert_close(torch.cat(parts), unit_columns(y, norm))


def test_leading_dimensions_are_independent_problems():
    y = torch.randn(2, 5, 3)
    torch.testing.assert_close(unit_columns(y)[1], unit_columns(y[1]))
