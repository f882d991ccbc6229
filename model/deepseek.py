"""The DeepSeek-V3, R1 and V2 architecture on deepkern's ops, for inference.

    x = embedding(tokens)
    x = x + attention(norm(x));  x = x + mlp_or_experts(norm(x))        for every layer
    logits = head(norm(x))

The file reads from top to bottom: attention, MLP and experts, layer, model.  `model/plain.py`
defines the same model in plain PyTorch; tests compare the two.  Shapes use B sequences, S new
tokens of each, M = B·S rows, H heads and R = `kv_lora_rank`.  Module names are those of the
Hugging Face checkpoint.

    from model import DeepSeek

    m = DeepSeek.from_pretrained("model/checkpoints/stdlib-bytes", dtype=torch.float32)
    tokens = torch.tensor([[12, *b"def main("]])  # int64 [1, 10]; 12 starts a text
    logits = m(tokens)  # [1, 10, 256]
    continued = m.generate(tokens, max_new_tokens=40)  # int64 [1, 50]

Source: DeepSeek-V3 report (arXiv:2412.19437), section 2, and the released inference code.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepkern
from model.checkpoint import Checkpoint
from model.config import LATENT_NORM_EPS, Config
from model.latent_cache import LatentCache, TokenSlots
from model.linear import Linear, RMSNorm, Rows, Weight
from model.rope import apply_rope, interleave_pairs, rope_cos_sin
from model.weights import (
    Matrix,
    Precision,
    frozen,
    load_real,
    load_stack,
    quantize_weight,
    random_weight,
    resolve_dtype,
)

# Multi-head latent attention with absorbed weights.  Keys and values of head h are k = W_uk[h]·c
# and v = W_uv[h]·c of one latent c per token, so q·k = (W_ukᵀ[h]·q)·c.  The query is projected into
# the latent space, all heads attend to the cached latents, and W_uv is applied to the result.
# Prefill is the same computation with S > 1 queries.
# Source: DeepSeek-V2 report (arXiv:2405.04434), section 2.1 and appendix C.


class AbsorbedProjection(nn.Module):
    """kv_b_proj, split into W_ukᵀ [H, R, nope] and W_uv [H, v, R], both real with `fp8` too."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        c, self.precision = config, precision
        self.heads, self.nope = c.num_attention_heads, c.qk_nope_head_dim
        weight = random_weight(self.heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        self.split(weight.to(precision.dtype))

    def split(self, weight: Tensor) -> None:
        """Stores weight [H, nope + v, R] as two contiguous parameters."""
        self.key = frozen(weight[:, : self.nope].transpose(1, 2).contiguous())
        self.value = frozen(weight[:, self.nope :].contiguous())

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        weight = load_real(checkpoint, f"{name}.weight", self.precision)
        self.split(weight.view(self.heads, -1, weight.shape[1]))

    def absorb(self, q_nope: Tensor) -> Tensor:
        """W_ukᵀ·q: [M, H, nope] -> [M, H, R]."""
        return multiply_by_head(q_nope, self.key)

    def expand(self, latent: Tensor) -> Tensor:
        """W_uv·latent: [M, H, R] -> [M, H·v]."""
        return multiply_by_head(latent, self.value).flatten(1)


def multiply_by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, H, K] times the weight [H, N, K] of each head -> [M, H, N].

    On a CPU without bf16 instructions PyTorch multiplies bf16 matrices in a scalar loop, fast
    enough for a few rows only.
    """
    x, weight, dtype = x.transpose(0, 1), weight.transpose(1, 2), x.dtype
    few = x.shape[1] <= 4 or dtype == torch.float32
    if few or x.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bmm(x, weight).transpose(0, 1)
    return torch.bmm(x.float(), weight.float()).to(dtype).transpose(0, 1)


class LatentAttention(nn.Module):
    """Causal attention of the new tokens over all cached tokens of their sequence.

    One product gives what depends on the input alone: `qkv_a_proj` is q_a_proj, or q_proj without
    `q_lora_rank`, and kv_a_proj_with_mqa.
    """

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        self.config, c = config, config
        queries = c.num_attention_heads * c.qk_head_dim
        self.first_outputs = c.q_lora_rank or queries
        parts = "q_a_proj" if c.q_lora_rank else "q_proj", "kv_a_proj_with_mqa"
        outputs = self.first_outputs + c.cache_width
        self.qkv_a_proj = Linear(c.hidden_size, outputs, precision, parts)
        if c.q_lora_rank:
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS, precision)
            self.q_b_proj = Linear(c.q_lora_rank, queries, precision)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS, precision)
        self.kv_b_proj = AbsorbedProjection(c, precision)
        self.o_proj = Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, precision)

    def forward(self, x: Rows, tokens: TokenSlots, cache: Tensor) -> Tensor:
        """x [B·S, hidden] -> [B·S, hidden]; writes the new tokens to the cache.

        cache: [blocks, page, 1, R + rope], this layer's pool.
        """
        c = self.config
        q, latent_and_key = self.qkv_a_proj(x).split([self.first_outputs, c.cache_width], -1)
        if c.q_lora_rank:
            q = self.q_b_proj(self.q_a_layernorm(q)[0])
        self.append_to_cache(latent_and_key, tokens, cache)
        out, _ = deepkern.mla_decode(
            self.absorbed_query(q, tokens),
            cache,
            tokens.block_table,
            tokens.cache_seqlens,
            c.softmax_scale,
            v_head_dim=c.kv_lora_rank,
        )  # [B, S, H, R]
        return self.o_proj(self.kv_b_proj.expand(out.flatten(0, 1)))

    def absorbed_query(self, q: Tensor, tokens: TokenSlots) -> Tensor:
        """q [B·S, H·(nope + rope)] -> [B, S, H, R + rope]: W_ukᵀ·q_nope, the rotated q_rope."""
        c = self.config
        q = q.view(len(q), c.num_attention_heads, c.qk_head_dim)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_rope = apply_rope(q_rope, tokens.turn, c.rope_interleave)
        return torch.cat([self.kv_b_proj.absorb(q_nope), q_rope], -1).unflatten(0, tokens.shape)

    def append_to_cache(self, latent_and_key: Tensor, tokens: TokenSlots, cache: Tensor) -> None:
        """[B·S, R + rope]: normalizes the latent, rotates the key, writes both to their slots."""
        c = self.config
        latent, k_rope = latent_and_key.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        if not c.rope_interleave:
            k_rope = interleave_pairs(k_rope)
        deepkern.mla_cache_append(
            latent,
            k_rope,
            cache,
            tokens.slots,
            norm_weight=self.kv_a_layernorm.weight,
            positions=tokens.positions,
            cos_sin=tokens.cos_sin,
        )


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [gate, up] along the last dimension."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class MLP(nn.Module):
    """down(swiglu(gate(x), up(x))), of a dense layer and of the shared experts."""

    def __init__(self, size: int, inner: int, precision: Precision) -> None:
        super().__init__()
        self.fp8 = precision.fp8
        self.gate_up_proj = Linear(size, 2 * inner, precision, ("gate_proj", "up_proj"))
        self.down_proj = Linear(inner, size, precision)

    def forward(self, x: Rows) -> Tensor:
        """[M, hidden] -> [M, hidden]."""
        gate_up = self.gate_up_proj(x)
        if not self.fp8:
            return self.down_proj(swiglu(gate_up))
        return self.down_proj(Rows(gate_up, *deepkern.swiglu_cast(gate_up)))


class Gate(nn.Module):
    """The router: scores in fp32, and `deepkern.route_topk` chooses the experts by them."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        c, self.precision = config, precision
        self.biased = c.topk_method == "noaux_tc"
        self.weight = frozen(random_weight(c.n_routed_experts, c.hidden_size))
        bias = torch.zeros(c.n_routed_experts) if self.biased else None
        self.register_buffer("e_score_correction_bias", bias)
        self.routing = {
            "topk": c.num_experts_per_tok,
            "num_groups": c.n_group,
            "topk_groups": c.topk_group,
            "score": c.scoring_func,
            "group_score": "top2" if self.biased else "max",
            "normalize": c.norm_topk_prob,
            "scale": c.routed_scaling_factor,
        }

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        p, fp32 = self.precision, torch.float32
        self.weight = frozen(load_real(checkpoint, f"{name}.weight", p, fp32))
        if self.biased:
            name = f"{name}.e_score_correction_bias"
            self.e_score_correction_bias = load_real(checkpoint, name, p, fp32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, hidden] -> weights fp32 [M, topk], expert indices int64 [M, topk]."""
        logits = F.linear(x.float(), self.weight)
        return deepkern.route_topk(logits, bias=self.e_score_correction_bias, **self.routing)


class Experts(nn.Module):
    """Weights of the E routed experts, stacked: w13 [E, 2I, K] as [gate, up], w2 [E, K, I].

    With `fp8` the layer is one op, `moe_forward`.  Otherwise `expert_dispatch` sorts the rows by
    expert, PyTorch's matmul runs each expert, and `expert_combine` sums in a fixed order.
    """

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        self.precision, self.count = precision, config.n_routed_experts
        size, inner = config.hidden_size, config.moe_intermediate_size
        w13, w13_scale = quantize_weight(random_weight(self.count, 2 * inner, size), precision)
        w2, w2_scale = quantize_weight(random_weight(self.count, size, inner), precision)
        self.w13, self.w2 = frozen(w13), frozen(w2)
        self.register_buffer("w13_scale", w13_scale)
        self.register_buffer("w2_scale", w2_scale)

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        def load(*matrices: str) -> Matrix:
            groups = [
                [f"{name}.{expert}.{matrix}.weight" for matrix in matrices]
                for expert in range(self.count)
            ]
            return load_stack(checkpoint, groups, self.precision)

        w13, self.w13_scale = load("gate_proj", "up_proj")
        w2, self.w2_scale = load("down_proj")
        self.w13, self.w2 = frozen(w13), frozen(w2)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x [M, hidden], weights and expert indices [M, topk] -> weighted sum [M, hidden]."""
        if self.precision.fp8:
            w = self.w13, self.w13_scale, self.w2, self.w2_scale
            return deepkern.moe_forward(x, weights, indices, *w)
        rows, _, _, counts, handle = deepkern.expert_dispatch(x, indices, self.count)
        sizes = counts.tolist()
        unused = len(rows) - sum(sizes)  # rows past those of the last expert
        parts = rows.split([*sizes, unused])
        outputs = [self.run_expert(part, e) for e, part in enumerate(parts[:-1]) if len(part)]
        return deepkern.expert_combine(torch.cat([*outputs, parts[-1]]), weights, handle)

    def run_expert(self, x: Tensor, expert: int) -> Tensor:
        return F.linear(swiglu(F.linear(x, self.w13[expert])), self.w2[expert])


