"""The engine: a request has the same bits in every schedule, and none is lost."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deepkern
import model.batch
from deepkern.runtime import native
from model.deepseek import DeepSeek
from model.engine import Engine, Request
from model.sampling import Sampling
from model.tokenizer import ByteTokenizer
from model.weights import Precision

PRECISIONS = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "fp8": {"dtype": torch.bfloat16, "fp8": True},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Prompts of a few tokens span several blocks of keys."""
    monkeypatch.setattr(model.batch, "PREFILL_BLOCK", 16)


@pytest.fixture(autouse=True)
def forced_backend():
    """The native kernels, so that none of them is the reference; that only without a compiler."""
    with deepkern.backend("torch" if native.missing_reason() else "cpu"):
        yield


@pytest.fixture
def build(make_config, make_plain, deepkern_model):
    """A model of two layers and a prediction layer."""

    def make(changes: dict[str, Any] | None = None, **precision: Any):
        sizes = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "eos_token_id": 1}
        return deepkern_model(make_plain(make_config(**{**sizes, **(changes or {})})), **precision)

    return make


def outcome(request: Request) -> tuple[object, ...]:
    """What must not depend on the schedule."""
    return request.tokens, request.samples, request.finish_reason


def make_requests(rng: random.Random, count: int) -> list[tuple[list[int], Sampling]]:
    """Prompts of 1 to 50 tokens, many of which start alike."""
    base = [rng.randrange(101) for _ in range(50)]
    requests = []
    for seed in range(count):
        common = rng.choice([0, rng.randrange(50)])
        prompt = base[:common] + [rng.randrange(101) for _ in range(rng.randrange(1, 51 - common))]
        options = {"temperature": rng.choice([0.0, 0.8]), "top_p": rng.choice([1.0, 0.9])}
        penalty = rng.choice([1.0, 1.2])
        length = rng.randrange(1, 16)
        sampling = Sampling(
            **options, repetition_penalty=penalty, seed=seed, max_new_tokens=length, logprobs=2
        )
        requests.append((prompt, sampling))
    return requests


def run_schedule(engine: Engine, requests: list[tuple[list[int], Sampling]], rng: random.Random):
    """Submits at random steps; each update must add to what its request has."""
    pending, submitted, steps = list(requests), [], 0
    texts: dict[int, int] = {}
    while pending or engine.has_work:
        while pending and rng.random() < 0.5:
            submitted.append(engine.submit(*pending.pop(0)))
            if rng.random() < 0.2:  # a request that leaves
                leaving = engine.submit([rng.randrange(101)] * rng.randrange(1, 40))
                for update in engine.step():
                    texts[update.request.id] = texts.get(update.request.id, 0) + len(update.tokens)
                engine.cancel(leaving)
        for update in engine.step():
            texts[update.request.id] = texts.get(update.request.id, 0) + len(update.tokens)
        steps += 1
        assert steps < 5000, "the engine makes no progress"
    assert [texts[r.id] for r in submitted] == [len(r.tokens) for r in submitted]
    assert engine.stats().pages_used == 0
    return submitted


def check_schedules(model, rng: random.Random, schedules: int) -> int:
    """Compares random schedules with each request alone; returns the number of preemptions."""
    requests = make_requests(rng, 6)
    alone = []
    for prompt, sampling in requests:
        engine = Engine(model, page=64, num_pages=2, reuse_prompts=False)
        alone.append(outcome(engine.generate([prompt], sampling)[0]))
    preemptions = 0
    for _ in range(schedules):
        page = rng.choice([1, 4, 16])
        engine = Engine(
            model,
            page=page,
            num_pages=-(-rng.choice([70, 100, 400]) // page),
            max_batch_tokens=rng.choice([3, 8, 30, 200]),
            max_running=rng.choice([1, 3, 6]),
            draft_tokens=rng.choice([0, 1, 2]),
            reuse_prompts=rng.choice([True, False]),
        )
        submitted = run_schedule(engine, requests, rng)
        assert [outcome(request) for request in submitted] == alone
        preemptions += engine.stats().preemptions
    return preemptions


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_schedules_give_the_same_bits(build, rng, precision):
    check_schedules(build(**precision), random.Random(int(rng.integers(2**32))), 3)


@pytest.mark.parametrize("precision", [PRECISIONS["fp32"], PRECISIONS["fp8"]], ids=["fp32", "fp8"])
def test_v32_schedules_give_the_same_bits(make_config, rng, precision):
    sparse = {"index_topk": 12, "index_n_heads": 4, "index_head_dim": 16}
    config = make_config(
        model_type="deepseek_v32", num_hidden_layers=2, num_nextn_predict_layers=1, **sparse
    )
    model = DeepSeek(config, Precision(**precision))
    check_schedules(model, random.Random(int(rng.integers(2**32))), 2)


@pytest.mark.proof
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_200_schedules_give_the_same_bits(build, precision):
    model, preemptions = build(**precision), 0

    @settings(max_examples=70, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32))  # st.randoms() draws few schedules with preemptions
    def check(seed):
        nonlocal preemptions
        preemptions += check_schedules(model, random.Random(seed), 1)

    check()
    assert preemptions > 0


