"""Attention over ragged sequences with a key and a value per head: prefill and training.

    score[i, h, j] = softmax_scale * q[i, h] . k[j, h // (H / Hk)]
    out[i, h]      = softmax over the visible j of score . v[j, h // (H / Hk)]

Keys are wider than values (V3: 128 + 64 and 128). A query attends to the keys of its own sequence.
With `causal` both sequences end together, and a query attends to the keys up to its own position.

Parallelization: one program computes BLOCK_M queries of one head. It loops over their visible keys,
BLOCK_N at a time, with an online softmax; scores are never stored. The tiles come from a table
that `ragged_tiles` writes on the device, in each sequence the tile with the most keys first. All
tiles of a head run together, and heads that use the same keys are neighbours, so that keys and
values come from L2. A width of 192 is multiplied as 128 + 64.

Limit: the tensor core, and the exponentials where they do not overlap with it.

Source: FlashAttention-2 (arXiv 2307.08691). The variant with keys and values per head is from
DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import arch
from ..runtime.arch import Arch
from ..runtime.contract import check_that
from ..runtime.op import op
from .ragged import (
    add_dot_split_rows,
    dot_split_rows,
    head_rows,
    load_split_rows,
    program_tile,
    ragged_tiles,
    scale_split_rows,
    select_contiguous_head,
    select_head,
    split_width,
    store_split_rows,
    zero_split_rows,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@op(
    q="real [T, H, Dqk]",
    k="real [Tk, Hk, Dqk]",
    v="real [Tk, Hk, Dv]",
    cu_seqlens_q="int32 [boundaries]",
    cu_seqlens_k="int32 [boundaries]",
)
def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attends the queries of each sequence to its keys and values.

    Args:
        q: bf16, fp16 or fp32 [T, H, Dqk], the sequences packed end to end. Here and below, any
            widths, and any strides with a contiguous last dimension.
        k: [Tk, Hk, Dqk] in q's dtype. H is a multiple of Hk, and head h of q attends to head
            h // (H / Hk) of k and v.
        v: [Tk, Hk, Dv] in q's dtype.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], the first row of each sequence, then the end of
            the last one. Sequence b is q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]], and likewise in
            k and v. Values are clamped to the tensor, then raised to the largest preceding one.
        softmax_scale: multiplies the scores; at least 0.
        causal: query i of Lq attends to the keys j <= i + Lk - Lq of Lk; otherwise to all of them.

    Returns:
        out: [T, H, Dv] in q's dtype; 0 for a query without visible keys or outside all sequences.
        lse: fp32 [H, T], natural log of the sum of exponentials; -inf for such a query.

    Differentiable in q, k and v, from both outputs (`mla_prefill_backward`).

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for
            boundaries out of range or descending.

    Example:
        >>> q, k, v = (torch.randn(100, 16, d).bfloat16() for d in (192, 192, 128))
        >>> cu_seqlens = torch.tensor([0, 60, 100], dtype=torch.int32)
        >>> out, lse = deepkern.mla_prefill(q, k, v, cu_seqlens, cu_seqlens, 192**-0.5)
        >>> out.shape, lse.shape
        (torch.Size([100, 16, 128]), torch.Size([16, 100]))
    """
    check_heads("mla_prefill", q, k, cu_seqlens_q, softmax_scale, v=v)
    (T, H, _), Dv = q.shape, v.shape[2]
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return q.new_empty(T, H, Dv), q.new_empty(H, T, dtype=torch.float32)


def check_heads(
    op: str, q: Tensor, k: Tensor, cu_seqlens: Tensor, softmax_scale: float, **others: Tensor
) -> None:
    """Checks the dtypes of k and `others`, the numbers of heads and rows, and the scale."""
    for argument, tensor in {"k": k, **others}.items():
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {argument}: expected dtype {q.dtype} (that of q), "
                            f"got {tensor.dtype}")  # fmt: skip
    H, Hk = q.shape[1], k.shape[1]
    check_that(op, "k", (H % Hk == 0) if Hk else H == 0,
               f"a number of heads that divides the {H} of q", f"{Hk} heads")  # fmt: skip
    check_that(op, "cu_seqlens_q", cu_seqlens.shape[0] > 0, "B + 1 boundaries, at least one",
               f"shape {tuple(cu_seqlens.shape)}")  # fmt: skip
    check_that(op, "softmax_scale", softmax_scale >= 0, "a number >= 0", softmax_scale)
    for argument, tensor in (("q", q), ("k", k)):
        check_that(op, argument, tensor.shape[0] < 2**30, "fewer than 2**30 rows",
                   f"shape {tuple(tensor.shape)}")  # fmt: skip


