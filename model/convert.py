"""Converts a checkpoint directory between FP8 and bf16.

    python -m model.convert --checkpoint DIR --out DIR --to bf16
    python -m model.convert --checkpoint DIR --out DIR --to fp8 --scale-format ue8m0

Reads any checkpoint that this model loads and writes one that transformers loads too.  Tensors
are read, converted and written one by one, so a conversion takes the memory of one output shard.
OUT appears when it is complete.  Tokenizer files and generation_config.json are copied.

fp8: Linear weights become e4m3 with one scale per 128x128 block, edge blocks partial, as in the
    released DeepSeek-V3 weights; weights that are stored so keep their bits.  With the scale
    format ue8m0 the scales are powers of two, rounded up, and `scale_fmt` says so, which also
    makes activations ue8m0.  Scales are stored as fp32.
bf16: FP8 weights are dequantized in fp32 and rounded once.
In both, the other tensors become bf16 and the selection bias fp32.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import deepkern
from model.checkpoint import (
    SCALES,
    Checkpoint,
    CheckpointWriter,
    replace_directory,
)
from model.config import FP8_QUANTIZATION, Config
from model.tensors import expected_tensors, is_quantized

# Files of a checkpoint directory that belong to the model, apart from config and weights.
COPIED = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)


class Format(str, Enum):
    """What Linear weights are stored as."""

    fp8 = "fp8"
    bf16 = "bf16"


class ScaleFormat(str, Enum):
    """What block scales are rounded to."""

    fp32 = "fp32"
    ue8m0 = "ue8m0"


def converted_config(config: Config, to: Format, scale_format: ScaleFormat) -> Config:
    """`config` as it is written next to the converted weights."""
    quantization: dict[str, Any] | None = None
    if to is Format.fp8:
        quantization = dict(FP8_QUANTIZATION)
        if scale_format is ScaleFormat.ue8m0:
            quantization["scale_fmt"] = "ue8m0"
    extra = {key: value for key, value in config.extra.items() if key not in ("dtype", "auto_map")}
    extra["torch_dtype"] = "bfloat16"
    return Config(**{**vars(config), "quantization_config": quantization, "extra": extra})


def converted_tensors(
    checkpoint: Checkpoint, name: str, to: Format, scale_format: ScaleFormat
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that replace tensor `name`: one, or an FP8 weight and its scales."""
    tensor, scale = checkpoint.read(name, mapped=False)
    if to is Format.fp8 and is_quantized(name):
        if not (scale is not None and keeps_its_bits(checkpoint.block, scale, scale_format)):
            if scale is not None:
                tensor = deepkern.cast_back(tensor, scale, checkpoint.block, torch.float32)
            tensor, scale = deepkern.cast_per_block(tensor, scale_format=scale_format.value)
        yield name, tensor
        yield name + SCALES[0], scale
        return
    dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
    if scale is not None:
        tensor = deepkern.cast_back(tensor, scale, checkpoint.block, torch.float32)
    yield name, tensor.to(dtype)


def keeps_its_bits(block: tuple[int, int], scale: Tensor, scale_format: ScaleFormat) -> bool:
    """Whether a stored FP8 weight already has the blocks and the scales that are wanted."""
    mantissa, _ = torch.frexp(scale)
    powers_of_two = bool((mantissa == 0.5).all())
    return block == (128, 128) and (scale_format is ScaleFormat.fp32 or powers_of_two)


def convert(
    checkpoint: Checkpoint,
    out: Path,
    to: Format,
    scale_format: ScaleFormat | None = None,
    shard_bytes: int = 2 << 30,
    progress: Callable[[str, int, int], object] = lambda name, done, total: None,
    add_files: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Writes directory `out`, all or nothing.

    scale_format: of FP8 weights; by default the checkpoint's.
    progress: called after each tensor with its name, the bytes read so far, and all bytes.
    add_files: called with the folder before it gets its name.

    Raises CheckpointError if the checkpoint is not complete.
    """
    config = checkpoint.check()
    scale_format = scale_format or ScaleFormat(config.activation_scale_format)
    # Copies of the embedding and head may be omitted.
    names = [name for name in expected_tensors(config) if name in checkpoint]
    done, total = 0, sum(checkpoint.stored[name].nbytes for name in names)
    with replace_directory(out) as folder:
        writer = CheckpointWriter(folder, shard_bytes)
        for name in names:
            for new_name, tensor in converted_tensors(checkpoint, name, to, scale_format):
                writer.add(new_name, tensor)
            done += checkpoint.stored[name].nbytes
            progress(name, done, total)
        writer.finish(converted_config(config, to, scale_format))
        copy_other_files(Path(checkpoint.source), folder)
        add_files(folder)


def copy_other_files(source: Path, folder: Path) -> None:
    """Copies the files that COPIED names."""
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy(file, folder)


def main(
    checkpoint: Annotated[Path, typer.Option(help="the directory to convert")],
    out: Annotated[Path, typer.Option(help="the directory to write")],
    to: Annotated[Format, typer.Option(help="what Linear weights become")],
    scale_format: Annotated[
        ScaleFormat | None,
        typer.Option(help="of fp8: ue8m0 is powers of two; by default the checkpoint's"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace OUT if it is not empty")] = False,
) -> None:
    """Converts CHECKPOINT to FP8 or bf16, one tensor at a time."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise typer.BadParameter(f"{out} is not empty", param_hint="--out")
    if out.resolve() == checkpoint.resolve():
        raise typer.BadParameter("is the directory to convert", param_hint="--out")
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("")

            def progress(name: str, done: int, total: int) -> None:
                bar.update(task, description=name, completed=done, total=total)

            convert(Checkpoint.open(checkpoint), out, to, scale_format, progress=progress)
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    print(out)


if __name__ == "__main__":
    typer.run(main)
