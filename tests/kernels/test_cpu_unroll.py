"""Backpropagation through unrolls of the CPU kernel, beside autograd through the rule's step."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch

from conftest import random_theta
from hyperadam.kernels import TILE, TileLayout, cpu, lay_out
from hyperadam.kernels.cpu import THETA_ORDER
from hyperadam.kernels.cpu_unroll import CpuRule, FusedStep, Tape, flatten_theta
from hyperadam.kernels.tiles import num_tiles
from hyperadam.rule import VariationalHyperAdamRule

RULES = {
    "paper": VariationalHyperAdamRule(),
    "bounded": VariationalHyperAdamRule(channels=7, column_norm="rms", candidate_bound=1.5),
    "decays": VariationalHyperAdamRule(channels=4, moment_decays=(0.5, 0.9, 0.99)),
    "largest": VariationalHyperAdamRule(channels=32, var_block=False),
}


class Unrolled:
    """A function of theta and the first state: sums of means and log-variances with fixed factors,
    which has a path through everything."""

    def __init__(self, rule, tasks, count, length, seed=0):
        self.rule, self.tasks, self.count, self.length = rule, tasks, count, length
        generator = torch.Generator().manual_seed(seed)
        scale = torch.exp(2 * torch.randn(tasks, count, generator=generator))
        shape = (length, tasks, count)
        self.grads = scale * torch.randn(shape, generator=generator).double()
        self.grads[:, :, ::5] = 0
        self.of_mean, self.of_log_var = (
            torch.randn(shape, generator=generator).double() for _ in range(2)
        )
        self.layout = TileLayout.of(rule)
        self.parts = [
            dataclasses.replace(part, segment=number)
            for number, part in enumerate(lay_out([count] * tasks))
        ]

    def reference(self, theta, taken=0, first=None):
        """By the rule's own step. ``first`` holds each task's fields."""
        total = 0
        for task in range(self.tasks):
            state = self.rule.init_state(self.count, dtype=torch.float64)
            state = dataclasses.replace(state, step=state.step + taken, **(first or [{}] * 9)[task])
            for t in range(self.length):
                update, state = self.rule.step(theta, state, self.grads[t, task])
                total = total + (self.of_mean[t, task] * update.mean_N).sum()
                if update.log_var_N is not None:
                    total = total + (self.of_log_var[t, task] * update.log_var_N).sum()
        return total

    def tiles(self, dtype, first=None):
        tiles = torch.zeros(
            self.tasks * num_tiles(self.count), self.layout.num_rows, TILE, dtype=dtype
        )
        for part, fields in zip(self.parts, first or [], strict=False):
            self.layout.pack(fields, tiles[part.tiles])
        return tiles

    def fused(self, theta, tiles, taken=0, instruction_set=None):
        tape = Tape(self.rule, theta, self.parts, taken, self.length, instruction_set)
        dtype = tiles.dtype
        lanes = num_tiles(self.count) * TILE
        total = 0
        for t in range(self.length):
            grad = torch.zeros(self.tasks, lanes, dtype=dtype)
            grad[:, : self.count] = self.grads[t]
            tiles, mean, log_var = FusedStep.apply(tape, grad.view(-1), tiles, flatten_theta(theta))
            mean = mean.view(self.tasks, -1)[:, : self.count]
            total = total + (self.of_mean[t].to(dtype) * mean).sum()
            if log_var is not None:
                log_var = log_var.view(self.tasks, -1)[:, : self.count]
                total = total + (self.of_log_var[t].to(dtype) * log_var).sum()
        return total


def leaf(theta, dtype=torch.float64):
    return {name: value.detach().to(dtype).requires_grad_() for name, value in theta.items()}


def assert_close(ours, theirs, tolerance):
    """Relative to each tensor's norm; tensors whose true gradient is 0 aside."""
    for name, value in theirs.items():
        error = float((ours[name].grad.double() - value.grad).norm())
        assert error <= tolerance * max(float(value.grad.norm()), 1e-3), name


@pytest.mark.parametrize("instruction_set", cpu.instruction_sets())
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_gradients_of_theta(instruction_set, name, dtype, tolerance):
    problem = Unrolled(RULES[name], tasks=2, count=45, length=7)
    theta = random_theta(RULES[name], torch.float64)
    ours, theirs = leaf(theta, dtype), leaf(theta)
    value = problem.fused(ours, problem.tiles(dtype), instruction_set=instruction_set)
    expected = problem.reference(theirs)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    value.backward()
    expected.backward()
    assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("count", [1, 31, 32, 33, 2100])
def test_gradients_of_the_first_state(name, count):
    rule = RULES[name]
    problem = Unrolled(rule, tasks=1, count=count, length=3)
    theta = random_theta(rule, torch.float64)
    state = rule.init_state(count, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):  # a state that has seen gradients
        grad = torch.randn(count, generator=generator).double()
        state = rule.step(theta, state, grad)[1]
    fields = {name: getattr(state, name).detach() for name in problem.layout.rows}
    first = {name: value.clone().requires_grad_() for name, value in fields.items()}
    problem.reference(theta, taken=3, first=[first]).backward()
    tiles = problem.tiles(torch.float64, [fields]).requires_grad_()
    problem.fused(theta, tiles, taken=3).backward()
    found = problem.layout.unpack(tiles.grad, count)
    for field in ("h_NLH", "c_NLH", "m_NH", "v_NH", "m_corr_NH", "v_corr_NH"):
        expected = first[field].grad
        torch.testing.assert_close(
            found[field], expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max() + 1)
        )
    padding = problem.layout.unpack(tiles.grad, num_tiles(count) * TILE)
    assert all((value[count:] == 0).all() for value in padding.values())


