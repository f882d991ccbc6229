"""Plain PyTorch for latent attention and its cache."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .quant import FP8, cast_per_token
from .registry import baseline, others, prepared

BF16 = torch.bfloat16


@baseline
def mla_cache_append(
    latent, k_rope, cache, slot_mapping, norm_weight=None, positions=None, cos_sin=None, eps=1e-6
) -> None:
    """RMS norm, RoPE and index_put, op by op."""
    slots = cache.shape[0] * cache.shape[1]
    kept = (slot_mapping >= 0) & (slot_mapping < slots)
    if positions is not None:
        kept &= (positions >= 0) & (positions < cos_sin.shape[0])
    latent, k_rope, slot_mapping = latent[kept].float(), k_rope[kept].float(), slot_mapping[kept]
    if norm_weight is not None:
        latent = F.rms_norm(latent, latent.shape[-1:], norm_weight.float(), eps)
    if positions is not None:
        cos, sin = cos_sin[positions[kept]].chunk(2, -1)
        even, odd = k_rope[..., 0::2], k_rope[..., 1::2]
        k_rope = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    if cache.dtype == torch.uint8:
        parts = (*cast_per_token(latent), k_rope.bfloat16())
        entry = torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)
    else:
        entry = torch.cat([latent, k_rope], -1).to(cache.dtype)
    page = cache.shape[1]
    cache[slot_mapping // page, slot_mapping % page, 0] = entry


def gather(cache: Tensor, block_table: Tensor, v_head_dim: int, dtype: torch.dtype) -> Tensor:
    """The cache of every sequence, one after the other: [B, P * page, R + D] in `dtype`."""
    blocks, page = cache.shape[:2]
    B, P = block_table.shape
    block = block_table.long().clamp(0, max(blocks - 1, 0))
    entries = cache.flatten(2)[block].reshape(B, P * page, cache.shape[-1])
    if cache.dtype != torch.uint8:
        return entries.to(dtype)
    return unpack(entries, v_head_dim).to(dtype)


def unpack(entries: Tensor, R: int) -> Tensor:
    """FP8-format entries [..., bytes] -> fp32 [..., R + D]."""
    scales = R + 4 * -(-R // 128)
    latent = entries[..., :R].contiguous().view(FP8).float()
    scale = entries[..., R:scales].contiguous().view(torch.float32).repeat_interleave(128, -1)
    rope = entries[..., scales:].contiguous().view(torch.bfloat16).float()
    return torch.cat([latent * scale[..., :R], rope], -1)


@baseline
def mla_decode(
    q, cache, block_table, cache_seqlens, softmax_scale, causal=True, v_head_dim=512
) -> tuple[Tensor, None]:
    """Gather the cache, SDPA with the heads as rows."""
    B, Sq, H = q.shape[:3]
    blocks, page = cache.shape[:2]
    keys = gather(cache, block_table, v_head_dim, q.dtype)  # [B, S, R + D]
    position = torch.arange(keys.shape[1], device=q.device)
    limit = cache_seqlens.clamp(0, keys.shape[1]).long()[:, None, None]  # [B, 1, 1]
    if causal:
        limit = limit - (Sq - 1 - torch.arange(Sq, device=q.device)[:, None])
    seen = position < limit  # [B, Sq or 1, S]
    present = ((block_table >= 0) & (block_table < blocks)).repeat_interleave(page, 1)
    seen = (seen & present[:, None]).expand(B, Sq, -1)  # [B, Sq, S]
    # A key that is not seen may be NaN, and 0 * NaN would be NaN.
    keys = keys.masked_fill(~seen.any(1)[..., None], 0)[:, None]  # [B, 1, S, R + D]
    # All heads share the keys, so they are rows of one head: no copy of the keys for each.
    rows = seen.repeat_interleave(H, 1)[:, None]  # [B, 1, Sq * H, S]
    out = F.scaled_dot_product_attention(
        q.flatten(1, 2)[:, None], keys, keys[..., :v_head_dim], rows, scale=softmax_scale
    )
    out = out.masked_fill(~rows.any(-1, keepdim=True), 0)  # nothing to attend to
    return out.view(B, Sq, H, v_head_dim), None


@others("mla_decode")
def other_mla_decode(args: tuple) -> dict[str, Callable[[], object]]:
    """The naive form anywhere; on a GPU FlexAttention, and FlashMLA and FlashInfer if installed."""
    q, cache, table = args[:3]
    found: dict[str, Callable[[], object]] = {}
    page = cache.shape[1]
    naive_bytes = table.numel() * page * q.shape[2] * (192 + 128) * q.element_size()
    if naive_bytes < 16 << 30:  # 80 KB a token at 128 heads
        found["naive form: keys and values of every head ready, SDPA"] = prepared(
            lambda: naive(args)
        )
    if q.device.type != "cuda":
        return found
    found["FlexAttention, compiled, cache gathered before"] = prepared(lambda: flex(args))
    bf16 = q.dtype == cache.dtype == BF16 and page == 64 and q.shape[3] == 576
    for module, prepare in (("flash_mla", flash_mla), ("flashinfer", flashinfer)):
        if bf16 and importlib.util.find_spec(module):
            found[module] = prepared(functools.partial(prepare, args))
    return found


def limits(args: tuple) -> Tensor:
    """How many tokens each query sees: [B, Sq]."""
    q, seqlens, causal = args[0], args[3], args[5]
    ahead = torch.arange(q.shape[1] - 1, -1, -1, device=q.device)
    return seqlens[:, None] - (ahead if causal else torch.zeros_like(ahead))


def naive(args: tuple) -> Callable[[], object]:
    """SDPA over keys of 192 and values of 128 for every head, as V3 has them."""
    (B, Sq, H, _), (q, cache, table) = args[0].shape, args[:3]
    S = table.shape[1] * cache.shape[1]
    query, keys, values = (
        torch.randn(B, H, length, width, dtype=q.dtype, device=q.device)
        for length, width in ((Sq, 192), (S, 192), (S, 128))
    )
    seen = (torch.arange(S, device=q.device) < limits(args)[..., None])[:, None]
    return lambda: F.scaled_dot_product_attention(query, keys, values, seen, scale=args[4])


def flex(args: tuple) -> Callable[[], object]:
    """FlexAttention on the absorbed form: the heads share one key."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, cache, table, _, scale, _, R = args
    keys = gather(cache, table, R, q.dtype).nan_to_num()[:, None]
    limit = limits(args)
    mask = create_block_mask(
        lambda b, h, query, key: key < limit[b, query],
        len(q), None, q.shape[1], keys.shape[2], device=q.device,
    )  # fmt: skip
    compiled, query, values = torch.compile(flex_attention), q.transpose(1, 2), keys[..., :R]
    return lambda: compiled(query, keys, values, block_mask=mask, scale=scale, enable_gqa=True)


