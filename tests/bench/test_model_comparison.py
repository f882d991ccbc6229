"""The speed of whole models: providers in processes, the check of their logits, the GGUF file."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.console import Console

from bench import machine
from bench.models import comparison, gguf_export
from bench.models.comparison import Provider
from bench.studies import engine
from deepkern.testing.child import Child, ChildError
from model.checkpoint import Checkpoint, write_checkpoint
from model.config import Config

SIZES = {
    "vocab_size": 192,
    "hidden_size": 128,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with both checkpoints of the model "tiny"."""
    folder = tmp_path_factory.mktemp("weights")
    comparison.prepare("tiny", folder, Config(**SIZES))
    return folder


def torch_provider(name: str, dtype: str, folder: Path) -> Provider:
    command = [sys.executable, "-m", "bench.models.torch_models", name, dtype, str(folder)]
    return Provider(name, dtype, command)


def run(weights: Path, results: Path, **options) -> tuple[int, list[dict], str]:
    """The exit code, the records and the output of a small run."""
    output = io.StringIO()
    code = comparison.run(
        "tiny", weights, prompt=12, new=3, rounds=2, threads=1, folder=results,
        console=Console(file=output, width=200), **options,
    )  # fmt: skip
    (file,) = results.glob("*-cpu-model-tiny.jsonl")
    return code, [json.loads(line) for line in file.read_text().splitlines()], output.getvalue()


def rows(records: list[dict]) -> list[dict]:
    return [r for r in records if r["kind"] == "cpu_model"]


@pytest.mark.slow
def test_deepkern_and_transformers(weights, tmp_path):
    pytest.importorskip("transformers")
    labels = ["deepkern fp8", "deepkern fp32", "transformers bf16"]
    code, records, output = run(weights, tmp_path, providers=labels, batches=(1, 2))
    assert code == 0 and "transformers" in output and "no speed" not in output
    assert records[0]["kind"] == "machine" and records[0]["threads"] == 1
    for r in records:
        if r["kind"] == "provider":
            assert r["error"] <= comparison.LIMITS[r["dtype"]].error
            assert r["about"]["threads"] == 1
    assert [(f"{r['provider']} {r['dtype']}", r["batch"]) for r in rows(records)] == [
        (label, batch) for batch in (1, 2) for label in labels
    ]
    for r in rows(records):
        for part, tokens in (("prefill", 12), ("decode", 1)):
            least = r[part]["least"]
            assert 0 < least <= r[part]["median"]
            assert r[part]["tokens_per_second"] == pytest.approx(r["batch"] * tokens / least)
            if r["provider"] == "transformers":
                assert r[part]["ratio"] == 1


def perturbed(source: Path, folder: Path, name: str) -> Path:
    """A copy of a bf16 checkpoint with one changed weight matrix."""
    checkpoint = Checkpoint.open(source)
    tensors = {n: checkpoint.read(n)[0] for n in checkpoint.stored}
    tensors[name] = tensors[name] * 1.25
    write_checkpoint(folder, checkpoint.config, tensors)
    return folder


@pytest.mark.slow
def test_a_wrong_provider_has_no_speed(weights, tmp_path):
    name = "model.layers.0.mlp.down_proj.weight"
    folder = perturbed(weights / "tiny" / "bf16", tmp_path / "wrong", name)
    planted = tuple(torch_provider("deepkern", dtype, folder) for dtype in ("fp32", "bf16"))
    for provider in planted:
        provider.name = "planted"
    code, records, output = run(
        weights, tmp_path, providers=["deepkern fp32"], batches=(1,), extra=planted
    )
    assert code == 1
    assert [r["provider"] for r in rows(records)] == ["deepkern"]
    for provider in planted:
        assert f"no speed for {provider.label}: wrong logits" in output
        assert provider.error > comparison.LIMITS[provider.dtype].error


def test_a_provider_that_does_not_load_is_left_out(weights, tmp_path):
    broken = Provider(
        "broken", "bf16", [sys.executable, "-c", "raise SystemExit('no such engine')"]
    )
    code, records, output = run(weights, tmp_path, providers=[""], batches=(1,), extra=(broken,))
    assert code == 0 and "no speed for broken bf16: exit code 1: no such engine" in output
    assert not rows(records)


def test_deepkern_must_run(weights, tmp_path):
    missing = torch_provider("deepkern", "bf16", tmp_path / "missing")
    code, _, output = run(weights, tmp_path, providers=[""], batches=(1,), extra=(missing,))
    assert code == 1 and "no such directory" in output


def test_errors_cross_the_process(weights, tmp_path):
    provider = torch_provider("deepkern", "fp32", weights / "tiny" / "bf16")
    env = comparison.environment(threads=1)
    with Child(provider.command, tmp_path / "log", env=env, cwd=machine.ROOT) as process:
        assert process.request(do="load")["threads"] == 1
        with pytest.raises(ChildError, match="IndexError"):
            process.request(do="time", tokens=[[10**6]], new=1)
        assert len(process.request(do="time", tokens=[[1, 2]], new=3)["steps"]) == 3


