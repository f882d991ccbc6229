"""Attention of a few new queries per sequence over those tokens of the cache that they name.

DeepSeek-V3.2's decoding: the indexer has chosen the tokens that matter, `topk` of them for every
query, and attention runs over those alone. A token is one key for all heads, and its first R values
are its value too, as in `mla_decode`:

    out = exp(lse) / (exp(lse) + exp(sink)) * softmax over the chosen n of score . cache[n, :R]

The kernel, and how it is cut, is in `sparse.py`: heads are rows, each query's indices are cut into
splits by the query's own length and by H, and the splits are then combined.

Source: DeepSeek-V3.2 (arXiv 2512.02556); meaning of lengths, sinks and indices as in FlashMLA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.contract import check_that
from ..runtime.op import op
from . import sparse
from .cache import check_width


@op(
    q="real [B, Sq, H, W]",
    cache="real|uint8 [blocks, page, 1, _]",
    indices="int32 [B, Sq, topk]",
    topk_length="int32 [B]",
    attn_sink="fp32 [H]",
)
def mla_sparse_decode(
    q: Tensor,
    cache: Tensor,
    indices: Tensor,
    softmax_scale: float,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    v_head_dim: int = 512,
) -> tuple[Tensor, Tensor]:
    """Attends Sq new queries of each sequence to the tokens of the cache that their indices name.

    Args:
        q: bf16, fp16 or fp32 [B, Sq, H, R + D]; the latent part has the key's up-projection
            absorbed. Any H and Sq, any strides but a contiguous last dimension.
        cache: as `mla_cache_append` writes it: [blocks, page, 1, R + D] bf16, fp16 or fp32, or
            the FP8 format uint8 [blocks, page, 1, R + 4 * ceil(R / 128) + 2 * D].
        indices: int32 [B, Sq, topk], flat slots block * page + offset in any order. One outside
            [0, blocks * page) (-1 by convention) names no token; a token counts as often as it is
            named.
        softmax_scale: multiplies the scores.
        topk_length: int32 [B]; only the first so many indices of each query of the sequence count.
            Taken as 0 if negative, as topk if larger.
        attn_sink: fp32 [H], a score that takes part in the softmax and has no value: out is
            multiplied by exp(lse) / (exp(lse) + exp(attn_sink)), and lse is not changed. -inf has
            no effect, +inf gives 0.
        v_head_dim: R, how many of a token's values are its value.

    Returns:
        out: [B, Sq, H, R] in q's dtype; 0 where there is nothing to attend to.
        lse: fp32 [B, H, Sq], natural log of the sum of exponentials; -inf in that case.

    Products as in `mla_decode`. A query's bits depend on its own q, indices and length alone.

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for lengths
            outside [0, topk] and indices outside [-1, blocks * page).
    """
    B, Sq, H, W = q.shape
    check_that("mla_sparse_decode", "v_head_dim", 0 <= v_head_dim <= W,
               f"a part of q's last dimension {W}", v_head_dim)  # fmt: skip
    check_width("mla_sparse_decode", cache, v_head_dim, W - v_head_dim)
    check_that("mla_sparse_decode", "cache", cache.shape[1] * cache.stride(1) < 2**31,
               "pages of fewer than 2**31 elements", f"shape {tuple(cache.shape)}")  # fmt: skip
    out = q.new_empty(B, Sq, H, v_head_dim)
    return out, q.new_empty(B, H, Sq, dtype=torch.float32)


@mla_sparse_decode.op.register_launcher("triton")
def _launch_triton(q, cache, indices, softmax_scale, topk_length, attn_sink, v_head_dim):
    args = q, cache, indices, softmax_scale, topk_length, attn_sink, v_head_dim
    out, lse = mla_sparse_decode.op.allocate(*args)
    sparse.attend(q, cache, indices, softmax_scale, topk_length, attn_sink, out, lse)
    return out, lse


@mla_sparse_decode.op.register_tile
def choose_tile(
    q, cache, indices, softmax_scale, topk_length, attn_sink, v_head_dim
) -> sparse.Tile:
    return sparse.choose_tile(q, cache, v_head_dim)


@mla_sparse_decode.op.register_debug_check
def check_contents(q, cache, indices, softmax_scale, topk_length, *_) -> None:
    slots = cache.shape[0] * cache.shape[1]
    sparse.check_indices("mla_sparse_decode", indices, topk_length, slots)
