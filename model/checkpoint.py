"""Checkpoint directories in the Hugging Face layout: config.json and safetensors, no pickles.

`Checkpoint.open` reads headers only; `check` compares names, shapes and dtypes with what the model
expects, so that a damaged or incomplete directory is refused, by file and tensor, before a single
weight is read.  Weights are bf16, fp16, fp32, or e4m3 with `<name>_scale_inv`: one factor per block
(128x128, partial at the edges) that multiplies to dequantise.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import Config
from model.names import IGNORED, expected_tensors, optional_layer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and the tensor."""


@dataclass
class Stored:
    """One tensor of a checkpoint: where it is, what its header says, and how to read it."""

    place: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one this model does not read
    read: Callable[[], Tensor]


class Checkpoint:
    def __init__(self, config: Config, stored: dict[str, Stored], place: str) -> None:
        self.config, self.stored, self.place = config, stored, place
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
    def of(cls, config: Config, tensors: dict[str, Tensor]) -> Checkpoint:
        """The same over tensors in memory."""
        stored = {
            name: Stored("memory", tuple(t.shape), t.dtype, lambda t=t: t)
            for name, t in tensors.items()
        }
        return cls(config, stored, "memory")

    def check(self) -> Config:
        """Raises CheckpointError unless every tensor of the model is here and fits.

        Returns the config to build: prediction layers that the config announces and the directory
        leaves out altogether (as transformers' save_pretrained does) are taken off it.
        """
        names = expected_tensors(self.config)
        layers = self.config.num_hidden_layers
        announced = range(layers, layers + self.config.num_nextn_predict_layers)
        config = self.config
        if not any(_layer(name) in announced for name in self.stored):
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
                continue  # prediction layers that the config does not ask for
            raise CheckpointError(f"{stored.place}: tensor {name} is not part of this model")
        return config

    def _without_prediction(self) -> Config:
        values = {**vars(self.config), "num_nextn_predict_layers": 0}
        return Config(**values)

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self.stored.get(name)
        if stored is None:
            if optional_layer(name):
                return
            raise CheckpointError(f"{self.place}: tensor {name} is missing")
        if stored.shape != shape:
            text = f"{stored.place}: tensor {name} has shape {list(stored.shape)}"
            raise CheckpointError(f"{text}, expected {list(shape)}")
        if stored.dtype not in DTYPES.values():
            raise CheckpointError(f"{stored.place}: tensor {name} has a dtype that is not read")
        self._check_scale(name, stored)

    def _check_scale(self, name: str, stored: Stored) -> None:
        scale = self.stored.get(name + SCALE)
        if stored.dtype != torch.float8_e4m3fn:
            if scale is not None:
                text = f"{scale.place}: tensor {name}{SCALE} belongs to FP8, but {name} is"
                raise CheckpointError(f"{text} {stored.dtype}")
            return
        if len(stored.shape) != 2:
            raise CheckpointError(f"{stored.place}: tensor {name} is FP8 and not a matrix")
        if scale is None:
            text = f"{stored.place}: tensor {name} is FP8 and its scale {name}{SCALE} is missing"
            raise CheckpointError(text)
        sizes = zip(stored.shape, self.block, strict=True)
        shape = tuple(-(-size // block) for size, block in sizes)
        if scale.shape != shape:
            text = f"{scale.place}: tensor {name}{SCALE} has shape {list(scale.shape)}"
            raise CheckpointError(f"{text}, expected {list(shape)}")

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A tensor as it is stored, and its fp32 scales, one per `block`, if that is FP8."""
        tensor = self._read(name)
        scaled = tensor.dtype == torch.float8_e4m3fn
        return tensor, self._read(name + SCALE).float() if scaled else None

    def _read(self, name: str) -> Tensor:
        try:
            return self.stored[name].read()
        except SafetensorError as error:
            place = self.stored[name].place
            raise CheckpointError(f"{place}: tensor {name} cannot be read: {error}") from error


def _layer(name: str) -> int:
    """The layer number in a tensor's name, or -1."""
    part = name.removeprefix("model.layers.").split(".")[0]
    return int(part) if name.startswith("model.layers.") and part.isdigit() else -1


def _shards(folder: Path) -> dict[Path, list[str] | None]:
    """The files to read and the tensors each must hold (None: whatever it holds)."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return {folder / SINGLE: None}
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt")]
        hint = "; .bin and .pt files are not read" if pickles else ""
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there{hint}")
    try:
        where = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a weight index: {error!r}") from error
    shards: dict[Path, list[str] | None] = {}
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: tensor {name} is said to be in {file!r}")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: shard is missing; tensor {name} is in it")
        shards.setdefault(folder / file, []).append(name)  # type: ignore[union-attr]
    return shards


def _headers(file: Path, names: list[str] | None) -> dict[str, Stored]:
    """What `file` holds, by name; raises if it is damaged or lacks one of `names`."""
    try:
        shard = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error
    held = set(shard.keys())
    for name in names or ():
        if name not in held:
            raise CheckpointError(f"{file}: tensor {name} is missing, though {INDEX} puts it here")
    stored = {}
    for name in shard.keys():  # noqa: SIM118  (not a dict)
        header = shard.get_slice(name)
        dtype = DTYPES.get(header.get_dtype())

        def read(shard: Any = shard, name: str = name) -> Tensor:
            return shard.get_tensor(name)

        stored[name] = Stored(str(file), tuple(header.get_shape()), dtype, read)
    return stored


@contextmanager
def directory_replaced_at_once(path: Path) -> Iterator[Path]:
    """Yields an empty directory that takes `path`'s place when the block ends without error."""
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
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = SINGLE
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        where.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
