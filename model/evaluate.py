"""Bits per byte of a byte-level model on a text.

    python -m model.evaluate --checkpoint DIR --text FILE

The text is split into windows of `window` bytes.  Each byte is predicted from the bytes before it
in its window and the last byte of the previous window.  Each byte except the first is scored once,
so figures of two models on the same text and window are comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from model.generate import CHECKPOINT, load_model


def windows(tokens: Tensor, window: int, batch: int) -> Iterator[Tensor]:
    """Windows of tokens [N]: int64 [<= batch, window + 1]; the last may be a shorter [1, rest].

    Adjacent windows have one token in common, the last of one and the first of the next.
    """
    tokens = tokens.long()
    whole = (len(tokens) - 1) // window
    if whole:
        full = tokens[: whole * window + 1].unfold(0, window + 1, window)
        yield from full.split(batch)
    rest = tokens[whole * window :]
    if len(rest) > 1:
        yield rest[None]


@torch.no_grad()
def nats_per_token(
    model: Callable[[Tensor], Tensor],
    tokens: Tensor,
    window: int = 512,
    batch: int = 8,
    progress: Callable[[int], object] = lambda _: None,
) -> float:
    """Mean of -ln p(token | tokens before it in the window); each token but the first is scored.

    model: maps int64 [B, S] to logits [B, S, vocab].
    tokens: [N], of any integer dtype, on the device of the model.
    progress: called after each batch with the number of tokens scored so far.
    """
    nats, scored = 0.0, 0
    for rows in windows(tokens, window, batch):
        logits, target = model(rows[:, :-1]).float(), rows[:, 1:].flatten()
        nats += F.cross_entropy(logits.flatten(0, 1), target, reduction="sum").item()
        scored += target.numel()
        progress(scored)
    return nats / scored


def bits_per_byte(
    model: Callable[[Tensor], Tensor],
    data: bytes,
    window: int = 512,
    batch: int = 8,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] = lambda _: None,
) -> float:
    """`nats_per_token` of a model of bytes, in bits."""
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    return nats_per_token(model, tokens, window, batch, progress) / math.log(2)


def main(
    checkpoint: Annotated[Path, typer.Option(help="a directory of a model of bytes")] = CHECKPOINT,
    text: Annotated[
        Path | None,
        typer.Option(help="the file to score; heldout.txt of the checkpoint by default"),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="bytes per window")] = 512,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    fp8: Annotated[bool, typer.Option(help="keep weights in FP8 and multiply in FP8")] = False,
    device: str = "cpu",
) -> None:
    """Prints the bits per byte of CHECKPOINT on TEXT."""
    text = text or checkpoint / "heldout.txt"
    if not text.is_file():
        raise typer.BadParameter(f"{text}: no such file", param_hint="--text")
    data = text.read_bytes()
    if len(data) < 2:
        raise typer.BadParameter(f"{text}: expected at least 2 bytes", param_hint="--text")
    model = load_model(checkpoint, dtype, device, fp8)
    if model.config.vocab_size != 256:
        size = model.config.vocab_size
        raise typer.BadParameter(f"{checkpoint}: {size} tokens, expected a model of 256 bytes")
    value = bits_per_byte(model, data, window, device=device)
    print(f"{value:.4f} bits per byte, {len(data) - 1} bytes scored, windows of {window}")


if __name__ == "__main__":
    typer.run(main)
