"""The op calls of one GPU in a training step, a prefill and a decoding step of a model.

The ops are those of `model/deepseek.py` and, in training, of `model/training/modules.py`; a test
compares the FLOPs with those of a step of the trainer. Norms are `rmsnorm_cast` in training too,
where the trainer normalizes in PyTorch and casts after; the ops inside `fp8_experts` are calls of
their own here.

The GPU has all weights of a layer except the experts, of which it has `experts`. Each token's rows
are balanced over the experts, so a GPU receives as many rows as its own tokens send.
"""

from __future__ import annotations

import torch

from deepkern.arithmetic import cdiv
from model.config import Config

from .op_calls import (
    BF16,
    FP8,
    FP32,
    INT32,
    INT64,
    Call,
    call,
    elementwise,
    grouped,
    grouped_weight_gradient,
    linear,
    linear_gradients,
    meta,
    per_token,
    times,
)

PAGE = 64  # tokens per page of the cache
ATTENTION, EXPERTS, DENSE, HEAD, OPTIMIZER = (
    "attention",
    "experts",
    "dense MLP",
    "head",
    "optimizer",
)
RECOMPUTE = ("selective", "full")


def offsets(tokens: int, length: int) -> torch.Tensor:
    """int32 boundaries of sequences of `length` tokens."""
    return torch.arange(0, tokens + 1, length, dtype=INT32)


def norm(part: str, T: int, size: int) -> Call:
    return call(part, "rmsnorm_cast", meta(T, size), meta(size), residual=meta(T, size))


def latent_norm(T: int, size: int) -> Call:
    return call(ATTENTION, "rmsnorm_cast", meta(T, size), meta(size))


def norm_gradient(part: str, T: int, size: int) -> Call:
    """Reads the input and both gradients of it, writes their sum."""
    return elementwise(part, *[meta(T, size)] * 4)


# Shapes of the linear layers of attention, (N, K).


def first_projection(c: Config) -> tuple[int, int]:
    queries = c.q_lora_rank or c.num_attention_heads * c.qk_head_dim
    return queries + c.cache_width, c.hidden_size


def query_projection(c: Config) -> tuple[int, int] | None:
    H = c.num_attention_heads
    return (H * c.qk_head_dim, c.q_lora_rank) if c.q_lora_rank else None


def key_projection(c: Config) -> tuple[int, int]:
    return c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank


def output_projection(c: Config) -> tuple[int, int]:
    return c.hidden_size, c.num_attention_heads * c.v_head_dim


def indexer_projections(c: Config) -> list[tuple[int, int]]:
    """Queries, the key of all heads, and the weights of the heads (V3.2)."""
    H, D = c.index_n_heads, c.index_head_dim
    return [(H * D, c.q_lora_rank or 0), (D, c.hidden_size), (H, c.hidden_size)] if H else []


def prefill_operands(c: Config, T: int, S: int) -> tuple:
    """q, k, v, both cu_seqlens and the scale of mla_prefill."""
    H, width = c.num_attention_heads, c.qk_head_dim
    q, v = meta(T, H, width), meta(T, H, c.v_head_dim)
    return q, meta(T, H, width), v, offsets(T, S), offsets(T, S), c.softmax_scale


def rotate(c: Config, T: int, keys: bool = True) -> Call:
    """RoPE and concatenation of queries, and of keys of every head."""
    H = c.num_attention_heads
    q, k = meta(T, H, c.qk_head_dim), meta(T, H, c.qk_nope_head_dim)
    return elementwise(ATTENTION, q, q, *((k, q) if keys else ()))


# Training.


def up_projections(c: Config, T: int, path: str) -> list[Call]:
    """Latent norms and what expands the latents: recomputed in the backward pass by V3."""
    calls = [latent_norm(T, c.kv_lora_rank), *linear(ATTENTION, T, *key_projection(c), path, False)]
    if query := query_projection(c):
        calls += [latent_norm(T, query[1]), *linear(ATTENTION, T, *query, path, False)]
    return [*calls, rotate(c, T)]


def attention_forward(c: Config, T: int, S: int, path: str) -> list[Call]:
    return [
        norm(ATTENTION, T, c.hidden_size),
        *linear(ATTENTION, T, *first_projection(c), path, cast=False),
        *up_projections(c, T, path),
        call(ATTENTION, "mla_prefill", *prefill_operands(c, T, S)),
        *linear(ATTENTION, T, *output_projection(c), path),
    ]


