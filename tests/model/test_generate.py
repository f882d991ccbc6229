"""`python -m model.generate`: bytes and tokenizers, streaming, and errors that read well."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from model import Config, DeepSeek
from model.generate import Bytes, Tokenizer, main, stop_tokens, text_of

app = typer.Typer()
app.command()(main)


@pytest.fixture
def folder(make_config, make_plain, saved):
    config = make_config(vocab_size=256, bos_token_id=12, eos_token_id=None, num_hidden_layers=2)
    return saved(make_plain(config))


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16", "--fp8"]])
def test_prints_prompt_and_continuation(folder, options):
    arguments = ["--checkpoint", folder, "--prompt", "import ö", "--max-new-tokens", 9, *options]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "import ö" in result.stdout and "9 tokens" in result.stderr
    assert run(*arguments).stdout == result.stdout


def test_text_is_what_the_model_generates(folder):
    result = run("--checkpoint", folder, "--prompt", "abc", "--max-new-tokens", 9)
    model = DeepSeek.from_pretrained(folder, dtype=torch.float32)
    tokens = model.generate(torch.tensor([[12, *b"abc"]]), 9)[0].tolist()
    expected = bytes(tokens).decode(errors="replace")
    # an unfinished character at the very end is not printed; a stream has no line ends to keep
    assert expected.startswith(result.stdout.rstrip("\n")) or result.stdout.startswith(expected)


def test_bytes_split_characters():
    decode = Bytes(None).decoder()
    assert [decode(b) for b in "aö".encode()] == ["a", "", "ö"]
    assert Bytes(12).encode("a\udcff") == [12, 97, 255]


def test_tokenizer_file(folder):
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    fast = Fast(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.save(str(folder / "tokenizer.json"))
    text = text_of(folder, Config.load(folder))
    assert isinstance(text, Tokenizer)
    decode = text.decoder()
    assert "".join(decode(token) for token in text.encode("hé llo")) == "hé llo"
    result = run("--checkpoint", folder, "--prompt", "x = 1", "--max-new-tokens", 4)
    assert result.exit_code == 0 and "x = 1" in result.stdout


def test_stop_tokens():
    assert stop_tokens(Config.preset("tiny")) == {12}
    assert stop_tokens(Config.preset("tiny", eos_token_id=None)) == set()
    assert stop_tokens(Config.preset("tiny", eos_token_id=[1, 2])) == {1, 2}


def test_stops_at_the_end_token(folder):
    first = DeepSeek.from_pretrained(folder, dtype=torch.float32)
    token = first.generate(torch.tensor([[12, *b"abc"]]), 1)[0, -1].item()
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"eos_token_id": null', f'"eos_token_id": {token}'))
    result = run("--checkpoint", folder, "--prompt", "abc", "--max-new-tokens", 9)
    assert result.exit_code == 0 and "1 tokens" in result.stderr


def test_errors(tmp_path, make_config, make_plain, saved, folder):
    missing = run("--checkpoint", tmp_path / "none")
    assert missing.exit_code == 2 and "no such directory" in missing.stderr
    words = saved(make_plain(make_config()), "words")
    no_tokenizer = run("--checkpoint", words)
    assert no_tokenizer.exit_code == 2 and "tokenizer.json" in no_tokenizer.stderr
    assert run("--checkpoint", folder, "--dtype", "int4").exit_code == 2
