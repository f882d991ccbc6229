"""Generation: the greedy loop, prompts as tokens, and a command that prints as it goes.

    python -m model.generate --checkpoint DIR --prompt TEXT

The same from Python, from the same tokens:

    folder = "model/checkpoints/stdlib-bytes"
    m = DeepSeek.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    tokens = torch.tensor([tokenizer.encode("def main(")])  # int64 [1, S], BOS first
    print(tokenizer.decode(m.generate(tokens, max_new_tokens=40)[0].tolist()))

A directory with a tokenizer.json uses that.  Without one, a model of 256 tokens reads bytes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from model.checkpoint import CheckpointError
from model.config import Config
from model.deepseek import DeepSeek
from model.tokenizer import Tokenizer, load_tokenizer

CHECKPOINT = Path(__file__).parent / "checkpoints" / "stdlib-bytes"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.no_grad()
def stream(model: DeepSeek, tokens: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
    """Yields the greedy continuation of tokens int64 [B, S], one int64 [B] at a time.

    One prefill, then one cached decode step per token.  End tokens do not stop it.
    """
    if tokens.shape[-1] == 0:
        raise ValueError("DeepSeek: generate: the prompt is empty")
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens)
    for _ in range(max_new_tokens):
        last = model.hidden(tokens, cache)[:, -1]
        token = F.linear(last, model.lm_head.weight).argmax(-1)
        yield token
        tokens = token[:, None]


def generate(model: DeepSeek, tokens: Tensor, max_new_tokens: int) -> Tensor:
    """int64 [B, S] -> [B, S + max_new_tokens]: the prompt and its greedy continuation."""
    new = list(stream(model, tokens, max_new_tokens))
    return torch.cat([tokens, *(token[:, None] for token in new)], 1)


def stop_tokens(config: Config) -> set[int]:
    """The end tokens; config.json has none, one or a list."""
    eos = config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos} - {None}  # type: ignore[arg-type]


def load_model(checkpoint: Path, dtype: str, device: str, fp8: bool) -> DeepSeek:
    """`DeepSeek.from_pretrained` for a command: an error is one line and exit code 2."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r}: expected one of {', '.join(DTYPES)}")
    try:
        return DeepSeek.from_pretrained(checkpoint, DTYPES[dtype], device, fp8)
    except (ValueError, FileNotFoundError) as error:
        raise exit_with(error) from error


def exit_with(error: Exception) -> typer.Exit:
    """Prints an error; the caller raises the result."""
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(2)


def main(
    checkpoint: Annotated[Path, typer.Option(help="a Hugging Face directory")] = CHECKPOINT,
    prompt: Annotated[str, typer.Option(help="the text to continue")] = "def main(",
    max_new_tokens: Annotated[int, typer.Option(min=0)] = 200,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    fp8: Annotated[bool, typer.Option(help="keep weights in FP8 and multiply in FP8")] = False,
    device: str = "cpu",
) -> None:
    """Continues PROMPT until the end token or MAX_NEW_TOKENS."""
    model = load_model(checkpoint, dtype, device, fp8)
    try:
        tokenizer = load_tokenizer(checkpoint)
    except CheckpointError as error:
        raise exit_with(error) from error
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise typer.BadParameter("the prompt has no tokens")
    prompt_tokens = torch.tensor([tokens], device=device)
    count, seconds = print_stream(model, tokenizer, prompt_tokens, max_new_tokens)
    if count:
        rate = f"{count} tokens, {count / seconds:.1f} tokens/s"
        print(f"\n[{rate}]", file=sys.stderr)


def print_stream(
    model: DeepSeek, tokenizer: Tokenizer, tokens: Tensor, max_new_tokens: int
) -> tuple[int, float]:
    """Prints prompt and continuation; returns the number of new tokens and their seconds.

    tokens: int64 [1, S].
    """
    decode, stops, count = tokenizer.decoder(), stop_tokens(model.config), 0
    for token in tokens[0].tolist():
        write(decode(token))
    start = time.perf_counter()
    for token in stream(model, tokens, max_new_tokens):
        count += 1
        if token.item() in stops:
            break
        write(decode(int(token.item())))
    return count, time.perf_counter() - start


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
