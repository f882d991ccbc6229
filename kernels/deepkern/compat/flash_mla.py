"""FlashMLA's functions, computed by deepkern.

    import deepkern.compat.flash_mla as flash_mla

Names, arguments, their order and defaults are those of flash_mla/flash_mla_interface.py of
https://github.com/deepseek-ai/FlashMLA, commit 9241ae3, and `enable_batch_invariant` of commit
136b361. Calls of earlier releases, which passed two tensors from `get_mla_metadata` to
`flash_mla_with_kvcache`, are accepted too. A name of FlashMLA that is missing here raises an
AttributeError with the alternative. In all functions

- Any number of heads, any page size and any widths are supported, not only 576 and 512.
- Kernels read the lengths on the device and split the work by them. The metadata that
  `get_mla_metadata` returns is empty, so it cannot be stale when a CUDA graph is replayed.
- Results are deterministic and batch-invariant.
- A query without keys gets out = 0, and from the decoding functions lse = +inf, as in FlashMLA.
  (deepkern's ops return -inf, which `deepkern.merge_states` needs.)

TypeError and ValueError name deepkern's op and its argument, or the function of this module.
"""

from __future__ import annotations

import torch
from torch import Tensor

import deepkern

from ..runtime.contract import FP8, check_choice, check_that
from .unsupported import FLASH_MLA, module_getattr

__getattr__ = module_getattr(__name__, FLASH_MLA)


class FlashMLASchedMeta:
    """Empty metadata, valid for calls of any shape."""


def get_mla_metadata(*args, **kwargs) -> tuple[FlashMLASchedMeta, None]:
    """(empty metadata, None) for any arguments: deepkern needs no schedule."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor, k_cache: Tensor, block_table: Tensor | None, cache_seqlens: Tensor | None,
    head_dim_v: int, tile_scheduler_metadata: object = None, num_splits: object = None,
    softmax_scale: float | None = None, causal: bool = False, is_fp8_kvcache: bool = False,
    indices: Tensor | None = None, attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None, extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None, extra_topk_length: Tensor | None = None,
    enable_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of new queries over the paged latent cache.

    Calls `deepkern.mla_decode`, or with `indices` `deepkern.mla_sparse_decode`.

    Args:
        q: [B, Sq, H, R + D], bf16, fp16 or fp32.
        k_cache: [blocks, page, 1, R + D] in q's dtype or another, or with `is_fp8_kvcache` the
            FP8 format [blocks, page, 1, 656] as uint8, int8 or float8_e4m3fn. Dense and sparse
            attention support both; FlashMLA supports bf16 for dense and FP8 for sparse only.
        block_table, cache_seqlens: int32 [B, P] and [B]; ignored with `indices`.
        head_dim_v: R.
        tile_scheduler_metadata, num_splits: ignored.
        softmax_scale: (R + D)^-1/2 by default.
        causal: each of the Sq new tokens attends to the tokens up to itself; not with `indices`.
        indices: int32 [B, Sq, topk], page * page_size + offset; -1 and indices outside the cache
            are masked.
        attn_sink: fp32 [H]; multiplies out by exp(lse) / (exp(lse) + exp(sink)), not lse.
        topk_length: int32 [B], the number of valid indices of each sequence.
        extra_k_cache, extra_indices_in_kvcache, extra_topk_length: a second cache to attend to as
            well, with its indices. The results over the two caches, each rounded to q's dtype, are
            merged in fp32; lse covers both.
        enable_batch_invariant: no effect; results always are.

    Returns:
        out [B, Sq, H, R] in q's dtype; lse fp32 [B, H, Sq], +inf for a query without keys.
    """
    function = "flash_mla_with_kvcache"
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    cache = _bytes(function, "k_cache", k_cache, is_fp8_kvcache)
    if indices is None:
        for name, value in (
            ("attn_sink", attn_sink), ("topk_length", topk_length),
            ("extra_k_cache", extra_k_cache), ("extra_topk_length", extra_topk_length),
            ("extra_indices_in_kvcache", extra_indices_in_kvcache),
        ):  # fmt: skip
            check_that(function, name, value is None, "None without indices", "a tensor")
        for name, value in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
            check_that(function, name, value is not None, "a tensor without indices", None)
        out, lse = deepkern.mla_decode(
            q, cache, block_table, cache_seqlens, softmax_scale, causal, head_dim_v
        )
        return out, lse_neg_inf_to_pos_inf(lse)
    check_that(function, "causal", not causal, "False with indices", causal)
    if extra_k_cache is None:
        for name, value in (
            ("extra_indices_in_kvcache", extra_indices_in_kvcache),
            ("extra_topk_length", extra_topk_length),
        ):
            check_that(function, name, value is None, "None without extra_k_cache", "a tensor")
        out, lse = deepkern.mla_sparse_decode(
            q, cache, indices, softmax_scale, topk_length, attn_sink, head_dim_v
        )
        return out, lse_neg_inf_to_pos_inf(lse)
    check_that(function, "extra_indices_in_kvcache", extra_indices_in_kvcache is not None,
               "a tensor with extra_k_cache", None)  # fmt: skip
    extra = _bytes(function, "extra_k_cache", extra_k_cache, is_fp8_kvcache)
    states = []
    for entries, index, length in (
        (cache, indices, topk_length),
        (extra, extra_indices_in_kvcache, extra_topk_length),
    ):
        out, lse = deepkern.mla_sparse_decode(
            q, entries, index, softmax_scale, length, None, head_dim_v
        )
        states += [out.float(), lse]
    out, lse = deepkern.merge_states(*states)
    if attn_sink is not None:  # after the merge, so that the sink counts once
        weight = torch.sigmoid(lse - attn_sink[:, None]).mT[..., None]
        out = torch.where((lse == -torch.inf).mT[..., None], out, out * weight)
    return out.to(q.dtype), lse_neg_inf_to_pos_inf(lse)


