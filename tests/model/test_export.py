"""FP8 blocks in plain PyTorch, and the tensors that are stored in FP8."""

from __future__ import annotations

import pytest
import torch

import deepkern
from model.checkpoint import dequantize_blocks
from model.tensors import is_quantized
from tests.models import quantize_blocks


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (40, 300), (576, 200)], ids=str)
def test_quantize_blocks_equals_deepkern(shape):
    weight = torch.randn(shape)
    weight[:, : shape[1] // 3] *= 1e-3
    weight[: shape[0] // 2, -1] = 0
    codes, scale = quantize_blocks(weight)
    expected, expected_scale = deepkern.cast_per_block(weight)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)
    back = deepkern.cast_back(codes, scale, (128, 128), torch.float32)
    assert torch.equal(dequantize_blocks(codes, scale), back)
    assert (back - weight).abs().max() <= weight.abs().max() / 16


def test_zero_block():
    codes, scale = quantize_blocks(torch.zeros(3, 5))
    assert not codes.float().any() and scale.item() == pytest.approx(1e-4 / 448)


@pytest.mark.parametrize(
    ("name", "fp8"),
    [
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", True),
        ("model.layers.1.mlp.experts.3.down_proj.weight", True),
        ("model.layers.1.mlp.shared_experts.gate_proj.weight", True),
        ("model.layers.1.mlp.gate.weight", False),
        ("model.layers.1.mlp.gate.e_score_correction_bias", False),
        ("model.layers.1.self_attn.kv_a_layernorm.weight", False),
        ("model.layers.4.eh_proj.weight", False),
        ("model.layers.4.self_attn.indexer.wq_b.weight", True),
        ("model.layers.4.self_attn.indexer.wk.weight", True),
        ("model.layers.4.self_attn.indexer.weights_proj.weight", False),
        ("model.layers.4.self_attn.indexer.k_norm.weight", False),
        ("model.layers.4.self_attn.indexer.k_norm.bias", False),
        ("model.layers.4.shared_head.head.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_tensors_stored_in_fp8(name, fp8):
    assert is_quantized(name) is fp8
