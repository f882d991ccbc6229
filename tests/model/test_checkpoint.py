"""Reading checkpoints: every layout that is right, and every kind of damage by file and tensor."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import CheckpointError, DeepSeek
from model.checkpoint import INDEX, SINGLE, directory_replaced_at_once, write_checkpoint
from model.config import FP8_QUANTIZATION
from model.export import stored_tensors
from model.plain import PlainModel

TOKENS = torch.arange(30).view(2, 15) * 3
Q_A = "model.layers.1.self_attn.q_a_proj.weight"
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"


def load(folder: Path, **options) -> DeepSeek:
    return DeepSeek.from_pretrained(folder, **{"dtype": torch.float32, **options})


@pytest.fixture
def plain(make_config, make_plain) -> PlainModel:
    return make_plain(make_config(num_nextn_predict_layers=1))


@pytest.fixture
def fp8_folder(tmp_path, make_config, make_plain) -> Path:
    """FP8 as DeepSeek stores it; no size is a multiple of 128, some take two blocks."""
    config = make_config(
        hidden_size=136, kv_lora_rank=140, q_lora_rank=24, num_nextn_predict_layers=1,
        quantization_config=FP8_QUANTIZATION,
    )  # fmt: skip
    write_checkpoint(tmp_path / "fp8", config, stored_tensors(make_plain(config)))
    return tmp_path / "fp8"


def dequantised_by_hand(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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


def test_shards_change_nothing(plain, saved):
    whole, parts = saved(plain, "whole"), saved(plain, "parts", shard_bytes=50_000)
    assert len(list(parts.glob("*.safetensors"))) > 3
    assert not (whole / INDEX).exists()
    assert torch.equal(load(whole)(TOKENS), load(parts)(TOKENS))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtypes(plain, tmp_path, stored):
    tensors = {name: t.to(stored) for name, t in plain.state_dict().items()}
    write_checkpoint(tmp_path / "x", plain.config, tensors)
    plain.load_state_dict(tensors)
    torch.testing.assert_close(load(tmp_path / "x")(TOKENS), plain(TOKENS), atol=1e-4, rtol=0)


def test_fp8_is_dequantised_exactly_edge_blocks_included(fp8_folder):
    tensors = load_file(fp8_folder / SINGLE)
    assert tensors[Q_A].dtype == torch.float8_e4m3fn
    assert tensors["model.layers.1.self_attn.kv_b_proj.weight_scale_inv"].shape == (1, 2)
    model = load(fp8_folder)
    plain = PlainModel(model.config)
    plain.load_state_dict(dequantised_by_hand(tensors))
    for name, weight in PlainModel.from_pretrained(fp8_folder).state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name]), name
    torch.testing.assert_close(model(TOKENS), plain.eval()(TOKENS), atol=1e-4, rtol=0)
    mtp = plain.mtp_logits(TOKENS)
    torch.testing.assert_close(model.mtp_logits(TOKENS), mtp, atol=1e-4, rtol=0)


def test_fp8_stays_resident_when_asked(fp8_folder):
    tensors = load_file(fp8_folder / SINGLE)
    model = load(fp8_folder, fp8=True)
    layer = model.model["layers"][1]
    for part in (layer.self_attn.q_a_proj, layer.mlp.shared_experts.down_proj):
        assert part.weight.dtype == torch.float8_e4m3fn and part.scale is not None
    assert layer.mlp.experts.w13.dtype == torch.float8_e4m3fn
    assert torch.equal(
        layer.self_attn.q_a_proj.weight.view(torch.uint8), tensors[Q_A].view(torch.uint8)
    )
    exact, rounded = load(fp8_folder)(TOKENS), model(TOKENS)
    # e4m3 activations: 3 mantissa bits over a few matmuls; experts may be chosen differently
    assert (rounded - exact).norm() / exact.norm() < 0.25


def test_fp8_asked_of_a_real_checkpoint_quantises_at_load(plain, saved):
    model = load(saved(plain), fp8=True)
    assert model.model["layers"][0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
    exact = load(saved(plain))(TOKENS)
    assert (model(TOKENS) - exact).norm() / exact.norm() < 0.3


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Changes tensors of model.safetensors; None removes."""
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


def refused(folder: Path, *words: str, error: type[Exception] = CheckpointError) -> None:
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
        refused(folder, str(file))
        file.write_bytes(whole)
    load(folder)


def test_garbage_file(plain, saved):
    folder = saved(plain)
    (folder / SINGLE).write_bytes(b"\xff" * 4096)
    refused(folder, SINGLE)


@pytest.mark.parametrize("name", [Q_A, EXPERT, "lm_head.weight", "model.norm.weight"])
def test_missing_tensor(plain, saved, name):
    folder = saved(plain)
    rewrite(folder, **{name: None})
    refused(folder, str(folder), name, "missing")


def test_missing_selection_bias(plain, saved):
    folder, name = saved(plain), "model.layers.1.mlp.gate.e_score_correction_bias"
    rewrite(folder, **{name: None})
    refused(folder, name)


def test_partly_missing_prediction_layer(plain, saved):
    folder, name = saved(plain), "model.layers.3.eh_proj.weight"
    rewrite(folder, **{name: None})
    refused(folder, name)


@pytest.mark.parametrize("shape", [(24, 71), (72, 24), (24,), (1, 24, 72), (0, 72)])
def test_wrong_shape(plain, saved, shape):
    folder = saved(plain)
    rewrite(folder, **{Q_A: torch.zeros(shape)})
    refused(folder, str(folder / SINGLE), Q_A, str(list(shape)), "[24, 72]")


def test_wrong_dtype(plain, saved):
    folder = saved(plain)
    rewrite(folder, **{Q_A: torch.zeros(24, 72, dtype=torch.int32)})
    refused(folder, SINGLE, Q_A, "dtype")


