"""A language model in a process of its own: the process's end of `bench.models.comparison`.

The parent, a `deepkern.testing.child.Child`, writes one JSON object per line to stdin, the process
answers with one line on stdout.  It needs NumPy and the standard library only, because the
interpreter of llama.cpp has no PyTorch.

    {"do": "load"}                                          -> what the provider says about itself
    {"do": "logits", "tokens": [[..]], "split": n, "file": path}  -> {}; writes fp32 [S, vocab]
    {"do": "time", "tokens": [[..], ..], "new": n}          -> {"prefill": s, "steps": [s, ..]}
    any error                                               -> {"error": "why"}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class LanguageModel(Protocol):
    """What a provider implements.  Sequences of a batch have equal lengths."""

    about: dict[str, Any]

    def start(self, batch: int, capacity: int) -> None:
        """Empties the cache, for `batch` sequences of up to `capacity` tokens."""
        ...

    def next_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Appends int64 [B, S]; the greedy next token of each sequence, int64 [B, 1]."""
        ...

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Appends int64 [1, S]; fp32 [S, vocab]."""
        ...


def time_generation(model: LanguageModel, tokens: np.ndarray, new: int) -> dict[str, Any]:
    """Seconds of the prefill of int64 [B, S] and of each of `new` greedy decode steps."""
    model.start(tokens.shape[0], tokens.shape[1] + new)
    start = time.perf_counter()
    token = model.next_tokens(tokens)
    prefill, steps = time.perf_counter() - start, []
    for _ in range(new):
        start = time.perf_counter()
        token = model.next_tokens(token)
        steps.append(time.perf_counter() - start)
    return {"prefill": prefill, "steps": steps}


def cached_logits(model: LanguageModel, tokens: np.ndarray, split: int) -> np.ndarray:
    """fp32 [S, vocab] of int64 [1, S]: a prefill of `split` tokens, then one token at a time."""
    model.start(1, tokens.shape[1])
    parts = [tokens[:, :split], *(tokens[:, i : i + 1] for i in range(split, tokens.shape[1]))]
    return np.concatenate([model.logits(np.ascontiguousarray(part)) for part in parts])


def serve(load: Callable[[], LanguageModel]) -> None:
    """The process's end: answers requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    model: LanguageModel | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if model is None:
                model = load()
            answer = respond(model, request)
        except Exception as error:  # the parent prints the reason and leaves the provider out
            message = str(error).strip().partition("\n")[0]
            answer = {"error": f"{type(error).__name__}: {message}"}
        print(json.dumps(answer), file=answers, flush=True)


def respond(model: LanguageModel, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "load":
        return model.about
    tokens = np.array(request["tokens"], dtype=np.int64)
    if request["do"] == "logits":
        np.save(request["file"], cached_logits(model, tokens, request["split"]))
        return {}
    return time_generation(model, tokens, request["new"])
