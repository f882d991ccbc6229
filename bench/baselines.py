"""What a PyTorch user would write for each op: the baseline that it is timed against.

`BASELINES[op]` takes the op's arguments and gives its outputs (None for one that the usual way does
not make). They double as an independent check of the reference, which is written differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
BASELINES: dict[str, Callable] = {}


def baseline(function: Callable) -> Callable:
    BASELINES[function.__name__] = function
    return function


def calls(op: str, args: tuple) -> dict[str, Callable[[], object]]:
    """What to time beside `op` on `args`, by its description."""
    found = {}
    if op in BASELINES:
        plain = BASELINES[op]
        found[plain.__doc__.splitlines()[0].rstrip(".")] = lambda: plain(*args)
    if op == "fp8_gemm_nt":
        a, b, out_dtype = _dequantised(*args[:5])
        found["bf16 F.linear, all dequantised before"] = lambda: F.linear(a, b).to(out_dtype)
        if a.device.type == "cpu":  # what people run there
            wide_a, wide_b = a.float(), b.float()
            found["fp32 F.linear, all dequantised before"] = lambda: F.linear(wide_a, wide_b)
    return found


def _scale(amax: Tensor, scale_format: str) -> Tensor:
    scale = amax.clamp(min=1e-4) / 448
    if scale_format == "ue8m0":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    # NaN and inf in spoil their block.
    return torch.where(amax.isfinite(), scale, torch.nan)


@baseline
def cast_per_token(
    x: Tensor, scale_format: str = "fp32", scale_layout: str = "row"
) -> tuple[Tensor, Tensor]:
    """amax, divide and cast, op by op."""
    K = x.shape[-1]
    blocks = F.pad(x, (0, -K % 128)).unflatten(-1, (-1, 128)).float()
    scale = _scale(blocks.abs().amax(-1), scale_format)
    q = (blocks / scale[..., None]).clamp(-448, 448).to(FP8)
    return q.flatten(-2)[..., :K], _laid_out(scale, scale_layout)


def _laid_out(scale: Tensor, layout: str) -> Tensor:
    return scale if layout == "row" else scale.mT.contiguous().mT


@baseline
def cast_per_channel(
    x, scale_format="fp32", group_offsets=None, transpose=False, scale_layout="row"
) -> tuple[Tensor, Tensor]:
    """amax, divide, cast and transpose, op by op and group by group."""
    M, K = x.shape
    offsets = [0, M] if group_offsets is None else group_offsets.tolist()
    scales, casts = [], []
    for first, last in zip(offsets, offsets[1:], strict=False):
        rows = x[first:last].float()
        scale = F.pad(rows, (0, 0, 0, (first - last) % 128)).unflatten(0, (-1, 128)).abs().amax(1)
        scales.append(_scale(scale, scale_format))
        spread = scales[-1].repeat_interleave(128, 0)[: last - first]
        casts.append((rows / spread).clamp(-448, 448).to(FP8))
    q = torch.cat(casts) if casts else x.new_zeros((M, K)).to(FP8)  # the groups are all of the rows
    groups = 0 if group_offsets is None else len(offsets) - 1
    scale = x.new_zeros((-(-M // 128) + groups, K), dtype=torch.float32)
    used = torch.cat(scales) if scales else scale
    scale[: len(used)] = used
    if transpose:
        q, scale = q.T.contiguous(), scale.T.contiguous()
    return q, _laid_out(scale, scale_layout)


@baseline
def cast_per_block(x: Tensor, scale_format: str = "fp32") -> tuple[Tensor, Tensor]:
    """amax, divide and cast, op by op."""
    N, K = x.shape[-2:]
    blocks = F.pad(x, (0, -K % 128, 0, -N % 128)).float()
    blocks = blocks.unflatten(-1, (-1, 128)).unflatten(
        -3, (-1, 128)
    )  # [.., N/128, 128, K/128, 128]
    scale = _scale(blocks.abs().amax((-1, -3)), scale_format)
    q = (blocks / scale[..., :, None, :, None]).clamp(-448, 448).to(FP8)
    return q.flatten(-2).flatten(-3, -2)[..., :N, :K], scale


def _spread(scale: Tensor, block: Sequence[int], N: int, K: int) -> Tensor:
    """One scale for every value."""
    wide = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., :N, :K]


@baseline
def cast_back(q: Tensor, scale: Tensor, block: Sequence[int], out_dtype: torch.dtype) -> Tensor:
    """Cast, spread the scales, multiply."""
    return (q.float() * _spread(scale, block, *q.shape[-2:])).to(out_dtype)


def _swiglu(gate_up: Tensor, weights: Tensor | None, limit: float | None) -> Tensor:
    gate, up = gate_up.float().tensor_split(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = F.silu(gate) * up
    return y if weights is None else y * weights[:, None]


@baseline
def swiglu_cast(
    gate_up, weights=None, limit=None, scale_format="fp32", scale_layout="row"
) -> tuple[Tensor, Tensor]:
    """F.silu, multiply, cast op by op."""
    return cast_per_token(_swiglu(gate_up, weights, limit), scale_format)


@baseline
def swiglu_cast_backward(
    grad, gate_up, gate_up_scale=None, weights=None, limit=None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Dequantise, autograd through F.silu."""
    gate_up = gate_up.float()
    if gate_up_scale is not None:
        gate_up = cast_back(gate_up, gate_up_scale, (1, 128), torch.float32)
    with torch.enable_grad():
        given = [gate_up.detach()] if weights is None else [gate_up.detach(), weights.detach()]
        given = [x.requires_grad_() for x in given]
        y = _swiglu(*given, None, limit) if weights is None else _swiglu(*given, limit)
        grads = torch.autograd.grad(y, given, grad.float())
    return grads[0].to(grad.dtype), y.detach().to(grad.dtype), *(grads[1:] or (None,))


