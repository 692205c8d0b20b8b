"""Strategies for files that are damaged or written to do harm."""

from __future__ import annotations

import copy
import json

from hypothesis import strategies as st

MARK = "<here>"

TOKENS = (
    "NaN",
    "-Infinity",
    "1e999",
    "-1e308",
    "1e-320",
    "9" * 400,
    "9" * 5000,
    "-1",
    "0",
    "1.5",
    "true",
    "null",
    '""',
    '"\\ud800"',
    '"\\u0000\\u001b[2J"',
    '"<script>{}{0}|*`]$\\\\frac$"',
    '"../../etc/passwd"',
    "[]",
    "{}",
    '{"__proto__": {}}',
    "[" * 900 + "]" * 900,
    "[" * 100_000,
    '{"a":' * 100_000,
)
"""Values of JSON, and some that are none, as they stand in a text."""

NUMBERS = st.one_of(
    st.integers(-5, 40), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([2**63, -0.0])
)

LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
LISTS = st.lists(LEAVES, max_size=3)
VALUES = st.one_of(LEAVES, LISTS, st.dictionaries(st.text(max_size=5), LEAVES | LISTS, max_size=3))

RAW = st.one_of(st.sampled_from(TOKENS), VALUES.map(json.dumps))
"""A value as it stands in a text."""


def places(value, path=()):
    """The paths of all values inside one of JSON, its own first."""
    yield path
    if isinstance(value, dict):
        inner = value.items()
    else:
        inner = enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


@st.composite
def changed_json(draw, document):
    """The text of a document in which some values are others, gone, or have company."""
    raws = []
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document))))
        if not path:
            return draw(RAW)
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        kind = draw(st.sampled_from(["other", "other", "gone", "beside"]))
        if kind == "gone":
            del holder[path[-1]]
            continue
        mark = f"{MARK}{len(raws)}"
        raws.append(draw(RAW))
        if kind == "other":
            holder[path[-1]] = mark
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = mark
        else:
            holder.insert(path[-1], mark)
    text = json.dumps(document)
    for number, raw in enumerate(raws):
        text = text.replace(f'"{MARK}{number}"', raw)
    return text


@st.composite
def damaged(draw, content):
    """Bytes cut off, changed, doubled or put in, at one to three places."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(found)))
        size = draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["cut off", "gone", "bit", "bytes", "doubled", "put in"]))
        if kind == "cut off":
            del found[at:]
        elif kind == "gone":
            del found[at : at + size]
        elif kind == "bit" and at < len(found):
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            found[at : at + size] = draw(st.binary(min_size=1, max_size=size))
        elif kind == "doubled":
            found[at:at] = found[at : at + size]
        else:
            found[at:at] = draw(st.binary(min_size=1, max_size=size))
    return bytes(found)


SIZES = st.one_of(
    st.integers(0, 50), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64])
)


def header_size(content):
    return int.from_bytes(content[:8], "little")


@st.composite
def crafted_safetensors(draw, content):
    """A file with a made-up length of its header, or a made-up header before the same numbers."""
    end = 8 + header_size(content)
    header, data = json.loads(content[8:end]), content[end:]
    if draw(st.booleans()):
        length = draw(st.integers(0, 2**64 - 1) | SIZES.filter(lambda size: size < 2**64))
        return length.to_bytes(8, "little") + content[8:]
    for name in draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=2)):
        if name == "__metadata__":
            header[name] = draw(st.dictionaries(st.text(max_size=8), VALUES, max_size=3))
            continue
        kinds = ["F32", "F64", "I8", "BOOL", "BF16", "F8_E4M3", "F4", "C64", "U64", "", "X9"]
        header[name] = {
            "dtype": draw(st.sampled_from(kinds)),
            "shape": draw(st.lists(SIZES | st.just(-1), max_size=4)),
            "data_offsets": draw(st.lists(SIZES, min_size=2, max_size=2))
            if draw(st.booleans())
            else header[name].get("data_offsets"),
        }
    text = draw(changed_json(header)) if draw(st.booleans()) else json.dumps(header)
    raw = text.encode("utf-8", errors="surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data
