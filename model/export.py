"""Writes a trained model as an FP8 checkpoint in the Hugging Face layout.

Linear weights become e4m3 with one fp32 scale per 128x128 block, edge blocks partial, as in the
released DeepSeek-V3 weights.  Embedding, head, gate, norms and the prediction layer's eh_proj are
bf16 and the selection bias is fp32.  The record of the training is written next to them.
`model/convert.py` converts checkpoints that exist.
"""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import (
    dequantize_blocks,
    quantize_blocks,
    replace_directory,
    write_checkpoint,
)
from model.config import FP8_QUANTIZATION, Config
from model.evaluate import bits_per_byte
from model.plain import PlainModel
from model.tensors import is_quantized


def stored_tensors(model: PlainModel) -> dict[str, Tensor]:
    """The tensors of an FP8 checkpoint by name, `<name>_scale_inv` included."""
    tensors = {}
    for name, value in model.state_dict().items():
        if is_quantized(name):
            tensors[name], tensors[name + "_scale_inv"] = quantize_blocks(value)
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = value.float()
        else:
            tensors[name] = value.bfloat16()
    return tensors


def restored(model: PlainModel, tensors: dict[str, Tensor]) -> PlainModel:
    """A PlainModel of the same config with the weights of `tensors`, dequantized."""
    values = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scale = tensors.get(name + "_scale_inv")
        values[name] = value.float() if scale is None else dequantize_blocks(value, scale)
    copy = PlainModel(model.config)
    copy.load_state_dict(values)
    return copy.eval()


def fp8_config(config: Config) -> Config:
    """A copy of `config` that says that the weights are FP8."""
    return Config(**{**vars(config), "quantization_config": FP8_QUANTIZATION})


def export(
    model: PlainModel,
    out: Path,
    heldout: bytes,
    notes: dict[str, Any],
    log: list[dict[str, Any]],
    window: int = 512,
) -> dict[str, Any]:
    """Writes directory `out`, all or nothing, and returns the content of its metrics.json.

    heldout: text that was not trained on, scored in windows of `window` bytes.
    notes: what README.md says of the training.  log: rows of the loss curve.
    """
    tensors = stored_tensors(model)
    start = time.monotonic()
    metrics = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "stored_parameters": sum(t.numel() for n, t in tensors.items() if "_scale_inv" not in n),
        "held_out_bytes": len(heldout),
        "window": window,
        "held_out_bits_per_byte_fp32": bits_per_byte(model.eval(), heldout, window),
        "held_out_bits_per_byte_fp8": bits_per_byte(restored(model, tensors), heldout, window),
        "evaluation_seconds": round(time.monotonic() - start, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **notes,
    }
    with replace_directory(out) as folder:
        write_checkpoint(folder, fp8_config(model.config), tensors, shard_bytes=3_500_000)
        (folder / "heldout.txt").write_bytes(heldout)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        (folder / "loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        plot(log, metrics, folder / "loss.png")
        (folder / "README.md").write_text(readme(metrics))
    return metrics


def plot(log: list[dict[str, Any]], metrics: dict[str, Any], file: Path) -> None:
    """Draws the loss curve as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    trained = [row for row in log if "main" in row]
    smooth, value = [], None
    for row in trained:
        value = row["main"] if value is None else 0.75 * value + 0.25 * row["main"]
        smooth.append(value / math.log(2))
    millions = [row["tokens"] / 1e6 for row in trained]
    axes.plot(millions, [row["main"] / math.log(2) for row in trained], lw=0.4, color="0.7")
    axes.plot(millions, smooth, label="training, smoothed")
    scored = [row for row in log if "held_out_bpb" in row]
    points = ([row["tokens"] / 1e6 for row in scored], [row["held_out_bpb"] for row in scored])
    axes.plot(*points, "o-", ms=3, label="held out (first 16 KiB)")
    final = metrics["held_out_bits_per_byte_fp8"]
    axes.axhline(final, ls=":", color="k", label=f"held out, all, FP8: {final:.3f}")
    axes.set(xlabel="million bytes of training", ylabel="bits per byte", ylim=(1, 5))
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


README = """# stdlib-bytes

A {parameters:,}-parameter DeepSeek-V3-shaped model over bytes: latent attention with a q_lora, one
dense and three expert layers (16 routed experts in 4 groups, 4 active, 1 shared, sigmoid scores with
a selection bias), one multi-token-prediction layer. Most of its sizes are no multiple of 128, so
the FP8 scales have partial edge blocks.

| | |
|---|---|
| trained on | {training_bytes:,} bytes: the `.py` files of Python {python}'s standard library without tests, `encodings` and `pydoc_data`; about 3 % of the files, chosen by hash of the path, held out |
| bytes processed in training | {tokens_seen:,} bytes in {steps:,} steps |
| training time | {training_minutes} minutes, {training_threads} thread of a shared 2-core CPU machine without GPU, torch {torch} |
| held-out bits per byte, fp32 weights | {held_out_bits_per_byte_fp32:.4f} |
| held-out bits per byte, FP8 weights as stored | {held_out_bits_per_byte_fp8:.4f} |

Bits per byte are over `heldout.txt` in windows of {window} bytes (`model/evaluate.py`). `metrics.json`
has the same numbers and the recipe; `loss.jsonl` and `loss.png` have the loss curve.

Trained by `python -m model.train --minutes {recipe[minutes]:g}`: AdamW on {recipe[batch]} windows of
{recipe[window]} bytes a step, learning rate {recipe[learning_rate]:g} with warm-up and a cosine over
the clock; loss of the prediction layer times {recipe[mtp_weight]:g}, sequence-wise balance loss times
{recipe[balance_weight]:g}, bias step {recipe[bias_step]:g}.

Linear weights are e4m3 with one fp32 scale per 128x128 block (`weight_scale_inv`); embedding, head,
gate, norms and `eh_proj` are bf16, the selection bias fp32.

`heldout.txt` is {held_out_bytes:,} bytes of held-out files of the standard library, joined by form
feeds:

{files}

They are copyright © 2001 Python Software Foundation, all rights reserved, under the Python Software
Foundation License Version 2 (https://docs.python.org/3/license.html), as is the source that the
weights were trained on.
"""  # noqa: E501


def readme(metrics: dict[str, Any]) -> str:
    """README.md of a trained checkpoint."""
    files = "\n".join(f"- `{path}`" for path in metrics["held_out_files"])
    return README.format(files=files, **metrics)