@baseline
def rmsnorm_cast(
    x, weight, eps=1e-6, residual=None, scale_format="fp32", scale_layout="row"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Add, F.rms_norm, cast op by op."""
    h = x if residual is None else x + residual
    normed = F.rms_norm(h.float(), h.shape[-1:], weight.float(), eps).to(x.dtype)
    return *cast_per_token(normed, scale_format), normed, None if residual is None else h


@baseline
def fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype=torch.bfloat16, c=None) -> Tensor:
    """Dequantise both to bf16, F.linear."""
    a, b, out_dtype = _dequantised(a, a_scale, b, b_scale, out_dtype)
    out = F.linear(a, b).to(out_dtype)
    return out if c is None else (out + c).to(out_dtype)


def _dequantised(a, a_scale, b, b_scale, out_dtype) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both factors in the 16-bit type that the product is made in."""
    wide = torch.bfloat16 if out_dtype == torch.float32 else out_dtype
    rows = 1 if b_scale.shape[0] == b.shape[0] else 128
    return (
        cast_back(a, a_scale, (1, 128), wide),
        cast_back(b, b_scale, (rows, 128), wide),
        out_dtype,
    )


@baseline
def m_grouped_fp8_gemm_nt_contiguous(
    a, a_scale, b, b_scale, group_index, out_dtype=torch.bfloat16
) -> Tensor:
    """Group by group: index, dequantise both to bf16, F.linear."""
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype)
    for g in range(b.shape[0]):
        row = (group_index == g).nonzero()[:, 0]
        rows = a.view(torch.uint8)[row].view(FP8)  # not every device indexes FP8
        out[row] = fp8_gemm_nt(rows, a_scale[row], b[g], b_scale[g], out_dtype)
    return out


@baseline
def m_grouped_fp8_gemm_nt_masked(
    a, a_scale, b, b_scale, masked_m, out_dtype=torch.bfloat16, expected_m=None
) -> Tensor:
    """Dequantise all to bf16, torch.bmm, zero the unused rows."""
    rows, wide = (1 if b_scale.shape[1] == b.shape[1] else 128), torch.bfloat16
    x, w = cast_back(a, a_scale, (1, 128), wide), cast_back(b, b_scale, (rows, 128), wide)
    unused = torch.arange(a.shape[1], device=a.device) >= masked_m[:, None]
    return torch.bmm(x, w.mT).masked_fill(unused[:, :, None], 0).to(out_dtype)


