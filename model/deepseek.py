"""The DeepSeek-V3, R1 and V2 architecture on deepkern's ops, for inference.

    x = embedding(tokens)
    x = x + attention(norm(x));  x = x + mlp_or_experts(norm(x))        for every layer
    logits = head(norm(x))

The file reads from top to bottom: precision, weights, rotary embedding, norm and linear, latent
cache, attention, MLP and experts, layer, model.  `model/plain.py` defines the same model in plain
PyTorch; tests compare the two.  Shapes use B sequences, S new tokens of each, M = B·S rows, H heads
and R = `kv_lora_rank`.  Module names are those of the Hugging Face checkpoint.

    from model import DeepSeek

    m = DeepSeek.from_pretrained("model/checkpoints/stdlib-bytes", dtype=torch.float32)
    tokens = torch.tensor([[12, *b"def main("]])  # int64 [1, 10]; 12 starts a text
    logits = m(tokens)  # [1, 10, 256]
    continued = m.generate(tokens, max_new_tokens=40)  # int64 [1, 50]

Source: DeepSeek-V3 report (arXiv:2412.19437), section 2, and the released inference code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepkern
from model.checkpoint import Checkpoint, CheckpointError
from model.config import LATENT_NORM_EPS, Config, yarn_mscale


class Precision(NamedTuple):
    """Number formats and device of a model.

    With `fp8` every `Linear` and every routed expert keeps e4m3 weights with 128x128 scales and
    casts its input per token.  Otherwise they compute in `dtype`.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    fp8: bool = False


# Weights.  A module starts with random weights.  `load(checkpoint, name)` replaces them; `name` is
# the module's name in the checkpoint.

Matrix = tuple[Tensor, Tensor | None]  # weight [N, K]; scale of each 128x128 block if it is e4m3


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def random_weight(*shape: int) -> Tensor:
    """fp32 [..., outputs, inputs], uniform in ±1/sqrt(inputs), the default of nn.Linear."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)


def quantize_weight(weight: Tensor, precision: Precision) -> Matrix:
    """real [..., N, K] -> e4m3 and its scales with `fp8`, else `dtype` and None."""
    if precision.fp8:
        return deepkern.cast_per_block(weight)
    return weight.to(precision.dtype), None


def load_real(
    checkpoint: Checkpoint, name: str, precision: Precision, dtype: torch.dtype | None = None
) -> Tensor:
    """Reads a tensor, dequantizes it if it is FP8, and converts it to `dtype` or the model's."""
    tensor, scale = checkpoint.read(name)
    tensor, dtype = tensor.to(precision.device), dtype or precision.dtype
    if scale is None:
        return tensor.to(dtype)
    return deepkern.cast_back(tensor, scale.to(precision.device), checkpoint.block, dtype)


def load_matrix(checkpoint: Checkpoint, name: str, precision: Precision) -> Matrix:
    """Reads the weight [N, K] of a Linear: e4m3 and its scales with `fp8`, else real."""
    if not precision.fp8:
        return load_real(checkpoint, name, precision), None
    weight, scale = checkpoint.read(name)
    if scale is None:
        return quantize_weight(weight.to(precision.device), precision)
    if checkpoint.block != (128, 128):
        file, block = checkpoint.stored[name].file, checkpoint.block
        raise CheckpointError(f"{file}: tensor {name} is FP8 in blocks of {block}, not 128x128")
    return weight.to(precision.device), scale.to(precision.device)


