"""A conversation in the terminal.

    python -m model.chat --checkpoint DIR

Answers are printed as they are generated, reasoning between <think> and </think> dim.  Ctrl-C ends
an answer, Ctrl-D or /exit the program.  Lines may come from a pipe.  The messages:

    /help              these lines
    /reset             start a new conversation
    /system TEXT       set the system prompt; without TEXT, remove it
    /temperature X     0: greedy
    /save FILE         write the conversation as JSON
    /exit              leave
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from model.engine import Engine
from model.generate import (
    CHECKPOINT,
    CacheDtype,
    DraftTokens,
    Dtype,
    Folder,
    Fp8,
    MinP,
    Penalty,
    Temperature,
    TopK,
    TopP,
    load_engine,
    sampling_of,
)
from model.request import Request
from model.sampling import Sampling
from model.text import ReasoningSplit

HELP = (__doc__ or "").partition("The messages:\n\n")[2]
# Characters that would control the terminal, except tab and line end.
CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


class Chat:
    """The messages so far, and what answers them."""

    def __init__(
        self, engine: Engine, sampling: Sampling, console: Console, system: str = ""
    ) -> None:
        self.engine, self.sampling, self.console = engine, sampling, console
        self.system = system
        self.messages: list[dict[str, str]] = []

    def conversation(self) -> list[dict[str, str]]:
        """The system prompt and the messages."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.messages

    def handle(self, line: str) -> bool:
        """Answers a line or runs a command; False ends the program."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            self.answer(line)
            return True
        name, _, argument = line[1:].strip().partition(" ")
        commands = ("help", "reset", "system", "temperature", "save", "exit")
        if name not in commands:
            self.note(f"unknown command /{name}; /help shows the commands")
            return True
        return getattr(self, f"command_{name}")(argument.strip()) is not False

    def command_help(self, _: str) -> None:
        self.note(HELP.rstrip())

    def command_reset(self, _: str) -> None:
        self.messages.clear()
        self.note("new conversation")

    def command_system(self, text: str) -> None:
        self.system = text
        self.note("the system prompt is set" if text else "no system prompt")

    def command_temperature(self, text: str) -> None:
        try:
            self.sampling = replace(self.sampling, temperature=float(text))
        except ValueError:
            self.note(f"{text!r}: expected a number of at least 0")
        else:
            self.note(f"temperature {self.sampling.temperature:g}")

    def command_save(self, name: str) -> None:
        try:
            text = json.dumps(self.conversation(), indent=1, ensure_ascii=False)
            Path(name).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            self.note(f"{name!r}: {error.strerror}")
        else:
            self.note(f"{len(self.conversation())} messages in {name}")

    def command_exit(self, _: str) -> bool:
        return False

    def note(self, text: str) -> None:
        self.console.print(Text(text.translate(CONTROL), style="italic"))

    def answer(self, line: str) -> None:
        """Prints the answer to a message and adds both to the conversation."""
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None
        self.messages.append({"role": "user", "content": line})
        try:
            prompt = tokenizer.encode_chat(self.conversation())
            request = self.engine.submit(prompt, self.sampling)
        except ValueError as error:
            self.messages.pop()
            self.note(f"error: {error}")
            return
        inside = tokenizer.decode(prompt[-16:]).rstrip().endswith(ReasoningSplit.START)
        start = time.perf_counter()
        text = self.print_answer(request, ReasoningSplit(inside))
        seconds = time.perf_counter() - start
        self.messages.append({"role": "assistant", "content": text})
        if self.console.is_terminal:
            ends = {"length": ", no room for more", "cancelled": ", stopped"}
            end = ends.get(str(request.finish_reason), "")
            rate = f"{len(request.tokens) / seconds:.1f} tokens/s"
            self.console.print(Text(f"[{len(request.tokens)} tokens, {rate}{end}]", style="dim"))

    def print_answer(self, request: Request, split: ReasoningSplit) -> str:
        """Prints what the model adds to the request; returns the answer without reasoning."""
        answer, reasoned = "", False
        with interruptible() as interrupted:
            while request.finish_reason is None:
                if interrupted():
                    self.engine.cancel(request)
                for update in self.engine.step():
                    reasoning, text = split.push(update.text)
                    reasoned = self.print_parts(reasoning, text, reasoned, answer)
                    answer += text
        reasoning, text = split.finish()
        self.print_parts(reasoning, text, reasoned, answer)
        self.console.print()
        return answer + text

    def print_parts(self, reasoning: str, text: str, reasoned: bool, answer: str) -> bool:
        """Prints new reasoning and new text; returns whether there was reasoning so far."""
        if reasoning:
            self.write(reasoning, "dim italic")
        if text:
            if (reasoned or reasoning) and not answer:
                self.console.print("\n")
            self.write(text, "")
        return reasoned or bool(reasoning)

    def write(self, text: str, style: str) -> None:
        text = text.translate(CONTROL)
        self.console.print(Text(text, style=style), end="", soft_wrap=True)


@contextmanager
def interruptible() -> Iterator[Any]:
    """Ctrl-C sets a flag, which the yielded function returns, and a second one interrupts.

    A step of the engine ends in order.
    """
    flags: list[bool] = []

    def handler(number: int, frame: Any) -> None:
        if flags:
            raise KeyboardInterrupt
        flags.append(True)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(flags)
    finally:
        signal.signal(signal.SIGINT, previous)


def lines(console: Console) -> Iterator[str]:
    """Lines of the terminal or the pipe, to its end; Ctrl-C at the prompt discards a line."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    import readline  # noqa: F401  # edits lines and keeps a history

    while True:
        try:
            yield console.input("[bold]> [/bold]")
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n/exit or Ctrl-D leaves")


def main(
    checkpoint: Folder = CHECKPOINT,
    system: Annotated[str, typer.Option(help="the system prompt")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of one answer")] = 4096,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: int = 0,
    dtype: Dtype = "float32",
    fp8: Fp8 = False,
    cache_dtype: CacheDtype = None,
    draft_tokens: DraftTokens = 0,
    device: str = "cpu",
) -> None:
    """Answers lines from the terminal or a pipe."""
    sampling = sampling_of(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    engine = load_engine(checkpoint, dtype, device, fp8, cache_dtype, draft_tokens)
    console = Console(highlight=False)
    chat = Chat(engine, sampling, console, system)
    if console.is_terminal:
        chat.note(f"{checkpoint.name}: /help shows the commands, Ctrl-C ends an answer")
    for line in lines(console):
        if not chat.handle(line):
            break


if __name__ == "__main__":
    typer.run(main)
