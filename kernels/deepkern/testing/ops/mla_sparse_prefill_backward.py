"""Inputs, sizes, cost and baseline of mla_sparse_prefill_backward."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ... import reference
from ..costs import Cost, row_bytes, tensor_bytes
from ..sparse_attention import OPTIONS, count_tokens, softmax_attention, token_mask
from . import Sizes, mla_sparse_prefill

BF16 = torch.bfloat16


def inputs(generator: Generator, grad_lse: bool = False, **size) -> tuple:
    args = mla_sparse_prefill.inputs(generator, **size)
    q, kv, indices, scale, R, attn_sink, topk_length = args
    out, _, lse = reference.mla_sparse_prefill(*args)
    grad_out = torch.randn(out.shape, generator=generator, device=q.device).to(q.dtype)
    lse_grad = torch.randn(lse.shape, generator=generator, device=q.device) if grad_lse else None
    return grad_out, lse_grad, q, kv, indices, out, lse, scale, attn_sink, topk_length


SIZES = Sizes(
    small=[
        {"S": 4, "H": 9, "R": 64, "D": 16, "grad_lse": True, **OPTIONS},
        {"S": 2, "H": 2, "topk": 70, "R": 32, "D": 16, "dtype": torch.float32, "sink": True},
        {"H": 16, "Skv": 20},
        {"S": 2, "H": 5, "Skv": 9, "R": 130, "D": 6, "dtype": torch.float16, "lengths": True},
        {"S": 2, "H": 1, "Skv": 20, "R": 64, "D": 0, "dtype": torch.float32},
        {"S": 2, "H": 2, "topk": 0, "R": 32, "D": 16, "grad_lse": True, **OPTIONS},
        {"S": 2, "H": 2, "Skv": 0, "R": 32, "D": 16, **OPTIONS},
        {"S": 0},
        {"H": 0},
    ],
    cpu=[{"S": 16, "Skv": 1024, "topk": 256}],
    gpu=[
        {"S": 4096, "Skv": 8192, "H": 128, "topk": 2048},
        {"S": 4096, "Skv": 8192, "H": 64, "topk": 2048, **OPTIONS},
    ],
    inspect=[
        {"S": 1, "H": 16, "topk": 64},
        {"S": 1, "H": 128, "topk": 64, "grad_lse": True, **OPTIONS},
    ],
)
EXACT = False


def cost(q, kv, indices, out, topk_length, **rest) -> Cost:
    """FLOPs of the scores, the gradients of weights and q, and both parts of kv's gradient."""
    tokens = count_tokens(indices, len(kv), topk_length)
    moved = tokens * row_bytes(kv) + tensor_bytes(q, indices, out, topk_length, rest)
    return Cost(moved, tokens * 2 * q.shape[1] * (3 * q.shape[2] + 2 * out.shape[-1]))


def baseline(
    grad_out, grad_lse, q, kv, indices, out, lse, softmax_scale, attn_sink=None, topk_length=None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Autograd of gather and softmax, 64 queries at a time, forward again."""
    mask = token_mask(indices, kv.shape[0], topk_length)[:, 0]
    grad_q, grad_kv = torch.zeros_like(q), torch.zeros_like(kv, dtype=torch.float32)
    grad_sink = None if attn_sink is None else torch.zeros_like(attn_sink)
    for i in range(0, len(q), 64):
        part = slice(i, i + 64)
        leaves = [x.detach().requires_grad_() for x in (q[part], kv, attn_sink) if x is not None]
        with torch.enable_grad():
            row = indices[part, 0].long().masked_fill(~mask[part], 0)
            outputs = softmax_attention(*leaves[:2], row, mask[part], softmax_scale,
                                        out.shape[-1], *leaves[2:])  # fmt: skip
            output_grads = [g[part] for g in (grad_out, grad_lse) if g is not None]
            outputs = outputs[: 1 if grad_lse is None else 2]
            grads = torch.autograd.grad(outputs, leaves, output_grads)
        grad_q[part] = grads[0]
        grad_kv += grads[1]
        if grad_sink is not None:
            grad_sink += grads[2]
    return grad_q, grad_kv.to(kv.dtype), grad_sink