class MoE(nn.Module):
    """Σ over a token's experts of weight·expert(x), plus the shared experts."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        c = config
        self.gate = Gate(c, precision)
        self.experts = Experts(c, precision)
        inner = c.moe_intermediate_size * c.n_shared_experts
        self.shared_experts = MLP(c.hidden_size, inner, precision) if inner else None

    def forward(self, x: Rows) -> Tensor:
        """[M, hidden] -> [M, hidden]."""
        out = self.experts(x.real, *self.gate(x.real))
        return out if self.shared_experts is None else out + self.shared_experts(x)


class Layer(nn.Module):
    """Attention and a dense MLP or experts, each after a norm and added to the residual stream."""

    def __init__(self, config: Config, index: int, precision: Precision) -> None:
        super().__init__()
        c = config
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.self_attn = LatentAttention(c, precision)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        if c.is_moe(index):
            self.mlp: nn.Module = MoE(c, precision)
        else:
            self.mlp = MLP(c.hidden_size, c.intermediate_size, precision)

    def forward(
        self, x: Tensor, residual: Tensor | None, tokens: TokenSlots, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The layer's input is x + residual, [B·S, hidden] each; so is the output.

        The norm that follows adds the two.  `cache` is the pool of this layer.
        """
        rows, residual = self.input_layernorm(x, residual)
        x = self.self_attn(rows, tokens, cache)
        rows, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(rows), residual


