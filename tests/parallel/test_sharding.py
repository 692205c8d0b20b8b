"""Parameters spread over gloo processes: the trajectory of one process, and its checkpoints."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from hyperadam.weights import load_weights
from parallel import jobs

F32, F64 = torch.float32, torch.float64
STEPS = 12


@pytest.fixture(scope="module")
def one_process():
    return jobs.alone(STEPS)


def assert_close(params, expected, tolerance=1e-9):
    for one, other in zip(params, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_ddp_replicas_stay_bitwise_equal(pools):
    (first, state), (second, other_state) = pools[2].run(jobs.ddp, 200)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for number, fields in state.items():
        for name, value in fields.items():
            assert torch.equal(value, other_state[number][name]), name
    assert int(state[0]["step"]) == 200
    assert all(param.isfinite().all() for param in first)


@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_fsdp_and_hsdp_are_one_process(pools, one_process, size, replicas):
    results = pools[size].run(jobs.fsdp, STEPS, replicas, F64, {})
    for found in results:
        assert_close(found["params"], one_process)
        assert found["reductions"] == 4  # two norms, its variance, its calibration
        for shape, rows, placements in found["state"].values():
            assert (shape[:2], rows, placements) == ((3, 9), found["rows"], found["placements"])
    rows = [found["rows"] for found in results]
    assert sum(rows) == 3 * replicas
    assert (0 in rows) == (size // replicas == 4)


def test_fsdp_by_the_reference(pools):
    for found in pools[2].run(jobs.fsdp, 4, 1, F64, {"backend": "reference"}):
        assert_close(found["params"], jobs.alone(4))
        assert found["reductions"] == 4


def test_fsdp_in_single_precision(pools):
    """The rule amplifies roundings (docs/method.md): 1e-4 of a run of a dozen steps."""
    expected = jobs.alone(STEPS, F32)
    for found in pools[4].run(jobs.fsdp, STEPS, 1, F32, {}):
        assert_close(found["params"], expected, 1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_zero_is_one_process(pools, one_process, size):
    results = pools[size].run(jobs.zero, STEPS, {})
    for params, _ in results:
        assert_close(params, one_process)
    assert len({own for _, own in results}) > 1


def test_zero_resumes(pools, one_process):
    for params, fields in pools[2].run(jobs.zero_resumed, 5, STEPS):
        assert_close(params, one_process)
        assert "step" in fields


def test_zero_with_processes_that_have_no_parameter(pools):
    expected = jobs.alone(6, make=jobs.make_small_model)
    results = pools[4].run(jobs.zero, 6, {}, jobs.make_small_model)
    assert sorted(own for _, own in results) == [0, 0, 13, 78]
    resumed = pools[4].run(jobs.zero_resumed, 3, 6, jobs.make_small_model)
    for params, _ in [*results, *resumed]:
        assert_close(params, expected)


@pytest.mark.parametrize("size", [2, 4])
def test_one_bad_gradient_stops_all(pools, size):
    assert pools[size].run(jobs.one_bad_gradient) == [(True, 1)] * size


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_four_goes_on_in_two_and_in_one(pools, one_process, tmp_path):
    pools[4].run(jobs.save, tmp_path / "saved", 5)
    results = pools[4].run(jobs.resume, tmp_path / "saved", 5, STEPS)
    results += pools[2].run(jobs.resume, tmp_path / "saved", 5, STEPS)
    results.append(jobs.resume(0, 1, tmp_path / "saved", 5, STEPS))
    for params, untouched in results:
        assert_close(params, one_process)
        assert untouched  # asking for the state to load into takes no step


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_optimizer_made_before_its_parameters_have_memory(pools, one_process, tmp_path):
    pools[2].run(jobs.save, tmp_path / "saved", 5)
    for params, untouched in pools[2].run(jobs.resume, tmp_path / "saved", 5, STEPS, "meta"):
        assert_close(params, one_process)
        assert untouched


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"full_state_dict": True},
        {"full_state_dict": True, "cpu_offload": True},
        {"flatten_optimizer_state_dict": True},
    ],
)
def test_state_dicts_of_other_forms(pools, one_process, options, device):
    if options.get("cpu_offload"):  # rank 0 alone has the whole
        options = {**options, "broadcast_from_rank0": True}
    for params in pools[2].run(jobs.resume_whole, 5, STEPS, options, device):
        assert_close(params, one_process)


@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}])
def test_state_that_is_loaded_before_the_parameters_have_memory(pools, one_process, options):
    for params in pools[2].run(jobs.resume_whole, 5, STEPS, options, "meta", True):
        assert_close(params, one_process)


def test_what_is_spread_otherwise_is_refused(pools):
    for columns, mixed, partly in pools[2].run(jobs.refusals):
        assert "only Shard(0) and Replicate can be served" in columns
        assert "some parameters are spread over processes and others not" in mixed
        assert "some parameters are spread over processes and others not" in partly


def test_replicated_tensors_need_no_sums(pools):
    assert pools[2].run(jobs.replicated) == [(0, True)] * 2


def test_the_pages_examples(pools, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    fsdp, zero, saved = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    for taken in pools[2].run(jobs.run_examples, [zero, fsdp, saved], tmp_path / "saved"):
        assert taken == [{1}, {1}, {2}]


def test_a_saved_state_dict_stays(pools, tmp_path):
    assert pools[2].run(jobs.saved_state, tmp_path) == [True, True]


def test_explaining_takes_all_processes(pools):
    assert sorted(pools[4].run(jobs.explain)) == [[], [], [(13,)], [(13, 6)]]


def test_nothing_to_train(pools):
    assert pools[2].run(jobs.frozen) == [{}, {}]


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused(pools, use_orig_params):
    for message in pools[2].run(jobs.fsdp1, use_orig_params):
        assert "use fully_shard (FSDP2)" in message


def test_the_variance_is_narrowed_by_the_mean_over_all_shards(pools):
    lite = load_weights("lite")
    rule = dataclasses.replace(lite.rule, variance_base=0.03, variance_floor=0.1)
    settings = {"weights": dataclasses.replace(lite, rule=rule)}
    expected = jobs.alone(STEPS, **settings)
    plain = dataclasses.replace(rule, variance_base=None, variance_floor=0.0)
    without = jobs.alone(STEPS, weights=dataclasses.replace(lite, rule=plain))
    with pytest.raises(AssertionError):  # it does something here
        assert_close(expected, without)
    for backend in ("auto", "reference"):
        for found in pools[4].run(jobs.fsdp, STEPS, 1, F64, settings | {"backend": backend}):
            assert_close(found["params"], expected)
            assert found["reductions"] == 3
    for params, _ in pools[2].run(jobs.zero, STEPS, settings):
        assert_close(params, expected)
    small = jobs.alone(STEPS, make=jobs.make_small_model, **settings)
    for params, _ in pools[4].run(jobs.zero, STEPS, settings, jobs.make_small_model):
        assert_close(params, small)


CALIBRATION_STEPS = 24


@pytest.fixture(scope="module")
def one_calibrated_process():
    expected = jobs.alone(CALIBRATION_STEPS, **jobs.SWINGING)
    with pytest.raises(AssertionError):  # it does something here
        assert_close(expected, jobs.alone(CALIBRATION_STEPS, lr=jobs.SWINGING["lr"]))
    return expected


@pytest.mark.parametrize("size", [2, 4])
def test_the_coherence_is_one_over_all_shards(pools, one_calibrated_process, size):
    for found in pools[size].run(jobs.fsdp, CALIBRATION_STEPS, 1, F64, jobs.SWINGING):
        assert_close(found["params"], one_calibrated_process)


def test_the_coherence_is_one_over_all_of_zeros_processes(pools, one_calibrated_process):
    for params, _ in pools[2].run(jobs.zero, CALIBRATION_STEPS, jobs.SWINGING):
        assert_close(params, one_calibrated_process)
    small = jobs.alone(CALIBRATION_STEPS, make=jobs.make_small_model, lr=6e-3, calibrate=True)
    for params, _ in pools[4].run(
        jobs.zero, CALIBRATION_STEPS, {"lr": 6e-3, "calibrate": True}, jobs.make_small_model
    ):
        assert_close(params, small)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_keeps_the_coherence(pools, one_calibrated_process, tmp_path):
    pools[4].run(jobs.save_swinging, tmp_path / "saved", 15)
    arguments = (tmp_path / "saved", 15, CALIBRATION_STEPS)
    results = pools[2].run(jobs.resume_swinging, *arguments)
    results.append(jobs.resume_swinging(0, 1, *arguments))
    for params, _ in results:
        assert_close(params, one_calibrated_process)
