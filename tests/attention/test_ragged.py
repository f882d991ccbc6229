"""ragged_tiles: the table of tiles, against loops in Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import deepkern
from deepkern.attention.ragged import ragged_tiles


def spans(cu: Tensor, rows: int) -> list[tuple[int, int]]:
    """The rows before the first boundary, between each two, and after the last, ascending."""
    bounds = [0]
    for boundary in (*cu.tolist(), rows):
        bounds.append(max(bounds[-1], min(boundary, rows)))
    return list(zip(bounds, bounds[1:], strict=False))


def expected(cu, rows, other_cu, other_rows, block, last_first) -> list[list[int]]:
    table = []
    own_spans, other_spans = spans(cu, rows), spans(other_cu, other_rows)
    for i, ((first, end), other) in enumerate(zip(own_spans, other_spans, strict=True)):
        attended = other if 0 < i < len(own_spans) - 1 else (0, 0)
        starts = range(first, end, block)
        table += [[row, end, *attended] for row in (reversed(starts) if last_first else starts)]
    return table + [[0, 0, 0, 0]] * (-(-rows // block) + len(own_spans) - 1 - len(table))


@pytest.mark.parametrize(
    ("B", "last_first"),
    [
        (0, True),
        (1, False),
        (7, True),
        (8, False),
        pytest.param(1023, True, marks=pytest.mark.slow),
        pytest.param(1100, False, marks=pytest.mark.slow),
    ],
)
def test_random_boundaries(B, last_first, generator):
    """Sorted or not, in range or not, more than one CHUNK of spans; every row once."""
    device = generator.device
    for low, high, ascending in ((0, 300, True), (-40, 340, False), (-(2**31), 2**31, False)):
        both = torch.randint(low, high, (2, B + 1), generator=generator, device=device)
        both = (both.sort().values if ascending else both).int()
        with deepkern.backend("triton"):
            got = ragged_tiles(both[0], 300, both[1], 250, 16, last_first)
        assert got.tolist() == expected(both[0], 300, both[1], 250, 16, last_first)
        rows = [
            row for first, end, *_ in got.tolist() for row in range(first, min(first + 16, end))
        ]
        assert sorted(rows) == list(range(300))
