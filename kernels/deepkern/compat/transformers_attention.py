"""The forward pass of transformers' latent attention (V2, V3, V3.2) on deepkern's ops.

Many new tokens expand the latents of their keys and attend with `mla_prefill`, which has a
backward.  Few new tokens behind many cached ones absorb the up-projection of the keys into their
queries and attend to the cached latents with `mla_decode`.  With more than `index_topk` tokens,
V3.2 attends to the tokens that its indexer selects, with `mla_sparse_prefill`, which has a
backward, or `mla_sparse_decode`.

`self` is an attention module of transformers.  Its projections, rotary functions and indexer run
as they are.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C; DeepSeek-V3.2 (arXiv
2512.02556).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ..attention.mla_decode import mla_decode
from ..attention.mla_prefill import mla_prefill
from ..attention.mla_sparse_decode import mla_sparse_decode
from ..attention.mla_sparse_prefill import mla_sparse_prefill
from ..quant.cast_back import cast_back
from .transformers_cache import PAGE, append_latents, check_cache
from .transformers_layers import needs_gradient
from .transformers_rows import Rows, RowsMemo, visible_keys

IMPLEMENTATIONS = "eager", "sdpa"


def attention_forward(
    self,
    hidden_states: Tensor,
    *,
    position_embeddings,
    attention_mask: Tensor | None = None,
    past_key_values=None,
    **kwargs,
) -> tuple[Tensor, None]:
    """hidden_states [B, S, hidden] -> [B, S, hidden], None for the attention weights."""
    check_call(self, past_key_values, kwargs)
    q, q_latent, latent, k_rope = project(self, hidden_states, position_embeddings)
    past = 0 if past_key_values is None else int(past_key_values.get_seq_length(self.layer_idx))
    memo: RowsMemo = self.deepkern_rows
    rows = memo.read(attention_mask, *hidden_states.shape[:2], past, hidden_states.device)

    storage = None
    if past_key_values is None:
        latents = torch.cat([latent, k_rope], -1)[:, 0]
    elif needs_gradient(q, latent, *self.kv_b_proj.parameters()):
        # The storage is written in place, which autograd does not allow.
        layer = past_key_values.update(latent, k_rope, self.layer_idx)
        latents = torch.cat(layer, -1)[:, 0]
    else:
        latents = storage = append_latents(past_key_values, self.layer_idx, latent, k_rope)

    indices = None
    if hasattr(self, "indexer"):
        call = hidden_states, q_latent, position_embeddings, attention_mask, past_key_values
        indices = select_tokens(self, rows, *call)
    if indices is not None:
        out = sparse_attention(self, q, latents, indices, storage is not None)
    elif storage is not None and prefers_absorbed(self, rows):
        out = absorbed_attention(self, q, storage, rows)
    else:
        out = expanded_attention(self, q, latents, rows)
    return self.o_proj(out), None


def check_call(self, cache, kwargs: dict) -> None:
    """Raises ValueError for what the patched attention does not compute."""
    implementation = self.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError("patch_transformers: attn_implementation: expected "
                         f"{' or '.join(IMPLEMENTATIONS)}, got {implementation!r}")  # fmt: skip
    if self.training and self.attention_dropout > 0:
        raise ValueError("patch_transformers: attention_dropout: expected 0 in training, "
                         f"got {self.attention_dropout}")  # fmt: skip
    if kwargs.get("output_attentions"):
        raise ValueError(
            "patch_transformers: output_attentions: the attention weights do not exist"
        )
    if cache is not None:
        check_cache(cache)


def project(self, hidden_states: Tensor, position_embeddings) -> tuple[Tensor, ...]:
    """hidden_states [B, S, hidden] -> what the attention reads of it.

    Returns:
        q: [B, S, H, nope + rope], its last values rotated.
        q_latent: [B, S, q_lora_rank], or None without a query latent.
        latent: [B, 1, S, R], normalized.
        k_rope: [B, 1, S, D], rotated.
    """
    B, S = hidden_states.shape[:2]
    q_latent = None
    if self.q_lora_rank is None:
        q = self.q_proj(hidden_states)
    else:
        q_latent = self.q_a_layernorm(self.q_a_proj(hidden_states))
        q = self.q_b_proj(q_latent)
    q = q.view(B, S, -1, self.qk_head_dim)
    q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
    latent_and_key = self.kv_a_proj_with_mqa(hidden_states)
    latent, k_rope = latent_and_key.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
    latent = self.kv_a_layernorm(latent)[:, None]
    q_rope, k_rope = rotate(self, q_rope.transpose(1, 2), k_rope[:, None], position_embeddings)
    return torch.cat([q_nope, q_rope.transpose(1, 2)], -1), q_latent, latent, k_rope


def rotate(self, q_rope: Tensor, k_rope: Tensor, position_embeddings) -> tuple[Tensor, Tensor]:
    """Rotates [B, H, S, D] and [B, 1, S, D] by transformers' function for this model."""
    module = sys.modules[type(self).__module__]
    if hasattr(module, "apply_rotary_emb"):  # V2
        return module.apply_rotary_emb(q_rope, k_rope, position_embeddings.to(q_rope.device))
    interleave = getattr(self.config, "rope_interleave", True)
    name = "apply_rotary_pos_emb_interleave" if interleave else "apply_rotary_pos_emb"
    return getattr(module, name)(q_rope, k_rope, *position_embeddings)


