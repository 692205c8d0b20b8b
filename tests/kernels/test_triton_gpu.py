"""The Triton kernel on a GPU: beside the reference, without waiting, and in a CUDA graph."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from conftest import random_theta
from hyperadam.kernels import TILE, Lanes, TiledState, TileLayout, lay_out
from hyperadam.kernels import triton as kernel
from hyperadam.kernels.fused import FusedTiledRule
from hyperadam.kernels.tiled import ReferenceTiledRule
from hyperadam.rule import VariationalHyperAdamRule, standard_normal

CUDA = torch.device("cuda")

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or kernel.why_not(CUDA, torch.float32) is not None
    or kernel.interpreted(),
    reason="needs a GPU and Triton, not interpreted",
)

RULES = {
    "paper": VariationalHyperAdamRule(),
    "odd": VariationalHyperAdamRule(
        channels=7,
        moment_decays=(0.5, 0.9, 0.99),
        column_norm="rms",
        candidate_bound=5.0,
        variance_base=0.01,
        variance_floor=0.1,
    ),
    "largest": VariationalHyperAdamRule(channels=32, candidate_bound=2.0, var_block=False),
}

COUNTS = [0, 1, 31, 32, 33, 10_000, 5]


def make(rule, counts, state_dtype=torch.float32):
    """A fused rule, its parts, and their state and buffers on the GPU."""
    theta = {name: value.to(CUDA) for name, value in random_theta(rule).items()}
    parts = [dataclasses.replace(part, seed=2**40 + 3) for part in lay_out(counts)]
    tiles = sum(part.num_tiles for part in parts)
    shape = (tiles, TileLayout.of(rule).num_rows, TILE)
    state = TiledState(torch.zeros(shape, dtype=state_dtype, device=CUDA))
    grad, mean, log_var, direction = torch.zeros(4, tiles * TILE, device=CUDA)
    lanes = Lanes(grad, mean, log_var if rule.var_block else None, direction)
    tiled = FusedTiledRule(kernel.TritonPasses(rule, theta, state_dtype))
    return tiled, theta, parts, state, lanes


def make_peak(rule):
    return torch.zeros(1, dtype=torch.float64, device=CUDA) if rule.has_peak else None


def fill(lanes, parts, step):
    generator = torch.Generator().manual_seed(step)
    for part in parts:
        grad = torch.randn(part.count, generator=generator)
        lanes.grad[part.lanes] = grad.to(CUDA)


def valid(parts):
    return torch.cat([torch.arange(part.lanes.start, part.lanes.stop) for part in parts]).to(CUDA)


@pytest.mark.parametrize("name", RULES)
def test_it_is_the_reference(name):
    rule = RULES[name]
    tiled, theta, parts, state, lanes = make(rule, COUNTS)
    other_state = TiledState(state.tiles_TRx.clone())
    other = Lanes(*(None if x is None else x.clone() for x in vars(lanes).values()))
    reference = ReferenceTiledRule(rule, theta)
    peak, other_peak = make_peak(rule), make_peak(rule)
    index = valid(parts)
    for step in range(1, 6):
        fill(lanes, parts, step)
        other.grad.copy_(lanes.grad)
        steps = torch.full((len(parts),), step, device=CUDA)
        tiled.step(state, parts, steps, lanes, peak_S=peak)
        reference.step(other_state, parts, steps, other, peak_S=other_peak)
        if peak is not None:
            torch.testing.assert_close(peak, other_peak, rtol=1e-5, atol=0)
        for actual, expected in zip(vars(lanes).values(), vars(other).values(), strict=True):
            if actual is not None:
                scale = float(expected[index].abs().max())
                torch.testing.assert_close(
                    actual[index], expected[index], rtol=0, atol=1e-5 * scale
                )


def test_the_noise_is_bit_for_bit_the_same():
    for seed, step, start in [(0, 1, 0), (2**63 - 1, 2**32 + 9, 2**34 - 50), (7, 2**45, 2**50)]:
        expected = standard_normal(seed, step, start, 100_000)
        assert torch.equal(kernel.standard_normal(seed, step, start, 100_000, CUDA).cpu(), expected)


@pytest.mark.parametrize("name", ["paper", "odd"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_step_never_waits_and_repeats_bit_for_bit(state_dtype, name):
    rule = RULES[name]
    results = []
    for _ in range(2):
        peak = make_peak(rule)
        tiled, _, parts, state, lanes = make(rule, COUNTS, state_dtype)
        steps = torch.ones(len(parts), dtype=torch.int64, device=CUDA)
        fill(lanes, parts, 0)
        tiled.step(state, parts, steps, lanes, peak_S=peak)  # plans and compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            tiled.step(state, parts, steps + 1, lanes, peak_S=peak)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append((state.tiles_TRx, lanes.direction))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_gradient_that_is_not_finite_changes_nothing():
    tiled, _, parts, state, lanes = make(RULES["paper"], COUNTS)
    steps = torch.ones(len(parts), dtype=torch.int64, device=CUDA)
    fill(lanes, parts, 0)
    tiled.step(state, parts, steps, lanes)
    before = state.tiles_TRx.clone()
    squares = [sums.clone() for sums in state.squares]
    lanes.grad[parts[-2].lanes.start + 9_999] = math.nan
    finite = tiled.step(state, parts, steps + 1, lanes)
    assert not bool(finite)
    assert torch.equal(state.tiles_TRx, before)
    assert all(map(torch.equal, state.squares, squares))


def test_a_step_in_a_cuda_graph():
    """Replays beside launches, from the same state: the same bits."""
    rule = RULES["paper"]
    tiled, _, parts, state, lanes = make(rule, COUNTS)
    steps = torch.zeros(len(parts), dtype=torch.int64, device=CUDA)

    def step():
        steps.add_(1)
        finite = tiled.step(state, parts, steps, lanes)
        # The next replay reads the sums where this one wrote them.
        for kept, new in zip(squares, state.squares, strict=True):
            kept.copy_(new)
        state.squares = squares
        return finite

    fill(lanes, parts, 0)
    squares = tuple(
        torch.zeros(1, rule.channels, dtype=torch.float64, device=CUDA) for _ in range(2)
    )
    state.squares, state.squares_of = squares, tuple(parts)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    start = [x.clone() for x in (state.tiles_TRx, steps, *squares)]
    for _ in range(4):
        step()
    expected = state.tiles_TRx.clone(), lanes.direction.clone()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for x, kept in zip((state.tiles_TRx, steps, *squares), start, strict=True):
        x.copy_(kept)
    for _ in range(4):
        graph.replay()
    assert torch.equal(state.tiles_TRx, expected[0])
    assert torch.equal(lanes.direction, expected[1])
