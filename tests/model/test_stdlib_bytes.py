"""The committed checkpoint: size, logits, and the bits per byte that its README states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model import Config, DeepSeek
from model.evaluate import bits_per_byte
from model.plain import PlainModel

FOLDER = Path(__file__).parents[2] / "model" / "checkpoints" / "stdlib-bytes"
METRICS = json.loads((FOLDER / "metrics.json").read_text())
HELD_OUT = (FOLDER / "heldout.txt").read_bytes()
PART = 4 * 512 + 1  # 4 windows; the whole text is a slow test


@pytest.fixture(scope="module")
def plain() -> PlainModel:
    """The stored weights, dequantized, in the plain model."""
    return PlainModel.from_pretrained(FOLDER)


def test_size_and_shape():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 10e6
    config = Config.load(FOLDER)
    assert config.n_routed_experts >= 8 and config.n_shared_experts == 1
    assert config.num_hidden_layers - config.first_k_dense_replace >= 3
    assert config.num_nextn_predict_layers == 1 and config.q_lora_rank
    assert 3e6 <= METRICS["parameters"] <= 6e6
    assert 64 * 1024 <= len(HELD_OUT) == METRICS["held_out_bytes"] <= 128 * 1024


def test_logits_match_plain_model(plain):
    tokens = torch.tensor([list(HELD_OUT[:200])])
    model = DeepSeek.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"fp8": True}, {"dtype": torch.bfloat16, "fp8": True}],
    ids=["fp32", "fp32_fp8", "bf16_fp8"],
)
def test_bits_per_byte_of_a_part(plain, options):
    model = DeepSeek.from_pretrained(FOLDER, **{"dtype": torch.float32, **options})
    expected = bits_per_byte(plain, HELD_OUT[:PART])
    tolerance = 0.03 if options else 1e-4
    assert bits_per_byte(model, HELD_OUT[:PART]) == pytest.approx(expected, abs=tolerance)


@pytest.mark.proof
def test_bits_per_byte_of_the_whole_text(plain):
    """In the plain model, as the README's figure was measured."""
    stated = METRICS["held_out_bits_per_byte_fp8"]
    assert f"{stated:.4f}" in (FOLDER / "README.md").read_text()
    assert bits_per_byte(plain, HELD_OUT, METRICS["window"]) == pytest.approx(stated, abs=1e-3)


def test_completes_python():
    model = DeepSeek.from_pretrained(FOLDER, dtype=torch.float32)
    prompt = b"\fimport os\n\n\nclass Error(Exc"
    out = model.generate(torch.tensor([list(prompt)]), 8)[0].tolist()
    assert bytes(out[len(prompt) :]).startswith(b"eption")