def prefers_absorbed(self, rows: Rows) -> bool:
    """Whether attention to the latents costs less than to keys and values expanded from them.

    Per key and head: S·(2R + D) products against S·(nope + D + v) and R·(nope + v) to expand.
    """
    if rows.S > 1 and (rows.mask is not None or not rows.past):
        return False
    if not has_plain_weight(self.kv_b_proj):
        return False
    R, expanded = self.kv_lora_rank, self.qk_nope_head_dim + self.v_head_dim
    return rows.S * (2 * R - expanded) < R * expanded


def expanded_attention(self, q: Tensor, latents: Tensor, rows: Rows) -> Tensor:
    """q [B, S, H, nope + rope], latents [B, T or more, R + D] -> [B, S, H·v]."""
    keys = rows.packed_keys(latents)
    latent, k_rope = keys.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
    expanded = self.kv_b_proj(latent).unflatten(1, (q.shape[2], -1))
    k_nope, v = expanded.split([self.qk_nope_head_dim, self.v_head_dim], -1)
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, q.shape[2], -1)], -1)
    q = rows.packed_queries(q)
    # Under autocast the projections have another dtype than the rotated parts.
    q, k = q.to(v.dtype), k.to(v.dtype)
    out, _ = mla_prefill(q, k, v, rows.cu_seqlens_q, rows.cu_seqlens_k, self.scaling)
    return rows.padded_queries(out.flatten(1))


def absorbed_attention(self, q: Tensor, storage: Tensor, rows: Rows) -> Tensor:
    """q [B, S, H, nope + rope], storage [B, capacity, R + D] -> [B, S, H·v]."""
    page, table = self.deepkern_rows.pages(storage.shape[1], PAGE)
    cache = storage.view(-1, page, 1, storage.shape[2])
    q = absorb_keys(self, q)
    out, _ = mla_decode(q, cache, table, rows.lengths, self.scaling, v_head_dim=self.kv_lora_rank)
    return expand_values(self, out)


def has_plain_weight(linear: nn.Module) -> bool:
    """False for a Linear with an adapter, whose weight is not all that it applies."""
    return type(linear).__name__ in ("Linear", "FP8Linear")


def latent_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """kv_b_proj by head, W_uk [H, nope, R] and W_uv [H, v, R].

    An FP8 weight is dequantized once, and again when it changes.
    """
    weight = self.kv_b_proj.weight
    if weight.element_size() == 1:
        source = weight.data_ptr(), weight._version, dtype
        if self.deepkern_kv_b_proj is None or self.deepkern_kv_b_proj[0] != source:
            scale = self.kv_b_proj.weight_scale_inv.detach().float()
            real = cast_back(weight.detach(), scale, self.kv_b_proj.block_size, dtype)
            self.deepkern_kv_b_proj = source, real
        weight = self.deepkern_kv_b_proj[1]
    by_head = weight.view(-1, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)
    return by_head.split([self.qk_nope_head_dim, self.v_head_dim], 1)


