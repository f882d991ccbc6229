"""Small models of transformers for the tests of `patch_transformers`, and what these compare."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.runtime import native
from tests.models import randomize

transformers = pytest.importorskip("transformers")
fp8_modules = pytest.importorskip("transformers.integrations.finegrained_fp8")
FP8Linear, FP8Experts = fp8_modules.FP8Linear, fp8_modules.FP8Experts

VOCABULARY, TOLERANCE = 67, 1e-4
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 72,
    "intermediate_size": 90,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "max_position_embeddings": 128,
}
GROUPS = {"n_group": 4, "topk_group": 2}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
}
INDEXER = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
CASES = {
    "v2": ("V2", {**SHAPE, **ONE_GROUP, "q_lora_rank": None, "rope_parameters": YARN}),
    "v2-groups": ("V2", {**SHAPE, **GROUPS, "topk_method": "group_limited_greedy"}),
    "v3": ("V3", {**SHAPE, **GROUPS, "rope_parameters": YARN}),
    "v3-no-q-lora": ("V3", {**SHAPE, **ONE_GROUP, "q_lora_rank": None, "norm_topk_prob": False}),
    "v3-half-split-rope": ("V3", {**SHAPE, **GROUPS, "rope_interleave": False}),
    "v32": ("V32", {**SHAPE, **GROUPS, **INDEXER}),
    "v32-all-tokens": ("V32", {**SHAPE, **GROUPS, **INDEXER, "index_topk": 64}),
}
FAMILIES = ["v2", "v3", "v32"]
DENSE = ["v2", "v3", "v32-all-tokens"]  # these attend to every token
PADDING = {"none": (0, 0), "left": (7, 0), "right": (0, 7)}


@pytest.fixture(autouse=True)
def native_backend():
    """An op without a native CPU kernel fails, instead of running as the reference."""
    if native.missing_reason():
        pytest.skip(native.missing_reason())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    with deepkern.backend("cpu"):
        yield
    torch.set_num_threads(threads)


def new_model(case: str, dtype: torch.dtype = torch.float32, **values):
    """A model with random weights and no end of sequence."""
    family, config = CASES[case]
    config = getattr(transformers, f"Deepseek{family}Config")(**{**config, **values})
    config.eos_token_id, config.pad_token_id = None, 0
    torch.manual_seed(1)
    model = getattr(transformers, f"Deepseek{family}ForCausalLM")(config).eval()
    randomize(model)
    return model.to(dtype)


def new_batch(padding: str = "left", length: int = 30) -> dict[str, torch.Tensor]:
    """Two sequences, the first one padded."""
    left, right = PADDING[padding]
    tokens = torch.randint(1, VOCABULARY, (2, length))
    mask = torch.ones_like(tokens)
    mask[0, :left] = 0
    mask[0, length - right :] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def tokens_of(batch: dict, rows: torch.Tensor) -> torch.Tensor:
    return rows[batch["attention_mask"].bool()]


def median_error(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The median over tokens: of a few tokens the experts or the selected tokens differ."""
    ours, reference = ours.flatten(0, -2), reference.flatten(0, -2)
    return ((ours - reference).norm(dim=1) / reference.norm(dim=1)).median()


def assert_close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    assert reference.abs().max() > 0.5, "the logits are too small to compare"
    assert (ours - reference).abs().max() <= TOLERANCE


def gradients(model, batch: dict, **arguments) -> dict[str, torch.Tensor]:
    model.zero_grad()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels, **arguments).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict, reference: dict) -> None:
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        assert (ours[name] - expected).norm() <= 1e-4 * expected.norm(), name
