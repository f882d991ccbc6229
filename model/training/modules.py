"""The DeepSeek architecture on deepkern's ops with their gradients, for training.

    x = embedding(tokens)
    x = x + attention(norm(x));  x = x + mlp_or_experts(norm(x))        for every layer
    logits = head(norm(x))

`model/deepseek.py` serves the same model.  Its modules hold frozen weights, often in FP8, and work
on rows of many requests over a cache of latents; no gradient goes through a cache.  So training has
modules of its own.  They call the same products, router and attention ops, and read and write the
same checkpoints (`model/training/exchange.py`).  `model/plain.py` stays plain PyTorch on purpose:
it is what tests compare both with.

By the V3 recipe (precision "fp8") the products of attention, MLPs and experts run in FP8 in all
three directions, from fp32 weights.  The activations are bf16; router, norms and sums are fp32.
The input of every SwiGLU is saved in FP8 and its output recomputed; with `recompute`, so are the
outputs of the norms and of the up-projections of the attention.

Source: DeepSeek-V3 report (arXiv:2412.19437), sections 2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import deepkern
from model.config import LATENT_NORM_EPS, Config
from model.rope import apply_rope, interleave_pairs, pair_factors, rope_cos_sin


class Numbers(NamedTuple):
    """dtype: of the activations.  fp8: the products run in FP8.  recompute: see `Recipe`."""

    dtype: torch.dtype = torch.float32
    fp8: bool = False
    recompute: bool = False

    @classmethod
    def of(cls, precision: str, recompute: bool) -> Numbers:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return cls(dtype, precision == "fp8", recompute)

    def run(self, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """function(*args), of which the backward pass recomputes all but the attention."""
        if not (self.recompute and torch.is_grad_enabled()):
            return function(*args)
        return checkpoint(
            function, *args, use_reentrant=False, context_fn=_save_attention,
            preserve_rng_state=False,
        )  # fmt: skip


def _save_attention():  # noqa: ANN202
    return create_selective_checkpoint_contexts([torch.ops.deepkern.mla_prefill.default])


class Sequences(NamedTuple):
    """B sequences of S tokens, one after the other in the rows of the activations, T = B·S.

    cos, sin: fp32 [T, 1, rope], factors of the rotary embedding (`pair_factors`).
    cu_seqlens: int32 [B + 1], the first row of each sequence.
    """

    shape: tuple[int, int]
    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor

    @classmethod
    def make(cls, config: Config, tokens: Tensor) -> Sequences:
        """The sequences of tokens [B, S]."""
        B, S = tokens.shape
        table = rope_cos_sin(config, S).to(tokens.device)[:, None].repeat(B, 1, 1)
        starts = torch.arange(B + 1, dtype=torch.int32, device=tokens.device) * S
        return cls((B, S), *pair_factors(table), starts)


def multiply(x: Tensor, weight: Tensor, fp8: bool) -> Tensor:
    """x [T, K] times weightᵀ, fp32 [N, K] -> [T, N] in the dtype of x."""
    if fp8:
        return deepkern.fp8_linear(x, weight)
    return deepkern.gemm_nt(x, weight.to(x.dtype))


class Linear(nn.Module):
    """x·weightᵀ, in FP8 or in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, fp8: bool) -> None:
        super().__init__()
        self.fp8 = fp8
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight, self.fp8)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32, rounded once."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention, not absorbed: computes q, k and v of every head."""

    def __init__(self, config: Config, numbers: Numbers) -> None:
        super().__init__()
        self.config, self.numbers, c, fp8 = config, numbers, config, numbers.fp8
        queries = c.num_attention_heads * c.qk_head_dim
        if c.q_lora_rank:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, fp8)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(c.q_lora_rank, queries, fp8)
        else:
            self.q_proj = Linear(c.hidden_size, queries, fp8)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.cache_width, fp8)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS)
        per_head = c.qk_nope_head_dim + c.v_head_dim
        self.kv_b_proj = Linear(c.kv_lora_rank, c.num_attention_heads * per_head, fp8)
        self.o_proj = Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, fp8)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        c = self.config
        first = self.q_a_proj if c.q_lora_rank else self.q_proj
        # One product: x is cast once.
        weight = torch.cat([first.weight, self.kv_a_proj_with_mqa.weight])
        q, kv = multiply(x, weight, self.numbers.fp8).split([len(first.weight), c.cache_width], -1)
        return self.o_proj(self.numbers.run(self.attend, q, kv, *sequences[1:]))

    def attend(self, q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, starts: Tensor) -> Tensor:
        """q [T, q_lora or H·(nope + rope)], kv [T, R + rope] -> [T, H·v]."""
        c = self.config
        if c.q_lora_rank:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.unflatten(-1, (-1, c.qk_head_dim))  # [T, H, nope + rope]
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = kv.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        if not c.rope_interleave:
            q_rope, k_rope = interleave_pairs(q_rope), interleave_pairs(k_rope)
        q = torch.cat([q_nope, apply_rope(q_rope, cos, sin)], -1)
        k_rope = apply_rope(k_rope[:, None], cos, sin).expand(-1, q.shape[1], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (q.shape[1], -1))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k = torch.cat([k_nope, k_rope], -1)
        out, _ = deepkern.mla_prefill(q, k, v, starts, starts, c.softmax_scale, True)
        return out.flatten(1)


