"""Checkpoint directories in the Hugging Face layout: config.json and safetensors, no pickles.

`Checkpoint.open` reads headers only.  `check` compares names, shapes and dtypes with those that the
model expects, so an error names file and tensor before any weight is read.  Weights are bf16, fp16,
fp32, or e4m3 with `<name>_scale_inv`: one factor per block (128x128, partial at the edges) that
multiplies to dequantize.

    checkpoint = Checkpoint.open("model/checkpoints/stdlib-bytes")
    config = checkpoint.check()
    weight, scale = checkpoint.read("model.layers.0.mlp.up_proj.weight")  # e4m3 [512, 192], [4, 2]

The file has four parts: names and shapes of the tensors, FP8 blocks in plain PyTorch, reading,
writing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import Config

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}
BLOCK = 128  # rows and columns per scale
E4M3_MAX = 448.0

Shapes = dict[str, tuple[int, ...]]  # name -> shape

# Some checkpoints hold these; this model computes them.
IGNORED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
# Copies of the main model's embedding and head, which some checkpoints omit.
SHARED_COPY = re.compile(r"^model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$")


def expected_tensors(config: Config) -> Shapes:
    """Name -> shape of every weight of the model, without the scales of FP8 weights."""
    c = config
    shapes: Shapes = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        inner = _attention(c) | _feed_forward(c, layer)
        inner["input_layernorm.weight"] = (c.hidden_size,)
        inner["post_attention_layernorm.weight"] = (c.hidden_size,)
        if layer >= c.num_hidden_layers:
            inner |= _prediction(c)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inner.items()}
    return shapes


def _attention(c: Config) -> Shapes:
    queries = c.num_attention_heads * c.qk_head_dim
    keys_values = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    shapes: Shapes = {
        "kv_a_proj_with_mqa.weight": (c.cache_width, c.hidden_size),
        "kv_a_layernorm.weight": (c.kv_lora_rank,),
        "kv_b_proj.weight": (keys_values, c.kv_lora_rank),
        "o_proj.weight": (c.hidden_size, c.num_attention_heads * c.v_head_dim),
    }
    if c.q_lora_rank:
        shapes["q_a_proj.weight"] = (c.q_lora_rank, c.hidden_size)
        shapes["q_a_layernorm.weight"] = (c.q_lora_rank,)
        shapes["q_b_proj.weight"] = (queries, c.q_lora_rank)
    else:
        shapes["q_proj.weight"] = (queries, c.hidden_size)
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _feed_forward(c: Config, layer: int) -> Shapes:
    if not c.is_moe(layer):
        return _mlp("mlp", c.hidden_size, c.intermediate_size)
    shapes: Shapes = {"mlp.gate.weight": (c.n_routed_experts, c.hidden_size)}
    if c.topk_method == "noaux_tc":
        shapes["mlp.gate.e_score_correction_bias"] = (c.n_routed_experts,)
    for expert in range(c.n_routed_experts):
        shapes |= _mlp(f"mlp.experts.{expert}", c.hidden_size, c.moe_intermediate_size)
    if c.n_shared_experts:
        inner = c.moe_intermediate_size * c.n_shared_experts
        shapes |= _mlp("mlp.shared_experts", c.hidden_size, inner)
    return shapes


def _mlp(name: str, size: int, inner: int) -> Shapes:
    return {
        f"{name}.gate_proj.weight": (inner, size),
        f"{name}.up_proj.weight": (inner, size),
        f"{name}.down_proj.weight": (size, inner),
    }


def _prediction(c: Config) -> Shapes:
    return {
        "embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "enorm.weight": (c.hidden_size,),
        "hnorm.weight": (c.hidden_size,),
        "eh_proj.weight": (c.hidden_size, 2 * c.hidden_size),
        "shared_head.norm.weight": (c.hidden_size,),
        "shared_head.head.weight": (c.vocab_size, c.hidden_size),
    }


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """real [N, K] -> e4m3 [N, K] and fp32 scales [⌈N/128⌉, ⌈K/128⌉] that multiply to dequantize.

    scale[i, j] = max(|block[i, j]|, 1e-4) / 448        codes = e4m3(weight * (1 / scale))
    """
    rows, columns = weight.shape
    pad = (0, -columns % BLOCK, 0, -rows % BLOCK)
    blocks = F.pad(weight.float(), pad).unflatten(0, (-1, BLOCK))
    blocks = blocks.unflatten(2, (-1, BLOCK))  # [rows / 128, 128, columns / 128, 128]
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-4) / E4M3_MAX
    scaled = blocks * (1 / scale)[:, None, :, None]
    codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = codes.view(torch.uint8).flatten(2).flatten(0, 1)[:rows, :columns]
    return codes.contiguous().view(torch.float8_e4m3fn), scale


def dequantize_blocks(codes: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128)) -> Tensor:
    """e4m3 [N, K] and one scale per block -> fp32 [N, K]."""
    per_value = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.float() * per_value[: codes.shape[0], : codes.shape[1]]


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and the tensor."""


