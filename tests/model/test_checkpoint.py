"""Reading checkpoints: all valid layouts, and an error that names file and tensor for damage."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import CheckpointError, Config, DeepSeek
from model.checkpoint import INDEX, SINGLE, Checkpoint, replace_directory, write_checkpoint
from model.config import FP8_QUANTIZATION
from model.plain import PlainModel
from model.tensors import expected_tensors
from tests.models import stored_tensors

TOKENS = torch.arange(30).view(2, 15) * 3
V32 = {"model_type": "deepseek_v32", "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
Q_A = "model.layers.1.self_attn.q_a_proj.weight"
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"


def load(folder: Path, **options) -> DeepSeek:
    return DeepSeek.from_pretrained(folder, **{"dtype": torch.float32, **options})


@pytest.fixture
def plain(make_config, make_plain) -> PlainModel:
    return make_plain(make_config(num_nextn_predict_layers=1))


@pytest.fixture
def fp8_folder(tmp_path, make_config, make_plain) -> Path:
    """FP8 as DeepSeek stores it; no size is a multiple of 128, some have two blocks."""
    config = make_config(
        hidden_size=136, kv_lora_rank=140, q_lora_rank=24, num_nextn_predict_layers=1,
        quantization_config=FP8_QUANTIZATION,
    )  # fmt: skip
    write_checkpoint(tmp_path / "fp8", config, stored_tensors(make_plain(config)))
    return tmp_path / "fp8"


def dequantize_by_loop(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        real = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[name + "_scale_inv"]
            for n in range(0, real.shape[0], 128):
                for k in range(0, real.shape[1], 128):
                    real[n : n + 128, k : k + 128] *= scale[n // 128, k // 128]
        out[name] = real
    return out


def test_shards_give_the_same_logits(plain, saved):
    single, sharded = saved(plain, "single"), saved(plain, "sharded", shard_bytes=50_000)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert not (single / INDEX).exists()
    assert torch.equal(load(single)(TOKENS), load(sharded)(TOKENS))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtypes(plain, tmp_path, stored):
    tensors = {name: t.to(stored) for name, t in plain.state_dict().items()}
    write_checkpoint(tmp_path / "x", plain.config, tensors)
    plain.load_state_dict(tensors)
    torch.testing.assert_close(load(tmp_path / "x")(TOKENS), plain(TOKENS), atol=1e-4, rtol=0)


def test_fp8_edge_blocks_are_dequantized(fp8_folder):
    tensors = load_file(fp8_folder / SINGLE)
    assert tensors[Q_A].dtype == torch.float8_e4m3fn
    assert tensors["model.layers.1.self_attn.kv_b_proj.weight_scale_inv"].shape == (1, 2)
    model = load(fp8_folder)
    plain = PlainModel(model.config)
    plain.load_state_dict(dequantize_by_loop(tensors))
    for name, weight in PlainModel.from_pretrained(fp8_folder).state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name]), name
    torch.testing.assert_close(model(TOKENS), plain.eval()(TOKENS), atol=1e-4, rtol=0)
    mtp = plain.mtp_logits(TOKENS)
    torch.testing.assert_close(model.mtp_logits(TOKENS), mtp, atol=1e-4, rtol=0)


def test_fp8_keeps_fp8_weights(fp8_folder):
    tensors = load_file(fp8_folder / SINGLE)
    model = load(fp8_folder, fp8=True)
    layer = model.model["layers"][1]
    for linear in (layer.self_attn.qkv_a_proj, layer.mlp.shared_experts.down_proj):
        assert linear.weight.dtype == torch.float8_e4m3fn and linear.scale is not None
    assert layer.mlp.experts.w13.dtype == torch.float8_e4m3fn
    stored = tensors[Q_A].view(torch.uint8)
    assert torch.equal(layer.self_attn.qkv_a_proj.weight.view(torch.uint8)[: len(stored)], stored)
    exact, rounded = load(fp8_folder)(TOKENS), model(TOKENS)
    # Activations have 3 mantissa bits, and a rounding error can change the choice of an expert.
    assert (rounded - exact).norm() / exact.norm() < 0.25


def stored_blocks(
    tensors: dict, prefix: str, names: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and scales of weights one below the other, the scales one per row."""
    weights = [tensors[f"{prefix}.{name}.weight"] for name in names]
    scales = [tensors[f"{prefix}.{name}.weight_scale_inv"] for name in names]
    rows = [s.repeat_interleave(128, 0)[: len(w)] for w, s in zip(weights, scales, strict=True)]
    return torch.cat([w.view(torch.uint8) for w in weights]), torch.cat(rows)


