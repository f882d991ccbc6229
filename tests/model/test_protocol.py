"""Requests of OpenAI's API as prompts and `Sampling`, and answers as JSON, without a server."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling import Sample, Sampling
from model.server.answers import Answer
from model.server.protocol import ApiError, Call, Limits, Parser
from model.server.worker import Event
from model.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(None)
LIMITS = Limits(context=100, prompt_tokens=60, new_tokens=50, choices=6)
PARSER = Parser("m", TOKENIZER, 256, LIMITS)
USER = {"role": "user", "content": "Hi"}


def completion(**fields: Any) -> Call:
    return PARSER.completion(json.dumps({"prompt": "ab", **fields}).encode())


def chat(**fields: Any) -> Call:
    return PARSER.chat(json.dumps({"messages": [USER], **fields}).encode())


def test_defaults_of_completions():
    call = completion(seed=1)
    expected = Sampling(temperature=1.0, seed=1, max_new_tokens=16)
    assert call == Call(False, [[97, 98]], expected, 1, False, False, False)


def test_defaults_of_chat():
    call = chat(seed=1)
    prompt = TOKENIZER.encode_chat([USER])
    expected = Sampling(temperature=1.0, seed=1, max_new_tokens=50)
    assert call == Call(True, [prompt], expected, 1, False, False, False)


def test_all_sampling_fields():
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "seed": -7}
    sampling["repetition_penalty"] = 1.2
    call = completion(
        stop=["x", "yz"], stop_token_ids=[9], ignore_eos=True, max_tokens=3, logprobs=2, **sampling
    )
    assert call.sampling == Sampling(
        stop=("x", "yz"),
        stop_tokens=(9,),
        ignore_eos=True,
        max_new_tokens=3,
        logprobs=2,
        **sampling,
    )
    assert call.logprobs and not completion().logprobs and completion(logprobs=0).logprobs


def test_seeds_of_choices():
    call = completion(prompt=["a", "b"], n=2, seed=2**64 - 1)
    assert [(p, s.seed) for p, s in call.items()] == [
        ([97], 2**64 - 1),
        ([97], 0),
        ([98], 2**64 - 1),
        ([98], 0),
    ]
    assert completion().sampling.seed != completion().sampling.seed


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("ä", [[0xC3, 0xA4]]),
        (["a", "b"], [[97], [98]]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [5]], [[97], [5]]),
    ],
    ids=["text", "texts", "tokens", "token_lists", "mixed"],
)
def test_prompts(prompt, tokens):
    assert completion(prompt=prompt).prompts == tokens


def test_lengths():
    assert completion(prompt="a" * 60).sampling.max_new_tokens == 16
    assert completion(prompt="a" * 60, max_tokens=40).sampling.max_new_tokens == 40
    assert completion(prompt="a", max_tokens=50).sampling.max_new_tokens == 50
    assert chat(max_tokens=4).sampling.max_new_tokens == 4
    assert chat(max_tokens=4, max_completion_tokens=5).sampling.max_new_tokens == 5


def test_neutral_values_and_unrelated_fields_are_accepted():
    completion(model="m", user="u", echo=False, best_of=1, suffix=None, logit_bias={}, n=None)
    chat(
        metadata={"a": "b"},
        store=True,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        frequency_penalty=0.0,
        modalities=["text"],
        stream=True,
        stream_options={"include_usage": True},
    )


def test_messages():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}] * 2, "name": "x"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": None, "tool_calls": [], "refusal": None},
        USER,
    ]
    template = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}{{ thinking }}"
    parser = Parser("m", ByteTokenizer(None, template), 256, LIMITS)
    body = {"messages": messages, "chat_template_kwargs": {"thinking": True}}
    (prompt,) = parser.chat(json.dumps(body).encode()).prompts
    expected = "[system|Be Be ][user|][assistant|][user|Hi]True"
    assert bytes(prompt).decode() == expected


def test_reasoning_starts_in_the_prompt():
    parser = Parser("m", ByteTokenizer(None, "{{ messages[0].content }}\n"), 256, LIMITS)
    for content, inside in (("<think>", True), ("<think>\n", True), ("</think>", False)):
        body = {"messages": [{"role": "user", "content": content}]}
        assert parser.chat(json.dumps(body).encode()).inside == inside


REFUSED = [
    (completion, {"prompt": None}, "prompt"),
    (completion, {"prompt": ""}, "prompt"),
    (completion, {"prompt": []}, "prompt"),
    (completion, {"prompt": 3}, "prompt"),
    (completion, {"prompt": [256]}, "prompt"),
    (completion, {"prompt": [-1]}, "prompt"),
    (completion, {"prompt": [[1], 2]}, "prompt"),
    (completion, {"prompt": ["a"] * 7}, "prompt"),
    (completion, {"prompt": "a" * 61}, "prompt"),
    (completion, {"prompt": "\ud800"}, "prompt"),
    (completion, {"messages": [USER]}, "messages"),
    (completion, {"max_tokens": 51}, "max_tokens"),
    (completion, {"prompt": "a" * 60, "max_tokens": 41}, "max_tokens"),
    (completion, {"max_tokens": -1}, "max_tokens"),
    (completion, {"max_tokens": 1.5}, "max_tokens"),
    (completion, {"n": 0}, "n"),
    (completion, {"n": 7}, "n"),
    (completion, {"n": 4, "prompt": ["a", "b"]}, "n"),
    (completion, {"temperature": "hot"}, "temperature"),
    (completion, {"temperature": -0.5}, "temperature"),
    (completion, {"temperature": math.inf}, None),
    (completion, {"top_p": 1.5}, "top_p"),
    (completion, {"top_p": True}, "top_p"),
    (completion, {"top_k": -2}, "top_k"),
    (completion, {"min_p": 2}, "min_p"),
    (completion, {"repetition_penalty": 0}, "repetition_penalty"),
    (completion, {"seed": 2**64}, "seed"),
    (completion, {"seed": "x"}, "seed"),
    (completion, {"stop": ""}, "stop"),
    (completion, {"stop": ["a"] * 17}, "stop"),
    (completion, {"stop": "a" * 257}, "stop"),
    (completion, {"stop": [1]}, "stop"),
    (completion, {"stop_token_ids": "1"}, "stop_token_ids"),
    (completion, {"logprobs": 21}, "logprobs"),
    (completion, {"logprobs": True}, "logprobs"),
    (completion, {"stream": 1}, "stream"),
    (completion, {"stream_options": {"include_usage": True}}, "stream_options"),
    (completion, {"stream": True, "stream_options": {"a": 1}}, "a"),
    (completion, {"ignore_eos": "yes"}, "ignore_eos"),
    (completion, {"echo": True}, "echo"),
    (completion, {"best_of": 2}, "best_of"),
    (completion, {"suffix": "x"}, "suffix"),
    (completion, {"logit_bias": {"1": 2}}, "logit_bias"),
    (completion, {"presence_penalty": 0.5}, "presence_penalty"),
    (completion, {"max_token": 5}, "max_token"),
    (completion, {"model": "other"}, "model"),
    (completion, {"model": 3}, "model"),
    (chat, {"messages": None}, "messages"),
    (chat, {"messages": "Hi"}, "messages"),
    (chat, {"messages": ["Hi"]}, "messages[0]"),
    (chat, {"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].role"),
    (chat, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (chat, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    (chat, {"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content"),
    (chat, {"messages": [{**USER, "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    (chat, {"messages": [{**USER, "tool_calls": [1]}]}, "messages[0].tool_calls"),
    (chat, {"messages": [{**USER, "content": "a" * 50}]}, "messages"),
    (chat, {"prompt": "a"}, "prompt"),
    (chat, {"logprobs": 3}, "logprobs"),
    (chat, {"top_logprobs": 3}, "top_logprobs"),
    (chat, {"max_completion_tokens": 99}, "max_completion_tokens"),
    (chat, {"tools": [{"type": "function"}]}, "tools"),
    (chat, {"tool_choice": "required"}, "tool_choice"),
    (chat, {"response_format": {"type": "json_schema"}}, "response_format"),
    (chat, {"reasoning_effort": "high"}, "reasoning_effort"),
    (chat, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (chat, {"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("parse", "fields", "param"), REFUSED, ids=range(len(REFUSED)))
def test_refused_fields_are_named(parse, fields, param):
    with pytest.raises(ApiError) as raised:
        parse(**fields)
    error = raised.value.body()["error"]
    assert raised.value.status == (404 if fields == {"model": "other"} else 400)
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert param is None or param in error["message"]
    json.dumps(raised.value.body(), allow_nan=False)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=3),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "user"]), values)
    ),
    max_leaves=6,
)
NAMES = sorted({name for _, fields, _ in REFUSED for name in fields})


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5), st.booleans())
def test_any_body_is_accepted_or_refused(fields, is_chat):
    try:
        call = (chat if is_chat else completion)(**fields)
    except ApiError as error:
        assert 400 <= error.status < 500
        json.dumps(error.body()).encode()
    else:
        assert call.items() and all(len(prompt) < LIMITS.context for prompt in call.prompts)


def test_a_template_that_refuses_the_messages():
    parser = Parser("m", ByteTokenizer(None, "{{ raise_exception('no system') }}"), 256, LIMITS)
    with pytest.raises(ApiError, match="messages: chat template: no system"):
        parser.chat(json.dumps({"messages": [USER]}).encode())


def events(texts: list[str], choice: int = 0) -> list[Event]:
    """One event per text, with a token of the same number; the last one stops."""
    ends = [None] * (len(texts) - 1) + ["stop"]
    return [
        Event(choice, [i], [Sample(i, -0.5, ())], text, end)
        for i, (text, end) in enumerate(zip(texts, ends, strict=True))
    ]


def test_chat_answers_separate_the_reasoning():
    texts = ["<thi", "nk>", "h", "m</th", "ink>", "\n\nye", "s", ""]
    whole, streamed = Answer(chat(), "m", TOKENIZER), Answer(chat(stream=True), "m", TOKENIZER)
    deltas = [piece["choices"][0]["delta"] for piece in streamed.start()]
    for event in events(texts):
        whole.add(event)
        deltas += [piece["choices"][0]["delta"] for piece in streamed.streamed(event)]
    message = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    assert whole.whole()["choices"][0]["message"] == message
    assert whole.whole()["usage"]["completion_tokens"] == 8
    assert [d for d in deltas if d] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "h"},
        {"reasoning_content": "m"},
        {"content": "ye"},
        {"content": "s"},
    ]
    assert len(deltas) == 6  # and the last one, with the reason of the end


def test_logprobs_of_parts_of_characters():
    tokens, top = [0xC3, 0xA4, 98], ((97, -1.0), (98, -math.inf))
    samples = [Sample(token, -0.25, top) for token in tokens]
    event = Event(0, tokens, samples, "äb", "stop")
    answer = Answer(completion(logprobs=2), "m", TOKENIZER)
    answer.add(event)
    assert answer.whole()["choices"][0]["logprobs"] == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa4", "b"],
        "token_logprobs": [-0.25] * 3,
        "top_logprobs": [{"a": -1.0, "b": -9999.0}] * 3,
        "text_offset": [0, 0, 1],
    }
    answer = Answer(chat(logprobs=True, top_logprobs=1), "m", TOKENIZER)
    answer.add(event)
    content = answer.whole()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA4], [98]]
    json.dumps(answer.whole(), allow_nan=False)
