"""Sampling against transformers' logits processors, its distribution, and batch invariance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as processors

from model.sampling import Sampling, kept_tokens, penalize, sample, uniform

VOCABULARY = 300


def oracle_kept(scores: torch.Tensor, s: Sampling) -> list[int]:
    """The tokens that transformers' processors keep of float64 scores [1, V]."""
    scores = processors.TemperatureLogitsWarper(s.temperature)(None, scores)
    if s.top_k:
        scores = processors.TopKLogitsWarper(s.top_k)(None, scores)
    if s.top_p < 1:
        scores = processors.TopPLogitsWarper(s.top_p)(None, scores)
    if s.min_p:
        scores = processors.MinPLogitsWarper(s.min_p)(None, scores)
    return scores[0].isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("size", [5, VOCABULARY, 5000], ids=["v5", "v300", "v5000"])
@pytest.mark.parametrize("top_k", [0, 1, 4, 1100])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.7, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_filters_keep_the_same_tokens_as_transformers(size, top_k, top_p, min_p, generator):
    scores = 4 * torch.randn(1, size, dtype=torch.float64, generator=generator.manual_seed(size))
    s = Sampling(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, weights = kept_tokens(scores[0].numpy(), s)
    ids = np.arange(size) if ids is None else ids
    assert ids.tolist() == oracle_kept(scores, s)
    expected = torch.softmax(scores[0, ids] / 0.7, -1).numpy()
    np.testing.assert_allclose(weights / weights.sum(), expected, rtol=1e-12)


def test_top_p_with_more_equal_logits_than_candidates():
    scores = np.zeros(4000)
    scores[7] = 1
    ids, _ = kept_tokens(scores, Sampling(temperature=1.0, top_p=0.5))
    assert ids is not None
    total = 3999 + math.e
    assert len(ids) == 1 + math.ceil((0.5 * total - math.e) / 1)
    assert ids.tolist() == list(range(len(ids)))  # the lower id of equal logits is more likely


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999])
@pytest.mark.parametrize("spread", [0.0, 0.5, 5.0])
def test_top_p_equals_a_sort_of_the_whole_vocabulary(top_p, spread, rng):
    scores = np.round(spread * rng.standard_normal(6000), 1)  # many equal logits
    ids, _ = kept_tokens(scores, Sampling(temperature=1.0, top_p=top_p))
    weights = np.exp(scores - scores.max())
    order = np.lexsort((np.arange(6000), -weights))
    sums, limit = weights[order].cumsum(), top_p * weights.sum()
    expected = [t for i, t in enumerate(order) if i == 0 or sums[i - 1] < limit]
    assert ids is not None and ids.tolist() == sorted(expected)


def test_repetition_penalty_equals_transformers(generator):
    scores = torch.randn(1, VOCABULARY, dtype=torch.float64, generator=generator)
    history = [3, 250, 3, 17, 299]
    expected = processors.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([history]), scores)
    assert np.array_equal(penalize(scores[0].numpy(), history, 1.7), expected[0].numpy())


def test_repetition_penalty_changes_a_greedy_token():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    s = Sampling(repetition_penalty=2.0)
    assert sample(logits, [s], [0], [[]])[0].token == 1
    repeated = sample(logits, [s], [1], [[1]])[0]
    assert repeated.token == 2
    assert repeated.logprob == pytest.approx(torch.log_softmax(logits, -1)[0, 2].item())


def test_uniform_numbers_are_uniform_and_independent():
    values = np.array([[uniform(seed, position) for position in range(256)] for seed in range(64)])
    assert ((values >= 0) & (values < 1)).all()
    counts, _ = np.histogram(values, 64, (0, 1))
    assert ((counts - 256) ** 2 / 256).sum() < 63 + 5 * math.sqrt(2 * 63)
    for a, b in ((values[:, 1:], values[:, :-1]), (values[1:], values[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(a.size)
    assert len(np.unique(values)) == values.size


def test_first_uniform_numbers_do_not_change():
    """Seeds of past runs keep their meaning: SplitMix64 twice, 53 bits."""
    assert [uniform(0, 0), uniform(1, 0), uniform(0, 1)] == [
        0.6524484863740322,
        0.36818951565166946,
        0.7012121095215252,
    ]
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.5}],
    ids=["plain", "top_k", "top_p", "min_p", "penalty"],
)
def test_sampled_tokens_have_the_distribution(options):
    """Chi-square of 8000 draws over 20 tokens with transformers' probabilities."""
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(3))
    s = Sampling(temperature=0.8, seed=5, **options)
    scores, history = logits.double(), [1, 4, 9]
    if s.repetition_penalty != 1:
        penalty = processors.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)
        scores = penalty(torch.tensor([history]), scores)
    kept = oracle_kept(scores.clone(), s)
    probabilities = torch.softmax(scores[0, kept] / 0.8, -1).numpy()
    rows, draws = 500, 8000
    counts = np.zeros(20)
    for start in range(0, draws, rows):
        positions = list(range(start, start + rows))
        for one in sample(logits.expand(rows, 20), [s] * rows, positions, [history] * rows):
            counts[one.token] += 1
    assert counts.sum() == counts[kept].sum() == draws
    expected = draws * probabilities
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    freedom = len(kept) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_sampled_token_inverts_the_cumulative_distribution(generator):
    logits = torch.randn(200, 40, generator=generator)
    s = Sampling(temperature=1.3, seed=11)
    tokens = [one.token for one in sample(logits, [s] * 200, list(range(200)), [[]] * 200)]
    sums = torch.softmax(logits.double() / 1.3, -1).cumsum(-1).numpy()
    for position, token in enumerate(tokens):
        below = sums[position, token - 1] if token else 0.0
        assert below - 1e-12 <= uniform(11, position) <= sums[position, token] + 1e-12


