"""Text of a stream of tokens: complete characters, and an end at the first stop string.

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
        keep = 0 if self.stopped else self._undecided(text)
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

    def _undecided(self, text: str) -> int:
        """Length of the longest end of text with which a stop string may start."""
        longest = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