@pytest.mark.parametrize("budget", [7, 512])
def test_scores_have_the_bits_of_generation(build, budget):
    engine = Engine(build(dtype=torch.bfloat16), page=4, max_batch_tokens=budget, max_running=4)
    sampling = Sampling(max_new_tokens=12, temperature=1.0, ignore_eos=True)
    for request in engine.generate([list(range(30)), [7]], sampling):
        logprobs = [one.logprob for one in request.samples]
        assert engine.score(request.prompt, request.tokens) == logprobs
    assert engine.score([5], []) == [] and engine.stats().pages_used == 0
    with pytest.raises(ValueError, match="score: 600 tokens do not fit"):
        engine.score([1] * 300, [1] * 300)


def test_logits_that_are_not_finite_end_one_request(build):
    """An infinite embedding ends the requests with its token and no other."""
    model = build()
    model.model["embed_tokens"].weight.data[9] = torch.inf
    sampling = Sampling(max_new_tokens=6, ignore_eos=True)
    engine = Engine(model, page=4, draft_tokens=1)
    good, bad, other = engine.generate([[5, 6], [5, 9], [6, 5]], sampling)
    assert bad.finish_reason == "error" and bad.tokens == []
    for request in (good, other):
        assert outcome(Engine(model).generate([request.prompt], sampling)[0]) == outcome(request)
    assert engine.stats().pages_used == 0


def test_long_requests_do_not_preempt_each_other_for_ever(build):
    """Few rows per step: a request is admitted only if all that it knows fits."""
    model = build({"max_position_embeddings": 512})
    engine = Engine(model, page=4, num_pages=60, max_batch_tokens=16, reuse_prompts=False)
    prompts = [[k] * 60 for k in range(6)]
    engine.generate(prompts, Sampling(max_new_tokens=60, ignore_eos=True))
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.prompt_tokens < 2 * 6 * 60


def test_a_request_that_waits_forgets_no_pages(build):
    engine = Engine(build(), page=4, num_pages=16)
    engine.generate([list(range(20))], Sampling(max_new_tokens=1))
    running = engine.submit([50] * 12, Sampling(max_new_tokens=30, ignore_eos=True))
    engine.step()
    engine.submit([60] * 56, Sampling(max_new_tokens=4, ignore_eos=True))
    before = len(engine.scheduler.allocator.registered)
    engine.step()
    assert engine.num_waiting == 1 and len(engine.scheduler.allocator.registered) == before
    while engine.has_work:
        engine.step()
    assert running.finish_reason == "length"


@pytest.mark.proof
@pytest.mark.parametrize("precision", [PRECISIONS["fp32"], PRECISIONS["fp8"]], ids=["fp32", "fp8"])
def test_chunks_and_batches_give_the_same_bits_in_triton(build, precision):
    model = build({"num_hidden_layers": 1, "first_k_dense_replace": 0}, **precision)
    sampling = Sampling(max_new_tokens=3, ignore_eos=True)
    prompts = [list(range(21)), [7, 8]]
    with deepkern.backend("triton"):
        engine = Engine(model, page=8, num_pages=16, max_batch_tokens=9, max_running=2)
        together = engine.generate(prompts, sampling)
        for request in together:
            alone = Engine(model, page=64, num_pages=1).generate([request.prompt], sampling)[0]
            assert outcome(alone) == outcome(request)


def test_preempted_requests_finish(build):
    """Six sequences of 30 tokens want 180 slots of 60."""
    model = build()
    engine = Engine(model, page=4, num_pages=15, max_batch_tokens=64, reuse_prompts=False)
    prompts = [[k, 3, 5, 7] for k in range(6)]
    sampling = Sampling(max_new_tokens=26, ignore_eos=True)
    requests = engine.generate(prompts, sampling)
    assert engine.stats().preemptions > 0
    assert [len(r.tokens) for r in requests] == [26] * 6
    large = Engine(model, page=4, num_pages=200).generate(prompts, sampling)
    assert list(map(outcome, requests)) == list(map(outcome, large))


def test_prompt_pages_are_reused(build):
    model = build()
    engine = Engine(model, page=4)
    prompt = list(range(40))
    first, second = (engine.generate([p], Sampling(max_new_tokens=4))[0] for p in (prompt, prompt))
    assert engine.stats().cached_prompt_tokens == 39
    assert engine.stats().prompt_tokens == 40 + 1
    assert outcome(first) == outcome(second)
    other = engine.generate([[*prompt[:22], 99, 98]], Sampling(max_new_tokens=4))[0]
    assert engine.stats().cached_prompt_tokens == 39 + 22
    alone = Engine(model, page=4).generate([other.prompt], other.sampling)[0]
    assert outcome(alone) == outcome(other)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_speculation_gives_the_same_tokens(build, temperature, draft_tokens):
    model = build()
    sampling = Sampling(max_new_tokens=40, temperature=temperature, seed=3)
    prompts = [[5, 6, 7], list(range(20))]
    plain = Engine(model).generate(prompts, sampling)
    engine = Engine(model, draft_tokens=draft_tokens)
    assert list(map(outcome, engine.generate(prompts, sampling))) == list(map(outcome, plain))
    assert engine.stats().drafted > 0