def test_unknown_tensor(plain, saved):
    folder = saved(plain)
    rewrite(folder, **{"model.layers.0.self_attn.q_a_proj.bias": torch.zeros(24)})
    refused(folder, SINGLE, "q_a_proj.bias")


def test_known_extras_are_ignored(plain, saved):
    folder = saved(plain)
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    load(folder)


def test_missing_scale(fp8_folder):
    rewrite(fp8_folder, **{Q_A + "_scale_inv": None})
    refused(fp8_folder, SINGLE, Q_A, "_scale_inv", "missing")


def test_fp8_vector(fp8_folder):
    name = "model.layers.1.input_layernorm.weight"
    rewrite(fp8_folder, **{name: torch.ones(136).to(torch.float8_e4m3fn)})
    refused(fp8_folder, SINGLE, name, "not a matrix")


def test_wrong_scale_shape(fp8_folder):
    rewrite(fp8_folder, **{Q_A + "_scale_inv": torch.ones(1, 1)})
    refused(fp8_folder, SINGLE, Q_A + "_scale_inv", "[1, 1]", "[1, 2]")


def test_scale_without_fp8(plain, saved):
    folder = saved(plain)
    rewrite(folder, **{Q_A + "_scale_inv": torch.ones(1, 1)})
    refused(folder, SINGLE, Q_A + "_scale_inv")


def test_missing_shard(plain, saved):
    folder = saved(plain, shard_bytes=50_000)
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    refused(folder, str(gone), "missing")


def test_shard_without_its_tensor(plain, saved):
    folder = saved(plain, shard_bytes=50_000)
    file = json.loads((folder / INDEX).read_text())["weight_map"][Q_A]
    tensors = load_file(folder / file)
    del tensors[Q_A]
    save_file(tensors, folder / file)
    refused(folder, file, Q_A)


def test_index_without_a_tensor(plain, saved):
    folder = saved(plain, shard_bytes=50_000)
    file = json.loads((folder / INDEX).read_text())["weight_map"][Q_A]
    tensors = load_file(folder / file)
    edit_json(folder / INDEX, lambda raw: raw["weight_map"].pop(Q_A))
    load(folder)  # the shard has it all the same
    del tensors[Q_A]
    save_file(tensors, folder / file)
    refused(folder, Q_A)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(plain, saved, text):
    folder = saved(plain, shard_bytes=50_000)
    (folder / INDEX).write_text(text)
    refused(folder, INDEX)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_index_that_points_elsewhere(plain, saved, file):
    folder = saved(plain, shard_bytes=50_000)
    edit_json(folder / INDEX, lambda raw: raw["weight_map"].update({Q_A: file}))
    refused(folder, INDEX, Q_A)


def test_no_weights(plain, saved):
    folder = saved(plain)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    refused(folder, str(folder), SINGLE, ".bin")


def test_no_directory(tmp_path):
    refused(tmp_path / "none", str(tmp_path / "none"), error=FileNotFoundError)


def test_no_config(plain, saved):
    folder = saved(plain)
    (folder / "config.json").unlink()
    refused(folder, "config.json", error=FileNotFoundError)


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
    ],
)
def test_config_that_does_not_fit(plain, saved, change, word):
    folder = saved(plain)
    edit_json(folder / "config.json", lambda raw: raw.update(change))
    refused(folder, word, error=ValueError)


def test_prediction_layer_loaded_skipped_or_absent(plain, saved):
    folder = saved(plain)
    logits, ahead = load(folder)(TOKENS), load(folder).mtp_logits(TOKENS)
    torch.testing.assert_close(ahead, plain.mtp_logits(TOKENS), atol=1e-4, rtol=0)

    # announced, and its embedding and head left out: the main model's are used
    copies = ["embed_tokens.weight", "shared_head.head.weight"]
    rewrite(folder, **{f"model.layers.3.{name}": None for name in copies})
    main = plain.state_dict()
    layer = plain.model["layers"][3]
    layer.embed_tokens.weight = torch.nn.Parameter(main["model.embed_tokens.weight"])
    layer.shared_head["head"].weight = torch.nn.Parameter(main["lm_head.weight"])
    for model in (load(folder), PlainModel.from_pretrained(folder)):
        ahead = model.mtp_logits(TOKENS)
        torch.testing.assert_close(ahead, plain.mtp_logits(TOKENS), atol=1e-4, rtol=0)

    # not asked for: skipped
    edit_json(folder / "config.json", lambda raw: raw.update(num_nextn_predict_layers=0))
    assert torch.equal(load(folder)(TOKENS), logits)
    with pytest.raises(ValueError, match="prediction layer"):
        load(folder).mtp_logits(TOKENS)

    # announced, and nothing of it there: as if not announced
    edit_json(folder / "config.json", lambda raw: raw.update(num_nextn_predict_layers=1))
    names = [name for name in load_file(folder / SINGLE) if name.startswith("model.layers.3.")]
    rewrite(folder, **dict.fromkeys(names))
    model = load(folder)
    assert model.config.num_nextn_predict_layers == 0
    assert torch.equal(model(TOKENS), logits)


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with directory_replaced_at_once(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), directory_replaced_at_once(target) as folder:
        (folder / "b").write_text("2")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["a"]
    with directory_replaced_at_once(target) as folder:
        (folder / "c").write_text("3")
    assert [p.name for p in target.iterdir()] == ["c"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_is_unpickled():
    """Loading for inference never reaches torch.load or pickle (train.py reads its own state)."""
    for file in Path(DeepSeek.__module__.replace(".", "/")).parent.glob("*.py"):
        if file.name != "train.py":
            assert not re.search(r"torch\.load|pickle\.", file.read_text()), file
