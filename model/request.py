"""A request of the engine, its part of a step, and what the engine counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from model.batch import Segment
from model.sampling import Sample, Sampling
from model.text import TextStream


@dataclass(eq=False)
class Request:
    """A prompt and what the model adds to it.

    tokens, samples: the new tokens, the end token included, and how each was drawn.
    text: of the new tokens, without end token and stop string; "" without a tokenizer.
    finish_reason: "stop" (an end token or a stop string), "length", "cancelled", "error" (the model
        gave logits that are not finite), or None.
    """

    id: int
    prompt: list[int]
    sampling: Sampling
    known: list[int] = field(default_factory=list)  # prompt and new tokens
    stop_tokens: frozenset[int] = frozenset()
    max_tokens: int = 0  # new tokens at most
    samples: list[Sample] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stream: TextStream | None = None
    # state of the cache
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of full pages of prompt tokens
    computed: int = 0  # tokens that are cached
    drafts: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.known[len(self.prompt) :]

    @property
    def length(self) -> int:
        return len(self.known)

    def append(self, drawn: Sample) -> None:
        """Adds one token, and ends the request if it is the last."""
        self.known.append(drawn.token)
        self.samples.append(drawn)
        if drawn.token in self.stop_tokens:
            self.finish_reason = "stop"
        elif self.stream is not None:
            text, stopped = self.stream.push(drawn.token)
            self.text += text
            if stopped:
                self.finish_reason = "stop"
                return
        if self.finish_reason is None and len(self.samples) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.stream is not None:
            self.text += self.stream.finish()


class Update(NamedTuple):
    """What a step added to one request."""

    request: Request
    tokens: list[int]
    text: str
    finish_reason: str | None


@dataclass
class EngineStats:
    """Counters since the engine started, and the state of its queues and pages."""

    steps: int = 0
    prompt_tokens: int = 0  # computed, those of preempted requests each time
    cached_prompt_tokens: int = 0  # reused
    generated_tokens: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0


class Work(NamedTuple):
    """Rows of one request in a step: positions [start, stop), the last `drafts` of them drafts."""

    request: Request
    start: int
    stop: int
    drafts: int

    def segments(self) -> list[Segment]:
        """The rows of the prompt, then those of generated tokens."""
        request, middle = self.request, min(max(self.start, len(self.request.prompt)), self.stop)
        parts = (self.start, middle, True), (middle, self.stop, False)
        return [Segment(a, b, request.pages, prompt) for a, b, prompt in parts if b > a]
