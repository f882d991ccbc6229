"""The gradients of `mla_prefill`, without atomics: the same bits every time.

With P = exp(score - lse), recomputed, and delta[i] = grad_out[i] . out[i] - grad_lse[i]:

    dS     = P * (grad_out . v^T - delta)
    grad_q = softmax_scale * dS . k
    grad_k = softmax_scale * dS^T . q
    grad_v = P^T . grad_out

Parallelization: three kernels. `mla_prefill_backward_delta_kernel` computes delta. In
`mla_prefill_backward_dkv_kernel` one program computes a tile of keys of one head of k and v. It
loops over the queries that attend to them, and over the heads of q that use them, in a fixed order.
In `mla_prefill_backward_dq_kernel` one program computes a tile of queries and loops over their
keys. Both recompute the scores and dS: 7 products per pair of query and key instead of 5. In
return the order of every sum is fixed, and no partial sums are stored.

Limit: the tensor core.

Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.2, with separate kernels for dq and dkv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..runtime import arch
from ..runtime.arch import Arch
from ..runtime.op import op
from .mla_prefill import (
    LOG2_E,
    Tile,
    check_heads,
    fit_tile,
    mla_prefill,
    unsupported_on_hopper,
)
from .mla_prefill_gradients import mla_prefill_backward_dkv_kernel, mla_prefill_backward_dq_kernel
from .ragged import head_rows, ragged_tiles, select_head, split_width


@op(
    grad_out="real [T, H, Dv]",
    q="real [T, H, Dqk]",
    k="real [Tk, Hk, Dqk]",
    v="real [Tk, Hk, Dv]",
    out="real [T, H, Dv]",
    lse="fp32 [H, T]",
    cu_seqlens_q="int32 [boundaries]",
    cu_seqlens_k="int32 [boundaries]",
    grad_lse="fp32 [H, T]",
)
def mla_prefill_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool = True,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `mla_prefill` with respect to q, k and v.

    Args:
        grad_out: [T, H, Dv] in q's dtype, the gradient of `out`.
        q, k, v: as in the forward pass.
        out, lse: the results of the forward pass.
        cu_seqlens_q, cu_seqlens_k, softmax_scale, causal: as in the forward pass.
        grad_lse: fp32 [H, T], the gradient of `lse`, or None for zeros. It is ignored where lse is
            -inf.

    Returns:
        grad_q [T, H, Dqk], grad_k [Tk, Hk, Dqk], grad_v [Tk, Hk, Dv], in q's dtype. Rows of
        queries without keys, and of keys without queries, are 0. Summed in fp32 in a fixed order.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> q, k, v = (torch.randn(100, 16, d).bfloat16() for d in (192, 192, 128))
        >>> cu_seqlens = torch.tensor([0, 60, 100], dtype=torch.int32)
        >>> args = cu_seqlens, cu_seqlens, 192**-0.5, True
        >>> out, lse = deepkern.mla_prefill(q, k, v, *args)
        >>> grads = deepkern.mla_prefill_backward(torch.ones_like(out), q, k, v, out, lse, *args)
        >>> [grad.shape[2] for grad in grads]
        [192, 192, 128]
    """
    name = "mla_prefill_backward"
    check_heads(name, q, k, cu_seqlens_q, softmax_scale, v=v, grad_out=grad_out, out=out)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def choose_tile(q: Tensor, v: Tensor) -> tuple[Tile, Tile]:
    """The tiles of the dkv and the dq kernel. They are independent of the numbers of rows, heads.

    In the dkv kernel one program computes `keys` keys and loops over queries, `rows` at a time. In
    the dq kernel one program computes `rows` queries and loops over keys, `keys` at a time.
    """
    target, Dqk, Dv = arch.of(q.device), q.shape[2], v.shape[2]
    return (
        fit_tile(_v3_dkv_tile(target, q.dtype), target, Dqk, Dv),
        fit_tile(_v3_dq_tile(target, q.dtype), target, Dqk, Dv),
    )


def _v3_dkv_tile(target: Arch, dtype: torch.dtype) -> Tile:
    """The tile for V3's widths. A key has 320 fp32 sums in registers, which leaves few for rows."""
    if dtype == torch.float32:
        return Tile(16, 16, 8, 1)
    if target.backend == "hip":
        return Tile(16, 128, 8, 1)
    return Tile(32, 128, 8, 2) if target.name in ("sm_90", "sm_100") else Tile(32, 32, 4, 2)


def _v3_dq_tile(target: Arch, dtype: torch.dtype) -> Tile:
    """The tile for V3's widths, 192 and 128."""
    if dtype == torch.float32:
        return Tile(16, 16, 8, 1)
    if target.backend == "hip":
        return Tile(128, 32, 8, 1)
    return Tile(128, 64 if target.name in ("sm_90", "sm_100") else 16, 8, 2)


