"""OpenAI's API, requests: JSON -> prompts and `Sampling`; errors in OpenAI's shape.

A field of another name or type is refused with the field's name, and so is one of OpenAI's fields
that would change the answer and is not supported.  Fields that do not change the answer are read
over.  Fields that OpenAI does not have: top_k, min_p, repetition_penalty, stop_token_ids,
ignore_eos, and chat_template_kwargs for variables of the chat template.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from model.sampling import Sampling
from model.text import ReasoningSplit
from model.tokenizer import Tokenizer

MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_LENGTH = 16, 256

# OpenAI's fields that are not supported -> the values that do not change the answer.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    # completions
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    # chat
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, encodable(message), code
        self.param = param and encodable(param)
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def encodable(text: str) -> str:
    """text with ? for halves of surrogate pairs, which JSON may have and UTF-8 may not."""
    return text.encode(errors="replace").decode()


@dataclass(frozen=True)
class Limits:
    """What a request may have; `context` is that of the model and the cache."""

    context: int  # tokens of prompt and answer
    prompt_tokens: int
    new_tokens: int
    choices: int = 64  # prompts times n
    body_bytes: int = 8 << 20
    body_seconds: float = 30  # to receive the body
    seconds: float = 600  # to answer


@dataclass(frozen=True)
class Call:
    """A valid request.  Its choices are `n` for each prompt, in that order."""

    chat: bool
    prompts: list[list[int]]
    sampling: Sampling  # with the seed of the first choice
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool
    inside: bool = False  # the prompt ends with <think>

    def items(self) -> list[tuple[list[int], Sampling]]:
        """Prompt and sampling of each choice; seeds count up from the first."""
        samplings = [
            replace(self.sampling, seed=(self.sampling.seed + i) % 2**64) for i in range(self.n)
        ]
        return [(prompt, sampling) for prompt in self.prompts for sampling in samplings]


class Fields:
    """Reads the fields of an object; a missing one and null are the default."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values, self.unread = values, set(values)

    def read(self, name: str, default: Any, valid: Callable[[Any], bool], expected: str) -> Any:
        self.unread.discard(name)
        value = self.values.get(name)
        if value is None:
            return default
        if not valid(value):
            raise ApiError(400, f"{name}: got {shown(value)}, expected {expected}", name)
        return value

    def integer(self, name: str, default: Any, least: int, most: int) -> Any:
        text = f"an integer from {least} to {most}"
        return self.read(name, default, lambda v: is_integer(v) and least <= v <= most, text)

    def boolean(self, name: str, default: bool = False) -> bool:
        return bool(self.read(name, default, lambda v: isinstance(v, bool), "true or false"))

    def refuse_others(self) -> None:
        """Raises for the first field that changes the answer and was not read."""
        for name in sorted(self.unread - IGNORED):
            value = self.values[name]
            if name not in UNSUPPORTED:
                raise ApiError(400, f"unknown field {name!r}", name, "unknown_parameter")
            if value is not None and value not in UNSUPPORTED[name]:
                text = f"{name}: {shown(value)} is not supported"
                raise ApiError(400, text, name, "unsupported_parameter")


