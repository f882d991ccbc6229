"""What a call costs at least: the bytes that have to move and the operations that have to be done.

Bytes are every tensor in and out once, unless the op touches only part of one; then a function here
says how much. Operations are the multiplications and additions of matrix products; an op without
any has no entry and no TFLOPS.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensor_bytes(*values) -> int:
    """Bytes of all the tensors in `values`."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))


def _cached_tokens(args: tuple) -> int:
    """Tokens that an mla_decode call reads, all sequences together."""
    _, cache, block_table, cache_seqlens = args[:4]
    capacity = block_table.shape[1] * cache.shape[1]
    return int(cache_seqlens.clamp(0, capacity).sum())


def _mla_decode_bytes(args: tuple, out) -> int:
    q, cache = args[:2]
    token = cache.shape[-1] * cache.element_size()
    return _cached_tokens(args) * token + tensor_bytes(q, args[2], args[3], out)


def _mla_decode_flops(args: tuple, out) -> int:
    q, v_head_dim = args[0], args[6]
    per_token = 2 * q.shape[1] * q.shape[2] * (q.shape[3] + v_head_dim)
    return _cached_tokens(args) * per_token


def _mla_cache_append_bytes(args: tuple, out) -> int:
    latent, k_rope, cache, slots = args[:4]
    written = int((slots >= 0).sum()) * cache.shape[-1] * cache.element_size()
    return tensor_bytes(latent, k_rope, slots) + written


def _mla_cache_gather_bytes(args: tuple, out) -> int:
    cache, table, cu_seqlens = args[:3]
    tokens = int(cu_seqlens[-1] - cu_seqlens[0])
    return tokens * cache.shape[-1] * cache.element_size() + tensor_bytes(table, cu_seqlens, out)


def _named_tokens(indices: Tensor, slots: int, topk_length: Tensor | None) -> int:
    """Indices of a sparse attention that count."""
    counts = (indices >= 0) & (indices < slots)
    if topk_length is not None:
        place = torch.arange(indices.shape[-1], device=indices.device)
        counts &= place < topk_length[:, None, None]
    return int(counts.sum())


def _mla_sparse_decode_bytes(args: tuple, out) -> int:
    """A token is read once for each query that names it."""
    q, cache, indices, _, topk_length = args[:5]
    tokens = _named_tokens(indices, cache.shape[0] * cache.shape[1], topk_length)
    return tokens * cache.shape[-1] * cache.element_size() + tensor_bytes(q, indices, out)


def _mla_sparse_decode_flops(args: tuple, out) -> int:
    q, cache, indices, _, topk_length, _, v_head_dim = args
    tokens = _named_tokens(indices, cache.shape[0] * cache.shape[1], topk_length)
    return tokens * 2 * q.shape[2] * (q.shape[3] + v_head_dim)


def _mla_sparse_prefill_bytes(args: tuple, out) -> int:
    q, kv, indices = args[:3]
    tokens = _named_tokens(indices, len(kv), args[6])
    return tokens * kv.shape[-1] * kv.element_size() + tensor_bytes(q, indices, out)


def _mla_sparse_prefill_flops(args: tuple, out) -> int:
    q, kv, indices, _, v_head_dim = args[:5]
    return _named_tokens(indices, len(kv), args[6]) * 2 * q.shape[1] * (q.shape[2] + v_head_dim)


def _mla_sparse_prefill_backward_bytes(args: tuple, out) -> int:
    kv, indices = args[3:5]
    tokens = _named_tokens(indices, len(kv), args[9])
    return tokens * kv.shape[-1] * kv.element_size() + tensor_bytes(args, out) - tensor_bytes(kv)


def _mla_sparse_prefill_backward_flops(args: tuple, out) -> int:
    """Scores, gradients of weights and of q, and both parts of kv's gradient."""
    q, kv, indices, forward_out = args[2:6]
    per_token = 2 * q.shape[1] * (3 * q.shape[2] + 2 * forward_out.shape[-1])
    return _named_tokens(indices, len(kv), args[9]) * per_token


def _mqa_logits_flops(args: tuple, out) -> int:
    q, kv, _, _, starts, ends = args
    starts, ends = (x.clamp(0, len(kv)).long() for x in (starts, ends))
    return 2 * q.shape[1] * q.shape[2] * int((ends - starts).clamp(min=0).sum())


def _seen_tokens(args: tuple) -> tuple[int, int]:
    """Cached tokens that a paged_mqa_logits call reads, and pairs of a query and a token."""
    q, cache, _, lengths, table, width = args
    lengths = lengths.clamp(0, table.shape[1] * cache.shape[1]).long()
    if lengths.dim() == 1:
        lengths = lengths[:, None] - torch.arange(q.shape[1], device=q.device).flip(0)
    lengths = lengths.clamp(0, width)  # [B, next_n]
    return int(lengths.amax(1).sum()) if lengths.numel() else 0, int(lengths.sum())


def _paged_mqa_logits_bytes(args: tuple, out) -> int:
    q, cache, weights, lengths, table, _ = args
    token = cache.shape[-1] * _seen_tokens(args)[0]
    return token + tensor_bytes(q, weights, lengths, table, out)


