"""Checkpoint directories in the Hugging Face layout: config.json and safetensors, no pickles.

`Checkpoint.open` reads headers only.  `check` compares names, shapes and dtypes with those that the
model expects, so an error names file and tensor before any weight is read.  Weights are bf16, fp16,
fp32, or e4m3 with `<name>_scale_inv` or `<name>_scale`: one factor per block (128x128, partial at
the edges) that multiplies to dequantize, stored as fp32, bf16, fp16 or e8m0.

    checkpoint = Checkpoint.open("model/checkpoints/stdlib-bytes")
    config = checkpoint.check()
    weight, scale = checkpoint.read("model.layers.0.mlp.up_proj.weight")  # e4m3 [512, 192], [4, 2]

The file has two parts: reading, with FP8 blocks in plain PyTorch, and writing.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import Config
from model.tensors import expected_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SCALES = ("_scale_inv", "_scale")  # suffixes of the name of a scale tensor
REAL = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = {**REAL, "F8_E4M3": torch.float8_e4m3fn}
SCALE_DTYPES = {**REAL, "F8_E8M0": torch.float8_e8m0fnu}

# Some checkpoints hold these; this model computes them.
IGNORED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
# Tensors that only a prediction layer has.
PREDICTION = re.compile(r"^model\.layers\.\d+\.(eh_proj|enorm|hnorm|shared_head)\.")
# Copies of the main model's embedding and head, which some checkpoints omit.
SHARED_COPY = re.compile(r"^model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$")


def dequantize_blocks(codes: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128)) -> Tensor:
    """e4m3 [N, K] and one scale per block -> fp32 [N, K]."""
    per_value = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.float() * per_value[: codes.shape[0], : codes.shape[1]]


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and the tensor."""


@dataclass
class StoredTensor:
    """One tensor of a checkpoint.

    shape, dtype: by the header; None if the file is not there (`Checkpoint.open(partial=True)`).
    dtype: in safetensors' spelling, such as "BF16".
    read: returns the tensor.  read(True) may return a view of the mapped file, which takes no
        memory of its own; read(False) returns a copy of a file's data.
    """

    file: str
    shape: tuple[int, ...] | None
    dtype: str | None
    read: Callable[[bool], Tensor]

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None if the dtype is not one of this format's."""
        return {**DTYPES, **SCALE_DTYPES}.get(self.dtype or "")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape or (0,)) * (self.torch_dtype or torch.uint8).itemsize


