"""FP8 checkpoints: the blocks, the tensors that are FP8, and `python -m model.export`."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

import deepkern
from model import DeepSeek
from model.checkpoint import dequantize_blocks, quantize_blocks
from model.export import is_quantized, main

app = typer.Typer()
app.command()(main)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (40, 300), (576, 200)], ids=str)
def test_quantize_blocks_equals_deepkern(shape):
    weight = torch.randn(shape)
    weight[:, : shape[1] // 3] *= 1e-3
    weight[: shape[0] // 2, -1] = 0
    codes, scale = quantize_blocks(weight)
    expected, expected_scale = deepkern.cast_per_block(weight)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)
    back = deepkern.cast_back(codes, scale, (128, 128), torch.float32)
    assert torch.equal(dequantize_blocks(codes, scale), back)
    assert (back - weight).abs().max() <= weight.abs().max() / 16


def test_zero_block():
    codes, scale = quantize_blocks(torch.zeros(3, 5))
    assert not codes.float().any() and scale.item() == pytest.approx(1e-4 / 448)


@pytest.mark.parametrize(
    ("name", "fp8"),
    [
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", True),
        ("model.layers.1.mlp.experts.3.down_proj.weight", True),
        ("model.layers.1.mlp.shared_experts.gate_proj.weight", True),
        ("model.layers.1.mlp.gate.weight", False),
        ("model.layers.1.mlp.gate.e_score_correction_bias", False),
        ("model.layers.1.self_attn.kv_a_layernorm.weight", False),
        ("model.layers.4.eh_proj.weight", False),
        ("model.layers.4.shared_head.head.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_tensors_stored_in_fp8(name, fp8):
    assert is_quantized(name) is fp8


def test_command_converts_to_fp8(make_config, make_plain, saved, tmp_path):
    folder, out = saved(make_plain(make_config())), tmp_path / "fp8"
    (folder / "tokenizer.json").write_text("{}")
    result = run("--checkpoint", folder, "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / "tokenizer.json").read_text() == "{}"
    tokens = torch.arange(20).view(2, 10)
    # The weights are quantized in both: at load, and by the command.
    loaded, exported = (DeepSeek.from_pretrained(f, torch.float32, fp8=True) for f in (folder, out))
    assert exported.config.quantization_config["quant_method"] == "fp8"
    weights = [m.model["layers"][1].self_attn.o_proj.weight for m in (loaded, exported)]
    assert torch.equal(*(weight.view(torch.uint8) for weight in weights))
    distance = (exported(tokens) - loaded(tokens)).norm() / loaded(tokens).norm()
    assert distance < 0.3  # head, embedding and gate are bf16 in the export


def test_command_refuses_to_overwrite(make_config, make_plain, saved, tmp_path):
    folder = saved(make_plain(make_config()))
    (tmp_path / "note.txt").write_text("x")
    result = run("--checkpoint", folder, "--out", tmp_path)
    assert result.exit_code == 2 and "not empty" in result.stderr
    missing = run("--checkpoint", tmp_path / "none", "--out", tmp_path / "out")
    assert missing.exit_code == 2 and "no such directory" in missing.stderr
    assert not (tmp_path / "out").exists()
