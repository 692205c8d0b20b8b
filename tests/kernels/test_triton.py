"""The Triton kernel in Triton's interpreter, and compiled for a GPU that need not be there.

tests/conftest.py turns the interpreter on where there is no GPU; with one, test_triton_gpu.py runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch

from conftest import random_theta
from hyperadam.kernels import Lanes, Part, lay_out
from hyperadam.kernels import triton as kernel
from hyperadam.kernels.fused import FusedTiledRule
from hyperadam.kernels.tiled import ReferenceTiledRule
from hyperadam.rule import (
    VariationalHyperAdamRule,
    round_stochastically,
    rounding_words,
    standard_normal,
)
from kernels.stepping import Stepper, segments_are_problems_by_themselves

CPU = torch.device("cpu")

WHY_NOT = kernel.why_not(CPU, torch.float32)
interpreter = pytest.mark.skipif(WHY_NOT is not None, reason=f"no interpreter: {WHY_NOT}")

RULES = {
    "paper": VariationalHyperAdamRule(),
    "small": VariationalHyperAdamRule(channels=4, column_norm="rms", candidate_bound=5.0),
    "shaped": VariationalHyperAdamRule(
        channels=3, moment_decays=(0.5, 0.9), variance_base=0.03, variance_floor=0.1
    ),
    "odd": VariationalHyperAdamRule(
        channels=7, moment_decays=(0.5, 0.9, 0.999), column_norm="rms", var_block=False
    ),
    "largest": VariationalHyperAdamRule(
        channels=32,
        moment_decays=(0.9, 0.99),
        candidate_bound=0.5,
        variance_base=0.03,
        variance_floor=0.1,
    ),
}


def fused(rule, theta, state_dtype=None):
    return FusedTiledRule(kernel.TritonPasses(rule, theta, state_dtype))


def gradients(step, counts, seed=0):
    generator = torch.Generator().manual_seed(100 * seed + step)
    grads = []
    for count in counts:
        grad = torch.randn(count, generator=generator)
        grad *= torch.exp(4 * torch.randn(count, generator=generator))
        grad[1::7] = 0
        grads.append(grad)
    return grads


def assert_close(actual, expected):
    if expected.numel():
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(scale, 1e-30))


@interpreter
@pytest.mark.parametrize("name", RULES)
def test_it_is_the_reference(name):
    rule = RULES[name]
    counts = [0, 1, 31, 32, 33, 100] if rule.channels < 20 else [33, 0, 1]
    theta = random_theta(rule)
    steppers = [
        Stepper(tiled, rule, counts, seed=5)
        for tiled in (fused(rule, theta), ReferenceTiledRule(rule, theta))
    ]
    for step in range(4 if rule.channels < 20 else 2):
        grads = gradients(step, counts)
        (actual, finite), (expected, _) = (stepper.step(grads) for stepper in steppers)
        assert finite
        assert_close(torch.cat(actual), torch.cat(expected))
        for values in ("mean", "log_var") if rule.var_block else ("mean",):
            assert_close(*(stepper.values(values) for stepper in steppers))
    for number in range(len(counts)):
        actual, expected = (stepper.fields(number) for stepper in steppers)
        for field in expected:
            assert_close(actual[field], expected[field])


@interpreter
@pytest.mark.parametrize("name", ["small", "shaped"])
def test_segments_are_problems_by_themselves(name):
    segments_are_problems_by_themselves(fused, RULES[name], [40, 70, 3, 33], assert_close)


@interpreter
def test_other_parts_stay_as_they_are():
    rule = RULES["small"]
    stepper = Stepper(fused(rule, random_theta(rule)), rule, [33, 70, 5])
    stepper.step(gradients(0, [33, 70, 5]))
    before = stepper.state.tiles_TRx.clone()
    chosen = [stepper.parts[0], stepper.parts[2]]
    stepper.step(gradients(1, [33, 5]), chosen)
    other = stepper.parts[1].tiles
    assert torch.equal(stepper.state.tiles_TRx[other], before[other])
    for part in chosen:
        assert not torch.equal(stepper.state.tiles_TRx[part.tiles], before[part.tiles])


@interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1.01e15, -1e19])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    """The passes by themselves: only they see the flag on a GPU."""
    rule = RULES["shaped"]
    passes = kernel.TritonPasses(rule, random_theta(rule))
    parts = tuple(lay_out([70, 33]))
    plan, steps = passes.plan(parts), torch.ones(2, dtype=torch.int64)
    tiles = torch.rand(5, passes.layout.num_rows, 32) + 0.1
    grad = torch.zeros(5 * 32)
    grad[parts[1].lanes][32] = bad
    lanes = Lanes(grad, *torch.zeros(3, 5 * 32))
    before = tiles.clone()
    _, finite = passes.features(plan, steps, tiles, grad)
    assert finite.dtype == torch.bool
    assert finite.shape == ()
    assert not finite
    scale = torch.ones(1, 2 * rule.channels)
    passes.state_cell(plan, steps, tiles, tiles, grad, scale, finite)
    passes.adam_cell(plan, steps, tiles, tiles, lanes, scale, finite)
    ones_S = torch.ones(1, dtype=torch.float64)
    passes.shape_variance(plan, steps, tiles, lanes, ones_S, ones_S, finite)
    assert torch.equal(tiles, before)
    assert not any(written.any() for written in (lanes.mean, lanes.log_var, lanes.direction))


@interpreter
def test_the_largest_gradient_is_finite():
    rule = RULES["small"]
    stepper = Stepper(fused(rule, random_theta(rule)), rule, [40])
    grad = torch.ones(40)
    grad[39] = -1e15
    _, finite = stepper.step([grad])
    assert finite
    assert stepper.state.tiles_TRx.isfinite().all()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_gpus_that_it_does_not_serve(monkeypatch):
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setenv("CC", "cc")
    assert kernel.why_not(device, torch.float32) is None
    monkeypatch.delenv("CC")
    monkeypatch.setattr(kernel.shutil, "which", lambda name: None)
    assert "C compiler" in kernel.why_not(device, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "7.0; cuda:1 has 6.1" in kernel.why_not(device, torch.float32)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in kernel.why_not(device, torch.float32)


@interpreter
def test_launches_are_on_the_tensors_device(monkeypatch):
    """Triton takes the current device, which may be another than the parameters'."""
    devices = []

    def on(device):
        devices.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(kernel, "_on", on)
    rule = RULES["small"]
    Stepper(fused(rule, random_theta(rule)), rule, [40]).step([torch.ones(40)])
    assert devices == [CPU] * 5  # features, squares of h and of m, state cell, Adam cell


