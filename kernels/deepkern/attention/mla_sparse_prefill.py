"""Attention of many queries, each over the keys that its indices select, and its gradients.

DeepSeek-V3.2's prefill and training. Query s attends to `topk` rows of kv. A row is one key for all
heads, and its first R values are its value:

    score[s, h, n] = softmax_scale * q[s, h] . kv[indices[s, n]]
    out[s, h]      = exp(lse) / (exp(lse) + exp(sink[h])) * softmax over n of score . kv[.., :R]

Parallelization, kernel and limit of the speed: forward see sparse.py, where this is
`mla_sparse_decode` with S sequences of one query, pages of one token and no splits; backward see
sparse_gradients.py.

Source: DeepSeek-V3.2 (arXiv 2512.02556); meaning of lengths, sinks and max_logits as in FlashMLA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.contract import check_that
from ..runtime.op import op
from . import sparse, sparse_gradients
from .cache import unsupported_on_hopper
from .paged_launch import Tile


@op(
    q="real [S, H, W]",
    kv="real [Skv, 1, W]",
    indices="int32 [S, 1, topk]",
    attn_sink="fp32 [H]",
    topk_length="int32 [S]",
)
def mla_sparse_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    softmax_scale: float,
    v_head_dim: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attends each query to the rows of kv that its indices select.

        out, max_logits, lse = deepkern.mla_sparse_prefill(q, kv, indices, 576**-0.5)

    Args:
        q: bf16, fp16 or fp32 [S, H, R + D]; any H; any strides, except that the last dimension is
            contiguous.
        kv: [Skv, 1, R + D] in q's dtype.
        indices: int32 [S, 1, topk], rows of kv in any order. An index outside [0, Skv) is ignored
            (use -1). A row counts once per occurrence.
        softmax_scale: multiplies the scores.
        v_head_dim: R, the number of leading values of a row that are its value.
        attn_sink: fp32 [H], a score in the softmax that has no value: out is multiplied by
            exp(lse) / (exp(lse) + exp(attn_sink)); lse and max_logits do not change. -inf has no
            effect, +inf gives 0.
        topk_length: int32 [S], the number of leading indices of a query that count; clamped to
            [0, topk]. None: all.

    Returns:
        out: [S, H, R] in q's dtype; 0 for a query without rows.
        max_logits: fp32 [S, H], the largest score, softmax_scale included; -inf for such a query.
        lse: fp32 [S, H], natural log of the sum of the exponentials of scores; -inf likewise.

    Matrix products use q's dtype, sums fp32. A query's result depends bitwise on its own q, indices
    and length only. q, kv and attn_sink receive gradients, from out and lse; max_logits is not
    differentiable.

    Raises:
        TypeError, ValueError: an argument does not match the above; with DEEPKERN_DEBUG=1 also for
            lengths outside [0, topk] and indices outside [-1, Skv).
    """
    S, H, _ = q.shape
    check_operands("mla_sparse_prefill", q, kv, v_head_dim)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return (
        q.new_empty(S, H, v_head_dim),
        q.new_empty(S, H, dtype=torch.float32),
        q.new_empty(S, H, dtype=torch.float32),
    )


def check_operands(op: str, q: Tensor, kv: Tensor, v_head_dim: int) -> None:
    """Raises unless kv has q's dtype and v_head_dim is a part of its width."""
    if kv.dtype != q.dtype:
        raise TypeError(f"{op}: kv: expected q's dtype {q.dtype}, got {kv.dtype}")
    check_that(op, "v_head_dim", 0 <= v_head_dim <= q.shape[-1],
               f"a part of q's last dimension {q.shape[-1]}", v_head_dim)  # fmt: skip


@mla_sparse_prefill.op.register_tile
def choose_tile(q, kv, indices, softmax_scale, v_head_dim, attn_sink, topk_length) -> Tile:
    """The tile for these widths and H heads; independent of the number of queries."""
    return sparse.choose_tile(q, kv, v_head_dim, max_splits=1)