def flash_mla(args: tuple) -> Callable[[], object]:
    import flash_mla as library

    q, cache, table, seqlens, scale, causal, R = args
    cache = cache.contiguous()
    metadata = library.get_mla_metadata(seqlens, q.shape[1] * q.shape[2], 1)
    call = library.flash_mla_with_kvcache
    return lambda: call(q, cache, table, seqlens, R, *metadata, scale, causal)


def flashinfer(args: tuple) -> Callable[[], object]:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    q, cache, table, seqlens, scale, causal, R = args
    (B, Sq, H, W), page = q.shape, cache.shape[1]
    pages = (seqlens + page - 1) // page
    used = table[torch.arange(table.shape[1], device=q.device) < pages[:, None]]
    wrapper = BatchMLAPagedAttentionWrapper(
        torch.empty(128 << 20, dtype=torch.int8, device=q.device)
    )
    wrapper.plan(
        torch.arange(B + 1, dtype=torch.int32, device=q.device) * Sq,
        F.pad(pages.cumsum(0), (1, 0)).int(), used, seqlens, H, R, W - R, page, causal, scale,
        q.dtype, cache.dtype,
    )  # fmt: skip
    parts = [x.contiguous() for whole in (q.flatten(0, 1), cache[:, :, 0])
             for x in whole.split((R, W - R), -1)]  # fmt: skip
    return lambda: wrapper.run(*parts)


