"""Continues a prompt greedily, printing as it goes.

python -m model.generate --checkpoint DIR --prompt TEXT

The directory's tokenizer.json is used if there is one; a model with 256 tokens reads bytes.
"""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol

import torch
import typer
from torch import Tensor

from model.checkpoint import CheckpointError
from model.config import Config
from model.deepseek import DeepSeek

CHECKPOINT = Path(__file__).parent / "checkpoints" / "stdlib-bytes"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Text(Protocol):
    """Text to tokens, and back as the tokens come."""

    def encode(self, text: str) -> list[int]: ...

    def decoder(self) -> Callable[[int], str]: ...


class Bytes:
    """UTF-8 bytes as tokens; a text starts after the separator that training put between files."""

    def __init__(self, start: int | None) -> None:
        self.start = [] if start is None else [start]

    def encode(self, text: str) -> list[int]:
        # surrogateescape: an argument that is not UTF-8 goes back to the bytes it was
        return self.start + list(text.encode(errors="surrogateescape"))

    def decoder(self) -> Callable[[int], str]:
        incremental = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: incremental.decode(bytes([token]))


class Tokenizer:
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Fast

        self.fast = Fast.from_file(str(file))

    def encode(self, text: str) -> list[int]:
        return self.fast.encode(text).ids

    def decoder(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self.fast, token) or ""


def text_of(folder: Path, config: Config) -> Text:
    """How the model in `folder` reads text."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer(folder / "tokenizer.json")
    if config.vocab_size == 256:
        start = config.bos_token_id
        return Bytes(start if start is not None and 0 <= start < 256 else None)
    size = config.vocab_size
    raise CheckpointError(f"{folder / 'tokenizer.json'}: missing, and {size} tokens are not bytes")


def stop_tokens(config: Config) -> set[int]:
    eos = config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos} - {None}  # type: ignore[arg-type]


def main(
    checkpoint: Annotated[Path, typer.Option(help="a Hugging Face directory")] = CHECKPOINT,
    prompt: Annotated[str, typer.Option(help="what to continue")] = "def main(",
    max_new_tokens: Annotated[int, typer.Option(min=0)] = 200,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    fp8: Annotated[bool, typer.Option(help="keep weights in FP8 and multiply in FP8")] = False,
    device: str = "cpu",
) -> None:
    """Continues PROMPT until the end token or MAX_NEW_TOKENS."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r}: expected one of {', '.join(DTYPES)}")
    try:
        model = DeepSeek.from_pretrained(checkpoint, DTYPES[dtype], device, fp8)
        text = text_of(checkpoint, model.config)
    except (CheckpointError, ValueError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    tokens = text.encode(prompt)
    if not tokens:
        raise typer.BadParameter("the prompt has no tokens")
    count, seconds = print_stream(
        model, text, torch.tensor([tokens], device=device), max_new_tokens
    )
    if count:
        rate = f"{count} tokens, {count / seconds:.1f} tokens/s"
        print(f"\n[{rate}]", file=sys.stderr)


def print_stream(model: DeepSeek, text: Text, tokens: Tensor, limit: int) -> tuple[int, float]:
    """Prints prompt and continuation; returns the new tokens and the seconds they took."""
    decode, stops, count = text.decoder(), stop_tokens(model.config), 0
    for token in tokens[0].tolist():
        show(decode(token))
    start = time.perf_counter()
    for token in model.stream(tokens, limit):
        count += 1
        if token.item() in stops:
            break
        show(decode(int(token.item())))
    return count, time.perf_counter() - start


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
