"""The gradients of `mla_prefill`, without atomics: the same bits every time.

With P = exp(score - lse), computed again, and delta[i] = grad_out[i] . out[i] - grad_lse[i]:

    dS     = P * (grad_out . v^T - delta)
    grad_q = softmax_scale * dS . k
    grad_k = softmax_scale * dS^T . q
    grad_v = P^T . grad_out

Cut: `delta_kernel` sums rows. `key_kernel` takes a tile of keys of one head of k and v, and goes
over the queries that see them and over the heads that share them, in order. `query_kernel` takes a
tile of queries and goes over the keys they see. Both compute scores and dS, so there are 7 products
for a pair of query and key instead of 5: the price of sums that no schedule can reorder, and of no
partial sums in memory. The speed is that of the matrix units.

Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.2, cut twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..runtime import arch
from ..runtime.op import op
from .mla_prefill import LOG2_E, Tile, check_heads, fitted, mla_prefill, precision
from .mla_prefill_gradients import key_kernel, query_kernel
from .ragged import cut, parts


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
        grad_out: [T, H, Dv] in q's dtype, of `out`.
        q, k, v: as in the forward pass.
        out, lse: what it returned.
        cu_seqlens_q, cu_seqlens_k, softmax_scale, causal: as in the forward pass.
        grad_lse: fp32 [H, T], of `lse`, or None for zeros. It counts nowhere where lse is -inf.

    Returns:
        grad_q [T, H, Dqk], grad_k [Tk, Hk, Dqk], grad_v [Tk, Hk, Dv], in q's dtype; 0 for rows
        that saw, or that were seen by, nothing. Summed in fp32 in a fixed order.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    name = "mla_prefill_backward"
    check_heads(name, q, k, cu_seqlens_q, softmax_scale, v=v, grad_out=grad_out, out=out)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def choose_tile(q, v) -> tuple[Tile, Tile]:
    """How `key_kernel` and `query_kernel` are cut: by the widths, not by rows or heads."""
    target = arch.of(q.device)
    made = _key_tile(target, q.dtype), _query_tile(target, q.dtype)
    return tuple(fitted(each, q.shape[2], v.shape[2]) for each in made)


def _key_tile(target, dtype: torch.dtype) -> tuple[int, ...]:
    """(rows, keys, warps, stages): `keys` of a program, which takes `rows` at a time.

    The sums of a key are 320 values in registers, which leaves room for few rows at a time.
    """
    if dtype == torch.float32:
        return (16, 16, 8, 1)
    if target.backend == "hip":
        return (16, 128, 8, 1)
    return (32, 128, 8, 2) if target.name in ("sm_90", "sm_100") else (32, 32, 4, 2)


def _query_tile(target, dtype: torch.dtype) -> tuple[int, ...]:
    """(rows, keys, warps, stages): `rows` of a program, which takes `keys` at a time."""
    if dtype == torch.float32:
        return (16, 16, 8, 1)
    if target.backend == "hip":
        return (128, 32, 8, 1)
    return (128, 64 if target.name in ("sm_90", "sm_100") else 16, 8, 2)


@mla_prefill_backward.op.register_launcher("triton")
def _launch_triton(
    grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, grad_lse
):
    grads = mla_prefill_backward.op.allocate(
        grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, grad_lse
    )
    (T, H, Dqk), (Tk, Hk, Dv) = q.shape, v.shape
    (D0, D1), (V0, V1) = parts(Dqk), parts(Dv)
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    if lse.numel():
        grad_lse_head = 0 if grad_lse is None else grad_lse.stride(0)
        delta_kernel[(cdiv(T, 32) * H,)](
            grad_out, out, lse, grad_lse, delta, T, H, Dv,
            *grad_out.stride()[:2], *out.stride()[:2], lse.stride(0), grad_lse_head,
            ROWS=32, V=next_power_of_2(max(Dv, 1)), num_warps=4,
        )  # fmt: skip
    by_key, by_query = choose_tile(q, v)
    key_tiles = cut(cu_seqlens_k, Tk, cu_seqlens_q, T, by_key.keys, last_first=False)
    query_tiles = cut(cu_seqlens_q, T, cu_seqlens_k, Tk, by_query.rows, last_first=causal)
    strides = [x.stride(i) for x in (grad_out, q, k, v) for i in (0, 1)]
    for kernel, t, tiles, heads, written in (
        (key_kernel, by_key, key_tiles, Hk, grads[1:]),
        (query_kernel, by_query, query_tiles, H, grads[:1]),
    ):
        if heads:
            kernel[(tiles.shape[0] * heads,)](
                grad_out, q, k, v, lse, delta, tiles, *written, softmax_scale * LOG2_E.value,
                softmax_scale, T, heads, H // Hk, tiles.shape[0], Dqk, Dv, *strides, lse.stride(0),
                CAUSAL=causal, PRECISION=precision(arch.of(q.device)),
                BLOCK_M=t.rows, BLOCK_N=t.keys, D0=D0, D1=D1, V0=V0, V1=V1,
                EVEN_QK=Dqk == D0 + D1, EVEN_V=Dv == V0 + V1,
                num_warps=t.warps, num_stages=t.stages,
            )  # fmt: skip
    return grads


@triton.jit(do_not_specialize=["T", "lse_head", "grad_lse_head"])
def delta_kernel(
    grad_out_ptr, out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, T, H, Dv,
    grad_row, grad_head, out_row, out_head, lse_head, grad_lse_head,
    ROWS: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """rowsum(grad_out * out) - grad_lse of ROWS rows of one head; 0 where nothing is seen."""
    head = (tl.program_id(0) % H).to(tl.int64)
    row = (tl.program_id(0) // H * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, V)[None, :]
    inside = (row < T)[:, None] & (column < Dv)
    grad_at = grad_out_ptr + head * grad_head + row[:, None] * grad_row + column
    out_at = out_ptr + head * out_head + row[:, None] * out_row + column
    grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(grad * tl.load(out_at, mask=inside, other=0.0).to(tl.float32), 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + head * grad_lse_head + row, mask=row < T, other=0.0)
    lse = tl.load(lse_ptr + head * lse_head + row, mask=row < T, other=0.0)
    tl.store(delta_ptr + head * T + row, tl.where(lse == float("-inf"), 0.0, delta), mask=row < T)


@mla_prefill.op.register_autograd
class MlaPrefill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal):
        ctx.set_materialize_grads(False)
        out, lse = mla_prefill.op.overload(
            q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.rest = softmax_scale, causal
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, *cu = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        grads = mla_prefill_backward.op.overload(
            grad_out, q, k, v, out, lse, *cu, *ctx.rest, grad_lse
        )
        return *grads, None, None, None, None
