"""What is told in advance is what is then taken."""

from __future__ import annotations

import pytest
import torch

from conftest import make_weights
from hyperadam import VariationalHyperAdam, estimate, load_weights
from hyperadam.console import estimate_remarks
from hyperadam.errors import ConfigError, WeightsError
from hyperadam.estimate import Estimate, Memory, memory_estimate, parse_count
from hyperadam.optim.memory import free_memory
from hyperadam.rule import RNNpropRule, VariationalHyperAdamRule


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("11200000", 11_200_000),
        ("11.2M", 11_200_000),
        ("270k", 270_000),
        ("270K", 270_000),
        ("1.5B", 1_500_000_000),
        ("1.5g", 1_500_000_000),
        (" 1 ", 1),
        ("0.001k", 1),
        ("272.474k", 272_474),
    ],
)
def test_counts(text, count):
    assert parse_count(text) == count


NONSENSE = [
    "k",
    "M11",
    "-3",
    "0",
    "0.5",
    "1.5",
    "1e6",
    "nan",
    "inf",
    "11,2M",
    "1.2.3k",
    "2T",
    "1000001B",
]


@pytest.mark.parametrize("text", ["", "9" * 99, *NONSENSE])
def test_nonsense_is_refused(text):
    with pytest.raises(ConfigError, match="a whole number from 1 to 10"):
        parse_count(text)


def test_bytes_of_the_papers_configuration():
    weights = make_weights(VariationalHyperAdamRule())
    for dtype, bytes_a_param in (("float32", 488), ("bfloat16", 244)):
        memory = memory_estimate(weights, 1_000_000, dtype)
        assert memory == Memory(
            numbers=122,
            bytes_a_param=bytes_a_param,
            state=bytes_a_param * 1_000_000,
            buffers=12_000_000,
            adam=8_000_000,
        )
        assert memory.total == memory.state + 12_000_000


def test_the_lite_weights_take_little():
    memory = memory_estimate(load_weights("lite"), 1_000_000, "float32")
    assert memory.bytes_a_param < 200
    assert memory.state < 0.4 * memory_estimate(load_weights("default"), 1_000_000, "float32").state


@pytest.mark.parametrize(
    ("rule", "numbers", "buffers"),
    [
        (VariationalHyperAdamRule(channels=4), 26, 12),
        (VariationalHyperAdamRule(channels=4, var_block=False), 26, 8),
        (VariationalHyperAdamRule(channels=4, moment_decays=(0.9, 0.99)), 28, 12),
    ],
)
def test_bytes_of_others(rule, numbers, buffers):
    memory = memory_estimate(make_weights(rule), 10, "float32")
    assert (memory.numbers, memory.state, memory.buffers) == (numbers, 40 * numbers, 10 * buffers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimizer_takes_what_is_told(dtype):
    weights = load_weights("default")
    param = torch.nn.Parameter(torch.zeros(64, 32))
    optimizer = VariationalHyperAdam([param], weights=weights, state_dtype=dtype)
    memory = memory_estimate(weights, param.numel(), dtype)
    assert optimizer._arena is not None
    assert optimizer._arena.state.tiles_TRx.nbytes == memory.state
    lanes = optimizer._arena.lanes
    buffers = {t.data_ptr(): t.nbytes for t in (lanes.grad, lanes.mean, lanes.log_var)}
    assert sum(buffers.values()) == memory.buffers


def test_times_scale_linearly(monkeypatch):
    seconds = iter([0.5, 0.25])
    sizes = []

    def fake(make, num_params, device):
        sizes.append(num_params)
        return next(seconds)

    monkeypatch.setattr("hyperadam.estimate._step_seconds", fake)
    result = estimate.estimate(make_weights(), 12_000, measured_params=1000)
    assert sizes == [1000, 1000]
    assert result.adam_measured_params == 1000
    assert (result.step_seconds, result.adam_step_seconds) == (6.0, 3.0)
    assert result.measured_params == 1000
    assert result.fits


@pytest.mark.parametrize(("free", "adam"), [(None, 16_000_000), (64 * 10**6, 10**6), (8, 1)])
def test_adam_is_measured_beyond_the_caches_where_memory_allows(monkeypatch, free, adam):
    monkeypatch.setattr("hyperadam.estimate.free_memory", lambda device: free)
    sizes = []

    def fake(make, num_params, device):
        sizes.append(num_params)
        return 1.0

    monkeypatch.setattr("hyperadam.estimate._step_seconds", fake)
    result = estimate.estimate(make_weights(VariationalHyperAdamRule()), 10**9)
    assert sizes[1] == result.adam_measured_params == adam
    assert result.adam_step_seconds == 10**9 / adam


def test_the_references_step_counts(monkeypatch):
    monkeypatch.setattr("hyperadam.estimate._step_seconds", lambda *arguments: 1.0)
    monkeypatch.setattr("hyperadam.estimate.choose_backend", lambda *arguments: "reference")
    known = estimate.estimate(make_weights(VariationalHyperAdamRule()), 1000)
    assert known.memory.step == 1000 * 122 * 17
    assert known.memory.peak == known.memory.total + known.memory.step
    values = {**vars(known), "free_bytes": known.memory.peak - 1}
    assert Estimate(**values).fits is False
    assert any("does not fit" in line for line in estimate_remarks(Estimate(**values)))


def test_a_small_problem_is_measured_as_it_is():
    result = estimate.estimate(make_weights(), 100, state_dtype="bfloat16")
    assert isinstance(result, Estimate)
    assert result.measured_params == 100
    assert 0 < result.adam_step_seconds < 1
    assert 0 < result.step_seconds < 1


def test_free_memory():
    free = free_memory(torch.device("cpu"))
    assert free is None or free > 0


def test_it_fits_or_not():
    known = estimate.estimate(make_weights(), 100)
    values = {**vars(known), "free_bytes": known.memory.total}
    assert Estimate(**values).fits is True
    assert Estimate(**{**values, "free_bytes": known.memory.total - 1}).fits is False
    assert Estimate(**{**values, "free_bytes": None}).fits is None


def test_mistakes():
    with pytest.raises(ConfigError, match="unknown state_dtype"):
        memory_estimate(make_weights(), 10, "float16")
    with pytest.raises(ConfigError, match="must be cpu or cuda; got 'mps'"):
        estimate.estimate(make_weights(), 10, device="mps")
    with pytest.raises(WeightsError, match="these are of rnnprop"):
        estimate.estimate(make_weights(RNNpropRule(channels=4)), 10)
