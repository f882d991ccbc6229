"""csrc/sm90/mla_decode.cuh in the emulator against float64, over ragged lengths and any page."""

from __future__ import annotations

import pytest
import torch

import deepkern
from bench.emulator import ORDERS
from deepkern.testing import compare, inputs
from deepkern.testing.inputs.attention import ABSENT

LENGTHS = (0, 1, 63, 64, 65, 130)


def check(emulated_mla, args: tuple, **how) -> tuple[torch.Tensor, torch.Tensor]:
    got, want = emulated_mla(*args, **how), deepkern.reference.mla_decode(*args)
    for mine, exact, name in zip(got, want, ("out", "lse"), strict=True):
        compare.assert_close(mine, exact, f"{name} {how}")
    return got


def operands(generator, **size) -> tuple:
    return deepkern.OPS["mla_decode"].positional(inputs.make("mla_decode", generator, **size))


def assert_same(got: tuple, want: tuple, label: str = "result") -> None:
    for mine, other, name in zip(got, want, ("out", "lse"), strict=True):
        compare.assert_bitwise(mine, other, f"{name} {label}")


@pytest.mark.parametrize("Sq", [1, 2, 4])
@pytest.mark.parametrize("H", [1, 3, 16, 64, 128])
def test_heads_and_queries(emulated_mla, H, Sq, generator):
    """Every length, half of a tile's rows or several tiles, causal and not."""
    for causal in (True, False):
        args = operands(generator, lengths=LENGTHS, Sq=Sq, H=H, causal=causal)
        check(emulated_mla, args, seed=generator.seed())


@pytest.mark.parametrize("page", [1, 16, 53, 64, 128])
def test_pages_and_splits(emulated_mla, page, generator):
    """700 tokens are two splits, 1100 three, and one split has no sums to add."""
    args = operands(generator, lengths=(700, *LENGTHS, 1100, 512), Sq=2, H=3, page=page)
    got = check(emulated_mla, args)
    assert_same(emulated_mla(*args, by_tma=False), got)


def test_splits_of_many_rows(emulated_mla, generator):
    """Splits of more than 32 rows are 1024 tokens long."""
    check(emulated_mla, operands(generator, lengths=(1100, 1024), H=80))


@pytest.mark.slow
def test_more_tokens_than_64_splits_of_512_hold(emulated_mla, generator):
    check(emulated_mla, operands(generator, lengths=(33000, 32768), H=2))


@pytest.mark.parametrize("order", ORDERS)
def test_any_schedule_gives_the_same_bits(emulated_mla, order, generator):
    args = operands(generator, lengths=(200, 530), Sq=2, H=3)
    first = check(emulated_mla, args, order=order, seed=0)
    for seed in range(1, 50 if order == "random" else 5):
        got = emulated_mla(*args, order=order, seed=seed)
        assert_same(got, first, f"seed {seed}")


def test_bits_do_not_depend_on_the_batch_the_table_or_the_rows(emulated_mla, generator):
    q, cache, table, lengths, *rest = operands(generator, lengths=(1100, 130, 65), Sq=2, H=40)
    out, lse = emulated_mla(q, cache, table, lengths, *rest)
    for i in range(3):
        one = slice(i, i + 1)
        wide = torch.full((1, 60), ABSENT, dtype=torch.int32)
        wide[:, : table.shape[1]] = table[one]
        got = emulated_mla(q[one], cache, wide, lengths[one], *rest)
        assert_same(got, (out[one], lse[one]), f"sequence {i}")
    # A part of the heads, in other rows of a tile.
    few = emulated_mla(q[:, :, 7:24], cache, table, lengths, *rest)
    assert_same(few, (out[:, :, 7:24], lse[:, 7:24]))


@pytest.mark.parametrize("page", [16, 64])
def test_hostile_tables_and_lengths(emulated_mla, page, generator):
    """Pages that do not exist are absent, lengths are clamped, and NaN stays where it is."""
    q, cache, table, lengths, *rest = operands(
        generator, lengths=(200, 200, 200, 200, 200), Sq=2, H=3, page=page
    )
    table[0] = torch.tensor([-1, len(cache), 2**31 - 1, -(2**31)]).repeat(table.shape[1])[
        : table.shape[1]
    ]
    table[1, 1], table[2, 0], table[3, -1] = -1, len(cache), ABSENT
    args = q, cache, table, lengths, *rest
    out, lse = check(emulated_mla, args)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    for hostile in ([-1, -(2**31), 0, 1, 200], [2, 3, 64, 65, 199]):
        check(emulated_mla, (*args[:3], torch.tensor(hostile, dtype=torch.int32), *rest))
    filled = torch.where(cache.isnan(), 0.5, cache)
    most = torch.full((5,), 2**31 - 1, dtype=torch.int32)
    check(emulated_mla, (q, filled, table, most, *rest))


def test_strides_and_no_tokens(emulated_mla, generator):
    """Heads and queries may lie in any order; a table of no pages, a cache of no blocks."""
    q, cache, table, lengths, *rest = operands(generator, lengths=(70, 9), Sq=2, H=5)
    turned = q.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    got = check(emulated_mla, (turned, cache, table, lengths, *rest))
    assert_same(got, emulated_mla(q, cache, table, lengths, *rest))
    for no_cache, no_table in ((cache, table[:, :0]), (cache[:0], table)):
        out, lse = emulated_mla(q, no_cache, no_table, lengths, *rest)
        assert (out == 0).all() and (lse == -torch.inf).all()


def test_scores_of_any_size(emulated_mla, generator):
    """One token that outweighs all others, and scores far below zero."""
    q, cache, table, lengths, _, *rest = operands(generator, lengths=(130, 65), H=3)
    for scale in (0.0, -3.0, 20.0):
        check(emulated_mla, (q, cache, table, lengths, scale, *rest))
    q[0, 0, 1] = torch.nan
    out, lse = emulated_mla(q, cache, table, lengths, 0.04, *rest)
    assert out[0, 0, 1].isnan().all() and lse[0, 1, 0].isnan()
    assert not out[0, 0, ::2].isnan().any() and not out[1].isnan().any()