@baseline
def k_grouped_fp8_gemm_nt(a, a_scale, b, b_scale, group_offsets, c=None) -> Tensor:
    """Group by group: dequantise both to bf16, F.linear in fp32."""
    offsets, block, found = group_offsets.tolist(), 0, []
    for first, last in zip(offsets, offsets[1:], strict=False):
        scales = slice(block, block - (first - last) // 128)
        block = scales.stop
        x, w = (
            cast_back(q[:, first:last], scale[:, scales], (1, 128), torch.bfloat16)
            for q, scale in ((a, a_scale), (b, b_scale))
        )
        found.append(F.linear(x.float(), w.float()))
    out = torch.stack(found) if found else a.new_zeros((0, len(a), len(b)), dtype=torch.float32)
    return out if c is None else out + c


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


def _gather(cache: Tensor, block_table: Tensor, v_head_dim: int, dtype: torch.dtype) -> Tensor:
    """The cache of every sequence, one after the other: [B, P * page, R + D] in `dtype`."""
    blocks, page = cache.shape[:2]
    B, P = block_table.shape
    block = block_table.long().clamp(0, max(blocks - 1, 0))
    entries = cache.flatten(2)[block].reshape(B, P * page, cache.shape[-1])
    if cache.dtype != torch.uint8:
        return entries.to(dtype)
    return _unpack(entries, v_head_dim).to(dtype)


def _unpack(entries: Tensor, R: int) -> Tensor:
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
    keys = _gather(cache, block_table, v_head_dim, q.dtype)  # [B, S, R + D]
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


def _scores(logits: Tensor, score: str) -> Tensor:
    logits = logits.float()
    if score == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if score == "sigmoid" else F.softplus(logits).sqrt()


@baseline
def route_topk(
    logits, bias=None, topk=8, num_groups=1, topk_groups=1, score="sigmoid", group_score="top2",
    normalize=True, scale=1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores, torch.topk of groups and of experts."""
    s = _scores(logits, score)
    biased = s if bias is None else s + bias.float()
    if num_groups > 1:
        groups = biased.unflatten(1, (num_groups, -1))  # [T, G, E/G]
        best = 1 if group_score == "max" else min(2, groups.shape[2])
        kept = groups.topk(best, -1).values.sum(-1).topk(topk_groups).indices
        masked = torch.ones(groups.shape[:2], dtype=torch.bool, device=s.device)
        masked.scatter_(1, kept, False)
        biased = groups.masked_fill(masked[..., None], -torch.inf).flatten(1)
    idx = biased.topk(topk).indices
    return _weights(s.gather(1, idx), normalize, scale), idx


def _weights(chosen: Tensor, normalize: bool, scale: float) -> Tensor:
    return scale * (chosen / (chosen.sum(-1, keepdim=True) + 1e-20) if normalize else chosen)


@baseline
def route_topk_backward(grad_weights, logits, idx, score="sigmoid", normalize=True, scale=1.0):
    """Autograd through scores and gather."""
    valid = (idx >= 0) & (idx < logits.shape[1])
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        chosen = _scores(logits, score).gather(1, idx.where(valid, 0)) * valid
        weights = _weights(chosen, normalize, scale)
        return torch.autograd.grad(weights, logits, grad_weights * valid)[0]


@baseline
def expert_dispatch(x, topk_idx, num_experts, x_scale=None, alignment=1) -> tuple:
    """Stable argsort, index_select."""
    (T, topk), E = topk_idx.shape, num_experts
    flat = topk_idx.flatten().long()
    expert = torch.where((flat >= 0) & (flat < E), flat, E)
    counts = torch.bincount(expert, minlength=E + 1)[:E]
    order = expert.argsort(stable=True)[: int(counts.sum())]
    rows = (T * topk + min(E, T * topk) * (alignment - 1)) // alignment * alignment
    row = torch.arange(len(order), device=x.device)
    if alignment > 1:
        padding = -counts % alignment
        row = row + (padding.cumsum(0) - padding)[expert[order]]

    def sort(source: Tensor) -> Tensor:
        source = source.view(torch.uint8) if source.dtype == FP8 else source  # not every op has FP8
        picked = source.index_select(0, order // max(topk, 1))
        if len(order) < rows:
            picked = source.new_zeros(rows, source.shape[1]).index_copy_(0, row, picked)
        return picked

    group_index = row.new_full((rows,), -1, dtype=torch.int32)
    group_index[row] = expert[order].int()
    handle = row.new_full((T * topk,), -1, dtype=torch.int32)
    handle[order] = row.int()
    scale = None if x_scale is None else sort(x_scale)
    return sort(x).view(x.dtype), scale, group_index, counts.int(), handle.view(T, topk)


@baseline
def expert_combine(y: Tensor, topk_weights: Tensor, handle: Tensor) -> Tensor:
    """index_select, multiply, index_add in fp32."""
    return _combine(y, topk_weights, handle).to(y.dtype)


def _combine(y: Tensor, topk_weights: Tensor | None, handle: Tensor) -> Tensor:
    T, topk = handle.shape
    valid = ((handle >= 0) & (handle < y.shape[0])).flatten()
    token = torch.arange(T, device=y.device).repeat_interleave(topk)[valid]
    picked = y.index_select(0, handle.flatten()[valid]).float()
    if topk_weights is not None:
        picked = picked * topk_weights.flatten()[valid, None].float()
    return torch.zeros(T, y.shape[1], device=y.device).index_add(0, token, picked)


@baseline
def expert_combine_backward(grad, y, topk_weights, handle) -> tuple[Tensor, Tensor]:
    """Autograd through index_select and index_add."""
    with torch.enable_grad():
        y, weights = y.detach().requires_grad_(), topk_weights.detach().requires_grad_()
        grads = torch.autograd.grad(_combine(y, weights, handle), (y, weights), grad.float())
    return grads[0], grads[1].float()


@baseline
def expert_dispatch_backward(grad: Tensor, handle: Tensor) -> Tensor:
    """index_select, index_add in fp32."""
    return _combine(grad, None, handle).to(grad.dtype)


def readable(op: str, args: tuple, x: Tensor) -> Tensor:
    """An output as numbers that may be compared with a tolerance.

    The FP8 cache format is unpacked; for chosen experts, their biased scores stand, because
    torch.topk may choose either of two equal ones.
    """
    if op == "mla_cache_append" and x.dtype == torch.uint8:
        return _unpack(x, args[0].shape[-1])
    if op == "route_topk" and x.dtype == torch.int64:
        s = _scores(args[0], args[5])
        return (s if args[1] is None else s + args[1].float()).gather(1, x)
    return x
