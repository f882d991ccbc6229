"""Inputs, sizes, cost and baseline of merge_states."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from . import Sizes

BF16 = torch.bfloat16


def inputs(
    generator: Generator,
    lead: tuple[int, ...],
    S: int,
    H: int,
    D: int,
    dtype: torch.dtype = BF16,
    empty: bool = True,
) -> tuple:
    """Two partial results; with `empty`, some queries of each have no key and an output of NaN."""
    states = []
    for _ in range(2):
        out = torch.randn(*lead, S, H, D, generator=generator, device=generator.device).to(dtype)
        lse = torch.randn(*lead, H, S, generator=generator, device=generator.device) * 3
        if empty:
            no_key = torch.rand(lse.shape, generator=generator, device=generator.device) < 0.3
            lse = lse.masked_fill(no_key, -torch.inf)
            out = out.masked_fill(no_key.mT[..., None], torch.nan)
        states += [out, lse]
    return tuple(states)


SIZES = Sizes(
    small=[
        {"lead": (2,), "S": 3, "H": 5, "D": 20},
        {"lead": (), "S": 9, "H": 3, "D": 128, "dtype": torch.float32},
        {"lead": (2, 1), "S": 1, "H": 2, "D": 600, "dtype": torch.float16},
        {"lead": (3,), "S": 0, "H": 4, "D": 16},
        {"lead": (), "S": 2, "H": 2, "D": 0},
    ],
    cpu=[{"lead": (), "S": 512, "H": 16, "D": 128}],
    gpu=[
        {"lead": (128,), "S": 1, "H": 128, "D": 512, "empty": False},
        {"lead": (), "S": 8192, "H": 128, "D": 128, "empty": False},
    ],
    inspect=[
        {"lead": (128,), "S": 1, "H": 128, "D": 512},
        {"lead": (), "S": 8192, "H": 128, "D": 128},
    ],
)
EXACT = False
cost = each_tensor_once


def baseline(out_a, lse_a, out_b, lse_b) -> tuple[Tensor, Tensor]:
    """logaddexp, exp, multiply, add, op by op."""
    lse = torch.logaddexp(lse_a, lse_b)
    finite_lse = lse.masked_fill(lse == -torch.inf, 0)
    out = 0
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = (part_lse - finite_lse).exp().mT[..., None]
        out = out + part.float().masked_fill((part_lse == -torch.inf).mT[..., None], 0) * weight
    return out.to(out_a.dtype), lse
