from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

import hyperadam
from conftest import make_weights
from hyperadam import Weights, load_weights, save_weights
from hyperadam.errors import ConfigError, WeightsError
from hyperadam.rule import RULES, VariationalHyperAdamRule
from hyperadam.weights import bundled_weights, rule_from_dict


@pytest.fixture
def path(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    save_weights(weights, path)
    return path


def raw(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def test_round_trip(tmp_path, rule_name):
    rule = RULES[rule_name](channels=5, state_layers=2)
    weights = dataclasses.replace(
        make_weights(rule),
        schedule="cosine",
        preset="paper rule.channels=5",
        data="mnist",
        steps=12,
        date="2022-01-01",
        commit="abc",
        licence="Apache-2.0",
    )
    save_weights(weights, tmp_path / "w.safetensors")
    again = load_weights(tmp_path / "w.safetensors")
    assert again.digest() == weights.digest()
    for name, value in weights.theta.items():
        assert torch.equal(again.theta[name], value)
    for field in dataclasses.fields(Weights):
        if field.name != "theta":
            assert getattr(again, field.name) == getattr(weights, field.name)


def test_every_option_of_the_rule_is_stored(tmp_path):
    rule = VariationalHyperAdamRule(
        channels=3,
        state_layers=2,
        column_norm="rms",
        candidate_bound=5.0,
        moment_decays=(0.5, 0.99),
        var_block=False,
        kl_prior_mean="fixed_moments",
        kl_prior_scale=0.1,
    )
    save_weights(make_weights(rule), tmp_path / "w.safetensors")
    assert load_weights(tmp_path / "w.safetensors").rule == rule


def test_metadata_says_what_it_is(path):
    _, metadata = raw(path)
    assert metadata["format"] == "hyperadam-weights"
    assert json.loads(metadata["rule"])["channels"] == 6
    assert set(metadata) >= {"lr", "preset", "data", "steps", "date", "commit", "licence"}


def test_the_digest_tells_weights_apart():
    assert make_weights(seed=0).digest() == make_weights(seed=0).digest()
    assert make_weights(seed=0).digest() != make_weights(seed=1).digest()
    bounded = VariationalHyperAdamRule(channels=6, candidate_bound=5.0)
    assert make_weights(bounded).digest() != make_weights().digest()


def test_the_digest_is_of_values_not_of_their_spelling(tmp_path):
    """An integer for a number, a list for a tuple, and options to come."""
    theta = make_weights(VariationalHyperAdamRule(channels=3, candidate_bound=5.0)).theta
    one = VariationalHyperAdamRule(channels=3, candidate_bound=5, moment_decays=[0.95])
    two = VariationalHyperAdamRule(channels=3, candidate_bound=5.0)
    assert one == two
    assert hash(one) == hash(two)
    first, second = Weights(one, theta, lr=1e-3), Weights(two, theta, lr=1e-3)
    assert first.digest() == second.digest()
    save_weights(first, tmp_path / "w.safetensors")
    assert load_weights(tmp_path / "w.safetensors").digest() == first.digest()

    @dataclasses.dataclass(frozen=True)
    class Later(VariationalHyperAdamRule):
        new_option: float = 1.0

    later = Later(channels=3, candidate_bound=5.0)
    assert Weights(later, theta, lr=1e-3).digest() == first.digest()
    changed = dataclasses.replace(later, new_option=2.0)
    assert Weights(changed, theta, lr=1e-3).digest() != first.digest()


def test_the_digest_of_the_first_weights_never_changes():
    """Users' optimizer checkpoints hold it."""
    rule = VariationalHyperAdamRule(channels=2)
    theta = {name: torch.full(shape, 0.5) for name, shape in rule.theta_shapes().items()}
    assert Weights(rule, theta, lr=1e-3).digest()[:16] == "954cd60927b495f7"


def test_values_become_plain(tmp_path):
    rule = VariationalHyperAdamRule(channels=2)
    theta = {name: value.requires_grad_() for name, value in make_weights(rule).theta.items()}
    shared = torch.zeros(8)
    theta["lstm1.bias"] = shared[:8]
    weights = Weights(rule, theta, lr=np.float64(1e-3), steps=np.int64(3), date=3)
    theta["post_linear.bias"] = shared[:2]
    save_weights(Weights(rule, theta, lr=torch.tensor(0.5)), tmp_path / "v.safetensors")
    save_weights(weights, tmp_path / "w.safetensors")
    again = load_weights(tmp_path / "w.safetensors")
    assert (again.lr, again.steps, again.date) == (1e-3, 3, "3")
    for bad in ({"lr": "fast"}, {"lr": 1.0, "steps": "many"}):
        with pytest.raises(WeightsError, match="no number"):
            Weights(rule, theta, **bad)


def test_bundled_weights_load_by_name():
    names = bundled_weights()
    assert "default" in names
    for name in names:
        weights = load_weights(name)
        assert weights.licence == "Apache-2.0"
        assert weights.steps > 0
        assert "unknown" not in (weights.preset, weights.data, weights.date, weights.commit)


def test_unknown_name_lists_the_near_misses():
    with pytest.raises(WeightsError, match="unknown weights 'defalt': did you mean 'default'"):
        load_weights("defalt")


def test_a_missing_file(tmp_path):
    with pytest.raises(WeightsError, match="no file at"):
        load_weights(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="no file at"):
        load_weights("none.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_weights(path)


def test_any_flipped_bit_is_noticed(path):
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, len(content), (200,), generator=generator).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(WeightsError):
            load_weights(path)


def test_a_foreign_file(path):
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match="not a hyperadam-weights file"):
        load_weights(path)


def rewrite(path, tensors=None, **changes):
    """A well-formed file with other content, as a program that knows the format would write it."""
    from hyperadam import tensor_file

    old, metadata = raw(path)
    notes = {**metadata, **changes}
    notes = {k: v for k, v in notes.items() if v is not None and k not in ("format", "sha256")}
    version = int(notes.pop("format_version"))
    tensor_file.write(
        path,
        old if tensors is None else tensors,
        notes,
        format_="hyperadam-weights",
        version=version,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "2"}, "format version 2"),
        ({"lr": None}, "lacks 'lr'"),
        ({"lr": "nan"}, "lr must be"),
        ({"lr": "-1"}, "lr must be"),
        ({"lr": "fast"}, "fast"),
        ({"rule": '{"rule": []}'}, "unknown rule"),
        ({"steps": "many"}, "many"),
        ({"rule": "{"}, "Expecting"),
        ({"rule": "[]"}, "w.safetensors"),
        ({"rule": '{"rule": "sgd"}'}, "unknown rule 'sgd'"),
        ({"rule": '{"rule": "rnnprop", "channels": 6}'}, "these are not weights of rnnprop"),
        ({"rule": '{"rule": "variational-hyperadam", "colour": 1}'}, "unknown setting 'colour'"),
        ({"rule": '{"rule": "variational-hyperadam", "channels": "x"}'}, "valid integer"),
        ({"rule": '{"rule": "variational-hyperadam", "channels": 7}'}, "has shape"),
    ],
)
def test_content_that_does_not_fit(path, changes, message):
    rewrite(path, **changes)
    with pytest.raises(WeightsError, match=message):
        load_weights(path)


