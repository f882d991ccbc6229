"""Multi-head latent attention over a paged cache.

Keys and values of head h come from one latent c per token: k = W_uk[h]·c and v = W_uv[h]·c.  The
cache holds c and one rotated key part that all heads use.

A token of a prompt expands the latents of the keys and attends to them with `mla_prefill`: least
arithmetic for many queries.  A generated token absorbs W_uk into its query, q·k = (W_ukᵀ[h]·q)·c,
attends to the latents themselves with `mla_decode`, and applies W_uv to the result: least memory
traffic for one query.  With an indexer (V3.2) every token attends to the tokens that it selects,
with `mla_sparse_decode`.

Source: DeepSeek-V2 report (arXiv:2405.04434), section 2.1 and appendix C; DeepSeek-V3.2-Exp report.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import deepkern
from model.batch import PrefillStep, TokenBatch
from model.cache import LayerCache
from model.checkpoint import Checkpoint
from model.config import LATENT_NORM_EPS, Config
from model.indexer import Indexer
from model.linear import Linear, RMSNorm, Rows
from model.ranks import ALONE, Ranks
from model.rope import apply_rope, interleave_pairs
from model.weights import WHOLE, Precision, frozen, load_real, random_weight


class LatentProjection(nn.Module):
    """kv_b_proj, real with `fp8` too: weight [H, nope + v, R], W_uk and W_uv of each head.

    key [H, R, nope] is W_ukᵀ again, contiguous along the dimension that decoding sums over.  It is
    no part of the state; `store` replaces both.

    own: the heads of this rank, H of them.
    """

    def __init__(self, config: Config, precision: Precision, own: slice) -> None:
        super().__init__()
        c, self.precision, self.own = config, precision, own
        self.heads, self.nope = own.stop - own.start, c.qk_nope_head_dim
        weight = random_weight(self.heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        self.store(weight.to(precision.dtype))
        self.register_load_state_dict_post_hook(lambda module, _: module.store(module.weight.data))

    def store(self, weight: Tensor) -> None:
        self.weight = frozen(weight)
        key = weight[:, : self.nope].transpose(1, 2).contiguous()
        self.register_buffer("key", key, persistent=False)

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        weight = load_real(checkpoint, f"{name}.weight", self.precision)
        outputs = self.weight.shape[1]  # of a head
        self.store(weight.unflatten(0, (-1, outputs))[self.own])

    def keys_and_values(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [T, R] -> keys without position [T, H, nope], values [T, H, v]."""
        both = deepkern.gemm_nt(latent, self.weight.flatten(0, 1)).unflatten(1, (self.heads, -1))
        return both[..., : self.nope], both[..., self.nope :]

    def absorb(self, q_nope: Tensor, head_index: Tensor) -> Tensor:
        """W_ukᵀ·q: [M, H, nope] -> [M, H, R]."""
        return self.by_head(q_nope, self.key, head_index)

    def expand(self, latent: Tensor, head_index: Tensor) -> Tensor:
        """W_uv·latent: [M, H, R] -> [M, H·v]."""
        return self.by_head(latent, self.weight[:, self.nope :], head_index).flatten(1)

    def by_head(self, x: Tensor, weight: Tensor, head_index: Tensor) -> Tensor:
        """x [M, H, K] times the weight [H, N, K] of each head -> [M, H, N].

        head_index: int32 [H·M], the head of each row when the rows are sorted by head.
        """
        rows = x.transpose(0, 1).flatten(0, 1)
        out = deepkern.m_grouped_gemm_nt_contiguous(rows, weight, head_index)
        return out.unflatten(0, (self.heads, -1)).transpose(0, 1)


