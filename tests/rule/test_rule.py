from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import random_theta
from hyperadam.errors import ConfigError
from hyperadam.rule import (
    RULES,
    SCALAR_FIELDS,
    AdamCandidatesRule,
    DMoptimizerRule,
    HyperAdamRule,
    RNNpropRule,
    UpdateDistribution,
    VariationalHyperAdamRule,
    cat_states,
)
from hyperadam.rule.var_block import kl_divergence
from hyperadam.tasks import make_generator

F64 = torch.float64

OPTIONS = {
    "layers": VariationalHyperAdamRule(channels=3, state_layers=2),
    "rms": VariationalHyperAdamRule(channels=3, column_norm="rms"),
    "bound": VariationalHyperAdamRule(channels=3, candidate_bound=0.5),
    "decays": VariationalHyperAdamRule(channels=3, moment_decays=(0.5, 0.9, 0.99)),
    "variance base": VariationalHyperAdamRule(channels=3, variance_base=0.03, variance_floor=0.2),
    "no variance": VariationalHyperAdamRule(channels=3, var_block=False),
    "no lstm": VariationalHyperAdamRule(channels=3, lstm=False),
    "no preprocessing": VariationalHyperAdamRule(channels=3, state_layers=2, preprocessing=False),
    "hyperadam without lstm": HyperAdamRule(channels=3, lstm=False),
    "hyperadam without preprocessing": HyperAdamRule(channels=3, preprocessing=False),
    "prior": VariationalHyperAdamRule(
        channels=3, kl_prior_mean="fixed_moments", kl_prior_scale=0.5
    ),
    "hyperadam": HyperAdamRule(channels=3, state_layers=2, column_norm="rms", candidate_bound=2.0),
    "rnnprop": RNNpropRule(channels=3, state_layers=1, moment_decays=(0.9, 0.99)),
    "dmoptimizer": DMoptimizerRule(channels=3, state_layers=3),
}


@pytest.fixture(params=sorted(OPTIONS))
def rule(request):
    return OPTIONS[request.param]


def run(rule, theta, grads, state=None):
    state = state if state is not None else rule.init_state(grads.shape[-1], dtype=grads.dtype)
    for grad in grads:
        update, state = rule.step(theta, state, grad)
    return update, state


def test_the_papers_values_are_the_defaults():
    rule = VariationalHyperAdamRule()
    assert rule.num_theta() == 5421
    assert rule.to_dict() == {
        "rule": "variational-hyperadam",
        "channels": 20,
        "state_layers": 1,
        "fan_in_base": None,
        "row_mean_base": None,
        "vector_scale": 1.0,
        "attention_scale": 1.0,
        "calibrated": False,
        "column_norm": "euclidean",
        "candidate_bound": None,
        "lstm": True,
        "preprocessing": True,
        "moment_decays": (0.95,),
        "var_block": True,
        "variance_base": None,
        "variance_floor": 0.0,
        "kl_prior_mean": "none",
        "kl_prior_scale": 1.0,
    }
    state = rule.init_state(7)
    columns = [t for name, t in state.tensors().items() if name not in SCALAR_FIELDS]
    assert sum(column.numel() for column in columns) == 122 * 7


def test_options_have_the_shapes_they_say(rule):
    theta = rule.init_theta(make_generator(0))
    assert {name: tuple(value.shape) for name, value in theta.items()} == rule.theta_shapes()
    update, state = run(rule, theta, torch.randn(3, 11))
    assert update.mean_N.shape == (11,)
    assert bool(torch.isfinite(update.mean_N).all())
    assert {n: t.shape for n, t in state.tensors().items()} == {
        n: t.shape for n, t in rule.init_state(11).tensors().items()
    }
    assert int(state.step) == 3
    has_variance = isinstance(rule, VariationalHyperAdamRule) and rule.var_block
    assert (update.log_var_N is not None) == has_variance
    kl = rule.kl(update)
    assert kl.shape == ()
    assert (float(kl) != 0) == has_variance
    if not has_variance:
        assert torch.equal(update.sample(torch.ones(11)), update.mean_N)


