"""The deepkern model equals the plain one, decode equals prefill, bad input is an error."""

from __future__ import annotations

import pytest
import torch

import deepkern
import model.batch as model_batch
from model import Config, DeepSeek
from model.rope import rope_cos_sin
from model.weights import Precision

PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision(torch.bfloat16),
    "fp8": Precision(torch.bfloat16, fp8=True),
}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(101, (2, 30))


CASES = {
    "v3": {},
    "no_q_lora": {"q_lora_rank": None},
    "no_shared_expert": {"n_shared_experts": 0},
    "one_group": {"n_group": 1, "topk_group": 1},
    "softmax": {
        "topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False,
    },
    "one_expert": {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
    "one_head": {"num_attention_heads": 1},
    "wide_rope": {"qk_rope_head_dim": 64, "kv_lora_rank": 512},
    "tied": {"tie_word_embeddings": True},
    "half_split": {"rope_interleave": False},
}  # fmt: skip


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_match_plain_model(make_config, make_plain, deepkern_model, tokens, changes):
    plain = make_plain(make_config(num_nextn_predict_layers=1, **changes))
    model = deepkern_model(plain)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens), atol=1e-4, rtol=0)
        mtp = plain.mtp_logits(tokens)
    torch.testing.assert_close(model.mtp_logits(tokens), mtp, atol=1e-4, rtol=0)


def test_yarn_matches_plain_model(make_config, make_plain, deepkern_model, tokens, yarn):
    plain = make_plain(make_config(rope_scaling=yarn))
    without = make_plain(make_config())
    without.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(deepkern_model(plain)(tokens), plain(tokens), atol=1e-4, rtol=0)
        assert (plain(tokens) - without(tokens)).abs().max() > 0.01


@pytest.mark.parametrize(("fp8", "limit"), [(False, 0.03), (True, 0.2)], ids=["bf16", "fp8"])
def test_low_precision_is_close(make_config, make_plain, deepkern_model, tokens, fp8, limit):
    # All layers are dense: a rounding error cannot change the choice of an expert.
    plain = make_plain(make_config(first_k_dense_replace=3))
    exact = deepkern_model(plain)(tokens)
    logits = deepkern_model(plain, torch.bfloat16, fp8=fp8)(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).norm() / exact.norm() < limit


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_random_weights_give_finite_logits(tokens, precision):
    model = DeepSeek(Config.preset("tiny"), precision)
    for logits in (model(tokens), model.mtp_logits(tokens)):
        assert logits.dtype == precision.dtype and logits.isfinite().all()
        assert logits.float().std() > 0.1


def test_random_weights_repeat_with_the_seed(tokens):
    first, other = DeepSeek(Config.preset("tiny"))(tokens), DeepSeek(Config.preset("tiny"))(tokens)
    torch.manual_seed(0)
    torch.randint(101, (2, 30))  # as the fixture `tokens`
    assert torch.equal(DeepSeek(Config.preset("tiny"))(tokens), first)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
def test_generate_equals_repeated_forward(make_config, make_plain, deepkern_model, tokens, fp8):
    model = deepkern_model(make_plain(make_config(eos_token_id=None)), fp8=fp8)
    out = model.generate(tokens, 12)
    assert out.shape == (2, 42) and torch.equal(out[:, :30], tokens)
    expected = tokens
    for _ in range(12):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, expected)


def test_sequences_are_independent(make_config, make_plain, deepkern_model, tokens):
    model = deepkern_model(make_plain(make_config()))
    together, alone = model(tokens), model(tokens[1:])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("page", [1, 7, 16, 64])
def test_page_size_and_poisoned_cache(make_config, make_plain, deepkern_model, tokens, page):
    model = deepkern_model(make_plain(make_config()))
    cache = model.new_cache(2, 30, page=page)
    cache.pool.latents.fill_(torch.nan)
    logits = [model(chunk, cache) for chunk in tokens.split([5, 1, 24], 1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens), atol=1e-5, rtol=0)


def test_cache_slots_are_distinct(make_config, deepkern_model, make_plain):
    config = make_config()
    cache = deepkern_model(make_plain(config)).new_cache(3, 20, page=8)
    cos_sin = rope_cos_sin(config, 24)
    first = cache.next_batch(torch.zeros(3, 13, dtype=torch.int64), cos_sin)
    cache.length += 13
    second = cache.next_batch(torch.zeros(3, 11, dtype=torch.int64), cos_sin)
    slots = torch.cat([first.slots, second.slots])
    assert slots.unique().numel() == 3 * 24 and slots.max() < 3 * 24
    assert second.positions.view(3, 11)[2].tolist() == list(range(13, 24))
    assert second.cache_seqlens.view(3, 11)[1].tolist() == list(range(14, 25))


