"""The HTTP server with the openai client: answers, streams, errors, load, shutdown."""

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch

from model import DeepSeek
from model.engine import Engine, Request, Update
from model.generate import CHECKPOINT
from model.sampling import Sampling
from model.serve import Server, create_server
from model.tokenizer import ByteTokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]
MODEL, WAIT = "stdlib-bytes", 30  # seconds that no wait of a test exceeds
TOKENIZER = load_tokenizer(CHECKPOINT)
CHAT = [{"role": "user", "content": "def f(x):"}]


@pytest.fixture(scope="module")
def model() -> DeepSeek:
    torch.set_num_threads(1)
    return DeepSeek.from_pretrained(CHECKPOINT, dtype=torch.float32)


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


@pytest.fixture(scope="module")
def served(model) -> Iterator[Running]:
    with running(Engine(model, TOKENIZER)) as one:
        yield one


@pytest.fixture
def gated(model) -> Callable[..., Any]:
    """Serves an engine whose gate is closed."""
    return lambda **options: running(GatedEngine(model, TOKENIZER), **options)


@pytest.fixture
def client(served) -> openai.OpenAI:
    return served.client()


@pytest.fixture
def expected(model) -> Callable[..., list[Request]]:
    """What `Engine.generate` gives for prompts."""

    def generate(prompts: list[list[int]], **options: Any) -> list[Request]:
        return Engine(model, TOKENIZER).generate(prompts, Sampling(**options))

    return generate


SAMPLINGS = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.9, "seed": 5},
    "filters": {"temperature": 1.4, "top_p": 0.9, "seed": -3, "extra_body": {"top_k": 9}},
    "extensions": {"seed": 8, "extra_body": {"min_p": 0.02, "repetition_penalty": 1.1}},
}


