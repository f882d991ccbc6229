"""Presets have the published sizes; config.json is read in all its spellings."""

from __future__ import annotations

import json
import math

import pytest
import torch

from model import Config, DeepSeek
from model.checkpoint import expected_tensors
from model.config import PRESETS
from model.plain import PlainModel


@pytest.mark.parametrize(
    ("preset", "main", "prediction", "biases"),
    # Published: 671B, 15.7B and 1.026T, which counts the selection biases.  The prediction layer
    # has 11.5B and copies of embedding and head of 0.9B each: 685B in the download.
    [
        ("deepseek-v3", 671_026_404_352, 13_463_426_048, 0),
        ("deepseek-r1", 671_026_404_352, 13_463_426_048, 0),
        ("deepseek-v2-lite", 15_706_484_224, 0, 0),
        ("kimi-k2", 1_026_408_232_448, 0, 60 * 384),
    ],
)
def test_parameter_counts(preset, main, prediction, biases):
    config = Config.preset(preset)
    prefix = f"model.layers.{config.num_hidden_layers}."
    counts = {
        name: math.prod(shape)
        for name, shape in expected_tensors(config).items()
        if not name.endswith("correction_bias")
    }
    total = sum(n for name, n in counts.items() if not name.startswith(prefix))
    assert total + biases == main
    assert sum(counts.values()) - total == prediction


@pytest.mark.parametrize(
    ("preset", "billions"),
    [("deepseek-v2", 236), ("moonlight-16b-a3b", 16), ("deepseek-v3.2", 685)],
)
def test_published_sizes(preset, billions):
    shapes = expected_tensors(Config.preset(preset))
    assert round(sum(map(math.prod, shapes.values())) / 1e9) == pytest.approx(billions, abs=1)


def test_v2_lite_has_the_expected_tensors():
    config = Config.preset("deepseek-v2-lite")
    with torch.device("meta"):
        model = DeepSeek(config)
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(map(math.prod, expected_tensors(config).values())) == 15_706_484_224


