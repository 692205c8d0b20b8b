"""Mixed precision: GradScaler, autocast, parameters and state of half precision."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler

from conftest import make_weights
from hyperadam import VariationalHyperAdam
from hyperadam.kernels import triton
from hyperadam.kernels.fused import FusedTiledRule, Passes
from hyperadam.rule import VariationalHyperAdamRule

CPU = torch.device("cpu")
RULE = VariationalHyperAdamRule(channels=5, variance_base=0.1)
WEIGHTS = make_weights(RULE)
BACKENDS = [
    "cpu",
    "reference",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            triton.why_not(CPU, torch.float32) is not None, reason="needs Triton's interpreter"
        ),
    ),
]

gpu = pytest.mark.skipif(
    not torch.cuda.is_available()
    or triton.interpreted()
    or triton.why_not(torch.device("cuda"), torch.float32) is not None,
    reason="needs a GPU and Triton, not interpreted",
)


def make_model(device=CPU, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2)).to(device, dtype)


def make(model, **settings):
    return VariationalHyperAdam(model.parameters(), **{"weights": WEIGHTS, **settings})


def loss_of(model, step):
    """A regression's loss on a batch of the step's own."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 6, generator=generator)
    like = next(model.parameters())
    y = x[:, :2].sin().to(like)
    return F.mse_loss(model(x.to(like)), y)


def backward(model, scaler, step, bad=None):
    """Scaled gradients; ``bad`` stands in the last one's first place."""
    model.zero_grad()
    scaler.scale(loss_of(model, step)).backward()
    if bad is not None:
        list(model.parameters())[-1].grad[0] = bad


def train(model, optimizer, steps, scaler=None, clip=None):
    scaler = scaler or GradScaler("cpu", enabled=False)
    for step in steps:
        backward(model, scaler, step)
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# -- GradScaler ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("nonfinite", "unscale"), [("skip", False), ("raise", True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_leaves_all_as_it_was(backend, nonfinite, unscale):
    """Without a warning, which would be an error here; the run goes on as if it had not been."""
    model, calm = make_model(), make_model()
    optimizer = make(model, backend=backend, nonfinite=nonfinite)
    undisturbed = make(calm, backend=backend)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    train(model, optimizer, range(2), scaler)
    train(calm, undisturbed, range(2))
    before = snapshot(model, optimizer)
    for bad in (math.inf, math.nan):
        backward(model, scaler, 2, bad)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert_same(snapshot(model, optimizer), before)
    assert scaler.get_scale() == 2.0**8
    assert optimizer.skipped_steps == 2
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
    train(model, optimizer, range(2, 4), scaler)
    train(calm, undisturbed, range(2, 4))
    assert_same(snapshot(model, optimizer), snapshot(calm, undisturbed))


def test_an_overflow_at_the_first_step():
    model = make_model()
    optimizer = make(model)
    before = snapshot(model, optimizer)
    scaler = GradScaler("cpu")
    backward(model, scaler, 0, math.inf)
    scaler.step(optimizer)
    assert_same(snapshot(model, optimizer), before)


def test_found_inf_skips_by_itself():
    """Where the infinity is in a gradient that this process does not hold."""
    model = make_model()
    optimizer = make(model)
    before = snapshot(model, optimizer)
    loss_of(model, 0).backward()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert_same(snapshot(model, optimizer), before)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not torch.equal(model[0].weight, before[0]["0.weight"])


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "maximize": True}])
def test_the_scale_does_not_show(clip, settings):
    """Scales that are powers of two, and grow on the way, move no bit of a gradient."""
    scaled, plain = make_model(), make_model()
    optimizer, other = make(scaled, **settings), make(plain, **settings)
    scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    train(scaled, optimizer, range(8), scaler, clip)
    train(plain, other, range(8), clip=clip)
    assert scaler.get_scale() == 2.0**12
    assert_same(snapshot(scaled, optimizer), snapshot(plain, other))


def test_clipping_shows():
    """Or the test above would not tell whether it was the unscaled gradients that were clipped."""
    models = [make_model(), make_model()]
    for model, clip in zip(models, (0.05, None), strict=True):
        train(model, make(model), range(3), clip=clip)
    assert not torch.equal(models[0][0].weight, models[1][0].weight)


def test_one_optimizer_of_two_overflows():
    first, second, alone = make_model(), make_model(), make_model()
    optimizers = make(first), make(second)
    scaler = GradScaler("cpu")
    before = snapshot(first, optimizers[0])
    backward(first, scaler, 0, math.inf)
    backward(second, scaler, 0)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    train(alone, make(alone), range(1))
    assert_same(snapshot(first, optimizers[0]), before)
    assert_same(second.state_dict(), alone.state_dict())


