"""Tokenizers: text <-> tokens, and conversations -> the tokens that the model continues.

    tokenizer = load_tokenizer("model/checkpoints/stdlib-bytes")
    tokens = tokenizer.encode("def main(")  # BOS first
    chat = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    text = tokenizer.decode(tokens)

A directory with a tokenizer.json uses that, and its chat template.  Without one, a model of 256
tokens reads bytes.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from model.chat_template import PLAIN_TEMPLATE, ChatTemplate, Message
from model.checkpoint import CheckpointError
from model.config import Config
from model.text import Decoder

SPECIAL_TOKENS = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
INCOMPLETE = "\ufffd"  # what a decoder returns for the first bytes of a character


class Tokenizer(Protocol):
    """Converts text to tokens and back."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, BOS first if the model uses one."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def decoder(self) -> Decoder:
        """Converts the tokens of one text as they arrive."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 of one token, which may be a part of a character or a special token."""
        ...

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation; `ChatTemplate.render` describes it.

        Raises ValueError too if the checkpoint has no chat template.
        """
        ...

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The tokens of `apply_chat_template`."""
        ...


def with_bos(tokens: list[int], bos: int | None) -> list[int]:
    """tokens with `bos` first; unchanged if `bos` is None or already the first."""
    return tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]


class ByteTokenizer:
    """UTF-8 bytes as tokens.  BOS is the separator that training puts before every file."""

    def __init__(self, bos: int | None, template: str = PLAIN_TEMPLATE) -> None:
        self.bos, self.template = bos, ChatTemplate(template)

    def encode(self, text: str) -> list[int]:
        # surrogateescape: a command-line argument that is not UTF-8 keeps its bytes
        return with_bos(list(text.encode(errors="surrogateescape")), self.bos)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def decoder(self) -> Decoder:
        return ByteDecoder()

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        return self.template.render(messages, add_generation_prompt, **variables)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        return self.encode(self.apply_chat_template(messages, add_generation_prompt, **variables))


class ByteDecoder:
    """The characters of a stream of bytes; U+FFFD for what is not UTF-8."""

    def __init__(self) -> None:
        self.incremental = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: int) -> str:
        return self.incremental.decode(bytes([token]))

    def finish(self) -> str:
        return self.incremental.decode(b"", final=True)


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library.

    add_bos: True puts `bos` first, once; False omits what the file's template adds; None leaves
    that to the template.
    """

    def __init__(
        self,
        file: Path,
        bos: int | None = None,
        add_bos: bool | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.bos, self.add_bos, self.template = bos, add_bos, template

    def encode(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text, add_special_tokens=self.add_bos is not False).ids
        if not self.add_bos:
            return tokens
        while self.bos is not None and tokens[:2] == [self.bos] * 2:
            del tokens[0]  # the text has BOS, and the template adds it
        return with_bos(tokens, self.bos)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)

    def decoder(self) -> Decoder:
        return FileDecoder(self)

    def token_bytes(self, token: int) -> bytes:
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        symbols = self.tokenizer.id_to_token(token) or ""
        if INCOMPLETE in text and all(symbol in BYTE_OF_SYMBOL for symbol in symbols):
            return bytes(BYTE_OF_SYMBOL[symbol] for symbol in symbols)
        return text.encode()

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        if self.template is None:
            raise ValueError("chat template: the checkpoint has none")
        return self.template.render(messages, add_generation_prompt, **variables)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        text = self.apply_chat_template(messages, add_generation_prompt, **variables)
        return self.tokenizer.encode(text, add_special_tokens=False).ids


class FileDecoder:
    """Decodes a window of the last tokens, and returns what it adds to the text.

    A decoder of `tokenizers` may treat the first token of a text in another way, so the window
    starts with tokens whose text was returned before.
    """

    def __init__(self, tokenizer: FileTokenizer) -> None:
        self.decode = tokenizer.decode
        self.tokens: list[int] = []  # the window
        self.context = 0  # of those, tokens whose text was returned
        self.returned, self.partial = "", 0  # text of the window; characters after the context

    def __call__(self, token: int) -> str:
        self.tokens.append(token)
        text = self.decode(self.tokens)
        if not text.startswith(self.returned):
            # With byte fallback an incomplete character makes its neighbours U+FFFD, too.
            if len(self.tokens) - self.context <= 4:
                return ""
            text = self._without_context()
        # An incomplete character is one U+FFFD, or one for each of up to 3 bytes.
        complete = text
        while complete.endswith(INCOMPLETE) and len(text) - len(complete) < 3:
            complete = complete[:-1]
        new = complete[len(self.returned) :]
        if complete == text and new:
            self.tokens, self.partial = self.tokens[self.context :], 0
            self.context, self.returned = len(self.tokens), self.decode(self.tokens)
        else:
            self.returned, self.partial = self.returned + new, self.partial + len(new)
        return new

    def finish(self) -> str:
        text = self.decode(self.tokens)
        if not text.startswith(self.returned):
            text = self._without_context()
        return text[len(self.returned) :]

    def _without_context(self) -> str:
        """The text of the window after it was reduced to the tokens behind the context."""
        self.tokens, self.context = self.tokens[self.context :], 0
        text = self.decode(self.tokens)
        self.returned = text[: self.partial]
        return text


def _byte_symbols() -> dict[str, int]:
    """The character that stands for each byte in the vocabulary of byte-level BPE.

    Printable characters of Latin-1 are themselves; the other bytes follow from U+0100 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    return {**symbols, **{chr(256 + i): byte for i, byte in enumerate(others)}}


BYTE_OF_SYMBOL = _byte_symbols()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    Reads tokenizer.json, tokenizer_config.json (`add_bos_token`, special tokens, `chat_template`)
    and chat_template.jinja, which precedes the template of tokenizer_config.json.

    Raises:
        CheckpointError: a file is damaged; or no tokenizer.json, and the vocabulary is not the 256
            bytes.
    """
    folder = Path(folder)
    config, file = Config.load(folder), folder / "tokenizer.json"
    options = _read_json(folder / "tokenizer_config.json")
    special = _special_tokens(folder, options)
    source = _template_source(folder, options)
    try:
        template = None if source is None else ChatTemplate(source, special)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if file.is_file():
        return _file_tokenizer(file, options, special, config.bos_token_id, template)
    if config.vocab_size == 256:
        bos = config.bos_token_id
        return ByteTokenizer(
            bos if bos is not None and 0 <= bos < 256 else None, source or PLAIN_TEMPLATE
        )
    raise CheckpointError(f"{file}: missing, and {config.vocab_size} tokens are not bytes")


def _file_tokenizer(
    file: Path,
    options: dict[str, Any],
    special: dict[str, str],
    bos: int | None,
    template: ChatTemplate | None,
) -> FileTokenizer:
    add_bos = options.get("add_bos_token")
    try:
        tokenizer = FileTokenizer(file, bos, add_bos, template)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise CheckpointError(f"{file}: {error}") from error
    named = tokenizer.tokenizer.token_to_id(special.get("bos_token", ""))
    tokenizer.bos = bos if named is None else named
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} without the file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return value


def _special_tokens(folder: Path, options: dict[str, Any]) -> dict[str, str]:
    """bos_token and the like, each a string or an object with `content`."""
    values = {**_read_json(folder / "special_tokens_map.json"), **options}
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = values.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _template_source(folder: Path, options: dict[str, Any]) -> str | None:
    file, value = folder / "chat_template.jinja", options.get("chat_template")
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if isinstance(value, list):  # several templates by name
        value = {entry["name"]: entry["template"] for entry in value}.get("default")
    return value if isinstance(value, str) else None
