"""Chat templates: the messages of a conversation -> the text that the model continues.

    template = ChatTemplate(source, {"bos_token": "<s>"})
    text = template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)

A checkpoint brings its template as Jinja source.  It runs in Jinja's immutable sandbox with the
settings and functions of transformers, which published templates rely on.  A template that needs
too much memory or returns too much text is stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Message = Mapping[str, Any]  # role, content and what else the template reads

MAX_SOURCE = 1 << 20  # characters of a template
MAX_TEXT = 1 << 24  # characters of one string inside a template, and of its result

# For a checkpoint without a template, of a model that was not trained on chats.
PLAIN_TEMPLATE = """\
{% for message in messages %}
{{ message.role }}: {{ message.content }}

{% endfor %}
{% if add_generation_prompt %}assistant:{% endif %}"""


class ChatTemplate:
    """A compiled template.

    source: Jinja.  variables: what every rendering sees, such as bos_token.

    Raises:
        ValueError: the source is too long or no valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None) -> None:
        if len(source) > MAX_SOURCE:
            raise ValueError(
                f"chat template: {len(source)} characters, expected at most {MAX_SOURCE}"
            )
        self.source, self.variables = source, dict(variables or {})
        try:
            self.template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"chat template: {error}") from error

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation; with `add_generation_prompt`, the start of the next answer.

        variables: more variables of the template, such as `thinking=True`.

        Raises:
            ValueError: no messages, or the template refuses them, fails, or returns too much text.
        """
        if not messages:
            raise ValueError("chat template: the conversation is empty")
        # The template sees JSON values only: no method of another object is within its reach.
        # A key of value None counts as missing, as many templates would print "None".
        chat = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            chat, extra = json.loads(json.dumps([chat, variables]))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"chat template: the messages are not JSON: {error}") from error
        values = {**self.variables, "tools": None, "documents": None, **extra, "messages": chat}
        try:
            return self._run({**values, "add_generation_prompt": add_generation_prompt})
        except (jinja2.TemplateError, RecursionError, MemoryError) as error:
            raise ValueError(f"chat template: {error}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ValueError(f"chat template: {type(error).__name__}: {error}") from error

    def _run(self, values: dict[str, Any]) -> str:
        parts, size = [], 0
        for part in self.template.generate(values):
            size += len(part)
            _check_length(size)
            parts.append(part)
        return "".join(parts)


def _check_length(length: int) -> None:
    if length > MAX_TEXT:
        raise SecurityError(f"more than {MAX_TEXT} characters")


def _check_widths(format: str) -> None:
    """Refuses a format that may fill to a width of 10,000 characters or more."""
    if re.search(r"\d{5}|\*|\{[^}]*\{", format):
        raise SecurityError(f"the width in the format {format!r} is not allowed")


class _Environment(ImmutableSandboxedEnvironment):
    """Refuses the cheap ways to exhaust the memory: products, powers and widths of any size."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("** is not allowed")
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
                    _check_length(len(sequence) * count)
            if isinstance(left, int) and isinstance(right, int):
                _check_length(left.bit_length() + right.bit_length())
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """The sandboxed `format` of a string; None for another function."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, which marks the tokens to train on: no effect."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True)
        ).set_lineno(line)


class _Namespace(Namespace):
    """`namespace(...)` without names that start with an underscore."""

    def __init__(*arguments: Any, **values: Any) -> None:
        self, *rest = arguments  # `namespace(self=...)` is valid
        values = dict(*rest, **values)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"the name {name!r} is not allowed")


def _environment() -> ImmutableSandboxedEnvironment:
    """The settings and functions of transformers."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def new_dict(*arguments: Any, **values: Any) -> dict[Any, Any]:
        return dict(*arguments, **values)

    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=strftime_now,
        dict=new_dict,
        namespace=_Namespace,
    )
    for name in ("center", "indent"):  # fill to a width of any size
        environment.filters[name] = _limited(environment.filters[name])
    return environment


def _limited(fill: Any) -> Any:
    """The filter `fill`, whose integer arguments are at most 1000."""

    def limited(value: Any, *arguments: Any, **options: Any) -> Any:
        for argument in (*arguments, *options.values()):
            if isinstance(argument, int) and argument > 1000:
                raise SecurityError(f"a width of {argument} is not allowed")
        return fill(value, *arguments, **options)

    return limited
