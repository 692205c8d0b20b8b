from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hyperadam.errors import ConfigError, WeightsError
from hyperadam.metatrain import InnerState, MetaTrainConfig, MetaTrainer, inner_runs, unroll
from hyperadam.presets import preset
from hyperadam.rule import standard_normal
from hyperadam.tasks import (
    ConvexTask,
    RandomScaling,
    SumOfTasks,
    derive_seed,
    make_generator,
    make_task,
)
from hyperadam.weights import load_weights, save_weights

F64 = torch.float64
SMOKE = preset("smoke")


def theta_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.theta.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_it_learns():
    """On one inner run again and again, the meta-loss falls."""
    config = SMOKE.with_overrides(
        ["inner_runs=40", "meta_lr=0.02", "meta_weight_decay=0", "lr=0.01", "meta_grad_clip=1"]
    )
    trainer = MetaTrainer(config)
    while not trainer.finished:
        trainer.meta_step()
    last = [record.inner_loss for record in trainer.history if record.inner_step == 10]
    assert sum(last[-10:]) < 0.9 * sum(last[:10])


def test_it_goes_on_from_weights_that_are_there():
    config = preset("broad").with_overrides(
        ["init=default", "task=digits-mlp1-sigmoid", "trajectory_length=100", "inner_runs=1"]
    )
    assert (config.rule, config.lr) == (load_weights("default").rule, load_weights("default").lr)
    trainer = MetaTrainer(config)
    assert_same(theta_of(trainer), load_weights("default").theta)
    record = trainer.meta_step()
    assert record.applied
    unchanged = load_weights("default").theta
    assert not any(torch.equal(unchanged[name], value) for name, value in trainer.theta.items())


def test_weights_of_another_rule_can_not_be_gone_on_from():
    twenty = preset("broad").with_overrides(
        ["rule.channels=20", "init=lite", "task=digits-mlp1-sigmoid"]
    )
    with pytest.raises(ConfigError, match=r"'lite'.* of another rule: channels is 7, not 20$"):
        MetaTrainer(twenty)
    with pytest.raises(ConfigError, match="rule is hyperadam, not variational-hyperadam"):
        MetaTrainer(preset("digits").with_overrides(["init=hyperadam"]))
    with pytest.raises(ConfigError, match="lstm is True, not False"):
        MetaTrainer(preset("ablation-no-lstm").with_overrides(["init=lite"]))
    with pytest.raises(WeightsError, match="did you mean 'lite'"):
        preset("digits").with_overrides(["init=liet"])