class MLP(nn.Module):
    """down(swiglu(gate(x), up(x))): gate_up_proj [2, I, hidden], down_proj [hidden, I].

    In FP8 it is one expert that every token chooses, so that the input of SwiGLU is saved in FP8.
    """

    def __init__(self, size: int, inner: int, numbers: Numbers) -> None:
        super().__init__()
        self.numbers = numbers
        self.gate_up_proj = nn.Parameter(torch.empty(2, inner, size))
        self.down_proj = nn.Parameter(torch.empty(size, inner))

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        gate_up = self.gate_up_proj.flatten(0, 1)
        if self.numbers.fp8:
            one = torch.ones(len(x), 1, device=x.device)
            first = torch.zeros(len(x), 1, dtype=torch.int32, device=x.device)
            return deepkern.fp8_experts(x, one, first, gate_up[None], self.down_proj[None])
        inner = deepkern.swiglu(multiply(x, gate_up, False))
        return multiply(inner, self.down_proj, False)


class Gate(nn.Module):
    """The router: logits in fp32, the bias that only the choice of experts uses, no gradient."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config
        self.biased = c.topk_method == "noaux_tc"
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> logits fp32 [T, E], weights fp32 [T, topk], experts int64 [T, topk]."""
        logits = deepkern.gemm_nt(x.float(), self.weight)
        return logits, *deepkern.route_topk(logits, self.e_score_correction_bias, **self.routing)