@baseline
def mla_cache_gather(
    cache, block_table, cu_seqlens, total_tokens, v_head_dim=512, starts=None, out_dtype=BF16
) -> Tensor:
    """Gather the pages of each sequence, slice, cat."""
    page, offsets = cache.shape[1], cu_seqlens.tolist()
    begins = [0] * len(block_table) if starts is None else starts.tolist()
    # (A slice without rows gives the width where there is no sequence.)
    rows = [cache[:0, 0, 0]]
    for b, begin in enumerate(begins):
        position = torch.arange(begin, begin + offsets[b + 1] - offsets[b], device=cache.device)
        rows.append(cache[block_table[b].long()[position // page], position % page, 0])
    found = torch.cat(rows)
    found = (unpack(found, v_head_dim) if cache.dtype == torch.uint8 else found).to(out_dtype)
    return F.pad(found, (0, 0, 0, total_tokens - len(found)))


@baseline
def merge_states(out_a, lse_a, out_b, lse_b) -> tuple[Tensor, Tensor]:
    """logaddexp, exp, multiply, add, op by op."""
    lse = torch.logaddexp(lse_a, lse_b)
    known = lse.masked_fill(lse == -torch.inf, 0)
    out = 0
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        share = (part_lse - known).exp().mT[..., None]
        out = out + part.float().masked_fill((part_lse == -torch.inf).mT[..., None], 0) * share
    return out.to(out_a.dtype), lse


@baseline
def merge_states_backward(grad_out, grad_lse, out_a, lse_a, out_b, lse_b) -> tuple[Tensor, ...]:
    """Autograd through sigmoid and logaddexp."""
    nothing = [(lse == -torch.inf) for lse in (lse_a, lse_b)]
    outs = [out.float().masked_fill(none.mT[..., None], 0)
            for out, none in zip((out_a, out_b), nothing, strict=True)]  # fmt: skip
    # -inf itself has no gradient that autograd could tell; exp of this one is 0, too.
    given = [outs[0], lse_a.clamp(min=-1e4), outs[1], lse_b.clamp(min=-1e4)]
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in given]
        a, log_a, b, log_b = given
        share = (log_a - log_b).sigmoid().mT[..., None]
        results = share * a + (1 - share) * b, torch.logaddexp(log_a, log_b)
        grads = torch.autograd.grad(results, given, (grad_out.float(), grad_lse))
    neither = nothing[0] & nothing[1]
    of_out = [g.masked_fill(neither.mT[..., None], 0).to(out_a.dtype) for g in grads[::2]]
    of_lse = [g.masked_fill(neither, 0) for g in grads[1::2]]
    return of_out[0], of_lse[0], of_out[1], of_lse[1]


@baseline
def mla_prefill(
    q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal=True
) -> tuple[Tensor, None]:
    """SDPA, sequence by sequence."""
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    for rows, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, causal):
        out[rows] = _sdpa(q[rows], k[keys], v[keys], softmax_scale, causal)
    return out, None


@baseline
def mla_prefill_backward(
    grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal=True,
    grad_lse=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """SDPA and its backward, sequence by sequence."""
    found = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for rows, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, causal):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q[rows], k[keys], v[keys])]
            outputs, grads = [_sdpa(*inputs, softmax_scale, causal)], [grad_out[rows]]
            if grad_lse is not None:
                outputs.append(_lse(*inputs[:2], softmax_scale, causal))
                grads.append(grad_lse[:, rows])
        grads = torch.autograd.grad(outputs, inputs, grads)
        for to, at, grad in zip(found, (rows, keys, keys), grads, strict=True):
            to[at] = grad
    return tuple(found)


def _sequences(q, k, cu_seqlens_q, cu_seqlens_k, causal) -> list[tuple[slice, slice]]:
    """Rows of q that see a key and rows of k, of every sequence; the lengths are read back."""
    slices = []
    for cu, x in ((cu_seqlens_q, q), (cu_seqlens_k, k)):
        edges = cu.clamp(0, x.shape[0]).cummax(0).values.tolist()
        slices.append(list(zip(edges, edges[1:], strict=False)))
    found = []
    for (q0, q1), (k0, k1) in zip(*slices, strict=True):
        q0 = max(q0, q1 - (k1 - k0)) if causal else q0
        if q0 < q1 and k0 < k1 and q.shape[1]:
            found.append((slice(q0, q1), slice(k0, k1)))
    return found


def _sdpa(q, k, v, softmax_scale, causal) -> Tensor:
    """One sequence, [Lq, H, Dqk] -> [Lq, H, Dv]."""
    square = causal and q.shape[0] == k.shape[0]  # otherwise is_causal aligns the wrong ends
    seen = None if square or not causal else _seen(q, k)
    shared = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, seen, is_causal=square, scale=softmax_scale, enable_gqa=shared
    )
    return out[0].transpose(0, 1)


def _seen(q, k) -> Tensor:
    Lq, Lk = q.shape[0], k.shape[0]
    return torch.ones(Lq, Lk, dtype=torch.bool, device=q.device).tril(Lk - Lq)


def _lse(q, k, softmax_scale, causal) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("mhd,nhd->hmn", q.float(), k.float()) * softmax_scale
    return (scores.masked_fill(~_seen(q, k), -torch.inf) if causal else scores).logsumexp(-1)


@others("mla_prefill")
def _flash_prefill(args: tuple) -> dict[str, Callable[[], object]]:
    """FlashAttention-2, where it is installed and takes these tensors."""
    q, k, v, cu_q, cu_k, scale, causal = args
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return {}
    if q.dtype == torch.float32 or max(q.shape[2], v.shape[2]) > 256:
        return {}
    padded = F.pad(v, (0, q.shape[2] - v.shape[2]))  # it wants keys and values of one width
    longest = [int(cu.diff().max()) for cu in (cu_q, cu_k)]
    return {
        "flash_attn_varlen_func, values padded": lambda: flash_attn_varlen_func(
            q, k, padded, cu_q, cu_k, *longest, softmax_scale=scale, causal=causal
        )
    }


@others("mla_prefill_backward")
def _sdpa_backward(args: tuple) -> dict[str, Callable[[], object]]:
    """SDPA's backward without its forward."""
    grad_out, q, k, v, _, _, cu_q, cu_k, scale, causal, _ = args
    graphs = []
    for rows, keys in _sequences(q, k, cu_q, cu_k, causal):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q[rows], k[keys], v[keys])]
            graphs.append((_sdpa(*inputs, scale, causal), inputs, grad_out[rows]))
    return {
        "SDPA's backward alone": lambda: [
            torch.autograd.grad(*g, retain_graph=True) for g in graphs
        ]
    }
