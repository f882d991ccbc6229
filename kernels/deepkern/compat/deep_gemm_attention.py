"""DeepGEMM's attention logits (csrc/apis/attention.hpp of 2.6.1) under its names.

Any number of heads, head dimension, page size and next_n is supported. Logits outside a query's
range are -inf, with or without `clean_logits`. The result is contiguous; the rows of DeepGEMM's
result have a pitch that is a multiple of 1024 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

import deepkern

from ..runtime.contract import check_that
from .deep_gemm_operands import check

__all__ = ["fp8_mqa_logits", "fp8_paged_mqa_logits", "get_paged_mqa_logits_metadata"]


def fp8_mqa_logits(
    q: Tensor, kv: tuple[Tensor, Tensor], weights: Tensor, cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor, clean_logits: bool = True, max_seqlen_k: int = 0,
) -> Tensor:  # fmt: skip
    """fp32 [S, Skv]: `mqa_logits` of q FP8 [S, H, D], kv (FP8 [Skv, D], scale fp32 [Skv]).

    weights: fp32 [S, H]; cu_seq_len_k_start and cu_seq_len_k_end: int32 [S], the keys of a query.
    With `max_seqlen_k`, the result is [S, max_seqlen_k]: column j is the query's key start + j, and
    clean_logits must be False. This costs one more pass over the result.
    """
    function = "fp8_mqa_logits"
    if not isinstance(kv, (tuple, list)) or len(kv) != 2:
        got = type(kv).__name__
        raise TypeError(f"{function}: kv: expected a pair (FP8 data, scale), got {got}")
    starts, ends = cu_seq_len_k_start, cu_seq_len_k_end
    check(function, {"q": (q, "fp8 [S, H, D]"), "kv[0]": (kv[0], "fp8 [Skv, D]"),
                     "kv[1]": (kv[1], "fp32 [Skv]"), "weights": (weights, "fp32 [S, H]"),
                     "cu_seq_len_k_start": (starts, "int32 [S]"),
                     "cu_seq_len_k_end": (ends, "int32 [S]")})  # fmt: skip
    check_that(function, "max_seqlen_k", max_seqlen_k >= 0, "0 or more", max_seqlen_k)
    check_that(function, "clean_logits", not (clean_logits and max_seqlen_k),
               "False with max_seqlen_k", clean_logits)  # fmt: skip
    logits = deepkern.mqa_logits(q, *kv, weights, starts, ends)
    if max_seqlen_k == 0:
        return logits
    Skv = kv[0].shape[0]
    logits = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)  # column of missing keys
    key = starts.clamp(0, Skv)[:, None] + torch.arange(max_seqlen_k, device=q.device)
    return logits.gather(1, key.clamp(max=Skv))


def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None = None
) -> Tensor:
    """int32 [num_sms + 1, 2] of zeros: deepkern's kernel needs no schedule."""
    return context_lens.new_zeros((num_sms + 1, 2), dtype=torch.int32)


def fp8_paged_mqa_logits(
    q: Tensor, kv_cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    schedule_meta: Tensor | None, max_context_len: int, clean_logits: bool = False,
    indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """fp32 [B * next_n, max_context_len]: `paged_mqa_logits` of q FP8 [B, next_n, H, D].

    kv_cache: uint8 [blocks, page, 1, D + 4]; a page holds all its values, then all its scales.
    weights: fp32 [B * next_n, H].
    context_lens: int32 [B, next_n], the tokens that each query attends to, or, as in earlier
        releases, int32 [B], those of the last query.
    block_table: int32 [B, P].
    schedule_meta, indices: have no effect.
    """
    check("fp8_paged_mqa_logits", {
        "q": (q, "fp8 [B, next_n, H, D]"), "kv_cache": (kv_cache, "uint8 [blocks, page, 1, _]"),
        "weights": (weights, "fp32 [_, H]"), "context_lens": (context_lens, "int32 [...]"),
        "block_table": (block_table, "int32 [B, P]"),
    })  # fmt: skip
    return deepkern.paged_mqa_logits(
        q, kv_cache, weights, context_lens, block_table, max_context_len
    )
