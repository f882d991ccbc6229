"""Loading: part of a model, dtypes, mapped files, and the memory that it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import CheckpointError, Config, DeepSeek
from model.checkpoint import INDEX, SINGLE, Checkpoint, write_checkpoint
from model.deepseek import Layer
from model.plain import PlainModel
from model.tensors import expected_tensors, is_quantized
from model.weights import Precision

TOKENS = torch.arange(30).view(2, 15) * 3


def load(folder: Path, **options) -> DeepSeek:
    return DeepSeek.from_pretrained(folder, **{"dtype": torch.float32, **options})


def edit_json(file: Path, change) -> None:
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


@pytest.fixture
def plain(make_config, make_plain) -> PlainModel:
    return make_plain(make_config(num_nextn_predict_layers=1))


def test_fewer_layers_when_told(plain, saved):
    folder = saved(plain)
    left_out = "model.layers.2.", "model.layers.3."
    tensors = {n: t for n, t in plain.state_dict().items() if not n.startswith(left_out)}
    config = plain.config.with_layers(2)
    write_checkpoint(folder.with_name("two"), config, tensors)
    expected = load(folder.with_name("two"))(TOKENS)
    assert torch.equal(load(folder, layers=2)(TOKENS), expected)
    edit_json(folder / "config.json", lambda raw: raw.update(num_hidden_layers=2))
    assert torch.equal(load(folder, layers=2)(TOKENS), expected)
    for layers in (0, 3, -1):
        with pytest.raises(ValueError, match="layers"):
            load(folder, layers=layers)


@torch.no_grad()
def test_dense_model_equals_transformers(tmp_path):
    """`n_routed_experts: null`; transformers says it by first_k_dense_replace."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV2Config(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=2, num_experts_per_tok=2,
    )  # fmt: skip
    reference = transformers.DeepseekV2ForCausalLM(config).eval()
    for parameter in reference.parameters():
        parameter.normal_(std=0.3)
    reference.save_pretrained(tmp_path)
    none = dict.fromkeys(["n_routed_experts", "n_shared_experts", "num_experts_per_tok"])
    edit_json(tmp_path / "config.json", lambda raw: raw.update(first_k_dense_replace=0, **none))
    tokens = torch.randint(64, (2, 12))
    expected = reference(tokens).logits
    assert expected.abs().max() > 0.5
    for model in (PlainModel.from_pretrained(tmp_path), load(tmp_path)):
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)


def test_layer_of_a_partial_directory(plain, saved):
    """The index and the shards of one layer are enough to read that layer."""
    folder = saved(plain, shard_bytes=50_000)
    whole = Checkpoint.open(folder)
    prefix = "model.layers.2."
    needed = {Path(whole.stored[name].file).name for name in whole.layer_names(2)}
    for file in folder.glob("*.safetensors"):
        if file.name not in needed:
            file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load(folder)
    checkpoint = Checkpoint.open(folder, partial=True)
    assert checkpoint.check() == whole.config
    assert set(checkpoint.stored) == set(plain.state_dict())
    layer = Layer(checkpoint.config, 2, Precision())
    for name, module in layer.named_modules():
        if hasattr(module, "load"):
            module.load(checkpoint, prefix + name)
    for name in checkpoint.layer_names(2):
        assert torch.equal(checkpoint.read(name)[0], plain.state_dict()[name])
    weight = plain.state_dict()[prefix + "self_attn.o_proj.weight"]
    assert torch.equal(layer.self_attn.o_proj.weight, weight)
    absent = "model.embed_tokens.weight"
    file = json.loads((folder / INDEX).read_text())["weight_map"][absent]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(absent)
    assert str(folder / file) in str(caught.value) and absent in str(caught.value)


