from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.making import make_record
from hyperadam.errors import RunError
from hyperadam.evaluation import Record, RunStore, read_records
from hyperadam.evaluation.records import DAMAGED, FIRST_TUNING_SEED, RUNS


def same(a, b):
    plain = [
        {name: value for name, value in vars(r).items() if not name.startswith("train_loss")}
        for r in (a, b)
    ]
    curves = ("train_loss", "train_loss_post")
    return plain[0] == plain[1] and all(
        np.allclose(getattr(a, name), getattr(b, name), rtol=1e-5, equal_nan=True)
        for name in curves
    )


def add(folder, *records):
    store = RunStore(folder)
    with store.opened():
        for record in records:
            store.add(record)


def test_a_line_and_back():
    record = make_record(losses=[1.23456789, math.nan, math.inf], trace={"at": [0], "layers": []})
    line = record.to_json()
    assert "\n" not in line
    values = json.loads(line)
    assert values["train_loss"] == [1.235, None, None]
    back = Record.from_json(line)
    assert np.isnan(back.train_loss[1:]).all()
    assert same(
        back,
        dataclasses.replace(
            record, train_loss=back.train_loss, train_loss_post=back.train_loss_post
        ),
    )
    assert back.key == record.key
    assert math.isnan(back.final_loss)


def test_the_source_of_a_run():
    record = make_record(source="abc+changes")
    assert Record.from_json(record.to_json()).source == "abc+changes"
    before = make_record().to_json()  # as lines from before it was recorded
    assert "source" not in json.loads(before)
    assert Record.from_json(before).source is None
    with pytest.raises(ValueError, match="source is '3'"):
        Record.from_json(before[:-1] + ',"source":3}')


def test_final_loss_and_tuning_seeds():
    record = make_record(losses=np.arange(20.0))
    assert record.final_loss == pytest.approx(np.arange(10, 20).mean() / 2)
    assert not record.is_tuning
    assert make_record(seed=FIRST_TUNING_SEED).is_tuning


def test_runs_are_there_again(tmp_path):
    add(tmp_path, make_record(0), make_record(1))
    add(tmp_path, make_record(2))
    records, remarks = read_records(tmp_path)
    assert [record.seed for record in records] == [0, 1, 2]
    assert remarks == []
    assert same(records[1], make_record(1))


def test_packed_results_are_read_and_not_written_to(tmp_path):
    add(tmp_path, make_record(0))
    content = (tmp_path / RUNS).read_bytes()
    (tmp_path / RUNS).unlink()
    (tmp_path / f"{RUNS}.gz").write_bytes(gzip.compress(content))
    assert len(read_records(tmp_path)[0]) == 1
    with pytest.raises(RunError, match=r"gunzip runs\.jsonl\.gz"), RunStore(tmp_path).opened():
        pass


def test_newer_packed_results_are_not_passed_over(tmp_path):
    add(tmp_path, make_record(0))
    runs, packed = tmp_path / RUNS, tmp_path / f"{RUNS}.gz"
    one = runs.read_bytes()
    packed.write_bytes(gzip.compress(one))
    now = runs.stat().st_mtime
    os.utime(packed, (now + 5, now + 5))
    assert len(read_records(tmp_path)[0]) == 1  # they are the same
    packed.write_bytes(gzip.compress(one + make_record(1).to_json().encode() + b"\n"))
    os.utime(packed, (now + 5, now + 5))
    for use in (lambda: read_records(tmp_path), lambda: add(tmp_path, make_record(2))):
        with pytest.raises(RunError, match=r"gunzip -kf runs\.jsonl\.gz"):
            use()
    assert runs.read_bytes() == one
    packed.write_bytes(packed.read_bytes()[:-20])  # a download that was cut off
    os.utime(packed, (now + 5, now + 5))
    with pytest.raises(RunError, match="can't be read"):
        add(tmp_path, make_record(2))
    os.utime(packed, (now - 5, now - 5))
    add(tmp_path, make_record(2))
    assert [record.seed for record in read_records(tmp_path)[0]] == [0, 2]


