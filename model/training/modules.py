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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import deepkern
from model.config import LATENT_NORM_EPS, Config
from model.rope import apply_rope, interleave_pairs
from model.training.context import Sequences
from model.training.parallel import Parallel, local


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


def multiply(x: Tensor, weight: Tensor, fp8: bool) -> Tensor:
    """x [T, K] times weightᵀ, fp32 [N, K] -> [T, N] in the dtype of x."""
    return deepkern.fp8_linear(x, weight) if fp8 else Product.apply(x, weight)


class Product(torch.autograd.Function):
    """x times weightᵀ in the dtype of x; the gradient of the weight is summed and kept in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return deepkern.gemm_nt(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = deepkern.gemm_nt(grad, weight.t())
        return grad_x, deepkern.gemm_nt(grad.t(), x.t(), torch.float32)


class Linear(nn.Module):
    """x·weightᵀ, in FP8 or in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, fp8: bool) -> None:
        super().__init__()
        self.fp8 = fp8
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, local(self.weight), self.fp8)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32, rounded once."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention, not absorbed: computes q, k and v of this rank's heads."""

    def __init__(self, config: Config, numbers: Numbers, parallel: Parallel) -> None:
        super().__init__()
        self.config, self.numbers, self.parallel = config, numbers, parallel
        c, fp8 = config, numbers.fp8
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
        q, kv = self.project(x)
        out = self.numbers.run(self.attend, q, kv, *sequences[3:])
        return self.parallel.leave(self.o_proj(out))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> [T, q_lora or H·(nope + rope)] and [T, R + rope]."""
        c = self.config
        if not c.q_lora_rank and self.parallel.layout.tensor > 1:
            # The heads of q are this rank's own, and kv is the same on all ranks.
            return self.q_proj(self.parallel.enter(x)), self.kv_a_proj_with_mqa(x)
        first = self.q_a_proj if c.q_lora_rank else self.q_proj
        # One product: x is cast once.
        weight = torch.cat([first.weight, self.kv_a_proj_with_mqa.weight])
        return multiply(x, weight, self.numbers.fp8).split([len(first.weight), c.cache_width], -1)

    def attend(
        self,
        q: Tensor,
        kv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        key_rows: Tensor | None,
    ) -> Tensor:
        """q and kv of `project` -> [T, H·v]; the others are those of `Sequences`."""
        c, parallel = self.config, self.parallel
        if c.q_lora_rank:
            q = self.q_b_proj(parallel.enter(self.q_a_layernorm(q)))
        q = q.unflatten(-1, (-1, c.qk_head_dim))  # [T, H, nope + rope]
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        widths = [c.kv_lora_rank, c.qk_rope_head_dim]
        latent, k_rope = kv.split(widths, -1)
        if not c.rope_interleave:
            q_rope, k_rope = interleave_pairs(q_rope), interleave_pairs(k_rope)
        q = torch.cat([q_nope, apply_rope(q_rope, cos, sin)], -1)
        k_rope = apply_rope(k_rope[:, None], cos, sin)[:, 0]
        kv = torch.cat([self.kv_a_layernorm(latent), k_rope], -1)
        latent, k_rope = parallel.enter(parallel.gather(kv, key_rows)).split(widths, -1)
        kv = self.kv_b_proj(latent).unflatten(-1, (q.shape[1], -1))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, q.shape[1], -1)], -1)
        out, _ = deepkern.mla_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, c.softmax_scale, True)
        return out.flatten(1)


class MLP(nn.Module):
    """down(swiglu(gate(x), up(x))): gate_up_proj [2, I, hidden], down_proj [hidden, I].

    In FP8 it is one expert that every token chooses, so that the input of SwiGLU is saved in FP8.
    A tensor rank has a part of I; the result is the sum over the ranks (`Parallel.leave`).
    """

    def __init__(self, size: int, inner: int, numbers: Numbers) -> None:
        super().__init__()
        self.numbers = numbers
        self.gate_up_proj = nn.Parameter(torch.empty(2, inner, size))
        self.down_proj = nn.Parameter(torch.empty(size, inner))

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        gate_up, down = local(self.gate_up_proj).flatten(0, 1), local(self.down_proj)
        if self.numbers.fp8:
            one = torch.ones(len(x), 1, device=x.device)
            first = torch.zeros(len(x), 1, dtype=torch.int32, device=x.device)
            return deepkern.fp8_experts(x, one, first, gate_up[None], down[None])
        inner = deepkern.swiglu(multiply(x, gate_up, False))
        return multiply(inner, down, False)


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
    """The routed experts: w13 [E, 2, I, hidden], gate and up, and w2 [E, hidden, I].

    Each tensor rank computes some of the tokens, and 0 for the others.
    """

    def __init__(self, config: Config, numbers: Numbers, parallel: Parallel) -> None:
        super().__init__()
        c, self.numbers, self.parallel = config, numbers, parallel
        E, size, inner = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.w13 = nn.Parameter(torch.empty(E, 2, inner, size))
        self.w2 = nn.Parameter(torch.empty(E, size, inner))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [T, hidden], weights and experts [T, topk] -> weighted sum [T, hidden]."""
        w13, w2 = local(self.w13).flatten(1, 2), local(self.w2)
        experts = self.parallel.own_assignments(experts)
        if self.parallel.experts is not None:
            return self.run_distributed(x, weights, experts, w13, w2)
        if self.numbers.fp8:
            return deepkern.fp8_experts(x, weights, experts, w13, w2)
        rows, _, _, counts, handle = deepkern.expert_dispatch(x, experts, len(w2))
        return deepkern.expert_combine(self.run_each(rows, counts, w13, w2), weights, handle)

    def run_distributed(
        self, x: Tensor, weights: Tensor, experts: Tensor, w13: Tensor, w2: Tensor
    ) -> Tensor:
        """`forward` with w13 and w2 of this rank's experts."""
        ep = self.parallel.experts
        rows, _, index, counts, handle = ep.dispatch(x, experts, weights)
        if self.numbers.fp8:
            one = torch.ones(len(rows), 1, device=x.device)
            y = deepkern.fp8_experts(rows, one, index[:, None], w13, w2)
        else:
            y = self.run_each(rows, counts, w13, w2)
        return ep.combine(y, handle)

    def run_each(self, rows: Tensor, counts: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        """Rows sorted by expert, `counts` of each: the outputs of their experts, one by one."""
        sizes = counts.tolist()
        parts = rows[: sum(sizes)].split(sizes)
        outputs = [
            multiply(deepkern.swiglu(multiply(part, up, False)), down, False)
            for part, up, down in zip(parts, w13, w2, strict=True)
        ]
        return torch.cat(outputs)


class MoE(nn.Module):
    """Σ over a token's experts of weight·expert(x), plus the shared experts.

    In training mode it stores `load`, int32 [E], the tokens of each expert among this rank's tokens
    in this pass, and `balance`, the sequence-wise balance loss, 1 for an even load.
    """

    def __init__(self, config: Config, numbers: Numbers, parallel: Parallel) -> None:
        super().__init__()
        c, self.parallel = config, parallel
        self.gate = Gate(c)
        self.experts = Experts(c, numbers, parallel)
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
        x, weights = self.parallel.enter(x), self.parallel.enter(weights)
        out = self.experts(x, weights, experts)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return self.parallel.leave(out)

    def balance_loss(self, logits: Tensor, experts: Tensor, sequences: Sequences) -> Tensor:
        whole = (self.parallel.gather(t, sequences.order) for t in (logits, experts))
        by_sequence = (t.unflatten(0, sequences.shape) for t in whole)
        return deepkern.sequence_balance_loss(*by_sequence, self.gate.routing["score"], 1.0)


class Layer(nn.Module):
    """Attention and a dense MLP or experts, each after a norm and added to the residual stream."""

    def __init__(self, config: Config, index: int, numbers: Numbers, parallel: Parallel) -> None:
        super().__init__()
        c, self.numbers, self.parallel = config, numbers, parallel
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, numbers, parallel)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.is_moe = c.is_moe(index)
        if self.is_moe:
            self.mlp: nn.Module = MoE(c, numbers, parallel)
        else:
            self.mlp = MLP(c.hidden_size, c.intermediate_size, numbers)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        run = self.numbers.run
        x = x + self.self_attn(run(self.input_layernorm, x), sequences)
        rows = run(self.post_attention_layernorm, x)
        if self.is_moe:
            return x + self.mlp(rows, sequences)
        return x + self.parallel.leave(self.mlp(self.parallel.enter(rows)))


