from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperadam.kernels import TILE, TileLayout, lay_out
from hyperadam.rule import (
    RULES,
    SCALAR_FIELDS,
    RuleState,
    VariationalHyperAdamRule,
    round_stochastically,
    rounding_words,
)


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_unpacking_undoes_packing(name, count):
    rule = RULES[name]()
    layout = TileLayout.of(rule)
    generator = torch.Generator().manual_seed(0)
    fields = {
        field: torch.randn(count, *width, generator=generator)
        for field, width in layout.widths.items()
    }
    (part,) = lay_out([count])
    tiles = torch.full((part.num_tiles, layout.num_rows, TILE), 7.0)
    layout.pack(fields, tiles)
    again = layout.unpack(tiles, count)
    assert again.keys() == fields.keys()
    for field, value in fields.items():
        assert torch.equal(again[field], value)
    if count % TILE:
        assert (tiles[-1, :, count % TILE :] == 0).all()


def test_the_order_of_rows():
    layout = TileLayout.of(VariationalHyperAdamRule(channels=3, moment_decays=(0.5, 0.9)))
    starts = [rows.start for rows in layout.rows.values()]
    assert starts == [0, 2, 4, 7, 10, 13, 16, 19]
    assert layout.num_rows == 22
    names = [name for name in RuleState.__dataclass_fields__ if name not in SCALAR_FIELDS]
    assert list(layout.rows) == names


def test_a_tile_is_rows_of_coordinates():
    rule = VariationalHyperAdamRule(channels=4)
    layout = TileLayout.of(rule)
    state = rule.init_state(40)
    fields = {name: value.clone() for name, value in state.tensors().items() if name != "step"}
    fields["m_NH"][35, 2] = 5.0
    tiles = torch.zeros(2, layout.num_rows, TILE)
    layout.pack(fields, tiles)
    assert tiles[1, layout.rows["m_NH"].start + 2, 3] == 5.0
    assert tiles.count_nonzero() == 1


def test_parts_begin_at_tiles():
    parts = lay_out([0, 1, 33, 32, 5])
    assert [p.first_tile for p in parts] == [0, 0, 1, 3, 4]
    assert [p.noise_start for p in parts] == [0, 0, 1, 34, 66]
    assert parts[2].tiles == slice(1, 3)
    assert parts[2].lanes == slice(32, 65)


@given(
    st.floats(-(2.0**127), 2.0**127, width=32).filter(lambda x: abs(x) > 1e-30),
    st.integers(0, 2**31),
    st.integers(0, 200),
)
def test_stochastic_rounding_gives_a_neighbour(value, seed, row):
    x = torch.full((64, 1), value)
    rounded = round_stochastically(x, rounding_words(seed, 3, 0, 64), row).float()
    below = (x.view(torch.int32) & -65536).view(torch.float32)
    above = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((rounded == below) | (rounded == above)).all()
    exact = round_stochastically(below, rounding_words(seed, 3, 0, 64), row).float()
    assert torch.equal(exact, below)


def test_stochastic_rounding_keeps_the_mean():
    x = torch.full((200_000, 2), 1.0 + 0.3 / 128)
    rounded = round_stochastically(x, rounding_words(1, 1, 0, len(x)), 5).double()
    up = (rounded > 1).double().mean(dim=0)  # 0.3 of them; std 0.001
    assert ((up - 0.3).abs() < 0.005).all()
    both = ((rounded > 1).sum(dim=1) == 2).double().mean()
    assert abs(both - 0.09) < 0.005  # rows are independent


def test_rounding_words_are_a_stream_of_their_own():
    words = rounding_words(7, 2, 0, 4096)
    assert len(words.unique()) > 4090
    assert not torch.equal(words, rounding_words(7, 3, 0, 4096))
    assert not torch.equal(words, rounding_words(8, 2, 0, 4096))
    assert torch.equal(words[100:], rounding_words(7, 2, 100, 3996))