def test_a_line_cut_off_is_told_and_nothing_else_is_lost(tmp_path, capsys):
    """As kill -9 or a full disk leaves the file."""
    add(tmp_path, make_record(0), make_record(1))
    path = tmp_path / RUNS
    path.write_bytes(path.read_bytes()[:-40])
    assert "line 2 is damaged" in read_records(tmp_path)[1][0]
    with RunStore(tmp_path).opened() as there:
        assert [record.seed for record in there] == [0]
    assert "line 2 is damaged" in capsys.readouterr().err
    assert (tmp_path / DAMAGED).read_text().startswith('{"task":"digits-mlp1-sigmoid"')
    add(tmp_path, make_record(1))
    records, remarks = read_records(tmp_path)
    assert [record.seed for record in records] == [0, 1]
    assert remarks == []
    assert capsys.readouterr().err == ""


def test_a_whole_line_without_its_end_is_kept(tmp_path, capsys):
    add(tmp_path, make_record(0))
    path = tmp_path / RUNS
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    add(tmp_path, make_record(1))
    assert [record.seed for record in read_records(tmp_path)[0]] == [0, 1]
    assert capsys.readouterr().err == ""


BAD = {
    "no JSON": "{",
    "a list": "[]",
    "lacks steps": json.dumps({"task": "x"}),
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", "0", "seed is"),
        ("seed", True, "seed is"),
        ("diverged", 1, "diverged is"),
        ("lr", None, "lr is"),
        ("steps", 4, "train_loss has not one number a step"),
        ("train_loss", "abc", "train_loss has not one number a step"),
        ("train_loss", [1, "x", 2], "train_loss holds more than numbers"),
        ("surprise", 1, "unknown fields: surprise"),
        ("lr", math.nan, "NaN is no number of JSON"),
        ("lr", 0.0, "lr is"),
        ("val_loss", 10**400, "val_loss is"),
        ("wall_s", -1.0, "wall_s is"),
        ("seed", 2**63, "seed is"),
        ("steps", 0, "steps is"),
        ("schedule", "cosin", "schedule is"),
        ("task", "a\ud800", "task is"),
        ("train_loss", [1, True, 2], "train_loss holds more than numbers"),
        ("train_loss", [1, 10**400, 2], "train_loss holds more than numbers"),
        ("trace", {"at": [0]}, "trace is"),
        ("trace", {"at": [0], "layers": [], "rho": [[1.0], [2.0]]}, "trace is"),
        ("trace", {"at": [1, 0], "layers": []}, "trace is"),
        ("trace", {"at": [0], "layers": [], "beta_quantiles": [[1.0] * 4]}, "trace is"),
    ],
)
def test_fields_are_checked(field, value, message):
    values = json.loads(make_record().to_json()) | {field: value}
    with pytest.raises(ValueError, match=message):
        Record.from_json(json.dumps(values))


@pytest.mark.parametrize("line", BAD.values(), ids=BAD.keys())
def test_foreign_lines(line):
    with pytest.raises(ValueError, match=r"."):
        Record.from_json(line)


@given(st.data())
def test_a_flipped_byte_is_a_record_or_a_value_error(data):
    line = bytearray(make_record().to_json().encode())
    line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.integers(0, 255))
    try:
        record = Record.from_json(line.decode(errors="replace"))
    except ValueError:
        return
    assert len(record.train_loss) == record.steps


def test_one_process_at_a_time(tmp_path):
    with (
        RunStore(tmp_path).opened(),
        pytest.raises(RunError, match="another process is at work"),
        RunStore(tmp_path).opened(),
    ):
        pass


def test_no_results(tmp_path):
    with pytest.raises(RunError, match=r"neither runs\.jsonl nor runs\.jsonl\.gz"):
        read_records(tmp_path)
    (tmp_path / f"{RUNS}.gz").write_bytes(b"nothing packed")
    with pytest.raises(RunError, match="can't be read"):
        read_records(tmp_path)