class PredictionLayer(Layer):
    """Multi-token prediction: predicts token i+2 from the hidden state at i and token i+1.

    Embedding and head are those of the main model.
    """

    def __init__(self, config: Config, index: int, numbers: Numbers, parallel: Parallel) -> None:
        super().__init__(config, index, numbers, parallel)
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

    parallel: the layout of the processes, whose weights `Parallel.shard` divides.  Tokens are those
    of this data rank, whole sequences; the losses are means over this rank's tokens whose mean over
    the ranks is that of all tokens.

    Raises ValueError for an architecture that it cannot train: one with an indexer (V3.2).
    """

    def __init__(
        self,
        config: Config,
        precision: str = "fp32",
        recompute: bool = False,
        parallel: Parallel | None = None,
    ) -> None:
        super().__init__()
        self.parallel = parallel = parallel or Parallel()
        if config.index_topk:
            raise ValueError("TrainableDeepSeek: index_topk: expected 0; an indexer is not trained")
        self.config, c = config, config
        self.numbers = numbers = Numbers.of(precision, recompute)
        main = c.num_hidden_layers
        self.embed_tokens = nn.Parameter(torch.empty(c.vocab_size, c.hidden_size))
        self.layers = nn.ModuleList(Layer(c, i, numbers, parallel) for i in range(main))
        self.prediction = nn.ModuleList(
            PredictionLayer(c, main + i, numbers, parallel)
            for i in range(c.num_nextn_predict_layers)
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Parameter(torch.empty(c.vocab_size, c.hidden_size))

    @property
    def experts(self) -> list[MoE]:
        """The layers with experts, in order."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def sequences(self, tokens: Tensor) -> Sequences:
        """The sequences of tokens [B, S], with this rank's part of them."""
        p = self.parallel
        return Sequences.make(self.config, tokens, p.context_rank, p.layout.context)

    def embed(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """int64 [B, S] -> [T, hidden], of this rank's T tokens."""
        tokens = tokens[:, sequences.positions].flatten()
        return F.embedding(tokens, self.embed_tokens).to(self.numbers.dtype)

    def hidden(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """int64 [B, S] -> hidden states after the final norm [T, hidden]."""
        x = self.embed(tokens, sequences)
        for layer in self.layers:
            x = layer(x, sequences)
        return self.numbers.run(self.norm, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, hidden] -> [T, vocab]."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return multiply(hidden, head, False)

    def predict(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> logits [B, S, vocab], on every context rank."""
        sequences = self.sequences(tokens)
        logits = self.logits(self.hidden(tokens, sequences))
        return self.parallel.gather(logits, sequences.order).unflatten(0, tokens.shape)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """int64 [B, S + 1] -> the losses: means in nats of the next token and of those after it.

        "mtp" is the mean over the prediction layers, each over the tokens that it can predict.
        "balance" is the sum over the layers with experts.  A loss that the model does not have is
        absent.
        """
        inputs = tokens[:, :-1]
        sequences = self.sequences(inputs)
        hidden = self.hidden(inputs, sequences)
        losses = {"main": self.cross_entropy(hidden, tokens, sequences, 1)}
        ahead = []
        for depth, layer in enumerate(self.prediction):
            following = shifted(tokens, depth + 1)[:, :-1]
            hidden = layer(hidden, sequences, self.embed(following, sequences))
            ahead.append(self.cross_entropy(hidden, tokens, sequences, depth + 2))
        if ahead:
            losses["mtp"] = torch.stack(ahead).mean()
        if self.experts:
            losses["balance"] = torch.stack([moe.balance for moe in self.experts]).sum()
        return losses

    def cross_entropy(
        self, hidden: Tensor, tokens: Tensor, sequences: Sequences, ahead: int
    ) -> Tensor:
        """hidden [T, hidden], tokens [B, S + 1]: the mean loss of token i + `ahead` at position i.

        The sum over this rank's tokens, divided by the mean of their number over the context ranks.
        """
        target = shifted(tokens, ahead)[:, :-1].clone()
        last = tokens.shape[1] - ahead  # positions of a sequence with a target
        target[:, last:] = -100  # ignored
        target = target[:, sequences.positions].flatten()
        logits = self.logits(hidden).float()
        loss = F.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        return loss / (len(tokens) * last / self.parallel.layout.context)


def shifted(tokens: Tensor, count: int) -> Tensor:
    """tokens[:, i + count], and 0 where there is none."""
    return F.pad(tokens[:, count:], (0, count), value=0)