def test_gradcheck():
    """Finite differences, of a small rule and few coordinates."""
    rule = VariationalHyperAdamRule(channels=4, column_norm="rms", candidate_bound=2.0)
    problem = Unrolled(rule, tasks=2, count=3, length=3)
    theta = random_theta(rule, torch.float64)
    names = [name for name in THETA_ORDER if name in theta]
    tiles = problem.tiles(torch.float64)

    def function(*values):
        return problem.fused(dict(zip(names, values, strict=True)), tiles)

    inputs = [theta[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 20])
def test_every_length_recomputes_right(length):
    rule = RULES["bounded"]
    problem = Unrolled(rule, tasks=1, count=33, length=length)
    theta = random_theta(rule, torch.float64)
    ours, theirs = leaf(theta), leaf(theta)
    problem.fused(ours, problem.tiles(torch.float64)).backward()
    problem.reference(theirs).backward()
    assert_close(ours, theirs, 1e-10)


def test_threads_do_not_show():
    rule = RULES["paper"]
    problem = Unrolled(rule, tasks=3, count=2500, length=3)
    theta = random_theta(rule)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            ours = leaf(theta, torch.float32)
            problem.fused(ours, problem.tiles(torch.float32)).backward()
        finally:
            torch.set_num_threads(1)
        results.append([value.grad for value in ours.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_holds_an_unroll():
    """No cycle through the graph, which Python could not free."""
    rule = RULES["bounded"]
    problem = Unrolled(rule, tasks=1, count=40, length=5)
    theta = leaf(random_theta(rule))
    tape = Tape(rule, theta, problem.parts, 0, 2)
    grad = torch.zeros(64, dtype=torch.float64)
    flat = flatten_theta(theta)
    tiles = problem.tiles(torch.float64)
    for _ in range(2):
        tiles, mean, _ = FusedStep.apply(tape, grad, tiles, flat)
    alive = weakref.ref(tape)
    mean.sum().backward()
    gc.disable()
    try:
        del tape, tiles, mean, _
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("length", "most"), [(1, 2), (2, 3), (6, 4), (7, 5), (20, 7), (100, 15)])
def test_states_kept_are_few(length, most):
    rule = RULES["bounded"]
    problem = Unrolled(rule, tasks=1, count=40, length=length)
    theta = leaf(random_theta(rule))
    tape = Tape(rule, theta, problem.parts, 0, length)
    tiles = problem.tiles(torch.float64)
    for _ in range(length):
        tiles, _, _ = tape.forward(tiles, torch.zeros(64, dtype=torch.float64))
        assert len(tape.kept) <= most
    assert len(tape.kept) == min(most, length)
    made, again = 0, tape._again

    def count(*arguments):
        nonlocal made
        made += 1
        return again(*arguments)

    tape._again = count
    for index in reversed(range(length)):
        kept = set(tape.kept)
        tape.backward(index, tiles, None, None)
        assert len(kept | set(tape.kept)) <= most
    assert made == max(0, length - most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_made_again_has_its_bits(dtype):
    rule = RULES["bounded"]
    problem = Unrolled(rule, tasks=2, count=70, length=20)
    theta = {name: value.to(dtype) for name, value in random_theta(rule).items()}
    tape = Tape(rule, theta, problem.parts, 0, 20)
    tiles = problem.tiles(torch.float64).to(dtype)
    seen = []
    for step in range(12):
        seen.append(tiles.clone())
        grad = torch.randn(len(tiles) * 32, generator=torch.Generator().manual_seed(step)).to(dtype)
        for part in problem.parts:
            grad[part.lanes.stop : part.tiles.stop * 32] = 0
        tiles, _, _ = tape.forward(tiles, grad)
    assert not {7, 8, 9} & set(tape.kept)
    made = tape._state(9)
    for part in problem.parts:
        fields, expected = (
            tape.passes.layout.unpack(each[part.tiles], part.count) for each in (made, seen[9])
        )
        for name, value in fields.items():
            assert torch.equal(value, expected[name]), name


def test_no_second_derivative():
    rule = RULES["bounded"]
    problem = Unrolled(rule, tasks=1, count=5, length=1)
    theta = leaf(random_theta(rule))
    value = problem.fused(theta, problem.tiles(torch.float64)).square()
    (grad,) = torch.autograd.grad(value, [theta["lstm1.weight"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_without_a_derivative_no_states_are_kept():
    """The steps and the state after them have the same bits as with one."""
    program = CpuRule(RULES["bounded"])
    theta = random_theta(program.rule)
    gradients = torch.randn(6, 1, 40, generator=torch.Generator().manual_seed(1))
    results, kept = [], []
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            unroll = program.begin(theta, program.init_state(1, 40), len(gradients))
            means = [unroll.step(grad_BN).mean_N for grad_BN in gradients]
        state = unroll.carry().unpack().tensors()
        results.append([*means, *state.values()])
        kept.append(len(unroll.tape.kept))
    assert kept[0] > 0
    assert kept[1] == 0
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
