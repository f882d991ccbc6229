"""The committed checkpoint: logits compared with plain PyTorch, a continuation, speed, and bits.

Everything is measured on the checkpoint's own held-out text. The fp32 model must agree with plain
PyTorch on the same weights to LOGIT_TOLERANCE. No precision may lose more than BITS_LOST.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import machine
from . import generation

CHECKPOINT = machine.ROOT / "model" / "checkpoints" / "stdlib-bytes"
HELD_OUT = "heldout.txt"
LOGIT_TOLERANCE = 1e-4  # absolute, in fp32 on a CPU
BITS_LOST = 0.02  # bits per byte that bf16 or FP8 arithmetic may add to the fp32 figure
SAME_BYTES = 0.9  # fraction of decoded bytes that prefill must predict, too
PROMPT_BYTES = 384
NEW_TOKENS = 96
TIMED_TOKENS, REPEATS = 32, 3
SCORED_BYTES = 8192
WINDOW = 512

STEPS = (
    "load",
    "logits",
    "continuation",
    "speed",
    "many requests",
    "bits fp32",
    "bits bf16",
    "bits fp8",
)


def run(path: Path = CHECKPOINT, step: Callable[[str], object] = lambda what: None) -> list[dict]:
    """The records of kind "model"; each has `name`, `value`, `unit` and `ok`.

    On a CPU with one thread: the model is so small that a second thread makes it slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(path, step)
    finally:
        torch.set_num_threads(threads)


def measure(path: Path, step: Callable[[str], object]) -> list[dict]:
    from model import DeepSeek
    from model.plain import PlainModel

    device = machine.device()
    text = (path / HELD_OUT).read_bytes()

    def load(dtype: torch.dtype, fp8: bool = False):
        return DeepSeek.from_pretrained(path, dtype=dtype, device=device, fp8=fp8)

    step("load")
    exact, plain = load(torch.float32), PlainModel.from_pretrained(path).to(device)
    step("logits")
    tokens = as_tokens(text[:WINDOW], device)
    records = [logits(exact, plain, tokens)]
    step("continuation")
    bf16 = load(torch.bfloat16)
    prompt = choose_prompt(text)
    records += continuation(bf16, prompt, device)
    step("speed")
    fp8 = load(torch.bfloat16, fp8=True)
    for name, model in (("bf16", bf16), ("fp8", fp8)):
        records += speed(model, name, as_tokens(prompt, device))
    step("many requests")
    records += generation.measure(bf16, path, text, record)
    excerpt = text[:SCORED_BYTES]
    plain_bits = None
    for name, model in (("plain fp32", plain), ("bf16", bf16), ("fp8", fp8)):
        step(f"bits {name.removeprefix('plain ')}")
        value = bits_per_byte(model, excerpt, device)
        plain_bits = value if plain_bits is None else plain_bits
        lost = value - plain_bits
        records.append(
            record(f"held-out bits per byte, {name}", value, "bits", math.isfinite(value) and
                   lost <= BITS_LOST, f"{lost:+.4f} to plain fp32, at most +{BITS_LOST}; "
                   f"first {len(excerpt)} bytes of {HELD_OUT}, windows of {WINDOW}")
        )  # fmt: skip
    return records


def record(name: str, value: float | str, unit: str, ok: bool | None, note: str = "") -> dict:
    return {"kind": "model", "name": name, "value": value, "unit": unit, "ok": ok, "note": note}


def as_tokens(text: bytes, device: torch.device) -> Tensor:
    """Bytes are the tokens: int64 [1, S]."""
    return torch.tensor(list(text), dtype=torch.int64, device=device)[None]


@torch.no_grad()
def logits(exact, plain, tokens: Tensor) -> dict:
    """Held-out logits of the fp32 model compared with plain PyTorch's."""
    ours, theirs = exact(tokens), plain(tokens)
    worst = (ours - theirs).abs().max().item()
    agree = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    bound = LOGIT_TOLERANCE if tokens.device.type == "cpu" else 10 * LOGIT_TOLERANCE
    note = f"{tokens.shape[1]} held-out bytes, at most {bound:g}; same best byte at {agree:.1%}"
    return record(
        "largest logit difference to plain PyTorch, fp32", worst, "", worst <= bound, note
    )


def choose_prompt(text: bytes) -> bytes:
    """PROMPT_BYTES of the held-out text that end before a function's body, if it has one."""
    end = text.find(b"def ", PROMPT_BYTES)
    end = text.find(b"\n", end) + 1 if end >= 0 else 0
    end = max(end, PROMPT_BYTES)
    return text[end - PROMPT_BYTES : end]


def continuation(model, prompt: bytes, device: torch.device) -> list[dict]:
    """Greedy bytes after the prompt; checks that decoding from the cache agrees with prefill."""
    tokens = as_tokens(prompt, device)
    whole = model.generate(tokens, NEW_TOKENS)
    new = bytes(whole[0, tokens.shape[1] :].tolist())
    again = model(whole[:, :-1])[0, tokens.shape[1] - 1 :].argmax(-1).tolist()
    same = sum(a == b for a, b in zip(new, again, strict=True)) / max(len(new), 1)
    shown = prompt[-160:].decode("utf-8", "replace"), new.decode("utf-8", "replace")
    # In bf16, bytes of nearly equal logits may swap; a broken cache predicts noise.
    return [
        record("prompt (its end)", shown[0], "text", None),
        record("continuation", shown[1], "text", None, f"{NEW_TOKENS} bytes, greedy, bf16"),
        record(
            "decoded bytes that prefill predicts too",
            same,
            "fraction",
            same >= SAME_BYTES,
            f"at least {SAME_BYTES}",
        ),
    ]


def speed(model, name: str, tokens: Tensor) -> list[dict]:
    """Tokens a second of prefill and of decoding, best of REPEATS."""

    def best(call: Callable[[], object], count: int) -> float:
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            call()
            if tokens.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return count / min(seconds)

    new = TIMED_TOKENS
    prefill = best(lambda: model(tokens), tokens.shape[1])
    first = best(lambda: model.generate(tokens, 1), 1)
    both = best(lambda: model.generate(tokens, 1 + new), 1)
    decode = new / max(1 / both - 1 / first, 1e-9)
    where = "" if tokens.device.type == "cuda" else ", 1 thread"
    note = f"1 sequence, {tokens.shape[1]} bytes in{where}"
    return [
        record(f"prefill, {name}", prefill, "tokens/s", None, note),
        record(f"decode, {name}", decode, "tokens/s", None, f"{note}, {new} decoded"),
    ]


def bits_per_byte(model, text: bytes, device: torch.device) -> float:
    from model.evaluate import bits_per_byte as score

    return score(lambda tokens: model(tokens.to(device)).cpu(), text, WINDOW)
