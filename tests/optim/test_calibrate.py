"""``calibrate=True``: the learning rate is lowered where the first gradients swing."""

import copy
import dataclasses
import io
import math

import pytest
import torch

from conftest import make_weights
from hyperadam import VariationalHyperAdam, load_weights
from hyperadam.rule import VariationalHyperAdamRule
from hyperadam.rule.coherence import LOWEST, POWER, STEPS, independent_coherence

DECAYS = (0.5, 0.9, 0.99)
WEIGHTS = make_weights(VariationalHyperAdamRule(channels=4, moment_decays=DECAYS))


def make(params, **settings):
    return VariationalHyperAdam(params, **{"weights": WEIGHTS, "calibrate": True, **settings})


def make_params(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def gradients(shapes, step, swing=0.4):
    """Normal ones, independent from step to step but for a mean that swings to and fro."""
    generator = torch.Generator().manual_seed(step)
    mean = swing * (-1) ** step
    return [mean + torch.randn(shape, generator=generator) for shape in shapes]


def train(optimizer, params, steps, start=0, swing=0.4):
    for step in range(start, start + steps):
        drawn = gradients([param.shape for param in params], step, swing)
        for param, grad in zip(params, drawn, strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()


def total(optimizer, param):
    return float(optimizer.state[param]["coherence"])


def expected_scale(total):
    mean = total / (STEPS - 1)
    return min(max((mean / independent_coherence(DECAYS)) ** POWER, LOWEST), 1)


def copies(params):
    return [param.detach().clone().requires_grad_() for param in params]


def assert_equal(xs, ys):
    assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_coherence_is_that_of_its_definition(dtype):
    shapes = [(3, 4), (5,)]
    params = make_params(*shapes, dtype=dtype)
    optimizer = make(params)
    means = []
    first = torch.zeros(3, 17, dtype=torch.float64)
    second = torch.zeros(3, 17, dtype=torch.float64)
    decays = torch.tensor(DECAYS, dtype=torch.float64).unsqueeze(-1)
    for step in range(1, STEPS + 3):
        train(optimizer, params, 1, start=step)
        grad = torch.cat([param.grad.flatten() for param in params]).double()
        first = decays * first + (1 - decays) * grad
        second = decays * second + (1 - decays) * grad**2
        correction = 1 - decays**step
        means.append(float(((first / correction).abs() / (second / correction).sqrt()).mean()))
    assert means[0] == pytest.approx(1)
    assert total(optimizer, params[0]) == pytest.approx(sum(means[1:STEPS]), rel=1e-5)
    assert total(optimizer, params[1]) == total(optimizer, params[0])


def coherence_of_sparse(shape, units, share, weights):
    """The mean coherence of independent gradients, which a share of the units has in a step."""
    (param,) = make_params(shape)
    optimizer = make([param], weights=weights)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        has = torch.rand(units, generator=generator) < share
        param.grad = has * torch.randn(shape, generator=generator)
        optimizer.step()
    return total(optimizer, param) / (STEPS - 1)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.02])
def test_embeddings_that_are_not_in_a_batch_count_for_nothing(share):
    """Theirs is no gradient that swings, though what is remembered of them fades."""
    mean = coherence_of_sparse((4000, 8), (4000, 1), share, WEIGHTS)
    assert mean > 0.99 * independent_coherence(DECAYS)
    assert mean == pytest.approx(independent_coherence(DECAYS), rel=0.01) or share < 1


@pytest.mark.parametrize(("share", "expected"), [(1, 1), (0.5, 0.99), (0.25, 0.97), (0.02, 0.955)])
def test_what_single_coordinates_without_a_gradient_do(share, expected):
    """The figures of docs/method.md, for the decays of the bundled weights."""
    decays = load_weights("default").rule.moment_decays
    weights = make_weights(VariationalHyperAdamRule(channels=4, moment_decays=decays))
    mean = coherence_of_sparse((40, 500), (40, 500), share, weights)
    assert mean / independent_coherence(decays) == pytest.approx(expected, abs=0.005)


def test_rows_that_do_not_count_are_as_if_they_were_not_there():
    shapes = [(6, 5), (9, 5), (9,)]
    params = make_params(*shapes)
    others = copies(params)
    optimizer, other = make(params), make([others[0]])
    for step in range(STEPS + 2):
        drawn = gradients(shapes, step)
        for param, grad in zip(params, drawn, strict=True):
            # Those of the second matrix and of the vector had a gradient once.
            param.grad = grad if param is params[0] or step == 0 else torch.zeros_like(grad)
        others[0].grad = drawn[0]
        optimizer.step()
        other.step()
    assert total(optimizer, params[0]) == pytest.approx(total(other, others[0]), rel=1e-6)