@pytest.mark.parametrize(
    ("change", "error", "same"),
    [("none", 0, 1), ("scaled", 0.5, 1), ("nan", float("inf"), 0), ("shape", float("inf"), 0)],
)
def test_compare(change, error, same):
    reference = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    logits = {
        "none": reference,
        "scaled": reference * 1.5,
        "nan": np.where(np.arange(7) == 3, np.nan, reference),
        "shape": reference[:4],
    }[change]
    assert comparison.compare(logits, reference) == pytest.approx((error, same), rel=1e-5)


def test_both_checkpoints_have_the_same_weights(weights):
    fp8, bf16 = (Checkpoint.open(weights / "tiny" / x) for x in ("fp8", "bf16"))
    assert fp8.check().n_routed_experts == bf16.check().n_routed_experts == 8
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    codes, scale = fp8.read(name)
    assert codes.dtype == torch.float8_e4m3fn
    exact = comparison.dequantize_blocks(codes, scale)
    assert torch.equal(bf16.read(name)[0].float(), exact)


@pytest.mark.parametrize("model", list(comparison.MODELS))
def test_models_have_at_least_100m_parameters(model):
    config = Config(**comparison.V3, **comparison.MODELS[model])
    shapes = comparison.expected_tensors(config).values()
    assert sum(int(np.prod(shape)) for shape in shapes) >= 100e6


# GGUF.


def gguf_tensors(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> quantization and fp32 value of every tensor of a GGUF file."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    return {
        t.name: (
            t.tensor_type.name,
            gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape)[::-1]),
        )
        for t in gguf.GGUFReader(file).tensors
    }


def test_gguf_has_the_weights(weights, tmp_path):
    pytest.importorskip("gguf", reason="needs the gguf package")
    folder, file = weights / "tiny" / "bf16", tmp_path / "model.gguf"
    gguf_export.export(folder, file)
    stored, expected = gguf_tensors(file), gguf_export.Safetensors(folder)
    layer = "model.layers.1."
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.1.attn_q_a.weight": f"{layer}self_attn.q_a_proj.weight",
        "blk.1.ffn_gate_inp.weight": f"{layer}mlp.gate.weight",
        "blk.1.exp_probs_b.bias": f"{layer}mlp.gate.e_score_correction_bias",
        "blk.1.ffn_norm.weight": f"{layer}post_attention_layernorm.weight",
    }
    for name, source in pairs.items():
        kind, value = stored[name]
        assert kind == ("Q8_0" if "attn_q_a" in name or "embd" in name else "F32")
        np.testing.assert_allclose(value, expected.read(source), atol=np.abs(value).max() / 200)
    kind, experts = stored["blk.1.ffn_down_exps.weight"]
    assert kind == "Q8_0" and experts.shape == (8, 128, 64)
    source = expected.read(f"{layer}mlp.experts.5.down_proj.weight")
    np.testing.assert_allclose(experts[5], source, atol=np.abs(source).max() / 200)
    kv_b = expected.read(f"{layer}self_attn.kv_b_proj.weight").reshape(2, 64, 64)
    for name, value in (("k_b", kv_b[:, :32].swapaxes(1, 2)), ("v_b", kv_b[:, 32:])):
        result = stored[f"blk.1.attn_{name}.weight"][1]
        np.testing.assert_allclose(result, value, atol=np.abs(value).max() / 200)
    # 3 of the model, 13 of the dense layer, 18 of the layer with experts
    assert len(stored) == 3 + 13 + 18


@pytest.mark.parametrize(
    ("key", "value"), [("scoring_func", "softmax"), ("rope_scaling", {"type": "yarn"})]
)
def test_gguf_refuses_other_models(key, value):
    config = Config(**SIZES).to_dict() | {key: value}
    with pytest.raises(ValueError, match=key):
        gguf_export.check(config)


def test_safetensors_without_torch(weights):
    folder = weights / "tiny" / "bf16"
    checkpoint, stored = Checkpoint.open(folder), gguf_export.Safetensors(folder)
    assert set(stored.entries) == set(checkpoint.stored)
    for name in ("model.norm.weight", "lm_head.weight"):
        np.testing.assert_array_equal(stored.read(name), checkpoint.read(name)[0].float().numpy())


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_the_engines_throughput(weights, tmp_path, monkeypatch, wrong):
    """Exit code 1 if a larger batch changes the tokens of a request."""
    if wrong:
        throughput = engine.throughput

        def changed(model, prompts):
            rate, tokens, share = throughput(model, prompts)
            return rate, [[t + (len(prompts) == 32) for t in row] for row in tokens], share

        monkeypatch.setattr(engine, "throughput", changed)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(typer.Exit) as end:
            engine.main(weights / "tiny" / "fp8", "fp8", 1, False, tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert end.value.exit_code == int(wrong)
    (file,) = tmp_path.glob("*-engine-tiny.jsonl")
    rates = [json.loads(line) for line in file.read_text().splitlines()][1:]
    assert [r["requests"] for r in rates] == [1, 8, 32]
    assert [r["same"] for r in rates] == [True, True, not wrong]
    assert all(r["gain"] == r["rate"] / rates[0]["rate"] and r["rate"] > 0 for r in rates)
