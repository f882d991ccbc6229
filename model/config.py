"""Model configuration with the field names of the Hugging Face DeepSeek checkpoints.

`Config` reads and writes `config.json`.  One class serves V3, R1 and Kimi-K2 (sigmoid scores, a
selection bias, groups), V3.2 (the same with an indexer) and V2 (softmax scores, greedy); the
differences are fields.  Where a published config.json omits one, `model_type` gives its default.
Rotary settings are read in the spelling of the released checkpoints (`rope_theta` +
`rope_scaling`) and in that of transformers 5 (`rope_parameters`).  They are written in the first,
which both read.

A value or a key that this model does not know raises ValueError with its name: ignoring it would
run another model than the one in the checkpoint.

    config = Config.load("model/checkpoints/stdlib-bytes")  # or its config.json
    config = Config.preset("deepseek-v3", num_hidden_layers=4)
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from model.presets import FP8_QUANTIZATION, PRESETS

__all__ = ["FP8_QUANTIZATION", "LATENT_NORM_EPS", "PRESETS", "Config", "yarn_mscale"]

INDEX_NORM_EPS = 1e-6  # of the indexer's keys
LATENT_NORM_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm; rms_norm_eps is for the other norms

ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",  # V3 with other sizes
}

# Other spellings of a field in config.json.
_ALIASES: dict[str, str] = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
}

# The least value of each integer field.  A dense model has no experts, so the second group is
# checked in models with experts only.
_INTEGERS = {
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
            "v_head_dim", "n_group", "topk_group", "max_position_embeddings", "moe_layer_freq",
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "num_nextn_predict_layers", "first_k_dense_replace", "n_routed_experts",
            "n_shared_experts", "index_n_heads", "index_head_dim", "index_topk",
        ),
        0,
    ),
}  # fmt: skip
_EXPERT_INTEGERS = ("moe_intermediate_size", "num_experts_per_tok")
_NUMBERS = ("rope_theta", "rms_norm_eps", "routed_scaling_factor")
_FLAGS = ("rope_interleave", "norm_topk_prob", "tie_word_embeddings")
_INDEXER = ("index_n_heads", "index_head_dim", "index_topk")

# Without one of these a config.json is refused: no tensor's shape would show a wrong default.
_REQUIRED = (
    "model_type", "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "rms_norm_eps",
)  # fmt: skip
_REQUIRED_WITH_EXPERTS = ("num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob")

# Keys that change the arithmetic and have one supported meaning.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "partial_rotary_factor": (1, None),
    "indexer_rope_interleave": (False, None),
    "use_mla": (True, None),
    "dtype": ("float32", "bfloat16", "float16", "float8_e4m3fn", None),
    "torch_dtype": ("float32", "bfloat16", "float16", "float8_e4m3fn", None),
    "expert_dtype": ("fp8", None),
}

# Keys that do not change the logits: training, generation, names, and sizes that others imply.
_UNUSED_KEYS = """
    architectures auto_map transformers_version trust_remote_code model_name unsloth_version
    unsloth_fixed num_key_value_heads head_dim qk_head_dim pretraining_tp use_cache ep_size
    initializer_range attention_dropout hidden_dropout dropout aux_loss_alpha seq_aux
    router_aux_loss_coef output_router_logits router_dtype pad_token_id sep_token_id
    decoder_start_token_id mask_token_id return_dict output_attentions output_hidden_states
    use_return_dict is_decoder is_encoder_decoder add_cross_attention tie_encoder_decoder
    cross_attention_hidden_size chunk_size_feed_forward pruned_heads problem_type
    task_specific_params id2label label2id num_labels finetuning_task tokenizer_class prefix
    torchscript tf_legacy_loss use_bfloat16 max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens gradient_checkpointing attn_implementation
