"""Files that are damaged or made to do harm: each is read as what it is, or refused in words.

A short version. ``scripts/fuzz`` draws ten thousand cases of each and more, anew each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import math
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from conftest import make_weights
from evaluation.making import make_record
from hyperadam import Weights, import_official, load_weights, save_weights, tensor_file
from hyperadam.errors import ConfigError, RunError, WeightsError
from hyperadam.evaluation import RunStore, read_records, records, write_report
from hyperadam.evaluation.records import RUNS
from hyperadam.metatrain import RunLabel
from hyperadam.metatrain.checkpoint import load_checkpoint, save_checkpoint
from hyperadam.metatrain.run import RunFolder
from hyperadam.metatrain.trainer import MetaTrainer
from hyperadam.presets import preset
from hyperadam.rule import VariationalHyperAdamRule
from hyperadam.weights.store import MAX_BYTES
from reliability.hostile import RAW, changed_json, crafted_safetensors, damaged

CASES = int(os.environ.get("HYPERADAM_FUZZ_CASES", "0"))


def fuzz(cases, slow=1, **strategies):
    """``given``, for so many cases; under ``scripts/fuzz`` more, and other ones each time, but for
    a slow test a fraction of them."""
    quiet = settings(
        max_examples=CASES // slow or cases,
        derandomize=not CASES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: quiet(given(**strategies)(test))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


# -- weights ---------------------------------------------------------------------------------------

RULE = VariationalHyperAdamRule(channels=2)
WEIGHTS = make_weights(RULE)


@pytest.fixture(scope="module")
def weights_file(folder):
    save_weights(WEIGHTS, folder / "good.safetensors")
    return (folder / "good.safetensors").read_bytes()


def assert_weights_or_refused(path):
    try:
        weights = load_weights(path)
    except WeightsError:
        event("refused")
        return
    event("read")
    assert all(bool(torch.isfinite(value).all()) for value in weights.theta.values())
    assert weights.lr > 0


@fuzz(60, data=st.data())
def test_damaged_weights(folder, weights_file, data):
    path = folder / "w.safetensors"
    path.write_bytes(data.draw(damaged(weights_file)))
    assert_weights_or_refused(path)


@fuzz(100, data=st.data())
def test_weights_with_a_crafted_header(folder, weights_file, data):
    path = folder / "w.safetensors"
    path.write_bytes(data.draw(crafted_safetensors(weights_file)))
    assert_weights_or_refused(path)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]
SHAPES = st.lists(st.integers(0, 5), max_size=3)


NUMBERS = [math.nan, math.inf, -1.0, 0.0, 2.0, 6e4]
KINDS = ["gone", "other form", "other number"]


def forged_tensors(tensors):
    """Tensors of which one or two are of another form, gone, new or hold odd numbers."""
    change = st.tuples(
        st.sampled_from([*sorted(tensors), "new"]),
        st.sampled_from(KINDS),
        SHAPES,
        st.sampled_from(DTYPES),
        st.sampled_from(NUMBERS),
        st.integers(-(2**63), 2**63 - 1),
    )
    return st.lists(change, max_size=2).map(lambda changes: forge(tensors, changes))


def forge(tensors, changes):
    found = dict(tensors)
    for name, kind, shape, dtype, number, integer in changes:
        old = found.pop(name, None)
        if kind == "other form":
            found[name] = torch.ones(shape, dtype=dtype)
        elif kind == "other number" and old is not None:
            plain = old.dtype == torch.int64
            found[name] = torch.full_like(old, integer if plain else number)
    return found


@fuzz(100, data=st.data())
def test_forged_weights(folder, data):
    """By one who knows the format, so that the digest is right."""
    path = folder / "w.safetensors"
    notes = {"lr": "0.01", "steps": "3"} | dict.fromkeys(
        ("preset", "data", "date", "commit", "licence"), "x"
    )
    for name in data.draw(st.lists(st.sampled_from(sorted(notes)), max_size=2)):
        notes[name] = data.draw(RAW)
    notes["rule"] = data.draw(st.just(json.dumps(RULE.to_dict())) | changed_json(RULE.to_dict()))
    theta = data.draw(forged_tensors(WEIGHTS.theta))
    tensor_file.write(path, theta, notes, format_="hyperadam-weights", version=1)
    assert_weights_or_refused(path)


@pytest.mark.parametrize("text", ["\udcff", "a\x1b[2Jb", "a\nb\x00"])
def test_words_that_cannot_be_shown(text):
    """As a licence on a command line that is not UTF-8: told before the work, not after it."""
    with pytest.raises(WeightsError, match="licence is no printable text"):
        Weights(RULE, WEIGHTS.theta, lr=1e-3, licence=text)
    with pytest.raises(ConfigError, match="licence is no printable text"):
        RunLabel("smoke", text, "abc")
    with pytest.raises(ConfigError, match=r"device must be|a text is not Unicode"):
        SMOKE.with_overrides([f"device={text}"])


def test_an_oversized_weights_file(folder):
    """A terabyte on paper: refused by its size, before a byte is read."""
    path = folder / "large.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2**40)
    with pytest.raises(WeightsError, match=f"bytes; such files have at most {MAX_BYTES:,}"):
        load_weights(path)
    path.unlink()


class Malicious:
    """Unpickled by ``pickle`` itself, it makes a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_malicious_pickle_runs_nothing(folder):
    """The authors' layout is one of pickle, and only tensors are taken from it."""
    target = folder / "made"
    content = pickle.dumps(Malicious(str(target)))
    pickle.loads(content)
    target.rmdir()  # so it does
    path = folder / "theta.pkl"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="can't be read"):
        import_official(path)
    torch.save({**WEIGHTS.theta, "x": Malicious(str(target))}, path)
    with pytest.raises(WeightsError, match="can't be read"):
        import_official(path)
    assert not target.exists()


