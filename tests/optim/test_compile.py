"""torch.compile of a training step with ``optimizer.step()`` in it."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler
from torch.optim import lr_scheduler

from conftest import make_weights
from hyperadam import VariationalHyperAdam

dynamo = pytest.importorskip("torch._dynamo")

WEIGHTS = make_weights()

# PyTorch's own: it hides the first, which it can't where warnings are errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh():
    """Nothing compiled before, and what is compiled again is an error."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    with dynamo.config.patch(error_on_recompile=True):
        yield
    dynamo.reset()


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2))


def make(model, **settings):
    return VariationalHyperAdam(model.parameters(), **{"weights": WEIGHTS, **settings})


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(16, 6, generator=generator)
        yield x, x[:, :2].sin()


def whole_step(model, optimizer):
    """A training step as scripts have it, to be compiled as one."""

    def step(x, y):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def run(compile_it, steps=5, **settings):
    """Losses, parameters and state after so many steps, with lr changing before each."""
    model = make_model()
    optimizer = make(model, **settings)
    step = compile_it(whole_step(model, optimizer))
    losses = []
    for number, (x, y) in enumerate(batches(steps)):
        for group in optimizer.param_groups:
            lr = 1e-2 / (1 + number)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        losses.append(step(x, y))
    return losses, model.state_dict(), optimizer.state_dict()["state"]


def eagerly(step):
    return step


def compiled_by(backend, **options):
    return lambda step: torch.compile(step, backend=backend, **options)


def assert_same(one, other, tolerance=0.0):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def graphs():
    return dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("eager", {}),
        ("aot_eager", {}),
        ("eager", {"backend": "reference"}),
        (
            "eager",
            {"lr": torch.tensor(1e-2), "weight_decay": 0.1, "decoupled_weight_decay": True},
        ),
        ("eager", {"state_dtype": "bfloat16", "sample": False}),
    ],
)
def test_a_compiled_step_has_the_same_bits(backend, settings):
    """Nothing is compiled again as lr and the number of the step change."""
    expected = run(eagerly, **copy.deepcopy(settings))
    assert_same(run(compiled_by(backend), **copy.deepcopy(settings)), expected)
    assert graphs() > 0


def test_the_graphs_are_those_of_the_model():
    """Two, of the forward pass and of ``loss.detach()``; none is of the optimizer."""
    run(compiled_by("eager"))
    assert graphs() == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor(tmp_path, monkeypatch):
    """Its sums are in an order of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    step = compiled_by("inductor", options={"compile_threads": 1})
    assert_same(run(step), run(eagerly), 1e-4)
    assert graphs() == 2


def test_only_the_optimizers_step_compiled():
    model, twin = make_model(), make_model()
    optimizer, other = make(model), make(twin)
    step = torch.compile(optimizer.step, backend="eager")
    for x, y in batches(3):
        for each in (model, twin):
            each.zero_grad()
            F.mse_loss(each(x), y).backward()
        step()
        other.step()
    assert_same(model.state_dict(), twin.state_dict())


def test_a_compiled_model_and_an_eager_step():
    model, twin = make_model(), make_model()
    optimizer, other = make(model), make(twin)
    fast = torch.compile(model, backend="aot_eager")
    for x, y in batches(4):
        for each, forward in ((optimizer, fast), (other, twin)):
            each.zero_grad()
            F.mse_loss(forward(x), y).backward()
            each.step()
    assert_same(model.state_dict(), twin.state_dict())


def run_with_all_around_it(compile_it):
    """A scaler, clipping, hooks, and a schedule beside the compiled step."""
    model = make_model()
    optimizer = make(model)
    scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    calls = torch.zeros(())  # a tensor, since torch.compile traces hooks

    def count(*_):
        calls.add_(1)

    optimizer.register_step_pre_hook(count)
    optimizer.register_step_post_hook(count)

    def step(x, y):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()

    step = compile_it(step)
    for x, y in batches(5):
        step(x, y)
        scheduler.step()
    return model.state_dict(), (float(calls), scheduler.get_last_lr(), scaler.get_scale())


def test_with_scaler_clipping_schedule_and_hooks():
    (params, rest), (other_params, other_rest) = map(
        run_with_all_around_it, (eagerly, compiled_by("eager"))
    )
    assert_same(params, other_params)
    assert rest == other_rest
    assert rest[0] == 10


def run_with_a_closure(compile_step, compile_model):
    model = make_model()
    optimizer = make(model)
    forward = compile_model(model)

    def step(x, y):
        def closure():
            optimizer.zero_grad()
            loss = F.mse_loss(forward(x), y)
            loss.backward()
            return loss

        return optimizer.step(closure)

    step = compile_step(step)
    losses = [step(x, y).detach() for x, y in batches(3)]
    return losses, model.state_dict()


def test_a_closure():
    """A compiled model stays compiled in it, though the step that calls it isn't."""
    expected = run_with_a_closure(eagerly, eagerly)
    assert_same(run_with_a_closure(compiled_by("eager"), eagerly), expected)
    assert graphs() == 0
    assert_same(run_with_a_closure(eagerly, compiled_by("eager")), expected)
    assert graphs() == 1


def test_a_skipped_step_warns_where_it_was_called():
    model = make_model()
    optimizer = make(model)
    lr_scheduler.ConstantLR(optimizer)  # it wraps step()
    step = torch.compile(whole_step(model, optimizer), backend="eager")
    before = copy.deepcopy(model.state_dict())
    x, y = next(batches(1))
    with pytest.warns(RuntimeWarning, match="this step is skipped") as caught:
        step(x, y * torch.inf)
    assert caught[0].filename == __file__
    assert_same(model.state_dict(), before)


def test_a_step_without_graph_breaks_is_not_to_be_had():
    model = make_model()
    step = torch.compile(make(model).step, backend="eager", fullgraph=True)
    F.mse_loss(model(torch.ones(2, 6)), torch.zeros(2, 2)).backward()
    with pytest.raises(dynamo.exc.Unsupported):
        step()


def test_importing_hyperadam_does_not_import_the_compiler():
    program = "import sys, hyperadam; print('torch._dynamo' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr
