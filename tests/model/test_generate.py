"""`python -m model.generate`: tokenizers, BOS, streaming, end tokens and error messages."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from model import DeepSeek
from model.engine import Engine
from model.generate import main
from model.sampling import Sampling
from model.tokenizer import FileTokenizer, load_tokenizer

app = typer.Typer()
app.command()(main)


@pytest.fixture
def folder(make_config, make_plain, saved):
    config = make_config(vocab_size=256, bos_token_id=12, eos_token_id=None, num_hidden_layers=2)
    return saved(make_plain(config))


@pytest.fixture
def tokenizer_file(folder):
    """Writes a byte-level tokenizer.json of 256 tokens into the checkpoint."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16", "--fp8"]], ids=["fp32", "fp8"])
def test_prints_prompt_and_continuation(folder, options):
    arguments = ["--checkpoint", folder, "--prompt", "import ö", "--max-new-tokens", 9, *options]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "import ö" in result.stdout and "9 tokens" in result.stderr
    assert run(*arguments).stdout == result.stdout


@pytest.mark.parametrize("prompt", ["abc", "\fabc"], ids=["without_bos", "with_bos"])
def test_command_equals_generate(folder, prompt):
    result = run("--checkpoint", folder, "--prompt", prompt, "--max-new-tokens", 9)
    model = DeepSeek.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    tokens = model.generate(torch.tensor([tokenizer.encode(prompt)]), 9)[0].tolist()
    assert tokens[:4] == [12, *b"abc"]
    assert result.stdout == prompt + tokenizer.decode(tokens[4:])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.9, "seed": 3},
        {"temperature": 1.5, "top_p": 0.8, "top_k": 9, "min_p": 0.01, "repetition_penalty": 1.2},
    ],
    ids=["temperature", "filters"],
)
def test_sampling_options(folder, options):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    result = run("--checkpoint", folder, "--prompt", "abc", "--max-new-tokens", 9, *arguments)
    tokenizer = load_tokenizer(folder)
    engine = Engine(DeepSeek.from_pretrained(folder, dtype=torch.float32), tokenizer)
    sampling = Sampling(max_new_tokens=9, **options)
    (request,) = engine.generate([tokenizer.encode("abc")], sampling)
    assert result.stdout == "abc" + request.text
    assert "prompt 4 tokens" in result.stderr and "9 tokens" in result.stderr


def test_drafts_do_not_change_the_text():
    arguments = "--prompt", "import os", "--max-new-tokens", 16
    plain, drafted = run(*arguments), run(*arguments, "--draft-tokens", 1)
    assert drafted.exit_code == 0 and drafted.stdout == plain.stdout
    assert "drafts accepted" in drafted.stderr and "drafts" not in plain.stderr


def test_fp8_cache(folder):
    options = "--dtype", "bfloat16", "--cache-dtype", "fp8", "--max-new-tokens", 4
    result = run("--checkpoint", folder, *options)
    assert result.exit_code == 0 and "4 tokens" in result.stderr


def test_stop_string(folder):
    text = run("--checkpoint", folder, "--prompt", "abc", "--max-new-tokens", 9).stdout[3:]
    stop = text[1:3]
    arguments = "--checkpoint", folder, "--prompt", "abc", "--stop", stop
    assert run(*arguments).stdout == "abc" + text.split(stop)[0]


def test_tokenizer_file(folder, tokenizer_file):
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, FileTokenizer)
    tokens, decode = tokenizer.encode("hé llo"), tokenizer.decoder()
    assert "".join(decode(token) for token in tokens) == tokenizer.decode(tokens) == "hé llo"
    result = run("--checkpoint", folder, "--prompt", "x = 1", "--max-new-tokens", 4)
    assert result.exit_code == 0 and "x = 1" in result.stdout


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
    cold = run("--checkpoint", folder, "--temperature", -1)
    assert cold.exit_code == 2 and "sampling: temperature" in cold.stderr
    no_layer = run("--checkpoint", folder, "--draft-tokens", 1)
    assert no_layer.exit_code == 2 and "no prediction layer" in no_layer.stderr
    long = run("--checkpoint", folder, "--prompt", "a" * 500)
    assert long.exit_code == 2 and "prompt" in long.stderr
