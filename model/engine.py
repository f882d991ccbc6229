"""Many requests at once: continuous batching over a paged cache.

Every step is one forward pass over rows of several requests: one row for each that generates, and
as many tokens of waiting prompts as the budget of rows allows.  When pages run out, the youngest
request gives up its own, waits, and computes them again later.

A request's tokens and log-probabilities have the same bits alone, in any batch, with any chunks,
with or without reused pages, preemption or speculation: every op computes a row from the row alone
(`batch.py`), and a random number is a function of the seed and the position (`sampling.py`).

Speculation: the prediction layer of the checkpoint proposes `draft_tokens` tokens, and the next
step runs the model on them too.  The model samples at each of those positions as always; a draft is
accepted if it equals the sample.  So the output is that of plain decoding, greedy or sampled.

    engine = Engine(DeepSeek.from_pretrained(folder), load_tokenizer(folder))
    for update in engine.stream(tokenizer.encode("def main("), Sampling(max_new_tokens=40)):
        print(update.text, end="")

Source: continuous batching is from Orca (OSDI 2022), paging and preemption from vLLM
(arXiv:2309.06180); prediction layers as drafts from the DeepSeek-V3 report, section 2.2.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deepkern.arithmetic import cdiv
from model.batch import Segment, TokenBatch, build_batch
from model.cache import PAGE
from model.deepseek import DeepSeek
from model.graph import DecodeGraphs
from model.request import EngineStats, Request, Update, Work
from model.sampling import Sample, Sampling, log_probabilities, sample
from model.schedule import Scheduler
from model.text import TextStream
from model.tokenizer import Tokenizer

POOL_TOKENS = 32768  # of a pool whose size is not given


class Engine:
    """Runs requests on a model.  One thread owns an engine.

    Args:
        model: on any device and backend.
        tokenizer: for text and stop strings; None: tokens only.
        num_pages: pages of the pool, of `page` tokens each.  None: 32768 tokens.
        cache_dtype: "fp8" for latents in FP8, or None for the model's dtype.
        max_batch_tokens: rows of a step at most.
        max_running: requests that own pages at most, each with a row for itself and its drafts.
        draft_tokens: tokens that the prediction layer proposes per step.
        reuse_prompts: whether requests share the pages of equal prompts.
        graphs: whether decode steps are CUDA graphs; None: on one GPU, if the indexer is FP8 or
            there is none.
    """

    def __init__(
        self,
        model: DeepSeek,
        tokenizer: Tokenizer | None = None,
        *,
        num_pages: int | None = None,
        page: int = PAGE,
        cache_dtype: str | None = None,
        max_batch_tokens: int = 512,
        max_running: int = 64,
        draft_tokens: int = 0,
        reuse_prompts: bool = True,
        graphs: bool | None = None,
    ) -> None:
        if cache_dtype not in (None, "fp8"):
            raise ValueError(f"Engine: cache_dtype: expected None or 'fp8', got {cache_dtype!r}")
        if draft_tokens and not model.config.num_nextn_predict_layers:
            raise ValueError("Engine: draft_tokens: the checkpoint has no prediction layer")
        num_pages = cdiv(POOL_TOKENS, max(page, 1)) if num_pages is None else num_pages
        rows = 1 + draft_tokens
        for name, value, least in (
            ("num_pages", num_pages, 1),
            ("page", page, 1),
            ("draft_tokens", draft_tokens, 0),
            ("max_running", max_running, 1),
            ("max_batch_tokens", max_batch_tokens, rows),
        ):
            if value < least:
                raise ValueError(f"Engine: {name}: expected at least {least}, got {value}")
        self.model, self.tokenizer, self.draft_tokens = model, tokenizer, draft_tokens
        self.pool = model.new_pool(num_pages, page, cache_dtype == "fp8")
        max_running = min(max_running, max_batch_tokens // rows)
        self.scheduler = Scheduler(self.pool, max_batch_tokens, max_running, reuse_prompts)
        self.counters, self.ids = EngineStats(), itertools.count()
        config, index_keys = model.config, self.pool.index_keys
        self.max_length = min(config.max_position_embeddings, num_pages * page)
        if graphs is None:
            real_index = index_keys is not None and index_keys.dtype != torch.uint8
            one_gpu = model.device.type == "cuda" and model.ranks.processes == 1
            graphs = one_gpu and not real_index
        self.graphs = None
        if graphs:
            pages = cdiv(self.max_length, page)
            self.graphs = DecodeGraphs(model, self.pool, max_running * rows, pages)

    # requests

    def submit(self, prompt: list[int], sampling: Sampling = Sampling()) -> Request:  # noqa: B008
        """Queues a request.

        Raises:
            ValueError: the prompt is empty, has a token outside the vocabulary or is too long for
                the model or the pool; or there are stop strings and no tokenizer.
            TypeError: a token is not an integer.
        """
        config = self.model.config
        prompt = [operator.index(token) for token in prompt]  # also integers of numpy
        if not prompt:
            raise ValueError("Engine: the prompt is empty")
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise ValueError(f"Engine: token {token} is outside [0, {config.vocab_size})")
        room = self.max_length - len(prompt)
        if room < 1:
            text = f"Engine: a prompt of {len(prompt)} tokens leaves no room for a new one"
            raise ValueError(f"{text}: at most {self.max_length} fit")
        if sampling.stop and self.tokenizer is None:
            raise ValueError("Engine: stop strings need a tokenizer")
        request = Request(next(self.ids), prompt, sampling, list(prompt))
        request.max_tokens = min(sampling.max_new_tokens, room)
        ends = () if sampling.ignore_eos else config.eos_token_ids
        request.stop_tokens = frozenset([*ends, *sampling.stop_tokens])
        if self.tokenizer is not None:
            request.stream = TextStream(self.tokenizer.decoder(), sampling.stop)
        self.scheduler.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request; it keeps what it has.  A finished one does not change."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"
            self.scheduler.remove(request)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def stats(self) -> EngineStats:
        """A copy of the counters."""
        scheduler, allocator = self.scheduler, self.scheduler.allocator
        return replace(
            self.counters,
            cached_prompt_tokens=scheduler.reused_tokens,
            preemptions=scheduler.preemptions,
            running=self.num_running,
            waiting=self.num_waiting,
            pages_used=allocator.num_pages - allocator.num_available,
            pages_total=allocator.num_pages,
        )

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling | list[Sampling] = Sampling(),  # noqa: B008
    ) -> list[Request]:
        """Runs the prompts to their ends; results are in their order.

        One `sampling` for all means the same random numbers for all; equal prompts then have equal
        results.  If the call raises, the requests are cancelled.
        """
        if isinstance(sampling, Sampling):
            sampling = [sampling] * len(prompts)
        requests: list[Request] = []
        try:
            for prompt, one in zip(prompts, sampling, strict=True):
                requests.append(self.submit(prompt, one))
            while any(request.finish_reason is None for request in requests):
                self.step()
        finally:
            for request in requests:
                self.cancel(request)
        return requests

    def stream(self, prompt: list[int], sampling: Sampling = Sampling()) -> Iterator[Update]:  # noqa: B008
        """Runs one prompt and yields its updates; a caller that stops cancels it."""
        request = self.submit(prompt, sampling)
        try:
            while request.finish_reason is None:
                yield from (update for update in self.step() if update.request is request)
        finally:
            self.cancel(request)

    @torch.inference_mode()
    def score(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """The log-probability of each of `tokens` after `prompt`, with the bits of `generate`.

        Raises:
            ValueError: they do not fit in the free pages of the pool.
        """
        request = Request(-1, prompt, Sampling(), prompt + tokens)
        allocator, last = self.scheduler.allocator, request.length - 1  # which needs no row
        number = cdiv(last, self.pool.page_size)
        if not prompt or number > allocator.num_available or last > self.max_length:
            raise ValueError(f"Engine: score: {request.length} tokens do not fit")
        pages = [allocator.allocate() for _ in range(number)]
        request.pages = [page for page in pages if page is not None]
        scores: list[float] = []
        for start in range(0, last, self.scheduler.budget):
            work = Work(request, start, min(start + self.scheduler.budget, last), 0)
            hidden = self.run(self.build([work])[0])
            first = max(start, len(prompt) - 1)  # the first row that predicts one of `tokens`
            if first < work.stop:
                logits = self.model.logits(hidden[first - start :])
                scores += log_probabilities(logits, request.known[first + 1 : work.stop + 1])
        allocator.release(request.pages)
        return scores

    # one step

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """One forward pass; returns what it added.  Nothing if there is no work."""
        scheduler = self.scheduler
        finished = [self.finish_empty(r) for r in list(scheduler.waiting) if r.max_tokens == 0]
        work = scheduler.next_work()
        if not work:
            return finished
        self.counters.steps += 1
        batch, first_rows = self.build(work)
        hidden = self.run(batch)
        updates = self.sample_all(work, hidden, first_rows)
        if self.draft_tokens:
            self.draft(work, hidden, first_rows)
        for update in updates:
            if update.finish_reason is not None:
                scheduler.remove(update.request)
        return finished + updates

    def run(self, batch: TokenBatch) -> Tensor:
        """The hidden states of the batch in the order of its tokens, [N, hidden]."""
        if self.graphs is not None and self.graphs.fits(batch):
            return self.graphs.run(batch)
        return batch.in_order(self.model.run(batch, self.pool))

    def finish_empty(self, request: Request) -> Update:
        """A request for no tokens."""
        self.scheduler.remove(request)
        request.finish_reason = "length"
        return Update(request, [], "", "length")

    def build(self, work: list[Work]) -> tuple[TokenBatch, list[int]]:
        """The batch, and the first row of each piece of work, in the order of the work."""
        tokens: list[int] = []
        first_rows, segments = [], []
        for item in work:
            first_rows.append(len(tokens))
            request = item.request
            known = request.known + request.drafts if request.drafts else request.known
            tokens += known[item.start : item.stop]
            segments += item.segments()
        return self.batch_of(tokens, segments), first_rows

    def batch_of(self, tokens: list[int], segments: list[Segment]) -> TokenBatch:
        table = self.model.rotary_table(max(segment.stop for segment in segments))
        return build_batch(torch.tensor(tokens), segments, self.pool.page_size, table)

    # after the forward pass

    def sample_all(self, work: list[Work], hidden: Tensor, first_rows: list[int]) -> list[Update]:
        """Draws the next tokens of the requests whose known tokens are all computed."""
        rows, samplings, positions, histories = [], [], [], []
        for item, first in zip(work, first_rows, strict=True):
            request = item.request
            prompt = min(item.stop, len(request.prompt)) - min(item.start, len(request.prompt))
            self.counters.prompt_tokens += prompt
            known = request.known + request.drafts if request.drafts else request.known
            for position in range(request.length - 1, item.stop):
                rows.append(first + position - item.start)
                samplings.append(request.sampling)
                positions.append(position + 1)
                penalty = request.sampling.repetition_penalty
                histories.append(known[: position + 1] if penalty != 1 else ())
        samples: Iterator[Sample | None] = iter(())
        if rows:
            logits = self.model.logits(take(hidden, rows))
            samples = iter(sample_finite(logits, samplings, positions, histories))
        updates = []
        for item in work:
            request, count = item.request, max(0, item.stop - item.request.length + 1)
            drawn = [next(samples) for _ in range(count)]
            request.computed = item.stop
            self.scheduler.offer_pages(request)
            if drawn:
                updates.append(self.accept(request, item.drafts, drawn))
        return updates

    def accept(self, request: Request, num_drafts: int, drawn: list[Sample | None]) -> Update:
        """Appends the first sample, and each further one while the draft before it was right.

        None instead of a sample ends the request with an error.
        """
        drafts, request.drafts = request.drafts[:num_drafts], []
        first_length, text_before = request.length, len(request.text)
        accepted = 0
        for number, one in enumerate(drawn):
            if one is None:
                request.finish_reason = "error"
                break
            request.append(one)
            self.counters.generated_tokens += 1
            if request.finish_reason is not None or number == len(drafts):
                break
            if drafts[number] != one.token:
                break
            accepted += 1
        self.counters.drafted += len(drafts)
        self.counters.accepted += accepted
        request.computed = first_length + min(accepted, request.length - first_length)
        new = request.known[first_length:]
        return Update(request, new, request.text[text_before:], request.finish_reason)

    def draft(self, work: list[Work], hidden: Tensor, first_rows: list[int]) -> None:
        """Runs the prediction layer on the rows of the step and proposes the next tokens."""
        rows: list[int] = []
        tokens: list[int] = []
        segments: list[Segment] = []
        proposing: dict[int, Request] = {}  # by the row of the state to propose from
        for item, first in zip(work, first_rows, strict=True):
            request = item.request
            stop = min(item.stop, request.computed)  # rows of rejected drafts are left out
            if request.finish_reason is not None or stop <= item.start:
                continue
            rows += range(first, first + stop - item.start)
            tokens += request.known[item.start + 1 : stop + 1]
            segments += Work(request, item.start, stop, 0).segments()
            if request.computed == request.length - 1 and self.can_propose(request):
                proposing[len(rows) - 1] = request
        if not rows:
            return
        state = self.predict(tokens, segments, take(hidden, rows))
        while proposing:
            state = take(state, list(proposing))
            best = self.model.prediction_logits(state).argmax(-1).tolist()
            for request, token in zip(proposing.values(), best, strict=True):
                request.drafts.append(token)
            # The prediction layer goes on from its own state, as long as there are pages.
            able = [(k, r) for k, r in enumerate(proposing.values()) if self.can_propose(r)]
            if not able:
                return
            last = [request.length + len(request.drafts) - 2 for _, request in able]
            segments = [
                Segment(p, p + 1, r.pages, False) for p, (_, r) in zip(last, able, strict=True)
            ]
            rows = [k for k, _ in able]
            state = self.predict([best[k] for k in rows], segments, take(state, rows))
            proposing = {row: request for row, (_, request) in enumerate(able)}

    def can_propose(self, request: Request) -> bool:
        """Whether to draft one more token, for which the prediction layer caches one more."""
        drafts = len(request.drafts)
        fits = request.length + drafts - 2 < len(request.pages) * self.pool.page_size
        useful = len(request.samples) + drafts + 1 < request.max_tokens
        return fits and useful and drafts < self.draft_tokens

    def predict(self, tokens: list[int], segments: list[Segment], hidden: Tensor) -> Tensor:
        """The states of the prediction layer, [N, hidden], in the order of the tokens."""
        batch = self.batch_of(tokens, segments)
        if batch.order is not None:
            hidden = hidden[batch.order.argsort()]
        return batch.in_order(self.model.run_prediction(hidden, batch, self.pool))


def take(rows: Tensor, index: list[int]) -> Tensor:
    """Some rows of a tensor."""
    return rows[torch.tensor(index, device=rows.device)]


def sample_finite(
    logits: Tensor,
    samplings: list[Sampling],
    positions: list[int],
    histories: list[Sequence[int]],
) -> list[Sample | None]:
    """As `sample`, but None for a row of logits that has a NaN, +inf or no finite value."""
    finite = logits.amax(-1).isfinite()
    if finite.all():
        return list(sample(logits, samplings, positions, histories))
    samples = sample(logits.where(finite[:, None], 0), samplings, positions, histories)
    return [s if ok else None for s, ok in zip(samples, finite.tolist(), strict=True)]


def generate(
    model: DeepSeek,
    tokens: Tensor | list[list[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> Tensor | list[list[int]]:
    """`DeepSeek.generate`: all prompts at once, on an engine of their own."""
    prompts = tokens
    if isinstance(tokens, Tensor):
        model.check_tokens(tokens)
        prompts = tokens.tolist()
    most = model.config.max_position_embeddings
    pages = sum(cdiv(min(len(prompt) + max_new_tokens, most), PAGE) for prompt in prompts)
    count = max(1, len(prompts))
    engine = Engine(
        model, num_pages=max(1, pages), max_running=count, reuse_prompts=False, graphs=False
    )
    sampling = replace(sampling or Sampling(), max_new_tokens=max_new_tokens)
    each = [replace(sampling, seed=sampling.seed + k) for k in range(len(prompts))]
    results = [request.known for request in engine.generate(prompts, each)]
    if not isinstance(tokens, Tensor):
        return results
    longest = max(map(len, results), default=tokens.shape[1])
    rows = [row + row[-1:] * (longest - len(row)) for row in results]
    return torch.tensor(rows, device=tokens.device).view(len(rows), longest)
