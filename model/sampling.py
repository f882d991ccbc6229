"""Sampling: logits of one position per request -> one token per request.

    token ~ softmax(filter(penalize(logits) / temperature))

Filters keep, in this order, the `top_k` most likely tokens, the smallest set of most likely tokens
with probability `top_p`, and tokens of at least `min_p` times the highest probability.  The token
is the inverse of the cumulative distribution over the kept tokens, in order of their ids, at one
uniform number.  That number is a function of (seed, position), so no state passes from one step
to the next.  A row's result is the same, bit for bit, for any other rows of the batch.

    sampling = Sampling(temperature=0.6, top_p=0.95, seed=1)
    (next_token,) = sample(logits, [sampling], [len(history)], [history])  # logits [1, V]

Parallelization: none.  Rows are computed on the CPU in float64; reductions run along one row.
Speed: exp and the sum over the vocabulary; a sort of 1024 candidates only with `top_p`.
Source: nucleus sampling (arXiv:1904.09751), min-p (arXiv:2407.01082), the repetition penalty of
CTRL (arXiv:1909.05858), SplitMix64 (Steele et al., OOPSLA 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

CANDIDATES = 1024  # the most likely tokens, sorted before all tokens are
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled, and when it ends.

    Raises ValueError that names the field, its value and what is expected.
    """

    temperature: float = 0.0  # 0: greedy; the filters then have no effect
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of every token of the prompt and the output; 1: none
    seed: int = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_tokens: tuple[int, ...] = ()  # in addition to the end tokens of the model
    ignore_eos: bool = False  # the end tokens of the model do not end the request
    logprobs: int = 0  # number of most likely tokens that are reported with each token

    def __post_init__(self) -> None:
        self._require_number("temperature", 0, 1e300, "a finite number of at least 0")
        self._require_number("top_p", 0, 1, "a number from 0 to 1")
        self._require_number("min_p", 0, 1, "a number from 0 to 1")
        self._require_number("repetition_penalty", 0.01, 100, "a number from 0.01 to 100")
        for name in ("top_k", "max_new_tokens", "logprobs"):
            self._require_integer(name, 0, 2**63, "an integer of at least 0")
        self._require_integer("seed", -(2**63), 2**64, "an integer from -2**63 to 2**64 - 1")
        strings = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        self._require(strings, "stop", "a tuple of non-empty strings")
        tokens = isinstance(self.stop_tokens, tuple) and all(map(_is_integer, self.stop_tokens))
        self._require(tokens, "stop_tokens", "a tuple of integers")
        self._require(isinstance(self.ignore_eos, bool), "ignore_eos", "True or False")

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"sampling: {name} = {getattr(self, name)!r}, expected {expected}")

    def _require_number(self, name: str, least: float, most: float, expected: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        self._require(number and least <= value <= most, name, expected)

    def _require_integer(self, name: str, least: int, end: int, expected: str) -> None:
        value = getattr(self, name)
        self._require(_is_integer(value) and least <= value < end, name, expected)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Sample(NamedTuple):
    """A token and its log-probability.

    Log-probabilities are those of the model, log_softmax of the logits in float64, before the
    penalty, the temperature and the filters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # `Sampling.logprobs` most likely (token, logprob)


def uniform(seed: int, position: int) -> float:
    """A float64 in [0, 1) with 53 random bits, a function of (seed, position): SplitMix64."""
    state = _mix(seed + 0x9E3779B97F4A7C15)
    return (_mix(state + 0x9E3779B97F4A7C15 * (position + 1)) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def sample(
    logits: Tensor,
    samplings: list[Sampling],
    positions: list[int],
    histories: list[Sequence[int]],
) -> list[Sample]:
    """Samples one token per row.

    logits: real [N, V], any float dtype and device.  samplings, positions, histories: N each; a
    position is the index of the new token in its sequence; a history has all tokens before it and
    is read only with a repetition penalty.

    Raises:
        ValueError: the sizes differ, or a row has NaN, +inf or no finite logit.
    """
    sizes = len(samplings), len(positions), len(histories)
    if logits.dim() != 2 or not logits.is_floating_point() or sizes != (len(logits),) * 3:
        got = f"{logits.dtype} {list(logits.shape)} and {sizes} samplings, positions, histories"
        raise ValueError(f"sample: logits: expected real [N, V] and N of each, got {got}")
    scores = logits.detach().cpu().double().contiguous().numpy()
    if not samplings:
        return []
    row_max = scores.max(-1)
    if not np.isfinite(row_max).all():
        row = int(np.flatnonzero(~np.isfinite(row_max))[0])
        raise ValueError(f"sample: logits: row {row} has the maximum {row_max[row]}")
    tokens = scores.argmax(-1).tolist()  # the lowest id of equal logits
    shifted, log_sums = normalize(scores)
    for row, sampling in enumerate(samplings):
        if sampling.temperature > 0 or sampling.repetition_penalty != 1:
            tokens[row] = _choose(scores[row], sampling, positions[row], histories[row])
    values = (shifted[np.arange(len(tokens)), tokens] - log_sums).tolist()
    return [
        Sample(token, value, _most_likely(shifted[row] - log_sums[row], s.logprobs))
        if s.logprobs
        else Sample(token, value, ())
        for row, (token, value, s) in enumerate(zip(tokens, values, samplings, strict=True))
    ]


def normalize(scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Logits [N, V] less the maximum of their row, and the log of the sum of their exp, [N]."""
    shifted = scores - scores.max(-1)[:, None]
    # The rows of a contiguous array are summed one by one, each in the order of its own elements.
    return shifted, np.log(np.exp(shifted).sum(-1))


def log_probabilities(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """logits real [N, V], a token per row -> the `Sample.logprob` of each, without sampling."""
    shifted, log_sums = normalize(logits.detach().cpu().double().contiguous().numpy())
    return list((shifted[np.arange(len(tokens)), list(tokens)] - log_sums).tolist())


def _choose(scores: FloatArray, s: Sampling, position: int, history: Sequence[int]) -> int:
    """The token of one row of logits [V]."""
    if s.repetition_penalty != 1 and len(history):
        scores = penalize(scores, history, s.repetition_penalty)
    if s.temperature == 0:
        return int(scores.argmax())
    ids, weights = kept_tokens(scores, s)
    cumulative = weights.cumsum()
    # Below the last sum: rounding must not select a token past the end or one of weight 0.
    target = min(uniform(s.seed, position) * cumulative[-1], np.nextafter(cumulative[-1], 0))
    index = int(cumulative.searchsorted(target, side="right"))
    return index if ids is None else int(ids[index])


def penalize(scores: FloatArray, history: Sequence[int], penalty: float) -> FloatArray:
    """Logits [V] with those of the tokens in `history` divided by `penalty`; multiplied if < 0."""
    scores = scores.copy()
    ids = np.unique(np.asarray(history, dtype=np.int64))
    repeated = scores[ids]
    scores[ids] = np.where(repeated < 0, repeated * penalty, repeated / penalty)
    return scores


def kept_tokens(scores: FloatArray, s: Sampling) -> tuple[IntArray | None, FloatArray]:
    """The filters on logits [V] -> ids of the kept tokens, ascending, and their weights.

    A weight is a probability times a constant.  The ids are None if all V tokens are kept.  Of
    equal logits the lower id counts as the more likely one; `top_k` keeps all that equal its last.
    """
    with np.errstate(over="ignore"):  # a difference over a tiny temperature is -inf
        scaled = (scores - scores.max()) / s.temperature
    ids: IntArray | None = None
    if 0 < s.top_k < len(scaled):
        least = np.partition(scaled, len(scaled) - s.top_k)[len(scaled) - s.top_k]
        ids = np.flatnonzero(scaled >= least)
        scaled = scaled[ids]
    weights = np.exp(scaled)
    if s.top_p < 1:
        kept = _nucleus(weights, s.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    if s.min_p > 0:
        kept = np.flatnonzero(weights >= s.min_p)  # the weight of the most likely token is 1
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def _nucleus(weights: FloatArray, top_p: float) -> IntArray:
    """Indices, ascending, of the most likely tokens: those before each sum to less than top_p.

    The candidates are sorted first.  If their sum reaches top_p, the result is that of the sort of
    all: both add the same weights in the same order.
    """
    limit, count = top_p * weights.sum(), len(weights)
    order = np.arange(count)
    if count > CANDIDATES:
        least = np.partition(weights, count - CANDIDATES)[count - CANDIDATES]
        order = np.flatnonzero(weights >= least)  # more than CANDIDATES if some are equal
    order = order[np.argsort(-weights[order], kind="stable")]
    sums = weights[order].cumsum()
    if len(order) < count and sums[-1] < limit:
        order = np.argsort(-weights, kind="stable")
        sums = weights[order].cumsum()
    kept = 1 + int(sums[:-1].searchsorted(limit, side="left"))
    return np.sort(order[:kept])


def _most_likely(logprobs: FloatArray, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens of logprobs [V], most likely first, then by id."""
    ids = np.arange(len(logprobs))
    if count < len(logprobs):
        least = np.partition(logprobs, len(logprobs) - count)[len(logprobs) - count]
        ids = np.flatnonzero(logprobs >= least)
    ids = ids[np.argsort(-logprobs[ids], kind="stable")][:count]
    return tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))
