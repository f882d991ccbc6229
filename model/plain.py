"""The DeepSeek-V3, R1 and V2 model in plain PyTorch: the definition and the oracle.

`model/deepseek.py` implements the same model on deepkern's ops, and tests compare the two.  This
file favours clarity: keys and values are expanded to every head, attention is a softmax over the
whole sequence, experts run one after another.  Only the rotary embedding is imported from that
file; tests compare both models with transformers.

`state_dict()` has the names of the Hugging Face checkpoint, multi-token-prediction layer included.
Training uses this model, so it has the losses of the DeepSeek-V3 report: next token, multi-token
prediction (section 2.2) and the sequence-wise balance loss.  A selection bias without gradient
keeps the experts balanced (section 2.1.2).

    m = PlainModel.from_pretrained("model/checkpoints/stdlib-bytes")
    logits = m(tokens)  # int64 [B, S] -> fp32 [B, S, vocab]

Source: DeepSeek-V3 report (arXiv:2412.19437), section 2.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.checkpoint import Checkpoint, dequantize_blocks
from model.config import INDEX_NORM_EPS, LATENT_NORM_EPS, Config
from model.rope import apply_rope, interleave_pairs, pair_factors, rope_cos_sin, split_pairs


class PlainRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, the root in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class PlainAttention(nn.Module):
    """Multi-head latent attention, not absorbed: computes q, k and v of every head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, c = config, config
        if c.q_lora_rank:
            self.q_a_proj = linear(c.hidden_size, c.q_lora_rank)
            self.q_a_layernorm = PlainRMSNorm(c.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = linear(c.q_lora_rank, c.num_attention_heads * c.qk_head_dim)
        else:
            self.q_proj = linear(c.hidden_size, c.num_attention_heads * c.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = PlainRMSNorm(c.kv_lora_rank, LATENT_NORM_EPS)
        per_head = c.qk_nope_head_dim + c.v_head_dim
        self.kv_b_proj = linear(c.kv_lora_rank, c.num_attention_heads * per_head)
        self.o_proj = linear(c.num_attention_heads * c.v_head_dim, c.hidden_size)
        self.indexer = PlainIndexer(c) if c.index_topk else None

    def forward(self, x: Tensor, cos_sin: Tensor) -> Tensor:
        """x [B, S, hidden], cos_sin fp32 [S, rope] -> [B, S, hidden]."""
        c, heads = self.config, self.config.num_attention_heads
        factors = pair_factors(cos_sin[:, None])  # [S, 1, rope] each
        if c.q_lora_rank:
            q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent) if c.q_lora_rank else self.q_proj(x)
        q = q.unflatten(-1, (heads, -1))  # [B, S, H, nope + rope]
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        if not c.rope_interleave:
            q_rope, k_rope = interleave_pairs(q_rope), interleave_pairs(k_rope)
        k_rope = apply_rope(k_rope[:, :, None], *factors).expand(-1, -1, heads, -1)
        q = torch.cat([q_nope, apply_rope(q_rope, *factors)], -1)
        k = torch.cat([k_nope, k_rope], -1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, S, D]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if self.indexer is not None:
            mask = self.indexer(x, q_latent, factors, mask)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=c.softmax_scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class PlainIndexer(nn.Module):
    """V3.2: the `index_topk` tokens with the largest Σ over heads of weight·relu(q·k)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, c = config, config
        self.wq_b = linear(c.q_lora_rank, c.index_n_heads * c.index_head_dim)
        self.wk = linear(c.hidden_size, c.index_head_dim)
        self.k_norm = nn.LayerNorm(c.index_head_dim, eps=INDEX_NORM_EPS)
        self.weights_proj = linear(c.hidden_size, c.index_n_heads)

    @torch.no_grad()
    def forward(
        self, x: Tensor, q_latent: Tensor, factors: tuple[Tensor, Tensor], visible: Tensor
    ) -> Tensor:
        """x [B, S, hidden], visible bool [S, S] -> bool [B, S, S], the keys of each query."""
        c = self.config
        q = self.rotate(self.wq_b(q_latent).unflatten(-1, (c.index_n_heads, -1)), factors)
        k = self.rotate(self.k_norm(self.wk(x))[:, :, None], factors)[:, :, 0]
        scores = torch.einsum("bqhd,bkd->bqkh", q, k).relu()
        scores = torch.einsum("bqkh,bqh->bqk", scores, self.weights_proj(x))
        scores = scores.masked_fill(~visible, -math.inf)
        chosen = scores.topk(min(c.index_topk, scores.shape[-1]), -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True) & visible

    def rotate(self, x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, S, heads, D]: rotates pairs (i, i + rope/2) of the first `rope` values."""
        x_rope, rest = x.tensor_split([self.config.qk_rope_head_dim], -1)
        return torch.cat([split_pairs(apply_rope(interleave_pairs(x_rope), *factors)), rest], -1)


class PlainMLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(size, inner), linear(size, inner)
        self.down_proj = linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainGate(nn.Module):
    """Chooses the experts of each token by score plus bias; their weights are without the bias."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.hidden_size**-0.5)
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> weights fp32 [T, topk], experts [T, topk], scores fp32 [T, E]."""
        c = self.config
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if c.scoring_func == "sigmoid" else logits.softmax(-1)
        biased = scores.detach()
        if c.topk_method == "noaux_tc":
            biased = biased + self.e_score_correction_bias
        if c.n_group > 1:
            groups = biased.unflatten(-1, (c.n_group, -1))
            best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
            group_score = best if c.topk_method == "noaux_tc" else groups.amax(-1)
            kept = group_score.topk(c.topk_group, -1).indices
            dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, kept, False)
            biased = groups.masked_fill(dropped[..., None], -math.inf).flatten(1)
        experts = biased.topk(c.num_experts_per_tok, -1).indices
        weights = scores.gather(1, experts)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, experts, scores


