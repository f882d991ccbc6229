"""A command that prints a continuation as it is generated, and options that commands share.

    python -m model.generate --checkpoint DIR --prompt TEXT --temperature 0.6 --top-p 0.95
    torchrun --nproc-per-node 2 -m model.generate --checkpoint DIR --tensor 2 --experts 2

The same from Python, from the same tokens:

    folder = "model/checkpoints/stdlib-bytes"
    tokenizer = load_tokenizer(folder)
    engine = Engine(DeepSeek.from_pretrained(folder, dtype=torch.float32), tokenizer)
    (request,) = engine.generate([tokenizer.encode("def main(")], Sampling(max_new_tokens=40))
    print(request.text)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from deepkern import ExpertParallelError
from model.deepseek import DeepSeek
from model.engine import Engine
from model.ranks import ALONE, Ranks
from model.request import Request
from model.sampling import Sampling
from model.tokenizer import load_tokenizer

CHECKPOINT = Path(__file__).parent / "checkpoints" / "stdlib-bytes"

# Options of several commands.
Folder = Annotated[Path, typer.Option(help="a Hugging Face directory")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")]
Fp8 = Annotated[bool, typer.Option(help="keep weights in FP8 and multiply in FP8")]
CacheDtype = Annotated[str | None, typer.Option(help="fp8: keep the latent cache in FP8")]
DraftTokens = Annotated[int, typer.Option(min=0, help="drafts per step of the MTP layer")]
Temperature = Annotated[float, typer.Option(help="0: greedy")]
TopP = Annotated[float, typer.Option(help="probability of the tokens that are kept")]
TopK = Annotated[int, typer.Option(help="number of tokens that are kept; 0: all")]
MinP = Annotated[float, typer.Option(help="least probability relative to the highest")]
Penalty = Annotated[float, typer.Option(help="of tokens that are in the text; 1: none")]


def load_model(
    checkpoint: Path, dtype: str, device: str, fp8: bool, ranks: Ranks = ALONE
) -> DeepSeek:
    """`DeepSeek.from_pretrained` for a command: an error is one line and exit code 2."""
    try:
        return DeepSeek.from_pretrained(checkpoint, dtype, device, fp8, ranks=ranks)
    except (ValueError, FileNotFoundError) as error:
        raise exit_with(error) from error


def exit_with(error: Exception) -> typer.Exit:
    """Prints an error; the caller raises the result."""
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(2)


def load_engine(
    checkpoint: Path,
    dtype: str,
    device: str,
    fp8: bool,
    cache_dtype: str | None = None,
    draft_tokens: int = 0,
    ranks: Ranks = ALONE,
    **limits: Any,
) -> Engine:
    """An `Engine` for a command: an error is one line and exit code 2."""
    model = load_model(checkpoint, dtype, device, fp8, ranks)
    try:
        tokenizer, options = load_tokenizer(checkpoint), {"cache_dtype": cache_dtype, **limits}
        return Engine(model, tokenizer, draft_tokens=draft_tokens, **options)
    except ValueError as error:
        raise exit_with(error) from error


def sampling_of(**options: Any) -> Sampling:
    """`Sampling` for a command: an error is one line and exit code 2."""
    try:
        return Sampling(**options)
    except ValueError as error:
        raise exit_with(error) from error


def main(
    checkpoint: Folder = CHECKPOINT,
    prompt: Annotated[str, typer.Option(help="the text to continue")] = "def main(",
    max_new_tokens: Annotated[int, typer.Option(min=0)] = 200,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: int = 0,
    stop: Annotated[list[str] | None, typer.Option(help="ends the text; repeatable")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="continue after the end token")] = False,
    dtype: Dtype = "float32",
    fp8: Fp8 = False,
    cache_dtype: CacheDtype = None,
    draft_tokens: DraftTokens = 0,
    device: str = "cpu",
    tensor: Annotated[int, typer.Option(help="processes that divide heads and MLPs")] = 1,
    experts: Annotated[int, typer.Option(help="parts of the routed experts")] = 1,
) -> None:
    """Continues PROMPT until the end token, a stop string or MAX_NEW_TOKENS.

    TENSOR and EXPERTS are for several processes, which torchrun starts; the first one prints.
    """
    sampling = sampling_of(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    try:
        ranks = Ranks(tensor, experts)
    except ValueError as error:
        raise exit_with(error) from error
    engine = load_engine(checkpoint, dtype, device, fp8, cache_dtype, draft_tokens, ranks)
    assert engine.tokenizer is not None
    tokens = engine.tokenizer.encode(prompt)
    if not tokens:
        raise typer.BadParameter("the prompt has no tokens")
    try:
        if ranks.rank > 0:
            engine.generate([tokens], sampling)
            return
        write(prompt.encode(errors="surrogateescape").decode(errors="replace"))
        request, first, last = print_stream(engine, tokens, sampling)
    except (ValueError, ExpertParallelError) as error:
        raise exit_with(error) from error
    print(f"\n[{figures(engine, request, first, last)}]", file=sys.stderr)


def print_stream(
    engine: Engine, tokens: list[int], sampling: Sampling
) -> tuple[Request, float, float]:
    """Prints a continuation -> the request, seconds to its first token and seconds after it."""
    start = time.perf_counter()
    request, first = engine.submit(tokens, sampling), start
    while request.finish_reason is None:
        for update in engine.step():
            if first == start:
                first = time.perf_counter()
            write(update.text)
    return request, first - start, time.perf_counter() - first


def figures(engine: Engine, request: Request, first: float, last: float) -> str:
    """Numbers of tokens and their rates, and the rate of accepted drafts."""
    count, prompt, stats = len(request.tokens), len(request.prompt), engine.stats()
    text = f"prompt {prompt} tokens, {prompt / first:.1f} tokens/s; " if first else ""
    text += f"{count} tokens"
    if count > 1 and last:
        text += f", {(count - 1) / last:.1f} tokens/s"
    if stats.drafted:
        rate = stats.accepted / stats.drafted
        text += f"; {stats.accepted} of {stats.drafted} drafts accepted ({rate:.0%})"
    return text


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
