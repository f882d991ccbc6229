"""Plain PyTorch for attention over the tokens that each query names."""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import unpack
from .registry import baseline, others


def attend(
    q: Tensor, tokens: Tensor, counts: Tensor, softmax_scale: float, R: int, sink: Tensor | None
) -> Tensor:
    """q [N, H, W], each query's own tokens [N, topk, W], of which some count [N, topk].

    A sink is a token of its own: its key adds the sink to a score of 0, its value is 0.
    """
    tokens = tokens.masked_fill(~counts[..., None], 0)  # 0 * NaN would be NaN
    H = q.shape[1]
    bias = torch.zeros(counts.shape, dtype=q.dtype, device=q.device)
    bias = bias.masked_fill(~counts, -math.inf)[:, None].expand(-1, H, -1)
    if sink is not None:
        tokens = F.pad(tokens, (0, 0, 0, 1))
        bias = torch.cat([bias, sink.to(q.dtype)[None, :, None].expand(len(q), -1, 1)], -1)
    # The heads share the tokens, so they are the rows of one head.
    out = F.scaled_dot_product_attention(
        q[:, None], tokens[:, None], tokens[:, None, :, :R], bias[:, None], scale=softmax_scale
    )
    return out[:, 0].masked_fill(~counts.any(-1)[:, None, None], 0)


def counting(indices: Tensor, slots: int, topk_length: Tensor | None) -> Tensor:
    counts = (indices >= 0) & (indices < slots)
    if topk_length is not None:
        place = torch.arange(indices.shape[-1], device=indices.device)
        counts &= place < topk_length[:, None, None]
    return counts


@baseline
def mla_sparse_decode(
    q, cache, indices, softmax_scale, topk_length=None, attn_sink=None, v_head_dim=512
) -> tuple[Tensor, None]:
    """Gather the named tokens, SDPA with the heads as rows."""
    page = cache.shape[1]
    counts = counting(indices, cache.shape[0] * page, topk_length)
    slot = indices.long().masked_fill(~counts, 0)
    entries = cache[slot // page, slot % page, 0]  # [B, Sq, topk, width]
    tokens = unpack(entries, v_head_dim) if cache.dtype == torch.uint8 else entries
    rows = (x.flatten(0, 1) for x in (q, tokens.to(q.dtype), counts))
    out = attend(*rows, softmax_scale, v_head_dim, attn_sink)
    return out.view(*q.shape[:3], v_head_dim), None


@baseline
def mla_sparse_prefill(
    q, kv, indices, softmax_scale, v_head_dim=512, attn_sink=None, topk_length=None
) -> tuple[Tensor, None, None]:
    """Gather the named rows, SDPA with the heads as rows, 64 queries at a time."""
    counts = counting(indices, kv.shape[0], topk_length)[:, 0]
    out = q.new_empty(*q.shape[:2], v_head_dim)
    for i in range(0, len(q), 64):
        some = slice(i, i + 64)
        row = indices[some, 0].long().masked_fill(~counts[some], 0)
        tokens = kv[row, 0] if kv.shape[0] else kv.new_zeros(*row.shape, kv.shape[-1])
        out[some] = attend(q[some], tokens, counts[some], softmax_scale, v_head_dim, attn_sink)
    return out, None, None


@baseline
def mla_sparse_prefill_backward(
    grad_out, grad_lse, q, kv, indices, out, lse, softmax_scale, attn_sink=None, topk_length=None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Autograd of gather and softmax, 64 queries at a time, forward again."""
    counts = counting(indices, kv.shape[0], topk_length)[:, 0]
    grad_q, grad_kv = torch.zeros_like(q), torch.zeros_like(kv, dtype=torch.float32)
    grad_sink = None if attn_sink is None else torch.zeros_like(attn_sink)
    for i in range(0, len(q), 64):
        some = slice(i, i + 64)
        leaves = [x.detach().requires_grad_() for x in (q[some], kv, attn_sink) if x is not None]
        with torch.enable_grad():
            row = indices[some, 0].long().masked_fill(~counts[some], 0)
            outputs = softmax_attention(*leaves[:2], row, counts[some], softmax_scale,
                                        out.shape[-1], *leaves[2:])  # fmt: skip
            wanted = [g[some] for g in (grad_out, grad_lse) if g is not None]
            outputs = outputs[: 1 if grad_lse is None else 2]
            grads = torch.autograd.grad(outputs, leaves, wanted)
        grad_q[some] = grads[0]
        grad_kv += grads[1]
        if grad_sink is not None:
            grad_sink += grads[2]
    return grad_q, grad_kv.to(kv.dtype), grad_sink


def softmax_attention(q, kv, row, counts, softmax_scale, R, sink=None) -> tuple[Tensor, Tensor]:
    """out [N, H, R] and lse [N, H] for the rows [N, topk] of kv, constant where none counts."""
    lonely = ~counts.any(-1)[:, None]  # [N, 1]
    tokens = F.pad(kv, (0, 0, 0, 0, 0, 1))[row, 0]  # a row more, lest there be none
    tokens = tokens.masked_fill(~counts[..., None], 0)
    scores = (q @ tokens.mT).float() * softmax_scale
    scores = scores.masked_fill(~(counts | lonely)[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    total = lse if sink is None else torch.logaddexp(lse, sink)
    weights = (scores - total[..., None]).exp().to(q.dtype)
    out = (weights @ tokens[..., :R]).masked_fill(lonely[..., None], 0)
    return out, lse.masked_fill(lonely, -math.inf)


def flash_mla_serves(q: Tensor, R: int) -> bool:
    """Whether FlashMLA is there and its kernels take these shapes."""
    found = importlib.util.find_spec("flash_mla") is not None
    return found and q.is_cuda and q.shape[-1] == 576 and R == 512 and q.shape[-2] in (64, 128)


@others("mla_sparse_decode")
def flash_mla_decode(args: tuple) -> dict:
    q, cache, indices, scale, topk_length, sink, R = args
    if not flash_mla_serves(q, R) or cache.dtype != torch.uint8:
        return {}
    import flash_mla

    plan, _ = flash_mla.get_mla_metadata()

    def call():
        return flash_mla.flash_mla_with_kvcache(
            q, cache, None, None, R, plan, softmax_scale=scale, is_fp8_kvcache=True,
            indices=indices, attn_sink=sink, topk_length=topk_length,
        )  # fmt: skip

    return {"FlashMLA flash_mla_with_kvcache": call}


@others("mla_sparse_prefill")
def flash_mla_prefill(args: tuple) -> dict:
    q, kv, indices, scale, R, sink, topk_length = args
    if not flash_mla_serves(q, R) or q.dtype != torch.bfloat16:
        return {}
    import flash_mla

    return {
        "FlashMLA flash_mla_sparse_fwd": lambda: flash_mla.flash_mla_sparse_fwd(
            q, kv, indices, scale, R, sink, topk_length
        )
    }