class Checkpoint:
    """The tensors of a checkpoint by name, read on demand.

    source: the directory, or "memory".
    block: rows and columns that one scale of an FP8 weight covers.
    """

    def __init__(self, config: Config, stored: dict[str, StoredTensor], source: str) -> None:
        self.config, self.stored, self.source = config, stored, source
        quantization = config.quantization_config or {}
        self.block: tuple[int, int] = tuple(quantization.get("weight_block_size", (128, 128)))

    @classmethod
    def open(cls, folder: str | Path, partial: bool = False) -> Checkpoint:
        """Opens a directory: config.json, and model.safetensors or an index with its shards.

        partial: shards that the index names may be absent.  Reading a tensor of such a shard
            raises CheckpointError with the name of the file.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such directory (expected a checkpoint)")
        config, stored = Config.load(folder), {}
        for file, names in _shards(folder, partial).items():
            stored.update(_headers(file, names) if file.is_file() else _absent(file, names or []))
        return cls(config, stored, str(folder))

    @classmethod
    def from_tensors(cls, config: Config, tensors: dict[str, Tensor]) -> Checkpoint:
        """A checkpoint of tensors in memory."""
        names = {dtype: name for name, dtype in (DTYPES | SCALE_DTYPES).items()}

        def entry(t: Tensor) -> StoredTensor:
            dtype = names.get(t.dtype, str(t.dtype))
            return StoredTensor("memory", tuple(t.shape), dtype, lambda _: t)

        stored = {name: entry(t) for name, t in tensors.items()}
        return cls(config, stored, "memory")

    def check(self, layers: int | None = None) -> Config:
        """Raises CheckpointError unless every tensor exists with its shape and dtype.

        layers: the number of decoder layers to use, at most the config's; without prediction
            layers.  By default all, and a directory with more decoder layers than its config says
            is refused.

        Returns the config of the model to build.  It has no prediction layers if the directory has
        no tensor of them; transformers' save_pretrained omits them.
        """
        config = self._config_to_build(layers)
        names = expected_tensors(config)
        for name, shape in names.items():
            self._check_tensor(name, shape)
        for name, stored in self.stored.items():
            known = name in names or any(name.removesuffix(s) in names for s in SCALES)
            if known or IGNORED.search(name):
                continue
            if config.tie_word_embeddings and name == "lm_head.weight":
                continue  # a copy of the embedding
            if config.num_nextn_predict_layers == 0 and _layer(name) >= config.num_hidden_layers:
                continue  # a layer that the config does not have
            shared = ".mlp.shared_experts." in name and not config.n_shared_experts
            if shared and 0 in (stored.shape or ()):
                continue  # transformers writes empty tensors for no shared experts
            text = f"{stored.file}: tensor {name} is not part of this model"
            raise CheckpointError(text + (" (n_shared_experts is 0)" if shared else ""))
        return config

    def _config_to_build(self, layers: int | None) -> Config:
        config, count = self.config, self.config.num_hidden_layers
        if layers is not None:
            if not 0 < layers <= count:
                raise ValueError(f"layers = {layers}: expected 1 to num_hidden_layers = {count}")
            return config.with_layers(layers)
        layers_of = {name: _layer(name) for name in self.stored}
        prediction = {layers_of[name] for name in self.stored if PREDICTION.match(name)}
        extra = [n for n in sorted({*layers_of.values()} - prediction) if n >= count]
        if extra:
            text = f"{self.source}: layer {extra[0]} is a decoder layer, but num_hidden_layers is"
            raise CheckpointError(f"{text} {count}; layers={count} runs the first {count} only")
        expected = range(count, count + config.num_nextn_predict_layers)
        if expected and not {*layers_of.values()} & {*expected}:
            return config.with_layers(count)
        return config

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self.stored.get(name)
        if stored is None:
            if SHARED_COPY.match(name):
                return
            raise CheckpointError(f"{self.source}: tensor {name} is missing")
        if stored.shape is None:
            return  # in an absent shard
        if stored.shape != shape:
            text = f"{stored.file}: tensor {name} has shape {list(stored.shape)}"
            raise CheckpointError(f"{text}, expected {list(shape)}")
        _check_dtype(stored, name, DTYPES)
        self._check_scale(name, stored)

    def _check_scale(self, name: str, stored: StoredTensor) -> None:
        names = [name + suffix for suffix in SCALES if name + suffix in self.stored]
        if stored.dtype != "F8_E4M3":
            if names:
                text = f"{self.stored[names[0]].file}: tensor {names[0]} belongs to FP8, but {name}"
                raise CheckpointError(f"{text} is {stored.dtype}")
            return
        if len(stored.shape or ()) != 2:
            raise CheckpointError(f"{stored.file}: tensor {name} is FP8 and not a matrix")
        if not names:
            text = f"{stored.file}: tensor {name} is FP8 and its scale {name}{SCALES[0]} is missing"
            raise CheckpointError(text)
        if len(names) > 1:
            raise CheckpointError(f"{stored.file}: tensor {name} has two scales: {names}")
        scale = self.stored[names[0]]
        if scale.shape is None:
            return
        sizes = zip(stored.shape or (), self.block, strict=True)
        shape = tuple(-(-size // block) for size, block in sizes)
        if scale.shape != shape:
            text = f"{scale.file}: tensor {names[0]} has shape {list(scale.shape)}"
            raise CheckpointError(f"{text}, expected {list(shape)}")
        _check_dtype(scale, names[0], SCALE_DTYPES)

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def layer_names(self, layer: int) -> list[str]:
        """The names of the tensors of one layer, scales included."""
        return [name for name in self.stored if _layer(name) == layer]

    def read(self, name: str, mapped: bool = True) -> tuple[Tensor, Tensor | None]:
        """A tensor in its stored dtype; if that is FP8, its scales too, fp32, one per `block`.

        mapped: return a view of the mapped file where possible.  Without it, the tensor is a copy
            and no page of the file stays in the process's memory.
        """
        tensor = self._read(name, mapped)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor, None
        scale = next(name + suffix for suffix in SCALES if name + suffix in self.stored)
        return tensor, self._read(scale, mapped=False).float()

    def _read(self, name: str, mapped: bool) -> Tensor:
        try:
            return self.stored[name].read(mapped)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            file = self.stored[name].file
            raise CheckpointError(f"{file}: tensor {name} cannot be read: {error}") from error


def _check_dtype(stored: StoredTensor, name: str, supported: dict[str, torch.dtype]) -> None:
    if stored.dtype not in supported:
        text = f"{stored.file}: tensor {name} has dtype {stored.dtype}"
        raise CheckpointError(f"{text}, expected one of {', '.join(supported)}")


def _layer(name: str) -> int:
    """The layer number in a tensor's name, or -1."""
    number = name.removeprefix("model.layers.").split(".")[0]
    return int(number) if name.startswith("model.layers.") and number.isdigit() else -1


