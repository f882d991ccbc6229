"""How every query scores every key in the lightning indexer, before the best are chosen.

    out[s, n] = kv_scale[n] · Σ_h weights[s, h] · ReLU(q[s, h] · kv[n])     start <= n < end
    out[s, n] = -inf                                                       elsewhere

Cut: a program takes some queries with all their heads, which it keeps, over a chunk of the keys,
which it reads tile by tile; head_sums.py has the arithmetic of a tile. Tiles of keys that none of
its queries sees are filled with -inf and not multiplied. No two programs share a sum.

A value takes 2 · H · D operations of the tensor core and 2.5 · H of the other units, which are the
tighter bound for D = 128 unless programs that share a multiprocessor do the one while another does
the other: hence small ones. Keys come from L2; with four queries of 64 heads, every byte of them
takes part in 512 operations.

Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1; DeepGEMM's fp8_mqa_logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..quant.fp8 import as_bits, matrix_operand
from ..runtime import arch
from ..runtime.contract import check_that
from ..runtime.op import op
from .head_sums import Tile, check_queries, head_sums, load_queries, load_weights, tile_for

CHUNK = 2048  # keys of a program


@op(
    q="fp8 [S, H, D]",
    kv="fp8 [Skv, D]",
    kv_scale="fp32 [Skv]",
    weights="fp32 [S, H]",
    starts="int32 [S]",
    ends="int32 [S]",
)
def mqa_logits(
    q: Tensor, kv: Tensor, kv_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor
) -> Tensor:
    """Scores of keys for queries of several heads, summed over the heads with weights.

    Args:
        q: float8_e4m3fn [S, H, D]; its scales belong into `weights`.
        kv: float8_e4m3fn [Skv, D], one key for all heads.
        kv_scale: fp32 [Skv], what a key is multiplied by.
        weights: fp32 [S, H].
        starts, ends: int32 [S]; query s sees the keys n with starts[s] <= n < ends[s]. They are
            clamped to [0, Skv]; a query whose end is not past its start sees none.

    Returns:
        fp32 [S, Skv]: kv_scale[n] * Σ_h weights[s, h] * ReLU(q[s, h] · kv[n]), -inf where a key
        is not seen. Accumulated in fp32 (on Hopper, within 128 of D, as its FP8 tensor core does).

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for starts
            and ends outside [0, Skv].
    """
    check_queries("mqa_logits", q)
    Skv = kv.shape[0]
    check_that("mqa_logits", "kv", Skv <= 2**31 - 2 * CHUNK, "fewer than 2**31 - 4096 keys", Skv)
    return q.new_empty(q.shape[0], Skv, dtype=torch.float32)


@mqa_logits.op.register_tile
def choose_tile(q: Tensor, *_) -> Tile:
    """The tile for these shapes."""
    return tile_for(arch.of(q.device), q.shape[1], q.shape[2], most=128)


@mqa_logits.op.register_launcher("triton")
def _launch_triton(q, kv, kv_scale, weights, starts, ends) -> Tensor:
    out = mqa_logits.op.allocate(q, kv, kv_scale, weights, starts, ends)
    if out.numel() == 0:
        return out
    (S, H, D), Skv = q.shape, kv.shape[0]
    native_fp8 = arch.of(q.device).native_fp8
    t = choose_tile(q)
    blocks = cdiv(S, t.queries)
    mqa_logits_kernel[(blocks * cdiv(Skv, CHUNK),)](
        as_bits(q, native_fp8), as_bits(kv, native_fp8), kv_scale, weights, starts, ends, out,
        S, Skv, H, D if H else 0, blocks, q.stride(0), q.stride(1), kv.stride(0), weights.stride(0),
        KEYS=t.keys, QUERIES=t.queries, HEADS=t.heads, WIDE=t.wide, CHUNK=CHUNK,
        WHOLE=t.heads >= H and t.wide >= D, NATIVE_FP8=native_fp8,
        num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["S", "blocks"])
def mqa_logits_kernel(
    q_ptr, kv_ptr, kv_scale_ptr, weights_ptr, start_ptr, end_ptr, out_ptr,
    S, Skv, H, D, blocks, q_query, q_head, kv_key, weights_query,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    known = query < S
    start = tl.minimum(tl.maximum(tl.load(start_ptr + query, mask=known, other=0), 0), Skv)
    end = tl.minimum(tl.maximum(tl.load(end_ptr + query, mask=known, other=0), 0), Skv)
    # The keys that any of these queries sees, of this program's chunk.
    chunk = tl.program_id(0) // blocks * CHUNK
    chunk_end = tl.minimum(chunk + CHUNK, Skv)
    first = tl.min(tl.where(start < end, start, Skv)) // KEYS * KEYS
    first = tl.minimum(tl.maximum(first, chunk), chunk_end)
    last = tl.minimum(tl.max(tl.where(start < end, end, 0)), chunk_end)

    row = query.to(tl.int64)
    q = q_ptr + row * q_query, known, q_head
    weights = weights_ptr + row * weights_query, known
    held = ()
    if WHOLE:
        values = matrix_operand(load_queries(q, H, D, 0, 0, HEADS, WIDE), NATIVE_FP8)
        held = (values,) + load_weights(weights, H, 0, HEADS)
    out = out_ptr + (row * Skv)[None, :]
    key = tl.arange(0, KEYS)

    fill(out, known, chunk, first, key, Skv)
    for n in range(first, last, KEYS):
        at = (n + key).to(tl.int64)
        kv_row, present = kv_ptr + at * kv_key, n + key < Skv
        scale = tl.load(kv_scale_ptr + at, mask=present, other=0.0)  # on its way while multiplying
        sums = head_sums(kv_row, present, q, weights, held, H, D, HEADS, WIDE, WHOLE, NATIVE_FP8)
        seen = (n + key[:, None] >= start[None, :]) & (n + key[:, None] < end[None, :])
        logits = tl.where(seen, sums * scale[:, None], float("-inf"))  # [KEYS, QUERIES]
        tl.store(out + at[:, None], logits, mask=present[:, None] & known[None, :])
    fill(out, known, first + tl.cdiv(tl.maximum(last - first, 0), KEYS) * KEYS, chunk_end, key, Skv)


@triton.jit
def fill(out, known, begin, end, key, Skv):
    """-inf for whole tiles of keys from `begin` on."""
    for n in range(begin, end, key.shape[0]):
        at = n + key[:, None]
        nothing = tl.full((key.shape[0], known.shape[0]), float("-inf"), tl.float32)
        tl.store(out + at.to(tl.int64), nothing, mask=(at < Skv) & known[None, :])


@mqa_logits.op.register_debug_check
def check_contents(q, kv, kv_scale, weights, starts, ends) -> None:
    Skv = kv.shape[0]
    for name, values in (("starts", starts), ("ends", ends)):
        wrong = values[(values < 0) | (values > Skv)]
        check_that("mqa_logits", name, wrong.numel() == 0,
                   f"values in [0, {Skv}]", wrong[:1].tolist())  # fmt: skip
