"""Counter-based standard normal numbers: a pure function of (seed, step, coordinate).

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives four
32-bit words for a counter; Box-Muller turns each pair of words into two normal numbers. The
counter is (coordinate // 4, step), the key is the seed, and the coordinate's last two bits choose
among the four numbers.

The logarithm, sine and cosine are written out in float32 additions, multiplications, divisions
and square roots, each of which IEEE 754 rounds in one way only. Any processor that evaluates them
in this order without fusing them gets the same bits, whatever its mathematical library, vector
width or number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_SEED = 2**63 - 1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox 4x32-10.

    Args:
        counter: four int64 tensors of one shape, each holding 32-bit words.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of that shape, each holding 32-bit words.
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap around; the mask after the shift makes the high word unsigned.
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        word0 = ((product1 >> 32) & _WORD) ^ word1 ^ key0
        word2 = ((product0 >> 32) & _WORD) ^ word3 ^ key1
        word1, word3 = product1 & _WORD, product0 & _WORD
        key0 = (key0 + _KEY_INCREMENTS[0]) & _WORD
        key1 = (key1 + _KEY_INCREMENTS[1]) & _WORD
    return [word0, word1, word2, word3]


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Polynomial with the highest coefficient first; multiply, round, add, round."""
    value = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        value = (value + coefficient) * x
    return value + coefficients[-1]


def _log_unit(word: Tensor) -> Tensor:
    """``log((word | 1) / 2^32)`` in float32, for 32-bit words."""
    mantissa, exponent = torch.frexp((word | 1).to(torch.float32))  # mantissa in [1/2, 1)
    low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(low, mantissa + mantissa, mantissa)
    exponent = (exponent - low.to(exponent.dtype) - 32).to(torch.float32)
    # log(m) = 2 atanh(s), s = (m - 1)/(m + 1), |s| < 0.172: five terms reach float32.
    s = (mantissa - 1) / (mantissa + 1)
    series = _horner(s * s, (2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)) * s
    return exponent * math.log(2) + series


def _sin_cos_turn(word: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of a full turn's ``word / 2^32``-th part, shifted by half a quadrant."""
    quadrant = word >> 30
    offset = (word & 0x3FFFFFFF) - 0x20000000
    angle = offset.to(torch.float32) * (math.pi / 2 / 2**30)  # in [-π/4, π/4)
    square = angle * angle
    sine = _horner(square, (1 / 362880, -1 / 5040, 1 / 120, -1 / 6, 1.0)) * angle
    cosine = _horner(square, (-1 / 3628800, 1 / 40320, -1 / 720, 1 / 24, -1 / 2, 1.0))
    swap = (quadrant & 1) == 1
    sine, cosine = torch.where(swap, cosine, sine), torch.where(swap, -sine, cosine)
    flip = quadrant >= 2
    return torch.where(flip, -sine, sine), torch.where(flip, -cosine, cosine)


def _box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    # torch.sqrt is not always rounded correctly in float32 (with MKL it is not); rounding a square
    # root in float64 is, since none lies so near the middle between two numbers of float32.
    radius = (_log_unit(word0) * -2.0).to(torch.float64).sqrt().to(torch.float32)
    sine, cosine = _sin_cos_turn(word1)
    return radius * cosine, radius * sine


def standard_normal(
    seed: int,
    step: int | Tensor,
    start: int,
    count: int,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Independent N(0, 1) numbers for the coordinates ``start`` to ``start + count - 1``.

    Args:
        seed: 0 to 2^63 - 1.
        step: 0 or more; an integer, or an integer tensor of any shape S.
        start, count: the range of coordinates.
        device: where to compute them; the numbers are the same everywhere.
        dtype: of the result. The numbers are made in float32 and converted.

    Returns:
        A tensor of shape (*S, count).
    """
    first_block = start // 4
    blocks = torch.arange(first_block, -(-(start + count) // 4), device=device)
    steps = torch.as_tensor(step, dtype=torch.int64, device=device).unsqueeze(-1)
    blocks, steps = (
        blocks.expand(*steps.shape[:-1], -1),
        steps.expand(*steps.shape[:-1], len(blocks)),
    )
    counter = (blocks & _WORD, blocks >> 32, steps & _WORD, steps >> 32)
    words = philox(counter, (seed & _WORD, seed >> 32))
    normals = torch.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], -1)
    offset = start - 4 * first_block
    return normals.flatten(-2)[..., offset : offset + count].to(dtype)


def rounding_words(
    seed: int, step: int, start: int, count: int, *, device: torch.device | None = None
) -> Tensor:
    """One random 32-bit word a coordinate, for the rounding of its state.

    The first word of Philox at the counter (coordinate, step), with the step's top bit set, which
    the counters of :func:`standard_normal` never have.

    Args:
        seed: 0 to 2^63 - 1.
        step: 0 or more.
        start, count: the range of coordinates.
        device: where to compute them.

    Returns:
        int64 of shape (count,).
    """
    coordinates = torch.arange(start, start + count, device=device)
    steps = torch.full_like(coordinates, step & _WORD)
    high = torch.full_like(coordinates, (step >> 32) | 0x80000000)
    counter = (coordinates & _WORD, coordinates >> 32, steps, high)
    return philox(counter, (seed & _WORD, seed >> 32))[0]


def round_stochastically(values_NC: Tensor, words_N: Tensor, first_row: int) -> Tensor:
    """Round float32 to bfloat16, up or down at random so that the mean is kept.

    Sixteen bits hashed from a coordinate's word and the row are added below bfloat16's last bit,
    and the rest is cut off.

    Args:
        values_NC: float32, whose column c is row ``first_row + c`` of the state.
        words_N: from :func:`rounding_words`.
        first_row: see ``values_NC``.
    """
    rows_C = torch.arange(first_row, first_row + values_NC.shape[1], device=values_NC.device)
    x = words_N.unsqueeze(-1) ^ ((rows_C * 0x9E3779B9) & _WORD)
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    bits = values_NC.contiguous().view(torch.int32).to(torch.int64) & _WORD
    rounded = ((bits + (x >> 16)) & 0xFFFF0000).to(torch.int32)
    return rounded.view(torch.float32).to(torch.bfloat16)
