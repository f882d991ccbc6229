"""Writes a trained model of bytes as a Hugging Face directory with the record of its training.

The weights are those that `model/convert.py` writes.  Next to them are the held-out text, its bits
per byte, the log and two pictures of it, and a README with all figures.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.config import Config
from model.convert import Format, convert
from model.deepseek import DeepSeek
from model.evaluate import bits_per_byte
from model.training.report import plot_load, plot_loss
from model.weights import Precision

LOG_EVERY = 20  # steps of the log per row of loss.jsonl
SHARD_BYTES = 3_500_000


def export(
    config: Config,
    tensors: dict[str, Tensor],
    out: Path,
    heldout: bytes,
    notes: dict[str, Any],
    log: list[dict[str, Any]],
    window: int = 512,
) -> dict[str, Any]:
    """Writes directory `out` with FP8 weights, all or nothing; returns its metrics.json.

    tensors: the trained weights by their names in a checkpoint.
    heldout: text that was not trained on, scored in windows of `window` bytes.
    notes: what README.md says of the training.  log: the rows of a run.
    """
    trained = Checkpoint.from_tensors(config, tensors)
    metrics: dict[str, Any] = {}

    def add_record(folder: Path) -> None:
        metrics.update(
            parameters=sum(t.numel() for name, t in tensors.items() if not is_copy(config, name)),
            stored_parameters=sum(t.numel() for t in tensors.values()),
            held_out_bytes=len(heldout),
            window=window,
            **scores(trained, folder, heldout, window),
            python=platform.python_version(),
            torch=torch.__version__,
            **notes,
        )
        write_record(folder, metrics, heldout, log)

    convert(trained, out, Format.fp8, shard_bytes=SHARD_BYTES, add_files=add_record)
    return metrics


def is_copy(config: Config, name: str) -> bool:
    """Whether a stored tensor is a prediction layer's copy of the embedding or the head."""
    layer = name.removeprefix("model.layers.").split(".")[0]
    inside = layer.isdigit() and int(layer) >= config.num_hidden_layers
    return inside and name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))


def scores(trained: Checkpoint, stored: Path, heldout: bytes, window: int) -> dict[str, float]:
    """Bits per byte of the fp32 weights and of the stored ones, both computed in fp32."""
    start, results = time.monotonic(), {}
    for name, checkpoint in (("fp32", trained), ("fp8", Checkpoint.open(stored))):
        model = DeepSeek.from_checkpoint(checkpoint, Precision(torch.float32))
        results[f"held_out_bits_per_byte_{name}"] = bits_per_byte(model, heldout, window)
    results["evaluation_seconds"] = round(time.monotonic() - start, 1)
    return results


def write_record(
    folder: Path, metrics: dict[str, Any], heldout: bytes, log: list[dict[str, Any]]
) -> None:
    """Writes the text, the figures, the log with its pictures, and the README."""
    (folder / "heldout.txt").write_bytes(heldout)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (folder / "README.md").write_text(readme(metrics))
    write_log(folder, log)


def write_log(folder: Path, log: list[dict[str, Any]], unit: str = "bits per byte") -> None:
    """Writes loss.jsonl, every 20th step of the log, and the pictures of all steps."""

    def is_kept(row: dict[str, Any]) -> bool:
        return row["step"] % LOG_EVERY == 0 or bool(row.keys() & {"held_out", "skipped"})

    rows = [json.dumps(row) + "\n" for row in log if is_kept(row)]
    (folder / "loss.jsonl").write_text("".join(rows))
    plot_loss(log, folder / "loss.png", unit)
    plot_load(log, folder / "load.png")


README = """# {name}

A {parameters:,}-parameter DeepSeek-V3-shaped model over bytes: latent attention with a q_lora, one
dense and three expert layers (16 routed experts in 4 groups, 4 active, 1 shared, sigmoid scores with
a selection bias), one multi-token-prediction layer. Most of its sizes are no multiple of 128, so
the FP8 scales have partial edge blocks.

| | |
|---|---|
| trained on | {training_bytes:,} bytes: {source}; about 3 % of the files, chosen by hash of the path, held out |
| bytes processed in training | {tokens_seen:,} bytes in {steps:,} steps, {skipped} of them skipped |
| training time | {training_minutes} minutes, {training_threads} thread of a shared {cpu} without GPU, torch {torch} |
| held-out bits per byte, fp32 weights | {held_out_bits_per_byte_fp32:.4f} |
| held-out bits per byte, FP8 weights as stored | {held_out_bits_per_byte_fp8:.4f} |

Bits per byte are over `heldout.txt` in windows of {window} bytes (`model/evaluate.py`). `metrics.json`
has the same numbers and the recipe; `loss.jsonl`, `loss.png` and `load.png` have the loss and the load
of the experts over time.

Trained by `python -m model.train --steps {recipe[steps]} --optimizer {recipe[optimizer]}` with products
in {recipe[precision]}: {recipe[batch]} windows of {recipe[window]} bytes a step, learning rate
{recipe[learning_rate]:g} with warm-up and a cosine; loss of the prediction layer times
{recipe[mtp_weight]:g}, sequence-wise balance loss times {recipe[balance_weight]:g}, bias rate
{recipe[bias_rate]:g}.

Linear weights are e4m3 with one fp32 scale per 128x128 block (`weight_scale_inv`); embedding, head,
gate, norms and `eh_proj` are bf16, the selection bias fp32.

`heldout.txt` is {held_out_bytes:,} bytes of held-out files, joined by form feeds:

{files}
"""  # noqa: E501

PYTHON_LICENSE = """
They are copyright © 2001 Python Software Foundation, all rights reserved, under the Python Software
Foundation License Version 2 (https://docs.python.org/3/license.html), as is the source that the
weights were trained on.
"""


def readme(metrics: dict[str, Any]) -> str:
    """README.md of a trained checkpoint."""
    files = "\n".join(f"- `{path}`" for path in metrics["held_out_files"])
    text = README.format(files=files, **metrics)
    return text + PYTHON_LICENSE if metrics["name"] == "stdlib-bytes" else text
