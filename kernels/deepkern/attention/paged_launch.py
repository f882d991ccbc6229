"""Tile choice and launch of attention over the paged latent cache.

Used by `mla_decode`, `mla_sparse_decode` and `mla_sparse_prefill`: each has its kernel, which finds
the tokens, and calls `launch` with it. `mla_sparse_prefill_backward` takes its tiles from here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from ..arithmetic import cdiv, next_power_of_2
from ..runtime import arch, backends
from ..runtime.arch import Arch
from .cache import alignment, cache_view, rope_dtype, triton_dtype
from .splits import mla_combine_splits_kernel

LOG2_E = 1.4426950408889634
COMBINE_ROWS = 4  # rows of a program of the combine kernel


class Tile(NamedTuple):
    """The tile of one program, and how its tokens are split."""

    rows: int  # (query, head) pairs: M of the matrix products
    keys: int  # cached tokens per step of the loop
    latents: int  # latents per matrix product; R is processed in blocks of this size
    warps: int
    stages: int
    max_splits: int = 1  # of a sequence (mla_decode) or of a query's indices (sparse ops)
    min_split: int = 1  # tokens of a split, at least


def choose_tile(
    q: Tensor, cache: Tensor, v_head_dim: int, num_rows: int, kind: str, **splits: int
) -> Tile:
    """The tile for `num_rows` rows that attend to the same tokens; `splits` are fields of `Tile`.

    It depends on these widths, dtypes and rows only, never on B: results are independent of the
    batch.
    """
    R, W = v_head_dim, q.shape[-1]
    shape = _tile(arch.of(q.device), dot_dtype(q, cache), cache.dtype, num_rows, kind)
    rows, keys, latents, warps, stages = shape
    latents = max(min(latents, next_power_of_2(max(R, 1))), 16)
    # The table is for V3's 576 values a token. Wider tokens use fewer keys, for the same smem.
    smem_values = keys * 640
    while keys > 16 and keys * W > smem_values:
        keys //= 2
    return Tile(rows, keys, latents, warps, stages, **splits)


def _tile(
    target: Arch, dot: torch.dtype, cached: torch.dtype, num_rows: int, kind: str
) -> tuple[int, int, int, int, int]:
    """(rows, keys, latents, warps, stages) for 512 + 64 values a token.

    kind: "dense", "sparse" or "sparse_backward" (the query kernel of the gradients).
    """
    nvidia, large_smem = target.backend == "cuda", target.smem >= 160 << 10
    if dot == torch.float32:
        return (16, 16, 64, 8, 1) if nvidia else (16, 16, 128, 4, 1)
    if kind == "sparse_backward":
        if not nvidia:
            return (16, 32, 128, 4, 2)
        return (32 if num_rows > 16 and large_smem else 16, 32, 128, 8, 2)  # 64 rows spill
    if not nvidia:
        return (16 if num_rows <= 16 or cached == torch.uint8 else 32, 32, 128, 4, 2)
    fp8, dense = cached == torch.uint8, kind == "dense"
    if num_rows <= 16 or (fp8 and dense and target.name in ("sm_100", "sm_120")):  # 32 rows spill
        return (16, 32 if fp8 else 64, 128, 4, 2)
    if num_rows > 32 and target.wgmma and not (fp8 and dense):  # 64 rows spill
        return (64, 32 if fp8 else 64, 128, 8, 2)  # FP8: 64 keys spill
    return (32, 64 if large_smem else 32, 128, 8, 2)


def dot_dtype(q: Tensor, cache: Tensor) -> torch.dtype:
    """Dtype of both operands of the matrix products: that of q and the cache if equal, or fp32."""
    cached = rope_dtype(cache)
    return cached if q.dtype == cached else torch.float32


def latent_blocks(R: int, W: int, latents: int) -> dict[str, object]:
    """Compile-time widths of kernels that process R latents and W - R RoPE values per row."""
    return {
        "R_BLOCK": latents,
        "NUM_R_BLOCKS": cdiv(R, latents),
        "EVEN_R": R % latents == 0,
        "D_TILE": max(next_power_of_2(W - R), 16),
    }


class QueryView(NamedTuple):
    """q as one kernel argument."""

    ptr: Tensor  # [B, Sq, H, R + D], last dimension contiguous
    sequence_stride: int  # elements from sequence to sequence
    query_stride: int
    head_stride: int


def launch_paged_attention(
    kernel: KernelInterface,
    row_tiles: int,
    tile: Tile,
    q: Tensor,
    cache: Tensor,
    softmax_scale: float,
    lengths: Tensor | None,
    max_length: int,
    attn_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    **arguments: object,
) -> None:
    """Writes out and lse: runs `kernel` on every split, then combines the splits.

    Args:
        kernel: `mla_decode_kernel` or `mla_sparse_attention_kernel`.
        row_tiles: programs per split.
        q, cache, softmax_scale, attn_sink: of the op, q [B, Sq, H, R + D].
        lengths: int32 [B], tokens or indices of each sequence; None: all max_length.
        max_length: upper limit of the lengths; larger lengths are clamped to it.
        out, lse: [B, Sq, H, R] and fp32 [B, H, Sq], both contiguous.
        arguments: what only this kernel has, by name.
    """
    if lse.numel() == 0:
        return
    (B, Sq, H, W), R = q.shape, out.shape[-1]
    num_splits = max(min(cdiv(max_length, tile.min_split), tile.max_splits), 1)
    partial = partial_lse = None
    if num_splits > 1:
        partial = q.new_empty(B, num_splits, Sq * H, R, dtype=torch.float32)
        partial_lse = q.new_empty(B, num_splits, Sq * H, dtype=torch.float32)
    target, dot = arch.of(q.device), dot_dtype(q, cache)
    fp8 = cache.dtype == torch.uint8
    view = cache_view(cache, R, torch.float8_e4m3fn if target.native_fp8 else torch.int32)
    splits = {"KEYS": tile.keys, "MIN_SPLIT": tile.min_split, "MAX_SPLITS": tile.max_splits}
    kernel[(row_tiles, num_splits)](
        QueryView(q, *q.stride()[:3]), view, lengths, out, lse, partial, partial_lse,
        softmax_scale * LOG2_E, Sq, H, R, W - R, max_length, cache.shape[1], **arguments,
        FP8=fp8, HALF=fp8 and dot == torch.bfloat16 and R > 0,
        ASM=target.backend == "cuda" and not backends.interpreting(),
        BRANCH=target.wgmma and tile.rows >= 64,
        DOT_DTYPE=triton_dtype(dot), ROPE_DTYPE=triton_dtype(rope_dtype(cache)),
        PRECISION=target.input_precision,
        LATENT_ALIGN=alignment(view.latent), ROPE_ALIGN=alignment(view.rope),
        ROWS=tile.rows, **latent_blocks(R, W, tile.latents), **splits,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if num_splits > 1:
        mla_combine_splits_kernel[(B * cdiv(Sq * H, COMBINE_ROWS),)](
            partial, partial_lse, lengths, attn_sink, out, lse, Sq, H, R, max_length, num_splits,
            ROWS=COMBINE_ROWS, R_TILE=max(next_power_of_2(R), 1), **splits, num_warps=4,
        )  # fmt: skip