def _paged_mqa_logits_flops(args: tuple, out) -> int:
    return 2 * args[0].shape[2] * args[0].shape[3] * _seen_tokens(args)[1]


def _indexer_cache_append_bytes(args: tuple, out) -> int:
    k, cache, slots = args[:3]
    return tensor_bytes(k, slots) + int((slots >= 0).sum()) * cache.shape[-1]


def visible_pairs(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> int:
    """Pairs of a query and a key that it sees, of one head, all sequences together."""
    ragged = [cu.clamp(0, x.shape[0]).cummax(0).values.diff() for cu, x in ((cu_q, q), (cu_k, k))]
    pairs = 0
    for Lq, Lk in zip(*(x.tolist() for x in ragged), strict=True):
        rows = min(Lq, Lk)  # the last of them sees Lk keys, the one before it a key less
        pairs += rows * Lk - rows * (rows - 1) // 2 if causal else Lq * Lk
    return pairs


def _mla_prefill_flops(args: tuple, out) -> int:
    q, k, v, cu_q, cu_k, _, causal = args
    per_pair = 2 * q.shape[1] * (q.shape[2] + v.shape[2])
    return per_pair * visible_pairs(q, k, cu_q, cu_k, causal)


def _mla_prefill_backward_flops(args: tuple, out) -> int:
    """Of five products, the least that do; ours recomputes two of them."""
    _, q, k, v, _, _, cu_q, cu_k, _, causal, _ = args
    per_pair = 2 * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2])
    return per_pair * visible_pairs(q, k, cu_q, cu_k, causal)


def _gemm_nt_flops(args: tuple, out) -> int:
    a, b = args[0], args[2]
    return 2 * a.shape[0] * a.shape[1] * b.shape[0]


def _contiguous_flops(args: tuple, out) -> int:
    a, b, group_index = args[0], args[2], args[4]
    rows = int(((group_index >= 0) & (group_index < b.shape[0])).sum())
    return 2 * rows * a.shape[1] * b.shape[1]


def _masked_flops(args: tuple, out) -> int:
    a, b, masked_m = args[0], args[2], args[4]
    return 2 * int(masked_m.clamp(0, a.shape[1]).sum()) * a.shape[2] * b.shape[1]


def _assignments(args: tuple) -> Tensor:
    """The experts of all assignments to one: those that an op of the expert layer computes."""
    topk_idx, w13 = args[2], args[-4]
    return topk_idx[(topk_idx >= 0) & (topk_idx < len(w13))]


def _moe_bytes(args: tuple, out) -> int:
    """Without the weights of experts that have no rows, and what lies between the steps."""
    used = len(_assignments(args).unique())
    return tensor_bytes(args[:-4], out) + sum(tensor_bytes(w[0]) * used for w in args[-4:])


def _moe_flops(args: tuple, out) -> int:
    w13, w2 = args[-4], args[-2]
    return 2 * _assignments(args).numel() * (w13[0].numel() + w2[0].numel())


BYTES = {
    "moe_forward": _moe_bytes,
    "moe_forward_backward": _moe_bytes,
    "mla_decode": _mla_decode_bytes,
    "mla_sparse_decode": _mla_sparse_decode_bytes,
    "mla_sparse_prefill": _mla_sparse_prefill_bytes,
    "mla_sparse_prefill_backward": _mla_sparse_prefill_backward_bytes,
    "mla_cache_append": _mla_cache_append_bytes,
    "indexer_cache_append": _indexer_cache_append_bytes,
    "paged_mqa_logits": _paged_mqa_logits_bytes,
    "mla_cache_gather": _mla_cache_gather_bytes,
}
FLOPS = {
    "moe_forward": _moe_flops,
    "moe_forward_backward": _moe_flops,
    "fp8_gemm_nt": _gemm_nt_flops,
    "k_grouped_fp8_gemm_nt": _gemm_nt_flops,
    "m_grouped_fp8_gemm_nt_contiguous": _contiguous_flops,
    "m_grouped_fp8_gemm_nt_masked": _masked_flops,
    "mla_decode": _mla_decode_flops,
    "mla_sparse_decode": _mla_sparse_decode_flops,
    "mla_sparse_prefill": _mla_sparse_prefill_flops,
    "mla_sparse_prefill_backward": _mla_sparse_prefill_backward_flops,
    "mqa_logits": _mqa_logits_flops,
    "paged_mqa_logits": _paged_mqa_logits_flops,
    "mla_prefill": _mla_prefill_flops,
    "mla_prefill_backward": _mla_prefill_backward_flops,
}
# Whose roof is the FP8 rate of the tensor cores.
FP8_PRODUCTS = {op for op in FLOPS if any(x in op for x in ("fp8_gemm", "mqa_logits", "moe"))}


def cost(op_name: str, args: tuple, out) -> tuple[int, int]:
    """(bytes, operations) of one call."""
    count = BYTES.get(op_name, lambda args, out: tensor_bytes(args, out))
    return count(args, out), FLOPS.get(op_name, lambda args, out: 0)(args, out)