def test_rows_in_blocks_of_keys(make_config, make_plain, deepkern_model, tokens, monkeypatch):
    """Merged blocks give the logits of one block, and chunks the bits of the whole."""
    model = deepkern_model(make_plain(make_config()))
    one_block = model(tokens)
    monkeypatch.setattr(model_batch, "PREFILL_BLOCK", 8)
    blocks = model(tokens)
    torch.testing.assert_close(blocks, one_block, atol=1e-5, rtol=0)
    cache = model.new_cache(2, 30, page=4)
    chunks = [model(chunk, cache) for chunk in tokens.split([5, 14, 2, 9], 1)]
    assert torch.equal(torch.cat(chunks, 1), blocks)


def test_moves_but_keeps_its_dtypes(make_config, make_plain, deepkern_model, tokens):
    model = deepkern_model(make_plain(make_config()), torch.bfloat16, fp8=True)
    expected = model(tokens)
    assert torch.equal(model.to("cpu").to(torch.bfloat16).bfloat16()(tokens), expected)
    for change in (model.half, model.float, lambda: model.to(torch.float64)):
        with pytest.raises(TypeError, match=r"load them with from_pretrained\(dtype="):
            change()
    assert torch.equal(model(tokens), expected)


def test_generate_stops_and_takes_ragged_prompts(make_config, make_plain, deepkern_model):
    plain = make_plain(make_config(eos_token_id=None))
    model = deepkern_model(plain)
    prompts = [[5, 6, 7], [8], list(range(20))]
    free = model.generate(prompts, 6)
    assert [len(row) for row in free] == [9, 7, 26]
    assert free[1] == model.generate(torch.tensor([[8]]), 6)[0].tolist()
    end = free[0][3]
    model.config.eos_token_id = end
    assert model.generate(prompts, 6)[0] == [5, 6, 7, end]
    both = model.generate(torch.tensor([[5, 6, 7], [7, 6, 5]]), 6)
    assert both[0, 3:].tolist() == [end] * (both.shape[1] - 3)


BAD_STEPS = {
    "batch_too_small": ((1, 2), "batch of 1, expected 2"),
    "batch_too_large": ((3, 2), "batch of 3, expected 2"),
    "too_many_tokens": ((2, 62), "65 tokens do not fit, it holds 64"),
}


@pytest.mark.parametrize(("shape", "message"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_failed_forward_keeps_cache_length(
    make_config, make_plain, deepkern_model, tokens, shape, message
):
    model = deepkern_model(make_plain(make_config()))
    cache = model.new_cache(2, 20)
    model(tokens[:, :3], cache)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape, dtype=torch.int64), cache)
    assert cache.length == 3
    expected = model(tokens[:, :5])[:, 3:]
    torch.testing.assert_close(model(tokens[:, 3:5], cache), expected, atol=1e-5, rtol=0)


def test_empty_input(make_config, make_plain, deepkern_model):
    model = deepkern_model(make_plain(make_config()))
    assert model(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 101)
    assert model(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, 101)
    one = torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(model.generate(one, 0), one)


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3), torch.zeros(1, 3).int()],
    ids=["one_dimension", "fp32", "int32"],
)
def test_bad_tokens(make_config, make_plain, deepkern_model, bad):
    model = deepkern_model(make_plain(make_config()))
    with pytest.raises(ValueError, match="tokens: expected int64"):
        model(bad)


def test_empty_prompt(make_config, make_plain, deepkern_model):
    model = deepkern_model(make_plain(make_config()))
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), 3)


@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
def test_backends_agree(make_config, make_plain, deepkern_model, backend, fp8):
    """The `backend` fixture forces each backend in turn."""
    plain = make_plain(make_config(num_hidden_layers=2))
    model, tokens = deepkern_model(plain, fp8=fp8), torch.tensor([[3, 99, 5, 7], [50, 50, 50, 0]])
    cache = model.new_cache(2, 4, page=4)
    logits = torch.cat([model(chunk, cache) for chunk in tokens.split([3, 1], 1)], 1)
    with torch.no_grad(), deepkern.backend("torch"):
        expected = model(tokens) if fp8 else plain(tokens)
    # With FP8 a difference in the last bit can change the rounding of an activation.
    limit = 0.02 if fp8 else 1e-5
    assert (logits - expected).norm() / expected.norm() < limit


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
def test_on_a_gpu(make_config, make_plain, deepkern_model, device, tokens, fp8):
    plain = make_plain(make_config(num_nextn_predict_layers=1))
    on_cpu = deepkern_model(plain, fp8=fp8)
    on_gpu = deepkern_model(plain, device=device, fp8=fp8)
    limit = 0.05 if fp8 else 1e-3
    for logits, expected in (
        (on_gpu(tokens.to(device)), on_cpu(tokens)),
        (on_gpu.mtp_logits(tokens.to(device)), on_cpu.mtp_logits(tokens)),
    ):
        assert logits.device.type == device.type
        assert (logits.cpu() - expected).norm() / expected.norm() < limit
    prompt = tokens[:, :5].to(device)
    assert on_gpu.generate(prompt, 4).shape == (2, 9)