def test_fp8_keeps_all_bits_of_edge_blocks(fp8_folder):
    """No N_i is a multiple of 128, so every scale of a joined weight is one per row."""
    tensors, layer = load_file(fp8_folder / SINGLE), load(fp8_folder, fp8=True).model["layers"][1]
    prefix, attention = "model.layers.1.self_attn", layer.self_attn
    checked = [
        (attention.qkv_a_proj, f"{prefix}", ["q_a_proj", "kv_a_proj_with_mqa"]),
        (attention.q_b_proj, prefix, ["q_b_proj"]),
        (attention.o_proj, prefix, ["o_proj"]),
        (layer.mlp.shared_experts.down_proj, "model.layers.1.mlp.shared_experts", ["down_proj"]),
    ]
    found = [(m.weight, m.scale, *stored_blocks(tensors, p, names)) for m, p, names in checked]
    experts = layer.mlp.experts
    for e in range(8):
        prefix = f"model.layers.1.mlp.experts.{e}"
        gate_up = stored_blocks(tensors, prefix, ["gate_proj", "up_proj"])
        down = stored_blocks(tensors, prefix, ["down_proj"])
        found.append((experts.w13[e], experts.w13_scale[e], *gate_up))
        found.append((experts.w2[e], experts.w2_scale[e], *down))
    for weight, scale, data, row_scale in found:
        assert torch.equal(weight.view(torch.uint8), data)
        scale = scale if len(scale) == len(data) else scale.repeat_interleave(128, 0)[: len(data)]
        assert torch.equal(scale, row_scale)


