"""The latent cache: per layer and token one latent [R] and one rotated key [rope], for all heads.

Sequences share one pool of pages.  `deepkern.mla_cache_append` writes it, and `deepkern.mla_decode`
reads it through a block table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import Config
from model.rope import rotation


@dataclass
class TokenSlots:
    """Cache slots of the new tokens of one forward pass; all layers use the same.

    shape: (B, S).
    positions: int64 [B·S], index of each token in its sequence.
    slots: int64 [B·S], index of each token in the pool, in tokens.
    block_table: int32 [B, P], pages of each sequence.
    cache_seqlens: int32 [B], length of each sequence with the new tokens.
    cos_sin: fp32 [positions, rope], the table of `rope_cos_sin`.
    turn: complex64 [B·S, 1, rope/2], the rotation of each token.
    """

    shape: tuple[int, int]
    positions: Tensor
    slots: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    cos_sin: Tensor
    turn: Tensor


class LatentCache:
    """Latents and rotated keys of `batch` sequences of equal length, up to `capacity` tokens.

    layers: [num_layers, blocks, page, 1, R + rope], the pool of each layer.
    block_table: int32 [batch, P].  Page p of sequence b is block p·batch + b, so pages of one
        sequence are not adjacent.
    length: tokens of each sequence that the cache holds.
    """

    def __init__(
        self,
        config: Config,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page: int = 64,
        num_layers: int | None = None,
    ) -> None:
        pages = max(1, -(-capacity // page))
        num_layers = config.num_hidden_layers if num_layers is None else num_layers
        shape = (num_layers, max(1, batch * pages), page, 1, config.cache_width)
        self.layers = torch.zeros(shape, dtype=dtype, device=device)
        blocks = torch.arange(batch * pages, dtype=torch.int32, device=device)
        self.block_table = blocks.view(pages, batch).T.contiguous()
        self.capacity, self.length = pages * page, 0
        self.positions = torch.arange(self.capacity, device=device)
        pool_blocks = self.block_table[:, self.positions // page].long()
        self.slots = pool_blocks * page + self.positions % page  # int64 [batch, capacity]

    def next_slots(self, batch: int, count: int, cos_sin: Tensor) -> TokenSlots:
        """Slots of the next `count` tokens of every sequence; `cos_sin` as in TokenSlots.

        The cache does not change: the caller adds `count` to `length` when all layers have run.
        """
        start, end = self.length, self.length + count
        size, device = self.block_table.shape[0], self.block_table.device
        if batch != size:
            raise ValueError(f"cache: got a batch of {batch}, expected {size}")
        if end > self.capacity:
            raise ValueError(f"cache: {end} tokens do not fit, it holds {self.capacity}")
        slots = self.slots[:, start:end].flatten().contiguous()
        positions = self.positions[start:end].repeat(batch)
        turn = rotation(cos_sin[start:end]).repeat(batch, 1)[:, None]
        seqlens = torch.full((batch,), end, dtype=torch.int32, device=device)
        return TokenSlots(
            (batch, count), positions, slots, self.block_table, seqlens, cos_sin, turn
        )