def _shards(folder: Path, partial: bool) -> dict[Path, list[str] | None]:
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
    names_of: dict[str, list[str]] = {}
    for name, file in file_of.items():
        names_of.setdefault(file if isinstance(file, str) else repr(file), []).append(name)
    for file, names in names_of.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            text = f"{index}: tensor {names[0]} has file {file!r}"
            raise CheckpointError(f"{text}, expected the name of a safetensors file")
        if not (partial or (folder / file).is_file()):
            raise CheckpointError(f"{folder / file}: shard is missing; tensor {names[0]} is in it")
    return {folder / file: names for file, names in names_of.items()}


def _absent(file: Path, names: list[str]) -> dict[str, StoredTensor]:
    """Entries for the tensors of a shard that is not there; reading one raises."""

    def entry(name: str) -> StoredTensor:
        def read(_: bool) -> Tensor:
            raise CheckpointError(f"{file}: shard is missing; tensor {name} is in it")

        return StoredTensor(str(file), None, None, read)

    return {name: entry(name) for name in names}


def _headers(file: Path, names: list[str] | None) -> dict[str, StoredTensor]:
    """Reads the header of one file; raises if the file is damaged or lacks one of `names`."""
    try:
        shard = safe_open(file, framework="pt")  # checks that the header fits the file
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    for name in names or ():
        if name not in header:
            raise CheckpointError(f"{file}: tensor {name} is missing; {INDEX} says it is here")

    def entry(name: str) -> StoredTensor:
        dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
        first, end = header[name]["data_offsets"]
        start, size = 8 + length + first, end - first
        torch_dtype = {**DTYPES, **SCALE_DTYPES}.get(dtype, torch.uint8)

        def read(mapped: bool) -> Tensor:
            if mapped and start % torch_dtype.itemsize == 0:
                return shard.get_tensor(name)
            return _copy(file, start, size).view(torch_dtype).view(shape)

        return StoredTensor(str(file), shape, dtype, read)

    return {name: entry(name) for name in header}


def _copy(file: Path, start: int, size: int) -> Tensor:
    """`size` bytes of a file from `start`, uint8 [size]."""
    data = torch.empty(size, dtype=torch.uint8)
    with file.open("rb") as stream:
        stream.seek(start)
        if size and stream.readinto(data.numpy()) != size:  # type: ignore[arg-type]
            raise OSError("the file ends within the tensor")
    return data


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


class CheckpointWriter:
    """Writes tensors to shards of at most `shard_bytes`, one shard in memory at a time.

    writer = CheckpointWriter(folder)
    writer.add("lm_head.weight", tensor)
    writer.finish(config)  # names the shards, writes the index and config.json
    """

    def __init__(self, folder: Path, shard_bytes: int = 5 << 30) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self.shard: dict[str, Tensor] = {}
        self.size = self.total = 0
        self.files: list[list[str]] = []  # names of the tensors in each written shard

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy of the tensor."""
        if self.size and self.size + tensor.nbytes > self.shard_bytes:
            self._write_shard()
        self.shard[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.size += tensor.nbytes
        self.total += tensor.nbytes

    def _write_shard(self) -> None:
        path = self.folder / f".shard-{len(self.files)}"
        save_file(self.shard, path, metadata={"format": "pt"})
        path.chmod(0o644)
        self.files.append([*self.shard])
        self.shard, self.size = {}, 0

    def finish(self, config: Config) -> None:
        if self.shard or not self.files:
            self._write_shard()
        count, file_of = len(self.files), {}
        for number, names in enumerate(self.files):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE
            (self.folder / f".shard-{number}").rename(self.folder / file)
            file_of.update(dict.fromkeys(names, file))
        if count > 1:
            weight_map = dict(sorted(file_of.items()))
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        (self.folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")


def write_checkpoint(
    folder: Path, config: Config, tensors: dict[str, Tensor], shard_bytes: int = 5 << 30
) -> None:
    """Writes config.json and the tensors, in shards with an index if they exceed `shard_bytes`."""
    writer = CheckpointWriter(folder, shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish(config)
