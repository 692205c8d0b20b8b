from __future__ import annotations

import hashlib
import sys

import pytest
import torch

from hyperadam.errors import DataError, MissingDependencyError
from hyperadam.tasks import TextExamples, load_data, make_generator, make_task
from hyperadam.tasks.text import encode_text

TEXT = "".join(map(chr, torch.randint(32, 127, (2000,), generator=make_generator(0))))


@pytest.fixture(autouse=True)
def _forget():
    load_data.cache_clear()


@pytest.fixture
def shakespeare(tmp_path):
    (tmp_path / "shakespeare.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def test_characters_as_numbers():
    assert encode_text("\n !Aa~").tolist() == [0, 1, 2, 34, 66, 95]
    assert encode_text("\té\U0001f600\x7f\x1f").tolist() == [96] * 5
    assert encode_text("").dtype == torch.uint8


def test_pythons_documentation():
    data = load_data("pydoc")
    assert 300_000 < len(data.train) < 2_000_000
    assert len(data.val) == (len(data.train) + len(data.val)) // 10
    assert int((data.train == 96).sum()) < len(data.train) / 100
    train, val = (
        "".join("\n" if c == 0 else chr(c + 31) for c in part.tolist())
        for part in (data.train, data.val)
    )
    assert 'The "assert" statement' in train
    pieces = [val[start : start + 65] for start in range(0, len(val) - 65, 65)]
    assert sum(piece in train for piece in pieces) < 0.02 * len(pieces)  # held out, so new


def test_names_of_unicode_characters():
    """Of a version that every Python has: the same text everywhere."""
    data = load_data("unicode-names")
    text = torch.cat((data.train, data.val))
    lines = "".join("\n" if c == 0 else chr(c + 31) for c in text.tolist()).split("\n")
    assert len(lines) == len(set(lines)) == 12_789
    assert {"LATIN SMALL LETTER A", "GREEK CAPITAL LETTER OMEGA", "SNOWMAN"} <= set(lines)
    assert not any("IDEOGRAPH-" in line or "HANGUL SYLLABLE" in line for line in lines)
    assert hashlib.sha256(bytes(text.tolist())).hexdigest()[:8] == "9ebaf69a"


def test_a_text_file(shakespeare):
    data = load_data("shakespeare", shakespeare)
    assert torch.equal(data.train, encode_text(TEXT[:1800]))
    assert torch.equal(data.val, encode_text(TEXT[1800:]))
    assert make_task("shakespeare-transformer", shakespeare).examples.data is data


def test_targets_are_the_characters_that_follow(shakespeare):
    examples = TextExamples(load_data("shakespeare", shakespeare), batch_size=100)
    inputs, targets = examples.batch(0, 0)
    assert inputs.shape == targets.shape == (100, 64)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text, places = TEXT[:1800], set()
    for piece, following in zip(inputs, targets, strict=True):
        shown = "".join(chr(c + 31) for c in [*piece.tolist(), int(following[-1])])
        assert shown in text
        places.add(text.index(shown))
    assert len(places) > 90
    assert max(places) - min(places) > 1500
    assert not torch.equal(examples.batch(0, 1)[0], inputs)
    assert not torch.equal(examples.batch(1, 0)[0], inputs)
    assert torch.equal(examples.batch(0, 0)[0], inputs)


def test_validation_reads_the_held_out_text_once(tmp_path):
    text = "".join(map(chr, torch.randint(32, 127, (10_000,), generator=make_generator(0))))
    (tmp_path / "shakespeare.txt").write_text(text)
    examples = TextExamples(load_data("shakespeare", tmp_path), context=5)
    batches = list(examples.validation())
    assert [len(inputs) for inputs, _ in batches] == [64, 64, 64, 7]
    inputs, targets = (torch.cat(own) for own in zip(*batches, strict=True))
    held_out = encode_text(text)[9000:]
    assert torch.equal(inputs.flatten(), held_out[:995])
    assert torch.equal(targets.flatten(), held_out[1:996])


def test_the_last_held_out_characters_are_read(shakespeare):
    """Of 200, three pieces of 64 with a following character need 193."""
    ((inputs, targets),) = make_task("shakespeare-transformer", shakespeare).examples.validation()
    assert inputs.shape == (3, 64)
    assert int(targets[-1, -1]) == int(encode_text(TEXT)[1800 + 192])


def test_a_character_sees_none_that_follow():
    task = make_task("pydoc-transformer")
    params = task.init_params(make_generator(0))
    inputs, _, masks = task.batch(0, 0)
    changed = inputs[:4].clone()
    changed[:, 40] = (changed[:, 40] + 1) % 97
    with torch.no_grad():
        before, after = (task.network.outputs(params, x, masks) for x in (inputs[:4], changed))
    assert before.shape == (4, 64, 97)
    torch.testing.assert_close(after[:, :40], before[:, :40])
    differ = (after - before).abs().amax(dim=(0, 2))
    assert float(differ[40:].min()) > 1e-5  # all that follow see it


def test_validation_computes_what_training_does():
    """In validation PyTorch takes a fused layer, which must know the mask too."""
    task = make_task("pydoc-transformer")
    params = task.init_params(make_generator(0))
    inputs, *_ = task.batch(0, 0)
    with torch.no_grad():
        predicted = task.network.predictor(params, iter([]))(inputs)
        torch.testing.assert_close(predicted, task.network.outputs(params, inputs, []))


# -- bad input -----------------------------------------------------------------------------------


def test_texts_that_cannot_be_used(tmp_path):
    path = tmp_path / "shakespeare.txt"
    with pytest.raises(DataError, match=r"no file .*shakespeare\.txt; save the text of the hub's"):
        load_data("shakespeare", tmp_path)
    path.write_text("x" * 649)
    with pytest.raises(DataError, match=r"of 649 characters is too short; give one of 650"):
        load_data("shakespeare", tmp_path)
    path.write_text("x" * 650)
    assert len(load_data("shakespeare", tmp_path).val) == 65
    load_data.cache_clear()
    path.write_bytes(b"\xff" * 1000)
    with pytest.raises(DataError, match="not a text in UTF-8"):
        load_data("shakespeare", tmp_path)


def test_from_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, revision):
        assert (name, revision) == ("karpathy/tiny_shakespeare", "refs/convert/parquet")
        pieces = {"test": TEXT[1900:], "train": TEXT[:1800], "validation": TEXT[1800:1900]}
        return {split: {"text": [piece]} for split, piece in pieces.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert torch.equal(load_data("shakespeare").val, encode_text(TEXT[1800:]))

    def refuse(name, revision):
        raise ConnectionError("offline")

    load_data.cache_clear()
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"holds shakespeare\.txt, give --data-dir"):
        load_data("shakespeare")


def test_without_the_extra(monkeypatch, shakespeare):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load_data("shakespeare", shakespeare).name
    load_data.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[data\]'"):
        load_data("shakespeare")