def test_right_drafts_are_accepted(build, monkeypatch):
    """Drafts that are the model's own tokens save steps."""
    model = build()
    sampling = Sampling(max_new_tokens=24, ignore_eos=True)
    plain = Engine(model, draft_tokens=1)
    expected = plain.generate([[5, 6, 7]], sampling)[0]
    engine = Engine(model, draft_tokens=1)

    def perfect(work, hidden, first_rows):
        for item in work:
            known = expected.known[item.request.length :]
            item.request.drafts = known[:1]

    monkeypatch.setattr(engine, "draft", perfect)
    request = engine.generate([[5, 6, 7]], sampling)[0]
    assert outcome(request) == outcome(expected)
    stats = engine.stats()
    assert stats.accepted == stats.drafted == 11 and stats.steps == 13


def test_end_tokens_and_reasons(build):
    model = build()
    free = Engine(model).generate([[5]], Sampling(max_new_tokens=10, ignore_eos=True))[0]
    assert free.finish_reason == "length" and len(free.tokens) == 10
    end = free.tokens[4]
    first = free.tokens.index(end)
    stopped = Engine(model).generate([[5]], Sampling(max_new_tokens=10, stop_tokens=(end,)))[0]
    assert stopped.finish_reason == "stop" and stopped.tokens == free.tokens[: first + 1]
    none = Engine(model).generate([[5]], Sampling(max_new_tokens=0))[0]
    assert none.finish_reason == "length" and none.tokens == []


def test_cancelled_requests_free_their_pages(build):
    engine = Engine(build(), page=4, num_pages=16, max_running=1)
    sampling = Sampling(max_new_tokens=20, ignore_eos=True)
    running, waiting = engine.submit([1, 2, 3], sampling), engine.submit([4, 5], sampling)
    engine.step()
    for request in (running, waiting):
        engine.cancel(request)
        assert request.finish_reason == "cancelled"
    assert not engine.has_work and engine.stats().pages_used == 0
    assert len(running.tokens) == 1 and engine.step() == []
    engine.cancel(running)
    assert running.finish_reason == "cancelled"


def test_text_and_stop_strings(build):
    model = build({"vocab_size": 256, "bos_token_id": 12})
    engine = Engine(model, ByteTokenizer(12))
    free = engine.generate([[12, 65]], Sampling(max_new_tokens=30, ignore_eos=True))[0]
    assert free.text == ByteTokenizer(12).decode(free.tokens)
    stop = free.text[9:12]
    sampling = Sampling(max_new_tokens=30, ignore_eos=True, stop=(stop,))
    stopped = "".join(update.text for update in engine.stream([12, 65], sampling))
    assert stopped == free.text[: free.text.index(stop)]


ERRORS = {
    "empty": ([], Sampling(), "the prompt is empty"),
    "vocabulary": ([5, 101], Sampling(), r"token 101 is outside \[0, 101\)"),
    "negative": ([-1], Sampling(), r"token -1 is outside"),
    "too_long": ([1] * 64, Sampling(), "a prompt of 64 tokens leaves no room"),
    "stop": ([1], Sampling(stop=("x",)), "stop strings need a tokenizer"),
}


@pytest.mark.parametrize(("prompt", "sampling", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_requests(build, prompt, sampling, message):
    engine = Engine(build(), page=4, num_pages=16)
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, sampling)
    assert not engine.has_work


def test_bad_engines(build):
    for name in ("num_pages", "page", "max_running", "max_batch_tokens"):
        with pytest.raises(ValueError, match=f"Engine: {name}: expected at least 1, got 0"):
            Engine(build(), **{name: 0})
    with pytest.raises(ValueError, match="cache_dtype: expected None or 'fp8', got 'int8'"):
        Engine(build(), cache_dtype="int8")
    with pytest.raises(ValueError, match="the checkpoint has no prediction layer"):
        Engine(build({"num_nextn_predict_layers": 0}), draft_tokens=1)


def test_fp8_cache(build):
    """The same in every batch, too, and close to the bf16 cache."""
    model = build(dtype=torch.bfloat16)
    prompts, sampling = [[5, 6, 7], list(range(40))], Sampling(max_new_tokens=5, ignore_eos=True)
    together = Engine(model, cache_dtype="fp8").generate(prompts, sampling)
    for request in together:
        engine = Engine(model, cache_dtype="fp8", max_batch_tokens=7, page=8)
        assert outcome(engine.generate([request.prompt], sampling)[0]) == outcome(request)
    real = Engine(model).generate(prompts, sampling)
    for ours, exact in zip(together, real, strict=True):
        assert abs(ours.samples[0].logprob - exact.samples[0].logprob) < 0.3