def attention_backward(c: Config, T: int, S: int, path: str) -> list[Call]:
    q, k, v, *rest = prefill_operands(c, T, S)
    out, lse = meta(*v.shape), meta(v.shape[1], T, dtype=FP32)
    shapes = [output_projection(c), key_projection(c), query_projection(c), first_projection(c)]
    gradients = [g for s in shapes if s for g in linear_gradients(ATTENTION, T, *s, path)]
    latents = [norm_gradient(ATTENTION, T, width) for width in (c.kv_lora_rank, c.q_lora_rank or 0)]
    return [
        *gradients,
        call(ATTENTION, "mla_prefill_backward", out, q, k, v, out, lse, *rest),
        rotate(c, T),
        *latents,
        norm_gradient(ATTENTION, T, c.hidden_size),
    ]


def swiglu(part: str, rows: int, inner: int, path: str) -> Call:
    op = "swiglu" if path == "bf16" else "swiglu_cast"
    return call(part, op, meta(rows, 2 * inner))


def saved_bytes(c: Config, path: str, recompute: str) -> int:
    """Bytes of a token that a layer with experts keeps for its backward pass."""
    K, H, topk = c.hidden_size, c.num_attention_heads, c.num_experts_per_tok
    if recompute == "full":
        return 2 * K
    size = 1 if path == "fp8" else 2  # operands of the gradients of weights
    latents = (c.q_lora_rank or H * c.qk_head_dim) + c.cache_width
    attention = 2 * latents + (2 + size) * H * c.v_head_dim + 4 * H
    rows = topk + c.n_shared_experts if c.n_routed_experts else 1
    inner = c.moe_intermediate_size if c.n_routed_experts else c.intermediate_size
    return 2 * 2 * K + attention + size * rows * (K + 2 * inner)


def swiglu_gradient(part: str, rows: int, inner: int, path: str) -> Call:
    stored = (meta(rows, 2 * inner), None) if path == "bf16" else per_token(rows, 2 * inner)
    return call(part, "swiglu_cast_backward", meta(rows, inner), *stored)


def mlp_forward(c: Config, part: str, T: int, inner: int, path: str) -> list[Call]:
    first = linear(part, T, 2 * inner, c.hidden_size, path, cast=False)
    second = linear(part, T, c.hidden_size, inner, path, cast=False)
    return [*first, swiglu(part, T, inner, path), *second]


def mlp_backward(c: Config, part: str, T: int, inner: int, path: str) -> list[Call]:
    return [
        *linear_gradients(part, T, c.hidden_size, inner, path),
        swiglu_gradient(part, T, inner, path),
        *linear_gradients(part, T, 2 * inner, c.hidden_size, path),
    ]


def route(c: Config, T: int) -> list[Call]:
    """The router, in fp32."""
    E = c.n_routed_experts
    logits = meta(T, E, dtype=FP32)
    weights = meta(E, c.hidden_size, dtype=FP32)
    bias = meta(E, dtype=FP32) if c.topk_method == "noaux_tc" else None
    return [
        call(EXPERTS, "gemm_nt", meta(T, c.hidden_size, dtype=FP32), weights),
        call(EXPERTS, "route_topk", logits, bias, c.num_experts_per_tok, c.n_group, c.topk_group),
    ]


def slots(c: Config, T: int) -> torch.Tensor:
    return meta(T, c.num_experts_per_tok, dtype=INT64)


def routed_forward(c: Config, T: int, experts: int, path: str) -> list[Call]:
    """Dispatch to `experts` experts of this GPU, their two products, combine."""
    K, inner, rows = c.hidden_size, c.moe_intermediate_size, T * c.num_experts_per_tok
    cast = {"cast": "fp32"} if path == "fp8" else {}
    handle, weights = slots(c, T).to(INT32), meta(T, c.num_experts_per_tok, dtype=FP32)
    return [
        call(EXPERTS, "expert_dispatch", meta(T, K), slots(c, T), experts, **cast),
        grouped(EXPERTS, rows, 2 * inner, K, experts, path),
        swiglu(EXPERTS, rows, inner, path),
        grouped(EXPERTS, rows, K, inner, experts, path),
        call(EXPERTS, "expert_combine", meta(rows, K), weights, handle),
    ]


