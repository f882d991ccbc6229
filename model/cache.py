"""The paged latent cache: per layer and token one latent and one rotated key, for all heads.

Pages of different sequences share one pool and are found through a block table, the layout that
`deepkern.mla_cache_append` writes and `deepkern.mla_decode` reads.  Neighbouring pages of one
sequence are not neighbours in the pool (page p of sequence b is block p·B + b).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import Config


@dataclass
class Step:
    """Where the tokens of one forward pass stand: shared by its layers.

    shape is (B, S); positions and slots are int64 [B·S] (place in the sequence, flat place in the
    pool); `lengths` int32 [B] counts the new tokens in.
    """

    shape: tuple[int, int]
    positions: Tensor
    slots: Tensor
    block_table: Tensor
    lengths: Tensor


class LatentCache:
    """Room for `capacity` tokens of each of `batch` sequences, which all grow in step."""

    def __init__(
        self,
        config: Config,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page: int = 64,
        layers: int | None = None,
    ) -> None:
        pages = max(1, -(-capacity // page))
        layers = config.num_hidden_layers if layers is None else layers
        shape = (layers, max(1, batch * pages), page, 1, config.cache_width)
        self.layers = torch.zeros(shape, dtype=dtype, device=device)
        table = torch.arange(batch * pages, dtype=torch.int32, device=device)
        self.block_table = table.view(pages, batch).T.contiguous()  # [B, P]
        self.page, self.capacity, self.length = page, pages * page, 0

    def reserve(self, count: int) -> Step:
        """Places for the next `count` tokens of every sequence."""
        start, end = self.length, self.length + count
        if end > self.capacity:
            raise ValueError(f"cache: {end} tokens do not fit, it holds {self.capacity}")
        batch, device = self.block_table.shape[0], self.block_table.device
        position = torch.arange(start, end, device=device)
        block = self.block_table[:, position // self.page].long()  # [B, S]
        slots = (block * self.page + position % self.page).flatten()
        lengths = torch.full((batch,), end, dtype=torch.int32, device=device)
        self.length = end
        return Step((batch, count), position.repeat(batch), slots, self.block_table, lengths)