class Experts(nn.Module):
    """The routed experts: w13 [E, 2, I, hidden], gate and up, and w2 [E, hidden, I]."""

    def __init__(self, config: Config, numbers: Numbers) -> None:
        super().__init__()
        c, self.numbers = config, numbers
        E, size, inner = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.w13 = nn.Parameter(torch.empty(E, 2, inner, size))
        self.w2 = nn.Parameter(torch.empty(E, size, inner))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [T, hidden], weights and experts [T, topk] -> weighted sum [T, hidden]."""
        w13, w2 = self.w13.flatten(1, 2), self.w2
        if self.numbers.fp8:
            return deepkern.fp8_experts(x, weights, experts, w13, w2)
        rows, _, _, counts, handle = deepkern.expert_dispatch(x, experts, len(w2))
        return deepkern.expert_combine(self.run_each(rows, counts, w13, w2), weights, handle)

    def run_each(self, rows: Tensor, counts: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        """Rows sorted by expert, `counts` of each: the outputs of their experts, one by one."""
        parts = rows.split(counts.tolist())
        outputs = [
            multiply(deepkern.swiglu(multiply(part, up, False)), down, False)
            for part, up, down in zip(parts, w13, w2, strict=True)
        ]
        return torch.cat(outputs)


class MoE(nn.Module):
    """Σ over a token's experts of weight·expert(x), plus the shared experts.

    In training mode it stores `load`, int32 [E], the tokens of each expert in this pass, and
    `balance`, the sequence-wise balance loss, 1 for an even load.
    """

    def __init__(self, config: Config, numbers: Numbers) -> None:
        super().__init__()
        c, self.numbers = config, numbers
        self.gate = Gate(c)
        self.experts = Experts(c, numbers)
        inner = c.moe_intermediate_size * c.n_shared_experts
        self.shared_experts = MLP(c.hidden_size, inner, numbers) if inner else None
        self.load: Tensor
        self.balance: Tensor

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        logits, weights, experts = self.gate(x)
        if self.training:
            self.load = deepkern.expert_load(experts, logits.shape[1])
            self.balance = self.balance_loss(logits, experts, sequences)
        out = self.experts(x, weights, experts)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def balance_loss(self, logits: Tensor, experts: Tensor, sequences: Sequences) -> Tensor:
        by_sequence = (t.unflatten(0, sequences.shape) for t in (logits, experts))
        return deepkern.sequence_balance_loss(*by_sequence, self.gate.routing["score"], 1.0)


class Layer(nn.Module):
    """Attention and a dense MLP or experts, each after a norm and added to the residual stream."""

    def __init__(self, config: Config, index: int, numbers: Numbers) -> None:
        super().__init__()
        c, self.numbers = config, numbers
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, numbers)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.is_moe = c.is_moe(index)
        if self.is_moe:
            self.mlp: nn.Module = MoE(c, numbers)
        else:
            self.mlp = MLP(c.hidden_size, c.intermediate_size, numbers)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        run = self.numbers.run
        x = x + self.self_attn(run(self.input_layernorm, x), sequences)
        rows = run(self.post_attention_layernorm, x)
        return x + (self.mlp(rows, sequences) if self.is_moe else self.mlp(rows))


class PredictionLayer(Layer):
    """Multi-token prediction: predicts token i+2 from the hidden state at i and token i+1.

    Embedding and head are those of the main model.
    """

    def __init__(self, config: Config, index: int, numbers: Numbers) -> None:
        super().__init__(config, index, numbers)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.eh_proj = Linear(2 * size, size, False)
        self.norm = RMSNorm(size, eps)

    def forward(self, hidden: Tensor, sequences: Sequences, embedded: Tensor) -> Tensor:
        """hidden [T, hidden] after a final norm, embedded: the next tokens -> [T, hidden]."""
        run = self.numbers.run
        both = torch.cat([run(self.enorm, embedded), run(self.hnorm, hidden)], -1)
        return run(self.norm, super().forward(self.eh_proj(both), sequences))


class TrainableDeepSeek(nn.Module):
    """The model with fp32 weights that get gradients.

        model = TrainableDeepSeek(Config.preset("tiny"), "fp8")
        losses = model(tokens)  # int64 [B, S + 1] -> {"main", "mtp", "balance"}

    Raises ValueError for an architecture that it cannot train: one with an indexer (V3.2).
    """

    def __init__(self, config: Config, precision: str = "fp32", recompute: bool = False) -> None:
        super().__init__()
        if config.index_topk:
            raise ValueError("TrainableDeepSeek: index_topk: expected 0; an indexer is not trained")
        self.config, c = config, config
        self.numbers = numbers = Numbers.of(precision, recompute)
        main = c.num_hidden_layers
        self.embed_tokens = nn.Parameter(torch.empty(c.vocab_size, c.hidden_size))
        self.layers = nn.ModuleList(Layer(c, i, numbers) for i in range(main))
        self.prediction = nn.ModuleList(
            PredictionLayer(c, main + i, numbers) for i in range(c.num_nextn_predict_layers)
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Parameter(torch.empty(c.vocab_size, c.hidden_size))

    @property
    def experts(self) -> list[MoE]:
        """The layers with experts, in order."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> [B·S, hidden]."""
        return F.embedding(tokens.flatten(), self.embed_tokens).to(self.numbers.dtype)

    def hidden(self, tokens: Tensor, sequences: Sequences | None = None) -> Tensor:
        """int64 [B, S] -> hidden states after the final norm [B·S, hidden]."""
        sequences = sequences or Sequences.make(self.config, tokens)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, sequences)
        return self.numbers.run(self.norm, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, hidden] -> [T, vocab]."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return multiply(hidden, head, False)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """int64 [B, S + 1] -> the losses: means in nats of the next token and of those after it.

        "mtp" is the mean over the prediction layers, each over the tokens that it can predict.
        "balance" is the sum over the layers with experts.  A loss that the model does not have is
        absent.
        """
        inputs = tokens[:, :-1]
        sequences = Sequences.make(self.config, inputs)
        hidden = self.hidden(inputs, sequences)
        losses = {"main": self.cross_entropy(hidden, tokens, 1)}
        ahead = []
        for depth, layer in enumerate(self.prediction):
            following = shifted(tokens, depth + 1)[:, :-1]
            hidden = layer(hidden, sequences, self.embed(following))
            ahead.append(self.cross_entropy(hidden, tokens, depth + 2))
        if ahead:
            losses["mtp"] = torch.stack(ahead).mean()
        if self.experts:
            losses["balance"] = torch.stack([moe.balance for moe in self.experts]).sum()
        return losses

    def cross_entropy(self, hidden: Tensor, tokens: Tensor, ahead: int) -> Tensor:
        """hidden [B·S, hidden], tokens [B, S + 1]: the mean loss of token i + `ahead` at row i."""
        target = shifted(tokens, ahead)[:, :-1].clone()
        count = tokens.shape[1] - ahead  # rows of a sequence with a target
        target[:, count:] = -100  # ignored
        logits = self.logits(hidden).float()
        return F.cross_entropy(logits, target.flatten(), ignore_index=-100)


def shifted(tokens: Tensor, count: int) -> Tensor:
    """tokens[:, i + count], and the last token where there is none."""
    return F.pad(tokens[:, count:], (0, count), value=0)
