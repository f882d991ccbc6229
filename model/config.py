"""Model configuration with the field names of the Hugging Face DeepSeek checkpoints.

`Config` reads and writes `config.json`.  One class serves V3/R1 (sigmoid scores, a selection bias,
groups) and V2 (softmax scores, greedy); the differences are fields.  Where a published config.json
omits one, `model_type` gives its default.  Rotary settings are read in the spelling of the released
checkpoints (`rope_theta` + `rope_scaling`) and in that of transformers 5 (`rope_parameters`).  They
are written in the first, which both read.

    config = Config.load("model/checkpoints/stdlib-bytes")  # or its config.json
    config = Config.preset("deepseek-v3", num_hidden_layers=4)
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

LATENT_NORM_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm; rms_norm_eps is for the other norms

FP8_QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}

# Other spellings of a field in config.json.
_ALIASES: dict[str, str] = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
}

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "max_position_embeddings",
)


@dataclass
class Config:
    """Shape and arithmetic of a model.  Defaults are DeepSeek-V3's.

    Raises ValueError that names the field if the model does not support a value.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 0
    first_k_dense_replace: int = 3
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
    # experts
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
        self.n_group = self.n_group or 1
        self.topk_group = self.topk_group or 1
        if self.rope_scaling and _rope_type(self.rope_scaling) == "default":
            self.rope_scaling = None
        self.check()

    def check(self) -> None:
        """Raises ValueError that names the first field with an unsupported value."""

        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"config: {name} = {getattr(self, name)!r}, expected {expected}")

        for name in _POSITIVE:
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, name, "a positive integer")
        require(self.n_shared_experts >= 0, "n_shared_experts", "0 or more")
        require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "an even number")
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
        if self.rope_scaling is not None:
            kind = _rope_type(self.rope_scaling)
            require(kind == "yarn", "rope_scaling", "type yarn (or none)")
            require("factor" in self.rope_scaling, "rope_scaling", "a factor")
        for name, supported in (
            ("attention_bias", (False, None)),
            ("mlp_bias", (False, None)),
            ("hidden_act", ("silu", None)),
            ("moe_layer_freq", (1, None)),
        ):
            if self.extra.get(name) not in supported:
                value = self.extra[name]
                raise ValueError(f"config: {name} = {value!r}, expected {supported[0]!r}")

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

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, has experts."""
        return layer >= self.first_k_dense_replace

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        """The config of a parsed config.json."""
        raw = dict(raw)
        for alias, name in _ALIASES.items():
            if alias in raw:
                value = raw.pop(alias)
                raw.setdefault(name, value)
        rope = raw.pop("rope_parameters", None)
        if rope:
            raw.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
            if _rope_type(rope) != "default" and not raw.get("rope_scaling"):
                raw["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        if raw.get("model_type", "deepseek_v3") == "deepseek_v2":
            raw.setdefault("scoring_func", "softmax")
            raw.setdefault("topk_method", "greedy")
            raw.setdefault("norm_topk_prob", False)
            raw.setdefault("routed_scaling_factor", 1.0)
        if raw.get("topk_method") == "greedy":
            raw.update(n_group=1, topk_group=1)
        if "num_nextn_predict_layers" in raw and raw["num_nextn_predict_layers"] is None:
            raw["num_nextn_predict_layers"] = 0
        names = {f.name for f in fields(cls)} - {"extra"}
        values = {k: v for k, v in raw.items() if k in names}
        return cls(**values, extra={k: v for k, v in raw.items() if k not in names})

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Reads `path`, or `path/config.json` if it is a directory."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file (expected a Hugging Face config.json)")
        try:
            raw = json.loads(file.read_text())
            if not isinstance(raw, dict):
                raise ValueError("expected a JSON object")
            return cls.from_dict(raw)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        values = asdict(self)
        extra = values.pop("extra")
        if self.model_type == "deepseek_v3":
            extra.setdefault("architectures", ["DeepseekV3ForCausalLM"])
        return {**values, **extra}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Config:
        """The shape of deepseek-v3, deepseek-r1 or deepseek-v2-lite, or tiny, with `changes`."""
        if name not in PRESETS:
            raise ValueError(f"config: no preset {name!r}, expected one of {sorted(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1·mscale·ln(factor) + 1, YaRN's scale of queries and keys."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(mscale: float) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
    }


_V3: dict[str, Any] = {
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
    "rope_scaling": _yarn(1.0),
    "quantization_config": FP8_QUANTIZATION,
}

PRESETS: dict[str, dict[str, Any]] = {
    "deepseek-v3": _V3,
    "deepseek-r1": _V3,
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "q_lora_rank": None,
        "max_position_embeddings": 163840,
        "rope_scaling": _yarn(0.707),
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
    },
    # All kinds of layers that V3 has, over bytes.  Most sizes are no multiple of 128, which tests
    # edge blocks.
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 192,
        "intermediate_size": 512,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 1,
        "num_attention_heads": 6,
        "q_lora_rank": 128,
        "kv_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 48,
        "max_position_embeddings": 512,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "bos_token_id": 12,
        "eos_token_id": 12,
    },
}
