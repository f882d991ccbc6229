"""No hot spot bypasses deepkern: the ops of a forward pass, counted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from model import DeepSeek
from model.weights import Precision
from tests.models import Calls

LAYERS, EXPERT_LAYERS = 3, 2
# PyTorch's ops that a hot spot would be without deepkern.
BYPASSES = {
    "mm", "bmm", "addmm", "matmul", "linear", "einsum", "_softmax", "_log_softmax", "silu",
    "sigmoid", "topk", "sort", "scaled_dot_product_attention", "_fused_rms_norm", "rsqrt",
    "_scaled_dot_product_flash_attention_for_cpu", "sqrt", "exp",
}  # fmt: skip


def count(model: DeepSeek, sizes: list[int]) -> Counter[str]:
    """The calls of deepkern's ops; there is none of BYPASSES."""
    tokens = torch.randint(101, (2, sum(sizes)))
    cache = model.new_cache(2, sum(sizes))
    with Calls() as calls:
        for chunk in tokens.split(sizes, 1):
            model(chunk, cache)
    assert calls.others and not BYPASSES & set(calls.others)
    return calls.counts


COMMON = {
    "rmsnorm_cast": 2 * LAYERS + 1 + LAYERS,  # of the layers, the end, and q_a
    "mla_cache_append": LAYERS,
    "route_topk": EXPERT_LAYERS,
}
REAL = {
    "swiglu": LAYERS + EXPERT_LAYERS,
    "expert_dispatch": EXPERT_LAYERS,
    "expert_combine": EXPERT_LAYERS,
}
FP8 = {
    "fp8_gemm_nt": 3 * LAYERS + 2 + 2 * EXPERT_LAYERS,
    "moe_forward": EXPERT_LAYERS,
    "swiglu_cast": LAYERS,
}
PROMPT = {"mla_prefill": LAYERS, "mla_cache_gather": LAYERS}
DECODE = {"mla_decode": LAYERS}


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_ops_of_a_pass(make_config, fp8):
    model = DeepSeek(make_config(), Precision(torch.bfloat16, fp8=fp8))
    prompt, both = count(model, [5]), count(model, [5, 1])
    decode = both - prompt
    for counts, attention in ((prompt, PROMPT), (decode, DECODE)):
        expected = COMMON | attention | (FP8 if fp8 else REAL)
        assert {name: counts[name] for name in expected} == expected
        # Of a product per head in decoding, of expanded keys in a prompt, router and head always.
        products = LAYERS if attention is PROMPT else 0
        linears = 0 if fp8 else 3 * LAYERS + 2 + 2 * EXPERT_LAYERS
        assert counts["gemm_nt"] == linears + products + EXPERT_LAYERS + 1
        grouped = 0 if attention is PROMPT else 2 * LAYERS
        grouped += 0 if fp8 else 2 * EXPERT_LAYERS
        assert counts["m_grouped_gemm_nt_contiguous"] == grouped


def test_ops_of_v32(make_config):
    sparse = {"index_topk": 4, "index_n_heads": 4, "index_head_dim": 16}
    config = make_config(model_type="deepseek_v32", **sparse)
    counts = count(DeepSeek(config, Precision(torch.bfloat16, fp8=True)), [5])
    names = (
        "indexer_cache_append", "hadamard_transform", "hadamard_cast", "paged_mqa_logits",
        "topk_indices", "mla_sparse_decode",
    )  # fmt: skip
    assert {name: counts[name] for name in names} == dict.fromkeys(names, LAYERS)


def test_ue8m0_activations(make_config):
    """The ops of `moe_forward`, as it has no scale format of its own."""
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    config = make_config(quantization_config=quantization)
    counts = count(DeepSeek(config, Precision(torch.bfloat16, fp8=True)), [5])
    assert counts["moe_forward"] == 0
    assert counts["m_grouped_fp8_gemm_nt_contiguous"] == 2 * EXPERT_LAYERS
