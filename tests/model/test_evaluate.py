"""Bits per byte, and `python -m model.evaluate`."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from model import DeepSeek
from model.evaluate import bits_per_byte, main, windows

DATA = b"for i in range(10):\n    print(i)\n" * 10
app = typer.Typer()
app.command()(main)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_windows_score_every_byte_once():
    tokens = torch.arange(100, dtype=torch.uint8)
    targets = [t for w in windows(tokens, 16, 2) for t in w[:, 1:].flatten().tolist()]
    assert targets == list(range(1, 100))


def test_bits_per_byte_of_a_uniform_model():
    uniform = bits_per_byte(lambda tokens: torch.zeros(*tokens.shape, 256), DATA[:100], 16)
    assert uniform == pytest.approx(8.0)


def test_command_prints_bits_per_byte(make_config, make_plain, saved, tmp_path):
    folder, text = saved(make_plain(make_config(vocab_size=256))), tmp_path / "text"
    text.write_bytes(DATA[:100])
    result = run("--checkpoint", folder, "--text", text, "--window", 16)
    assert result.exit_code == 0, result.output
    expected = bits_per_byte(DeepSeek.from_pretrained(folder, torch.float32), DATA[:100], 16)
    assert result.stdout == f"{expected:.4f} bits per byte, 99 bytes scored, windows of 16\n"


def test_command_errors(make_config, make_plain, saved, tmp_path):
    words, text = saved(make_plain(make_config())), tmp_path / "text"
    no_text = run("--checkpoint", words)
    assert no_text.exit_code == 2 and "no such file" in no_text.stderr
    text.write_bytes(DATA)
    no_bytes = run("--checkpoint", words, "--text", text)
    assert no_bytes.exit_code == 2 and "101 tokens" in no_bytes.stderr
    missing = run("--checkpoint", tmp_path / "none", "--text", text)
    assert missing.exit_code == 2 and "no such directory" in missing.stderr
