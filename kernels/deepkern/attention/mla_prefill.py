"""Attention over sequences of different lengths with a key and a value per head: prefill, training.

    score[i, h, j] = softmax_scale * q[i, h] . k[j, h // (H / Hk)]
    out[i, h]      = softmax over the seen j of score . v[j, h // (H / Hk)]

Keys are wider than values (V3: 128 + 64 and 128). A query sees the keys of its own sequence, and if
causal only those at or before it, both sequences ending together.

Cut: a program takes BLOCK_M queries of one head and goes over the keys they see, BLOCK_N at a time,
with a running maximum and sum; scores never reach memory. Tiles come from a table that `cut` makes
on the device, in each sequence the one with the most keys first. All tiles of a head run together,
and the heads that share keys follow one another, so that keys and values come from L2.
A width of 192 is multiplied as 128 + 64. The speed is that of the matrix units, as far as they are
not kept waiting for exponentials.

Source: FlashAttention-2 (arXiv 2307.08691); the form with keys and values per head is that of
DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import arch
from ..runtime.contract import check_that
from ..runtime.op import op
from .ragged import (
    add_products,
    cut,
    dot_parts,
    load_parts,
    parts,
    scaled_parts,
    store_parts,
    tile_at,
    zero_parts,
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
        q: bf16, fp16 or fp32 [T, H, Dqk], the sequences one after the other. Any widths, any
            strides but a contiguous last dimension, here and below.
        k: [Tk, Hk, Dqk] in q's dtype; H is a multiple of Hk, and head h of q meets head
            h // (H / Hk) of k and v.
        v: [Tk, Hk, Dv] in q's dtype.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], the rows at which sequences begin and the last
            one ends: b has q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]] and likewise k and v. Values
            are clamped to the tensor, and then to no less than those before them.
        softmax_scale: multiplies the scores; at least 0.
        causal: query i of Lq sees keys j <= i + Lk - Lq of Lk; otherwise all of them.

    Returns:
        out: [T, H, Dv] in q's dtype; 0 for a query that sees no key or is in no sequence.
        lse: fp32 [H, T], natural log of the sum of exponentials; -inf in that case.

    Differentiable in q, k and v, from both outputs (`mla_prefill_backward`).

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for
            boundaries out of range or descending.
    """
    check_heads("mla_prefill", q, k, cu_seqlens_q, softmax_scale, v=v)
    (T, H, _), Dv = q.shape, v.shape[2]
    return q.new_empty(T, H, Dv), q.new_empty(H, T, dtype=torch.float32)


def check_heads(name: str, q: Tensor, k: Tensor, cu: Tensor, scale: float, **others) -> None:
    for argument, tensor in {"k": k, **others}.items():
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: {argument}: expected dtype {q.dtype} (that of q), "
                            f"got {tensor.dtype}")  # fmt: skip
    H, Hk = q.shape[1], k.shape[1]
    check_that(name, "k", (H % Hk == 0) if Hk else H == 0,
               f"heads of which the {H} of q are a multiple", f"{Hk} heads")  # fmt: skip
    check_that(name, "cu_seqlens_q", cu.shape[0] > 0, "B + 1 boundaries, at least one", "none")
    check_that(name, "softmax_scale", scale >= 0, "a number >= 0", scale)
    for argument, tensor in (("q", q), ("k", k)):
        check_that(name, argument, tensor.shape[0] < 2**30, "fewer than 2**30 rows",
                   f"shape {tuple(tensor.shape)}")  # fmt: skip


