"""The pages that hold what attention keeps of every token, and the pages of a few sequences.

A pool has one cache per layer: a latent [R] and a rotated key [rope] of each token, which all heads
use, in the dtype of the model or in FP8.  A model with an indexer (V3.2) keeps its keys as well.
Sequences share the pool; a token's place in it is its slot, page · page_size + offset.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import Segment, TokenBatch, build_batch
from model.config import Config

PAGE = 64  # tokens per page


class LayerCache(NamedTuple):
    """The caches of one layer; shapes as in `CachePool` without the first dimension."""

    latents: Tensor
    index_keys: Tensor | None


class CachePool:
    """Pages for all layers.

    latents: [layers, pages, page_size, 1, R + rope], or uint8
        [layers, pages, page_size, 1, R + 4·⌈R/128⌉ + 2·rope] in FP8.
    index_keys: None, or [layers, pages, page_size, 1, D] in the dtype of the model, or uint8
        [layers, pages, page_size, 1, D + 4] in FP8.
    layers: the caches of each layer.
    """

    def __init__(
        self,
        config: Config,
        pages: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page_size: int = PAGE,
        fp8: bool = False,
        fp8_index: bool = False,
    ) -> None:
        c, self.page_size, self.num_pages = config, page_size, pages
        layers = c.num_hidden_layers + c.num_nextn_predict_layers
        width = c.cache_width
        if fp8:
            width = c.kv_lora_rank + 4 * -(-c.kv_lora_rank // 128) + 2 * c.qk_rope_head_dim
        shape = layers, max(1, pages), page_size, 1
        real, byte = {"dtype": dtype, "device": device}, {"dtype": torch.uint8, "device": device}
        self.latents = torch.zeros(*shape, width, **(byte if fp8 else real))
        self.index_keys = None
        if c.index_topk:
            width = c.index_head_dim + (4 if fp8_index else 0)
            self.index_keys = torch.zeros(*shape, width, **(byte if fp8_index else real))
        keys = [None] * layers if self.index_keys is None else self.index_keys.unbind()
        self.layers = [LayerCache(*pair) for pair in zip(self.latents.unbind(), keys, strict=True)]

    def copy_page(self, source: int, target: int) -> None:
        """Copies one page of every layer."""
        for pool in (self.latents, self.index_keys):
            if pool is not None:
                pool[:, target].copy_(pool[:, source])


class LatentCache:
    """The cache of `batch` sequences of equal length, up to `capacity` tokens each.

    length: tokens of each sequence that the cache holds.
    Page p of sequence b is page p·batch + b of the pool, so pages of a sequence are not adjacent.
    """

    def __init__(self, pool: CachePool, batch: int, capacity: int) -> None:
        self.pool, self.batch, self.length = pool, batch, 0
        pages = -(-capacity // pool.page_size)
        self.capacity = pages * pool.page_size
        self.pages = [[p * batch + b for p in range(pages)] for b in range(batch)]

    def next_batch(self, tokens: Tensor, cos_sin: Tensor) -> TokenBatch:
        """The batch of the next tokens int64 [B, S] of every sequence.

        More than one token attend as tokens of a prompt, one as a generated token.  The cache does
        not change: the caller adds S to `length` when all layers have run.
        """
        batch, count = tokens.shape
        if batch != self.batch:
            raise ValueError(f"cache: got a batch of {batch}, expected {self.batch}")
        stop = self.length + count
        if stop > self.capacity:
            raise ValueError(f"cache: {stop} tokens do not fit, it holds {self.capacity}")
        segments = [Segment(self.length, stop, pages, count > 1) for pages in self.pages]
        return build_batch(tokens.flatten(), segments, self.pool.page_size, cos_sin)