@mla_prefill_backward.op.register_launcher("triton")
def _launch_triton(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = mla_prefill_backward.op.allocate(
        grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, grad_lse
    )
    (T, H, Dqk), (Tk, Hk, Dv) = q.shape, v.shape
    (D0, D1), (V0, V1) = split_width(Dqk), split_width(Dv)
    delta = _compute_delta(grad_out, out, lse, grad_lse)
    dkv_tile, dq_tile = choose_tile(q, v)
    key_tiles = ragged_tiles(cu_seqlens_k, Tk, cu_seqlens_q, T, dkv_tile.keys, last_first=False)
    query_tiles = ragged_tiles(cu_seqlens_q, T, cu_seqlens_k, Tk, dq_tile.rows, last_first=causal)
    inputs = *(head_rows(x) for x in (grad_out, q, k, v)), lse, delta
    for kernel, tile, tiles, heads, outputs in (
        (mla_prefill_backward_dkv_kernel, dkv_tile, key_tiles, Hk, (grad_k, grad_v)),
        (mla_prefill_backward_dq_kernel, dq_tile, query_tiles, H, (grad_q,)),
    ):
        if heads:
            kernel[(len(tiles) * heads,)](
                *inputs, tiles, *outputs, softmax_scale * LOG2_E.value, softmax_scale,
                T, heads, H // Hk, len(tiles), lse.stride(0),
                CAUSAL=causal, PRECISION=arch.of(q.device).input_precision,
                BLOCK_M=tile.rows, BLOCK_N=tile.keys, D0=D0, D1=D1, V0=V0, V1=V1,
                EVEN_QK=Dqk == D0 + D1, EVEN_V=Dv == V0 + V1,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return grad_q, grad_k, grad_v


def _compute_delta(grad_out: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """rowsum(grad_out * out) - grad_lse: fp32 [H, T], contiguous."""
    T, H, Dv = out.shape
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    if delta.numel():
        grad_lse_head_stride = 0 if grad_lse is None else grad_lse.stride(0)
        mla_prefill_backward_delta_kernel[(cdiv(T, 32) * H,)](
            head_rows(grad_out), head_rows(out), lse, grad_lse, delta,
            T, H, lse.stride(0), grad_lse_head_stride,
            ROWS=32, V_TILE=next_power_of_2(max(Dv, 1)), num_warps=4,
        )  # fmt: skip
    return delta


@triton.jit(do_not_specialize=["T", "lse_head_stride", "grad_lse_head_stride"])
def mla_prefill_backward_delta_kernel(
    grad_out,  # HeadRows [T, H, Dv]
    out,  # HeadRows [T, H, Dv]
    lse_ptr,  # fp32 [H, T]
    grad_lse_ptr,  # fp32 [H, T], or None
    delta_ptr,  # fp32 [H, T]
    T,
    H,
    lse_head_stride,  # elements
    grad_lse_head_stride,  # elements
    ROWS: tl.constexpr,  # of a program
    V_TILE: tl.constexpr,  # Dv, rounded up to a power of two
):
    """delta of ROWS rows of one head; 0 for queries without visible keys."""
    head = (tl.program_id(0) % H).to(tl.int64)
    row = (tl.program_id(0) // H * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = row < T
    column = tl.arange(0, V_TILE)[None, :]
    mask = row_mask[:, None] & (column < out.width)
    grad_out, out = select_head(grad_out, head), select_head(out, head)
    grad_out_ptrs = grad_out.ptr + row[:, None] * grad_out.row_stride + column
    out_ptrs = out.ptr + row[:, None] * out.row_stride + column
    grad = tl.load(grad_out_ptrs, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(grad * tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32), 1)
    if grad_lse_ptr is not None:
        grad_lse_ptr += head * grad_lse_head_stride
        delta -= tl.load(grad_lse_ptr + row, mask=row_mask, other=0.0)
    lse = tl.load(lse_ptr + head * lse_head_stride + row, mask=row_mask, other=0.0)
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(delta_ptr + head * T + row, delta, mask=row_mask)


@mla_prefill.op.register_autograd
class MlaPrefill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal):
        ctx.set_materialize_grads(False)
        out, lse = mla_prefill.op.overload(
            q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.options = softmax_scale, causal
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, *cu_seqlens = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        grads = mla_prefill_backward.op.overload(
            grad_out, q, k, v, out, lse, *cu_seqlens, *ctx.options, grad_lse
        )
        return *grads, None, None, None, None


@mla_prefill_backward.op.register_limits("cuda")
def _unsupported_on_hopper(grad_out, q, k, v, *_) -> str | None:
    """Why the `cuda` backend (csrc/sm90/mla_prefill_dkv.cuh) does not support these, or None."""
    return unsupported_on_hopper(q, k, v)