def test_derivatives_by_theta_and_state(rule):
    """Two chained steps against finite differences."""
    theta = random_theta(rule, F64, seed=3)
    names = list(theta)
    grads = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    _, start = run(rule, theta, grads[:1])
    floats = [name for name, t in start.tensors().items() if name != "step" and t.numel()]

    def function(*values):
        own_theta = dict(zip(names, values[: len(names)], strict=True))
        state = dataclasses.replace(start, **dict(zip(floats, values[len(names) :], strict=True)))
        update, state = run(rule, own_theta, grads[1:], state)
        outputs = [update.mean_N, rule.kl(update), state.h_NLH]
        return tuple(out for out in outputs if out.requires_grad)

    values = [*theta.values(), *(start.tensors()[name] for name in floats)]
    assert torch.autograd.gradcheck(
        function, [value.detach().clone().requires_grad_() for value in values]
    )


@pytest.mark.parametrize("name", sorted(RULES))
def test_initial_theta(name):
    rule = RULES[name]()
    theta = rule.init_theta(make_generator(1))
    again = rule.init_theta(make_generator(1))
    for key, value in theta.items():
        assert torch.equal(value, again[key])
        if key.endswith(".bias"):
            assert not value.any()
        elif key.startswith(("pre_linear", "post_linear", "linear")):
            assert 0 < float(value.abs().max()) <= 0.2
        elif key in ("lstm1.weight", "adamcell.weight"):
            bound = math.sqrt(6 / sum(value.shape))
            assert 0.95 * bound < float(value.abs().max()) <= bound
    if name == "variational-hyperadam":
        assert float(theta["post_linear.weight"].std()) == pytest.approx(0.088, abs=0.01)