def test_names_and_shapes_of_released_v3():
    """Samples of DeepSeek-V3's model.safetensors.index.json and its headers."""
    shapes = expected_tensors(Config.preset("deepseek-v3"))
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (7168, 18432)
    assert shapes["model.layers.60.mlp.experts.255.up_proj.weight"] == (2048, 7168)
    assert shapes["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes["model.layers.3.self_attn.kv_b_proj.weight"] == (32768, 512)
    assert shapes["model.layers.3.self_attn.q_b_proj.weight"] == (24576, 1536)
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert shapes["model.layers.61.shared_head.head.weight"] == (129280, 7168)
    assert "model.layers.2.mlp.gate.weight" not in shapes
    assert "model.layers.3.mlp.gate.e_score_correction_bias" in shapes


def test_names_and_shapes_of_released_v32():
    """Those that V3.2-Exp adds to V3, in the prediction layer too."""
    v3, v32 = (expected_tensors(Config.preset(f"deepseek-{name}")) for name in ("v3", "v3.2"))
    added = {name: shape for name, shape in v32.items() if name not in v3}
    assert len(added) == 5 * 62 and v3.items() <= v32.items()
    prefix = "model.layers.61.self_attn.indexer."
    assert {name: added[prefix + name] for name in (
        "wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"
    )} == {
        "wq_b.weight": (8192, 1536),
        "wk.weight": (128, 7168),
        "k_norm.weight": (128,),
        "k_norm.bias": (128,),
        "weights_proj.weight": (64, 7168),
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None}, {"tie_word_embeddings": True}],
    ids=["v3", "no_q_lora", "tied"],
)
def test_plain_model_has_expected_tensors(make_config, changes):
    config = make_config(num_nextn_predict_layers=1, **changes)
    shapes = {name: tuple(t.shape) for name, t in PlainModel(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    assert shapes == expected_tensors(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(preset, tmp_path):
    config = Config.preset(preset)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    again = Config.load(tmp_path)
    assert {**vars(again), "extra": {}} == {**vars(config), "extra": {}}


@pytest.mark.parametrize("preset", PRESETS)
def test_published_keys_are_known(preset, tmp_path):
    """Keys that change no logits; published files and transformers 4 and 5 write them."""
    unused = {
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "transformers_version": "4.46.3", "_name_or_path": "x", "_attn_implementation": "eager",
        "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "pretraining_tp": 1,
        "use_cache": True, "initializer_range": 0.02, "attention_dropout": 0.0,
        "num_return_sequences": 1, "output_router_logits": False, "pad_token_id": 2,
        "head_dim": 64, "qk_head_dim": 192, "torch_dtype": "bfloat16", "hidden_act": "silu",
    }  # fmt: skip
    raw = {**PRESETS[preset], "model_type": "deepseek_v3", "rms_norm_eps": 1e-6}
    raw = {"routed_scaling_factor": 2.5, "norm_topk_prob": True, **raw, **PRESETS[preset], **unused}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config, expected = Config.load(tmp_path), Config.preset(preset)
    assert {**vars(config), "extra": {}, "rms_norm_eps": 0} == {
        **vars(expected), "extra": {}, "rms_norm_eps": 0,
    }  # fmt: skip
    assert config.extra["auto_map"] == unused["auto_map"]


def test_unknown_keys_are_written_back():
    config = Config.from_dict({**Config.preset("tiny").to_dict(), "ep_size": 1})
    assert config.to_dict()["ep_size"] == 1


def test_both_rope_spellings_are_equal(yarn):
    old = Config.from_dict({"rope_theta": 50000.0, "rope_scaling": yarn})
    renamed = {k: v for k, v in yarn.items() if k != "type"}
    new = Config.from_dict(
        {"rope_parameters": {**renamed, "rope_type": "yarn", "rope_theta": 50000.0}}
    )
    assert old.rope_theta == new.rope_theta == 50000.0
    assert old.softmax_scale == new.softmax_scale > old.qk_head_dim**-0.5
    plain = Config.from_dict({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}})
    assert plain.rope_scaling is None and plain.rope_theta == 100.0


def test_theta_inside_the_rope_object_has_priority(yarn):
    """As in transformers 5, which moves a theta next to the object into it if it has none."""
    default = {"rope_type": "default", "rope_theta": 5e4}
    ropes = [
        {"rope_scaling": {**yarn, "rope_theta": 5e4}},
        {"rope_scaling": default},
        {"rope_parameters": default},
        {"rope_scaling": None, "rope_parameters": default},
        {"rope_scaling": yarn, "rope_parameters": {**yarn, "rope_theta": 5e4}},
    ]
    for rope in ropes:
        for outer in ({}, {"rope_theta": 1e4}, {"rope_theta": None}):
            config = Config.from_dict({**rope, **outer})
            assert config.rope_theta == 5e4
            assert "rope_theta" not in (config.rope_scaling or {})
    assert Config.from_dict({"rope_scaling": yarn, "rope_theta": 7e3}).rope_theta == 7e3


@pytest.mark.parametrize("family", ["V2", "V3", "V32"])
def test_configs_that_transformers_writes(family, tmp_path, yarn):
    transformers = pytest.importorskip("transformers")
    rope = {**yarn, "rope_type": "yarn", "rope_theta": 5e4}
    written = getattr(transformers, f"Deepseek{family}Config")(
        num_experts_per_tok=4, rope_parameters=rope, first_k_dense_replace=1, num_hidden_layers=5
    )
    written.save_pretrained(tmp_path)
    config = Config.load(tmp_path)
    assert config.model_type == written.model_type
    assert config.rope_theta == 5e4 and config.rope_scaling["factor"] == yarn["factor"]
    assert [config.is_moe(layer) for layer in range(5)] == [False] + 4 * [True]
    assert config.is_sparse == (family == "V32")
    for name in ("hidden_size", "n_routed_experts", "routed_scaling_factor", "norm_topk_prob",
                 "rms_norm_eps", "kv_lora_rank", "eos_token_id"):  # fmt: skip
        assert getattr(config, name) == getattr(written, name), name
    assert config.scoring_func == ("softmax" if family == "V2" else "sigmoid")


def test_v3_softmax_scale():
    # 192^-0.5 times (0.1 ln 40 + 1)^2
    assert Config.preset("deepseek-v3").softmax_scale == pytest.approx(
        0.1352337788608801, rel=1e-12
    )


def test_v2_defaults():
    config = Config.from_dict({"model_type": "deepseek_v2", "n_group": None, "topk_group": None})
    assert config.scoring_func == "softmax" and config.topk_method == "greedy"
    assert not config.norm_topk_prob and config.n_group == 1 and config.routed_scaling_factor == 1


def test_v2_without_groups_has_one():
    greedy = {"model_type": "deepseek_v2", "topk_method": "greedy", "n_group": 8, "topk_group": 3}
    assert Config.from_dict(greedy).n_group == 1


def test_dense_model_has_no_experts(tmp_path):
    dense = {
        "model_type": "deepseek_v2", "num_hidden_layers": 2, "n_routed_experts": None,
        "n_shared_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": None,
        "n_group": None, "topk_group": None, "first_k_dense_replace": 0,
    }  # fmt: skip
    config = Config.from_dict(dense)
    assert not any(config.is_moe(layer) for layer in range(2))
    assert not any("experts" in name or "gate." in name for name in expected_tensors(config))
    written = config.to_dict()
    assert written["n_routed_experts"] is None
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert Config.load(tmp_path).n_routed_experts == 0


def test_every_second_layer_has_experts():
    config = Config(num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)
    assert [config.is_moe(layer) for layer in range(6)] == [False, False, True, False, True, False]


def test_scale_format_of_activations():
    formats = {name: Config.preset(name).activation_scale_format for name in PRESETS}
    assert {name for name, value in formats.items() if value == "ue8m0"} == {
        "deepseek-v3.1",
        "deepseek-v3.2",
    }
    assert set(formats.values()) == {"fp32", "ue8m0"}


def test_only_v32_is_sparse():
    assert [name for name in PRESETS if Config.preset(name).is_sparse] == ["deepseek-v3.2"]
    config = Config.preset("deepseek-v3.2")
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (64, 128, 2048)


@pytest.mark.parametrize("name", ["indexed_attention", "deepseek_sparse_attention"])
def test_sparse_attention_has_two_names(name):
    raw = Config.preset("deepseek-v3.2").to_dict()
    layers = {"layer_types": [name] * raw["num_hidden_layers"]}
    assert Config.from_dict({**raw, **layers}).is_sparse
    with pytest.raises(ValueError, match="'indexed_attention' or 'deepseek_sparse_attention'"):
        Config.from_dict({**raw, "layer_types": [name]})
    with pytest.raises(ValueError, match="layer_types"):
        Config.from_dict({**Config.preset("deepseek-v3").to_dict(), "layer_types": [name] * 61})


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_stored_dtype_has_two_spellings(name):
    assert Config.from_dict({name: "float16"}).stored_dtype == "float16"


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
REFUSED = {
    "string-for-number": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6'"),
    "zero-eps": ({"rms_norm_eps": 0}, "rms_norm_eps"),
    "nan-theta": ({"rope_theta": math.nan}, "rope_theta"),
    "true-for-integer": ({"hidden_size": True}, "hidden_size"),
    "float-for-integer": ({"num_hidden_layers": 4.0}, "num_hidden_layers"),
    "integer-for-flag": ({"norm_topk_prob": 1}, "norm_topk_prob"),
    "null-group": ({"topk_group": None}, "topk_group = None"),
    "null-groups": ({"n_group": None}, "n_group = None"),
    "null-scale": ({"routed_scaling_factor": None}, "routed_scaling_factor"),
    "null-eps": ({"rms_norm_eps": None}, "rms_norm_eps"),
    "null-theta": ({"rope_theta": None}, "rope_theta"),
    "null-experts-per-token": ({"num_experts_per_tok": None}, "num_experts_per_tok"),
    "null-first-dense": ({"first_k_dense_replace": None}, "first_k_dense_replace"),
    "null-head-dim": ({"v_head_dim": None}, "v_head_dim"),
    "list-frequency": ({"moe_layer_freq": [0, 1, 1, 1]}, "moe_layer_freq"),
    "eos-text": ({"eos_token_id": "</s>"}, "eos_token_id"),
    "eos-list-of-text": ({"eos_token_id": [1, "</s>"]}, "eos_token_id"),
    "factor-0": ({"rope_scaling": {**YARN, "factor": 0}}, "factor"),
    "factor-null": ({"rope_scaling": {**YARN, "factor": None}}, "factor"),
    "factor-missing": ({"rope_scaling": {"type": "yarn"}}, "factor"),
    "factor-text": ({"rope_scaling": {**YARN, "factor": "40"}}, "factor"),
    "beta-0": ({"rope_scaling": {**YARN, "beta_fast": 0}}, "beta_fast"),
    "mscale-text": ({"rope_scaling": {**YARN, "mscale": "1"}}, "mscale"),
    "rope-key": ({"rope_scaling": {**YARN, "long_factor": [1.0]}}, "long_factor"),
    "rope-type": ({"rope_scaling": {**YARN, "type": "longrope"}}, "longrope"),
    "rope-two-types": ({"rope_scaling": {**YARN, "rope_type": "linear"}}, "linear"),
    "rope-list": ({"rope_scaling": [40]}, "rope_scaling"),
    "rope-theta-text": ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta"),
    "rope-default-factor": ({"rope_parameters": {"rope_type": "default", "factor": 8}}, "factor"),
    "rope-nested": ({"rope_parameters": {"main": YARN, "compress": YARN}}, "main, compress"),
    "rope-disagrees": ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 8}}, "factor"),
    "partial-rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "partial-in-rope": ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    "llama": ({"model_type": "llama"}, "model_type = 'llama'"),
    "v4": ({"model_type": "deepseek_v4"}, "model_type"),
    "v32-without-indexer": ({"model_type": "deepseek_v32"}, "index_n_heads"),
    "v3-with-indexer": ({"index_topk": 2048}, "index_topk"),
    "indexer-interleaved": ({"indexer_rope_interleave": True}, "indexer_rope_interleave"),
    "experts-disagree": ({"num_local_experts": 8, "n_routed_experts": 16}, "num_local_experts"),
    "mtp-disagree": ({"num_mtp_layers": 1, "num_nextn_predict_layers": 0}, "num_mtp_layers"),
    "v2-normalized": ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob"),
    "layer-types": ({"mlp_layer_types": ["sparse"] * 61}, "mlp_layer_types"),
    "attention-types": ({"layer_types": ["sliding_attention"] * 61}, "layer_types"),
    "int4": ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quant_method"),
    "e5m2": ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fmt"),
    "static": (
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
        "activation_scheme",
    ),
    "block": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        "weight_block_size",
    ),
    "scale-format": (
        {"quantization_config": {"quant_method": "fp8", "scale_fmt": "e4m3"}},
        "scale_fmt",
    ),
    "dtype": ({"torch_dtype": "int8"}, "torch_dtype"),
    "dtypes": ({"torch_dtype": "float16", "dtype": "bfloat16"}, "dtype"),
    "bias": ({"attention_bias": True}, "attention_bias"),
    "qk-layernorm": ({"qk_layernorm": True}, "qk_layernorm"),
    "limit": ({"swiglu_limit": 10.0}, "swiglu_limit"),
    "number": ({"num_hash_layers": 0}, "num_hash_layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, tmp_path):
    change, word = REFUSED[case]
    file = tmp_path / "config.json"
    preset = {**Config().to_dict(), "rope_theta": 10000.0}
    file.write_text(json.dumps({k: v for k, v in preset.items() if k != "quantization_config"}))
    Config.load(file)
    raw = json.loads(file.read_text())
    if any(alias in change for alias in ("rope_parameters", "rope_scaling")):
        del raw["rope_scaling"]
    file.write_text(json.dumps({**raw, **change}))
    with pytest.raises(ValueError) as caught:
        Config.load(file)
    assert word in str(caught.value) and str(file) in str(caught.value), str(caught.value)


@pytest.mark.parametrize("key", ["model_type", "rms_norm_eps", "num_attention_heads",
                                 "num_experts_per_tok", "routed_scaling_factor"])  # fmt: skip
def test_missing_key_is_refused(key, tmp_path):
    raw = Config.preset("tiny").to_dict()
    del raw[key]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"{key} is missing"):
        Config.load(tmp_path)


@pytest.mark.parametrize("off", [None, False, [], {}], ids=repr)
def test_unknown_key_that_is_off(off):
    assert Config.from_dict({"gated_mla": off}).extra["gated_mla"] == off


def test_generation_config_gives_the_end_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(Config.preset("tiny").to_dict()))
    assert Config.load(tmp_path).eos_token_ids == (12,)
    generation = tmp_path / "generation_config.json"
    for eos, expected in ((7, (7,)), ([7, 9], (7, 9)), (None, (12,))):
        generation.write_text(json.dumps({"eos_token_id": eos, "temperature": 0.6}))
        assert Config.load(tmp_path).eos_token_ids == expected
        assert Config.load(tmp_path / "config.json").eos_token_ids == expected
    for broken in ('{"eos_token_id": "x"}', "[", "[]"):
        generation.write_text(broken)
        with pytest.raises(ValueError, match="generation_config.json"):
            Config.load(tmp_path)


def test_unknown_preset():
    with pytest.raises(ValueError, match="deepseek-v3"):
        Config.preset("deepseek-v9")