def test_runs_are_fresh_and_repeatable():
    one, two = MetaTrainer(SMOKE), MetaTrainer(SMOKE)
    first = one.in_flight[0].carry.params_BN.clone()
    while not one.finished:
        assert one.meta_step() == two.meta_step()
    assert_same(theta_of(one), theta_of(two))
    assert [record.run for record in one.history] == [n // 2 for n in range(20)]
    assert [record.inner_step for record in one.history[:4]] == [5, 10, 5, 10]
    fresh = MetaTrainer(SMOKE)
    assert torch.equal(first, fresh.in_flight[0].carry.params_BN)
    own_scales = fresh.in_flight[0].group.tasks[0].tasks[0].scales["linear1.bias"]
    for _ in range(2):
        fresh.meta_step()
    next_scales = fresh.in_flight[0].group.tasks[0].tasks[0].scales["linear1.bias"]
    assert not torch.equal(own_scales, next_scales)
    other = MetaTrainer(dataclasses.replace(SMOKE, seed=1))
    assert not torch.equal(first, other.in_flight[0].carry.params_BN)


def recipe_written_out(config, meta_steps):
    """Meta-training of one task at a time as one loop, without config.tasks_per_step.

    Returns:
        Theta and each meta-step's (meta-loss, norm of the meta-gradient).
    """
    rule, task = config.rule, make_task(config.task)
    theta = rule.init_theta(make_generator(config.seed, "theta"))
    theta = {name: value.requires_grad_() for name, value in theta.items()}
    adam = torch.optim.Adam(
        theta.values(), lr=config.meta_lr, weight_decay=config.meta_weight_decay
    )
    seen = []
    for meta_step in range(meta_steps):
        run, unroll = divmod(meta_step, config.unrolls_of(0))
        seed = derive_seed(config.seed, "inner run", run)
        convex_seed = derive_seed(seed, "convex")
        inner = SumOfTasks(
            RandomScaling(task, config.random_scaling, derive_seed(seed, "task")),
            RandomScaling(
                ConvexTask(config.convex_dim, convex_seed), config.convex_scaling, convex_seed
            ),
        )
        if unroll == 0:
            initial = inner.init_params(make_generator(seed, "params"))
            shapes = {name: value.shape for name, value in initial.items()}
            params = torch.cat([value.flatten() for value in initial.values()])
            state = rule.init_state(len(params))

        def loss(params, batch, inner=inner, shapes=shapes):
            pieces = params.split([shape.numel() for shape in shapes.values()])
            named = zip(shapes.items(), pieces, strict=True)
            return inner.loss({name: piece.view(shape) for (name, shape), piece in named}, batch)

        losses, kls = [], []
        for step in range(unroll * config.unroll_length, (unroll + 1) * config.unroll_length):
            batch = inner.batch(derive_seed(seed, "data"), step)
            noise = standard_normal(derive_seed(seed, "noise"), step + 1, 0, len(params))
            point = params.detach().requires_grad_()
            (grad,) = torch.autograd.grad(loss(point, batch), point)
            update, state = rule.step(theta, state, grad)
            params = params - config.lr * update.sample(noise)
            losses.append(loss(params, batch))
            kls.append(rule.kl(update))
        meta_loss = (torch.stack(losses) + config.kl_weight * torch.stack(kls)).mean()
        params, state = params.detach(), state.map(torch.Tensor.detach)
        adam.zero_grad()
        meta_loss.backward()
        norm = torch.nn.utils.get_total_norm([value.grad for value in theta.values()])
        adam.step()
        seen.append((float(meta_loss.detach()), float(norm)))
    return theta, seen


def test_one_task_at_a_time_has_the_bits_of_the_recipe():
    trainer = MetaTrainer(dataclasses.replace(SMOKE, backend="reference"))
    for _ in range(6):
        trainer.meta_step()
    theta, seen = recipe_written_out(SMOKE, 6)
    assert_same(theta_of(trainer), theta)
    assert [(record.meta_loss, record.grad_norm) for record in trainer.history] == seen


VARIED = dataclasses.replace(
    SMOKE,
    task="digits-mlp[12]-sigmoid,digits-cnn1",
    min_trajectory_length=5,
    trajectory_length=40,
    min_random_scaling=0.0,
    meta_schedule="cosine",
    schedule="none,cosine",
    meta_objective="log-loss",
    inner_runs=12,
)


def test_inner_runs_draw_task_length_and_scaling():
    trainer = MetaTrainer(VARIED)
    seen = {}
    while not trainer.finished:
        size = trainer.in_flight[0].carry.params_BN.shape[1]
        record = trainer.meta_step()
        lr = trainer.meta_optimizer.param_groups[0]["lr"]
        seen.setdefault(record.run, []).append((size, lr))
    assert len({sizes[0][0] for sizes in seen.values()}) == 3  # each task was drawn
    assert all(len({size for size, _ in of_run}) == 1 for of_run in seen.values())
    lengths = [5 * len(of_run) for of_run in seen.values()]
    assert min(lengths) >= 5
    assert max(lengths) <= 40
    assert len(set(lengths)) > 3
    assert len(trainer.history) == VARIED.total_meta_steps
    lrs = [lr for of_run in seen.values() for _, lr in of_run]
    assert lrs[0] == VARIED.meta_lr
    assert lrs == sorted(lrs, reverse=True)
    assert lrs[-1] < 0.1 * lrs[0]
    scalings = [VARIED.scaling_of(seed) for seed in range(20)]
    assert 0 <= min(scalings) < 1
    assert 2 < max(scalings) <= VARIED.random_scaling


def test_lengths_are_log_uniform():
    config = MetaTrainConfig(min_trajectory_length=100, trajectory_length=800, unroll_length=20)
    unrolls = torch.tensor([config.unrolls_of(run) for run in range(2000)])
    assert (int(unrolls.min()), int(unrolls.max())) == (5, 40)
    # Half are below the geometric mean of the ends.
    assert abs(float((unrolls < 200**0.5).double().mean()) - 0.5) < 0.04


def test_inner_runs_draw_their_schedule():
    config = VARIED.with_overrides(["inner_runs=200"])
    constant = [run for run in range(200) if config.lr_at(run, 4) == config.lr]
    assert 60 < len(constant) < 140
    for run in set(range(200)) - set(constant):
        length = 5 * config.unrolls_of(run)
        lrs = [config.lr_at(run, step) for step in range(length)]
        assert lrs[0] == config.lr
        assert lrs == sorted(lrs, reverse=True)
        assert lrs[length - 1] == pytest.approx(
            config.lr * (1 + math.cos(math.pi * (length - 1) / length)) / 2
        )


def test_a_learning_rate_that_falls_reaches_the_inner_run():
    """The steps of a run under ``cosine`` are those of a constant one, times its factor."""
    config = SMOKE.with_overrides(["kl_weight=0", "schedule=cosine", "rule.var_block=false"])
    falling, constant = MetaTrainer(config), MetaTrainer(config.with_overrides(["schedule=none"]))
    of_both = [trainer.in_flight[0] for trainer in (falling, constant)]
    start = of_both[1].carry.params_BN
    torch.testing.assert_close(of_both[0].carry.params_BN, start)
    falling.meta_step()
    constant.meta_step()
    moved = [(runs.carry.params_BN - start).abs().mean() for runs in of_both]
    assert 0.5 < float(moved[0] / moved[1]) < 0.97


def first_moves(*configs):
    """How each configuration's first meta-step, of one inner step, moves the inner parameters."""
    moves = []
    for config in configs:
        trainer = MetaTrainer(config)
        start = trainer.in_flight[0].carry.params_BN.clone()
        trainer.meta_step()
        moves.append(trainer.in_flight[0].carry.params_BN - start)
    return moves


def test_the_fan_in_reaches_the_inner_run():
    """Of ``digits-mlp1-sigmoid``'s two weights one has 64 inputs, the other 20."""
    config = SMOKE.with_overrides(
        ["unroll_length=1", "random_scaling=0", "convex_dim=0", "rule.var_block=false"]
    )
    scales = config.with_overrides(["rule.fan_in_base=16", "rule.vector_scale=0.3"])
    steps = first_moves(scales, config)
    sizes = [20 * 64, 20, 10 * 20, 10]
    for own, whole, factor in zip(
        steps[0].split(sizes, 1), steps[1].split(sizes, 1), (0.5, 0.3, 0.8**0.5, 0.3), strict=True
    ):
        torch.testing.assert_close(own, factor * whole, rtol=1e-3, atol=1e-7)


def test_attentions_scale_reaches_the_inner_run():
    """By the names of the inner network's parameters, two layers' beside a convex task's."""
    config = SMOKE.with_overrides(
        ["task=unicode-names-transformer2x32-b16", "unroll_length=1", "rule.var_block=false"]
    )
    steps = first_moves(config.with_overrides(["rule.attention_scale=0.25"]), config)
    init = make_task(config.task).init_params(make_generator(0, "params"))
    sizes = [value.numel() for value in init.values()]
    sizes.append(steps[0].numel() - sum(sizes))
    assert sizes[-1] > 0
    for name, own, whole in zip(
        [*init, "the convex task's"],
        steps[0].split(sizes, 1),
        steps[1].split(sizes, 1),
        strict=True,
    ):
        factor = 0.25 if name.endswith(("in_proj_weight", "out_proj.weight")) else 1
        torch.testing.assert_close(own, factor * whole, rtol=1e-2, atol=1e-7, msg=name)
    assert sum(name.endswith("in_proj_weight") for name in init) == 2


@pytest.mark.parametrize("runs", [1, 2])
def test_row_means_are_scaled_in_the_inner_run_too(runs):
    """Of ``digits-mlp1-sigmoid``'s two weights one has 64 inputs, the other 20."""
    config = SMOKE.with_overrides(
        ["unroll_length=1", "random_scaling=0", "convex_dim=0", "rule.var_block=false"]
    ).with_overrides([f"tasks_per_step={runs}"])
    steps = first_moves(config.with_overrides(["rule.row_mean_base=4"]), config)
    sizes = [20 * 64, 20, 10 * 20, 10]
    for own, whole, factor, inputs in zip(
        steps[0].split(sizes, 1),
        steps[1].split(sizes, 1),
        (0.25, 1, 0.2**0.5, 1),
        (64, 1, 20, 1),
        strict=True,
    ):
        rows = whole.unflatten(1, (-1, inputs))
        expected = rows - (1 - factor) * rows.mean(2, keepdim=True)
        torch.testing.assert_close(own, expected.flatten(1), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("settings", [["lr=0.01", "init={}"], ["init={}", "lr=0.01"]])
def test_of_weights_to_begin_with_come_lr_channels_moments_and_variance(settings, tmp_path):
    """How steps are scaled by layer is the preset's, and what is said counts."""
    path = tmp_path / "weights.safetensors"
    weights = load_weights("lite")
    plain = dataclasses.replace(weights.rule, row_mean_base=None, vector_scale=1.0)
    save_weights(dataclasses.replace(weights, rule=plain, lr=0.002), path)
    config = preset("broad").with_overrides([settings[0].format(path), settings[1].format(path)])
    assert (config.rule, config.lr) == (weights.rule, 0.01)
    assert preset("broad").with_overrides([f"init={path}"]).lr == 0.002
    assert preset("broad").with_overrides(["init=null"]) == preset("broad")
    own = preset("broad-variance").rule
    plain = dataclasses.replace(plain, variance_base=0.5, variance_floor=0.0)
    save_weights(dataclasses.replace(weights, rule=plain), path)
    found = preset("broad-variance").with_overrides([f"init={path}"]).rule
    assert (found.variance_base, found.variance_floor) == (own.variance_base, own.variance_floor)


def test_weights_to_begin_with_may_scale_steps_otherwise(tmp_path):
    path = tmp_path / "weights.safetensors"
    weights = load_weights("lite")
    save_weights(
        dataclasses.replace(weights, rule=dataclasses.replace(weights.rule, fan_in_base=None)), path
    )
    config = dataclasses.replace(
        SMOKE, init=str(path), rule=dataclasses.replace(weights.rule, row_mean_base=2.0)
    )
    theta = MetaTrainer(config).theta
    assert all(torch.equal(theta[name], value) for name, value in weights.theta.items())


@pytest.mark.parametrize("perturbations", [0, 2])
def test_a_part_of_theta_may_be_trained(perturbations):
    """The rest stays as it was, also where its own gradient would be decayed or perturbed."""
    config = SMOKE.with_overrides(
        ["meta_parameters=linear_var1.*,lstm?.bias", f"perturbations={perturbations}"]
    )
    trained = {"lstm1.bias", "linear_var1.weight", "linear_var1.bias"}
    assert set(config.trained_parameters) == trained
    whole, first = MetaTrainer(config), MetaTrainer(config)
    before = theta_of(first)
    if perturbations:
        runs = first.in_flight[0]
        for copy in runs.perturbations.thetas(first.theta):
            same = {name for name, value in copy.items() if torch.equal(value, before[name])}
            assert same == set(before) - trained
    first.meta_step()
    second = MetaTrainer(config)
    second.load_state(first.state())
    while not whole.finished:
        whole.meta_step()
    while not second.finished:
        second.meta_step()
    assert_same(theta_of(whole), theta_of(second))
    moved = {
        name for name, value in theta_of(second).items() if not torch.equal(value, before[name])
    }
    assert moved == trained
    assert {record.grad_norm > 0 for record in second.history} == {True}


def test_the_meta_loss_may_be_of_the_batch_to_come(monkeypatch):
    """Also behind an unroll's last step, where it is the first of the next unroll."""
    seen, weights = [], []

    def spy(*arguments, **settings):
        seen.append((arguments[4], settings["meta_batches"]))
        weights.append(settings["batch_weights"])
        return unroll(*arguments, **settings)

    monkeypatch.setattr(inner_runs, "unroll", spy)
    losses = []
    for weight in (0, 1, 0.75):
        trainer = MetaTrainer(SMOKE.with_overrides([f"next_batch_weight={weight}"]))
        losses.append([trainer.meta_step().inner_loss for _ in range(2)])
    assert losses[0] != losses[1]
    assert weights == [[1], [1], [1], [1], [0.25, 0.75], [0.25, 0.75]]
    (batches, after), _, (first, ahead), (second, _), (_, of_both), _ = seen
    assert all(only is batch for batch, (only,) in zip(batches, after, strict=True))
    to_come = [*first[1:], second[0]]
    for (one,), (own, next_one), batch, other in zip(ahead, of_both, first, to_come, strict=True):
        assert all(map(torch.equal, tree_leaves(own), tree_leaves(batch)))
        assert all(map(torch.equal, tree_leaves(next_one), tree_leaves(one)))
        pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("settings", [[], ["rule.variance_base=0.01"]])
def test_varied_runs_resume_with_the_same_bits(settings):
    config = VARIED.with_overrides(settings)
    whole = MetaTrainer(config)
    for _ in range(14):
        whole.meta_step()
    first = MetaTrainer(config)
    for _ in range(9):
        first.meta_step()
    second = MetaTrainer(config)
    saved = first.state()
    assert any(name.endswith("peak_1") for name in saved) == config.rule.has_peak
    second.load_state(saved)
    for _ in range(5):
        second.meta_step()
    assert_same(theta_of(second), theta_of(whole))


def test_a_finished_run_of_several_tasks_is_taken_up():
    """Its last inner runs are of another task than the first ones."""
    config = VARIED.with_overrides(["inner_runs=2"])
    assert config.task_of(1) != config.task_of(0)
    whole = MetaTrainer(config)
    while not whole.finished:
        whole.meta_step()
    again = MetaTrainer(config)
    again.load_state(whole.state())
    assert again.finished
    assert_same(again.state(), whole.state())


def test_backends_agree_but_for_rounding():
    results = []
    for backend in ("reference", "cpu"):
        trainer = MetaTrainer(dataclasses.replace(SMOKE, backend=backend))
        for _ in range(6):
            trainer.meta_step()
        results.append(trainer)
    one, two = results
    for mine, theirs in zip(one.history, two.history, strict=True):
        assert mine.meta_loss == pytest.approx(theirs.meta_loss, rel=1e-5)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)
    for name, value in theta_of(one).items():
        torch.testing.assert_close(value, theta_of(two)[name], rtol=0, atol=1e-5)


def test_the_meta_gradient_of_many_is_the_mean_of_each():
    """Four runs side by side, and each by itself: one meta-step in double precision."""
    four = MetaTrainer(SMOKE.with_overrides(["tasks_per_step=4", "inner_runs=8"]))
    theta = {name: value.detach().double() for name, value in four.theta.items()}
    theta = {name: value.requires_grad_() for name, value in theta.items()}

    def meta_gradient(runs):
        params = runs.carry.params_BN.double()
        result = unroll(
            runs.rule, theta, InnerState(params, runs.rule.init_state(*params.shape, F64)),
            runs.group.loss, [runs.group.batch(step) for step in range(5)],
            runs.noise().double(), lrs=[SMOKE.lr] * 5, kl_weight=SMOKE.kl_weight,
        )  # fmt: skip
        return result.loss_TB, torch.autograd.grad(result.meta_loss, list(theta.values()))

    losses, grads = meta_gradient(four.in_flight[0])
    in_flight = MetaTrainer(SMOKE.with_overrides(["interleaved_runs=4"])).in_flight
    singles = [meta_gradient(runs) for runs in in_flight]
    alone = torch.cat([loss_T1 for loss_T1, _ in singles], dim=1)
    torch.testing.assert_close(losses, alone, rtol=1e-10, atol=0)
    for grad, *each in zip(grads, *[own for _, own in singles], strict=True):
        torch.testing.assert_close(grad, torch.stack(each).mean(0), rtol=1e-10, atol=1e-13)


def test_many_tasks_a_step():
    trainer = MetaTrainer(SMOKE.with_overrides(["tasks_per_step=5"]))
    alone = MetaTrainer(SMOKE)
    of_both = [each.in_flight[0].carry.params_BN for each in (trainer, alone)]
    torch.testing.assert_close(of_both[0][:1], of_both[1])
    while not trainer.finished:
        assert trainer.meta_step().applied
    assert [record.run for record in trainer.history] == [0, 0, 5, 5]
    assert [record.inner_step for record in trainer.history] == [5, 10, 5, 10]
    assert len(trainer.history) == trainer.config.total_meta_steps


def test_inner_runs_take_turns():
    """With three in flight, each has an unroll in turn; one that ends makes room for the next."""
    trainer = MetaTrainer(SMOKE.with_overrides(["interleaved_runs=3", "inner_runs=5"]))
    while not trainer.finished:
        trainer.meta_step()
    order = [(0, 5), (1, 5), (2, 5), (0, 10), (1, 10), (2, 10), (3, 5), (4, 5), (3, 10), (4, 10)]
    assert [(record.run, record.inner_step) for record in trainer.history] == order
    assert len(trainer.history) == trainer.config.total_meta_steps


def test_a_turn_goes_on_where_its_run_was():
    """A run's trajectory depends on theta and itself alone, whatever comes between its unrolls."""
    still = ["meta_lr=1e-30", "meta_weight_decay=0"]
    losses = []
    for turns in (1, 4):
        trainer = MetaTrainer(SMOKE.with_overrides([*still, f"interleaved_runs={turns}"]))
        while not trainer.finished:
            trainer.meta_step()
        losses.append(
            {(record.run, record.inner_step): record.meta_loss for record in trainer.history}
        )
    assert len(losses[0]) == 20
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("tasks", "turns", "at"),
    [
        *[(1, 1, at) for at in (0, 1, 2, 7, 19, 20)],
        *[(1, 3, at) for at in (0, 1, 2, 7, 19, 20)],
        *[(2, 1, 1), (5, 1, 2), (2, 1, 10), (2, 2, 5), (1, 40, 9)],
    ],
)
def test_state_is_everything(tasks, turns, at):
    config = SMOKE.with_overrides([f"tasks_per_step={tasks}", f"interleaved_runs={turns}"])
    undisturbed = MetaTrainer(config)
    for _ in range(at):
        undisturbed.meta_step()
    saved = {name: value.clone() for name, value in undisturbed.state().items()}
    resumed = MetaTrainer(config)
    if at < config.total_meta_steps:
        resumed.meta_step()  # whatever it held before is gone
    resumed.load_state(saved)
    while not undisturbed.finished:
        assert undisturbed.meta_step() == resumed.meta_step()
    assert resumed.finished
    assert resumed.history == undisturbed.history
    assert_same(resumed.state(), undisturbed.state())