def test_weights_may_ask_for_it():
    asking = make_weights(dataclasses.replace(WEIGHTS.rule, calibrated=True))
    for weights, given, expected in (
        (WEIGHTS, None, False),
        (WEIGHTS, True, True),
        (asking, None, True),
        (asking, False, False),
    ):
        params = make_params((6, 5))
        others = copies(params)
        optimizer = make(params, weights=weights, calibrate=given)
        explicit = make(others, weights=weights, calibrate=expected)
        assert optimizer.calibrate is expected
        for one, values in ((optimizer, params), (explicit, others)):
            train(one, values, STEPS + 1)
        assert_equal(params, others)
        assert ("coherence" in optimizer.state_dict()["state"][0]) is expected


@pytest.mark.parametrize("calibrate", [True, None])
def test_weights_leave_networks_with_attention_as_they_are(calibrate):
    asking = make_weights(dataclasses.replace(WEIGHTS.rule, calibrated=True))

    def moved(names, calibrate):
        params = make_params((6, 5), (6, 5))
        optimizer = make(zip(names, params, strict=True), weights=asking, calibrate=calibrate)
        train(optimizer, params, STEPS + 2, swing=5.0)
        return params

    attention, plain = ("block.q_proj", "block.k_proj"), ("first", "second")
    scaled, unscaled = moved(plain, True), moved(plain, False)
    assert not torch.equal(scaled[0], unscaled[0])
    assert_equal(moved(plain, calibrate), scaled)
    assert_equal(moved(attention, calibrate), scaled if calibrate else unscaled)


@pytest.mark.parametrize("swing", [0.0, 0.4, 5.0])
def test_from_the_20th_step_on_the_learning_rate_is_scaled(swing):
    params = make_params((6, 5), (7,))
    others = copies(params)
    calibrated, plain = make(params), make(others, calibrate=False)
    train(calibrated, params, STEPS - 1, swing=swing)
    train(plain, others, STEPS - 1, swing=swing)
    assert_equal(params, others)
    before = copies(params)
    train(calibrated, params, 1, start=STEPS, swing=swing)
    train(plain, others, 1, start=STEPS, swing=swing)
    scale = expected_scale(total(calibrated, params[0]))
    for start, ours, theirs in zip(before, params, others, strict=True):
        torch.testing.assert_close(ours - start, scale * (theirs - start), rtol=1e-3, atol=1e-6)


def test_the_more_gradients_swing_the_shorter_steps_get():
    scales = []
    for swing in (0.1, 0.15, 0.2):
        params = make_params((100, 100))
        optimizer = make(params)
        train(optimizer, params, STEPS, swing=swing)
        scales.append(expected_scale(total(optimizer, params[0])))
    assert 1 > scales[0] > scales[1] > scales[2] > LOWEST


def test_gradients_that_agree_leave_steps_as_they_are():
    params = make_params((6, 5))
    others = copies(params)
    for values, calibrate in ((params, True), (others, False)):
        optimizer = make(values, calibrate=calibrate)
        for _ in range(STEPS + 5):
            values[0].grad = torch.ones(6, 5)
            optimizer.step()
    assert_equal(params, others)