class Tile(NamedTuple):
    """How a launch is cut: queries and keys of a tile, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


@mla_prefill.op.register_tile
def choose_tile(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal) -> Tile:
    """The tile for these widths; how many rows and heads there are does not enter."""
    return fitted(_tile(arch.of(q.device), q.dtype), q.shape[2], v.shape[2])


def fitted(made: tuple[int, ...], Dqk: int, Dv: int) -> Tile:
    """A tile made for V3's widths, smaller where wider heads would take more room."""
    rows, keys, warps, stages = made
    room, width = (rows + keys) * (192 + 128), sum(parts(Dqk)) + sum(parts(Dv))
    while max(rows, keys) > 16 and (rows + keys) * width > room:
        rows, keys = (rows // 2, keys) if rows > keys else (rows, keys // 2)
    return Tile(rows, keys, warps, stages)


def _tile(target, dtype: torch.dtype) -> tuple[int, ...]:
    """(rows, keys, warps, stages), made for widths of 192 and 128."""
    if dtype == torch.float32:
        return (16, 32, 4, 1) if target.backend == "cuda" else (32, 32, 8, 1)
    if target.wgmma:
        return (128, 64, 8, 3)  # 128 keys spill
    if target.name == "gfx942":
        return (128, 32, 4, 2)
    if target.backend == "hip":
        return (128, 64, 8, 1)
    return (128, 64 if target.name in ("sm_80", "sm_100") else 32, 8, 2)


def precision(target) -> str:
    """How fp32 operands are multiplied: exactly, as far as the target can."""
    return "tf32x3" if target.backend == "cuda" else "ieee"


@mla_prefill.op.register_launcher("triton")
def _launch_triton(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal):
    args = q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal
    out, lse = mla_prefill.op.allocate(*args)
    if lse.numel() == 0:
        return out, lse
    (T, H, Dqk), (Tk, Hk, Dv) = q.shape, v.shape
    t = choose_tile(*args)
    tiles = cut(cu_seqlens_q, T, cu_seqlens_k, Tk, t.rows, last_first=causal)
    (D0, D1), (V0, V1) = parts(Dqk), parts(Dv)
    mla_prefill_kernel[(tiles.shape[0] * H,)](
        q, k, v, tiles, out, lse, softmax_scale * LOG2_E.value, T, H, H // Hk, tiles.shape[0],
        Dqk, Dv, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        CAUSAL=causal, PRECISION=precision(arch.of(q.device)), BLOCK_M=t.rows, BLOCK_N=t.keys,
        D0=D0, D1=D1, V0=V0, V1=V1, EVEN_QK=Dqk == D0 + D1, EVEN_V=Dv == V0 + V1,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["T", "tiles"])
def mla_prefill_kernel(
    q_ptr, k_ptr, v_ptr, tiles_ptr, out_ptr, lse_ptr, score_scale, T, H, group, tiles, Dqk, Dv,
    q_row, q_head, k_row, k_head, v_row, v_head,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    EVEN_QK: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first, end, k_begin, k_end = tile_at(tiles_ptr, tl.program_id(0) % tiles)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    known = row < end
    q = load_parts(q_ptr + head * q_head, row, q_row, known, Dqk, True, EVEN_QK, D0, D1)
    k_ptr += head // group * k_head
    v_ptr += head // group * v_head
    limit, full, stop = visible_keys(row, first, end, k_begin, k_end, CAUSAL, BLOCK_M, BLOCK_N)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_parts(BLOCK_M, V0, V1)
    acc, top, total = attend(
        acc, top, total, q, k_ptr, v_ptr, k_begin, full, limit, k_end, score_scale,
        k_row, v_row, Dqk, Dv, False, PRECISION, BLOCK_N, D0, D1, V0, V1, EVEN_QK, EVEN_V,
    )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, q, k_ptr, v_ptr, full, stop, limit, k_end, score_scale,
        k_row, v_row, Dqk, Dv, True, PRECISION, BLOCK_N, D0, D1, V0, V1, EVEN_QK, EVEN_V,
    )  # fmt: skip

    out = scaled_parts(acc, 1.0 / tl.where(total == 0.0, 1.0, total)[:, None])
    store_parts(out_ptr + head * Dv, row, H * Dv, known, Dv, out, EVEN_V, V0)
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
    tl.store(lse_ptr + head * T + row, lse * LN_2, mask=known)


@triton.jit
def visible_keys(
    row, first, end, k_begin, k_end,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each row sees the keys before its limit [M]; all do those before `full`, none from `stop` on.

    `full` is whole tiles of keys from k_begin on.
    """
    limit = tl.zeros_like(row) + k_end
    full, stop = k_end, k_end
    if CAUSAL:
        shift = k_end - end  # both sequences end together
        limit = tl.minimum(row + shift + 1, k_end)
        full = tl.minimum(first + shift + 1, k_end)
        stop = tl.minimum(first + BLOCK_M + shift, k_end)
    full = k_begin + tl.maximum(full - k_begin, 0) // BLOCK_N * BLOCK_N
    return limit, full, stop


@triton.jit
def attend(
    acc, top, total, q, k_ptr, v_ptr, begin, end, limit, k_end, score_scale, k_row, v_row, Dqk, Dv,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    EVEN_QK: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    """Takes the keys from `begin` to `end` into acc, top and total [M] of the rows of q."""
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        present = key < k_end
        k = load_parts(k_ptr, key, k_row, present, Dqk, MASKED, EVEN_QK, D0, D1)
        v = load_parts(v_ptr, key, v_row, present, Dv, MASKED, EVEN_V, V0, V1)
        scores = dot_parts(q, k, PRECISION)  # [M, N]
        if MASKED:
            seen = key[None, :] < limit[:, None]
            scores = tl.where(seen, scores * score_scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
        else:
            # A scale that is not negative may wait until after the maximum: one FMA a score.
            new_top = tl.maximum(top, tl.max(scores, 1) * score_scale)
        zero = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: weights are 0
        if MASKED:
            weights = tl.exp2(scores - zero[:, None])
        else:
            weights = tl.exp2(scores * score_scale - zero[:, None])
        shrink = tl.exp2(top - zero)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
        acc = scaled_parts(acc, shrink[:, None])
        acc = add_products(acc, weights.to(v[0].dtype), v, PRECISION)
    return acc, top, total


@mla_prefill.op.register_debug_check
def check_contents(q, k, v, cu_seqlens_q, cu_seqlens_k, *_) -> None:
    """For DEEPKERN_DEBUG=1: boundaries ascend and stay in the tensor."""
    for argument, cu, limit in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0]),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0]),
    ):
        found = cu.tolist()
        fits = found == sorted(found) and all(0 <= o <= limit for o in found)
        check_that("mla_prefill", argument, fits, f"ascending values in [0, {limit}]", found)