def shown(value: Any) -> str:
    """JSON of a value, at most 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a string that UTF-8 can encode: no half of a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a body."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    return value


class Parser:
    """Checks the bodies of one model's requests."""

    def __init__(self, model: str, tokenizer: Tokenizer, vocabulary: int, limits: Limits) -> None:
        self.model, self.tokenizer, self.vocabulary = model, tokenizer, vocabulary
        self.limits = limits

    def completion(self, body: bytes) -> Call:
        fields = Fields(parse_json(body))
        self.check_model(fields)
        prompts = self.prompts(fields)
        logprobs = fields.integer("logprobs", None, 0, MAX_LOGPROBS)
        budget = self.new_tokens(fields, ("max_tokens",), prompts, default=16)
        return self.call(fields, False, prompts, budget, logprobs)

    def chat(self, body: bytes) -> Call:
        fields = Fields(parse_json(body))
        self.check_model(fields)
        messages = self.messages(fields)
        kwargs = fields.read("chat_template_kwargs", {}, is_variables, "an object of scalars")
        try:
            prompt = self.tokenizer.encode_chat(messages, **kwargs)
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", "messages") from error
        prompts = [self.check_prompt(prompt, "messages")]
        top = fields.integer("top_logprobs", None, 0, MAX_LOGPROBS)
        logprobs = fields.boolean("logprobs")
        if top is not None and not logprobs:
            raise ApiError(400, "top_logprobs: expected logprobs to be true", "top_logprobs")
        names = "max_completion_tokens", "max_tokens"
        budget = self.new_tokens(fields, names, prompts, default=None)
        call = self.call(fields, True, prompts, budget, (top or 0) if logprobs else None)
        ending = self.tokenizer.decode(prompt[-16:]).rstrip()
        return replace(call, inside=ending.endswith(ReasoningSplit.START))

    def call(
        self, fields: Fields, chat: bool, prompts: list[list[int]], budget: int, top: int | None
    ) -> Call:
        n = fields.integer("n", 1, 1, self.limits.choices)
        if n * len(prompts) > self.limits.choices:
            text = f"n: {n} choices of {len(prompts)} prompts, expected at most"
            raise ApiError(400, f"{text} {self.limits.choices}", "n")
        stream = fields.boolean("stream")
        sampling = self.sampling(fields, budget, top or 0)
        usage = fields.read("stream_options", {}, lambda v: isinstance(v, dict), "an object")
        options = Fields(usage)
        include_usage = options.boolean("include_usage")
        options.boolean("include_obfuscation")
        options.refuse_others()
        if usage and not stream:
            raise ApiError(400, "stream_options: expected stream to be true", "stream_options")
        fields.refuse_others()
        return Call(chat, prompts, sampling, n, stream, include_usage, top is not None)

    def check_model(self, fields: Fields) -> None:
        name = fields.read("model", self.model, is_text, "a string")
        if name != self.model:
            text = f"model: {shown(name)} does not exist, expected {self.model!r}"
            raise ApiError(404, text, "model", "model_not_found")

    def prompts(self, fields: Fields) -> list[list[int]]:
        """`prompt` is a string, a list of strings, a list of tokens, or a list of such lists."""
        expected = "a string, tokens, or a list of either"
        value = fields.read("prompt", None, lambda v: is_text(v) or isinstance(v, list), expected)
        if value is None or value == []:
            raise ApiError(400, "prompt: missing or empty", "prompt")
        if isinstance(value, str) or all(map(is_integer, value)):
            value = [value]
        if len(value) > self.limits.choices:
            text = f"prompt: {len(value)} prompts, expected at most {self.limits.choices}"
            raise ApiError(400, text, "prompt")
        return [self.check_prompt(self.tokens(prompt, expected), "prompt") for prompt in value]

    def tokens(self, prompt: Any, expected: str) -> list[int]:
        if is_text(prompt):
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, list) or not all(map(is_integer, prompt)):
            raise ApiError(400, f"prompt: got {shown(prompt)}, expected {expected}", "prompt")
        for token in prompt:
            if not 0 <= token < self.vocabulary:
                text = f"prompt: token {token} is outside [0, {self.vocabulary})"
                raise ApiError(400, text, "prompt")
        return prompt

    def check_prompt(self, tokens: list[int], param: str) -> list[int]:
        if not tokens:
            raise ApiError(400, f"{param}: no tokens", param)
        most = min(self.limits.prompt_tokens, self.limits.context - 1)
        if len(tokens) > most:
            text = f"{param}: {len(tokens)} tokens, expected at most {most}"
            raise ApiError(400, text, param, "context_length_exceeded")
        return tokens

    def new_tokens(
        self, fields: Fields, names: tuple[str, ...], prompts: list[list[int]], default: int | None
    ) -> int:
        """The number of new tokens; the default is `default`, or what the context leaves."""
        longest = max(map(len, prompts))
        room = min(self.limits.context - longest, self.limits.new_tokens)
        given = [(n, fields.integer(n, None, 0, 2**53)) for n in names]
        for name, value in given:
            if value is None:
                continue
            if value > room:
                text = f"{name}: {value} with a prompt of {longest} tokens, expected at most {room}"
                raise ApiError(400, text, name, "context_length_exceeded")
            return int(value)
        return room if default is None else min(default, room)

    def sampling(self, fields: Fields, budget: int, logprobs: int) -> Sampling:
        """The fields that `Sampling` has; its errors name the field."""

        def number(value: Any) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        options = {
            name: fields.read(name, default, number, "a number")
            for name, default in (
                ("temperature", 1.0),
                ("top_p", 1.0),
                ("min_p", 0.0),
                ("repetition_penalty", 1.0),
            )
        }
        tokens = fields.read("stop_token_ids", [], is_tokens, "a list of tokens")
        try:
            return Sampling(
                top_k=max(0, fields.integer("top_k", 0, -1, 2**31)),
                seed=fields.integer("seed", secrets.randbits(63), -(2**63), 2**64 - 1),
                ignore_eos=fields.boolean("ignore_eos"),
                stop=stop_strings(fields),
                stop_tokens=tuple(tokens),
                max_new_tokens=budget,
                logprobs=logprobs,
                **options,
            )
        except ValueError as error:
            message = str(error).removeprefix("sampling: ")
            raise ApiError(400, message, message.partition(" ")[0]) from error

    def messages(self, fields: Fields) -> list[dict[str, str]]:
        messages = fields.read("messages", [], lambda v: isinstance(v, list), "a list")
        if not messages:
            raise ApiError(400, "messages: missing or empty", "messages")
        return [self.message(m, f"messages[{i}]") for i, m in enumerate(messages)]

    def message(self, value: Any, name: str) -> dict[str, str]:
        """Role and text of a message, and the reasoning of an answer."""
        if not isinstance(value, dict):
            raise ApiError(400, f"{name}: got {shown(value)}, expected an object", name)
        role, content = value.get("role"), value.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            text = f"{name}.role: got {shown(role)}, expected system, user or assistant"
            raise ApiError(400, text, f"{name}.role")
        for other in sorted(value.keys() - {"role", "content", "reasoning_content", "name"}):
            if value[other] not in (None, [], {}):
                raise ApiError(400, f"{name}.{other}: not supported", f"{name}.{other}")
        message = {"role": "system" if role == "developer" else role}
        message["content"] = self.content(content, f"{name}.content", role == "assistant")
        if value.get("reasoning_content") is not None:
            name = f"{name}.reasoning_content"
            message["reasoning_content"] = self.content(value["reasoning_content"], name, True)
        return message

    def content(self, value: Any, name: str, optional: bool) -> str:
        """A string, or the joined texts of parts of type text."""
        if value is None and optional:
            return ""
        if is_text(value):
            return value
        if isinstance(value, list) and value:
            for part in value:
                if not isinstance(part, dict) or part.get("type") != "text":
                    text = f"{name}: got {shown(part)}, expected parts of type text"
                    raise ApiError(400, text, name)
                if not is_text(part.get("text")):
                    raise ApiError(400, f"{name}: expected the field text to be a string", name)
            return "".join(part["text"] for part in value)
        raise ApiError(400, f"{name}: got {shown(value)}, expected a string", name)


def is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_integer, value))


def is_variables(value: Any) -> bool:
    """Whether a value is an object of scalars that does not replace the conversation."""
    scalars = (str, int, float, bool)
    reserved = {"messages", "add_generation_prompt", "self"}
    if not isinstance(value, dict) or reserved & value.keys():
        return False
    return all(isinstance(v, scalars) for v in value.values())


def stop_strings(fields: Fields) -> tuple[str, ...]:
    """`stop` is a string or a list of strings."""

    def valid(value: Any) -> bool:
        values = [value] if isinstance(value, str) else value
        return (
            isinstance(values, list)
            and len(values) <= MAX_STOPS
            and all(is_text(s) and 0 < len(s) <= MAX_STOP_LENGTH for s in values)
        )

    expected = f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters"
    value = fields.read("stop", [], valid, expected)
    return (value,) if isinstance(value, str) else tuple(value)
