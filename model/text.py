"""Text of a stream of tokens: complete characters, an end at the first stop string, reasoning.

    stream = TextStream(tokenizer.decoder(), ("\\n\\n",))
    for token in tokens:
        text, stopped = stream.push(token)
    rest = stream.finish()

The joined texts do not depend on how tokens divide the text: a stop string that is completed first
ends it, and of several that end at the same character the longest one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Decoder(Protocol):
    """Converts one token at a time; the state of one text."""

    def __call__(self, token: int) -> str:
        """The text that `token` completes; "" within a character of several tokens."""
        ...

    def finish(self) -> str:
        """The text of an incomplete character at the end: U+FFFD, or ""."""
        ...


class TextStream:
    """Joins the texts of a decoder and removes the first stop string with all that follows.

    Text that may be the start of a stop string is withheld until the next tokens decide.
    """

    def __init__(self, decoder: Decoder, stops: Iterable[str] = ()) -> None:
        self.decoder, self.stops = decoder, tuple(stops)
        self.withheld, self.stopped = "", False

    def push(self, token: int) -> tuple[str, bool]:
        """-> the text that is certain now, and whether a stop string is complete."""
        if self.stopped:
            return "", True
        text = self.withheld + self.decoder(token)
        if not self.stops:
            return text, False
        text = self._before_stop(text)
        keep = 0 if self.stopped else undecided(text, self.stops)
        self.withheld = text[len(text) - keep :]
        return text[: len(text) - keep], self.stopped

    def finish(self) -> str:
        """The withheld text, after the last token."""
        if self.stopped:
            return ""
        text, self.withheld = self._before_stop(self.withheld + self.decoder.finish()), ""
        self.stopped = True
        return text

    def _before_stop(self, text: str) -> str:
        """text before the stop string that is completed first, if any; sets `stopped`."""
        found = [(start + len(s), start) for s in self.stops if (start := text.find(s)) >= 0]
        if not found:
            return text
        self.stopped = True
        return text[: min(found)[1]]


def undecided(text: str, marks: Iterable[str]) -> int:
    """Length of the longest end of `text` with which one of `marks` may start."""
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest


class ReasoningSplit:
    """Splits an answer into the reasoning between <think> and </think>, and the rest.

    Only a <think> at the start of the answer counts.  inside: the prompt ends with <think>, so the
    answer starts with reasoning.  Line ends after either mark are omitted.
    """

    START, END = "<think>", "</think>"

    def __init__(self, inside: bool = False) -> None:
        self.part = "reasoning" if inside else "start"  # then "reasoning" or "answer"
        self.withheld, self.after_mark = "", inside

    def push(self, text: str) -> tuple[str, str]:
        """-> the reasoning and the answer that are certain now."""
        text, self.withheld = self.withheld + text, ""
        reasoning = ""
        if self.part == "start":
            text = self._start(text)
        if self.part == "reasoning":
            text = self._without_line_ends(text)
            reasoning, mark, text = text.partition(self.END)
            if not mark:
                keep = undecided(reasoning, (self.END,))
                self.withheld = reasoning[len(reasoning) - keep :]
                return reasoning[: len(reasoning) - keep], ""
            self.part, self.after_mark = "answer", True
        return reasoning, self._without_line_ends(text)

    def finish(self) -> tuple[str, str]:
        """The withheld text, after the last `push`."""
        text, self.withheld = self.withheld, ""
        return (text, "") if self.part == "reasoning" else ("", text)

    def _start(self, text: str) -> str:
        """The text after <think>, or all of it if that is not the start; withholds until then."""
        start = text.lstrip()
        if start.startswith(self.START):
            self.part, self.after_mark = "reasoning", True
            return start[len(self.START) :]
        if self.START.startswith(start):
            self.withheld = text
            return ""
        self.part = "answer"
        return text

    def _without_line_ends(self, text: str) -> str:
        if self.after_mark:
            text = text.lstrip("\n")
            self.after_mark = not text
        return text