@pytest.mark.parametrize("rule_name", sorted(set(RULES) - {"dmoptimizer"}))
@given(exponent=st.floats(-3, 3), seed=st.integers(0, 100))
def test_mean_does_not_depend_on_the_gradients_scale(rule_name, exponent, seed):
    """Up to the epsilons. DMoptimizer's features are logarithms: its mean does depend."""
    rule = RULES[rule_name](channels=4)
    theta = random_theta(rule, F64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(5, 12, dtype=F64, generator=generator)
    plain, _ = run(rule, theta, grads)
    scaled, _ = run(rule, theta, grads * 10**exponent)
    torch.testing.assert_close(scaled.mean_N, plain.mean_N, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule_name", sorted(RULES))
@given(order=st.permutations(list(range(9))))
def test_permuting_coordinates_permutes_updates(rule_name, order):
    rule = RULES[rule_name](channels=4)
    theta = random_theta(rule, F64)
    grads = torch.randn(4, 9, dtype=F64, generator=torch.Generator().manual_seed(5))
    plain, _ = run(rule, theta, grads)
    permuted, _ = run(rule, theta, grads[:, order])
    torch.testing.assert_close(permuted.mean_N, plain.mean_N[order], rtol=1e-9, atol=1e-12)


def test_without_the_lstm_h_is_the_preprocessed_features():
    """Against the equations of docs/method.md, two steps."""
    rule = VariationalHyperAdamRule(channels=3, lstm=False)
    assert not any("lstm" in name for name in rule.theta_shapes())
    assert set(rule.state_widths()) == set(VariationalHyperAdamRule().state_widths()) - {
        "h_NLH",
        "c_NLH",
    }
    theta = random_theta(rule, F64)
    grads = torch.randn(2, 5, dtype=F64)
    explanation = rule.explain(theta, run(rule, theta, grads[:1])[1], grads[1])
    s = ((0.95 * 0.05 * grads[0] ** 2 + 0.05 * grads[1] ** 2) / (1 - 0.95**2)).sqrt() + 1e-8
    average = (0.95 * 0.05 * grads[0] + 0.05 * grads[1]) / (1 - 0.95**2)
    features = torch.stack([grads[1] / s, average / s], dim=1)
    elu = torch.nn.functional.elu
    h = elu(features @ theta["pre_linear.weight"].T + theta["pre_linear.bias"])
    rho = elu(h @ theta["post_linear.weight"].T + theta["post_linear.bias"])
    torch.testing.assert_close(explanation.rho_NH, rho)
    log_var = h @ theta["linear_var1.weight"].T + theta["linear_var1.bias"]
    torch.testing.assert_close(explanation.log_var_N, log_var[:, 0])


def test_without_preprocessing_the_features_enter_the_lstm():
    rule = VariationalHyperAdamRule(channels=3, preprocessing=False, moment_decays=(0.5, 0.9))
    shapes = rule.theta_shapes()
    assert shapes["lstm1.weight"] == (12, 4 + 3)
    assert not any("pre_linear" in name for name in shapes)
    theta = random_theta(rule, F64)
    grads = torch.randn(1, 5, dtype=F64)
    _, state = run(rule, theta, grads)
    # At the first step every feature is the gradient's sign, over the column's norm.
    features = torch.sign(grads[0])[:, None].expand(5, 4) / math.sqrt(5)
    gates = features @ theta["lstm1.weight"][:, :4].T + theta["lstm1.bias"]
    i, j, _, o = gates.chunk(4, dim=1)
    c = torch.sigmoid(i) * torch.tanh(j)
    torch.testing.assert_close(state.c_NLH[:, 0], c, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        state.h_NLH[:, 0], torch.sigmoid(o) * torch.tanh(c), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("count", [0, 1, 2, 33])
def test_any_number_of_coordinates(rule, count):
    update, state = run(rule, random_theta(rule), torch.randn(3, count))
    assert update.mean_N.shape == (count,)
    assert bool(torch.isfinite(update.mean_N).all())
    assert int(state.step) == 3


def test_options_at_their_defaults_are_no_part_of_the_identity():
    """So the digests of weights from before an option stay what they were."""
    for cls in (VariationalHyperAdamRule, HyperAdamRule):
        assert cls().identity() == {"rule": cls.name}
        assert cls(lstm=False).identity() == {"rule": cls.name, "lstm": False}
        assert cls(preprocessing=False).identity() == {"rule": cls.name, "preprocessing": False}


def test_explain_is_the_inside_of_the_step(rule):
    theta = random_theta(rule, F64)
    grads = torch.randn(4, 7, dtype=F64)
    _, state = run(rule, theta, grads[:3])
    if not isinstance(rule, AdamCandidatesRule):
        assert not hasattr(rule, "explain")
        return
    before = {name: value.clone() for name, value in state.tensors().items()}
    inside = rule.explain(theta, state, grads[3])
    assert all(torch.equal(value, before[name]) for name, value in state.tensors().items())
    update, new = rule.step(theta, state, grads[3])
    assert torch.equal(inside.mean_N, update.mean_N)
    assert torch.equal((inside.rho_NH * inside.a_NH).sum(dim=-1), update.mean_N)
    if update.log_var_N is None:
        assert inside.log_var_N is None
    else:
        assert torch.equal(inside.log_var_N, update.log_var_N)
    m_NH = inside.beta_NH * state.m_NH + (1 - inside.beta_NH) * grads[3][:, None]
    v_NH = inside.gamma_NH * state.v_NH + (1 - inside.gamma_NH) * grads[3][:, None] ** 2
    torch.testing.assert_close(new.m_NH, m_NH)
    torch.testing.assert_close(new.v_NH, v_NH)
    doubled = inside.map(lambda value: 2 * value)
    assert torch.equal(doubled.gamma_NH, 2 * inside.gamma_NH)
    assert (doubled.log_var_N is None) == (inside.log_var_N is None)


def test_candidates_are_bounded():
    """A coordinate whose second moment has forgotten a large gradient."""
    grads = torch.tensor([[1e4], [1e-6], [1e-6]], dtype=F64)
    free = VariationalHyperAdamRule(channels=4)
    theta = random_theta(free, F64)
    theta["adamcell.bias"][:4], theta["adamcell.bias"][4:] = 20.0, -20.0  # β near 1, γ near 0
    rho_bound = 4 * 10.0
    wild, _ = run(free, theta, grads)
    tame, _ = run(dataclasses.replace(free, candidate_bound=5.0), theta, grads)
    assert float(wild.mean_N.abs()) > 1e3
    assert float(tame.mean_N.abs()) <= 5.0 * rho_bound


def test_stacked_problems_are_separate():
    """A leading dimension holds independent problems, with column norms of their own."""
    rule = VariationalHyperAdamRule(channels=4)
    theta = random_theta(rule, F64)
    grads = torch.randn(3, 2, 8, dtype=F64)
    state = rule.init_state(8, dtype=F64)
    both = dataclasses.replace(state.map(lambda t: t.expand(2, *t.shape)), step=state.step)
    together, _ = run(rule, theta, grads, both)
    for index in range(2):
        alone, _ = run(rule, theta, grads[:, index])
        torch.testing.assert_close(together.mean_N[index], alone.mean_N)
        torch.testing.assert_close(rule.kl(together)[index], rule.kl(alone))


def test_two_reductions_a_step():
    """Each layer's state cell makes one, the Adam cell one."""
    rule = VariationalHyperAdamRule(channels=4)
    calls = []
    rule.step(
        random_theta(rule),
        rule.init_state(5),
        torch.randn(5),
        lambda vector: calls.append(vector) or vector,
    )
    assert [vector.shape for vector in calls] == [(9,), (9,)]


def test_shards_give_the_whole(rule_name):
    """Rows of one problem, stepped by 'ranks' in lockstep threads that sum their columns."""
    import threading

    rule = RULES[rule_name](channels=4)
    theta = random_theta(rule, F64)
    grads = torch.randn(3, 10, dtype=F64)
    whole, _ = run(rule, theta, grads)
    sizes = (7, 3)
    barrier, slots, means = threading.Barrier(2), [None, None], [None, None]

    def rank(index, shard):
        def reduce(vector):
            slots[index] = vector
            barrier.wait(timeout=30)
            total = slots[0] + slots[1]
            barrier.wait(timeout=30)
            return total

        state = rule.init_state(shard.shape[1], dtype=F64)
        for grad in shard:
            update, state = rule.step(theta, state, grad, reduce)
        means[index] = update.mean_N

    threads = [
        threading.Thread(target=rank, args=(index, shard))
        for index, shard in enumerate(grads.split(sizes, dim=1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat(means), whole.mean_N)


def test_joined_states_step_as_they_would_alone_but_for_the_norms():
    rule = RNNpropRule(channels=4)  # no column norms: coordinates never meet
    theta = random_theta(rule, F64)
    grads = torch.randn(4, 5, dtype=F64)
    _, old = run(rule, theta, grads[:3, :3])
    new = rule.init_state(2, dtype=F64)
    joined, state = run(rule, theta, grads[3:], cat_states([old, new], [3, 2]))
    assert state.step.tolist() == [4, 4, 4, 1, 1]
    first, _ = run(rule, theta, grads[3:, :3], old)
    second, _ = run(rule, theta, grads[3:, 3:], new)
    torch.testing.assert_close(joined.mean_N, torch.cat([first.mean_N, second.mean_N]))


def test_kl_against_torch():
    """The released program's epsilons apart, it is the divergence of two normals."""
    normal, divergence = torch.distributions.Normal, torch.distributions.kl_divergence
    mean, prior_mean = torch.randn(2, 6, dtype=F64)
    log_var = torch.randn(6, dtype=F64)
    for scale in (0.3, 1.0, 2.0):
        update = normal(mean, torch.exp(log_var / 2))
        full = divergence(update, normal(prior_mean, scale)).sum()
        torch.testing.assert_close(
            kl_divergence(log_var, mean - prior_mean, scale), full, rtol=1e-4, atol=1e-4
        )
        centred = divergence(update, normal(mean, scale)).sum()
        torch.testing.assert_close(
            kl_divergence(log_var, None, scale), centred, rtol=1e-4, atol=1e-4
        )


def test_prior_mean_is_the_fixed_moments_direction():
    rule = VariationalHyperAdamRule(channels=3, kl_prior_mean="fixed_moments")
    update, _ = run(rule, random_theta(rule, F64), torch.full((3, 2), -2.0, dtype=F64))
    torch.testing.assert_close(update.prior_mean_N, torch.full((2,), -1.0, dtype=F64))


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((20, 64), 0.5), ((8, 16, 3, 3), 1 / 3), ((7, 4), 1), ((400,), 1), ((), 1), ((5, 0), 1)],
)
def test_the_learning_rate_falls_with_the_fan_in(shape, scale):
    rule = VariationalHyperAdamRule(fan_in_base=16)
    assert rule.lr_scale(torch.Size(shape)) == pytest.approx(scale)
    assert VariationalHyperAdamRule().lr_scale(shape) == 1.0
    rule = VariationalHyperAdamRule(row_mean_base=16)
    assert rule.row_mean_scale(torch.Size(shape)) == pytest.approx(scale)
    assert VariationalHyperAdamRule().row_mean_scale(shape) == 1.0


@pytest.mark.parametrize("shape", [(400,), ()])
def test_the_learning_rate_of_vectors(shape):
    rule = VariationalHyperAdamRule(fan_in_base=16, vector_scale=0.3)
    assert rule.lr_scale(shape) == 0.3
    assert rule.lr_scale((20, 64)) == 0.5


@pytest.mark.parametrize(("shape", "scale"), [((192, 64), 0.05), ((4, 4), 0.1), ((192,), 0.3)])
def test_the_learning_rate_of_attentions_projections(shape, scale):
    """A matrix's; the biases' is that of other vectors."""
    rule = VariationalHyperAdamRule(fan_in_base=16, vector_scale=0.3, attention_scale=0.1)
    assert rule.lr_scale(shape, attention=True) == pytest.approx(scale)
    assert rule.lr_scale(shape) == dataclasses.replace(rule, attention_scale=1.0).lr_scale(shape)
    assert VariationalHyperAdamRule().lr_scale(shape, attention=True) == 1.0


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_the_variance_is_narrower_where_the_gradient_is_large(floor):
    base = 0.2
    plain = VariationalHyperAdamRule(channels=3, moment_decays=(0.5, 0.9, 0.8))
    narrow = dataclasses.replace(plain, variance_base=base, variance_floor=floor)
    theta = random_theta(plain, F64)
    grads = torch.tensor([0.0, 0.1, 1.0, 3.0], dtype=F64) * torch.randn(4, 4, dtype=F64)
    of_plain, of_narrow = (run(rule, theta, grads)[0] for rule in (plain, narrow))
    ages = torch.arange(3, -1, -1, dtype=F64)
    moment_N = (0.9 ** ages.unsqueeze(1) * grads.square()).sum(0) / (0.9**ages).sum()
    peak = peak_of(grads, 0.9)
    q_N = moment_N / moment_N.mean() / base
    factor_N = moment_N.mean() / peak * (1 + floor * q_N) / (1 + q_N)
    variance_N = of_plain.log_var_N.exp() * of_plain.mean_N.square().mean() * factor_N
    torch.testing.assert_close(of_narrow.log_var_N.exp(), variance_N)
    assert torch.equal(of_narrow.mean_N, of_plain.mean_N)


def peak_of(grads, decay):
    """The largest mean over coordinates, over the steps so far, of a corrected second moment."""
    moments, moment = [], 0.0
    for step, grad in enumerate(grads):
        moment = decay * moment + (1 - decay) * float(grad.square().mean())
        moments.append(moment / (1 - decay ** (step + 1)))
    return max(moments)


@pytest.mark.parametrize("growth", [1.5, 0.5])
def test_the_variance_falls_with_the_gradients_from_the_highest_that_they_were(growth):
    rule = VariationalHyperAdamRule(channels=3, moment_decays=(0.5, 0.9), variance_base=0.2)
    theta = random_theta(rule, F64)
    grads = torch.randn(30, 5, dtype=F64).sign() * growth ** torch.arange(30).unsqueeze(1)
    of_plain, _ = run(dataclasses.replace(rule, variance_base=None), theta, grads)
    of_shaped, state = run(rule, theta, grads)
    assert float(state.peak_1) == pytest.approx(peak_of(grads, 0.9))
    left = float(state.exp_avg_sq_NK[:, 1].mean()) / (1 - 0.9**30) / float(state.peak_1)
    assert left == pytest.approx(1.0) if growth > 1 else 0 < left < 0.1
    factor = left / (1 + 1 / 0.2)  # all coordinates have one second moment
    variance_N = of_plain.log_var_N.exp() * of_plain.mean_N.square().mean() * factor
    torch.testing.assert_close(of_shaped.log_var_N.exp(), variance_N)


def test_joined_states_have_the_higher_peak():
    rule = VariationalHyperAdamRule(channels=3, variance_base=0.2)
    old = run(rule, random_theta(rule, F64), 10 * torch.randn(6, 3, dtype=F64))[1]
    joined = cat_states([rule.init_state(2, dtype=F64), old], [2, 3])
    assert torch.equal(joined.peak_1, old.peak_1)
    assert float(joined.peak_1) > 0


def test_without_gradients_there_is_no_variance_to_speak_of():
    rule = VariationalHyperAdamRule(channels=3, variance_base=0.03)
    update, _ = run(rule, random_theta(rule), torch.zeros(2, 5))
    assert float(update.log_var_N.max()) < -60
    assert bool(update.log_var_N.isfinite().all())


def test_sample():
    update = UpdateDistribution(torch.tensor([1.0, 2.0]), torch.tensor([0.0, math.log(4.0)]))
    torch.testing.assert_close(update.sample(torch.tensor([1.0, -1.0])), torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (VariationalHyperAdamRule, {"channels": 0}, "channels"),
        (VariationalHyperAdamRule, {"state_layers": 0}, "state_layers"),
        (VariationalHyperAdamRule, {"column_norm": "max"}, "column_norm"),
        (VariationalHyperAdamRule, {"candidate_bound": 0.0}, "candidate_bound"),
        (VariationalHyperAdamRule, {"candidate_bound": math.inf}, "candidate_bound"),
        (VariationalHyperAdamRule, {"fan_in_base": 0}, "fan_in_base"),
        (RNNpropRule, {"fan_in_base": math.nan}, "fan_in_base"),
        (VariationalHyperAdamRule, {"row_mean_base": -1.0}, "row_mean_base"),
        (VariationalHyperAdamRule, {"vector_scale": 0.0}, "vector_scale"),
        (VariationalHyperAdamRule, {"vector_scale": math.inf}, "vector_scale"),
        (VariationalHyperAdamRule, {"vector_scale": None}, "vector_scale"),
        (VariationalHyperAdamRule, {"attention_scale": 0.0}, "attention_scale"),
        (VariationalHyperAdamRule, {"attention_scale": None}, "attention_scale"),
        (VariationalHyperAdamRule, {"calibrated": 1}, "calibrated must be True or False"),
        (HyperAdamRule, {"calibrated": True}, "a rule with fixed moments"),
        (VariationalHyperAdamRule, {"moment_decays": ()}, "moment_decays"),
        (VariationalHyperAdamRule, {"moment_decays": (1.0,)}, "moment_decays"),
        (VariationalHyperAdamRule, {"kl_prior_mean": "zero"}, "kl_prior_mean"),
        (VariationalHyperAdamRule, {"kl_prior_scale": 0.0}, "kl_prior_scale"),
        (VariationalHyperAdamRule, {"variance_base": 0.0}, "variance_base"),
        (VariationalHyperAdamRule, {"variance_base": math.inf}, "variance_base"),
        (VariationalHyperAdamRule, {"variance_base": 1, "var_block": False}, "with var_block"),
        (VariationalHyperAdamRule, {"variance_floor": 0.1}, "with variance_base"),
        (VariationalHyperAdamRule, {"variance_base": 1, "variance_floor": 1.0}, "between 0 and 1"),
        (VariationalHyperAdamRule, {"variance_base": 1, "variance_floor": -0.1}, "variance_floor"),
        (VariationalHyperAdamRule, {"variance_base": 1, "variance_floor": None}, "variance_floor"),
        (VariationalHyperAdamRule, {"lstm": 0}, "lstm must be True or False"),
        (VariationalHyperAdamRule, {"lstm": False, "preprocessing": False}, "both be False"),
        (VariationalHyperAdamRule, {"lstm": False, "state_layers": 2}, "state_layers"),
        (HyperAdamRule, {"preprocessing": None}, "preprocessing must be True or False"),
        (HyperAdamRule, {"candidate_bound": -1.0}, "candidate_bound"),
        (RNNpropRule, {"moment_decays": (0.0,)}, "moment_decays"),
        (DMoptimizerRule, {"channels": -1}, "channels"),
    ],
)
def test_impossible_settings_are_refused(cls, settings, message):
    with pytest.raises(ConfigError, match=message):
        cls(**settings)
