"""Tokenizers: BOS once, decoding as tokens arrive, chat templates as transformers renders them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from model.chat_template import ChatTemplate
from model.checkpoint import CheckpointError
from model.config import Config
from model.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer, with_bos

BOS, EOS = "<｜begin｜>", "<｜end｜>"
SPECIAL = [BOS, EOS, "<｜User｜>", "<｜Assistant｜>"]

# One system prompt first, reasoning removed from past answers, as DeepSeek's templates do.
REASONING_TEMPLATE = """\
{%- if not thinking is defined %}{% set thinking = false %}{% endif -%}
{%- set ns = namespace(system='', first=true, count=0) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set ns.system = ns.system + ('' if ns.first else '\\n\\n') + message['content'] -%}
    {%- set ns.first = false -%}
  {%- endif -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- set ns.count = ns.count + 1 -%}
    {{ '<｜User｜>' + message['content'] }}
  {%- elif message['role'] == 'assistant' -%}
    {%- set content = message['content'] -%}
    {%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
    {% generation %}{{ '<｜Assistant｜>' + content + eos_token }}{% endgeneration %}
  {%- elif message['role'] != 'system' -%}
    {{ raise_exception('unknown role ' + message['role']) }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  <｜Assistant｜>{{ '<think>\\n' if thinking else '</think>' }}
{%- endif -%}
"""
BLOCK_TEMPLATE = """\
{{ bos_token }}
{% for m in messages if m.role != 'tool' %}
    {% if loop.first and m.role == 'user' %}
No system prompt.
    {% endif %}
  {{ m.role | upper }} {{ loop.index }}: {{ m | tojson(indent=1) }}
    {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{{ messages[-1].content.split(' ')[::-1] | join('/') }} {{ dict(a=1)['a'] }} {{ x is defined }}
{{ '%s-%03d' % (messages | length, 5) }} {{ '{:>5}'.format(3) }}
"""
CHATS = {
    "user": [{"role": "user", "content": "Hi <b>"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a b ö"}],
    "turns": [
        {"role": "system", "content": "One."},
        {"role": "user", "content": "First\n"},
        {"role": "assistant", "content": "<think>\nhm</think>Answer", "name": None},
        {"role": "system", "content": "Two."},
        {"role": "user", "content": ""},
    ],
}


def byte_level_tokenizer() -> Tokenizer:
    """The 256 bytes, then merges of ASCII pairs and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "a")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """Words that start with a space, which the decoder removes from the first word of a text."""
    vocabulary = {token: i for i, token in enumerate(["▁ab", "▁c", "c", *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def bos_processor(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    pair = (BOS, tokenizer.token_to_id(BOS))
    return processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[pair])


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a directory with a config.json, a tokenizer.json and a tokenizer_config.json."""

    def write(tokenizer: Tokenizer | None, **options) -> str:
        config = Config.preset("tiny", bos_token_id=None, vocab_size=256 if not tokenizer else 300)
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        if tokenizer is not None:
            tokenizer.save(str(tmp_path / "tokenizer.json"))
        options = {"bos_token": BOS, "eos_token": {"content": EOS}, **options}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
        return tmp_path

    return write


def test_with_bos():
    assert with_bos([1, 2], 12) == [12, 1, 2]
    assert with_bos([12, 2], 12) == [12, 2]
    assert with_bos([], 12) == [12]
    assert with_bos([1], None) == [1]


@pytest.mark.parametrize("template", [False, True], ids=["no_template", "template"])
@pytest.mark.parametrize("text", ["abc", BOS + "abc", ""], ids=["plain", "with_bos", "empty"])
@pytest.mark.parametrize("add_bos", [True, False, None], ids=["true", "false", "missing"])
def test_bos_once_and_first(checkpoint, template, text, add_bos):
    source = byte_level_tokenizer()
    if template:
        source.post_processor = bos_processor(source)
    options = {} if add_bos is None else {"add_bos_token": add_bos}
    tokenizer = load_tokenizer(checkpoint(source, **options))
    bos, tokens = source.token_to_id(BOS), tokenizer.encode(text)
    if add_bos:
        assert tokens[0] == bos and tokens.count(bos) == 1
    else:
        added = template and add_bos is None
        assert tokens.count(bos) == text.count(BOS) + added
    assert tokenizer.decode(tokens) == text.replace(BOS, "")


def test_byte_tokenizer():
    decode = ByteTokenizer(None).decoder()
    assert [decode(byte) for byte in "aö".encode()] == ["a", "", "ö"]
    assert decode.finish() == ""
    assert decode(0xC3) == "" and decode.finish() == "\ufffd"
    assert ByteTokenizer(12).encode("a\udcff") == [12, 97, 255]
    assert ByteTokenizer(None).decode(list("aö".encode())) == "aö"
    assert ByteTokenizer(None).token_bytes(0xC3) == b"\xc3"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 258), max_size=24))
def test_tokens_decode_one_by_one_as_together(tokens):
    """Any bytes, also those that are not UTF-8."""
    tokenizer = byte_level_file()
    decode = tokenizer.decoder()
    pieces = [decode(token) for token in tokens]
    assert "".join(pieces) + decode.finish() == tokenizer.decode(tokens)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20))
def test_text_is_returned_with_its_last_token(text):
    tokenizer = byte_level_file()
    decode, returned = tokenizer.decoder(), ""
    for i, token in enumerate(tokens := tokenizer.encode(text)):
        returned += decode(token)
        complete = tokenizer.decode(tokens[: i + 1])
        assert complete.startswith(returned)
        assert complete[len(returned) :].strip("\ufffd") == ""
    assert returned + decode.finish() == text
    assert b"".join(map(tokenizer.token_bytes, tokens)) == text.encode()


FILES: dict[str, FileTokenizer] = {}


def byte_level_file() -> FileTokenizer:
    return FILES["byte_level"]


@pytest.fixture(scope="module", autouse=True)
def tokenizer_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_level_tokenizer().save(str(file))
    FILES["byte_level"] = FileTokenizer(file)


def test_decoder_keeps_spaces_between_words(checkpoint):
    tokenizer = load_tokenizer(checkpoint(metaspace_tokenizer()))
    tokens, decode = [0, 1, 3, 1, 2, 0], tokenizer.decoder()
    assert "".join(map(decode, tokens)) == tokenizer.decode(tokens) == "ab c cc ab"


def test_decoder_waits_for_all_bytes_of_a_character(checkpoint):
    """A decoder with byte fallback gives one U+FFFD for each byte of an incomplete character."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    source = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    source.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    decode = load_tokenizer(checkpoint(source)).decoder()
    assert [decode(byte) for byte in "a€😀b".encode()] == ["a", "", "", "€", "", "", "", "😀", "b"]
    assert decode(0xE2) == "" and decode.finish() == "\ufffd"
    decode = load_tokenizer(checkpoint(source)).decoder()
    pieces = [decode(byte) for byte in [*"€".encode(), *[0xFF] * 12]]
    assert "".join(pieces) + decode.finish() == "€" + "\ufffd" * 12
    assert sum(map(len, pieces)) > 8  # bytes that are not UTF-8 are not withheld to the end


def test_token_bytes_of_special_tokens():
    tokenizer = byte_level_file()
    bos = tokenizer.tokenizer.token_to_id(BOS)
    assert tokenizer.token_bytes(bos) == BOS.encode()
    assert tokenizer.decode([bos]) == ""


@pytest.mark.parametrize("template", [REASONING_TEMPLATE, BLOCK_TEMPLATE], ids=["r1", "blocks"])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("options", [{}, {"thinking": True}], ids=["plain", "thinking"])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "no_prompt"])
def test_chat_template_equals_transformers(checkpoint, template, chat, options, prompt):
    from transformers import PreTrainedTokenizerFast

    source = byte_level_tokenizer()
    oracle = PreTrainedTokenizerFast(tokenizer_object=source, bos_token=BOS, eos_token=EOS)
    oracle.chat_template = template
    tokenizer = load_tokenizer(checkpoint(source, chat_template=template))
    options = {"add_generation_prompt": prompt, **options}
    expected = oracle.apply_chat_template(chat, tokenize=False, **options)
    assert tokenizer.apply_chat_template(chat, **options) == expected
    tokens = oracle.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
    assert tokenizer.encode_chat(chat, **options) == tokens


def test_template_file_precedes_the_one_of_tokenizer_config(checkpoint):
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    folder, chat = checkpoint(byte_level_tokenizer(), chat_template=named), CHATS["user"]
    assert load_tokenizer(folder).apply_chat_template(chat) == "d"
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    assert load_tokenizer(folder).apply_chat_template(chat) == EOS


def test_byte_model_has_a_plain_template(checkpoint):
    tokenizer = load_tokenizer(checkpoint(None))
    assert isinstance(tokenizer, ByteTokenizer)
    text = "system: Be brief.\n\nuser: a b ö\n\nassistant:"
    assert tokenizer.apply_chat_template(CHATS["system"]) == text
    assert tokenizer.encode_chat(CHATS["system"]) == list(text.encode())


def test_without_a_template(checkpoint):
    tokenizer = load_tokenizer(checkpoint(byte_level_tokenizer()))
    with pytest.raises(ValueError, match="has none"):
        tokenizer.apply_chat_template(CHATS["user"])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{{ 'a' * 100000000000 }}",
        "{{ [1] * 100000000000 }}",
        "{{ 9 ** 9999999999 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'a' | center(100000000000) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1000000000) }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{% for i in range(90000) %}{{ 'a' * 10000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('refused') }}",
        "{{ messages[3].content }}",
        "{{ 1 / 0 }}",
        "{{ messages | first | abs }}",
    ],
    ids=range(18),
)
def test_hostile_templates_are_refused(source):
    with pytest.raises(ValueError, match="chat template: "):
        ChatTemplate(source).render(CHATS["user"])


@pytest.mark.parametrize("source", ["{% if %}", "a" * (1 << 21)], ids=["syntax", "size"])
def test_invalid_templates_name_the_checkpoint(checkpoint, source):
    with pytest.raises(CheckpointError, match="chat template: "):
        load_tokenizer(checkpoint(byte_level_tokenizer(), chat_template=source))


def test_conversations_that_are_refused():
    template = ChatTemplate("{{ messages | length }}")
    for chat in ([], [{"role": object()}]):
        with pytest.raises(ValueError, match="chat template: "):
            template.render(chat)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_named(checkpoint, name):
    folder = checkpoint(byte_level_tokenizer())
    (folder / name).write_text("{")
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(folder)