def test_the_meta_optimizer_is_adam_with_l2():
    trainer = MetaTrainer(SMOKE)
    group = trainer.meta_optimizer.param_groups[0]
    assert isinstance(trainer.meta_optimizer, torch.optim.Adam)
    assert (group["lr"], group["weight_decay"]) == (1e-4, 5e-4)
    before = theta_of(trainer)
    trainer.meta_step()
    moved = max(float((value - before[n]).abs().max()) for n, value in theta_of(trainer).items())
    assert moved == pytest.approx(1e-4, rel=1e-3)  # Adam's first step


def test_clipping():
    config = SMOKE.with_overrides(["meta_grad_clip=1e-3"])
    trainer = MetaTrainer(config)
    record = trainer.meta_step()
    assert record.grad_norm > 1e-3
    norm = torch.nn.utils.get_total_norm([value.grad for value in trainer.theta.values()])
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_meta_gradient_that_is_not_finite_is_left_out(tasks):
    trainer = MetaTrainer(SMOKE.with_overrides([f"tasks_per_step={tasks}"]))
    (runs,) = trainer.in_flight
    params_BN = runs.carry.params_BN.clone()
    params_BN[-1] = torch.nan
    runs.carry = dataclasses.replace(runs.carry, params_BN=params_BN)
    before = theta_of(trainer)
    record = trainer.meta_step()
    assert not record.applied
    assert_same(theta_of(trainer), before)
    following = trainer.meta_step()
    assert (following.run, following.inner_step, following.applied) == (tasks, 5, True)


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        ([], "sum scaled scaled"),
        (["random_scaling=0"], "sum SupervisedTask scaled"),
        (["convex_scaling=0"], "sum scaled ConvexTask"),
        (["convex_dim=0"], "scaled"),
        (["convex_dim=0", "random_scaling=0"], "SupervisedTask"),
    ],
)
@pytest.mark.parametrize("tasks", [1, 2])
def test_inner_tasks(overrides, kinds, tasks):
    def kind(task):
        if isinstance(task, SumOfTasks):
            return " ".join(["sum", *map(kind, task.tasks)])
        return "scaled" if isinstance(task, RandomScaling) else type(task).__name__

    trainer = MetaTrainer(SMOKE.with_overrides([*overrides, f"tasks_per_step={tasks}"]))
    assert kind(trainer.in_flight[0].group.tasks[0]) == kinds
    assert trainer.meta_step().applied


