"""Writes a trained model of bytes as a Hugging Face directory with the record of its training.

The weights are those that `model/convert.py` writes.  Next to them are the held-out text, its bits
per byte, the log and two pictures of it, and a README with all figures.
"""

from __future__ import annotations

import json
import platform
import textwrap
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
            parameters=sum(t.numel() for name, t in tensors.items() if is_counted(config, name)),
            stored_parameters=sum(t.numel() for t in tensors.values()),
            held_out_bytes=len(heldout),
            window=window,
            **scores(trained, folder, heldout, window),
            python=platform.python_version(),
            torch=torch.__version__,
            **notes,
        )
        write_record(folder, config, metrics, heldout, log)

    convert(trained, out, Format.fp8, shard_bytes=SHARD_BYTES, add_files=add_record)
    return metrics


def is_counted(config: Config, name: str) -> bool:
    """Whether a stored tensor is a parameter, no selection bias and no copy of one."""
    if name.endswith("e_score_correction_bias"):
        return False
    layer = name.removeprefix("model.layers.").split(".")[0]
    inside = layer.isdigit() and int(layer) >= config.num_hidden_layers
    return not (inside and name.endswith((".embed_tokens.weight", ".shared_head.head.weight")))


def scores(trained: Checkpoint, stored: Path, heldout: bytes, window: int) -> dict[str, float]:
    """Bits per byte of the fp32 weights and of the stored ones, both computed in fp32."""
    start, results = time.monotonic(), {}
    for name, checkpoint in (("fp32", trained), ("fp8", Checkpoint.open(stored))):
        model = DeepSeek.from_checkpoint(checkpoint, Precision(torch.float32))
        results[f"held_out_bits_per_byte_{name}"] = bits_per_byte(model, heldout, window)
    results["evaluation_seconds"] = round(time.monotonic() - start, 1)
    return results


def write_record(
    folder: Path,
    config: Config,
    metrics: dict[str, Any],
    heldout: bytes,
    log: list[dict[str, Any]],
) -> None:
    """Writes the text, the figures, the log with its pictures, and the README."""
    (folder / "heldout.txt").write_bytes(heldout)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (folder / "README.md").write_text(readme(config, metrics))
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

{architecture}

| | |
|---|---|
| trained on | {training_bytes:,} bytes: {source}; {held_out_kind} |
| bytes processed in training | {tokens_seen:,} bytes in {steps:,} steps, {skipped} of them skipped |
| training time | {training_minutes} minutes without checkpoints, {hardware}, torch {torch} |
| held-out bits per byte, fp32 weights | {held_out_bits_per_byte_fp32:.4f} |
| held-out bits per byte, FP8 weights as stored | {held_out_bits_per_byte_fp8:.4f} |

Bits per byte are over `heldout.txt` in windows of {window} bytes (`model/evaluate.py`). `metrics.json`
has the same numbers and the recipe; `loss.jsonl`, `loss.png` and `load.png` have the loss and the load
of the experts over time.

Trained by `model/train.py` with this recipe, products in {recipe[precision]}:

{options}

Linear weights are e4m3 with one fp32 scale per 128x128 block (`weight_scale_inv`); embedding, head,
gate, norms and `eh_proj` are bf16, the selection bias fp32.

`heldout.txt` is {held_out_bytes:,} bytes, joined by form feeds:

{files}
"""  # noqa: E501

PYTHON_LICENSE = """
They are copyright © 2001 Python Software Foundation, all rights reserved, under the Python Software
Foundation License Version 2 (https://docs.python.org/3/license.html), as is the source that the
weights were trained on.
"""


def architecture(config: Config, parameters: int) -> str:
    """The model in a sentence or two."""
    c = config
    text = f"A {parameters:,}-parameter DeepSeek-V3-shaped model over bytes: latent attention"
    text += f" with {c.num_attention_heads} heads{' and a q_lora' if c.q_lora_rank else ''},"
    dense = sum(not c.is_moe(layer) for layer in range(c.num_hidden_layers))
    text += f" {dense} dense and {c.num_hidden_layers - dense} expert layers"
    if dense < c.num_hidden_layers:
        text += f" ({c.n_routed_experts} routed experts in {c.n_group} groups,"
        text += f" {c.num_experts_per_tok} active, {c.n_shared_experts} shared)"
    count = c.num_nextn_predict_layers
    text += f", {count} multi-token-prediction layer{'s' if count != 1 else ''}."
    sizes = (c.hidden_size, c.intermediate_size, c.moe_intermediate_size, c.kv_lora_rank)
    if any(size % 128 for size in sizes):
        text += " Some sizes are no multiple of 128: the FP8 scales have partial edge blocks."
    return "\n".join(textwrap.wrap(text, 100, break_on_hyphens=False))


def readme(config: Config, metrics: dict[str, Any]) -> str:
    """README.md of a trained checkpoint."""
    files = "\n".join(f"- `{path}`" for path in metrics["held_out_files"])
    options = "\n".join(f"- {name}: {value}" for name, value in metrics["recipe"].items())
    text = README.format(
        architecture=architecture(config, metrics["parameters"]),
        files=files,
        options=options,
        **metrics,
    )
    return text + PYTHON_LICENSE if metrics["name"] == "stdlib-bytes" else text