@mla_sparse_prefill.op.register_launcher("triton")
def _launch_triton(q, kv, indices, softmax_scale, v_head_dim, attn_sink, topk_length):
    args = q, kv, indices, softmax_scale, v_head_dim, attn_sink, topk_length
    out, max_logits, lse = mla_sparse_prefill.op.allocate(*args)
    sparse.launch_sparse_attention(
        q[:, None], kv[:, None], indices, softmax_scale, topk_length, attn_sink,
        out[:, None], lse[..., None], max_logits, choose_tile(*args),
    )  # fmt: skip
    return out, max_logits, lse


@mla_sparse_prefill.op.register_limits("cuda")
def _unsupported_on_hopper(q, kv, indices, softmax_scale, v_head_dim, attn_sink, topk_length):
    return unsupported_on_hopper(q, kv, v_head_dim)


@mla_sparse_prefill.op.register_debug_check
def check_contents(q, kv, indices, softmax_scale, v_head_dim, attn_sink, topk_length) -> None:
    sparse.check_indices("mla_sparse_prefill", indices, topk_length, kv.shape[0])


@op(
    optional_output=("attn_sink",),
    grad_out="real [S, H, R]",
    grad_lse="fp32 [S, H]",
    q="real [S, H, W]",
    kv="real [Skv, 1, W]",
    indices="int32 [S, 1, topk]",
    out="real [S, H, R]",
    lse="fp32 [S, H]",
    attn_sink="fp32 [H]",
    topk_length="int32 [S]",
)
def mla_sparse_prefill_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `mla_sparse_prefill` with respect to q, kv and attn_sink.

        grad_q, grad_kv, _ = deepkern.mla_sparse_prefill_backward(
            grad_out, None, q, kv, indices, out, lse, softmax_scale
        )

    Args:
        grad_out: [S, H, R] in q's dtype, gradient of out.
        grad_lse: fp32 [S, H], gradient of lse; None: 0.
        q, kv, indices, out, lse, softmax_scale, attn_sink, topk_length: of the forward pass.

    Returns:
        grad_q: [S, H, R + D] in q's dtype.
        grad_kv: [Skv, 1, R + D] in q's dtype; 0 for a row that no index selects.
        grad_sink: fp32 [H]; None without attn_sink.

    Sums over queries are fp32 and run in a fixed order: by row of kv, then query, then index.

    Raises:
        TypeError, ValueError: an argument does not match the above.
    """
    check_operands("mla_sparse_prefill_backward", q, kv, out.shape[-1])
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"mla_sparse_prefill_backward: {name}: "
                            f"expected q's dtype {q.dtype}, got {tensor.dtype}")  # fmt: skip
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return (
        q.new_empty(q.shape),
        q.new_empty(kv.shape),
        q.new_empty(0 if attn_sink is None else q.shape[1], dtype=torch.float32),
    )


@mla_sparse_prefill_backward.op.register_launcher("triton")
def _launch_backward_triton(
    grad_out, grad_lse, q, kv, indices, out, lse, softmax_scale, attn_sink, topk_length
):  # fmt: skip
    args = grad_out, grad_lse, q, kv, indices, out, lse, softmax_scale, attn_sink, topk_length
    grads = mla_sparse_prefill_backward.op.allocate(*args)
    sparse_gradients.launch_gradients(*args, *grads)
    return grads


@mla_sparse_prefill.op.register_autograd
class MlaSparsePrefill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, indices, softmax_scale, v_head_dim, attn_sink, topk_length):
        out, max_logits, lse = mla_sparse_prefill.op.overload(
            q, kv, indices, softmax_scale, v_head_dim, attn_sink, topk_length
        )
        ctx.mark_non_differentiable(max_logits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, kv, indices, out, lse, attn_sink, topk_length)
        ctx.softmax_scale = softmax_scale
        return out, max_logits, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, _, grad_lse):
        q, kv, indices, out, lse, attn_sink, topk_length = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        grad_q, grad_kv, grad_sink = mla_sparse_prefill_backward.op.overload(
            grad_out, grad_lse, q, kv, indices, out, lse, ctx.softmax_scale, attn_sink, topk_length
        )
        return grad_q, grad_kv, None, None, None, None if attn_sink is None else grad_sink, None
