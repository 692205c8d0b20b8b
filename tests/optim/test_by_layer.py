import copy

import pytest
import torch
from torch.testing import assert_close

from hyperadam.errors import ConfigError
from hyperadam.optim import AdamByLayer


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def step(network, optimizer, seed=0):
    images = torch.rand(5, 64, generator=torch.Generator().manual_seed(seed))
    before = [param.detach().clone() for param in network.parameters()]
    optimizer.zero_grad()
    network(images).square().sum().backward()
    optimizer.step()
    return [
        param.detach() - start for param, start in zip(network.parameters(), before, strict=True)
    ]


def test_without_scales_it_is_adam(network):
    twin = copy.deepcopy(network)
    ours = AdamByLayer(
        network.parameters(), 0.01, fan_in_base=None, row_mean_base=None, vector_scale=1.0
    )
    adam = torch.optim.Adam(twin.parameters(), 0.01)
    for seed in range(3):
        assert_close(step(network, ours, seed), step(twin, adam, seed), atol=1e-6, rtol=1e-5)


def test_a_step_is_adams_with_less_in_common_and_smaller_by_layer(network):
    twin = copy.deepcopy(network)
    wide, bias, narrow, last_bias = step(network, AdamByLayer(network.parameters(), 0.01))
    adam = torch.optim.Adam(twin.parameters(), 0.01)
    wide_adam, bias_adam, narrow_adam, last_adam = step(twin, adam)
    common = wide_adam.mean(1, keepdim=True)
    # 64 inputs: sqrt(16 / 64) of the step, of whose common part sqrt(1 / 64) is left
    assert_close(wide, 0.5 * (wide_adam - common + common / 8), atol=1e-7, rtol=1e-4)
    common = narrow_adam.mean(1, keepdim=True)
    assert_close(narrow, narrow_adam - common * (1 - 8**-0.5), atol=1e-7, rtol=1e-4)
    assert_close(bias, 0.3 * bias_adam, atol=1e-7, rtol=1e-4)
    assert_close(last_bias, 0.3 * last_adam, atol=1e-7, rtol=1e-4)


def test_names_tell_attentions_projections():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 2)
    twin = copy.deepcopy(attention)
    settings = {"fan_in_base": None, "row_mean_base": None, "vector_scale": 1.0}
    moves = []
    for network, params in (
        (attention, attention.named_parameters()),
        (twin, twin.parameters()),
    ):
        optimizer = AdamByLayer(params, 0.01, **settings)
        before = {name: param.detach().clone() for name, param in network.named_parameters()}
        inputs = torch.rand(3, 1, 16, generator=torch.Generator().manual_seed(0))
        network(inputs, inputs, inputs)[0].square().sum().backward()
        optimizer.step()
        moves.append(
            {name: param.detach() - before[name] for name, param in network.named_parameters()}
        )
    scales = {
        "in_proj_weight": 0.2,
        "in_proj_bias": 1,
        "out_proj.weight": 0.2,
        "out_proj.bias": 1,
    }
    for name, scale in scales.items():
        assert_close(moves[0][name], scale * moves[1][name], atol=1e-7, rtol=1e-4)


def test_a_parameter_without_a_gradient_stays(network):
    network[0].weight.requires_grad_(False)
    moves = step(network, AdamByLayer(network.parameters(), 0.01))
    assert not moves[0].any()
    assert moves[2].any()


def test_it_returns_the_closures_loss(network):
    optimizer = AdamByLayer(network.parameters(), 0.01)

    def closure():
        optimizer.zero_grad()
        loss = network(torch.ones(1, 64)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0


def test_settings_out_of_range_are_refused(network):
    with pytest.raises(ConfigError, match="fan_in_base"):
        AdamByLayer(network.parameters(), fan_in_base=0.0)