def test_fp8_quantizes_real_weights_at_load(plain, saved):
    model = load(saved(plain), fp8=True)
    assert model.model["layers"][0].mlp.gate_up_proj.weight.dtype == torch.float8_e4m3fn
    exact = load(saved(plain))(TOKENS)
    assert (model(TOKENS) - exact).norm() / exact.norm() < 0.3


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors of model.safetensors; removes those with value None."""
    tensors = load_file(folder / SINGLE)
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / SINGLE)


def edit_json(file: Path, change) -> None:
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def assert_error(folder: Path, *words: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        load(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_truncated_file(plain, saved):
    folder = saved(plain)
    file = folder / SINGLE
    for size in (0, 4, 300, file.stat().st_size // 2, file.stat().st_size - 1):
        whole = file.read_bytes()
        file.write_bytes(whole[:size])
        assert_error(folder, str(file))
        file.write_bytes(whole)
    load(folder)


def test_garbage_file(plain, saved):
    folder = saved(plain)
    (folder / SINGLE).write_bytes(b"\xff" * 4096)
    assert_error(folder, SINGLE)


@pytest.mark.parametrize("name", [Q_A, EXPERT, "lm_head.weight", "model.norm.weight"])
def test_missing_tensor(plain, saved, name):
    folder = saved(plain)
    rewrite(folder, **{name: None})
    assert_error(folder, str(folder), name, "missing")


def test_missing_selection_bias(plain, saved):
    folder, name = saved(plain), "model.layers.1.mlp.gate.e_score_correction_bias"
    rewrite(folder, **{name: None})
    assert_error(folder, name)


def test_partly_missing_prediction_layer(plain, saved):
    folder, name = saved(plain), "model.layers.3.eh_proj.weight"
    rewrite(folder, **{name: None})
    assert_error(folder, name)


@pytest.mark.parametrize("shape", [(24, 71), (72, 24), (24,), (1, 24, 72), (0, 72)], ids=str)
def test_wrong_shape(plain, saved, shape):
    folder = saved(plain)
    rewrite(folder, **{Q_A: torch.zeros(shape)})
    assert_error(folder, str(folder / SINGLE), Q_A, str(list(shape)), "[24, 72]")


def test_wrong_dtype(plain, saved):
    folder = saved(plain)
    rewrite(folder, **{Q_A: torch.zeros(24, 72, dtype=torch.int32)})
    assert_error(folder, SINGLE, Q_A, "dtype")


def test_unknown_tensor(plain, saved):
    folder = saved(plain)
    rewrite(folder, **{"model.layers.0.self_attn.q_a_proj.bias": torch.zeros(24)})
    assert_error(folder, SINGLE, "q_a_proj.bias")


def test_rotary_tables_are_ignored(plain, saved):
    folder = saved(plain)
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    load(folder)


def test_missing_scale(fp8_folder):
    rewrite(fp8_folder, **{Q_A + "_scale_inv": None})
    assert_error(fp8_folder, SINGLE, Q_A, "_scale_inv", "missing")


def test_fp8_vector(fp8_folder):
    name = "model.layers.1.input_layernorm.weight"
    rewrite(fp8_folder, **{name: torch.ones(136).to(torch.float8_e4m3fn)})
    assert_error(fp8_folder, SINGLE, name, "not a matrix")


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int32, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_wrong_scale_dtype(fp8_folder, dtype):
    """One of e8m0 bytes stored as U8 would be read as numbers near 127."""
    name = Q_A + "_scale_inv"
    rewrite(fp8_folder, **{name: torch.full((1, 2), 100).to(dtype)})
    assert_error(fp8_folder, str(fp8_folder / SINGLE), name, "dtype", "F8_E8M0")


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str
)
def test_scale_dtypes_and_names(fp8_folder, suffix, dtype):
    """Powers of two are exact in each dtype."""
    tensors, exact = load_file(fp8_folder / SINGLE), {}
    for name in list(tensors):
        if name.endswith("_scale_inv"):
            power = tensors.pop(name).log2().ceil().exp2()
            tensors[name.removesuffix("_scale_inv") + suffix] = power.to(dtype)
            exact[name] = power
        else:
            exact[name] = tensors[name]
    save_file(tensors, fp8_folder / SINGLE)
    plain = PlainModel.from_pretrained(fp8_folder)
    for name, weight in dequantize_by_loop(exact).items():
        assert torch.equal(plain.state_dict()[name], weight), name
    torch.testing.assert_close(load(fp8_folder)(TOKENS), plain(TOKENS), atol=1e-4, rtol=0)


def test_every_e8m0_scale_is_decoded():
    scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)[None]
    weight = torch.zeros(1, 256 * 128).to(torch.float8_e4m3fn)
    tensors = {"w.weight": weight, "w.weight_scale_inv": scale}
    read = Checkpoint.from_tensors(Config(), tensors).read("w.weight")[1][0].double()
    assert torch.equal(read[:255], torch.ldexp(torch.ones(255), torch.arange(-127.0, 128)).double())
    assert read[255].isnan()


def test_two_scales(fp8_folder):
    rewrite(fp8_folder, **{Q_A + "_scale": torch.ones(1, 2)})
    assert_error(fp8_folder, SINGLE, Q_A, "two scales")


def test_wrong_scale_shape(fp8_folder):
    rewrite(fp8_folder, **{Q_A + "_scale_inv": torch.ones(1, 1)})
    assert_error(fp8_folder, SINGLE, Q_A + "_scale_inv", "[1, 1]", "[1, 2]")


def test_scale_without_fp8(plain, saved):
    folder = saved(plain)
    rewrite(folder, **{Q_A + "_scale_inv": torch.ones(1, 1)})
    assert_error(folder, SINGLE, Q_A + "_scale_inv")


def test_missing_shard(plain, saved):
    folder = saved(plain, shard_bytes=50_000)
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    assert_error(folder, str(gone), "missing")


def test_shard_without_its_tensor(plain, saved):
    folder = saved(plain, shard_bytes=50_000)
    file = json.loads((folder / INDEX).read_text())["weight_map"][Q_A]
    tensors = load_file(folder / file)
    del tensors[Q_A]
    save_file(tensors, folder / file)
    assert_error(folder, file, Q_A)


def test_index_without_a_tensor(plain, saved):
    folder = saved(plain, shard_bytes=50_000)
    file = json.loads((folder / INDEX).read_text())["weight_map"][Q_A]
    tensors = load_file(folder / file)
    edit_json(folder / INDEX, lambda raw: raw["weight_map"].pop(Q_A))
    load(folder)  # the shard still has it
    del tensors[Q_A]
    save_file(tensors, folder / file)
    assert_error(folder, Q_A)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(plain, saved, text):
    folder = saved(plain, shard_bytes=50_000)
    (folder / INDEX).write_text(text)
    assert_error(folder, INDEX)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_index_with_a_file_outside(plain, saved, file):
    folder = saved(plain, shard_bytes=50_000)
    edit_json(folder / INDEX, lambda raw: raw["weight_map"].update({Q_A: file}))
    assert_error(folder, INDEX, Q_A)


def test_no_weights(plain, saved):
    folder = saved(plain)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert_error(folder, str(folder), SINGLE, ".bin")


def test_no_directory(tmp_path):
    assert_error(tmp_path / "none", str(tmp_path / "none"), error=FileNotFoundError)


def test_no_config(plain, saved):
    folder = saved(plain)
    (folder / "config.json").unlink()
    assert_error(folder, "config.json", error=FileNotFoundError)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_size": 73}, "embed_tokens"),
        ({"hidden_size": "72"}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"n_routed_experts": 12}, "mlp.gate.weight"),
        ({"n_group": 3}, "n_group"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 4}, "model.layers."),
        ({"num_hidden_layers": 2}, "layer 2 is a decoder layer"),
        ({"n_shared_experts": None}, "n_shared_experts"),
        ({"n_shared_experts": 2}, "shared_experts"),
        ({"n_routed_experts": None}, "mlp.gate_proj"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"topk_group": None}, "topk_group"),
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "deepseek_v32"}, "index_n_heads"),
        (V32, "indexer.wq_b.weight is missing"),
    ],
)
def test_config_that_does_not_fit(plain, saved, change, word):
    folder = saved(plain)
    edit_json(folder / "config.json", lambda raw: raw.update(change))
    assert_error(folder, word, error=ValueError)


def test_indexer_tensors_are_part_of_v32(make_config):
    config = make_config(**V32)
    tensors = {name: torch.zeros(shape) for name, shape in expected_tensors(config).items()}
    checkpoint = Checkpoint.from_tensors(config, tensors)
    assert checkpoint.check() == config
    assert checkpoint.read("model.layers.2.self_attn.indexer.k_norm.bias")[0].shape == (16,)
    with pytest.raises(CheckpointError, match="indexer.*is not part of this model"):
        Checkpoint.from_tensors(make_config(), tensors).check()


@pytest.mark.parametrize(
    ("family", "changes"),
    [("V3", {}), ("V3", {"n_shared_experts": 0}), ("V32", {})],
    ids=["v3", "v3-no-shared-experts", "v32"],
)
def test_directories_that_transformers_writes(family, changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 32, "hidden_size": 24, "intermediate_size": 24, "moe_intermediate_size": 8,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1,
    }  # fmt: skip
    indexer = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4} if family == "V32" else {}
    config = getattr(transformers, f"Deepseek{family}Config")(**sizes, **indexer, **changes)
    getattr(transformers, f"Deepseek{family}ForCausalLM")(config).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert expected_tensors(checkpoint.check()).keys() == {
        name for name, stored in checkpoint.stored.items() if 0 not in stored.shape
    }


def test_empty_shared_experts(plain, saved, make_config, make_plain):
    """transformers writes zero-size tensors for n_shared_experts = 0."""
    none = make_plain(make_config(n_shared_experts=0))
    folder = saved(none)
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.shared_experts."
        for name, shape in (("gate", (0, 72)), ("up", (0, 72)), ("down", (72, 0))):
            rewrite(folder, **{f"{prefix}{name}_proj.weight": torch.zeros(shape)})
    torch.testing.assert_close(load(folder)(TOKENS), none(TOKENS), atol=1e-4, rtol=0)
    rewrite(folder, **{f"{prefix}down_proj.weight": torch.zeros(72, 40)})
    assert_error(folder, f"{prefix}down_proj.weight", "n_shared_experts is 0")


PREDICTION = "model.layers.3."


def test_prediction_layer_is_loaded(plain, saved):
    mtp = load(saved(plain)).mtp_logits(TOKENS)
    torch.testing.assert_close(mtp, plain.mtp_logits(TOKENS), atol=1e-4, rtol=0)


def test_prediction_layer_without_its_copies(plain, saved):
    """Without the copies of embedding and head, the main model's are used."""
    folder, main = saved(plain), plain.state_dict()
    copies = ["embed_tokens.weight", "shared_head.head.weight"]
    rewrite(folder, **{PREDICTION + name: None for name in copies})
    layer = plain.model["layers"][3]
    layer.embed_tokens.weight = torch.nn.Parameter(main["model.embed_tokens.weight"])
    layer.shared_head["head"].weight = torch.nn.Parameter(main["lm_head.weight"])
    for model in (load(folder), PlainModel.from_pretrained(folder)):
        mtp = model.mtp_logits(TOKENS)
        torch.testing.assert_close(mtp, plain.mtp_logits(TOKENS), atol=1e-4, rtol=0)