class Tile(NamedTuple):
    """The tile of one program, and how it is compiled."""

    rows: int  # queries
    keys: int
    warps: int
    stages: int


@mla_prefill.op.register_tile
def choose_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
) -> Tile:
    """The tile for these widths. It is independent of the numbers of rows and heads."""
    target = arch.of(q.device)
    return fit_tile(_v3_tile(target, q.dtype), target, q.shape[2], v.shape[2])


def fit_tile(tile: Tile, target: Arch, Dqk: int, Dv: int) -> Tile:
    """A tile chosen for the widths 192 and 128, halved until wider heads fit in the same smem.

    One stage on sm_100: Triton 3.7.1 puts the fence.proxy.async of pipelined copies before they
    have completed, so a product could read old bytes (found by tests/compiled).
    """
    rows, keys, warps, stages = tile
    if target.name == "sm_100":
        stages = 1
    budget, width = (rows + keys) * (192 + 128), sum(split_width(Dqk)) + sum(split_width(Dv))
    while max(rows, keys) > 16 and (rows + keys) * width > budget:
        rows, keys = (rows // 2, keys) if rows > keys else (rows, keys // 2)
    return Tile(rows, keys, warps, stages)


def _v3_tile(target: Arch, dtype: torch.dtype) -> Tile:
    """The tile for V3's widths, 192 and 128."""
    if dtype == torch.float32:
        return Tile(16, 32, 4, 1) if target.backend == "cuda" else Tile(32, 32, 8, 1)
    if target.wgmma:
        return Tile(128, 64, 8, 3)  # 128 keys spill
    if target.name == "gfx942":
        return Tile(128, 32, 4, 2)
    if target.backend == "hip":
        return Tile(128, 64, 8, 1)
    return Tile(128, 64 if target.name in ("sm_80", "sm_100") else 32, 8, 2)


@mla_prefill.op.register_launcher("triton")
def _launch_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    args = q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal
    out, lse = mla_prefill.op.allocate(*args)
    if lse.numel() == 0:
        return out, lse
    (T, H, Dqk), (Tk, Hk, Dv) = q.shape, v.shape
    tile = choose_tile(*args)
    tiles = ragged_tiles(cu_seqlens_q, T, cu_seqlens_k, Tk, tile.rows, last_first=causal)
    (D0, D1), (V0, V1) = split_width(Dqk), split_width(Dv)
    mla_prefill_kernel[(len(tiles) * H,)](
        head_rows(q), head_rows(k), head_rows(v), tiles, out, lse,
        softmax_scale * LOG2_E.value, T, H, H // Hk, len(tiles),
        CAUSAL=causal, PRECISION=arch.of(q.device).input_precision,
        BLOCK_M=tile.rows, BLOCK_N=tile.keys, D0=D0, D1=D1, V0=V0, V1=V1,
        EVEN_QK=Dqk == D0 + D1, EVEN_V=Dv == V0 + V1,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["T", "num_tiles"])
def mla_prefill_kernel(
    q,  # HeadRows [T, H, Dqk]
    k,  # HeadRows [Tk, Hk, Dqk]
    v,  # HeadRows [Tk, Hk, Dv]
    tiles_ptr,  # int32 [num_tiles, 4], of ragged_tiles
    out_ptr,  # [T, H, Dv], contiguous
    lse_ptr,  # fp32 [H, T], natural log
    score_scale,  # softmax_scale · log2(e)
    T,
    H,
    group,  # heads of q per head of k and v
    num_tiles,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 products
    BLOCK_M: tl.constexpr,  # queries of the tile
    BLOCK_N: tl.constexpr,  # keys per step
    D0: tl.constexpr,  # Dqk is split into D0 + D1 columns
    D1: tl.constexpr,
    V0: tl.constexpr,  # Dv is split into V0 + V1 columns
    V1: tl.constexpr,
    EVEN_QK: tl.constexpr,  # Dqk is D0 + D1
    EVEN_V: tl.constexpr,  # Dv is V0 + V1
):
    head, tile = program_tile(tiles_ptr, num_tiles)
    if tile.first >= tile.end:
        return
    row = tile.first + tl.arange(0, BLOCK_M)
    row_mask = row < tile.end
    q_tile = load_split_rows(select_head(q, head), row, row_mask, True, EVEN_QK, D0, D1)
    k, v = select_head(k, head // group), select_head(v, head // group)
    keys = visible_keys(row, tile, CAUSAL, BLOCK_M, BLOCK_N)

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_split_rows(BLOCK_M, V0, V1)
    acc, row_max, row_sum = online_softmax(
        acc, row_max, row_sum, q_tile, k, v, keys.begin, keys.full_end, keys, score_scale,
        False, PRECISION, BLOCK_N, D0, D1, V0, V1, EVEN_QK, EVEN_V,
    )  # fmt: skip
    acc, row_max, row_sum = online_softmax(
        acc, row_max, row_sum, q_tile, k, v, keys.full_end, keys.visible_end, keys, score_scale,
        True, PRECISION, BLOCK_N, D0, D1, V0, V1, EVEN_QK, EVEN_V,
    )  # fmt: skip

    out_tile = scale_split_rows(acc, 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None])
    out = select_contiguous_head(out_ptr, H, head, v.width)
    store_split_rows(out, row, row_mask, out_tile, EVEN_V, V0)
    lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(row_sum))
    tl.store(lse_ptr + head * T + row, lse * LN_2, mask=row_mask)