@fuzz(60, data=st.data())
def test_damaged_pickles(folder, data):
    path = folder / "theta.pkl"
    buffer = io.BytesIO()
    new_form = data.draw(st.booleans())
    torch.save(WEIGHTS.theta, buffer, _use_new_zipfile_serialization=new_form)
    path.write_bytes(data.draw(damaged(buffer.getvalue())))
    try:
        import_official(path)
    except WeightsError:
        event("refused")


# -- meta-training ---------------------------------------------------------------------------------

SMOKE = preset("smoke").with_overrides(["inner_runs=2"])
LABEL = RunLabel("smoke", "MIT", "abc")
CHECKPOINT = "hyperadam-checkpoint"


@pytest.fixture(scope="module")
def trainer():
    trainer = MetaTrainer(SMOKE)
    trainer.meta_step()
    return trainer


@pytest.fixture(scope="module")
def checkpoint(folder, trainer):
    path = folder / "good-checkpoint.safetensors"
    save_checkpoint(path, trainer)
    return path.read_bytes()


@fuzz(40, data=st.data())
def test_damaged_checkpoints(folder, trainer, checkpoint, data):
    path = folder / "checkpoint.safetensors"
    make = data.draw(st.sampled_from([damaged, crafted_safetensors]))
    path.write_bytes(data.draw(make(checkpoint)))
    try:
        load_checkpoint(path, trainer)
    except RunError:
        event("refused")


@fuzz(25, slow=5, data=st.data())
def test_forged_checkpoints(folder, trainer, checkpoint, data):
    """What is accepted can be gone on from."""
    path = folder / "good-checkpoint.safetensors"
    tensors, _ = tensor_file.read(path, format_=CHECKPOINT, version=2, error=RunError)
    path = folder / "checkpoint.safetensors"
    config = data.draw(st.just(json.dumps(SMOKE.to_dict())) | changed_json(SMOKE.to_dict()))
    tensor_file.write(
        path,
        data.draw(forged_tensors(tensors)),
        {"config": config},
        format_=CHECKPOINT,
        version=2,
    )
    mine = MetaTrainer(SMOKE)
    try:
        load_checkpoint(path, mine)
    except RunError:
        event("refused")
        return
    event("read")
    while not mine.finished:
        mine.meta_step()


def without(*names):
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


def with_other(name, value):
    return lambda tensors: tensors | {name: value}


@pytest.mark.parametrize(
    "change",
    [
        without("position"),
        without("meta_optimizer.exp_avg.lstm1.bias"),
        without("next_run"),
        with_other("next_run", torch.tensor(-1)),
        with_other("next_run", torch.tensor(0)),
        with_other("position", torch.zeros(0, 2, dtype=torch.int64)),
        with_other("position", torch.tensor([0, 0])),
        with_other("position", torch.tensor([[0, 0], [1, 0]])),
        with_other("position", torch.tensor([[-1, 0]])),
        with_other("position", torch.tensor([[0, 2**40]])),
        with_other("history", torch.zeros(2, 3, dtype=torch.float64)),
        with_other("meta_optimizer.step.lstm1.bias", torch.tensor(-1.0)),
        with_other("theta.linear_var1.weight", torch.ones(1)),
        with_other("inner.0.params", torch.zeros(3)),
        with_other("inner.0.rule.step", torch.ones(())),
        with_other("inner.0.rule.step", torch.tensor(2**63 - 1)),
        with_other("history", torch.full((2, 8), math.inf, dtype=torch.float64)),
    ],
)
def test_checkpoints_of_another_form(folder, trainer, checkpoint, change):
    tensors, notes = tensor_file.read(
        folder / "good-checkpoint.safetensors", format_=CHECKPOINT, version=2, error=RunError
    )
    path = folder / "checkpoint.safetensors"
    notes = {"config": notes["config"]}
    tensor_file.write(path, change(tensors), notes, format_=CHECKPOINT, version=2)
    with pytest.raises(RunError, match="does not hold this run's state"):
        load_checkpoint(path, MetaTrainer(SMOKE))


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[" * 100_000,
        '{"config": 3, "label": {"preset": "a", "licence": "b", "commit": "c"}}',
        '{"config": {}, "label": ["preset", "licence", "commit"]}',
        '{"config": {}, "label": {"preset": "\\ud800", "licence": "b", "commit": "c"}}',
    ],
    ids=lambda text: text[:40],
)
def test_absurd_configurations(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"config\.json can't be read"):
        RunFolder(folder).read_config()


