"""Writes a DeepSeek-V3 checkpoint as a GGUF file for llama.cpp, quantized to Q8_0.

    python -m bench.models.gguf_export DIR FILE

DIR is a bf16 or fp32 checkpoint in the Hugging Face layout.  The script needs the `gguf` package
and NumPy, and no PyTorch: it runs in the interpreter of llama-cpp-python.  The file has llama.cpp's
architecture "deepseek2" with absorbed attention: kv_b_proj is split into attn_k_b [H, R, nope] and
attn_v_b [H, v, R].  Matrices are Q8_0 (32 values of 8 bits per fp16 scale); norms, the router and
its bias are fp32.  There is no tokenizer, and no prediction layer.

Source: names and fields are those that llama.cpp's src/models/deepseek2.cpp reads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Names in a layer: Hugging Face -> GGUF.  kv_b_proj and the experts are converted separately.
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
DENSE = {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
EXPERTS = {f"mlp.shared_experts.{x}_proj": f"ffn_{x}_shexp" for x in ("gate", "up", "down")}


class Safetensors:
    """The tensors of a directory by name, as fp32; bf16 and fp32 only."""

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, tuple[Path, int, dict]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as f:
                size = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(size))
            header.pop("__metadata__", None)
            self.entries |= {name: (file, 8 + size, entry) for name, entry in header.items()}

    def read(self, name: str) -> np.ndarray:
        """fp32, in the stored shape."""
        file, start, entry = self.entries[name]
        dtypes = {"F32": np.float32, "BF16": np.uint16}
        if entry["dtype"] not in dtypes:
            raise ValueError(f"{file}: tensor {name} is {entry['dtype']}, expected BF16 or F32")
        dtype, (begin, _) = dtypes[entry["dtype"]], entry["data_offsets"]
        count = int(np.prod(entry["shape"]))
        values = np.fromfile(file, dtype, count, offset=start + begin).reshape(entry["shape"])
        if dtype == np.float32:
            return values
        return (values.astype(np.uint32) << 16).view(np.float32)


def tensors(c: dict[str, Any], stored: Safetensors) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF name and fp32 value of every tensor of a model with config.json `c`."""
    yield "token_embd.weight", stored.read("model.embed_tokens.weight")
    yield "output_norm.weight", stored.read("model.norm.weight")
    if not c.get("tie_word_embeddings"):
        yield "output.weight", stored.read("lm_head.weight")
    for layer in range(c["num_hidden_layers"]):
        name, out = f"model.layers.{layer}", f"blk.{layer}"
        is_moe = layer >= c["first_k_dense_replace"]
        for source, target in (NAMES | (EXPERTS if is_moe else DENSE)).items():
            yield f"{out}.{target}.weight", stored.read(f"{name}.{source}.weight")
        kv_b = stored.read(f"{name}.self_attn.kv_b_proj.weight")
        kv_b = kv_b.reshape(c["num_attention_heads"], -1, c["kv_lora_rank"])  # [H, nope + v, R]
        k_b, v_b = np.split(kv_b, [c["qk_nope_head_dim"]], axis=1)
        yield f"{out}.attn_k_b.weight", np.ascontiguousarray(k_b.transpose(0, 2, 1))
        yield f"{out}.attn_v_b.weight", np.ascontiguousarray(v_b)
        if is_moe:
            yield f"{out}.ffn_gate_inp.weight", stored.read(f"{name}.mlp.gate.weight")
            bias = stored.read(f"{name}.mlp.gate.e_score_correction_bias")
            yield f"{out}.exp_probs_b.bias", bias
            for matrix in ("gate", "up", "down"):
                experts = [
                    stored.read(f"{name}.mlp.experts.{e}.{matrix}_proj.weight")
                    for e in range(c["n_routed_experts"])
                ]
                yield f"{out}.ffn_{matrix}_exps.weight", np.stack(experts)


def is_quantized(name: str, value: np.ndarray) -> bool:
    """Whether a tensor becomes Q8_0: the matrices but the router."""
    return value.ndim > 1 and "ffn_gate_inp" not in name


def check(c: dict[str, Any]) -> None:
    """Raises ValueError for a model that this file does not convert."""
    for key, value in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid"),
                       ("rope_interleave", True), ("rope_scaling", None)):  # fmt: skip
        if c[key] != value:
            raise ValueError(f"config: {key} = {c[key]!r}, expected {value!r}")
    if not c["q_lora_rank"] or not c["n_shared_experts"]:
        raise ValueError("config: expected a q_lora_rank and shared experts")


def add_fields(writer: Any, c: dict[str, Any]) -> None:
    """Writes the model's sizes, and that there is no tokenizer."""
    import gguf

    writer.add_context_length(c["max_position_embeddings"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_leading_dense_block_count(c["first_k_dense_replace"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_rope_dimension_count(c["qk_rope_head_dim"])
    # Absorbed attention has one key and value per token, for all heads.
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(c["q_lora_rank"])
    writer.add_kv_lora_rank(c["kv_lora_rank"])
    writer.add_key_length(c["kv_lora_rank"] + c["qk_rope_head_dim"])
    writer.add_value_length(c["kv_lora_rank"])
    writer.add_key_length_mla(c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    writer.add_value_length_mla(c["v_head_dim"])
    writer.add_expert_count(c["n_routed_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_shared_count(c["n_shared_experts"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_group_count(c["n_group"])
    writer.add_expert_group_used_count(c["topk_group"])
    writer.add_expert_weights_scale(c["routed_scaling_factor"])
    writer.add_expert_weights_norm(c["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def export(folder: Path, file: Path) -> None:
    """Writes `file`, all or nothing."""
    import gguf

    c = json.loads((folder / "config.json").read_text())
    check(c)
    fresh = file.with_name(f".{file.name}.new")
    writer = gguf.GGUFWriter(fresh, "deepseek2")
    add_fields(writer, c)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, value in tensors(c, Safetensors(folder)):
        if is_quantized(name, value):
            writer.add_tensor(name, gguf.quants.quantize(value, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(name, value)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