class LatentAttention(nn.Module):
    """Causal attention of the new tokens over all cached tokens of their sequences.

    One product gives what depends on the input alone: `qkv_a_proj` is q_a_proj, or q_proj without
    `q_lora_rank`, and kv_a_proj_with_mqa.

    A tensor rank has H of the heads, and o_proj gives its part of a sum.
    """

    def __init__(self, config: Config, precision: Precision, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.config, self.ranks, c = config, ranks, config
        own = ranks.heads(c.num_attention_heads)
        self.heads = own.stop - own.start
        queries = slice(own.start * c.qk_head_dim, own.stop * c.qk_head_dim)
        values = slice(own.start * c.v_head_dim, own.stop * c.v_head_dim)
        self.first_outputs = c.q_lora_rank or self.heads * c.qk_head_dim
        parts = "q_a_proj" if c.q_lora_rank else "q_proj", "kv_a_proj_with_mqa"
        rows = WHOLE if c.q_lora_rank else queries, WHOLE
        outputs = self.first_outputs + c.cache_width
        self.qkv_a_proj = Linear(c.hidden_size, outputs, precision, parts, rows)
        if c.q_lora_rank:
            outputs = self.heads * c.qk_head_dim
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS, precision)
            self.q_b_proj = Linear(c.q_lora_rank, outputs, precision, rows=[queries])
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS, precision)
        self.kv_b_proj = LatentProjection(c, precision, own)
        self.indexer = Indexer(c, precision) if c.index_topk else None
        inputs = self.heads * c.v_head_dim
        self.o_proj = Linear(inputs, c.hidden_size, precision, columns=values)

    def forward(self, x: Rows, batch: TokenBatch, cache: LayerCache) -> Tensor:
        """x [N, hidden] -> [N, hidden]; writes the new tokens to the cache."""
        out = self.o_proj(self.attend(x, batch, cache))
        return self.ranks.sum(out, self.ranks.tensor)

    def attend(self, x: Rows, batch: TokenBatch, cache: LayerCache) -> Tensor:
        """x [N, hidden] -> what this rank's heads read, [N, H·v]."""
        c = self.config
        q, latent_and_key = self.qkv_a_proj(x).split([self.first_outputs, c.cache_width], -1)
        self.append_to_cache(latent_and_key, batch, cache.latents)
        slots = None
        if c.q_lora_rank:
            q_latent = self.q_a_layernorm(q)[0]
            q = self.q_b_proj(q_latent)
            if self.indexer is not None:
                slots = self.indexer(x, q_latent, batch, cache.index_keys)
        q = self.rotate_queries(q.unflatten(1, (self.heads, -1)), batch)
        if slots is not None:
            return self.absorbed_attention(q, batch, cache.latents, slots)
        parts, prompt = [], batch.num_prompt
        if prompt:
            parts.append(self.prompt_attention(q[:prompt], batch.steps, cache.latents))
        if prompt < len(q):
            parts.append(self.absorbed_attention(q[prompt:], batch, cache.latents))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rotate_queries(self, q: Tensor, batch: TokenBatch) -> Tensor:
        """q [N, H, nope + rope]: rotates the last `rope` values."""
        c = self.config
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        if not c.rope_interleave:
            q_rope = interleave_pairs(q_rope)
        return torch.cat([q_nope, apply_rope(q_rope, batch.cos, batch.sin)], -1)

    def append_to_cache(self, latent_and_key: Tensor, batch: TokenBatch, cache: Tensor) -> None:
        """[N, R + rope]: normalizes the latent, rotates the key, writes both to their slots."""
        c = self.config
        latent, k_rope = latent_and_key.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        if not c.rope_interleave:
            k_rope = interleave_pairs(k_rope)
        deepkern.mla_cache_append(
            latent,
            k_rope,
            cache,
            batch.slots,
            norm_weight=self.kv_a_layernorm.weight,
            positions=batch.positions,
            cos_sin=batch.cos_sin,
        )

    def prompt_attention(self, q: Tensor, steps: list[PrefillStep], cache: Tensor) -> Tensor:
        """q [P, H, nope + rope] -> [P, H·v], through expanded keys and values."""
        out, lse = self.attend_block(q, steps[0], cache)
        for step in steps[1:]:
            rows = slice(step.rows)
            block = self.attend_block(q[rows], step, cache)
            merged, merged_lse = deepkern.merge_states(out[rows], lse[:, rows], *block)
            out, lse = (
                torch.cat([merged, out[step.rows :]]),
                torch.cat([merged_lse, lse[:, step.rows :]], 1),
            )
        return out.flatten(1)

    def attend_block(self, q: Tensor, step: PrefillStep, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of q [rows, H, nope + rope] to one block of keys: [rows, H, v], [H, rows]."""
        c = self.config
        cached = deepkern.mla_cache_gather(
            cache,
            step.block_table,
            step.cu_seqlens_k,
            step.keys,
            v_head_dim=c.kv_lora_rank,
            starts=step.starts,
            out_dtype=q.dtype,
        )
        latent, k_rope = cached.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        k_nope, v = self.kv_b_proj.keys_and_values(latent)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, self.heads, -1)], -1)
        cu_seqlens = step.cu_seqlens_q, step.cu_seqlens_k
        return deepkern.mla_prefill(q, k, v, *cu_seqlens, c.softmax_scale, step.causal)

    def absorbed_attention(
        self, q: Tensor, batch: TokenBatch, cache: Tensor, slots: Tensor | None = None
    ) -> Tensor:
        """q [M, H, nope + rope], the last M rows of the batch -> [M, H·v], on the latents.

        slots: int32 [M, topk], the tokens to attend to, or None for all.
        """
        c, first = self.config, len(batch.positions) - len(q)
        head_index = batch.head_index(self.heads, len(q))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q = torch.cat([self.kv_b_proj.absorb(q_nope, head_index), q_rope], -1)[:, None]
        seqlens, scale, R = batch.cache_seqlens[first:], c.softmax_scale, c.kv_lora_rank
        if slots is None:
            table = batch.block_table[first:]
            out, _ = deepkern.mla_decode(q, cache, table, seqlens, scale, v_head_dim=R)
        else:
            count = seqlens.clamp(max=slots.shape[1])
            out, _ = deepkern.mla_sparse_decode(
                q, cache, slots[:, None], scale, topk_length=count, v_head_dim=R
            )
        return self.kv_b_proj.expand(out[:, 0], head_index)