@dataclass
class StoredTensor:
    """One tensor of a checkpoint: its file, shape and dtype by the header, and its reader."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: not supported
    read: Callable[[], Tensor]


class Checkpoint:
    """The tensors of a checkpoint by name, read on demand.

    source: the directory, or "memory".
    block: rows and columns that one scale of an FP8 weight covers.
    """

    def __init__(self, config: Config, stored: dict[str, StoredTensor], source: str) -> None:
        self.config, self.stored, self.source = config, stored, source
        quantization = config.quantization_config or {}
        self.block: tuple[int, int] = tuple(quantization.get("weight_block_size") or (128, 128))

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Opens a directory: config.json, and model.safetensors or an index with its shards."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such directory (expected a checkpoint)")
        config, stored = Config.load(folder), {}
        for file, names in _shards(folder).items():
            stored.update(_headers(file, names))
        return cls(config, stored, str(folder))

    @classmethod
    def from_tensors(cls, config: Config, tensors: dict[str, Tensor]) -> Checkpoint:
        """A checkpoint of tensors in memory."""
        stored = {
            name: StoredTensor("memory", tuple(t.shape), t.dtype, lambda t=t: t)
            for name, t in tensors.items()
        }
        return cls(config, stored, "memory")

    def check(self) -> Config:
        """Raises CheckpointError unless every tensor exists with its shape and dtype.

        Returns the config of the model to build.  It has no prediction layers if the directory has
        no tensor of them; transformers' save_pretrained omits them.
        """
        names = expected_tensors(self.config)
        layers = self.config.num_hidden_layers
        prediction = range(layers, layers + self.config.num_nextn_predict_layers)
        config = self.config
        if not any(_layer(name) in prediction for name in self.stored):
            config = self._without_prediction()
            names = expected_tensors(config)
        for name, shape in names.items():
            self._check_tensor(name, shape)
        for name, stored in self.stored.items():
            if name.removesuffix(SCALE) in names or IGNORED.search(name):
                continue
            if config.tie_word_embeddings and name == "lm_head.weight":
                continue  # a copy of the embedding
            if config.num_nextn_predict_layers == 0 and _layer(name) >= layers:
                continue  # a prediction layer that the config does not have
            raise CheckpointError(f"{stored.file}: tensor {name} is not part of this model")
        return config

    def _without_prediction(self) -> Config:
        values = {**vars(self.config), "num_nextn_predict_layers": 0}
        return Config(**values)

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self.stored.get(name)
        if stored is None:
            if SHARED_COPY.match(name):
                return
            raise CheckpointError(f"{self.source}: tensor {name} is missing")
        if stored.shape != shape:
            text = f"{stored.file}: tensor {name} has shape {list(stored.shape)}"
            raise CheckpointError(f"{text}, expected {list(shape)}")
        if stored.dtype not in DTYPES.values():
            raise CheckpointError(f"{stored.file}: tensor {name} has an unsupported dtype")
        self._check_scale(name, stored)

    def _check_scale(self, name: str, stored: StoredTensor) -> None:
        scale = self.stored.get(name + SCALE)
        if stored.dtype != torch.float8_e4m3fn:
            if scale is not None:
                text = f"{scale.file}: tensor {name}{SCALE} belongs to FP8, but {name} is"
                raise CheckpointError(f"{text} {stored.dtype}")
            return
        if len(stored.shape) != 2:
            raise CheckpointError(f"{stored.file}: tensor {name} is FP8 and not a matrix")
        if scale is None:
            text = f"{stored.file}: tensor {name} is FP8 and its scale {name}{SCALE} is missing"
            raise CheckpointError(text)
        sizes = zip(stored.shape, self.block, strict=True)
        shape = tuple(-(-size // block) for size, block in sizes)
        if scale.shape != shape:
            text = f"{scale.file}: tensor {name}{SCALE} has shape {list(scale.shape)}"
            raise CheckpointError(f"{text}, expected {list(shape)}")

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A tensor in its stored dtype; if that is FP8, its scales too, fp32, one per `block`."""
        tensor = self._read(name)
        is_fp8 = tensor.dtype == torch.float8_e4m3fn
        return tensor, self._read(name + SCALE).float() if is_fp8 else None

    def _read(self, name: str) -> Tensor:
        try:
            return self.stored[name].read()
        except SafetensorError as error:
            file = self.stored[name].file
            raise CheckpointError(f"{file}: tensor {name} cannot be read: {error}") from error


def _layer(name: str) -> int:
    """The layer number in a tensor's name, or -1."""
    number = name.removeprefix("model.layers.").split(".")[0]
    return int(number) if name.startswith("model.layers.") and number.isdigit() else -1


def _shards(folder: Path) -> dict[Path, list[str] | None]:
    """The files to read and the tensors that each must hold (None: no requirement)."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return {folder / SINGLE: None}
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt")]
        hint = "; .bin and .pt files are not read" if pickles else ""
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} exists{hint}")
    try:
        file_of = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a weight index: {error!r}") from error
    shards: dict[Path, list[str] | None] = {}
    for name, file in file_of.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: tensor {name} has file {file!r}, expected a name")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: shard is missing; tensor {name} is in it")
        shards.setdefault(folder / file, []).append(name)  # type: ignore[union-attr]
    return shards


def _headers(file: Path, names: list[str] | None) -> dict[str, StoredTensor]:
    """The tensors of `file` by name; raises if it is damaged or lacks one of `names`."""
    try:
        shard = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error
    in_file = set(shard.keys())
    for name in names or ():
        if name not in in_file:
            raise CheckpointError(f"{file}: tensor {name} is missing; {INDEX} says it is here")
    stored = {}
    for name in shard.keys():  # noqa: SIM118  (not a dict)
        header = shard.get_slice(name)
        dtype = DTYPES.get(header.get_dtype())

        def read(shard: Any = shard, name: str = name) -> Tensor:
            return shard.get_tensor(name)

        stored[name] = StoredTensor(str(file), tuple(header.get_shape()), dtype, read)
    return stored


@contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory; renames it to `path` when the block ends without error."""
    path = Path(path)
    fresh, old = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(
    folder: Path, config: Config, tensors: dict[str, Tensor], shard_bytes: int = 5 << 30
) -> None:
    """Writes config.json and the tensors, in shards with an index if they exceed `shard_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().clone().contiguous()
        size += tensor.nbytes
    file_of = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = SINGLE
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        file_of.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(file_of.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