def absorb_keys(self, q: Tensor) -> Tensor:
    """q [B, S, H, nope + rope] -> [B, S, H, R + D]: W_ukᵀ·q of the first part of each head."""
    w_uk, _ = latent_weights(self, q.dtype)
    q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
    absorbed = torch.matmul(q_nope.flatten(0, 1).transpose(0, 1), w_uk)  # [H, B·S, R]
    return torch.cat([absorbed.transpose(0, 1).unflatten(0, q.shape[:2]), q_rope], -1)


def expand_values(self, out: Tensor) -> Tensor:
    """out [B, S, H, R] -> [B, S, H·v]: W_uv·out of each head."""
    _, w_uv = latent_weights(self, out.dtype)
    values = torch.matmul(out.flatten(0, 1).transpose(0, 1), w_uv.transpose(1, 2))  # [H, B·S, v]
    return values.transpose(0, 1).reshape(*out.shape[:2], -1)


def select_tokens(
    self, rows: Rows, hidden_states: Tensor, q_latent: Tensor, position_embeddings, mask, cache
) -> Tensor | None:
    """The tokens that the indexer of V3.2 selects, int32 [B, S, topk], -1 for none.

    None if it selects every token.  Its cache gets the new keys in either case.
    """
    indexer = self.indexer
    if rows.num_columns <= indexer.index_topk:
        if cache is not None:
            append_indexer_keys(self, hidden_states, position_embeddings, cache)
        return None
    chosen = indexer(
        hidden_states, q_latent, position_embeddings, mask[:, 0], None, past_key_values=cache
    )
    visible = visible_keys(mask)[:, 0].expand(len(chosen), -1, -1)
    return chosen.masked_fill(~visible.gather(-1, chosen.long()), -1)


@torch.no_grad()
def append_indexer_keys(self, hidden_states: Tensor, position_embeddings, cache) -> None:
    """Caches the keys of the indexer, as its forward pass does before it computes scores."""
    indexer = self.indexer
    k = indexer.k_norm(indexer.wk(hidden_states))[:, :, None]  # [B, S, 1, D]
    rope = indexer.qk_rope_head_dim
    rotary = sys.modules[type(self).__module__].apply_rotary_pos_emb
    _, k_rope = rotary(k[..., :rope], k[..., :rope], *position_embeddings, unsqueeze_dim=2)
    k = torch.cat([k_rope, k[..., rope:]], -1)[:, :, 0]
    cache.update_indexer(k, self.layer_idx)


def sparse_attention(
    self, q: Tensor, latents: Tensor, indices: Tensor, without_gradient: bool
) -> Tensor:
    """q [B, S, H, nope + rope], latents [B, capacity, R + D] -> [B, S, H·v].

    indices: int32 [B, S, topk], the columns of the tokens to attend to, -1 for none.
    """
    if not has_plain_weight(self.kv_b_proj):
        kind = type(self.kv_b_proj).__name__
        raise ValueError("patch_transformers: kv_b_proj: with more than index_topk tokens expected "
                         f"Linear or FP8Linear, got {kind}")  # fmt: skip
    (B, S), capacity, R = q.shape[:2], latents.shape[1], self.kv_lora_rank
    offsets = torch.arange(B, dtype=torch.int32, device=q.device)[:, None, None] * capacity
    slots = torch.where(indices < 0, indices, indices + offsets)
    q = absorb_keys(self, q)
    if S == 1 and without_gradient:
        cache = latents.view(-1, PAGE, 1, latents.shape[2])
        out, _ = mla_sparse_decode(q, cache, slots, self.scaling, v_head_dim=R)
        return expand_values(self, out)
    kv = latents.reshape(B * capacity, 1, -1)
    slots = slots.flatten(0, 1)[:, None]
    out, _, _ = mla_sparse_prefill(q.flatten(0, 1), kv, slots, self.scaling, v_head_dim=R)
    return expand_values(self, out.unflatten(0, (B, S)))