SAMPLINGS = [
    Sampling(),
    Sampling(logprobs=4),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=0.9, seed=3),
    Sampling(temperature=1.5, top_k=40, top_p=0.9, seed=4, logprobs=2),
    Sampling(temperature=0.6, top_p=0.95, seed=5),
    Sampling(temperature=1.0, min_p=0.02, repetition_penalty=0.8, seed=6),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [101, 256, 12929], ids=["v101", "v256", "v12929"])
def test_a_row_does_not_depend_on_the_other_rows(size, dtype, generator):
    logits = (3 * torch.randn(len(SAMPLINGS) * 3, size, generator=generator)).to(dtype)
    samplings, rows = SAMPLINGS * 3, len(logits)
    positions, histories = list(range(7, 7 + rows)), [[1, 5, row] for row in range(rows)]
    together = sample(logits, samplings, positions, histories)
    for row in range(rows):
        alone = sample(logits[row : row + 1], [samplings[row]], [positions[row]], [histories[row]])
        assert alone == [together[row]]
    order = torch.randperm(rows, generator=generator).tolist()[: rows // 2]
    shuffled = sample(
        logits[order],
        [samplings[i] for i in order],
        [positions[i] for i in order],
        [histories[i] for i in order],
    )
    assert shuffled == [together[i] for i in order]


def test_logprobs_are_those_of_the_raw_logits(generator):
    logits = 3 * torch.randn(4, 500, generator=generator)
    s = Sampling(temperature=0.5, top_k=3, repetition_penalty=1.4, seed=1, logprobs=6)
    expected = torch.log_softmax(logits.double(), -1)
    for row, one in enumerate(sample(logits, [s] * 4, [9] * 4, [[1, 2, 3]] * 4)):
        assert one.logprob == pytest.approx(expected[row, one.token].item(), abs=1e-12)
        values, tokens = expected[row].topk(6)
        assert [token for token, _ in one.top] == tokens.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-12)


def test_equal_logits_give_the_lowest_id():
    logits = torch.zeros(2, 70)
    logits[1, [40, 60]] = 1
    greedy = sample(logits, [Sampling(logprobs=3)] * 2, [0, 0], [[], []])
    assert [one.token for one in greedy] == [0, 40]
    assert [token for token, _ in greedy[0].top] == [0, 1, 2]
    assert [token for token, _ in greedy[1].top] == [40, 60, 0]


def test_more_logprobs_than_tokens():
    (one,) = sample(torch.zeros(1, 3), [Sampling(logprobs=9)], [0], [[]])
    assert [token for token, _ in one.top] == [0, 1, 2]


def test_masked_logits_are_never_sampled():
    logits = torch.full((64, 10), -math.inf)
    logits[:, 3], logits[:, 7] = 0.0, 0.0
    for temperature in (1.0, 1e-320, 1e300):
        s = Sampling(temperature=temperature, seed=2)
        tokens = {one.token for one in sample(logits, [s] * 64, list(range(64)), [[]] * 64)}
        assert tokens == {3, 7}


def test_a_tiny_temperature_is_greedy(generator):
    logits = torch.randn(8, 50, generator=generator)
    s = Sampling(temperature=1e-310, seed=9)
    tokens = [one.token for one in sample(logits, [s] * 8, list(range(8)), [[]] * 8)]
    assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_logits_that_are_not_numbers_are_refused(value):
    logits = torch.zeros(3, 5)
    logits[1, 2] = value
    with pytest.raises(ValueError, match="row 1"):
        sample(logits, [Sampling()] * 3, [0] * 3, [[]] * 3)


def test_sizes_that_differ_are_refused():
    for logits, count in (
        (torch.zeros(2, 5), 1),
        (torch.zeros(5), 5),
        (torch.zeros(1, 5).int(), 1),
    ):
        with pytest.raises(ValueError, match=r"real \[N, V\]"):
            sample(logits, [Sampling()] * count, [0] * count, [[]] * count)
    assert sample(torch.zeros(0, 5), [], [], []) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("top_p", 1.1),
        ("top_p", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-308),
        ("temperature", 10**400),
        ("repetition_penalty", math.inf),
        ("seed", 2**64),
        ("seed", None),
        ("max_new_tokens", -1),
        ("stop", "text"),
        ("stop", ("",)),
        ("stop_tokens", (1.5,)),
        ("stop_tokens", [1]),
        ("ignore_eos", 1),
        ("logprobs", -1),
    ],
)
def test_sampling_refuses(field, value):
    with pytest.raises(ValueError, match=f"sampling: {field} = .*, expected "):
        Sampling(**{field: value})
