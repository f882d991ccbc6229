"""Names and shapes of the tensors in a checkpoint."""

from __future__ import annotations

from model.config import Config

Shapes = dict[str, tuple[int, ...]]  # name -> shape


def expected_tensors(config: Config) -> Shapes:
    """Name -> shape of every weight of the model, without the scales of FP8 weights."""
    c = config
    shapes: Shapes = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        inner = _attention(c) | _feed_forward(c, layer)
        inner["input_layernorm.weight"] = (c.hidden_size,)
        inner["post_attention_layernorm.weight"] = (c.hidden_size,)
        if layer >= c.num_hidden_layers:
            inner |= _prediction(c)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inner.items()}
    return shapes


def _attention(c: Config) -> Shapes:
    queries = c.num_attention_heads * c.qk_head_dim
    keys_values = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    shapes: Shapes = {
        "kv_a_proj_with_mqa.weight": (c.cache_width, c.hidden_size),
        "kv_a_layernorm.weight": (c.kv_lora_rank,),
        "kv_b_proj.weight": (keys_values, c.kv_lora_rank),
        "o_proj.weight": (c.hidden_size, c.num_attention_heads * c.v_head_dim),
    }
    if c.q_lora_rank:
        shapes["q_a_proj.weight"] = (c.q_lora_rank, c.hidden_size)
        shapes["q_a_layernorm.weight"] = (c.q_lora_rank,)
        shapes["q_b_proj.weight"] = (queries, c.q_lora_rank)
    else:
        shapes["q_proj.weight"] = (queries, c.hidden_size)
    if c.is_sparse and c.q_lora_rank:
        queries = c.index_n_heads * c.index_head_dim
        shapes["indexer.wq_b.weight"] = (queries, c.q_lora_rank)
        shapes["indexer.wk.weight"] = (c.index_head_dim, c.hidden_size)
        shapes["indexer.k_norm.weight"] = (c.index_head_dim,)
        shapes["indexer.k_norm.bias"] = (c.index_head_dim,)
        shapes["indexer.weights_proj.weight"] = (c.index_n_heads, c.hidden_size)
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _feed_forward(c: Config, layer: int) -> Shapes:
    if not c.is_moe(layer):
        return _mlp("mlp", c.hidden_size, c.intermediate_size)
    shapes: Shapes = {"mlp.gate.weight": (c.n_routed_experts, c.hidden_size)}
    if c.topk_method == "noaux_tc":
        shapes["mlp.gate.e_score_correction_bias"] = (c.n_routed_experts,)
    for expert in range(c.n_routed_experts):
        shapes |= _mlp(f"mlp.experts.{expert}", c.hidden_size, c.moe_intermediate_size)
    if c.n_shared_experts:
        inner = c.moe_intermediate_size * c.n_shared_experts
        shapes |= _mlp("mlp.shared_experts", c.hidden_size, inner)
    return shapes


def _mlp(name: str, size: int, inner: int) -> Shapes:
    return {
        f"{name}.gate_proj.weight": (inner, size),
        f"{name}.up_proj.weight": (inner, size),
        f"{name}.down_proj.weight": (size, inner),
    }


def _prediction(c: Config) -> Shapes:
    return {
        "embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "enorm.weight": (c.hidden_size,),
        "hnorm.weight": (c.hidden_size,),
        "eh_proj.weight": (c.hidden_size, 2 * c.hidden_size),
        "shared_head.norm.weight": (c.hidden_size,),
        "shared_head.head.weight": (c.vocab_size, c.hidden_size),
    }


def is_quantized(name: str) -> bool:
    """Whether DeepSeek checkpoints store this tensor in FP8."""
    real = (
        "embed_tokens",
        "lm_head",
        "shared_head",
        "norm",
        "mlp.gate.",
        "eh_proj",
        "weights_proj",
    )
    return name.endswith(".weight") and not any(part in name for part in real)
