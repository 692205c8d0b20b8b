"""The golden figures: trajectories of all four rules, meta-gradients of two."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import GOLDEN
from hyperadam.kernels import differentiable_rule
from hyperadam.metatrain import InnerState, unroll
from hyperadam.rule import RULES
from parity.textbook import textbook_step

FINAL_STATE = {
    "lstm_h": "h_NLH",
    "lstm_c": "c_NLH",
    "adam_m": "m_NH",
    "adam_v": "v_NH",
    "adam_m_correction": "m_corr_NH",
    "adam_v_correction": "v_corr_NH",
    "exp_avg": "exp_avg_NK",
    "exp_avg_sq": "exp_avg_sq_NK",
}


def load(name, kind, dtype=torch.float64):
    with np.load(GOLDEN / f"{name.replace('-', '_')}_{kind}.npz") as file:
        values = {key: torch.from_numpy(file[key]) for key in file.files}
    values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}
    theta = {k.removeprefix("theta."): v for k, v in values.items() if k.startswith("theta.")}
    return values, theta


def assert_relative(actual, expected, tolerance):
    """In float64 relative in each number; in float32 relative to the array's largest.

    A number that is the small difference of large ones has no relative accuracy in float32.
    """
    atol = 0.0 if actual.dtype == torch.float64 else tolerance * float(expected.abs().max())
    rtol = tolerance if actual.dtype == torch.float64 else 0.0
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["f64", "f32"]
)
def test_trajectory(rule_name, dtype, tolerance):
    golden, theta = load(rule_name, "trajectory")
    theta = {name: value.to(dtype) for name, value in theta.items()}
    rule = RULES[rule_name]()
    state = rule.init_state(golden["grads"].shape[1], dtype=dtype)
    assert {name: tuple(value.shape) for name, value in theta.items()} == rule.theta_shapes()
    for t, grad in enumerate(golden["grads"]):
        update, state = rule.step(theta, state, grad.to(dtype))
        direction = update.mean_N
        if "noise" in golden:
            direction = update.sample(golden["noise"][t].to(dtype))
            assert_relative(rule.kl(update), golden["kl"][t], tolerance)
        assert direction.dtype == dtype
        assert_relative(direction, golden["updates"][t], tolerance)
    if rule_name == "variational-hyperadam":
        for name, field in FINAL_STATE.items():
            final = state.tensors()[field].reshape(golden[f"final.{name}"].shape)
            assert_relative(final, golden[f"final.{name}"], tolerance)
    assert int(state.step) == len(golden["grads"])


def test_textbook_gives_the_golden_trajectory():
    golden, theta = load("variational-hyperadam", "trajectory")
    state: dict = {}
    for t, grad in enumerate(golden["grads"]):
        mean, log_var = textbook_step(theta, state, grad)
        direction = mean + torch.exp(log_var / 2) * golden["noise"][t]
        assert_relative(direction, golden["updates"][t], 1e-10)


@pytest.mark.parametrize("name", ["hyperadam", "variational-hyperadam"])
def test_meta_gradient(name):
    golden, theta = load(name, "metagradient")
    theta = {key: value.requires_grad_() for key, value in theta.items()}
    rule = differentiable_rule(RULES[name](), "reference")
    length = int(golden["unroll_length"])
    noise = golden.get("noise", torch.zeros(length, 12, dtype=torch.float64))
    result = unroll(
        rule,
        theta,
        InnerState(golden["w0"].unsqueeze(0), rule.init_state(1, 12, torch.float64)),
        lambda w, _: 0.5 * (w @ golden["A"].T - golden["b"]).square().mean(dim=-1),
        [None] * length,
        noise.unsqueeze(1),
        lrs=[float(golden["lr"])] * length,
        kl_weight=float(golden["kl_weight"]),
    )
    result.meta_loss.backward()
    assert_relative(result.loss_TB[:, 0], golden["inner_losses"], 1e-10)
    assert_relative(result.meta_loss.detach(), golden["meta_loss"], 1e-10)
    assert_relative(result.carry.params_BN[0], golden["final_params"], 1e-10)
    assert not result.carry.rule_state.unpack().h_NLH.requires_grad
    for key, value in theta.items():
        assert_relative(value.grad, golden[f"meta_grad.{key}"], 1e-8)
