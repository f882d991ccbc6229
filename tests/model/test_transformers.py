"""Logits of a saved checkpoint are within 1e-4 of those of transformers, in fp32."""

from __future__ import annotations

import pytest
import torch

from model import DeepSeek
from model.engine import Engine
from model.plain import PlainModel
from model.sampling import Sampling
from tests.models import randomize

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
SHAPE = {
    "vocab_size": 101,
    "hidden_size": 72,
    "intermediate_size": 130,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
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
    "max_position_embeddings": 128,
}
V3 = {**SHAPE, "n_group": 4, "topk_group": 2, "n_shared_experts": 1}
V2 = {**SHAPE, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 16,
}
V32 = {**V3, "index_n_heads": 24, "index_head_dim": 16, "index_topk": 12}
CASES = {
    "v3": ("V3", V3),
    "v32": ("V32", V32),
    "v32-few-tokens": ("V32", {**V32, "index_topk": 64}),
    "v32-yarn": ("V32", {**V32, "rope_parameters": {**YARN, "mscale": 1.0}}),
    "v3-no-q-lora": ("V3", {**V3, "q_lora_rank": None}),
    "v3-one-group": ("V3", {**V3, "n_group": 1, "topk_group": 1}),
    "v3-all-dense": ("V3", {**V3, "first_k_dense_replace": 3}),
    "v3-unnormalized": ("V3", {**V3, "norm_topk_prob": False, "routed_scaling_factor": 1.7}),
    "v3-yarn": ("V3", {**V3, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "v3-yarn-uneven": ("V3", {**V3, "rope_parameters": {**YARN, "mscale_all_dim": 0.3}}),
    "v3-half-split-rope": ("V3", {**V3, "rope_interleave": False}),
    "v3-tied": ("V3", {**V3, "tie_word_embeddings": True}),
    "v3-128-grid": ("V3", {**V3, "hidden_size": 128, "kv_lora_rank": 128, "v_head_dim": 64}),
    "v2-lite": ("V2", {**V2, "rope_parameters": YARN}),
    "v2-no-yarn": ("V2", {**V2, "routed_scaling_factor": 1.3}),
    "v2-groups": (
        "V2",
        {
            **V2,
            "q_lora_rank": 24,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
    ),  # fmt: skip
}


@pytest.fixture(params=CASES, scope="module")
def case(request, tmp_path_factory):
    """A transformers model, its saved directory, tokens and its logits."""
    family, values = CASES[request.param]
    torch.manual_seed(1)
    config = getattr(transformers, f"Deepseek{family}Config")(**values)
    reference = getattr(transformers, f"Deepseek{family}ForCausalLM")(config).eval()
    randomize(reference)
    with torch.no_grad():
        tokens = torch.randint(config.vocab_size, (2, 40))
        logits = reference(tokens).logits
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return folder, tokens, logits


def report(name: str, ours: torch.Tensor, reference: torch.Tensor, record) -> None:
    """Fails above the tolerance; -s or the report's properties show the difference."""
    assert reference.abs().max() > 0.5, "the logits are too small to compare"
    difference = (ours - reference).abs().max().item()
    record("max_logit_difference", difference)
    print(f"max logit difference to transformers, {name}: {difference:.2e}")
    assert difference <= TOLERANCE


def test_prefill(case, record_property):
    folder, tokens, logits = case
    model = DeepSeek.from_pretrained(folder, dtype=torch.float32)
    report(f"prefill {folder.name}", model(tokens), logits, record_property)


def test_decode_one_by_one(case, record_property):
    folder, tokens, logits = case
    model = DeepSeek.from_pretrained(folder, dtype=torch.float32)
    cache = model.new_cache(*tokens.shape, page=16)
    steps = [model(token[:, None], cache) for token in tokens.unbind(1)]
    report(f"decode {folder.name}", torch.cat(steps, 1), logits, record_property)


def test_decode_in_chunks(case, record_property):
    folder, tokens, logits = case
    model = DeepSeek.from_pretrained(folder, dtype=torch.float32)
    cache = model.new_cache(*tokens.shape, page=16)
    steps = [model(chunk, cache) for chunk in tokens.split([17, 1, 3, 19], 1)]
    report(f"chunks {folder.name}", torch.cat(steps, 1), logits, record_property)


@torch.no_grad()
def test_ragged_requests(case, record_property):
    """Log-probabilities of an engine's tokens are those of transformers."""
    folder, tokens, _ = case
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = DeepSeek.from_pretrained(folder, dtype=torch.float32)
    engine = Engine(model, num_pages=40, page=4, max_batch_tokens=16, max_running=4)
    prompts = [
        row[:size].tolist()
        for row, size in zip(tokens.repeat(3, 1), (30, 3, 1, 17, 8, 40), strict=True)
    ]
    requests = engine.generate(prompts, Sampling(max_new_tokens=6, ignore_eos=True))
    for request in requests:
        logits = reference(torch.tensor([request.known])).logits[0, len(request.prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        ours = torch.tensor([one.logprob for one in request.samples])
        chosen = logprobs[torch.arange(6), request.tokens]
        assert (logprobs.amax(-1) - chosen).max() <= TOLERANCE
        report(f"engine {folder.name}", ours, chosen, record_property)


@torch.no_grad()
def test_plain_model(case, record_property):
    """`make run` compares with the plain model; this compares that with transformers."""
    folder, tokens, logits = case
    plain = PlainModel.from_pretrained(folder)
    report(f"plain {folder.name}", plain(tokens), logits, record_property)


@torch.no_grad()
def test_transformers_reads_our_checkpoint(make_config, make_plain, saved, yarn):
    plain = make_plain(make_config(rope_scaling=yarn))
    folder = saved(plain, shard_bytes=100_000)
    reference = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(101, (2, 40))
    difference = (reference.eval()(tokens).logits - plain(tokens)).abs().max().item()
    assert difference <= TOLERANCE
