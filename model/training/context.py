"""Which tokens of the sequences a rank has, and which keys they see.

With n context ranks a sequence is divided into 2n chunks; rank r has chunks r and 2n - 1 - r, which
together see the same number of keys on every rank:

    n = 2:   rank 0   0 3       keys of chunks 0, 0 1 2 3
             rank 1   1 2       keys of chunks 0 1, 0 1 2

The ranks gather the latent and the rotated part of the keys, R + rope values per token, and not the
keys and values of the heads.  Each expands the rows that its queries see, and attends to them with
two sequences per sequence, one for each chunk.

Source: zigzag order as in context parallelism of Llama 3 (arXiv:2407.21783), section 3.3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.config import Config
from model.rope import pair_factors, rope_cos_sin


class Sequences(NamedTuple):
    """B sequences of S tokens; a rank's tokens of each are one after the other in its T rows.

    positions: int64 [T / B], of this rank's tokens in a sequence.
    order: int64 [B·S], for the tokens in their order their rows of the gathered activations; None
        if the rank has all tokens.
    cos, sin: fp32 [T, 1, rope], factors of the rotary embedding (`pair_factors`).
    cu_seqlens_q, cu_seqlens_k: int32 [n + 1], the first queries and keys of each sequence of the
        attention, B of them or 2·B.
    key_rows: int64 [keys], the rows of the keys in the gathered latents; None as for `order`.
    """

    shape: tuple[int, int]
    positions: Tensor
    order: Tensor | None
    cos: Tensor
    sin: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_rows: Tensor | None = None

    @classmethod
    def make(cls, config: Config, tokens: Tensor, rank: int = 0, ranks: int = 1) -> Sequences:
        """The sequences of tokens [B, S] on one of the context ranks.

        Raises ValueError if S is not a multiple of 2 · ranks, with more ranks than one.
        """
        (B, S), device = tokens.shape, tokens.device
        table = rope_cos_sin(config, S).to(device)[:, None]
        if ranks == 1:
            positions = torch.arange(S, device=device)
            starts = torch.arange(B + 1, dtype=torch.int32, device=device) * S
            cos_sin = pair_factors(table.repeat(B, 1, 1))
            return cls((B, S), positions, None, *cos_sin, starts, starts)
        if S % (2 * ranks):
            raise ValueError(f"tokens: expected a multiple of {2 * ranks} per sequence, got {S}")
        chunk = S // (2 * ranks)
        chunks = torch.arange(S, device=device).view(2 * ranks, chunk)
        by_rank = torch.stack([chunks[:ranks], chunks[ranks:].flip(0)], 1).flatten(
            1
        )  # [ranks, T/B]
        source = by_rank.flatten().argsort()  # [S], for each position: owner · T/B + index there
        owner, index = source // (2 * chunk), source % (2 * chunk)
        sequence = torch.arange(B, device=device)[:, None]
        order = (owner * B + sequence) * 2 * chunk + index  # [B, S]
        ends = [(rank + 1) * chunk, (2 * ranks - rank) * chunk]  # keys that each chunk sees
        key_rows = torch.cat([row[:end] for row in order for end in ends])
        lengths = torch.tensor([0, *ends * B], device=device)
        starts = torch.arange(2 * B + 1, dtype=torch.int32, device=device) * chunk
        positions = by_rank[rank]
        cos_sin = pair_factors(table[positions].repeat(B, 1, 1))
        return cls(
            (B, S), positions, order.flatten(), *cos_sin, starts,
            lengths.cumsum(0, dtype=torch.int32), key_rows,
        )  # fmt: skip
