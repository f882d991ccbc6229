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

import codecs
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Protocol

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from model.checkpoint import CheckpointError
from model.config import Config
from model.deepseek import DeepSeek

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


class Tokenizer(Protocol):
    """Converts text to tokens and back."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, BOS first if the model uses one."""
        ...

    def decode(self, tokens: list[int]) -> str: ...

    def decoder(self) -> Callable[[int], str]:
        """A function that takes one token at a time and returns the text that it completes."""
        ...


def with_bos(tokens: list[int], bos: int | None) -> list[int]:
    """tokens with `bos` first; unchanged if `bos` is None or already the first."""
    return tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]


class ByteTokenizer:
    """UTF-8 bytes as tokens.  BOS is the separator that training puts before every file."""

    def __init__(self, bos: int | None) -> None:
        self.bos = bos

    def encode(self, text: str) -> list[int]:
        # surrogateescape: a command-line argument that is not UTF-8 keeps its bytes
        return with_bos(list(text.encode(errors="surrogateescape")), self.bos)

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def decoder(self) -> Callable[[int], str]:
        incremental = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: incremental.decode(bytes([token]))


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library; its template or `bos` gives the BOS."""

    def __init__(self, file: Path, bos: int | None = None) -> None:
        import tokenizers

        self.bos, self.tokenizer = bos, tokenizers.Tokenizer.from_file(str(file))

    def encode(self, text: str) -> list[int]:
        return with_bos(self.tokenizer.encode(text).ids, self.bos)

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def decoder(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self.tokenizer, token) or ""


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    tokenizer_config.json adds BOS where it has `add_bos_token: true`.

    Raises:
        CheckpointError: no tokenizer.json, and the vocabulary is not the 256 bytes.
    """
    folder = Path(folder)
    config, file = Config.load(folder), folder / "tokenizer.json"
    if file.is_file():
        options = folder / "tokenizer_config.json"
        add_bos = options.is_file() and json.loads(options.read_text()).get("add_bos_token")
        return FileTokenizer(file, config.bos_token_id if add_bos else None)
    if config.vocab_size == 256:
        bos = config.bos_token_id
        return ByteTokenizer(bos if bos is not None and 0 <= bos < 256 else None)
    raise CheckpointError(f"{file}: missing, and {config.vocab_size} tokens are not bytes")


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