@pytest.mark.parametrize("tasks", [1, 2])
def test_every_rule_can_be_meta_trained(rule_name, tasks):
    config = SMOKE.with_overrides([f"rule={rule_name}", "rule.channels=3", "inner_runs=2"])
    trainer = MetaTrainer(config.with_overrides([f"tasks_per_step={tasks}"]))
    before = theta_of(trainer)
    while not trainer.finished:
        assert trainer.meta_step().applied
    assert any(not torch.equal(before[name], value) for name, value in theta_of(trainer).items())


class OnlyOn(TorchDispatchMode):
    """Refuses operations on tensors of another device; single numbers may be anywhere."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                assert value.device == self.device, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("rule", ["variational-hyperadam", "rnnprop"])
def test_all_of_an_unroll_is_on_the_device(monkeypatch, tasks, rule):
    """The meta device, where there is no GPU: tensors of a shape without numbers."""
    meta = torch.device("meta")
    monkeypatch.setattr("hyperadam.metatrain.trainer.existing_device", lambda name: meta)
    config = SMOKE.with_overrides(["device=cuda", f"tasks_per_step={tasks}", f"rule={rule}"])
    trainer = MetaTrainer(config)
    (runs,) = trainer.in_flight
    steps = runs.steps
    batches = [runs.group.batch(step) for step in steps]
    noise_TBN = runs.noise()
    with OnlyOn(meta):
        result = unroll(
            trainer.rule, trainer.theta, runs.carry, runs.group.loss, batches, noise_TBN,
            lrs=[config.lr] * len(steps), kl_weight=config.kl_weight,
        )  # fmt: skip
        result.meta_loss.backward()
    grads = [value.grad for value in trainer.theta.values() if value.grad is not None]
    state = [result.carry.params_BN, *result.carry.rule_state.unpack().tensors().values()]
    assert grads
    assert {value.device for value in [*grads, *state]} == {meta}
    with pytest.raises(AssertionError), OnlyOn(meta):
        runs.group.loss(torch.zeros(runs.carry.params_BN.shape), batches[0])


def test_a_device_that_is_not_there():
    count = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"'cuda:{count}' is not there"):
        MetaTrainer(SMOKE.with_overrides([f"device=cuda:{count}"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tasks", [1, 5])
def test_a_gpu_agrees_but_for_rounding(tasks):
    one, two = (
        MetaTrainer(SMOKE.with_overrides([f"tasks_per_step={tasks}", f"device={device}"]))
        for device in ("cpu", "cuda")
    )
    for _ in range(4):
        mine, theirs = one.meta_step(), two.meta_step()
        assert mine.meta_loss == pytest.approx(theirs.meta_loss, rel=1e-4)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-2)
    resumed = MetaTrainer(two.config)
    resumed.load_state(two.state())
    assert resumed.meta_step().meta_loss == pytest.approx(two.meta_step().meta_loss, rel=1e-5)
    assert all(value.device.type == "cpu" for value in two.state().values())
