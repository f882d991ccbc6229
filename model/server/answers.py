"""OpenAI's API, answers: events of a ticket -> JSON, whole or as pieces of a stream."""

from __future__ import annotations

import time
import uuid
from typing import Any

from model.sampling import Sample
from model.server.protocol import Call
from model.server.worker import Event
from model.text import ReasoningSplit
from model.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no -inf


class Choice:
    """One choice: what its events gave so far."""

    def __init__(self, index: int, call: Call, tokenizer: Tokenizer) -> None:
        self.index, self.logprobs, self.tokenizer = index, call.logprobs, tokenizer
        self.count, self.text = 0, ""
        self.samples: list[Sample] = []
        self.finish_reason: str | None = None

    def start(self) -> dict[str, Any] | None:
        """The first piece of a stream, before any event."""
        return None

    def add(self, event: Event) -> dict[str, Any]:
        """Adds an event; returns what it gave, as a piece of a stream has it."""
        self.count += len(event.tokens)
        self.samples += event.samples if self.logprobs else []
        self.finish_reason = event.finish_reason
        return self.piece(event)

    def streamed(self, event: Event) -> dict[str, Any] | None:
        """Adds an event; returns the piece of a stream, None if it would be empty."""
        piece = self.add(event)
        reported = self.logprobs and event.samples
        if not any(piece.values()) and not reported and event.finish_reason is None:
            return None
        piece["logprobs"] = self.report(event.samples) if reported else None
        return {"index": self.index, **piece, "finish_reason": event.finish_reason}

    def whole(self) -> dict[str, Any]:
        """The choice after its last event."""
        logprobs = self.report(self.samples) if self.logprobs else None
        result = {"index": self.index, **self.body(), "logprobs": logprobs}
        return {**result, "finish_reason": self.finish_reason}

    def piece(self, event: Event) -> dict[str, Any]:
        raise NotImplementedError

    def body(self) -> dict[str, Any]:
        raise NotImplementedError

    def report(self, samples: list[Sample]) -> dict[str, Any]:
        """The log-probabilities of tokens."""
        raise NotImplementedError

    def name(self, token: int) -> str:
        """The text of a token; its bytes if that is a part of a character."""
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionChoice(Choice):
    """A choice of /v1/completions."""

    def __init__(self, index: int, call: Call, tokenizer: Tokenizer) -> None:
        super().__init__(index, call, tokenizer)
        self.decoder, self.offset = tokenizer.decoder(), 0

    def piece(self, event: Event) -> dict[str, Any]:
        self.text += event.text
        return {"text": event.text}

    def body(self) -> dict[str, Any]:
        return {"text": self.text}

    def report(self, samples: list[Sample]) -> dict[str, Any]:
        offsets = []
        for s in samples:
            offsets.append(self.offset)
            self.offset += len(self.decoder(s.token))
        return {
            "tokens": [self.name(s.token) for s in samples],
            "token_logprobs": [finite(s.logprob) for s in samples],
            "top_logprobs": [{self.name(t): finite(p) for t, p in s.top} for s in samples],
            "text_offset": offsets,
        }


class ChatChoice(Choice):
    """A choice of /v1/chat/completions, with the reasoning apart from the content."""

    def __init__(self, index: int, call: Call, tokenizer: Tokenizer) -> None:
        super().__init__(index, call, tokenizer)
        self.split, self.reasoning = ReasoningSplit(call.inside), ""

    def start(self) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, event: Event) -> dict[str, Any]:
        reasoning, text = self.split.push(event.text)
        if event.finish_reason is not None:
            rest = self.split.finish()
            reasoning, text = reasoning + rest[0], text + rest[1]
        self.reasoning, self.text = self.reasoning + reasoning, self.text + text
        delta = {"reasoning_content": reasoning, "content": text}
        return {"delta": {k: v for k, v in delta.items() if v}}

    def body(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return {"message": message}

    def report(self, samples: list[Sample]) -> dict[str, Any]:
        content = [
            {
                **self.entry(s.token, s.logprob),
                "top_logprobs": [self.entry(token, value) for token, value in s.top],
            }
            for s in samples
        ]
        return {"content": content}

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = list(self.tokenizer.token_bytes(token))
        return {"token": self.name(token), "logprob": finite(logprob), "bytes": data}


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


class Answer:
    """The answer to one call."""

    def __init__(self, call: Call, model: str, tokenizer: Tokenizer) -> None:
        self.call = call
        kind = ChatChoice if call.chat else CompletionChoice
        count = call.n * len(call.prompts)
        self.choices = [kind(index, call, tokenizer) for index in range(count)]
        prefix, name = ("chatcmpl", "chat.completion") if call.chat else ("cmpl", "text_completion")
        streamed = name + ".chunk" if call.chat and call.stream else name
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": streamed,
            "created": int(time.time()),
            "model": model,
        }

    def start(self) -> list[dict[str, Any]]:
        """The pieces of a stream before any event."""
        return [self.piece(first) for c in self.choices if (first := c.start()) is not None]

    def add(self, event: Event) -> None:
        self.choices[event.choice].add(event)

    def streamed(self, event: Event) -> list[dict[str, Any]]:
        """Adds an event; returns the pieces of a stream, at most one."""
        piece = self.choices[event.choice].streamed(event)
        return [] if piece is None else [self.piece(piece)]

    def piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self.call.include_usage else {}
        return {**self.head, "choices": [choice], **usage}

    def end(self) -> list[dict[str, Any]]:
        """The pieces of a stream after all events."""
        if not self.call.include_usage:
            return []
        return [{**self.head, "choices": [], "usage": self.usage()}]

    def whole(self) -> dict[str, Any]:
        choices = [choice.whole() for choice in self.choices]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of each prompt once, and of all choices."""
        prompt = sum(map(len, self.call.prompts))
        new = sum(choice.count for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
        }
