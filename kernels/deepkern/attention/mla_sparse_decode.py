"""Attention of a few new queries per sequence over the cached tokens that their indices select.

DeepSeek-V3.2's decoding: the indexer selects `topk` tokens for each query, and attention runs over
these only. A token is one key for all heads, and its first R values are its value too, as in
`mla_decode`:

    out = exp(lse) / (exp(lse) + exp(sink)) * softmax over the selected n of score . cache[n, :R]

Parallelization, kernel and limit of the speed: see sparse.py. Heads are the rows of a tile; a
query's indices are divided into splits, whose results are then combined.

Source: DeepSeek-V3.2 (arXiv 2512.02556); meaning of lengths, sinks and indices as in FlashMLA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.op import op
from . import sparse
from .cache import check_decode, check_page_size, unsupported_on_hopper
from .paged_launch import Tile


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
    """Attends Sq new queries of each sequence to the cached tokens that their indices select.

        out, lse = deepkern.mla_sparse_decode(q, cache, indices, 576**-0.5, attn_sink=attn_sink)

    Args:
        q: bf16, fp16 or fp32 [B, Sq, H, R + D]; the key's up-projection is absorbed into the first
            R values. Any H and Sq; any strides, except that the last dimension is contiguous.
        cache: as `mla_cache_append` writes it: [blocks, page, 1, R + D] bf16, fp16 or fp32, or
            the FP8 format uint8 [blocks, page, 1, R + 4 * ceil(R / 128) + 2 * D].
        indices: int32 [B, Sq, topk], flat slots block * page + offset in any order. An index
            outside [0, blocks * page) is ignored (use -1). A token counts once per occurrence.
        softmax_scale: multiplies the scores.
        topk_length: int32 [B], the number of leading indices that count for each query of the
            sequence; clamped to [0, topk]. None: all.
        attn_sink: fp32 [H], a score in the softmax that has no value: out is multiplied by
            exp(lse) / (exp(lse) + exp(attn_sink)), and lse does not change. -inf has no effect,
            +inf gives 0.
        v_head_dim: R, the number of leading values of a token that are its value.

    Returns:
        out: [B, Sq, H, R] in q's dtype; 0 for a query without tokens.
        lse: fp32 [B, H, Sq], natural log of the sum of exponentials; -inf for such a query.

    Dtypes of sums and matrix products as in `mla_decode`. A query's result depends bitwise on its
    own q, indices and length only.

    Raises:
        TypeError, ValueError: an argument does not match the above; with DEEPKERN_DEBUG=1 also for
            lengths outside [0, topk] and indices outside [-1, blocks * page).
    """
    B, Sq, H, _ = q.shape
    check_decode("mla_sparse_decode", q, cache, v_head_dim)
    check_page_size("mla_sparse_decode", cache)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    out = q.new_empty(B, Sq, H, v_head_dim)
    return out, q.new_empty(B, H, Sq, dtype=torch.float32)


@mla_sparse_decode.op.register_tile
def choose_tile(q, cache, indices, softmax_scale, topk_length, attn_sink, v_head_dim) -> Tile:
    """The tile for these widths and H heads; independent of the number of queries."""
    return sparse.choose_tile(q, cache, v_head_dim, sparse.MAX_SPLITS)


@mla_sparse_decode.op.register_launcher("triton")
def _launch_triton(q, cache, indices, softmax_scale, topk_length, attn_sink, v_head_dim):
    args = q, cache, indices, softmax_scale, topk_length, attn_sink, v_head_dim
    out, lse = mla_sparse_decode.op.allocate(*args)
    sparse.launch_sparse_attention(
        q, cache, indices, softmax_scale, topk_length, attn_sink, out, lse, None, choose_tile(*args)
    )
    return out, lse


@mla_sparse_decode.op.register_limits("cuda")
def _unsupported_on_hopper(q, cache, indices, softmax_scale, topk_length, attn_sink, v_head_dim):
    return unsupported_on_hopper(q, cache, v_head_dim)


@mla_sparse_decode.op.register_debug_check
def check_contents(q, cache, indices, softmax_scale, topk_length, *_) -> None:
    num_slots = cache.shape[0] * cache.shape[1]
    sparse.check_indices("mla_sparse_decode", indices, topk_length, num_slots)
