"""`python -m model.convert`: FP8 and bf16 checkpoints, and what other programs read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from model import CheckpointError, DeepSeek
from model.checkpoint import INDEX, SINGLE, Checkpoint, write_checkpoint
from model.config import FP8_QUANTIZATION
from model.convert import Format, ScaleFormat, convert, main
from model.plain import PlainModel
from model.tensors import expected_tensors, is_quantized
from tests.models import stored_tensors

TOKENS = torch.arange(30).view(2, 15) * 3
app = typer.Typer()
app.command()(main)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def plain(make_config, make_plain) -> PlainModel:
    """No size is a multiple of 128, some have two blocks."""
    return make_plain(
        make_config(
            hidden_size=136, kv_lora_rank=140, q_lora_rank=24, num_nextn_predict_layers=1,
            quantization_config=FP8_QUANTIZATION,
        )
    )  # fmt: skip


@pytest.fixture
def fp8(plain, tmp_path) -> Path:
    write_checkpoint(tmp_path / "fp8", plain.config, stored_tensors(plain))
    return tmp_path / "fp8"


def as_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    flat = {name: t.contiguous().flatten() for name, t in tensors.items()}
    return {name: t.view(torch.uint8).numpy().tobytes() for name, t in flat.items()}


def test_fp8_to_bf16_rounds_once(fp8, tmp_path):
    convert(Checkpoint.open(fp8), tmp_path / "bf16", Format.bf16)
    tensors = load_file(tmp_path / "bf16" / SINGLE)
    exact = PlainModel.from_pretrained(fp8).state_dict()
    assert tensors.keys() == exact.keys()
    for name, tensor in tensors.items():
        dtype = torch.float32 if name.endswith("correction_bias") else torch.bfloat16
        assert tensor.dtype == dtype and torch.equal(tensor, exact[name].to(dtype)), name
    raw = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert raw["quantization_config"] is None and raw["torch_dtype"] == "bfloat16"
    model = DeepSeek.from_pretrained(tmp_path / "bf16", dtype="float32")
    expected = PlainModel.from_pretrained(tmp_path / "bf16")(TOKENS)
    torch.testing.assert_close(model(TOKENS), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_transformers_reads_bf16(fp8, tmp_path):
    transformers = pytest.importorskip("transformers")
    convert(Checkpoint.open(fp8), tmp_path / "bf16", Format.bf16, shard_bytes=100_000)
    reference = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "bf16", dtype=torch.float32
    )
    expected = reference.eval()(TOKENS).logits
    model = DeepSeek.from_pretrained(tmp_path / "bf16", dtype="float32")
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(model(TOKENS), expected, atol=1e-4, rtol=0)
    assert model.config.num_nextn_predict_layers == 1  # kept, though transformers ignores it


def test_fp8_to_fp8_keeps_all_bits(fp8, tmp_path):
    convert(Checkpoint.open(fp8), tmp_path / "again", Format.fp8)
    again, before = (load_file(folder / SINGLE) for folder in (tmp_path / "again", fp8))
    assert as_bytes(again) == as_bytes(before)


def test_bf16_to_fp8_quantizes_as_loading_does(plain, tmp_path):
    tensors = {name: t.bfloat16() for name, t in plain.state_dict().items()}
    write_checkpoint(tmp_path / "bf16", plain.config, tensors)
    convert(Checkpoint.open(tmp_path / "bf16"), tmp_path / "out", Format.fp8)
    loaded, converted = (
        DeepSeek.from_pretrained(tmp_path / name, torch.bfloat16, fp8=True)
        for name in ("bf16", "out")
    )
    assert converted.config.quantization_config == FP8_QUANTIZATION
    before, after = as_bytes(loaded.state_dict()), as_bytes(converted.state_dict())
    different = {name for name in before if before[name] != after[name]}
    assert all(".kv_b_proj." in name for name in different)  # real in a model with fp8


def test_ue8m0_scales_are_powers_of_two(fp8, tmp_path):
    convert(Checkpoint.open(fp8), tmp_path / "out", Format.fp8, ScaleFormat.ue8m0)
    out, before = (load_file(folder / SINGLE) for folder in (tmp_path / "out", fp8))
    for name in filter(is_quantized, before):
        scale, old = out[name + "_scale_inv"], before[name + "_scale_inv"]
        assert scale.dtype == torch.float32
        assert torch.equal(scale, scale.to(torch.float8_e8m0fnu).float())
        assert ((scale >= old * 0.99) & (scale < old * 2.01)).all()
    model = Checkpoint.open(tmp_path / "out")
    assert model.config.activation_scale_format == "ue8m0"
    # The checkpoint's format is the default, and its weights keep their bits.
    convert(model, tmp_path / "again", Format.fp8)
    assert Checkpoint.open(tmp_path / "again").config.activation_scale_format == "ue8m0"
    assert as_bytes(load_file(tmp_path / "again" / SINGLE)) == as_bytes(out)


def test_v32_and_tied_embeddings(make_config, tmp_path):
    sizes = {"model_type": "deepseek_v32", "index_n_heads": 2, "index_head_dim": 16}
    config = make_config(**sizes, index_topk=4, tie_word_embeddings=True)
    tensors = {name: torch.randn(shape) for name, shape in expected_tensors(config).items()}
    convert(Checkpoint.from_tensors(config, tensors), tmp_path / "out", Format.fp8)
    stored = load_file(tmp_path / "out" / SINGLE)
    indexer = "model.layers.0.self_attn.indexer."
    assert stored[indexer + "wk.weight"].dtype == torch.float8_e4m3fn
    assert stored[indexer + "weights_proj.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" not in stored
    assert Checkpoint.open(tmp_path / "out").check().is_sparse


def test_damage_leaves_no_directory(fp8, tmp_path):
    tensors = load_file(fp8 / SINGLE)
    write_checkpoint(fp8, Checkpoint.open(fp8).config, tensors, shard_bytes=100_000)
    (fp8 / SINGLE).unlink()
    last = sorted(fp8.glob("*.safetensors"))[-1]
    checkpoint = Checkpoint.open(fp8)
    last.write_bytes(last.read_bytes()[:-100])  # after the headers were read
    with pytest.raises(CheckpointError, match=last.name):
        convert(checkpoint, tmp_path / "out", Format.bf16)
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]


def test_output_is_written_in_shards(fp8, tmp_path):
    shards = []
    convert(
        Checkpoint.open(fp8), tmp_path / "out", Format.bf16, shard_bytes=200_000,
        progress=lambda name, done, total: shards.append((name, done / total)),
    )  # fmt: skip
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and (tmp_path / "out" / INDEX).is_file()
    assert all(file.stat().st_size < 300_000 for file in files)
    assert shards[-1][1] == 1 and len(shards) == len(PlainModel.from_pretrained(fp8).state_dict())


def test_command(fp8, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (fp8 / file).write_text("{}")
    (fp8 / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    (fp8 / "notes.txt").write_text("x")
    out = tmp_path / "out"
    result = run("--checkpoint", fp8, "--out", out, "--to", "bf16")
    assert result.exit_code == 0, result.output
    assert {file.name for file in out.iterdir()} == {
        SINGLE, "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json",
    }  # fmt: skip
    assert DeepSeek.from_pretrained(out).config.eos_token_ids == (3, 5)
    again = run(
        "--checkpoint", out, "--out", tmp_path / "u", "--to", "fp8", "--scale-format", "ue8m0"
    )
    assert again.exit_code == 0, again.output
    assert Checkpoint.open(tmp_path / "u").config.activation_scale_format == "ue8m0"


def test_command_refuses(fp8, tmp_path):
    full = run("--checkpoint", fp8, "--out", tmp_path, "--to", "bf16")
    assert full.exit_code == 2 and "not empty" in full.stderr
    same = run("--checkpoint", fp8, "--out", fp8, "--to", "bf16", "--overwrite")
    assert same.exit_code == 2 and "directory to convert" in same.stderr
    missing = run("--checkpoint", tmp_path / "none", "--out", tmp_path / "out", "--to", "fp8")
    assert missing.exit_code == 2 and "no such directory" in missing.stderr
    assert run("--checkpoint", fp8, "--out", tmp_path / "out", "--to", "int4").exit_code == 2
    assert not (tmp_path / "out").exists()