class PredictionLayer(Layer):
    """Multi-token prediction: predicts token i+2 from the hidden state at i and token i+1."""

    def __init__(self, config: Config, index: int, precision: Precision) -> None:
        super().__init__(config, index, precision)
        c, p = config, precision
        self.embed_tokens = Weight(c.vocab_size, c.hidden_size, p)
        self.enorm = RMSNorm(c.hidden_size, c.rms_norm_eps, p)
        self.hnorm = RMSNorm(c.hidden_size, c.rms_norm_eps, p)
        self.eh_proj = Weight(c.hidden_size, 2 * c.hidden_size, p)
        norm = RMSNorm(c.hidden_size, c.rms_norm_eps, p)
        head = Weight(c.vocab_size, c.hidden_size, p)
        self.shared_head = nn.ModuleDict({"norm": norm, "head": head})


class DeepSeek(nn.Module):
    """A DeepSeek-V3, R1 or V2 model for inference.

    `from_pretrained` loads a checkpoint.  `DeepSeek(Config.preset("tiny"))` has random weights.
    """

    def __init__(self, config: Config, precision: Precision | None = None) -> None:
        super().__init__()
        precision = precision or Precision()
        self.config, self.precision, c = config, precision, config
        layers: list[Layer] = [Layer(c, i, precision) for i in range(c.num_hidden_layers)]
        for depth in range(c.num_nextn_predict_layers):
            layers.append(PredictionLayer(c, c.num_hidden_layers + depth, precision))
        self.model = nn.ModuleDict(
            {
                "embed_tokens": Weight(c.vocab_size, c.hidden_size, precision),
                "layers": nn.ModuleList(layers),
                "norm": RMSNorm(c.hidden_size, c.rms_norm_eps, precision),
            }
        )
        self.lm_head = Weight(c.vocab_size, c.hidden_size, precision)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight
        self.cos_sin = torch.empty(0, c.qk_rope_head_dim, device=precision.device)  # rotary_table
        if not self.lm_head.weight.is_meta:
            self.to(precision.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | str = torch.bfloat16,
        device: torch.device | str = "cpu",
        fp8: bool = False,
        layers: int | None = None,
    ) -> DeepSeek:
        """Loads a checkpoint directory in the Hugging Face layout.

        With `fp8` every Linear keeps e4m3 weights and casts its input per token; weights that are
        stored in another dtype are quantized at load.  Without it, weights are dequantized to
        `dtype` at load.

        dtype: a dtype, its name, or "auto", that of the checkpoint.
        layers: the number of decoder layers to load; by default all.

        Raises:
            FileNotFoundError: no such directory, or no config.json in it.
            CheckpointError (a ValueError): a tensor is damaged, missing, unknown, or has a wrong
                shape or dtype.  The message names the file and the tensor.
        """
        checkpoint = Checkpoint.open(path)
        precision = Precision(resolve_dtype(dtype, checkpoint), device, fp8)
        return cls.from_checkpoint(checkpoint, precision, layers)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, precision: Precision, layers: int | None = None
    ) -> DeepSeek:
        """Checks all tensors, builds the model on the meta device, and loads module by module."""
        config = checkpoint.check(layers)
        with torch.device("meta"):
            model = cls(config, precision)
        with torch.no_grad():
            for name, module in model.named_modules():
                if hasattr(module, "load"):
                    module.load(checkpoint, model.checkpoint_name(name, checkpoint))
        return model.eval()

    def checkpoint_name(self, name: str, checkpoint: Checkpoint) -> str:
        """Name of module `name` in the checkpoint, which omits copies of embedding and head."""
        if name == "lm_head" and self.config.tie_word_embeddings:
            return "model.embed_tokens"
        if f"{name}.weight" not in checkpoint:
            if name.endswith(".embed_tokens"):
                return "model.embed_tokens"
            if name.endswith(".shared_head.head"):
                return self.checkpoint_name("lm_head", checkpoint)
        return name

    def rotary_table(self, length: int) -> Tensor:
        """[cos | sin] of at least `length` positions, fp32; doubled when it is too short."""
        if len(self.cos_sin) < length:
            size = max(length, 2 * len(self.cos_sin), 256)
            self.cos_sin = rope_cos_sin(self.config, size).to(self.precision.device)
        return self.cos_sin

    def new_cache(self, batch: int, capacity: int, page: int = 64) -> LatentCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens, in pages of `page`."""
        p = self.precision
        return LatentCache(self.config, batch, capacity, p.dtype, p.device, page)

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """int64 [B, S] -> [B·S, hidden]."""
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            got = f"{tokens.dtype} of shape {list(tokens.shape)}"
            raise ValueError(f"DeepSeek: tokens: expected int64 [B, S], got {got}")
        return F.embedding(tokens, weight).flatten(0, 1)

    @torch.no_grad()
    def hidden(self, tokens: Tensor, cache: LatentCache | None = None) -> Tensor:
        """int64 [B, S] -> hidden states after the final norm [B, S, hidden].

        With a cache, the tokens follow those that it holds.  If the call raises, `cache.length` is
        unchanged.
        """
        x, residual = self.embed(tokens, self.model["embed_tokens"].weight), None
        batch, count = tokens.shape
        cache = self.new_cache(batch, count) if cache is None else cache
        slots = cache.next_slots(batch, count, self.rotary_table(cache.length + count))
        for index in range(self.config.num_hidden_layers):
            x, residual = self.model["layers"][index](x, residual, slots, cache.layers[index])
        cache.length += count
        rows, _ = self.model["norm"](x, residual)
        return rows.real.view(batch, count, self.config.hidden_size)

    @torch.no_grad()
    def forward(self, tokens: Tensor, cache: LatentCache | None = None) -> Tensor:
        """int64 [B, S] -> logits [B, S, vocab]; `hidden` says what a cache does."""
        return F.linear(self.hidden(tokens, cache), self.lm_head.weight)

    @torch.no_grad()
    def mtp_logits(self, tokens: Tensor, depth: int = 0) -> Tensor:
        """int64 [B, S] -> logits [B, S - 1, vocab] of prediction layer `depth`.

        Row i predicts token i + 2.
        """
        c, p = self.config, self.precision
        if not c.num_nextn_predict_layers:
            raise ValueError("DeepSeek: mtp_logits: the checkpoint has no prediction layer")
        layer = self.model["layers"][c.num_hidden_layers + depth]
        hidden = self.hidden(tokens)[:, :-1].flatten(0, 1)
        batch, count = tokens.shape[0], tokens.shape[1] - 1
        embedded = self.embed(tokens[:, 1:], layer.embed_tokens.weight)
        both = torch.cat([layer.enorm(embedded)[0].real, layer.hnorm(hidden)[0].real], -1)
        cache = LatentCache(c, batch, count, p.dtype, p.device, num_layers=1)
        slots = cache.next_slots(batch, count, self.rotary_table(count))
        x, residual = layer(F.linear(both, layer.eh_proj.weight), None, slots, cache.layers[0])
        rows, _ = layer.shared_head["norm"](x, residual)
        x = F.linear(rows.real, layer.shared_head["head"].weight)
        return x.view(batch, count, c.vocab_size)

    def generate(self, tokens: Tensor, max_new_tokens: int) -> Tensor:
        """int64 [B, S] -> [B, S + max_new_tokens]: the prompt and its greedy continuation."""
        from model.generate import generate  # the engine, which imports this module

        return generate(self, tokens, max_new_tokens)