def flash_mla_sparse_fwd(
    q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, d_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sparse attention of a prompt: `deepkern.mla_sparse_prefill`, gradients included.

    Args:
        q: [Sq, H, R + D].
        kv: [Skv, 1, R + D].
        indices: int32 [Sq, 1, topk], rows of kv; -1 and indices outside [0, Skv) are masked.
        sm_scale: multiplies the scores.
        d_v: R.
        attn_sink: fp32 [H]; multiplies out by exp(lse) / (exp(lse) + exp(sink)).
        topk_length: int32 [Sq], the number of valid indices of each query. Later indices are not
            read, so a row with NaN there has no effect.

    Returns:
        out [Sq, H, R], max_logits and lse fp32 [Sq, H]; -inf and +inf for a query without keys.
    """
    out, max_logits, lse = deepkern.mla_sparse_prefill(
        q, kv, indices, sm_scale, d_v, attn_sink, topk_length
    )
    return out, max_logits, lse_neg_inf_to_pos_inf(lse)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_qo: Tensor, cu_seqlens_kv: Tensor,
    max_seqlen_qo: int, max_seqlen_kv: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of prompts with keys and values: `deepkern.mla_prefill`, gradients included.

    Args:
        q: [T, H, Dqk]. k: [Tk, Hk, Dqk]. v: [Tk, Hk, Dv].
        cu_seqlens_qo, cu_seqlens_kv: int32 [B + 1], the first row of each sequence, and the end.
        max_seqlen_qo, max_seqlen_kv, is_varlen: ignored.
        dropout_p: must be 0.
        softmax_scale: Dqk^-1/2 by default.
        causal: aligned to the end, so the last query attends to all keys.
        deterministic: ignored; forward and backward always are. (FlashMLA refuses True.)

    Returns:
        out [T, H, Dv]; lse fp32 [T, H], a transposed view; -inf for a query without keys.
        Gradients go through `out` to q, k and v, also for Hk < H, which FlashMLA refuses.
    """
    check_choice("flash_attn_varlen_func", "dropout_p", dropout_p, (0.0,))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = deepkern.mla_prefill(q, k, v, cu_seqlens_qo, cu_seqlens_kv, scale, causal)
    return out, lse.mT


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, head_dim_qk: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`flash_attn_varlen_func` of packed qkv [T, H, Dqk + Dqk + Dv]."""
    q, k = qkv[..., :head_dim_qk], qkv[..., head_dim_qk : 2 * head_dim_qk]
    return flash_attn_varlen_func(
        q, k, qkv[..., 2 * head_dim_qk :], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, softmax_scale, causal, deterministic, is_varlen,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_qo: Tensor, cu_seqlens_kv: Tensor, max_seqlen_qo: int,
    max_seqlen_kv: int, head_dim_qk: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`flash_attn_varlen_func` of packed kv [Tk, Hk, Dqk + Dv]."""
    return flash_attn_varlen_func(
        q, kv[..., :head_dim_qk], kv[..., head_dim_qk:], cu_seqlens_qo, cu_seqlens_kv,
        max_seqlen_qo, max_seqlen_kv, dropout_p, softmax_scale, causal, deterministic, is_varlen,
    )  # fmt: skip


def _bytes(function: str, name: str, cache: Tensor, is_fp8: bool) -> Tensor:
    """The cache with entries of the FP8 format as uint8, after a check of `is_fp8_kvcache`."""
    one_byte = cache.dtype in (torch.uint8, torch.int8, FP8)
    check_that(function, "is_fp8_kvcache", is_fp8 == one_byte,
               f"{one_byte} for {name} of {cache.dtype}", is_fp8)  # fmt: skip
    return cache.view(torch.uint8) if one_byte else cache


def lse_neg_inf_to_pos_inf(lse: Tensor) -> Tensor:
    """lse with +inf in place of -inf, FlashMLA's value for a query without keys."""
    return torch.where(lse == -torch.inf, torch.inf, lse)