"""
_UNUSED = frozenset(_UNUSED_KEYS.split())

_YARN_NUMBERS = {  # least value, and whether null is accepted
    "factor": (1.0, False),
    "original_max_position_embeddings": (1, True),
    "beta_fast": (1e-9, True),
    "beta_slow": (1e-9, True),
    "mscale": (0.0, True),
    "mscale_all_dim": (0.0, True),
    "attention_factor": (1e-9, True),
}
_QUANTIZATION: dict[str, tuple[Any, ...]] = {  # supported values
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("ue8m0", "float", "fp32", None),
    "expert_dtype": ("fp8", None),
}
_QUANTIZATION_UNUSED = {
    "weight_block_size", "modules_to_not_convert", "modules_to_convert", "ignored_layers",
    "dequantize",
}  # fmt: skip


def _is_number(value: Any, least: float) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value) and value >= least


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _one_of(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)


def _require(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"config: {name} = {value!r}, expected {expected}")


@dataclass
class Config:
    """Shape and arithmetic of a model.  Defaults are DeepSeek-V3's.

    Raises ValueError that names the field if the model does not support a value.  None is accepted
    where published files use null for "none": `q_lora_rank`, `rope_scaling`, `n_routed_experts` of
    a dense model, `n_shared_experts`, and the groups of a greedy gate.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 0
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    # attention
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_interleave: bool = True
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    # indexer of V3.2; 0 without one
    index_n_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0
    # experts; n_routed_experts is 0 in a dense model
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    # tokens and storage
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    quantization_config: dict[str, Any] | None = None
    # config.json keys that this model does not use; `to_dict` writes them back
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.q_lora_rank = self.q_lora_rank or None
        self.quantization_config = self.quantization_config or None
        for name in ("n_routed_experts", "n_shared_experts", *_INDEXER):
            if getattr(self, name) is None:
                setattr(self, name, 0)
        if self.n_routed_experts == 0:
            self.num_experts_per_tok, self.moe_intermediate_size = 0, 0
        if self.n_routed_experts == 0 or self.topk_method == "greedy":
            self.n_group, self.topk_group = 1, 1
        self._read_rope()
        self.check()

    def _read_rope(self) -> None:
        """Checks `rope_scaling` and moves its rope_theta, which has priority, to the field."""
        rope = self.rope_scaling
        if rope is None:
            return
        _require(isinstance(rope, dict), "rope_scaling", rope, "an object")
        rope = dict(rope)
        self.rope_theta = rope.pop("rope_theta", self.rope_theta)
        nested = [key for key, value in rope.items() if isinstance(value, dict)]
        if nested:
            text = f"config: rope_parameters has one object per kind of layer ({', '.join(nested)})"
            raise ValueError(f"{text}, expected one for all layers")
        names = {rope[key] for key in ("rope_type", "type") if rope.get(key) is not None}
        _require(len(names) <= 1, "rope_scaling type", sorted(map(str, names)), "one type")
        kind = next(iter(names), "default")
        _require(kind in ("yarn", "default"), "rope_scaling type", kind, "'yarn' or 'default'")
        partial = rope.pop("partial_rotary_factor", None)
        _require(partial in (1, None), "partial_rotary_factor", partial, "1")
        self.rope_scaling = rope if kind == "yarn" else None
        known = {"type", "rope_type", "truncate", *_YARN_NUMBERS} if self.rope_scaling else ()
        for key, value in rope.items():
            ok = key in known or key in ("type", "rope_type") or value is None
            _require(ok, f"rope_scaling[{key!r}]", value, "no such key")
        if self.rope_scaling is None:
            return
        for key, (least, optional) in _YARN_NUMBERS.items():
            value = rope.get(key)
            ok = _is_number(value, least) or (optional and value is None)
            _require(ok, f"rope_scaling[{key!r}]", value, f"a number of at least {least:g}")
        truncate = rope.get("truncate", True)
        _require(isinstance(truncate, bool), "rope_scaling['truncate']", truncate, "a boolean")

    def check(self) -> None:
        """Raises ValueError that names the first field with an unsupported value."""

        def require(ok: bool, name: str, expected: str) -> None:
            _require(ok, name, getattr(self, name), expected)

        require(self.model_type in ARCHITECTURES, "model_type", f"one of {[*ARCHITECTURES]}")
        for name, least in _INTEGERS.items():
            expected = "a positive integer" if least else "an integer of 0 or more"
            require(_is_integer(getattr(self, name), least), name, expected)
        for name in _NUMBERS:
            value = getattr(self, name)
            require(_is_number(value, 0) and value > 0, name, "a positive number")
        for name in _FLAGS:
            require(isinstance(getattr(self, name), bool), name, "true or false")
        if self.q_lora_rank is not None:
            require(_is_integer(self.q_lora_rank, 1), "q_lora_rank", "a positive integer or null")
        require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "an even number")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            tokens = value if name == "eos_token_id" and isinstance(value, list) else [value]
            ok = value is None or all(_is_integer(token, 0) for token in tokens)
            require(ok, name, "a token or null (of eos: or a list of tokens)")
        self._check_experts()
        self._check_indexer()
        self._check_quantization()
        self._check_extra()

    def _check_experts(self) -> None:
        def require(ok: bool, name: str, expected: str) -> None:
            _require(ok, name, getattr(self, name), expected)

        if not self.n_routed_experts:
            return
        for name in _EXPERT_INTEGERS:
            require(_is_integer(getattr(self, name), 1), name, "a positive integer")
        require(self.scoring_func in ("sigmoid", "softmax"), "scoring_func", "sigmoid or softmax")
        methods = ("noaux_tc", "greedy", "group_limited_greedy")
        require(self.topk_method in methods, "topk_method", f"one of {methods}")
        groups_fit = self.n_routed_experts % self.n_group == 0
        require(groups_fit, "n_group", f"a divisor of n_routed_experts = {self.n_routed_experts}")
        require(self.topk_group <= self.n_group, "topk_group", f"at most n_group = {self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        require(
            self.num_experts_per_tok <= reachable, "num_experts_per_tok", f"at most {reachable}"
        )
        if self.model_type == "deepseek_v2":
            # With it DeepSeek's V2 code does not scale the weights, and transformers ignores it.
            require(not self.norm_topk_prob, "norm_topk_prob", "false in a deepseek_v2 model")

    def _check_indexer(self) -> None:
        sparse = self.model_type == "deepseek_v32"
        for name in _INDEXER:
            value = getattr(self, name)
            expected = "a positive integer" if sparse else "0 or null in a model without indexer"
            _require((value > 0) == sparse, name, value, expected)
        if sparse:
            rank, rope = self.q_lora_rank, self.qk_rope_head_dim
            _require(rank is not None, "q_lora_rank", rank, "a positive integer (of the indexer)")
            ok, expected = self.index_head_dim >= rope, f"at least qk_rope_head_dim = {rope}"
            _require(ok, "index_head_dim", self.index_head_dim, expected)

    def _check_quantization(self) -> None:
        q = self.quantization_config
        if q is None:
            return
        _require(isinstance(q, dict), "quantization_config", q, "an object or null")
        for key, supported in _QUANTIZATION.items():
            value = q.get(key)
            _require(value in supported, f"quantization_config[{key!r}]", value, _one_of(supported))
        block = q.get("weight_block_size", [128, 128])
        ok = isinstance(block, (list, tuple)) and len(block) == 2
        ok = ok and all(_is_integer(size, 1) for size in block)
        name = "quantization_config['weight_block_size']"
        _require(ok, name, block, "two positive integers")
        for key in q.keys() - _QUANTIZATION.keys() - _QUANTIZATION_UNUSED:
            _require(q[key] is None, f"quantization_config[{key!r}]", q[key], "no such key")

    def _check_extra(self) -> None:
        for key, supported in _FIXED.items():
            value = self.extra.get(key)
            _require(value in supported, key, value, _one_of(supported))
        dtypes = {self.extra[k] for k in ("dtype", "torch_dtype") if self.extra.get(k)}
        _require(len(dtypes) <= 1, "dtype and torch_dtype", sorted(dtypes), "one dtype")
        kinds = ["sparse" if self.is_moe(i) else "dense" for i in range(self.num_hidden_layers)]
        if (given := self.extra.get("mlp_layer_types")) is not None:
            expected = "'dense' and 'sparse' as first_k_dense_replace and moe_layer_freq say"
            _require(list(given) == kinds, "mlp_layer_types", given, expected)
        if (given := self.extra.get("layer_types")) is not None:
            # transformers 5.17 writes the second name for V3.2, 5.23 the first.
            sparse = ("indexed_attention", "deepseek_sparse_attention")
            names = sparse if self.is_sparse else ("full_attention",)
            ok = any(list(given) == [name] * self.num_hidden_layers for name in names)
            _require(ok, "layer_types", given, f"{_one_of(names)} for every layer")
        known = _FIXED.keys() | _UNUSED | {"mlp_layer_types", "layer_types"}
        for key, value in self.extra.items():
            off = value is None or value is False or value in ([], {})
            if not (key in known or key.startswith("_") or off):
                text = f"config: {key} = {value!r}: this model does not know the key"
                raise ValueError(f"{text}; delete it if it does not change the logits")

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Values per token in the latent cache: latent, then rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(qk_head_dim), times mscale² with YaRN."""
        scale, yarn = self.qk_head_dim**-0.5, self.rope_scaling
        if yarn and yarn.get("mscale_all_dim"):
            scale *= yarn_mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2
        return scale

    @property
    def is_sparse(self) -> bool:
        """Whether an indexer chooses the keys that a query attends to (V3.2)."""
        return self.index_topk > 0

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a text."""
        eos = self.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)

    @property
    def stored_dtype(self) -> str | None:
        """The dtype that config.json names, "bfloat16" of the released checkpoints."""
        return self.extra.get("dtype") or self.extra.get("torch_dtype")

    @property
    def activation_scale_format(self) -> str:
        """`scale_format` of activation casts: "ue8m0" (V3.1 and later) or "fp32"."""
        ue8m0 = (self.quantization_config or {}).get("scale_fmt") == "ue8m0"
        return "ue8m0" if ue8m0 else "fp32"

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, has experts."""
        frequent = layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0
        return self.n_routed_experts > 0 and frequent

    def with_layers(self, count: int) -> Config:
        """A copy with the first `count` decoder layers and no prediction layer."""
        kinds = ("mlp_layer_types", "layer_types")
        extra = {k: v[:count] if k in kinds and v else v for k, v in self.extra.items()}
        sizes = {"num_hidden_layers": count, "num_nextn_predict_layers": 0}
        return Config(**{**vars(self), **sizes, "extra": extra})

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        """The config of a parsed config.json."""
        raw = dict(raw)
        for alias, name in _ALIASES.items():
            if alias in raw:
                value = raw.pop(alias)
                same = raw.setdefault(name, value) == value
                _require(same, f"{alias} and {name}", [value, raw[name]], "equal values")
        raw["rope_scaling"] = _merge_rope(raw.get("rope_scaling"), raw.pop("rope_parameters", None))
        if raw.get("rope_theta", 0) is None and "rope_theta" in (raw["rope_scaling"] or {}):
            del raw["rope_theta"]
        if raw.get("model_type") == "deepseek_v2":
            raw.setdefault("scoring_func", "softmax")
            raw.setdefault("topk_method", "greedy")
            raw.setdefault("norm_topk_prob", False)
            raw.setdefault("routed_scaling_factor", 1.0)
        if raw.get("num_nextn_predict_layers", 0) is None:
            raw["num_nextn_predict_layers"] = 0
        names = {f.name for f in fields(cls)} - {"extra"}
        values = {k: v for k, v in raw.items() if k in names}
        return cls(**values, extra={k: v for k, v in raw.items() if k not in names})

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Reads `path`, or `path/config.json` if it is a directory.

        A generation_config.json in the same directory gives eos_token_id, as in transformers.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file (expected a Hugging Face config.json)")
        raw = _read_object(file)
        try:
            dense = raw.get("n_routed_experts", 1) is None
            for name in _REQUIRED if dense else _REQUIRED + _REQUIRED_WITH_EXPERTS:
                if name not in raw:
                    raise ValueError(f"config: {name} is missing")
            config = cls.from_dict(raw)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error
        generation = file.with_name("generation_config.json")
        if file.name == "config.json" and generation.is_file():
            eos = _read_object(generation).get("eos_token_id")
            try:
                config.eos_token_id = config.eos_token_id if eos is None else eos
                config.check()
            except ValueError as error:
                raise ValueError(f"{generation}: {error}") from error
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        values = asdict(self)
        extra = values.pop("extra")
        extra.setdefault("architectures", [ARCHITECTURES[self.model_type]])
        extra.setdefault("num_key_value_heads", self.num_attention_heads)
        if not self.is_sparse:
            for name in _INDEXER:
                del values[name]
        if not self.n_routed_experts:
            values.update(n_routed_experts=None, n_shared_experts=None)
        return {**values, **extra}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Config:
        """The config of a released model (a key of PRESETS) or of "tiny", with `changes`."""
        if name not in PRESETS:
            raise ValueError(f"config: no preset {name!r}, expected one of {sorted(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **changes})


def _merge_rope(scaling: Any, parameters: Any) -> dict[str, Any] | None:
    """`rope_scaling` and `rope_parameters` of a config.json in one."""
    for name, rope in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        _require(rope is None or isinstance(rope, dict), name, rope, "an object or null")
    scaling, parameters = scaling or {}, parameters or {}
    for key in scaling.keys() & parameters.keys():
        values = [scaling[key], parameters[key]]
        name = f"{key} of rope_scaling and of rope_parameters"
        _require(values[0] == values[1], name, values, "equal values")
    return {**parameters, **scaling} or None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return raw


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1·mscale·ln(factor) + 1, YaRN's scale of queries and keys."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
