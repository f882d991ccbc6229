"""A server in a thread for tests, on the committed checkpoint."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import httpx2 as httpx
import openai
import torch

from model import DeepSeek
from model.engine import Engine
from model.generate import CHECKPOINT
from model.request import Request, Update
from model.sampling import Sampling
from model.serve import Server, create_server
from model.tokenizer import Tokenizer, load_tokenizer

MODEL, WAIT = "stdlib-bytes", 60  # seconds that no wait of a test exceeds
TOKENIZER = load_tokenizer(CHECKPOINT)


@cache
def bytes_model() -> DeepSeek:
    return DeepSeek.from_pretrained(CHECKPOINT, dtype=torch.float32)


def new_engine(tokenizer: Tokenizer = TOKENIZER, **options: Any) -> Engine:
    return Engine(bytes_model(), tokenizer, **options)


def generated(prompts: list[list[int]], **options: Any) -> list[Request]:
    """What `Engine.generate` gives for prompts, each with the same sampling."""
    return new_engine().generate(prompts, Sampling(**options))


class GatedEngine(Engine):
    """An engine whose steps wait at a gate, and which signals each new request."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate, self.submitted = threading.Event(), threading.Semaphore(0)

    def submit(self, prompt: list[int], sampling: Sampling = Sampling()) -> Request:  # noqa: B008
        request = super().submit(prompt, sampling)
        self.submitted.release()
        return request

    def step(self) -> list[Update]:
        assert self.gate.wait(WAIT)
        return super().step()


class Running:
    """A server in a thread."""

    def __init__(self, server: Server) -> None:
        self.server, self.worker, self.engine = server, server.worker, server.worker.engine
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        assert httpx.get(self.url + "/health", timeout=WAIT).status_code == 200

    def client(self, key: str = "none") -> openai.OpenAI:
        options: dict[str, Any] = {"timeout": WAIT, "max_retries": 0}
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, **options)

    def post(self, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=WAIT, **options)

    def wait_until_idle(self) -> None:
        """Returns when each request has ended."""
        waiting = self.worker.idle.wait()
        asyncio.run_coroutine_threadsafe(waiting, self.worker.loop).result(WAIT)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(WAIT)
        assert not self.thread.is_alive() and not self.worker.thread.is_alive()
        assert self.worker.open == 0 and not self.worker.tickets and not self.worker.owners


@contextmanager
def running(engine: Engine, **options: Any) -> Iterator[Running]:
    server = create_server(engine, MODEL, log_level="error", **options)
    one = Running(server)
    try:
        yield one
    finally:
        if isinstance(engine, GatedEngine):
            engine.gate.set()
        one.stop()


def gated(**options: Any) -> Any:
    """Serves an engine whose gate is closed."""
    return running(GatedEngine(bytes_model(), TOKENIZER), **options)