@pytest.mark.parametrize("decays", [DECAYS, (0.5, 0.9, 0.99, 0.999), (0.95,)])
def test_independent_gradients_are_where_it_begins(decays):
    """And so neither noise alone nor a batch's size lowers the learning rate."""
    weights = make_weights(VariationalHyperAdamRule(channels=4, moment_decays=decays))
    (param,) = params = make_params(100_000)
    optimizer = make(params, weights=weights)
    for step in range(STEPS):
        param.grad = torch.randn(100_000, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    mean = total(optimizer, param) / (STEPS - 1)
    assert mean == pytest.approx(independent_coherence(decays), abs=0.001)


def test_swinging_to_and_fro_shortens_steps_most():
    params = make_params(6)
    optimizer = make(params)
    for step in range(STEPS):
        params[0].grad = torch.full((6,), (-1.0) ** step)
        optimizer.step()
    assert expected_scale(total(optimizer, params[0])) == LOWEST


def test_what_comes_later_does_not_count():
    params = make_params(6)
    optimizer = make(params)
    train(optimizer, params, STEPS)
    before = total(optimizer, params[0])
    train(optimizer, params, 5, start=STEPS, swing=50.0)
    assert total(optimizer, params[0]) == before


def test_coordinates_without_gradient_do_not_count():
    def run(*shapes):
        params = make_params(*shapes)
        optimizer = make(params)
        for step in range(STEPS):
            params[0].grad = gradients([(6,)], step)[0]
            for param in params[1:]:
                param.grad = torch.zeros_like(param)
            optimizer.step()
        return total(optimizer, params[0])

    assert run(6, (7, 3)) == pytest.approx(run(6))


def test_splitting_parameters_changes_nothing():
    whole = make_params((8, 4))
    pieces = [piece.detach().clone().requires_grad_() for piece in whole[0].split(3)]
    one, other = make(whole), make(pieces)
    for step in range(STEPS + 2):
        grad = gradients([(8, 4)], step)[0]
        whole[0].grad = grad
        for piece, share in zip(pieces, grad.split(3), strict=True):
            piece.grad = share.clone()
        one.step()
        other.step()
    assert total(one, whole[0]) == pytest.approx(total(other, pieces[0]), rel=1e-6)


def test_a_parameter_that_joins_later_has_steps_of_its_own():
    first, second = make_params(4, 5)
    optimizer = make([first])
    train(optimizer, [first], 10)
    optimizer.add_param_group({"params": [second]})
    train(optimizer, [first, second], 12, start=10)
    done, sum_so_far = total(optimizer, first), total(optimizer, second)
    assert 0 < sum_so_far < done
    train(optimizer, [first, second], STEPS, start=22)
    assert total(optimizer, first) == done
    assert total(optimizer, second) > sum_so_far


def test_skipped_steps_do_not_count():
    params, others = make_params(4), make_params(4)
    disturbed, undisturbed = make(params), make(others)
    train(disturbed, params, 5)
    params[0].grad = torch.full_like(params[0], math.nan)
    with pytest.warns(RuntimeWarning, match="skipped"):
        disturbed.step()
    train(disturbed, params, STEPS, start=5)
    train(undisturbed, others, STEPS + 5)
    assert_equal(params, others)
    assert total(disturbed, params[0]) == total(undisturbed, others[0])


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("at", [3, STEPS, STEPS + 5])
def test_resume_is_bit_for_bit(at, state_dtype):
    params = make_params((4, 3), 5)
    undisturbed = make(params, state_dtype=state_dtype)
    train(undisturbed, params, at)
    buffer = io.BytesIO()
    torch.save(undisturbed.state_dict(), buffer)
    buffer.seek(0)
    resumed_params = copies(params)
    train(undisturbed, params, STEPS, start=at)
    resumed = make(resumed_params, state_dtype=state_dtype)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    train(resumed, resumed_params, STEPS, start=at)
    assert_equal(params, resumed_params)
    assert total(resumed, resumed_params[0]) == total(undisturbed, params[0])


def test_a_copy_goes_its_own_way():
    params = make_params(5)
    optimizer = make(params)
    train(optimizer, params, 4)
    copied, others = copy.deepcopy((optimizer, params))
    train(optimizer, params, STEPS, start=4)
    assert total(copied, others[0]) < total(optimizer, params[0])
    train(copied, others, STEPS, start=4)
    assert_equal(params, others)


@pytest.mark.parametrize("calibrate", [True, False])
def test_state_of_the_other_kind_is_refused(calibrate):
    params = make_params(3)
    saved = make(params, calibrate=not calibrate)
    train(saved, params, 2)
    optimizer = make(copies(params), calibrate=calibrate)
    with pytest.raises(ValueError, match=r"holds .* expected .* \(made with another calibrate\)"):
        optimizer.load_state_dict(saved.state_dict())


def test_it_is_a_setting_of_the_optimizer():
    with pytest.raises(ValueError, match="calibrate must be True, False or None; got 'yes'"):
        make(make_params(2), calibrate="yes")
    with pytest.raises(ValueError, match="calibrate is a setting of the optimizer"):
        make([{"params": make_params(2), "calibrate": True}])


def test_only_parameters_in_their_first_steps_count():
    """One that joins later has the coherence that it would have alone."""
    first, second = make_params(4, 5)
    (alone,) = make_params(5)
    optimizer, expected = make([first]), make([alone])
    train(optimizer, [first], STEPS)
    optimizer.add_param_group({"params": [second]})
    for step in range(STEPS):
        first.grad = torch.full_like(first, (-1.0) ** step)
        second.grad = gradients([(5,)], step)[0]
        alone.grad = second.grad.clone()
        optimizer.step()
        expected.step()
    assert total(optimizer, second) == pytest.approx(total(expected, alone), rel=1e-6)


def test_a_pause_among_the_first_steps_changes_nothing():
    first, second = make_params(4, 5)
    (alone,) = make_params(5)
    optimizer, expected = make([first, second]), make([alone])
    for step in range(-STEPS, STEPS):
        first.grad = torch.ones_like(first)
        drawn = gradients([(5,)], step + STEPS)[0]
        second.grad = drawn if step >= 0 else None
        optimizer.step()
        if step >= 0:
            alone.grad = drawn.clone()
            expected.step()
    assert total(optimizer, second) == pytest.approx(total(expected, alone), rel=1e-6)


def test_gradients_that_are_all_zero_leave_steps_as_they_are():
    params = make_params(6)
    optimizer = make(params)
    for _ in range(STEPS):
        params[0].grad = torch.zeros(6)
        optimizer.step()
    assert expected_scale(total(optimizer, params[0])) == pytest.approx(1)