class VisibleKeys(NamedTuple):
    """The keys that a tile of queries attends to."""

    begin: tl.tensor  # first key of the sequence
    end: tl.tensor  # key after the last of the sequence
    full_end: tl.tensor  # every query attends to all keys from begin to here, whole tiles
    visible_end: tl.tensor  # no query attends to keys from here on
    limit: tl.tensor  # [BLOCK_M], each query attends to the keys below its limit


@triton.jit
def visible_keys(
    row,  # [BLOCK_M]
    tile,  # RaggedTile of queries
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The VisibleKeys of the tile."""
    begin, end = tile.other_begin, tile.other_end
    limit = tl.zeros_like(row) + end
    full_end, visible_end = end, end
    if CAUSAL:
        shift = end - tile.end  # both sequences end together
        limit = tl.minimum(row + shift + 1, end)
        full_end = tl.minimum(tile.first + shift + 1, end)
        visible_end = tl.minimum(tile.first + BLOCK_M + shift, end)
    full_end = begin + tl.maximum(full_end - begin, 0) // BLOCK_N * BLOCK_N
    return VisibleKeys(begin, end, full_end, visible_end, limit)


@triton.jit
def online_softmax(
    acc,  # split rows, fp32 [BLOCK_M, Dv]
    row_max,  # [BLOCK_M], of the scaled scores, to base 2
    row_sum,  # [BLOCK_M]
    q_tile,  # split rows [BLOCK_M, Dqk]
    k,  # HeadRows, one head
    v,  # HeadRows, one head
    first_key,
    end_key,
    keys,  # VisibleKeys
    score_scale,  # softmax_scale · log2(e)
    MASKED: tl.constexpr,  # some queries do not attend to some of these keys
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    EVEN_QK: tl.constexpr,
    EVEN_V: tl.constexpr,
):
    """acc, row_max and row_sum after the keys from first_key to end_key."""
    for start in range(first_key, end_key, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_mask = key < keys.end
        k_tile = load_split_rows(k, key, key_mask, MASKED, EVEN_QK, D0, D1)
        v_tile = load_split_rows(v, key, key_mask, MASKED, EVEN_V, V0, V1)
        scores = dot_split_rows(q_tile, k_tile, PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            attn_mask = key[None, :] < keys.limit[:, None]
            scores = tl.where(attn_mask, scores * score_scale, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
        else:
            # score_scale >= 0, so it can multiply the maximum: one FMA per score below.
            new_max = tl.maximum(row_max, tl.max(scores, 1) * score_scale)
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # no key yet: weights are 0
        if MASKED:
            weights = tl.exp2(scores - finite_max[:, None])
        else:
            weights = tl.exp2(scores * score_scale - finite_max[:, None])
        alpha = tl.exp2(row_max - finite_max)
        row_sum = row_sum * alpha + tl.sum(weights, 1)
        row_max = new_max
        acc = scale_split_rows(acc, alpha[:, None])
        acc = add_dot_split_rows(acc, weights.to(v_tile[0].dtype), v_tile, PRECISION)
    return acc, row_max, row_sum


@mla_prefill.op.register_debug_check
def check_contents(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *_
) -> None:
    """For DEEPKERN_DEBUG=1: boundaries ascend and are inside the tensor."""
    for argument, cu_seqlens, limit in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0]),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0]),
    ):
        values = cu_seqlens.tolist()
        valid = values == sorted(values) and all(0 <= value <= limit for value in values)
        check_that("mla_prefill", argument, valid, f"ascending values in [0, {limit}]", values)


@mla_prefill.op.register_limits("cuda")
def unsupported_on_hopper(q, k, v, *_) -> str | None:
    """Why the `cuda` backend (csrc/sm90/mla_prefill.cuh) does not support these, or None."""
    widths = q.shape[2], v.shape[2]
    if q.dtype != torch.bfloat16 or widths != (192, 128):
        return f"it supports bfloat16 of widths 192 and 128, not {q.dtype} of widths {widths}"
    return None
