"""The model's part of the main job, on a small random checkpoint."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import job
from bench.models import checkpoint as language_model
from bench.models import generation
from model.checkpoint import write_checkpoint
from model.config import FP8_QUANTIZATION, Config
from model.plain import PlainModel
from tests.models import stored_tensors

NAMES = [
    "largest logit difference to plain PyTorch, fp32",
    "prompt (its end)",
    "continuation",
    "decoded bytes that prefill predicts too",
    "prefill, bf16",
    "decode, bf16",
    "prefill, fp8",
    "decode, fp8",
    "engine, batch 1",
    "engine, batch 8",
    "engine, batch 32",
    "batches of 1, 8 and 32 give the same tokens",
    "engine, 32 requests to 1",
    "scheduling and sampling",
    "drafts accepted",
    "speculative decoding",
    "speculation gives the same tokens",
    "transformers, batch 1",
    "transformers, batch 8",
    "transformers, batch 32",
    "held-out bits per byte, plain fp32",
    "held-out bits per byte, bf16",
    "held-out bits per byte, fp8",
]


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    """A tiny model with random weights and its own text."""
    torch.manual_seed(0)
    config = Config.preset(
        "tiny",
        hidden_size=128,
        num_hidden_layers=2,
        num_nextn_predict_layers=1,
        quantization_config=FP8_QUANTIZATION,
    )
    plain = PlainModel(config).eval()
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, config, stored_tensors(plain))
    (folder / "heldout.txt").write_bytes(b"def one():\n    return 1\n" * 40)
    few = {"SCORED_BYTES": 200, "WINDOW": 96, "NEW_TOKENS": 4, "TIMED_TOKENS": 2, "REPEATS": 1}
    for name, value in few.items():
        monkeypatch.setattr(language_model, name, value)
    for name, value in {"NEW_TOKENS": 6, "DRAFTED_TOKENS": 8, "REPEATS": 1}.items():
        monkeypatch.setattr(generation, name, value)
    # The model is random, so its losses by rounding have no meaning.
    monkeypatch.setattr(language_model, "BITS_LOST", 0.5)
    monkeypatch.setattr(language_model, "SAME_BYTES", 0.0)
    return folder


def test_records_are_complete(checkpoint):
    steps = []
    records = language_model.run(checkpoint, steps.append)
    assert [r["name"] for r in records] == NAMES and steps == list(language_model.STEPS)
    by_name = {r["name"]: r for r in records}
    assert by_name[NAMES[0]]["ok"] and by_name[NAMES[0]]["value"] <= language_model.LOGIT_TOLERANCE
    assert len(by_name["continuation"]["value"].encode("utf-8", "replace")) >= 4
    assert all(r["value"] > 0 for r in records if r["unit"] in ("tokens/s", "bits"))
    assert not [r for r in records if r["ok"] is False]
    json.dumps(records, allow_nan=False)


def test_a_model_with_other_logits_fails(checkpoint, monkeypatch, tmp_path):
    real = PlainModel.from_pretrained

    def scaled(path):
        model = real(path)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        return model

    monkeypatch.setattr(PlainModel, "from_pretrained", scaled)
    output = io.StringIO()
    console = Console(file=output, width=200)
    code = job.run(
        [], folder=tmp_path / "results", weights=checkpoint, page=tmp_path / "report.html",
        console=console,
    )  # fmt: skip
    assert code == 1 and "largest logit difference" in output.getvalue()


@pytest.mark.parametrize("broken", ["absent", "truncated"])
def test_an_unreadable_checkpoint_fails(broken, checkpoint, tmp_path):
    if broken == "absent":
        checkpoint = tmp_path / "nothing"
    else:
        (file,) = checkpoint.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
    output = io.StringIO()
    console = Console(file=output, width=200)
    folder = tmp_path / "results"
    assert (
        job.run(
            [], folder=folder, weights=checkpoint, page=tmp_path / "report.html", console=console
        )
        == 1
    )
    assert "disagreements" in output.getvalue()
    assert next(folder.glob("*.jsonl")).read_text().count('"ok": false') == 1


def test_prompt_ends_before_a_function_body():
    text = b"x = 1\n" * 100 + b"def f(a, b):\n    return a\n"
    prompt = language_model.choose_prompt(text)
    assert prompt.endswith(b"def f(a, b):\n") and len(prompt) == language_model.PROMPT_BYTES
    assert language_model.choose_prompt(b"y" * 1000) == b"y" * language_model.PROMPT_BYTES
