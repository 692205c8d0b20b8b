"""The fused passes as Triton kernels. Needs triton to import; :mod:`.triton` launches them.

A program is one warp that takes a block of tiles, BLOCK / 32 of them, wherever they lie. Each
thread owns whole coordinates, one in each tile, so nothing but the sums crosses threads: a thread
holds the cell's inputs in registers, takes the outputs four channels at a time, and has the four
gates of each in registers from the first product to the last nonlinear function. Weights come
packed so that a thread reads those of four channels at once.

Kernels are compiled without fusing products into sums (``enable_fp_fusion=False``), which the
noise needs to be the same everywhere; elsewhere ``tl.fma`` fuses by name.

Suffixes: B coordinates of a block, G channels of a group; as in the rule, H channels and K decays.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(32)
GROUP = tl.constexpr(4)
LARGEST_GRADIENT = tl.constexpr(1e15)  # tiled.py

# -- where a block lies ----------------------------------------------------------------------------


@triton.jit
def _block(blocks, program):
    """Of a block: its first slot, its number of slots, its segment, its row in the partial sums."""
    at = blocks + program * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _lanes(slots, parts, first, num_slots, BLOCK: tl.constexpr):
    """Of each lane: its place among all lanes, its part, its number in it.

    Then whether it exists, and whether it is no padding.
    """
    lane = tl.arange(0, BLOCK)
    # Triton sees neighbours through a remainder, not through a bitwise and. Seeing them it would
    # give a thread two neighbours here, but one lane of each tile in matrices, and convert.
    in_tile = lane & 31
    exists = lane < num_slots * TILE
    slot = slots + 2 * (first + lane // TILE)
    tile = tl.load(slot, mask=exists, other=0)
    part = tl.load(slot + 1, mask=exists, other=0)
    at = (tile - tl.load(parts + part * 5)) * TILE + in_tile
    valid = exists & (at < tl.load(parts + part * 5 + 1))
    return tile * TILE + in_tile, part, at, exists, valid


@triton.jit
def _base(place, rows):
    """Where a lane's first row lies in the tiles."""
    return (place // TILE) * (rows * TILE) + (place & 31)


# -- noise: rule/noise.py, operation for operation -------------------------------------------------


@triton.jit
def _philox(word0, word1, word2, word3, key0, key1):
    """Philox 4x32-10 (Salmon et al., SC 2011) on uint32."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(word0, tl.full(word0.shape, 0xD2511F53, tl.uint32))
        high1 = tl.umulhi(word2, tl.full(word2.shape, 0xCD9E8D57, tl.uint32))
        low0 = word0 * tl.full(word0.shape, 0xD2511F53, tl.uint32)
        low1 = word2 * tl.full(word2.shape, 0xCD9E8D57, tl.uint32)
        word0, word1 = high1 ^ word1 ^ key0, low1
        word2, word3 = high0 ^ word3 ^ key1, low0
        key0 += tl.full(key0.shape, 0x9E3779B9, tl.uint32)
        key1 += tl.full(key1.shape, 0xBB67AE85, tl.uint32)
    return word0, word1, word2, word3


@triton.jit
def _log_unit(word):
    """``log((word | 1) / 2^32)``"""
    bits = (word | 1).to(tl.float32).to(tl.uint32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # in [1/2, 1)
    exponent = (bits >> 23).to(tl.int32) - 126
    low = mantissa < 0.70710678118654752440
    mantissa = tl.where(low, mantissa + mantissa, mantissa)
    exponent = exponent - low.to(tl.int32) - 32
    s = tl.div_rn(mantissa - 1.0, mantissa + 1.0)
    square = s * s
    series = square * (2 / 9)
    series = (series + 2 / 7) * square
    series = (series + 2 / 5) * square
    series = (series + 2 / 3) * square
    series = (series + 2.0) * s
    return exponent.to(tl.float32) * 0.69314718055994530942 + series


@triton.jit
def _sin_or_cos_turn(word, want_sine):
    quadrant = word >> 30
    offset = (word & 0x3FFFFFFF).to(tl.int32) - 0x20000000
    angle = offset.to(tl.float32) * (3.14159265358979323846 / 2 / 1073741824.0)
    square = angle * angle
    sine = square * (1 / 362880)
    sine = (sine + -1 / 5040) * square
    sine = (sine + 1 / 120) * square
    sine = (sine + -1 / 6) * square
    sine = (sine + 1.0) * angle
    cosine = square * (-1 / 3628800)
    cosine = (cosine + 1 / 40320) * square
    cosine = (cosine + -1 / 720) * square
    cosine = (cosine + 1 / 24) * square
    cosine = (cosine + -1 / 2) * square
    cosine = cosine + 1.0
    # The sine's quadrants are the cosine's, one later.
    swap = ((quadrant & 1) == 1) == want_sine
    negative = ((quadrant >= 2) != (((quadrant & 1) == 1) & ~want_sine)).to(tl.uint32)
    chosen = tl.where(swap, cosine, sine)
    chosen = chosen.to(tl.uint32, bitcast=True) ^ (negative << 31)
    return chosen.to(tl.float32, bitcast=True)


@triton.jit
def standard_normal(seed, step, coordinate):
    """Of int64 seeds, steps and coordinates of one shape. Each lane makes a whole Philox block."""
    block = coordinate >> 2
    word0, word1, word2, word3 = _philox(
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        step.to(tl.uint32),
        (step >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    second = (coordinate & 2) != 0
    radius = tl.sqrt_rn(_log_unit(tl.where(second, word2, word0)) * -2.0)
    return radius * _sin_or_cos_turn(tl.where(second, word3, word1), (coordinate & 1) != 0)


@triton.jit
def rounding_words(seed, step, coordinate):
    """What the rounding of a coordinate's state starts from: another stream than the noise's."""
    word, _, _, _ = _philox(
        coordinate.to(tl.uint32),
        (coordinate >> 32).to(tl.uint32),
        step.to(tl.uint32),
        (step >> 32).to(tl.uint32) | 0x80000000,
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    return word


# -- the state's storage ---------------------------------------------------------------------------


@triton.jit
def _load(pointer, mask, BFLOAT16: tl.constexpr):
    """Numbers of the state as float32; bfloat16 comes as int16."""
    if BFLOAT16:
        bits = tl.load(pointer, mask=mask, other=0).to(tl.uint16, bitcast=True)
        value = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(pointer, mask=mask, other=0.0)
    return value


@triton.jit
def _store(pointer, value, mask, words, row, STOCHASTIC: tl.constexpr, BFLOAT16: tl.constexpr):
    """Store numbers of the state's rows ``row``; returns what was stored, as float32."""
    if BFLOAT16:
        bits = value.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            hashed = words ^ (row.to(tl.uint32) * tl.full((1,), 0x9E3779B9, tl.uint32))
            hashed = (hashed ^ (hashed >> 16)) * tl.full((1,), 0x85EBCA6B, tl.uint32)
            hashed = (hashed ^ (hashed >> 13)) * tl.full((1,), 0xC2B2AE35, tl.uint32)
            bits += hashed >> 16
        else:
            bits += 0x7FFF + ((bits >> 16) & 1)
        tl.store(pointer, (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        tl.store(pointer, value, mask=mask)
    return value


# -- nonlinear functions, to float32's precision near 0 also ---------------------------------------


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 88.0)))


