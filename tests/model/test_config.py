"""Presets have the published sizes; config.json is read in all its spellings."""

from __future__ import annotations

import json

import pytest
import torch

from model import Config, DeepSeek
from model.checkpoint import expected_tensors
from model.config import PRESETS
from model.plain import PlainModel


@pytest.mark.parametrize(
    ("preset", "main", "prediction"),
    # Published: 671B and 15.7B.  The prediction layer has 11.5B and copies of embedding and head of
    # 0.9B each, which gives the 685B of the download.
    [
        ("deepseek-v3", 671_026_404_352, 13_463_426_048),
        ("deepseek-r1", 671_026_404_352, 13_463_426_048),
        ("deepseek-v2-lite", 15_706_484_224, 0),
    ],
)
def test_parameter_counts(preset, main, prediction):
    config = Config.preset(preset)
    with torch.device("meta"):
        model = DeepSeek(config)
    prefix = f"model.layers.{config.num_hidden_layers}."
    counts = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(n for name, n in counts.items() if not name.startswith(prefix)) == main
    assert sum(n for name, n in counts.items() if name.startswith(prefix)) == prediction


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


def test_v3_softmax_scale():
    # 192^-0.5 times (0.1 ln 40 + 1)^2
    assert Config.preset("deepseek-v3").softmax_scale == pytest.approx(
        0.1352337788608801, rel=1e-12
    )


def test_v2_defaults():
    config = Config.from_dict({"model_type": "deepseek_v2", "n_group": None, "topk_group": None})
    assert config.scoring_func == "softmax" and config.topk_method == "greedy"
    assert not config.norm_topk_prob and config.n_group == 1 and config.routed_scaling_factor == 1


def test_unknown_preset():
    with pytest.raises(ValueError, match="deepseek-v3"):
        Config.preset("deepseek-v9")