@pytest.mark.slow
def test_index_of_a_671b_directory(tmp_path):
    """All 91,000 names of DeepSeek-V3 from the index, without a shard."""
    config = Config.preset("deepseek-v3")
    names = expected_tensors(config)
    scales = [f"{name}_scale_inv" for name in names if is_quantized(name)]
    files = {n: f"model-{i % 163:05d}.safetensors" for i, n in enumerate([*names, *scales])}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    checkpoint = Checkpoint.open(tmp_path, partial=True)
    assert checkpoint.check().num_nextn_predict_layers == 1
    assert len(checkpoint.stored) == 91_991
    assert len(checkpoint.layer_names(61)) == len(checkpoint.layer_names(60)) + 6


def test_dtype_strings(plain, saved):
    folder = saved(plain)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for spelling in (dtype, name):
            model = load(folder, dtype=spelling)
            assert model.lm_head.weight.dtype == model.precision.dtype == dtype
    assert load(folder, dtype="auto").precision.dtype == torch.float32  # as stored
    edit_json(folder / "config.json", lambda raw: raw.update(torch_dtype="bfloat16"))
    assert load(folder, dtype="auto").precision.dtype == torch.bfloat16
    for dtype in ("bf16", "float64", torch.float64, torch.int8, None):
        with pytest.raises(ValueError, match="dtype"):
            load(folder, dtype=dtype)


def test_equal_dtypes_are_mapped_without_a_copy(plain, saved):
    folder = saved(plain)
    mapped, converted = load(folder), load(folder, dtype=torch.bfloat16)
    regions = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    for model, expected in ((mapped, True), (converted, False)):
        for module in (
            model.lm_head,
            model.model["norm"],
            model.model["layers"][1].self_attn.o_proj,
        ):
            address, files = module.weight.data_ptr(), []
            for region, *_, file in regions:
                start, end = (int(bound, 16) for bound in region.split("-"))
                files += [file] if start <= address < end else []
            assert [file == str(folder / SINGLE) for file in files] == [expected]


def test_unaligned_tensor_is_copied(tmp_path):
    """A header of odd length, which safetensors itself never writes."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 2)
    data = torch.tensor([1.5, -2.0])
    content = len(header).to_bytes(8, "little") + header + data.numpy().tobytes()
    (tmp_path / SINGLE).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(Config().to_dict()))
    assert torch.equal(Checkpoint.open(tmp_path).read("x")[0], data)


MEASURE = """
import gc, sys, torch
from pathlib import Path
from model import DeepSeek

def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

torch.set_num_threads(1)
small, *folders = sys.argv[1:]
for dtype, fp8 in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
    DeepSeek.from_pretrained(small, dtype=dtype, fp8=fp8)  # imports what loading needs
    for folder in folders:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts at the present memory
        before = memory("VmRSS")
        model = DeepSeek.from_pretrained(folder, dtype=dtype, fp8=fp8)
        size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        print(dtype, fp8, memory("VmHWM") - before, size)
        del model
"""


@pytest.mark.slow
def test_peak_memory_of_loading(plain, saved, make_config, tmp_path):
    """Loading takes the memory of the model and of one weight, here at most 1 MiB.

    A layer's experts are 12 MiB in fp32, and the file 25 MiB in bf16: neither is held twice.
    """
    config = make_config(
        hidden_size=512, moe_intermediate_size=256, n_routed_experts=8, num_hidden_layers=5,
        vocab_size=256, intermediate_size=256,
    )  # fmt: skip
    real = {
        name: torch.randn(shape, dtype=torch.bfloat16)
        for name, shape in expected_tensors(config).items()
    }
    fp8 = dict(real)
    for name in filter(is_quantized, real):
        fp8[name] = real[name].to(torch.float8_e4m3fn)
        fp8[name + "_scale_inv"] = torch.ones([-(-size // 128) for size in real[name].shape])
    for name, tensors in (("real", real), ("fp8", fp8)):
        write_checkpoint(tmp_path / name, config, tensors, shard_bytes=6 << 20)
    folders = saved(plain), tmp_path / "real", tmp_path / "fp8"
    # Freed blocks of 64 KiB and more return to the system, so the peak is that of live tensors.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders)],
        capture_output=True, text=True, env={**environment, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        peak, size = map(int, line.split()[2:])
        assert size > 12 << 20 and peak < size + (6 << 20), result.stdout