def test_theta_that_does_not_fit(path, weights):
    theta = dict(weights.theta)
    for bad, message in (
        ({**theta, "extra": torch.zeros(1)}, "unexpected"),
        ({**theta, "lstm1.bias": torch.zeros(3)}, "has shape"),
        ({**theta, "lstm1.bias": theta["lstm1.bias"].half()}, "float16"),
        ({**theta, "lstm1.bias": theta["lstm1.bias"].bfloat16()}, "bfloat16"),
        ({**theta, "lstm1.bias": theta["lstm1.bias"] * float("nan")}, "not finite"),
    ):
        rewrite(path, bad)
        with pytest.raises(WeightsError, match=message):
            load_weights(path)


def test_saving_is_whole_or_not_at_all(path, weights, monkeypatch):
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(make_weights(seed=9), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_saving_asks_for_the_suffix(tmp_path, weights):
    with pytest.raises(WeightsError, match=r"ends in \.safetensors"):
        save_weights(weights, tmp_path / "w.pt")


def test_rule_from_dict_inverts_to_dict(rule_name):
    rule = RULES[rule_name](channels=7)
    assert rule_from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    with pytest.raises(ConfigError, match="unknown rule"):
        rule_from_dict({})


def test_public_names():
    assert hyperadam.load_weights is load_weights