def test_what_the_scaler_lets_pass_is_the_optimizers_to_judge():
    """A finite gradient that is too large for the rule is no overflow of the scale."""
    model = make_model()
    optimizer = make(model)
    scaler = GradScaler("cpu", init_scale=4.0)
    before = snapshot(model, optimizer)
    backward(model, scaler, 0, math.inf)
    scaler.step(optimizer)
    scaler.update()
    backward(model, scaler, 0, bad=1e17)
    with pytest.warns(RuntimeWarning, match="too large") as caught:
        scaler.step(optimizer)
    assert caught[0].filename == __file__
    scaler.update()
    assert scaler.get_scale() == 2.0
    optimizer.nonfinite = "raise"
    with pytest.raises(RuntimeError, match="too large"):
        scaler.step(optimizer)
    assert_same(snapshot(model, optimizer), before)


def test_the_scaler_resumes_beside_the_optimizer():
    whole, halves = make_model(), make_model()
    train(whole, make(whole), range(6))
    optimizer, scaler = make(halves), GradScaler("cpu", growth_interval=2)
    train(halves, optimizer, range(3), scaler)
    saved = copy.deepcopy((optimizer.state_dict(), scaler.state_dict()))
    optimizer, scaler = make(halves), GradScaler("cpu")
    optimizer.load_state_dict(saved[0])
    scaler.load_state_dict(saved[1])
    train(halves, optimizer, range(3, 6), scaler)
    assert_same(halves.state_dict(), whole.state_dict())


# -- without waiting for a GPU -------------------------------------------------------------------


class NoPasses(Passes):
    """Passes of no device's kernel: what they give has no numbers."""

    def __init__(self):
        self.rule = RULE

    def _sums(self):
        return torch.empty(1, RULE.channels, dtype=torch.float64, device="meta")

    def plan(self, parts):
        return parts

    def features(self, *_):
        return self._sums(), torch.empty((), dtype=torch.bool, device="meta")

    def squares(self, *_):
        return self._sums()

    def state_cell(self, *_):
        return self._sums()

    def adam_cell(self, *_):
        return self._sums()

    def variance_sums(self, *_):
        return torch.empty(1, 2, dtype=torch.float64, device="meta")

    def shape_variance(self, *_):
        pass


def step_without_numbers(monkeypatch, **settings):
    """A scaled step on the meta device, which takes the way of a GPU and raises where a number is
    asked for."""
    monkeypatch.setattr(
        "hyperadam.optim.learned_optimizer.tiled_rule", lambda *_, **__: FusedTiledRule(NoPasses())
    )
    # What this device would be refused for.
    monkeypatch.setattr(VariationalHyperAdam, "_only_device", lambda *_: torch.device("meta"))
    monkeypatch.setattr("torch.autocast", lambda *_, **__: contextlib.nullcontext())
    params = [torch.empty(shape, device="meta", requires_grad=True) for shape in ((3, 4), 5)]
    optimizer = VariationalHyperAdam(params, weights=WEIGHTS, **settings)
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.grad_scale = torch.empty((), device="meta")
    optimizer.found_inf = torch.empty((), device="meta")
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}]
)
def test_a_scaled_step_on_a_gpu_asks_for_no_number(monkeypatch, settings):
    optimizer = step_without_numbers(monkeypatch, **settings)
    assert optimizer._skipped.device.type == "meta"


def test_raising_has_to_ask(monkeypatch):
    """Which shows that the test above would notice."""
    with pytest.raises(RuntimeError, match="meta tensors"):
        step_without_numbers(monkeypatch, nonfinite="raise")


@gpu
def test_an_overflow_on_a_gpu():
    """Found, skipped and counted without waiting; ``update`` of the scaler does not wait either."""
    model = make_model("cuda")
    optimizer, scaler = make(model), GradScaler("cuda", init_scale=2.0**10)
    train(model, optimizer, range(2), scaler)
    before = snapshot(model, optimizer)
    backward(model, scaler, 2, math.inf)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.step(optimizer)
        scaler.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(snapshot(model, optimizer), before)
    assert scaler.get_scale() == 2.0**9
    assert optimizer.skipped_steps == 1


# -- autocast and half precision -----------------------------------------------------------------


def losses_under_autocast(step_inside):
    model = make_model()
    optimizer = VariationalHyperAdam(model.parameters())
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, step)
            if step_inside:
                loss.backward()
                optimizer.step()
        if not step_inside:
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_under_autocast():
    losses = losses_under_autocast(step_inside=False)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert losses_under_autocast(step_inside=True) == losses


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_half_precision(dtype, state_dtype):
    """Model and gradients of half precision, with a scale: float16 needs one."""
    model = make_model(dtype=dtype)
    optimizer = VariationalHyperAdam(model.parameters(), state_dtype=state_dtype)
    scaler = GradScaler("cpu", init_scale=2.0**7)
    first = [float(loss_of(model, step).detach()) for step in range(100, 110)]
    train(model, optimizer, range(60), scaler)
    backward(model, scaler, 60, math.inf)
    before = snapshot(model, optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_same(snapshot(model, optimizer), before)
    last = [float(loss_of(model, step).detach()) for step in range(100, 110)]
    assert sum(last) < 0.5 * sum(first)
    assert {param.dtype for param in model.parameters()} == {dtype}
    for entry in optimizer.state_dict()["state"].values():
        large = {value.dtype for value in entry.values() if value.dim()}
        assert large == {getattr(torch, state_dtype)}
