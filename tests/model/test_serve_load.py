"""The HTTP server under load: clients that leave, limits, 64 clients at once, shutdown."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from tests.model.serving import (
    MODEL,
    TOKENIZER,
    WAIT,
    Running,
    gated,
    generated,
    new_engine,
    running,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(new_engine()) as one:
        yield one


def test_a_client_that_leaves_a_stream_cancels_its_request(served):
    before = served.worker.finished["cancelled"]
    stream = served.client().completions.create(
        model=MODEL, prompt="a", max_tokens=400, n=3, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    served.wait_until_idle()
    assert served.worker.finished["cancelled"] - before == 3
    assert not served.engine.has_work


def test_a_client_that_leaves_without_an_answer_cancels_its_request():
    with gated() as one:
        body = json.dumps({"prompt": "a", "max_tokens": 400, "ignore_eos": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with socket.create_connection(one.socket.getsockname(), WAIT) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert one.engine.submitted.acquire(timeout=WAIT)
        one.engine.gate.set()
        one.wait_until_idle()
        assert one.worker.finished == {"cancelled": 1}


def in_threads(count: int, call: Callable[[int], Any]) -> list[threading.Thread]:
    threads = [threading.Thread(target=call, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_too_many_requests():
    with gated(max_requests=2) as one:
        statuses: list[int] = []
        body = {"prompt": "a", "max_tokens": 2}
        (thread,) = in_threads(1, lambda _: statuses.append(one.post({**body, "n": 2}).status_code))
        assert one.engine.submitted.acquire(timeout=WAIT)
        refused = one.post(body)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        one.engine.gate.set()
        thread.join(WAIT)
        assert statuses == [200]
        assert one.post(body).status_code == 200
        assert one.post({**body, "n": 3}).status_code == 400


def test_bodies_have_a_time_limit():
    with running(new_engine(), body_timeout=0.2) as one:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with socket.create_connection(one.socket.getsockname(), WAIT) as connection:
            connection.sendall(head + b"Content-Length: 9\r\n\r\n{")
            assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_answers_have_a_time_limit():
    with gated(request_timeout=0.2) as one:
        with pytest.raises(openai.APIError, match=r"more than 0\.2 s"):
            list(one.client().completions.create(model=MODEL, prompt="a", stream=True))
        plain = one.post({"prompt": "a"})  # while the engine is in a step
        assert plain.status_code == 504 and plain.json()["error"]["code"] == "timeout"
        one.engine.gate.set()
        one.wait_until_idle()
        assert one.worker.finished == {"cancelled": 2}


def test_64_clients_of_which_some_leave(served):
    """Each answer is that of the request alone, and each request ends exactly once."""
    count, before = 64, served.worker.finished.copy()
    leaving = set(range(0, count, 4))
    prompts = [f"{'# x' * (i % 7)}\ndef f{i}(" for i in range(count)]

    async def one_client(index: int, client: openai.AsyncOpenAI) -> str | None:
        fields: dict[str, Any] = {"model": MODEL, "prompt": prompts[index], "seed": 7}
        if index in leaving:
            extra = {"ignore_eos": True}
            stream = await client.completions.create(
                max_tokens=400, stream=True, extra_body=extra, **fields
            )
            await anext(aiter(stream))
            await stream.close()
            return None
        if index % 2:
            return (await client.completions.create(max_tokens=6, **fields)).choices[0].text
        stream = await client.completions.create(max_tokens=6, stream=True, **fields)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_clients() -> list[str | None]:
        options: dict[str, Any] = {"timeout": WAIT, "max_retries": 0, "api_key": "none"}
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", **options) as client:
            return await asyncio.gather(*(one_client(i, client) for i in range(count)))

    texts = asyncio.run(all_clients())
    served.wait_until_idle()
    requests = generated(
        [TOKENIZER.encode(p) for i, p in enumerate(prompts) if i not in leaving],
        seed=7,
        temperature=1.0,
        max_new_tokens=6,
    )
    assert [text for text in texts if text is not None] == [request.text for request in requests]
    ended = served.worker.finished - before
    assert ended["cancelled"] == len(leaving) and ended.total() == count
    assert served.worker.open == 0 and not served.engine.has_work


def test_shutdown_finishes_requests_and_refuses_new_ones():
    with gated() as one:
        answers: list[httpx.Response] = []
        body = {"prompt": "a", "max_tokens": 5, "ignore_eos": True}
        (thread,) = in_threads(1, lambda _: answers.append(one.post(body)))
        assert one.engine.submitted.acquire(timeout=WAIT)
        start_shutdown(one)
        refused = one.post(body)
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert httpx.get(one.url + "/health").status_code == 503
        one.engine.gate.set()
        thread.join(WAIT)
        one.thread.join(WAIT)
        assert answers[0].json()["usage"]["completion_tokens"] == 5
        assert one.worker.finished == {"length": 1}


def start_shutdown(one: Running) -> None:
    """Returns when the server refuses new requests."""

    async def draining() -> None:
        while not one.worker.draining:
            await asyncio.sleep(0)

    one.server.should_exit = True
    asyncio.run_coroutine_threadsafe(draining(), one.worker.loop).result(WAIT)


def test_shutdown_cancels_requests_after_its_timeout():
    with gated(shutdown_timeout=0) as one:
        stream = one.client().completions.create(model=MODEL, prompt="a", stream=True)
        assert one.engine.submitted.acquire(timeout=WAIT)
        start_shutdown(one)
        one.engine.gate.set()
        with pytest.raises(openai.APIError, match="shuts down"):
            list(stream)
        one.thread.join(WAIT)
        assert one.worker.finished == {"cancelled": 1}


def test_a_failed_engine_is_reported(monkeypatch):
    with gated() as one:

        def fail() -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(one.engine, "step", fail)
        assert one.post({"prompt": "a", "n": 2}).status_code == 500
        assert one.post({"prompt": "a"}).status_code == 503
        health = httpx.get(one.url + "/health")
        assert health.status_code == 503 and health.json() == {"status": "engine failed"}
        assert one.worker.finished == {"error": 2}
        one.engine.scheduler.waiting.clear()


@pytest.mark.slow
def test_command_serves_until_sigterm():
    command = [sys.executable, "-m", "model.serve", "--port", "0", "--model-name", "tiny"]
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(2 * WAIT, process.kill)
    watchdog.start()
    try:
        assert process.stderr is not None
        url = next(m[0] for line in process.stderr if (m := re.search(r"http://[\d.:]+", line)))
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", timeout=WAIT, max_retries=0)
        fields: dict[str, Any] = {
            "model": "tiny",
            "prompt": "a",
            "extra_body": {"ignore_eos": True},
        }
        stream = iter(client.completions.create(max_tokens=30, stream=True, **fields))
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        client.close()
        assert process.wait(WAIT) == 0
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