class Weight(nn.Module):
    """A weight [outputs, inputs] that is never quantized: embedding, head and eh_proj."""

    def __init__(self, outputs: int, inputs: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.weight = frozen(random_weight(outputs, inputs).to(precision.dtype))

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        self.weight = frozen(load_real(checkpoint, f"{name}.weight", self.precision))


# Rotary position embedding.  Position p rotates pair i by the angle p·f_i with f_i =
# theta^(-2i/rope).  YaRN (arXiv:2309.00071) lowers the frequency of the pairs that turn rarely
# within the original context, which makes a longer context look like it.


def rope_frequencies(config: Config) -> Tensor:
    """Angle per position of each rotary pair, fp32 [rope/2].

    YaRN keeps the frequency of pairs that turn more than beta_fast times in the original context,
    divides by `factor` that of pairs that turn less than beta_slow times, and interpolates between.
    """
    dim, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    pair = torch.arange(0, dim, 2, dtype=torch.float32)
    frequency = 1.0 / base ** (pair / dim)
    if not yarn:
        return frequency
    original = yarn.get("original_max_position_embeddings") or config.max_position_embeddings

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = pair_with_turns(yarn.get("beta_fast") or 32)
    high = pair_with_turns(yarn.get("beta_slow") or 1)
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    ramp = ramp.clamp(0, 1)
    return frequency / yarn["factor"] * ramp + frequency * (1 - ramp)


def rope_cos_sin(config: Config, length: int) -> Tensor:
    """[cos | sin] of positions 0 to length - 1, fp32 [length, rope], times YaRN's factor."""
    frequency = rope_frequencies(config)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    yarn, scale = config.rope_scaling, 1.0
    if yarn:
        scale = yarn.get("attention_factor")
        if scale is None:
            all_dim = yarn.get("mscale_all_dim") or 0
            mscale = yarn.get("mscale") or 1
            both = bool(yarn.get("mscale") and all_dim)
            scale = yarn_mscale(yarn["factor"], mscale if both else 1)
            scale /= yarn_mscale(yarn["factor"], all_dim) if both else 1
    return torch.cat([angle.cos(), angle.sin()], -1) * scale


def interleave_pairs(x: Tensor) -> Tensor:
    """Moves pairs (i, i + rope/2) of the last dimension to (2i, 2i + 1)."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def apply_rope(x: Tensor, cos_sin: Tensor, interleave: bool = True) -> Tensor:
    """Rotates x [B, S, ..., rope] by cos_sin fp32 [S, rope] or [B, S, rope]; keeps x's dtype.

    A pair is two adjacent values (DeepSeek), or values i and i + rope/2 without `interleave`.  The
    result has adjacent pairs in both cases.
    """
    if not interleave:
        x = interleave_pairs(x)
    cos_sin = cos_sin.view(*cos_sin.shape[:-1], *(1,) * (x.dim() - 3), cos_sin.shape[-1])
    cos, sin = cos_sin.chunk(2, -1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, the root in fp32."""

    def __init__(self, size: int, eps: float, precision: Precision) -> None:
        super().__init__()
        self.precision, self.eps = precision, eps
        self.weight = frozen(torch.ones(size, dtype=precision.dtype))

    load = Weight.load

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class QuantizedInput(NamedTuple):
    """Input [M, K] of one or more Linears: e4m3 with 1x128 scales, or real with scale None."""

    values: Tensor
    scale: Tensor | None


def quantize_input(x: Tensor, fp8: bool) -> QuantizedInput:
    """x real [M, K]; casts it per token with `fp8`."""
    return QuantizedInput(*deepkern.cast_per_token(x)) if fp8 else QuantizedInput(x, None)


class Linear(nn.Module):
    """x·weightᵀ with a weight [N, K] in `dtype`, or in e4m3 with 128x128 scales."""

    def __init__(self, inputs: int, outputs: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        weight, scale = quantize_weight(random_weight(outputs, inputs), precision)
        self.weight = frozen(weight)
        self.register_buffer("scale", scale)

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        weight, self.scale = load_matrix(checkpoint, f"{name}.weight", self.precision)
        self.weight = frozen(weight)

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        """x [M, K] -> [M, N] in the model's dtype."""
        if not isinstance(x, QuantizedInput):
            x = quantize_input(x, self.precision.fp8)
        if self.scale is None:
            return F.linear(x.values, self.weight)
        dtype = self.precision.dtype
        return deepkern.fp8_gemm_nt(x.values, x.scale, self.weight, self.scale, out_dtype=dtype)


# Latent cache.  It holds per layer and token one latent [R] and one rotated key [rope], for all
# heads.  Sequences share one pool of pages, which `deepkern.mla_cache_append` writes and
# `deepkern.mla_decode` reads through a block table.


@dataclass
class TokenSlots:
    """Cache slots of the new tokens of one forward pass; all layers use the same.

    shape: (B, S).
    positions: int64 [B·S], index of each token in its sequence.
    slots: int64 [B·S], index of each token in the pool, in tokens.
    block_table: int32 [B, P], pages of each sequence.
    cache_seqlens: int32 [B], length of each sequence with the new tokens.
    """

    shape: tuple[int, int]
    positions: Tensor
    slots: Tensor
    block_table: Tensor
    cache_seqlens: Tensor


class LatentCache:
    """Latents and rotated keys of `batch` sequences of equal length, up to `capacity` tokens.

    layers: [num_layers, blocks, page, 1, R + rope], the pool of each layer.
    block_table: int32 [batch, P].  Page p of sequence b is block p·batch + b, so pages of one
        sequence are not adjacent.
    length: tokens of each sequence that the cache holds.
    """

    def __init__(
        self,
        config: Config,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page: int = 64,
        num_layers: int | None = None,
    ) -> None:
        pages = max(1, -(-capacity // page))
        num_layers = config.num_hidden_layers if num_layers is None else num_layers
        shape = (num_layers, max(1, batch * pages), page, 1, config.cache_width)
        self.layers = torch.zeros(shape, dtype=dtype, device=device)
        blocks = torch.arange(batch * pages, dtype=torch.int32, device=device)
        self.block_table = blocks.view(pages, batch).T.contiguous()
        self.page, self.capacity, self.length = page, pages * page, 0

    def next_slots(self, batch: int, count: int) -> TokenSlots:
        """Slots of the next `count` tokens of every sequence.

        The cache does not change: the caller adds `count` to `length` when all layers have run.
        """
        start, end = self.length, self.length + count
        size, device = self.block_table.shape[0], self.block_table.device
        if batch != size:
            raise ValueError(f"cache: got a batch of {batch}, expected {size}")
        if end > self.capacity:
            raise ValueError(f"cache: {end} tokens do not fit, it holds {self.capacity}")
        position = torch.arange(start, end, device=device)
        block = self.block_table[:, position // self.page].long()  # [B, S]
        slots = (block * self.page + position % self.page).flatten()
        seqlens = torch.full((batch,), end, dtype=torch.int32, device=device)
        return TokenSlots((batch, count), position.repeat(batch), slots, self.block_table, seqlens)


# Multi-head latent attention with absorbed weights.  Keys and values of head h are k = W_uk[h]·c
# and v = W_uv[h]·c of one latent c per token, so q·k = (W_ukᵀ[h]·q)·c.  The query is projected into
# the latent space, all heads attend to the cached latents, and W_uv is applied to the result.
# Prefill is the same computation with S > 1 queries.
# Source: DeepSeek-V2 report (arXiv:2405.04434), section 2.1 and appendix C.


class AbsorbedProjection(nn.Module):
    """kv_b_proj, split into W_uk [H, nope, R] and W_uv [H, v, R].  Both are real with `fp8` too."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        c, self.precision = config, precision
        self.heads, self.nope = c.num_attention_heads, c.qk_nope_head_dim
        weight = random_weight(self.heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        self.split(weight.to(precision.dtype))

    def split(self, weight: Tensor) -> None:
        """Stores weight [H, nope + v, R] as two contiguous parameters."""
        self.key = frozen(weight[:, : self.nope].contiguous())
        self.value = frozen(weight[:, self.nope :].contiguous())

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        weight = load_real(checkpoint, f"{name}.weight", self.precision)
        self.split(weight.view(self.heads, -1, weight.shape[1]))


class LatentAttention(nn.Module):
    """Causal attention of the new tokens over all cached tokens of their sequence."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        self.config, c = config, config
        self.fp8 = precision.fp8
        queries = c.num_attention_heads * c.qk_head_dim
        if c.q_lora_rank:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, precision)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS, precision)
            self.q_b_proj = Linear(c.q_lora_rank, queries, precision)
        else:
            self.q_proj = Linear(c.hidden_size, queries, precision)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.cache_width, precision)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS, precision)
        self.kv_b_proj = AbsorbedProjection(c, precision)
        self.o_proj = Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, precision)

    def forward(self, x: Tensor, tokens: TokenSlots, cache: Tensor, cos_sin: Tensor) -> Tensor:
        """x [B·S, hidden] -> [B·S, hidden]; writes the new tokens to the cache.

        cache: [blocks, page, 1, R + rope], this layer's pool.
        cos_sin: fp32 [positions, rope].
        """
        c = self.config
        rows = quantize_input(x, self.fp8)
        self.append_to_cache(self.kv_a_proj_with_mqa(rows), tokens, cache, cos_sin)
        out, _ = deepkern.mla_decode(
            self.absorbed_query(rows, tokens, cos_sin),
            cache,
            tokens.block_table,
            tokens.cache_seqlens,
            c.softmax_scale,
            v_head_dim=c.kv_lora_rank,
        )  # [B, S, H, R]
        out = torch.einsum("bshr,hdr->bshd", out, self.kv_b_proj.value)
        return self.o_proj(out.reshape(len(x), c.num_attention_heads * c.v_head_dim))

    def absorbed_query(self, x: QuantizedInput, tokens: TokenSlots, cos_sin: Tensor) -> Tensor:
        """x [B·S, hidden] -> [B, S, H, R + rope]: W_ukᵀ·q_nope, then the rotated q_rope."""
        c = self.config
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if c.q_lora_rank else self.q_proj(x)
        q = q.view(*tokens.shape, c.num_attention_heads, c.qk_head_dim)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_latent = torch.einsum("bshd,hdr->bshr", q_nope, self.kv_b_proj.key)
        cos_sin = cos_sin[tokens.positions].view(*tokens.shape, c.qk_rope_head_dim)
        return torch.cat([q_latent, apply_rope(q_rope, cos_sin, c.rope_interleave)], -1)

    def append_to_cache(
        self, latent_and_key: Tensor, tokens: TokenSlots, cache: Tensor, cos_sin: Tensor
    ) -> None:
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
            cos_sin=cos_sin,
        )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise."""
    return F.silu(gate) * up


class MLP(nn.Module):
    """down(swiglu(gate(x), up(x))), of a dense layer and of the shared experts."""

    def __init__(self, size: int, inner: int, precision: Precision) -> None:
        super().__init__()
        self.fp8 = precision.fp8
        self.gate_proj = Linear(size, inner, precision)
        self.up_proj = Linear(size, inner, precision)
        self.down_proj = Linear(inner, size, precision)

    def forward(self, x: Tensor) -> Tensor:
        """[M, hidden] -> [M, hidden]."""
        rows = quantize_input(x, self.fp8)
        return self.down_proj(swiglu(self.gate_proj(rows), self.up_proj(rows)))


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
        def read(expert: int, matrix: str) -> Matrix:
            return load_matrix(checkpoint, f"{name}.{expert}.{matrix}.weight", self.precision)

        w13 = [concat_gate_up(read(e, "gate_proj"), read(e, "up_proj")) for e in range(self.count)]
        w2 = [read(e, "down_proj") for e in range(self.count)]
        self.w13 = frozen(join(torch.stack, [weight for weight, _ in w13]))
        self.w2 = frozen(join(torch.stack, [weight for weight, _ in w2]))
        if self.precision.fp8:
            self.w13_scale, self.w2_scale = (torch.stack([s for _, s in m]) for m in (w13, w2))

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x [M, hidden], weights and expert indices [M, topk] -> weighted sum [M, hidden]."""
        if self.precision.fp8:
            w = self.w13, self.w13_scale, self.w2, self.w2_scale
            return deepkern.moe_forward(x, weights, indices, *w)
        rows, _, _, counts, handle = deepkern.expert_dispatch(x, indices, self.count)
        unused = len(rows) - int(counts.sum())  # rows past those of the last expert
        parts = rows.split([*counts.tolist(), unused])
        outputs = [self.run_expert(part, expert) for expert, part in enumerate(parts[:-1])]
        return deepkern.expert_combine(torch.cat([*outputs, parts[-1]]), weights, handle)

    def run_expert(self, x: Tensor, expert: int) -> Tensor:
        gate, up = F.linear(x, self.w13[expert]).chunk(2, 1)
        return F.linear(swiglu(gate, up), self.w2[expert])


