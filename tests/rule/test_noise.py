from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperadam.rule import MAX_SEED, noise, standard_normal
from hyperadam.rule.noise import philox

ONES = 0xFFFFFFFF

# Known answers of the generator's authors (Random123, philox4x32-10).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    result = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in result) == words


def test_box_muller_agrees_with_double_precision():
    seed, step, count = 11, 7, 4096
    blocks = torch.arange(count // 4)
    zeros = torch.zeros_like(blocks)
    words = philox((blocks, zeros, zeros + step, zeros), (seed, 0))
    expected = []
    for word0, word1 in (words[:2], words[2:]):
        radius = torch.sqrt(-2 * torch.log((word0 | 1).double() / 2**32))
        angle = word1.double() * (2 * math.pi / 2**32) - math.pi / 4
        expected += [radius * torch.cos(angle), radius * torch.sin(angle)]
    expected = torch.stack(expected, dim=1).flatten()
    actual = standard_normal(seed, step, 0, count)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-6)


def test_known_numbers_never_change():
    """A run of an older version must resume with the same noise."""
    numbers = standard_normal(seed=2**40 + 3, step=5, start=6, count=4)
    assert numbers.tolist() == [
        1.2973583936691284,
        -1.3968991041183472,
        1.0117042064666748,
        -1.0741901397705078,
    ]


def test_the_radius_is_rounded_correctly():
    """As IEEE 754 has it, and so as every other program has it; NumPy's root is."""
    words = torch.arange(0, 2**32, 43_003)
    ours = noise._box_muller(words, torch.full_like(words, 2**29))[0]
    exact = torch.from_numpy(np.sqrt((noise._log_unit(words) * -2.0).numpy()))
    assert torch.equal(ours, exact)


def test_moments():
    z = standard_normal(1, 1, 0, 1_000_000).double()
    assert float(z.mean()) == pytest.approx(0, abs=4e-3)
    assert float(z.var()) == pytest.approx(1, abs=6e-3)
    assert float(z.pow(3).mean()) == pytest.approx(0, abs=1.6e-2)
    assert float(z.pow(4).mean()) == pytest.approx(3, abs=4e-2)
    for sigmas, share in ((1, 0.682689), (2, 0.954500), (3, 0.997300)):
        assert float((z.abs() < sigmas).double().mean()) == pytest.approx(share, abs=2e-3)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((1, 1, 1), id="next coordinate"),
        pytest.param((1, 1, 2), id="other pair of a block"),
        pytest.param((1, 1, 4), id="next block"),
        pytest.param((1, 2, 0), id="next step"),
        pytest.param((2, 1, 0), id="next seed"),
        pytest.param((1 + 2**32, 1, 0), id="high word of the seed"),
        pytest.param((1, 1 + 2**32, 0), id="high word of the step"),
        pytest.param((1, 1, 4 * 2**32), id="high word of the coordinate"),
    ],
)
def test_independence(other):
    """Numbers and their squares are uncorrelated with those at any other counter."""
    count = 200_000
    seed, step, start = other
    a = standard_normal(1, 1, 0, count).double()
    b = standard_normal(seed, step, start, count).double()
    for x, y in ((a, b), (a**2 - 1, b**2 - 1), (a, b**2 - 1)):
        correlation = float((x * y).mean() / (x.std() * y.std()))
        assert abs(correlation) < 4.5 / math.sqrt(count)


@given(
    seed=st.integers(0, MAX_SEED),
    step=st.integers(0, 2**40),
    start=st.integers(0, 2**40),
    cut=st.integers(0, 40),
)
def test_a_range_is_the_sum_of_its_parts(seed, step, start, cut):
    whole = standard_normal(seed, step, start, 40)
    parts = [
        standard_normal(seed, step, start, cut),
        standard_normal(seed, step, start + cut, 40 - cut),
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.isfinite(whole).all()


def test_steps_can_be_a_tensor():
    rows = standard_normal(3, torch.tensor([4, 5]), 2, 9)
    assert rows.shape == (2, 9)
    for row, step in zip(rows, (4, 5), strict=True):
        assert torch.equal(row, standard_normal(3, step, 2, 9))


def test_the_same_at_any_number_of_threads():
    count, threads = 100_003, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = standard_normal(9, 9, 1, count)
        torch.set_num_threads(2)
        two = standard_normal(9, 9, 1, count)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


def test_dtype_only_converts():
    assert torch.equal(
        standard_normal(1, 2, 3, 50, dtype=torch.float64), standard_normal(1, 2, 3, 50).double()
    )


def test_no_numbers():
    assert standard_normal(1, 2, 3, 0).shape == (0,)


def test_the_default_dtype_does_not_matter():
    expected = standard_normal(1, 2, 3, 50)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(standard_normal(1, 2, 3, 50), expected)
    finally:
        torch.set_default_dtype(torch.float32)