class PlainMoE(nn.Module):
    """Σ over a token's experts of weight·expert(x), plus the shared experts.

    In training mode it stores `load`, int64 [E], and `balance`, the balance loss.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, c = config, config
        self.gate = PlainGate(c)
        self.experts = nn.ModuleList(
            PlainMLP(c.hidden_size, c.moe_intermediate_size) for _ in range(c.n_routed_experts)
        )
        if c.n_shared_experts:
            inner = c.moe_intermediate_size * c.n_shared_experts
            self.shared_experts = PlainMLP(c.hidden_size, inner)

    def forward(self, x: Tensor) -> Tensor:
        shape, sequences = x.shape, x.shape[0]
        x = x.flatten(0, 1)
        weights, experts, scores = self.gate(x)
        order = experts.flatten().argsort(stable=True)  # (token, slot) pairs by expert
        counts = experts.flatten().bincount(minlength=len(self.experts))
        token = order // experts.shape[1]
        outputs = [
            expert(rows)
            for expert, rows in zip(self.experts, x[token].split(counts.tolist()), strict=True)
            if len(rows)
        ]
        weighted = torch.cat(outputs) * weights.flatten()[order, None].to(x.dtype)
        out = torch.zeros_like(x).index_add(0, token, weighted)
        if self.training:
            self.load = counts
            self.balance = balance_loss(experts, scores, sequences)
        if self.config.n_shared_experts:
            out = out + self.shared_experts(x)
        return out.view(shape)


def balance_loss(experts: Tensor, scores: Tensor, sequences: int) -> Tensor:
    """Sequence-wise balance loss Σ_e f_e·P_e, mean over sequences; 1 for an even load.

    f_e is the fraction of a sequence's choices that are expert e, times E; P_e is the mean
    normalized score.

    experts: int64 [T, topk]; scores: fp32 [T, E]; T tokens of `sequences` equally long sequences.
    """
    count, topk = scores.shape[-1], experts.shape[-1]
    chosen = torch.zeros_like(scores).scatter_(1, experts, 1.0).view(sequences, -1, count)
    fraction = chosen.mean(1) * count / topk
    probability = (scores / scores.sum(-1, keepdim=True)).view(sequences, -1, count).mean(1)
    return (fraction * probability).sum(-1).mean()


class PlainLayer(nn.Module):
    """Attention and a dense MLP or experts, each after a norm and added to the residual stream."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        c = config
        self.input_layernorm = PlainRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = PlainAttention(c)
        self.post_attention_layernorm = PlainRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = PlainMoE(c) if c.is_moe(index) else PlainMLP(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor, cos_sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos_sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class PlainPredictionLayer(PlainLayer):
    """Multi-token prediction: predicts token i+2 from the hidden state at i and token i+1."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__(config, index)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.enorm, self.hnorm = PlainRMSNorm(size, eps), PlainRMSNorm(size, eps)
        self.eh_proj = linear(2 * size, size)
        self.shared_head = nn.ModuleDict(
            {"norm": PlainRMSNorm(size, eps), "head": linear(size, config.vocab_size)}
        )

    def predict(
        self, hidden: Tensor, next_tokens: Tensor, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden [B, S, hidden] after the final norm, next_tokens int64 [B, S] -> logits, hidden.

        The logits are [B, S, vocab], the hidden state that of this layer, [B, S, hidden].
        """
        both = torch.cat([self.enorm(self.embed_tokens(next_tokens)), self.hnorm(hidden)], -1)
        hidden = self.shared_head["norm"](self(self.eh_proj(both), cos_sin))
        return self.shared_head["head"](hidden), hidden


class PlainModel(nn.Module):
    """The model in fp32, without a cache; `PlainModel(config)` has random weights."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, c = config, config
        layers = [PlainLayer(c, i) for i in range(c.num_hidden_layers)]
        for depth in range(c.num_nextn_predict_layers):
            layers.append(PlainPredictionLayer(c, c.num_hidden_layers + depth))
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
                "layers": nn.ModuleList(layers),
                "norm": PlainRMSNorm(c.hidden_size, c.rms_norm_eps),
            }
        )
        self.lm_head = linear(c.hidden_size, c.vocab_size)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight

    @classmethod
    def from_pretrained(cls, path: str | Path) -> PlainModel:
        """Loads a checkpoint directory and dequantizes it to fp32 without deepkern's ops."""
        checkpoint = Checkpoint.open(path)
        model = cls(checkpoint.check())
        weights = {}
        for name in model.state_dict():
            if name in checkpoint:
                stored, scale = checkpoint.read(name)
                block = checkpoint.block
                real = stored if scale is None else dequantize_blocks(stored, scale, block)
                weights[name] = real.float()
        embedding = weights["model.embed_tokens.weight"]
        if model.config.tie_word_embeddings:
            weights["lm_head.weight"] = embedding
        head = weights["lm_head.weight"]
        for name in model.state_dict().keys() - weights.keys():  # copies that are not stored
            weights[name] = embedding if name.endswith("embed_tokens.weight") else head
        model.load_state_dict(weights)
        return model.eval()

    def hidden(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> hidden states after the final norm [B, S, hidden]."""
        cos_sin = rope_cos_sin(self.config, tokens.shape[1]).to(tokens.device)
        x = self.model["embed_tokens"](tokens)
        for layer in self.model["layers"][: self.config.num_hidden_layers]:
            x = layer(x, cos_sin)
        return self.model["norm"](x)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> logits [B, S, vocab]."""
        return self.lm_head(self.hidden(tokens))

    def mtp_logits(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Logits [B, S - 1, vocab] of the first prediction layer; row i predicts token i + 2.

        hidden: the result of `hidden(tokens)`, if the caller has it.
        """
        hidden = self.hidden(tokens) if hidden is None else hidden
        cos_sin = rope_cos_sin(self.config, tokens.shape[1] - 1).to(tokens.device)
        layer = self.model["layers"][self.config.num_hidden_layers]
        return layer.predict(hidden[:, :-1], tokens[:, 1:], cos_sin)[0]