@triton.jit
def _tanh(x):
    size = tl.abs(x)
    square = x * x
    series = tl.fma(square, -0.005905868019908667, 0.02080538496375084)
    series = tl.fma(series, square, -0.053786683827638626)
    series = tl.fma(series, square, 0.13331958651542664)
    series = tl.fma(series, square, -0.33333298563957214)
    near = tl.fma(series * square, x, x)
    far = 1.0 - 2.0 / (tl.exp(tl.minimum(2.0 * size, 40.0)) + 1.0)
    return tl.where(size < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def _elu(x):
    low = tl.minimum(x, 0.0)
    series = tl.fma(low, 0.0011282321065664291, 0.008196125738322735)
    series = tl.fma(series, low, 0.0416332446038723)
    series = tl.fma(series, low, 0.16666309535503387)
    series = tl.fma(series, low, 0.49999988079071045)
    near = tl.fma(series * low, low, low)
    return tl.where(x > 0, x, tl.where(x > -0.5, near, tl.exp(low) - 1.0))


# -- the rule's steps ------------------------------------------------------------------------------


@triton.jit
def _moment(
    tiles, base, grad_B, moments, corrections, part, exists, k: tl.constexpr, K: tl.constexpr,
    BFLOAT16: tl.constexpr,
):  # fmt: skip
    """Fixed moment k and its two features (docs/method.md, steps 1 and 2)."""
    keep, take = tl.load(moments + 2 * k), tl.load(moments + 2 * k + 1)
    inverse = tl.load(corrections + part * K + k)
    avg = _load(tiles + base + k * TILE, exists, BFLOAT16)
    sq = _load(tiles + base + (K + k) * TILE, exists, BFLOAT16)
    avg = tl.fma(keep, avg, take * grad_B)
    sq = tl.fma(keep, sq, take * (grad_B * grad_B))
    scale = 1.0 / (tl.sqrt(sq * inverse) + 1e-8)
    return avg, sq, grad_B * scale, avg * inverse * scale


@triton.jit
def _preprocess(features, pre_weight, pre_bias, channel, WIDTH: tl.constexpr):
    """One channel of x (step 2)."""
    x_B = tl.zeros_like(features[0]) + tl.load(pre_bias + channel)
    for f in tl.static_range(WIDTH):
        x_B = tl.fma(features[f], tl.load(pre_weight + channel * WIDTH + f), x_B)
    return _elu(x_B)


@triton.jit
def _sum_squares(value_GB, valid):
    value_GB = tl.where(valid[None, :], value_GB, 0.0)
    return tl.sum(value_GB * value_GB, axis=1)


@triton.jit
def features_pass(
    tiles, grad, blocks, slots, parts, corrections, moments, pre_weight, pre_bias,
    sums, finite,
    H: tl.constexpr, K: tl.constexpr, BFLOAT16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of x squared of each block, and whether its gradient is finite. Changes no state."""
    program = tl.program_id(0)
    first, num_slots, _, row = _block(blocks, program)
    place, part, _, exists, valid = _lanes(slots, parts, first, num_slots, BLOCK)
    base = _base(place, 2 * K + 6 * H)
    grad_B = tl.load(grad + place, mask=exists, other=0.0)
    good = tl.abs(grad_B) <= LARGEST_GRADIENT  # false for NaN
    tl.store(finite + program, tl.min(good.to(tl.int32), axis=0))
    grad_B = tl.where(good, grad_B, 0.0)
    features = ()
    for k in tl.static_range(K):
        _, _, of_grad, of_avg = _moment(
            tiles, base, grad_B, moments, corrections, part, exists, k, K, BFLOAT16
        )
        features = features + (of_grad, of_avg)
    for channel in range(H):
        x_B = _preprocess(features, pre_weight, pre_bias, channel, 2 * K)
        x_B = tl.where(valid, x_B, 0.0)
        tl.store(sums + row * H + channel, tl.sum(x_B * x_B, axis=0))


@triton.jit
def squares_pass(
    tiles, blocks, slots, parts, sums, first_row,
    H: tl.constexpr, K: tl.constexpr, BFLOAT16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the squares of H rows from ``first_row`` on."""
    first, num_slots, _, row = _block(blocks, tl.program_id(0))
    place, _, _, exists, valid = _lanes(slots, parts, first, num_slots, BLOCK)
    base = _base(place, 2 * K + 6 * H)
    for channel in range(H):
        value = _load(tiles + base + (first_row + channel) * TILE, exists, BFLOAT16)
        value = tl.where(valid, value, 0.0)
        tl.store(sums + row * H + channel, tl.sum(value * value, axis=0))


@triton.jit
def state_cell_pass(
    tiles, new_tiles, grad, go, blocks, slots, parts, steps, corrections, moments,
    pre_weight, pre_bias, weight, bias, sums,
    H: tl.constexpr, K: tl.constexpr, BFLOAT16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """New fixed moments, h and c (step 4), and the sums of the new h squared.

    ``weight`` is packed as (S, groups, 2H, 4 gates, GROUP), with the column norms' scales in it;
    ``bias`` as (groups, 4 gates, GROUP).
    """
    first, num_slots, segment, row = _block(blocks, tl.program_id(0))
    num_slots = num_slots * tl.load(go).to(tl.int32)  # nothing exists where the step is refused
    place, part, at, exists, valid = _lanes(slots, parts, first, num_slots, BLOCK)
    base = _base(place, 2 * K + 6 * H)
    grad_B = tl.load(grad + place, mask=exists, other=0.0)
    words = part.to(tl.uint32)
    if BFLOAT16:
        words = rounding_words(
            tl.load(parts + part * 5 + 3),
            tl.load(steps + part),
            tl.load(parts + part * 5 + 2) + at,
        )

    # All of the cell's inputs, in registers, before the first of them is overwritten.
    features = ()
    for k in tl.static_range(K):
        avg, sq, of_grad, of_avg = _moment(
            tiles, base, grad_B, moments, corrections, part, exists, k, K, BFLOAT16
        )
        row_k = tl.full((1,), k, tl.int32)
        _store(new_tiles + base + k * TILE, avg, exists, words, row_k, True, BFLOAT16)
        _store(new_tiles + base + (K + k) * TILE, sq, exists, words, row_k + K, True, BFLOAT16)
        features = features + (of_grad, of_avg)
    inputs = ()
    for k in tl.static_range(H):
        inputs = inputs + (_preprocess(features, pre_weight, pre_bias, k, 2 * K),)
    for k in tl.static_range(H):
        inputs = inputs + (_load(tiles + base + (2 * K + k) * TILE, exists, BFLOAT16),)
    tl.debug_barrier()

    in_group = tl.arange(0, GROUP)
    num_groups: tl.constexpr = (H + GROUP - 1) // GROUP
    weight += segment * (num_groups * 8 * H * GROUP)
    for group in range(num_groups):
        at_bias = bias + group * (4 * GROUP) + in_group
        zeros_GB = tl.zeros((GROUP, BLOCK), tl.float32)
        i_GB = zeros_GB + tl.load(at_bias)[:, None]
        j_GB = zeros_GB + tl.load(at_bias + GROUP)[:, None]
        f_GB = zeros_GB + tl.load(at_bias + 2 * GROUP)[:, None]
        o_GB = zeros_GB + tl.load(at_bias + 3 * GROUP)[:, None]
        at_weight = weight + group * (8 * H * GROUP) + in_group
        for k in tl.static_range(2 * H):
            input_1B = inputs[k][None, :]
            i_GB = tl.fma(tl.load(at_weight + 4 * k * GROUP)[:, None], input_1B, i_GB)
            j_GB = tl.fma(tl.load(at_weight + (4 * k + 1) * GROUP)[:, None], input_1B, j_GB)
            f_GB = tl.fma(tl.load(at_weight + (4 * k + 2) * GROUP)[:, None], input_1B, f_GB)
            o_GB = tl.fma(tl.load(at_weight + (4 * k + 3) * GROUP)[:, None], input_1B, o_GB)
        channel = group * GROUP + in_group
        row_h = (2 * K + channel)[:, None]
        row_c = row_h + H
        mask = (channel < H)[:, None] & exists[None, :]
        c_GB = _load(tiles + base[None, :] + row_c * TILE, mask, BFLOAT16)
        c_GB = tl.fma(_sigmoid(f_GB + 1.0), c_GB, _sigmoid(i_GB) * _tanh(j_GB))
        h_GB = _sigmoid(o_GB) * _tanh(c_GB)
        at_new = new_tiles + base[None, :]
        _store(at_new + row_c * TILE, c_GB, mask, words[None, :], row_c, True, BFLOAT16)
        h_GB = _store(at_new + row_h * TILE, h_GB, mask, words[None, :], row_h, False, BFLOAT16)
        tl.store(sums + row * H + channel, _sum_squares(h_GB, valid), mask=channel < H)


@triton.jit
def adam_cell_pass(
    tiles, new_tiles, grad, mean, log_var, direction, go, blocks, slots, parts, steps,
    rates_weight, rho_weight, bias, var_weight, var_bias, bound, sums,
    H: tl.constexpr, K: tl.constexpr, BFLOAT16: tl.constexpr, BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr, VAR_BLOCK: tl.constexpr, DIRECTION: tl.constexpr,
):  # fmt: skip
    """New m, v and corrections, the update (steps 5 to 8), and the sums of the new m squared.

    ``rates_weight``, for β and γ, is packed as (S, groups, 2H, 2, GROUP), with the column norms'
    scales in it; ``rho_weight`` as (groups, H, GROUP); ``bias``, for β, γ and ρ, as
    (groups, 3, GROUP).
    """
    first, num_slots, segment, row = _block(blocks, tl.program_id(0))
    num_slots = num_slots * tl.load(go).to(tl.int32)  # nothing exists where the step is refused
    place, part, at, exists, valid = _lanes(slots, parts, first, num_slots, BLOCK)
    base = _base(place, 2 * K + 6 * H)
    grad_B = tl.load(grad + place, mask=exists, other=0.0)
    seed = tl.load(parts + part * 5 + 3)
    step = tl.load(steps + part)
    coordinate = tl.load(parts + part * 5 + 2) + at
    words = part.to(tl.uint32)
    if BFLOAT16:
        words = rounding_words(seed, step, coordinate)

    # All of the cell's inputs, in registers, before the first of them is overwritten.
    inputs = ()
    for k in tl.static_range(H):
        inputs = inputs + (_load(tiles + base + (2 * K + 2 * H + k) * TILE, exists, BFLOAT16),)
    for k in tl.static_range(H):
        inputs = inputs + (_load(new_tiles + base + (2 * K + k) * TILE, exists, BFLOAT16),)
    tl.debug_barrier()

    mean_B = tl.zeros_like(grad_B)
    in_group = tl.arange(0, GROUP)
    num_groups: tl.constexpr = (H + GROUP - 1) // GROUP
    rates_weight += segment * (num_groups * 4 * H * GROUP)
    for group in range(num_groups):
        at_bias = bias + group * (3 * GROUP) + in_group
        zeros_GB = tl.zeros((GROUP, BLOCK), tl.float32)
        beta_GB = zeros_GB + tl.load(at_bias)[:, None]
        gamma_GB = zeros_GB + tl.load(at_bias + GROUP)[:, None]
        rho_GB = zeros_GB + tl.load(at_bias + 2 * GROUP)[:, None]
        at_rates = rates_weight + group * (4 * H * GROUP) + in_group
        at_rho = rho_weight + group * (H * GROUP) + in_group
        for k in tl.static_range(2 * H):
            input_1B = inputs[k][None, :]
            beta_GB = tl.fma(tl.load(at_rates + 2 * k * GROUP)[:, None], input_1B, beta_GB)
            gamma_GB = tl.fma(tl.load(at_rates + (2 * k + 1) * GROUP)[:, None], input_1B, gamma_GB)
        for k in tl.static_range(H):
            weight_G1 = tl.load(at_rho + k * GROUP)[:, None]
            rho_GB = tl.fma(weight_G1, inputs[H + k][None, :], rho_GB)
        channel = group * GROUP + in_group
        row_m = (2 * K + 2 * H + channel)[:, None]
        mask = (channel < H)[:, None] & exists[None, :]
        at_old = tiles + base[None, :] + row_m * TILE
        m_GB = _load(at_old, mask, BFLOAT16)
        v_GB = _load(at_old + H * TILE, mask, BFLOAT16)
        m_corr_GB = _load(at_old + 2 * H * TILE, mask, BFLOAT16)
        v_corr_GB = _load(at_old + 3 * H * TILE, mask, BFLOAT16)

        # Each rate and its complement from one exponential: 1 - β would lose digits near 1.
        power_GB = tl.exp(tl.minimum(beta_GB, 88.0))
        one_less_GB = 1.0 / (1.0 + power_GB)
        beta_GB = power_GB * one_less_GB
        m_GB = tl.fma(beta_GB, m_GB, one_less_GB * grad_B[None, :])
        m_corr_GB = tl.fma(beta_GB, m_corr_GB, one_less_GB)
        power_GB = tl.exp(tl.minimum(gamma_GB, 88.0))
        one_less_GB = 1.0 / (1.0 + power_GB)
        gamma_GB = power_GB * one_less_GB
        v_GB = tl.fma(gamma_GB, v_GB, one_less_GB * (grad_B * grad_B)[None, :])
        v_corr_GB = tl.fma(gamma_GB, v_corr_GB, one_less_GB)

        a_GB = (m_GB / (m_corr_GB + 1e-24)) / tl.sqrt(v_GB / (v_corr_GB + 1e-24) + 1e-24)
        if BOUNDED:
            a_GB = bound * _tanh(a_GB / bound)
        weighted_GB = tl.where((channel < H)[:, None], _elu(rho_GB) * a_GB, 0.0)
        mean_B += tl.sum(weighted_GB, axis=0)

        at_new = new_tiles + base[None, :] + row_m * TILE
        words_GB = words[None, :]
        m_GB = _store(at_new, m_GB, mask, words_GB, row_m, True, BFLOAT16)
        _store(at_new + H * TILE, v_GB, mask, words_GB, row_m + H, True, BFLOAT16)
        _store(at_new + 2 * H * TILE, m_corr_GB, mask, words_GB, row_m + 2 * H, True, BFLOAT16)
        _store(at_new + 3 * H * TILE, v_corr_GB, mask, words_GB, row_m + 3 * H, True, BFLOAT16)
        tl.store(sums + row * H + channel, _sum_squares(m_GB, valid), mask=channel < H)

    tl.store(mean + place, mean_B, mask=exists)
    direction_B = mean_B
    if VAR_BLOCK:
        log_var_B = tl.zeros_like(mean_B) + tl.load(var_bias)
        for k in tl.static_range(H):
            log_var_B = tl.fma(inputs[H + k], tl.load(var_weight + k), log_var_B)
        tl.store(log_var + place, log_var_B, mask=exists)
        if DIRECTION:
            noise_B = standard_normal(seed, step, coordinate)
            sampled_B = tl.fma(tl.exp(log_var_B * 0.5), noise_B, mean_B)
            direction_B = tl.where(tl.load(parts + part * 5 + 4) != 0, sampled_B, mean_B)
    if DIRECTION:
        tl.store(direction + place, direction_B, mask=exists)


@triton.jit
def variance_sums_pass(
    tiles, mean, blocks, slots, parts, corrections, sums, decay,
    H: tl.constexpr, K: tl.constexpr, BFLOAT16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a decay's second moment, corrected, and of the mean squared, of each block."""
    first, num_slots, _, row = _block(blocks, tl.program_id(0))
    place, part, _, exists, valid = _lanes(slots, parts, first, num_slots, BLOCK)
    base = _base(place, 2 * K + 6 * H)
    moment_B = _load(tiles + base + (K + decay) * TILE, exists, BFLOAT16)
    moment_B *= tl.load(corrections + part * K + decay)
    mean_B = tl.load(mean + place, mask=valid, other=0.0)
    tl.store(sums + 2 * row, tl.sum(tl.where(valid, moment_B, 0.0), axis=0))
    tl.store(sums + 2 * row + 1, tl.sum(mean_B * mean_B, axis=0))


@triton.jit
def shape_variance_pass(
    tiles, mean, log_var, direction, go, blocks, slots, parts, corrections, moment, level, decay,
    base, floor,
    H: tl.constexpr, K: tl.constexpr, BFLOAT16: tl.constexpr, BLOCK: tl.constexpr,
    DIRECTION: tl.constexpr,
):  # fmt: skip
    """Multiplies variances by their segment's ``level`` and their coordinate's narrowing."""
    first, num_slots, segment, _ = _block(blocks, tl.program_id(0))
    num_slots = num_slots * tl.load(go).to(tl.int32)  # nothing exists where the step is refused
    place, part, _, exists, valid = _lanes(slots, parts, first, num_slots, BLOCK)
    row = _base(place, 2 * K + 6 * H) + (K + decay) * TILE
    share_B = _load(tiles + row, exists, BFLOAT16) * tl.load(corrections + part * K + decay)
    share_B = share_B / tl.load(moment + segment)
    narrowing_B = floor + (1.0 - floor) * base / (base + share_B)
    level_1 = tl.load(level + segment)
    log_var_B = tl.load(log_var + place, mask=exists, other=0.0)
    log_var_B += tl.log(narrowing_B) + tl.log(level_1)
    tl.store(log_var + place, log_var_B, mask=exists)
    if DIRECTION:
        mean_B = tl.load(mean + place, mask=exists, other=0.0)
        noise_B = tl.load(direction + place, mask=exists, other=0.0) - mean_B
        scale_B = tl.sqrt(narrowing_B) * tl.sqrt(level_1)
        tl.store(direction + place, tl.fma(noise_B, scale_B, mean_B), mask=valid)


@triton.jit
def noise_pass(out, counter, count, BLOCK: tl.constexpr):
    """The noise by itself; ``counter`` holds its seed, step and first coordinate."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.int64)
    seed, step, start = tl.load(counter), tl.load(counter + 1), tl.load(counter + 2)
    normal = standard_normal(zeros + seed, zeros + step, start + lane.to(tl.int64))
    tl.store(out + lane, normal, mask=lane < count)