@fuzz(100, data=st.data())
def test_configurations(folder, data):
    """``config.json`` of a run's folder; damaged, it may be no text at all."""
    run = RunFolder(folder)
    values = {"config": SMOKE.to_dict(), "label": dataclasses.asdict(LABEL)}
    content = json.dumps(values).encode()
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    else:
        text = data.draw(changed_json(values))
        content = text.encode("utf-8", errors="surrogatepass")
    (folder / "config.json").write_bytes(content)
    try:
        config, label = run.read_config()
    except RunError:
        event("refused")
        return
    event("read")
    run.write_config(config, label)
    assert run.read_config() == (config, label)


@fuzz(60, key=st.sampled_from(sorted([*SMOKE.to_dict(), "rule.channels", "rule.moment_decays"])),
      raw=RAW)  # fmt: skip
def test_settings_of_the_command_line(key, raw):
    try:
        SMOKE.with_overrides([f"{key}={raw}"])
    except ConfigError:
        event("refused")


# -- results ---------------------------------------------------------------------------------------

RUN = json.loads(
    make_record(
        losses=np.linspace(2, 1, 12),
        optimizer="variational-hyperadam",
        weights="ab12" * 16,
        learned=True,
        source="abc",
        trace={
            "at": [0, 5],
            "layers": ["weight", "bias"],
            **{name: [[0.5, 0.25, 0.125]] * 2 for name in ("beta", "gamma", "rho", "rho_std")},
            **{f"{name}_quantiles": [[0.1, 0.2, 0.5, 0.7, 0.9]] * 2 for name in ("beta", "gamma")},
            **{name: [[1.0, None]] * 2 for name in ("std", "snr", "update_rms")},
        },
    ).to_json()
)
GOOD = [make_record(seed).to_json() for seed in (0, 1)]


def hostile_lines(data):
    """Two good lines with a hostile one between them."""
    if data.draw(st.booleans()):
        hostile = data.draw(changed_json(RUN)).encode("utf-8", errors="surrogatepass")
    else:
        hostile = data.draw(damaged(json.dumps(RUN).encode()))
    return b"\n".join([GOOD[0].encode(), hostile.replace(b"\n", b" "), GOOD[1].encode(), b""])


@fuzz(100, data=st.data())
def test_lines_of_results(folder, data):
    """The lines around a bad one are kept, and mending the file once is enough."""
    results = folder / "results"
    results.mkdir(exist_ok=True)
    (results / RUNS).write_bytes(hostile_lines(data))
    found, remarks = read_records(results)
    event(f"{len(remarks)} damaged")
    assert {0, 1} <= {record.seed for record in found}
    with contextlib.redirect_stderr(io.StringIO()), RunStore(results).opened() as there:
        assert [record.key for record in there] == [record.key for record in found]
    again, none = read_records(results)
    assert [record.to_json() for record in again] == [record.to_json() for record in there]
    assert none == []


@fuzz(3, slow=50, data=st.data())
def test_reports_of_hostile_results(folder, data):
    """What passes as a run does not break the report."""
    results = folder / "reported"
    results.mkdir(exist_ok=True)
    (results / RUNS).write_bytes(hostile_lines(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy: an overflow to infinity
        paths = write_report(results)
    assert "</html>" in paths.html.read_text(encoding="utf-8")


@fuzz(30, data=st.data())
def test_damaged_packed_results(folder, data):
    results = folder / "packed"
    results.mkdir(exist_ok=True)
    packed = gzip.compress("".join(f"{line}\n" for line in GOOD).encode(), mtime=0)
    (results / f"{RUNS}.gz").write_bytes(data.draw(damaged(packed)))
    try:
        read_records(results)
    except RunError:
        event("refused")


def test_packed_results_with_any_byte_changed(folder):
    results = folder / "flipped"
    results.mkdir()
    packed = gzip.compress(f"{GOOD[0]}\n".encode(), mtime=0)
    refused = 0
    for place in range(len(packed)):
        changed = bytearray(packed)
        changed[place] ^= 0x55
        (results / f"{RUNS}.gz").write_bytes(changed)
        try:
            found, remarks = read_records(results)
        except RunError:
            refused += 1
        else:  # in the header, where dates and flags are
            assert [record.seed for record in found] == [0]
            assert remarks == []
    assert refused > len(packed) - 10


def test_oversized_results(folder, monkeypatch):
    """A file of five gigabytes on paper; a small one that unpacks to more than is taken."""
    results = folder / "large"
    results.mkdir()
    with (results / RUNS).open("wb") as file:
        file.truncate(5 * 2**30)
    with pytest.raises(RunError, match="results have at most"):
        read_records(results)
    with pytest.raises(RunError, match="results have at most"), RunStore(results).opened():
        pass
    (results / RUNS).unlink()
    (results / f"{RUNS}.gz").write_bytes(gzip.compress(bytes(2**26)))
    monkeypatch.setattr(records, "MAX_BYTES", 2**25)
    with pytest.raises(RunError, match="unpacks to more than"):
        read_records(results)