def sampling_options(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a request -> options of `Sampling`."""
    options = {"temperature": 1.0, **fields, **fields.get("extra_body", {})}
    options.pop("extra_body", None)
    return options


@pytest.mark.parametrize("fields", SAMPLINGS.values(), ids=SAMPLINGS)
def test_completion_plain_streamed_and_generated_are_equal(client, expected, fields):
    prompt = "import os\n\ndef "
    (request,) = expected([TOKENIZER.encode(prompt)], max_new_tokens=20, **sampling_options(fields))
    plain = client.completions.create(model=MODEL, prompt=prompt, max_tokens=20, **fields)
    assert plain.choices[0].text == request.text
    assert plain.choices[0].finish_reason == request.finish_reason
    assert plain.usage is not None
    assert plain.usage.prompt_tokens == len(request.prompt)
    assert plain.usage.completion_tokens == len(request.tokens)
    streamed = list(
        client.completions.create(
            model=MODEL, prompt=request.prompt, max_tokens=20, stream=True, **fields
        )
    )
    assert len(streamed) > 1 and len({chunk.id for chunk in streamed}) == 1
    assert "".join(chunk.choices[0].text for chunk in streamed) == request.text
    assert [chunk.choices[0].finish_reason for chunk in streamed][-1] == request.finish_reason


@pytest.mark.parametrize("fields", SAMPLINGS.values(), ids=SAMPLINGS)
def test_chat_plain_streamed_and_generated_are_equal(client, expected, fields):
    prompt = TOKENIZER.encode_chat(CHAT)
    (request,) = expected([prompt], max_new_tokens=20, **sampling_options(fields))
    plain = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=20, **fields
    )
    assert plain.choices[0].message.content == request.text
    assert plain.choices[0].message.role == "assistant"
    assert plain.choices[0].finish_reason == request.finish_reason
    streamed = list(
        client.chat.completions.create(
            model=MODEL,
            messages=CHAT,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
            **fields,
        )
    )
    *pieces, last = streamed
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == request.text
    assert pieces[-1].choices[0].finish_reason == request.finish_reason
    assert last.choices == [] and last.usage == plain.usage
    assert all(chunk.usage is None for chunk in pieces)


def test_several_prompts_and_choices(client, expected):
    prompts = ["def f", "class A", "x = "]
    answer = client.completions.create(
        model=MODEL, prompt=prompts, n=2, seed=3, temperature=0.8, max_tokens=8
    )
    tokens = [TOKENIZER.encode(prompt) for prompt in prompts]
    by_seed = [expected(tokens, seed=s, temperature=0.8, max_new_tokens=8) for s in (3, 4)]
    texts = [request.text for pair in zip(*by_seed, strict=True) for request in pair]
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, tokens))
    streamed = client.completions.create(
        model=MODEL, prompt=prompts, n=2, seed=3, temperature=0.8, max_tokens=8, stream=True
    )
    joined = [""] * 6
    for chunk in streamed:
        joined[chunk.choices[0].index] += chunk.choices[0].text
    assert joined == texts


def test_requests_without_a_seed_differ(client):
    answer = client.completions.create(model=MODEL, prompt="a", n=4, max_tokens=12, temperature=1.5)
    assert len({choice.text for choice in answer.choices}) > 1


def test_logprobs_of_completions(client, expected):
    (request,) = expected([TOKENIZER.encode("def f")], max_new_tokens=9, logprobs=3)
    fields: dict[str, Any] = {"model": MODEL, "prompt": "def f", "max_tokens": 9, "logprobs": 3}
    plain = client.completions.create(temperature=0, **fields).choices[0].logprobs
    assert plain.tokens == [chr(sample.token) for sample in request.samples]
    assert plain.token_logprobs == [sample.logprob for sample in request.samples]
    assert plain.top_logprobs == [
        {chr(token): value for token, value in sample.top} for sample in request.samples
    ]
    assert plain.text_offset == list(range(9))
    pieces = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(temperature=0, stream=True, **fields)
    ]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for piece in pieces if piece for value in getattr(piece, name)]
        assert joined == getattr(plain, name)


def test_logprobs_of_chat(client, expected):
    (request,) = expected([TOKENIZER.encode_chat(CHAT)], max_new_tokens=9, logprobs=2)
    fields: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 9, "logprobs": True}
    fields["top_logprobs"] = 2
    plain = client.chat.completions.create(temperature=0, **fields).choices[0].logprobs.content
    assert [(bytes(e.bytes)[0], e.logprob) for e in plain] == [s[:2] for s in request.samples]
    for entry, sample in zip(plain, request.samples, strict=True):
        assert tuple((t.bytes[0], t.logprob) for t in entry.top_logprobs) == sample.top
    chunks = client.chat.completions.create(temperature=0, stream=True, **fields)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert [entry for piece in pieces if piece for entry in piece.content] == plain


def test_stop_strings_and_end_tokens(client, expected):
    (whole,) = expected([TOKENIZER.encode("def f(")], max_new_tokens=20)
    stop = whole.text[6:9]
    for fields in ({"stop": stop}, {"stop": ["never", stop]}):
        answer = client.completions.create(
            model=MODEL, prompt="def f(", max_tokens=20, temperature=0, **fields
        )
        assert answer.choices[0].text == whole.text.split(stop)[0]
        assert answer.choices[0].finish_reason == "stop"
    token = whole.tokens[4]
    answer = client.completions.create(
        model=MODEL,
        prompt="def f(",
        max_tokens=20,
        temperature=0,
        extra_body={"stop_token_ids": [token]},
    )
    count = whole.tokens.index(token)
    assert answer.choices[0].text == TOKENIZER.decode(whole.tokens[:count])


def test_default_lengths(client):
    completion = client.completions.create(
        model=MODEL, prompt="x", temperature=0, extra_body={"ignore_eos": True}
    )
    assert completion.usage is not None and completion.usage.completion_tokens == 16
    long = [{"role": "user", "content": "a" * 470}]
    chat = client.chat.completions.create(
        model=MODEL, messages=long, temperature=0, extra_body={"ignore_eos": True}
    )
    assert chat.usage is not None and chat.usage.total_tokens == 512  # the model's context


def test_reasoning_is_apart_from_the_content(model, expected):
    tokenizer = ByteTokenizer(12, "{{ messages[0].content }}<think>\n")
    with running(Engine(model, tokenizer)) as one:
        options: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 12}
        plain = one.client().chat.completions.create(temperature=0, **options)
        stream = one.client().chat.completions.create(temperature=0, stream=True, **options)
        deltas = [chunk.choices[0].delta for chunk in stream]
    (request,) = expected([tokenizer.encode_chat(CHAT)], max_new_tokens=12)
    text = request.text.lstrip("\n")
    assert plain.choices[0].message.reasoning_content == text  # no </think> follows
    assert plain.choices[0].message.content == ""
    assert "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas) == text
    assert not any(delta.content for delta in deltas)


def test_models_and_health(served, client):
    assert [one.id for one in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "deepkern"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")
    assert httpx.get(served.url + "/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"temperature": -1}, "temperature", 400),
        ({"max_tokens": 1000}, "max_tokens", 400),
        ({"prompt": "a" * 600}, "prompt", 400),
        ({"echo": True}, "echo", 400),
        ({"temprature": 1}, "temprature", 400),
        ({"model": "other"}, "model", 404),
    ],
    ids=["value", "length", "prompt", "unsupported", "unknown", "model"],
)
def test_errors_name_the_field(served, client, fields, param, status):
    body = {"model": MODEL, "prompt": "a", **fields}
    with pytest.raises(openai.APIStatusError) as raised:
        client.post("/completions", body=body, cast_to=object)
    assert raised.value.status_code == status and raised.value.param == param
    error = served.post(body).json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and param in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/v1/other", {}, 404),
        ("GET", "/v1/completions", {}, 405),
        ("POST", "/v1/completions", {"content": b"{"}, 400),
        ("POST", "/v1/completions", {"content": b"[" * 4000}, 400),
        ("POST", "/v1/completions", {"content": b'{"prompt": NaN}'}, 400),
        ("POST", "/v1/completions", {"content": b"\xff"}, 400),
        ("POST", "/v1/completions", {"content": b"[]"}, 400),
        ("POST", "/v1/completions", {"content": b'{"prompt": "\\ud800"}'}, 400),
        ("POST", "/v1/completions", {"content": b" " * 5000}, 413),
        ("POST", "/v1/completions", {"content": iter([b" " * 3000] * 2)}, 413),
        ("POST", "/v1/completions", {"data": {"prompt": "a"}}, 415),
    ],
    ids=[
        "route",
        "method",
        "json",
        "depth",
        "nan",
        "utf8",
        "array",
        "surrogate",
        "length",
        "chunks",
        "type",
    ],
)
def test_invalid_http_requests(model, limited, method, path, options, status):
    headers = {"content-type": "application/json"} if "content" in options else {}
    answer = httpx.request(method, limited.url + path, headers=headers, timeout=WAIT, **options)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def limited(model) -> Iterator[Running]:
    """A server of small bodies."""
    with running(Engine(model, TOKENIZER), max_body_bytes=4096) as one:
        yield one


def test_api_key(model):
    with running(Engine(model, TOKENIZER), api_key="secret") as one:
        for key in ("wrong", "secre", "sécret"):
            headers = {"authorization": f"Bearer {key}".encode()}
            answer = one.post({"prompt": "a"}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert one.post({"prompt": "a"}).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            one.client("wrong").models.list()
        assert [m.id for m in one.client("secret").models.list()] == [MODEL]
        assert httpx.get(one.url + "/metrics").status_code == 200


def test_a_client_that_leaves_a_stream_cancels_its_request(served, client):
    before = served.worker.finished["cancelled"]
    stream = client.completions.create(
        model=MODEL, prompt="a", max_tokens=400, n=3, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    served.wait_until_idle()
    assert served.worker.finished["cancelled"] - before == 3
    assert not served.engine.has_work


def test_a_client_that_leaves_without_an_answer_cancels_its_request(gated):
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


def test_too_many_requests(gated):
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
        assert one.post({**body, "n": 3}).status_code == 429


def test_answers_have_a_time_limit(gated):
    with gated(request_timeout=0.2) as one:
        stream = one.client().completions.create(model=MODEL, prompt="a", stream=True)
        with pytest.raises(openai.APIError, match=r"more than 0\.2 s"):
            list(stream)
        plain = one.post({"prompt": "a"})  # while the engine is in a step
        assert plain.status_code == 504 and plain.json()["error"]["code"] == "timeout"
        one.engine.gate.set()
        one.wait_until_idle()
        assert one.worker.finished == {"cancelled": 2}


def test_64_clients_of_which_some_leave(served, expected):
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
    requests = expected(
        [TOKENIZER.encode(p) for i, p in enumerate(prompts) if i not in leaving],
        seed=7,
        temperature=1.0,
        max_new_tokens=6,
    )
    assert [text for text in texts if text is not None] == [request.text for request in requests]
    ended = served.worker.finished - before
    assert ended["cancelled"] == len(leaving) and ended.total() == count
    assert served.worker.open == 0 and not served.engine.has_work


def test_shutdown_finishes_requests_and_refuses_new_ones(gated):
    with gated() as one:
        answers: list[httpx.Response] = []
        body = {"prompt": "a", "max_tokens": 5, "ignore_eos": True}
        (thread,) = in_threads(1, lambda _: answers.append(one.post(body)))
        assert one.engine.submitted.acquire(timeout=WAIT)
        draining = threading.Event()
        asyncio.run_coroutine_threadsafe(drained(one, draining), one.worker.loop)
        one.server.should_exit = True
        assert draining.wait(WAIT)
        refused = one.post(body)
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert httpx.get(one.url + "/health").status_code == 503
        one.engine.gate.set()
        thread.join(WAIT)
        one.thread.join(WAIT)
        assert answers[0].json()["usage"]["completion_tokens"] == 5
        assert one.worker.finished == {"length": 1}


async def drained(one: Running, event: threading.Event) -> None:
    """Sets the event when the server refuses new requests."""
    while not one.worker.draining:
        await asyncio.sleep(0)
    event.set()


def test_shutdown_cancels_requests_after_its_timeout(gated):
    with gated(shutdown_timeout=0) as one:
        stream = one.client().completions.create(model=MODEL, prompt="a", stream=True)
        assert one.engine.submitted.acquire(timeout=WAIT)
        one.server.should_exit = True
        threading.Timer(0.3, one.engine.gate.set).start()
        with pytest.raises(openai.APIError, match="shuts down"):
            list(stream)
        one.thread.join(WAIT)
        assert one.worker.finished == {"cancelled": 1}


def test_a_failed_engine_is_reported(gated, monkeypatch):
    with gated() as one:

        def fail() -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(one.engine, "step", fail)
        assert one.post({"prompt": "a", "n": 2}).status_code == 500
        assert one.post({"prompt": "a"}).status_code == 503
        health = httpx.get(one.url + "/health")
        assert health.status_code == 503 and health.json() == {"status": "engine failed"}
        assert one.worker.finished == {"error": 2}
        one.engine.waiting.clear()


def test_metrics(model):
    with running(Engine(model, TOKENIZER)) as one:
        client = one.client()
        client.completions.create(model=MODEL, prompt="abc", max_tokens=4, temperature=0)
        client.completions.create(model=MODEL, prompt=["abc", "d"], max_tokens=1, temperature=0)
        one.post({})
        answer = httpx.get(one.url + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    number = r"[0-9.e+-]+|\+Inf"
    line = rf'# (HELP|TYPE) \w+ .+|\w+({{(\w+="[^"]*",?)+}})? ({number})'
    values = {}
    for text in answer.text.splitlines():
        assert re.fullmatch(line, text), text
        name, _, value = text.rpartition(" ")
        values[name] = value
    assert values["deepkern_generated_tokens_total"] == "6"
    assert values['deepkern_requests_finished_total{reason="length"}'] == "3"
    route = 'deepkern_http_responses_total{route="/v1/completions",status='
    assert values[route + '"200"}'] == "2" and values[route + '"400"}'] == "1"
    assert values["deepkern_call_seconds_count"] == "2"
    assert values['deepkern_first_token_seconds_bucket{le="+Inf"}'] == "2"
    assert values["deepkern_requests_open"] == "0"


def test_command_serves_until_sigterm():
    command = [sys.executable, "-m", "model.serve", "--port", "0", "--model-name", "tiny"]
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
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
        process.kill()
        process.communicate()
