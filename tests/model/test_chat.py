"""`python -m model.chat`: answers, commands, reasoning and Ctrl-C, with lines from a pipe."""

from __future__ import annotations

import io
import json
import signal

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from model import DeepSeek
from model.chat import HELP, Chat, main
from model.engine import Engine
from model.generate import CHECKPOINT
from model.sampling import Sampling
from model.text import ReasoningSplit
from model.tokenizer import ByteTokenizer

SAMPLING = Sampling(max_new_tokens=12, ignore_eos=True)
app = typer.Typer()
app.command()(main)


@pytest.fixture(scope="module")
def model():
    return DeepSeek.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture
def chat(model):
    tokenizer = ByteTokenizer(12)
    return Chat(Engine(model, tokenizer), SAMPLING, Console(file=io.StringIO(), width=100))


def printed(chat: Chat) -> str:
    return chat.console.file.getvalue()


def expected_answer(chat: Chat, messages: list[dict[str, str]]) -> str:
    prompt = chat.engine.tokenizer.encode_chat(messages)
    return chat.engine.generate([prompt], chat.sampling)[0].text


def test_answers_continue_the_conversation(chat):
    messages = []
    for line in ("def f(x):", "return [1]"):
        messages.append({"role": "user", "content": line})
        answer = expected_answer(chat, messages)
        messages.append({"role": "assistant", "content": answer})
        assert chat.handle(line)
        assert chat.messages == messages
        assert printed(chat).endswith(answer + "\n")


def test_commands(chat, tmp_path):
    chat.handle("/system Be brief.")
    chat.handle("a")
    assert chat.conversation()[0] == {"role": "system", "content": "Be brief."}
    assert chat.messages[1]["content"] == expected_answer(chat, chat.conversation()[:2])
    chat.handle(f"/save {tmp_path / 'chat.json'}")
    assert json.loads((tmp_path / "chat.json").read_text()) == chat.conversation()
    chat.handle("/temperature 0.5")
    assert chat.sampling.temperature == 0.5
    chat.handle("/reset")
    assert chat.messages == [] and chat.system == "Be brief."
    chat.handle("/system")
    chat.handle("/help")
    assert chat.conversation() == [] and HELP.rstrip() in printed(chat)
    assert chat.handle("   ") and not chat.handle("/exit")


def test_invalid_commands_are_reported(chat, tmp_path):
    for line in ("/temperature warm", "/temperature -1", "/oops", f"/save {tmp_path}/no/file"):
        assert chat.handle(line)
    text = printed(chat)
    assert "'warm'" in text and "'-1'" in text and "/oops" in text and "No such file" in text
    assert chat.sampling == SAMPLING


def test_a_prompt_that_is_too_long_is_reported(chat):
    chat.handle("a" * 1000)
    assert "error: " in printed(chat) and chat.messages == []


def test_ctrl_c_ends_the_answer(chat, monkeypatch):
    step, count = chat.engine.step, 0

    def interrupted_step():
        nonlocal count
        count += 1
        if count == 3:
            signal.raise_signal(signal.SIGINT)
        return step()

    whole = expected_answer(chat, [{"role": "user", "content": "def f("}])
    monkeypatch.setattr(chat.engine, "step", interrupted_step)
    before = signal.getsignal(signal.SIGINT)
    assert chat.handle("def f(")
    answer = chat.messages[1]["content"]
    assert 0 < len(answer) < len(whole) and whole.startswith(answer)
    assert signal.getsignal(signal.SIGINT) is before and not chat.engine.has_work
    assert chat.handle("more") and len(chat.messages) == 4


class Scripted:
    """A request and an engine that answers with given texts."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.finish_reason, self.text = iter(texts), None, ""

    def step(self):
        self.text = next(self.texts, "")
        self.finish_reason = None if self.text else "stop"
        return [self]


def test_reasoning_is_dim_and_not_in_the_conversation(chat):
    chat.console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    chat.engine = request = Scripted(["<thi", "nk>\nhm", "</think>\n", "\n[b]yes", "\x1b[0m"])
    assert chat.print_answer(request, ReasoningSplit()) == "[b]yes\x1b[0m"
    assert printed(chat) == "\x1b[2;3mhm\x1b[0m\n\n[b]yes[0m\n"


def test_command_reads_a_pipe():
    options = ["--temperature", "0", "--max-new-tokens", "5"]
    result = CliRunner().invoke(app, options, input="def f(\n/reset\n/exit\nnot read\n")
    assert result.exit_code == 0, result.output
    assert "new conversation" in result.stdout and "not read" not in result.stdout
    assert CliRunner().invoke(app, options, input="def f(\n/reset\n").stdout == result.stdout


def test_errors_of_the_command(tmp_path):
    missing = CliRunner().invoke(app, ["--checkpoint", str(tmp_path / "none")])
    assert missing.exit_code == 2 and "no such directory" in missing.stderr
    cold = CliRunner().invoke(app, ["--temperature", "-1"])
    assert cold.exit_code == 2 and "temperature" in cold.stderr