def test_prediction_layer_not_in_the_config(plain, saved):
    folder = saved(plain)
    logits = load(folder)(TOKENS)
    edit_json(folder / "config.json", lambda raw: raw.update(num_nextn_predict_layers=0))
    assert torch.equal(load(folder)(TOKENS), logits)
    with pytest.raises(ValueError, match="prediction layer"):
        load(folder).mtp_logits(TOKENS)


def test_prediction_layer_not_in_the_files(plain, saved):
    folder = saved(plain)
    logits = load(folder)(TOKENS)
    names = [name for name in load_file(folder / SINGLE) if name.startswith(PREDICTION)]
    rewrite(folder, **dict.fromkeys(names))
    model = load(folder)
    assert model.config.num_nextn_predict_layers == 0
    assert torch.equal(model(TOKENS), logits)


def test_replace_directory_is_all_or_nothing(tmp_path):
    target = tmp_path / "out"
    with replace_directory(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), replace_directory(target) as folder:
        (folder / "b").write_text("2")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["a"]
    with replace_directory(target) as folder:
        (folder / "c").write_text("3")
    assert [p.name for p in target.iterdir()] == ["c"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_no_pickle():
    """Only train.py, which reads its own state, calls torch.load; no other file unpickles."""
    for file in Path(DeepSeek.__module__.replace(".", "/")).parent.glob("*.py"):
        if file.name != "train.py":
            assert not re.search(r"torch\.load|pickle\.", file.read_text()), file
