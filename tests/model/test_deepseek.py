"""The deepkern model against the plain one, decoding against prefill, and its bad input."""

from __future__ import annotations

import pytest
import torch

import deepkern
from model.cache import LatentCache


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(101, (2, 30))


CASES = {
    "v3": {},
    "no q_lora": {"q_lora_rank": None},
    "no shared expert": {"n_shared_experts": 0},
    "one group": {"n_group": 1, "topk_group": 1},
    "softmax": {
        "topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False,
    },
    "one expert": {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
    "one head": {"num_attention_heads": 1},
    "wide rope": {"qk_rope_head_dim": 64, "kv_lora_rank": 512},
    "tied": {"tie_word_embeddings": True},
    "half-split": {"rope_interleave": False},
}  # fmt: skip


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_are_the_plain_model_s(make_config, make_plain, deepkern_model, tokens, changes):
    plain = make_plain(make_config(num_nextn_predict_layers=1, **changes))
    model = deepkern_model(plain)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens), atol=1e-4, rtol=0)
        ahead = plain.mtp_logits(tokens)
    torch.testing.assert_close(model.mtp_logits(tokens), ahead, atol=1e-4, rtol=0)


def test_yarn(make_config, make_plain, deepkern_model, tokens, yarn):
    plain = make_plain(make_config(rope_scaling=yarn))
    without = make_plain(make_config())
    without.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(deepkern_model(plain)(tokens), plain(tokens), atol=1e-4, rtol=0)
        assert (plain(tokens) - without(tokens)).abs().max() > 0.01


def test_bf16_and_fp8_stay_close(make_config, make_plain, deepkern_model, tokens):
    # Without experts, so that a rounding cannot change a choice.
    plain = make_plain(make_config(first_k_dense_replace=3))
    exact = deepkern_model(plain)(tokens)
    for options, limit in (({}, 0.03), ({"fp8": True}, 0.2)):
        logits = deepkern_model(plain, torch.bfloat16, **options)(tokens)
        assert logits.dtype == torch.bfloat16
        assert (logits - exact).norm() / exact.norm() < limit


@pytest.mark.parametrize("fp8", [False, True])
def test_generate_repeats_the_full_forward(make_config, make_plain, deepkern_model, tokens, fp8):
    model = deepkern_model(make_plain(make_config()), fp8=fp8)
    out = model.generate(tokens, 12)
    assert out.shape == (2, 42) and torch.equal(out[:, :30], tokens)
    again = tokens
    for _ in range(12):
        again = torch.cat([again, model(again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, again)


def test_a_sequence_does_not_see_its_neighbours(make_config, make_plain, deepkern_model, tokens):
    model = deepkern_model(make_plain(make_config()))
    together, alone = model(tokens), model(tokens[1:])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)


def test_pages_of_any_size_and_poisoned_cache(make_config, make_plain, deepkern_model, tokens):
    model = deepkern_model(make_plain(make_config()))
    expected = model(tokens)
    for page in (1, 7, 16, 64):
        cache = model.new_cache(2, 30, page=page)
        cache.layers.fill_(torch.nan)
        parts = [model(chunk, cache) for chunk in tokens.split([5, 1, 24], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=0)


def test_bf16_cache_pages_are_distinct(make_config):
    cache = LatentCache(make_config(), batch=3, capacity=20, dtype=torch.bfloat16, page=8)
    first, second = cache.reserve(13), cache.reserve(11)
    slots = torch.cat([first.slots, second.slots])
    assert slots.unique().numel() == 3 * 24 and slots.max() < 3 * 24
    assert second.positions.view(3, 11)[2].tolist() == list(range(13, 24))
    assert second.lengths.tolist() == [24, 24, 24]
    with pytest.raises(ValueError, match="25 tokens do not fit"):
        cache.reserve(1)


def test_empty_input(make_config, make_plain, deepkern_model):
    model = deepkern_model(make_plain(make_config()))
    assert model(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 101)
    assert model(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, 101)
    one = torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(model.generate(one, 0), one)


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3), torch.zeros(1, 3).int()]
)
def test_tokens_of_the_wrong_kind(make_config, make_plain, deepkern_model, bad):
    model = deepkern_model(make_plain(make_config()))
    with pytest.raises(ValueError, match="tokens: expected int64"):
        model(bad)


def test_empty_prompt(make_config, make_plain, deepkern_model):
    model = deepkern_model(make_plain(make_config()))
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), 3)


@pytest.mark.parametrize("fp8", [False, True])
def test_every_backend_gives_the_same_model(make_config, make_plain, deepkern_model, backend, fp8):
    """The `backend` fixture forces each in turn."""
    plain = make_plain(make_config(num_hidden_layers=2))
    model, few = deepkern_model(plain, fp8=fp8), torch.tensor([[3, 99, 5, 7], [50, 50, 50, 0]])
    cache = model.new_cache(2, 4, page=4)
    logits = torch.cat([model(chunk, cache) for chunk in few.split([3, 1], 1)], 1)
    with torch.no_grad(), deepkern.backend("torch"):
        expected = model(few) if fp8 else plain(few)
    # In FP8 a difference in the last bit may fall on the other side of a rounding.
    limit = 0.02 if fp8 else 1e-5
    assert (logits - expected).norm() / expected.norm() < limit


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_on_a_gpu(make_config, make_plain, deepkern_model, device, tokens, fp8):
    plain = make_plain(make_config(num_nextn_predict_layers=1))
    here = deepkern_model(plain, fp8=fp8)
    there = deepkern_model(plain, device=device, fp8=fp8)
    limit = 0.05 if fp8 else 1e-3
    for there_logits, logits in (
        (there(tokens.to(device)), here(tokens)),
        (there.mtp_logits(tokens.to(device)), here.mtp_logits(tokens)),
    ):
        assert there_logits.device.type == device.type
        assert (there_logits.cpu() - logits).norm() / logits.norm() < limit
    prompt = tokens[:, :5].to(device)
    assert there.generate(prompt, 4).shape == (2, 9)
