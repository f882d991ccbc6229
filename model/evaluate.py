"""Bits per byte of a byte-level model on a text: the one figure that says whether a model is right.

The text is cut into windows of `window` bytes; each byte is predicted from the bytes before it in
its own window and the last byte of the window before.  No byte is scored twice, so figures of two
models on the same text and window compare directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def windows(data: bytes, window: int, batch: int) -> Iterator[Tensor]:
    """int64 [<= batch, window + 1] pieces of `data`, neighbours sharing a byte; a shorter last."""
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    whole = (len(tokens) - 1) // window
    if whole:
        pieces = tokens[: whole * window + 1].unfold(0, window + 1, window)
        yield from pieces.split(batch)
    rest = tokens[whole * window :]
    if len(rest) > 1:
        yield rest[None]


@torch.no_grad()
def bits_per_byte(
    model: Callable[[Tensor], Tensor],
    data: bytes,
    window: int = 512,
    batch: int = 8,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] = lambda _: None,
) -> float:
    """Mean of -log2 p(byte | bytes before it in the window).

    `model` maps int64 tokens [B, S] on `device` to logits [B, S, 256]; `progress` is called with
    the number of bytes scored so far.
    """
    nats, scored = 0.0, 0
    for tokens in windows(data, window, batch):
        tokens = tokens.to(device)
        logits = model(tokens[:, :-1]).float()
        target = tokens[:, 1:].flatten()
        nats += F.cross_entropy(logits.flatten(0, 1), target, reduction="sum").item()
        scored += target.numel()
        progress(scored)
    return nats / scored / math.log(2)