def routed_backward(c: Config, T: int, experts: int, path: str) -> list[Call]:
    """As V3: routing weights are applied before the second product, so its result is not kept."""
    K, inner, rows = c.hidden_size, c.moe_intermediate_size, T * c.num_experts_per_tok
    cast, handle = {"cast": "fp32"} if path == "fp8" else {}, slots(c, T).to(INT32)
    stored = [call(EXPERTS, "cast_per_token", meta(rows, 2 * inner), count=2)]
    return [
        call(EXPERTS, "expert_dispatch", meta(T, K), slots(c, T), experts, **cast),
        *(stored if path == "fp8" else ()),  # gate_up in the forward pass, and its gradient
        grouped(EXPERTS, rows, inner, K, experts, path),
        swiglu_gradient(EXPERTS, rows, inner, path),
        grouped(EXPERTS, rows, K, 2 * inner, experts, path),
        *grouped_weight_gradient(EXPERTS, rows, K, inner, experts, path),
        *grouped_weight_gradient(EXPERTS, rows, 2 * inner, K, experts, path),
        call(EXPERTS, "expert_dispatch_backward", meta(rows, K), handle),
    ]


def routing_gradients(c: Config, T: int, S: int) -> list[Call]:
    """The router's, with the balance loss and the update of the selection bias."""
    E, K, topk = c.n_routed_experts, c.hidden_size, c.num_experts_per_tok
    logits, grad = meta(T, E, dtype=FP32), meta(T, topk, dtype=FP32)
    by_sequence = logits.view(T // S, S, E), slots(c, T).view(T // S, S, topk)
    gradient = "sequence_balance_loss_backward"
    return [
        call(EXPERTS, "sequence_balance_loss", *by_sequence),
        call(EXPERTS, gradient, meta(1, dtype=FP32), *by_sequence),
        call(EXPERTS, "route_topk_backward", grad, logits, slots(c, T)),
        call(EXPERTS, "expert_load", slots(c, T), E),
        call(EXPERTS, "gemm_nt", logits, meta(K, E, dtype=FP32)),
        call(EXPERTS, "gemm_nt", meta(E, T, dtype=FP32), meta(K, T, dtype=FP32)),
    ]


def moe_forward(c: Config, T: int, experts: int, path: str) -> list[Call]:
    shared = c.moe_intermediate_size * c.n_shared_experts
    return [
        *route(c, T),
        *routed_forward(c, T, experts, path),
        *(mlp_forward(c, EXPERTS, T, shared, path) if shared else ()),
    ]


def moe_backward(c: Config, T: int, S: int, experts: int, path: str) -> list[Call]:
    shared = c.moe_intermediate_size * c.n_shared_experts
    return [
        *routed_backward(c, T, experts, path),
        *routing_gradients(c, T, S),
        *(mlp_backward(c, EXPERTS, T, shared, path) if shared else ()),
    ]


def recomputed(c: Config, T: int, S: int, experts: int, moe: bool, path: str, mode: str) -> list:
    """What the backward pass of a layer computes again: V3's choice, or the whole forward pass."""
    if mode == "full":
        return layer_forward(c, T, S, experts, moe, path)
    part = EXPERTS if moe else DENSE
    norms = [norm(ATTENTION, T, c.hidden_size), norm(part, T, c.hidden_size)]
    return [*norms, *up_projections(c, T, path)]  # SwiGLU is recomputed by its gradient's op


def layer_forward(c: Config, T: int, S: int, experts: int, moe: bool, path: str) -> list[Call]:
    part = EXPERTS if moe else DENSE
    inner = mlp_forward(c, DENSE, T, c.intermediate_size, path)
    return [
        *attention_forward(c, T, S, path),
        norm(part, T, c.hidden_size),
        *(moe_forward(c, T, experts, path) if moe else inner),
    ]


def layer_backward(c: Config, T: int, S: int, experts: int, moe: bool, path: str) -> list[Call]:
    part = EXPERTS if moe else DENSE
    inner = mlp_backward(c, DENSE, T, c.intermediate_size, path)
    return [
        *(moe_backward(c, T, S, experts, path) if moe else inner),
        norm_gradient(part, T, c.hidden_size),
        *attention_backward(c, T, S, path),
    ]


def head(c: Config, T: int) -> list[Call]:
    return [call(HEAD, "gemm_nt", meta(T, c.hidden_size), meta(c.vocab_size, c.hidden_size))]


def head_gradients(c: Config, T: int) -> list[Call]:
    """With the loss, which reads the logits and writes their gradient."""
    logits = elementwise(HEAD, *[meta(T, c.vocab_size)] * 2)
    return [logits, *linear_gradients(HEAD, T, c.vocab_size, c.hidden_size, "bf16")]


def layer_counts(c: Config, prediction: bool = True) -> dict[bool, int]:
    """Layers with experts (True) and without; a prediction layer is like the last one."""
    kinds = [c.is_moe(i) for i in range(c.num_hidden_layers)]
    kinds += [kinds[-1]] * c.num_nextn_predict_layers * prediction
    return {moe: kinds.count(moe) for moe in (False, True) if moe in kinds}


def training_step(
    c: Config, T: int, S: int, experts: int, path: str, recompute: str = "selective"
) -> dict[str, list[Call]]:
    """ "forward", "recompute" and "backward" of T tokens in sequences of S, all layers and MTP."""
    step: dict[str, list[Call]] = {"forward": [], "recompute": [], "backward": []}
    for moe, count in layer_counts(c).items():
        args = c, T, S, experts, moe, path
        step["forward"] += times(layer_forward(*args), count)
        step["recompute"] += times(recomputed(*args, recompute), count)
        step["backward"] += times(layer_backward(*args), count)
    heads, K = 1 + c.num_nextn_predict_layers, c.hidden_size
    step["forward"] += times([norm(HEAD, T, K), *head(c, T)], heads)
    step["backward"] += times([norm_gradient(HEAD, T, K), *head_gradients(c, T)], heads)
    if depth := c.num_nextn_predict_layers:  # enorm, hnorm and eh_proj
        joined = [norm(HEAD, T, K), norm(HEAD, T, K), *linear(HEAD, T, K, 2 * K, "bf16")]
        step["forward"] += times(joined, depth)
        step["backward"] += times(linear_gradients(HEAD, T, K, 2 * K, "bf16"), depth)
    return step


def optimizer_step(parameters: int, path: str) -> list[Call]:
    """AdamW on the parameters that a GPU owns: fp32 gradient and master, bf16 moments."""
    n = parameters
    gradient, master, moment = meta(n, dtype=FP32), meta(n, dtype=FP32), meta(n)
    stored = meta(n, dtype=FP8) if path == "fp8" else meta(n)
    both = [master, master, moment, moment, moment, moment]  # each read and written
    return [elementwise(OPTIMIZER, gradient, *both, stored)]


# Serving. Weights are FP8 or bf16; kv_b_proj, router and head are bf16 or fp32 in both.


def cache_of(c: Config, sequences: int, length: int) -> tuple:
    """A bf16 cache for the sequences, their block table, and lengths on the CPU."""
    pages = cdiv(length, PAGE)
    cache = meta(sequences * pages, PAGE, 1, c.cache_width)
    return cache, meta(sequences, pages, dtype=INT32), torch.full((sequences,), length, dtype=INT32)


def append(c: Config, T: int, cache: torch.Tensor) -> Call:
    R, D = c.kv_lora_rank, c.qk_rope_head_dim
    slot, positions = torch.zeros(T, dtype=INT64), meta(T, dtype=INT64)
    options = {"norm_weight": meta(R), "positions": positions, "cos_sin": meta(T, D, dtype=FP32)}
    return call(ATTENTION, "mla_cache_append", meta(T, R), meta(T, D), cache, slot, **options)


def queries(c: Config, T: int, path: str, cache: torch.Tensor, keys: bool) -> list[Call]:
    """From the layer's input to rotated queries, with the new tokens in the cache."""
    calls = [
        norm(ATTENTION, T, c.hidden_size),
        *linear(ATTENTION, T, *first_projection(c), path, cast=False),
        append(c, T, cache),
    ]
    if query := query_projection(c):
        calls += [latent_norm(T, query[1]), *linear(ATTENTION, T, *query, path, cast=False)]
    return [*calls, rotate(c, T, keys)]


def prompt_attention(c: Config, T: int, S: int, path: str) -> list[Call]:
    cache, table, _ = cache_of(c, T // S, S)
    gather = cache, table, offsets(T, S), T
    return [
        *queries(c, T, path, cache, keys=True),
        call(ATTENTION, "mla_cache_gather", *gather, v_head_dim=c.kv_lora_rank, out_dtype=BF16),
        *linear(ATTENTION, T, *key_projection(c), "bf16"),
        call(ATTENTION, "mla_prefill", *prefill_operands(c, T, S)),
        *linear(ATTENTION, T, *output_projection(c), path),
    ]


def decode_attention(c: Config, B: int, context: int, path: str) -> list[Call]:
    """One new token of B sequences that have `context` cached tokens, on the latents."""
    H, R = c.num_attention_heads, c.kv_lora_rank
    cache, table, lengths = cache_of(c, B, context)
    q = meta(B, 1, H, c.cache_width)
    attend = q, cache, table, lengths, c.softmax_scale
    return [
        *queries(c, B, path, cache, keys=False),
        grouped(ATTENTION, H * B, R, c.qk_nope_head_dim, H, "bf16"),
        elementwise(ATTENTION, q, q),
        call(ATTENTION, "mla_decode", *attend, v_head_dim=R),
        grouped(ATTENTION, H * B, c.v_head_dim, R, H, "bf16"),
        *linear(ATTENTION, B, *output_projection(c), path),
    ]


def indexer(c: Config, T: int, lengths: torch.Tensor, longest: int, path: str) -> list[Call]:
    """Scores of T tokens against the tokens that each sees, `lengths` int32 [T], and the top-k."""
    H, D = c.index_n_heads, c.index_head_dim
    queries, key, weights = indexer_projections(c)
    pages = cdiv(longest, PAGE)
    cache = meta(max(1, T // longest) * pages, PAGE, 1, D + 4, dtype=torch.uint8)
    q = meta(T, 1, H, D, dtype=FP8), cache, meta(T, H, dtype=FP32), lengths
    table, scores = meta(T, pages, dtype=INT32), meta(T, longest, dtype=FP32)
    return [
        *linear(ATTENTION, T, *queries, path, cast=False),
        *linear(ATTENTION, T, *key, path, cast=False),
        *linear(ATTENTION, T, *weights, "bf16"),
        elementwise(ATTENTION, *[meta(T, (H + 1) * D)] * 2, *[meta(T, D)] * 2),
        call(ATTENTION, "hadamard_transform", meta(T, D)),
        call(ATTENTION, "indexer_cache_append", meta(T, D), cache, torch.zeros(T, dtype=INT64)),
        call(ATTENTION, "hadamard_cast", meta(T, H, D)),
        call(ATTENTION, "paged_mqa_logits", *q, table, longest),
        call(ATTENTION, "topk_indices", scores, c.index_topk, lengths),
    ]


def sparse_attention(c: Config, T: int, lengths: torch.Tensor, path: str) -> list[Call]:
    """T tokens that attend to the latents of the tokens that the indexer selects, in any step."""
    H, R, longest = c.num_attention_heads, c.kv_lora_rank, int(lengths.max())
    sequences = max(1, T // longest) if int(lengths.min()) < longest else T
    cache, _, _ = cache_of(c, sequences, longest)
    chosen = torch.zeros(1, 1, 1, dtype=INT32).expand(T, 1, c.index_topk)
    count = lengths.clamp(max=c.index_topk)
    q = meta(T, 1, H, c.cache_width)
    return [
        *queries(c, T, path, cache, keys=False),
        *indexer(c, T, lengths, longest, path),
        grouped(ATTENTION, H * T, R, c.qk_nope_head_dim, H, "bf16"),
        elementwise(ATTENTION, q, q),
        call(ATTENTION, "mla_sparse_decode", q, cache, chosen, c.softmax_scale, count,
             v_head_dim=R),
        grouped(ATTENTION, H * T, c.v_head_dim, R, H, "bf16"),
        *linear(ATTENTION, T, *output_projection(c), path),
    ]  # fmt: skip


def serving_step(
    c: Config, attention: list[Call], T: int, rows: int, experts: int, path: str
) -> list[Call]:
    """All layers around `attention` of T tokens, and logits of `rows` of them."""
    calls: list[Call] = []
    for moe in (False, True):
        count = sum(c.is_moe(i) == moe for i in range(c.num_hidden_layers))
        inner = c.intermediate_size
        mlp = moe_forward(c, T, experts, path) if moe else mlp_forward(c, DENSE, T, inner, path)
        part = EXPERTS if moe else DENSE
        calls += times([*attention, norm(part, T, c.hidden_size), *mlp], count) if count else []
    return [*calls, norm(HEAD, T, c.hidden_size), *head(c, rows)]


def prefill_step(c: Config, T: int, S: int, experts: int, path: str) -> list[Call]:
    """T tokens in prompts of S tokens; each prompt needs the logits of its last token."""
    if c.is_sparse:
        attention = sparse_attention(c, T, torch.arange(1, S + 1, dtype=INT32).repeat(T // S), path)
    else:
        attention = prompt_attention(c, T, S, path)
    return serving_step(c, attention, T, T // S, experts, path)


def decode_step(c: Config, B: int, context: int, experts: int, path: str) -> list[Call]:
    """One token of each of B sequences."""
    if c.is_sparse:
        attention = sparse_attention(c, B, torch.full((B,), context, dtype=INT32), path)
    else:
        attention = decode_attention(c, B, context, path)
    return serving_step(c, attention, B, B, experts, path)
