"""Multi-head latent attention with absorbed weights over the paged latent cache.

Keys and values of head h are k = W_uk[h]·c and v = W_uv[h]·c of one latent c per token, so
q·k = (W_ukᵀ[h]·q)·c: the query is taken into the latent space, all heads attend to the cached
latents themselves, and W_uv is applied to the result.  What is cached is 1/H of keys and values.

Source: DeepSeek-V2 report (arXiv:2405.04434), section 2.1 and appendix C.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import deepkern
from model.cache import Step
from model.checkpoint import Checkpoint
from model.config import Config
from model.layers import Linear, Precision, RMSNorm, Rows, load_real, parameter
from model.rope import rope

LATENT_EPS = 1e-6  # of both inner norms, whatever rms_norm_eps says


class UpProjection(nn.Module):
    """kv_b_proj, split into what is absorbed on either side of the attention."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        c, self.precision = config, precision
        self.heads, self.nope = c.num_attention_heads, c.qk_nope_head_dim
        self.key = parameter(torch.empty(self.heads, c.qk_nope_head_dim, c.kv_lora_rank))
        self.value = parameter(torch.empty(self.heads, c.v_head_dim, c.kv_lora_rank))

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        weight = load_real(checkpoint, f"{name}.weight", self.precision)
        weight = weight.view(self.heads, -1, weight.shape[1])
        self.key = parameter(weight[:, : self.nope].contiguous())
        self.value = parameter(weight[:, self.nope :].contiguous())


class LatentAttention(nn.Module):
    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        self.config, c = config, config
        self.fp8 = precision.fp8
        queries = c.num_attention_heads * c.qk_head_dim
        if c.q_lora_rank:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, precision)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_EPS, precision)
            self.q_b_proj = Linear(c.q_lora_rank, queries, precision)
        else:
            self.q_proj = Linear(c.hidden_size, queries, precision)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.cache_width, precision)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_EPS, precision)
        self.kv_b_proj = UpProjection(c, precision)
        self.o_proj = Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, precision)

    def query(self, x: Rows) -> Tensor:
        if self.config.q_lora_rank:
            return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return self.q_proj(x)

    def forward(self, x: Tensor, step: Step, cache: Tensor, table: Tensor) -> Tensor:
        """x [B·S, hidden] -> the same; writes to `cache` [blocks, page, 1, R + rope].

        `table` is fp32 [positions, rope] = [cos | sin].
        """
        c = self.config
        rows = Rows.of(x, self.fp8)
        self.append(self.kv_a_proj_with_mqa(rows), step, cache, table)

        q = self.query(rows).view(*step.shape, c.num_attention_heads, c.qk_head_dim)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_latent = torch.einsum("bshd,hdr->bshr", q_nope, self.kv_b_proj.key)
        angles = table[step.positions].view(*step.shape, c.qk_rope_head_dim)
        q = torch.cat([q_latent, rope(q_rope, angles, c.rope_interleave)], -1)

        out, _ = deepkern.mla_decode(
            q, cache, step.block_table, step.lengths, c.softmax_scale, v_head_dim=c.kv_lora_rank
        )  # [B, S, H, R]
        out = torch.einsum("bshr,hdr->bshd", out, self.kv_b_proj.value)
        return self.o_proj(out.reshape(len(x), c.num_attention_heads * c.v_head_dim))

    def append(self, latent_and_key: Tensor, step: Step, cache: Tensor, table: Tensor) -> None:
        """Norms the latent, turns the key, and puts both into their slots."""
        c = self.config
        latent, k_rope = latent_and_key.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        if not c.rope_interleave:
            k_rope = k_rope.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        deepkern.mla_cache_append(
            latent,
            k_rope,
            cache,
            step.slots,
            norm_weight=self.kv_a_layernorm.weight,
            positions=step.positions,
            cos_sin=table,
        )