@interpreter
def test_sums_are_float64_and_leave_padding_out():
    rule = RULES["odd"]
    passes = kernel.TritonPasses(rule, random_theta(rule))
    parts = tuple(
        dataclasses.replace(part, segment=segment)
        for part, segment in zip(lay_out([33, 0, 100]), (0, 1, 2), strict=True)
    )
    tiles = torch.randn(6, passes.layout.num_rows, 32)
    sums = passes.squares(passes.plan(parts), tiles, "m_NH")
    assert sums.dtype == torch.float64
    for part in parts:
        m_NH = passes.layout.unpack(tiles[part.tiles], part.count)["m_NH"].double()
        torch.testing.assert_close(sums[part.segment], m_NH.square().sum(0), rtol=1e-6, atol=0)


@interpreter
@pytest.mark.parametrize(
    ("seed", "step", "start"),
    [(0, 1, 0), (77, 3, 5), (2**63 - 1, 2**32 + 9, 2**34 - 50), (2**40 + 1, 2**45, 2**50 + 3)],
)
def test_the_noise_is_bit_for_bit_the_same(seed, step, start):
    expected = standard_normal(seed, step, start, 1000)
    assert torch.equal(kernel.standard_normal(seed, step, start, 1000, CPU), expected)


@interpreter
def test_a_steps_noise_is_bit_for_bit_the_same():
    """With a VarBlock of 0 and a gradient of 0, the direction is the noise."""
    rule = RULES["small"]
    theta = random_theta(rule)
    theta["linear_var1.weight"].zero_()
    theta["linear_var1.bias"].zero_()
    seed, start, taken = 2**61 + 5, 2**34 - 20, 2**33
    stepper = Stepper(fused(rule, theta), rule, [100], seed=seed, noise_start=start)
    stepper.steps += taken
    directions, _ = stepper.step([torch.zeros(100)])
    assert torch.equal(directions[0], standard_normal(seed, taken + 1, start, 100))


