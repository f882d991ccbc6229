"""The HTTP server with the openai client: answers, streams, errors, metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest

from model.tokenizer import ByteTokenizer
from tests.model.serving import MODEL, TOKENIZER, WAIT, Running, generated, new_engine, running

CHAT = [{"role": "user", "content": "def f(x):"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(new_engine()) as one:
        yield one


@pytest.fixture
def client(served) -> openai.OpenAI:
    return served.client()


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
def test_completion_plain_streamed_and_generated_are_equal(client, fields):
    prompt = "import os\n\ndef "
    (request,) = generated(
        [TOKENIZER.encode(prompt)], max_new_tokens=10, **sampling_options(fields)
    )
    plain = client.completions.create(model=MODEL, prompt=prompt, max_tokens=10, **fields)
    assert plain.choices[0].text == request.text
    assert plain.choices[0].finish_reason == request.finish_reason
    assert plain.usage is not None
    assert plain.usage.prompt_tokens == len(request.prompt)
    assert plain.usage.completion_tokens == len(request.tokens)
    streamed = list(
        client.completions.create(
            model=MODEL, prompt=request.prompt, max_tokens=10, stream=True, **fields
        )
    )
    assert len(streamed) > 1 and len({chunk.id for chunk in streamed}) == 1
    assert "".join(chunk.choices[0].text for chunk in streamed) == request.text
    assert [chunk.choices[0].finish_reason for chunk in streamed][-1] == request.finish_reason


@pytest.mark.parametrize("fields", SAMPLINGS.values(), ids=SAMPLINGS)
def test_chat_plain_streamed_and_generated_are_equal(client, fields):
    prompt = TOKENIZER.encode_chat(CHAT)
    (request,) = generated([prompt], max_new_tokens=10, **sampling_options(fields))
    plain = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=10, **fields
    )
    assert plain.choices[0].message.content == request.text
    assert plain.choices[0].message.role == "assistant"
    assert plain.choices[0].finish_reason == request.finish_reason
    streamed = list(
        client.chat.completions.create(
            model=MODEL,
            messages=CHAT,
            max_tokens=10,
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


def test_several_prompts_and_choices(client):
    prompts = ["def f", "class A", "x = "]
    answer = client.completions.create(
        model=MODEL, prompt=prompts, n=2, seed=3, temperature=0.8, max_tokens=8
    )
    tokens = [TOKENIZER.encode(prompt) for prompt in prompts]
    by_seed = [generated(tokens, seed=s, temperature=0.8, max_new_tokens=8) for s in (3, 4)]
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


def test_logprobs_of_completions(client):
    (request,) = generated([TOKENIZER.encode("def f")], max_new_tokens=9, logprobs=3)
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


def test_logprobs_of_chat(client):
    (request,) = generated([TOKENIZER.encode_chat(CHAT)], max_new_tokens=9, logprobs=2)
    fields: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 9, "logprobs": True}
    fields["top_logprobs"] = 2
    plain = client.chat.completions.create(temperature=0, **fields).choices[0].logprobs.content
    assert [(bytes(e.bytes)[0], e.logprob) for e in plain] == [s[:2] for s in request.samples]
    for entry, sample in zip(plain, request.samples, strict=True):
        assert tuple((t.bytes[0], t.logprob) for t in entry.top_logprobs) == sample.top
    chunks = client.chat.completions.create(temperature=0, stream=True, **fields)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert [entry for piece in pieces if piece for entry in piece.content] == plain


def test_drafts_do_not_change_a_stream():
    """Steps that give several tokens report the log-probability of each."""
    (request,) = generated([TOKENIZER.encode("import os")], max_new_tokens=16, logprobs=2)
    fields: dict[str, Any] = {"prompt": "import os", "max_tokens": 16, "temperature": 0}
    with running(new_engine(draft_tokens=2)) as one:
        stream = one.client().completions.create(model=MODEL, logprobs=2, stream=True, **fields)
        choices = [chunk.choices[0] for chunk in stream]
        assert one.worker.stats.accepted > 0
    assert "".join(choice.text for choice in choices) == request.text
    values = [v for c in choices if c.logprobs for v in c.logprobs.token_logprobs]
    assert values == [sample.logprob for sample in request.samples]
    assert len(choices) < len(request.tokens)


def test_stop_strings_and_end_tokens(client):
    (whole,) = generated([TOKENIZER.encode("def f(")], max_new_tokens=20)
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


def test_reasoning_is_apart_from_the_content():
    tokenizer = ByteTokenizer(12, "{{ messages[0].content }}<think>\n")
    with running(new_engine(tokenizer)) as one:
        options: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 12}
        plain = one.client().chat.completions.create(temperature=0, **options)
        stream = one.client().chat.completions.create(temperature=0, stream=True, **options)
        deltas = [chunk.choices[0].delta for chunk in stream]
    (request,) = generated([tokenizer.encode_chat(CHAT)], max_new_tokens=12)
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
        ("POST", "/v1/completions", {"content": b'{"prompt": "a", "\\ud800": 1}'}, 400),
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
        "name",
        "length",
        "chunks",
        "type",
    ],
)
def test_invalid_http_requests(limited, method, path, options, status):
    headers = {"content-type": "application/json"} if "content" in options else {}
    answer = httpx.request(method, limited.url + path, headers=headers, timeout=WAIT, **options)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def limited() -> Iterator[Running]:
    """A server of small bodies."""
    with running(new_engine(), max_body_bytes=4096) as one:
        yield one


def test_api_key():
    with running(new_engine(), api_key="secret") as one:
        for key in ("wrong", "secre", "secretß"):
            headers = {"authorization": f"Bearer {key}".encode()}
            answer = one.post({"prompt": "a"}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert one.post({"prompt": "a"}).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            one.client("wrong").models.list()
        assert [m.id for m in one.client("secret").models.list()] == [MODEL]
        assert httpx.get(one.url + "/metrics").status_code == 200


def test_metrics():
    with running(new_engine()) as one:
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