def concat_gate_up(gate: Matrix, up: Matrix) -> Matrix:
    """Two weights [I, K] with their block scales -> one [2I, K], scales [2I/128, K/128].

    If I is not a multiple of 128 a block would hold rows of both.  The scales are then repeated to
    one per row, [2I, K/128].
    """
    weight = join(torch.cat, [gate[0], up[0]])
    if gate[1] is None:
        return weight, None
    scales, rows = [gate[1], up[1]], len(gate[0])
    if rows % 128:
        scales = [scale.repeat_interleave(128, 0)[:rows] for scale in scales]
    return weight, torch.cat(scales)


def join(function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]) -> Tensor:
    """function(tensors) for torch.cat or torch.stack; e4m3 tensors are passed as bytes."""
    if tensors[0].dtype != torch.float8_e4m3fn:
        return function(tensors)
    return function([t.view(torch.uint8) for t in tensors]).view(torch.float8_e4m3fn)


class MoE(nn.Module):
    """Σ over a token's experts of weight·expert(x), plus the shared experts."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        c = config
        self.gate = Gate(c, precision)
        self.experts = Experts(c, precision)
        inner = c.moe_intermediate_size * c.n_shared_experts
        self.shared_experts = MLP(c.hidden_size, inner, precision) if inner else None

    def forward(self, x: Tensor) -> Tensor:
        """[M, hidden] -> [M, hidden]."""
        out = self.experts(x, *self.gate(x))
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

    def forward(self, x: Tensor, tokens: TokenSlots, cache: Tensor, cos_sin: Tensor) -> Tensor:
        """x [B·S, hidden] -> [B·S, hidden]; `cache` is the pool of this layer."""
        x = x + self.self_attn(self.input_layernorm(x), tokens, cache, cos_sin)
        return x + self.mlp(self.post_attention_layernorm(x))


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
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        fp8: bool = False,
    ) -> DeepSeek:
        """Loads a checkpoint directory in the Hugging Face layout.

        With `fp8` every Linear keeps e4m3 weights and casts its input per token; weights that are
        stored in another dtype are quantized at load.  Without it, weights are dequantized to
        `dtype` at load.

        Raises:
            FileNotFoundError: no such directory, or no config.json in it.
            CheckpointError (a ValueError): a tensor is damaged, missing, unknown, or has a wrong
                shape or dtype.  The message names the file and the tensor.
        """
        return cls.from_checkpoint(Checkpoint.open(path), Precision(dtype, device, fp8))

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, precision: Precision) -> DeepSeek:
        """Checks all tensors, builds the model on the meta device, and loads module by module."""
        config = checkpoint.check()
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
        x = self.embed(tokens, self.model["embed_tokens"].weight)
        batch, count = tokens.shape
        cache = self.new_cache(batch, count) if cache is None else cache
        slots = cache.next_slots(batch, count)
        cos_sin = self.rotary_table(cache.length + count)
        for index in range(self.config.num_hidden_layers):
            x = self.model["layers"][index](x, slots, cache.layers[index], cos_sin)
        cache.length += count
        return self.model["norm"](x).view(batch, count, self.config.hidden_size)

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
        both = torch.cat([layer.enorm(embedded), layer.hnorm(hidden)], -1)
        cache = LatentCache(c, batch, count, p.dtype, p.device, num_layers=1)
        slots, cos_sin = cache.next_slots(batch, count), self.rotary_table(count)
        x = layer(F.linear(both, layer.eh_proj.weight), slots, cache.layers[0], cos_sin)
        x = F.linear(layer.shared_head["norm"](x), layer.shared_head["head"].weight)
        return x.view(batch, count, c.vocab_size)

    def generate(self, tokens: Tensor, max_new_tokens: int) -> Tensor:
        """int64 [B, S] -> [B, S + max_new_tokens]: the prompt and its greedy continuation."""
        from model.generate import generate  # the engine, which imports this module

        return generate(self, tokens, max_new_tokens)