@interpreter
def test_bfloat16_state_is_the_float32_result_rounded():
    """Pass by pass, from the same numbers: what is stored is the rounding of what would be."""
    rule = VariationalHyperAdamRule(channels=6, moment_decays=(0.9, 0.99))
    theta = random_theta(rule)
    count, seed, step, start = 70, 2**40 + 3, 2**32 + 4, 2**34 + 2
    parts = (Part(0, count, seed=seed, noise_start=start),)
    narrow = kernel.TritonPasses(rule, theta, torch.bfloat16)
    wide = kernel.TritonPasses(rule, theta)
    layout, steps = wide.layout, torch.tensor([step])
    old = (torch.rand(3, layout.num_rows, 32) + 0.1).bfloat16()
    lanes = Lanes(*torch.randn(4, 96))
    scale = torch.rand(1, 2 * rule.channels) + 0.5
    finite = torch.tensor(True)
    words = rounding_words(seed, step, start, count)
    tiles, tiles32 = old.clone(), old.float()

    def rows(fields):
        values = [fields[name].reshape(count, -1) for name in layout.rows]
        return torch.cat(values, dim=1)

    args = (lanes.grad, scale, finite)
    narrow.state_cell(narrow.plan(parts), steps, tiles, tiles, *args)
    wide.state_cell(wide.plan(parts), steps, tiles32, tiles32, *args)
    tiles32[:, layout.rows["h_NLH"]] = tiles32[:, layout.rows["h_NLH"]].bfloat16().float()
    sums = narrow.adam_cell(narrow.plan(parts), steps, tiles, tiles, lanes, scale, finite)
    wide.adam_cell(wide.plan(parts), steps, tiles32, tiles32, lanes, scale, finite)

    stored, exact = rows(layout.unpack(tiles, count)), rows(layout.unpack(tiles32, count))
    expected = round_stochastically(exact, words, 0)
    expected[:, layout.rows["h_NLH"]] = exact[:, layout.rows["h_NLH"]].bfloat16()
    assert torch.equal(stored, expected)
    m_NH = stored[:, layout.rows["m_NH"]].double()
    torch.testing.assert_close(sums[0], m_NH.square().sum(0), rtol=1e-6, atol=0)


@interpreter
def test_bfloat16_rounding_keeps_the_mean():
    """A moment that moves by less than half of bfloat16's last bit moves in the mean."""
    rule = VariationalHyperAdamRule(channels=4, moment_decays=(0.999,))
    count = 1024
    stepper = Stepper(
        fused(rule, random_theta(rule), torch.bfloat16), rule, [count], state_dtype=torch.bfloat16
    )
    row = stepper.layout.rows["exp_avg_NK"]
    stepper.state.tiles_TRx[:, row] = 1.0
    stepper.step([torch.full((count,), 2.0)])
    stored = stepper.fields()["exp_avg_NK"].float()
    assert set(stored.unique().tolist()) == {1.0, 1.0078125}
    assert abs(float(stored.mean()) - 1.001) < 4 * 0.0026 / math.sqrt(count)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hyperadam.kernels import triton_passes

TYPES = {"blocks": "*i32", "finite": "*i32", "slots": "*i64", "parts": "*i64", "steps": "*i64",
         "counter": "*i64", "go": "*i1", "bound": "fp32", "count": "i32", "first_row": "i32",
         "decay": "i32", "base": "fp32", "floor": "fp32"}
SETTINGS = {"H": 3, "K": 2, "BLOCK": 64, "BOUNDED": True, "VAR_BLOCK": True, "DIRECTION": True}
STORAGES = {"state_cell": (True,), "adam_cell": (True,), "variance_sums": (False, True),
            "shape_variance": (False, True)}  # in bfloat16 or not

for name in ("features", "squares", "state_cell", "adam_cell", "variance_sums", "shape_variance",
             "noise"):
    kernel = getattr(triton_passes, name + "_pass")
    for bfloat16 in STORAGES.get(name, (False,)):
        settings = SETTINGS | {"BFLOAT16": bfloat16}
        pointers = TYPES | ({"tiles": "*i16", "new_tiles": "*i16"} if bfloat16 else {})
        types = {
            argument: "constexpr" if argument in settings else pointers.get(argument, "*fp32")
            for argument in kernel.arg_names
        }
        constants = {name: settings[name] for name in settings if name in types}
        program = compile(
            ASTSource(kernel, types, constexprs=constants),
            target=GPUTarget("cuda", 80, 32),
            options={"num_warps": 1, "enable_fp_fusion": False},
        )
        if name == "noise":
            text = program.asm["ptx"]
            assert "fma" not in text and "sqrt.rn.f32" in text and "div.rn.f32" in text, text
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_the_passes_compile_for_a_gpu(tmp_path):
    """The interpreter takes programs that the compiler refuses; and the noise must not be fused."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
