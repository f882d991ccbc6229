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
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from model.batch import Segment, TokenBatch, build_batch
from model.cache import PAGE
from model.deepseek import DeepSeek
from model.graph import DecodeGraphs
from model.pages import ROOT, PageAllocator
from model.request import EngineStats, Request, Update, Work, end_tokens
from model.sampling import Sample, Sampling, sample
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
        max_running: requests that own pages at most.
        draft_tokens: tokens that the prediction layer proposes per step.
        reuse_prompts: whether requests share the pages of equal prompts.
        graphs: whether decode steps are CUDA graphs; None: on a GPU, if the indexer is FP8 or
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
        per_request = 1 + draft_tokens
        if max_batch_tokens < max_running * per_request:
            max_running = max(1, max_batch_tokens // per_request)
        self.model, self.tokenizer = model, tokenizer
        num_pages = -(-POOL_TOKENS // page) if num_pages is None else num_pages
        self.pool = model.new_pool(num_pages, page, cache_dtype == "fp8")
        self.allocator = PageAllocator(num_pages, page)
        self.page, self.budget, self.max_running = page, max_batch_tokens, max_running
        self.draft_tokens, self.reuse_prompts = draft_tokens, reuse_prompts
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the oldest first
        self.counters, self.ids = EngineStats(), itertools.count()
        real_index = self.pool.index_keys is not None and self.pool.index_keys.dtype != torch.uint8
        if graphs is None:
            graphs = model.device.type == "cuda" and not real_index
        self.graphs = self.new_graphs() if graphs else None

    def new_graphs(self) -> DecodeGraphs:
        """Graphs for every batch of generated tokens."""
        longest = min(
            self.model.config.max_position_embeddings, len(self.allocator.owners) * self.page
        )
        rows = self.max_running * (1 + self.draft_tokens)
        return DecodeGraphs(self.model, self.pool, rows, -(-longest // self.page))

    # requests

    def submit(self, prompt: list[int], sampling: Sampling = Sampling()) -> Request:  # noqa: B008
        """Queues a request.

        Raises:
            ValueError: the prompt is empty, has a token outside the vocabulary or is too long for
                the model or the pool; or there are stop strings and no tokenizer.
        """
        config = self.model.config
        if not prompt:
            raise ValueError("Engine: the prompt is empty")
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise ValueError(f"Engine: token {token} is outside [0, {config.vocab_size})")
        room = min(config.max_position_embeddings, self.allocator.num_pages * self.page)
        room -= len(prompt)
        if room < 1:
            text = f"Engine: a prompt of {len(prompt)} tokens leaves no room for a new one"
            raise ValueError(f"{text}: at most {room + len(prompt)} fit")
        if sampling.stop and self.tokenizer is None:
            raise ValueError("Engine: stop strings need a tokenizer")
        request = Request(next(self.ids), list(prompt), sampling, list(prompt))
        request.max_tokens = min(sampling.max_new_tokens, room)
        ends = set() if sampling.ignore_eos else end_tokens(config.eos_token_id)
        request.stop_tokens = frozenset(ends | set(sampling.stop_tokens))
        if self.tokenizer is not None:
            request.stream = TextStream(self.tokenizer.decoder(), sampling.stop)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request; it keeps what it has.  A finished one does not change."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"
            if request in self.waiting:
                self.waiting.remove(request)
            if request in self.running:
                self.running.remove(request)
            self.give_up_pages(request)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def stats(self) -> EngineStats:
        """A copy of the counters."""
        used = self.allocator.num_pages - self.allocator.num_available
        state = {"running": self.num_running, "waiting": self.num_waiting, "pages_used": used}
        state["pages_total"] = self.allocator.num_pages
        return EngineStats(**{**vars(self.counters), **state})

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling | list[Sampling] = Sampling(),  # noqa: B008
    ) -> list[Request]:
        """Runs the prompts to their ends; results are in their order."""
        if isinstance(sampling, Sampling):
            sampling = [sampling] * len(prompts)
        requests = [self.submit(p, s) for p, s in zip(prompts, sampling, strict=True)]
        while any(request.finish_reason is None for request in requests):
            self.step()
        return requests

    def stream(self, prompt: list[int], sampling: Sampling = Sampling()) -> Iterator[Update]:  # noqa: B008
        """Runs one prompt and yields its updates; a caller that stops cancels it."""
        request = self.submit(prompt, sampling)
        try:
            while request.finish_reason is None:
                yield from (update for update in self.step() if update.request is request)
        finally:
            self.cancel(request)

    # one step

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """One forward pass; returns what it added.  Nothing if there is no work."""
        finished = [self.finish_empty(r) for r in list(self.waiting) if r.max_tokens == 0]
        work = self.schedule()
        if not work:
            return finished
        self.counters.steps += 1
        batch, first_rows = self.build(work)
        if self.graphs is not None and self.graphs.fits(batch):
            hidden = self.graphs.run(batch)
        else:
            hidden = batch.in_order(self.model.run(batch, self.pool))
        updates = self.sample_all(work, hidden, first_rows)
        if self.draft_tokens:
            self.draft(work, hidden, first_rows)
        for request in [r for r in self.running if r.finish_reason is not None]:
            self.running.remove(request)
            self.give_up_pages(request)
        return finished + updates

    def finish_empty(self, request: Request) -> Update:
        """A request for no tokens."""
        self.waiting.remove(request)
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
        return build_batch(torch.tensor(tokens), segments, self.page, table)

    # scheduling

    def schedule(self) -> list[Work]:
        """The rows of the next step: generating requests first, then prompts by age."""
        work: dict[int, Work] = {}
        budget = self.budget
        by_need = sorted(self.running, key=lambda r: r.length - r.computed > 1)
        for request in by_need:
            if request in self.running:  # it may have been preempted meanwhile
                budget -= self.add_work(request, budget, work)
        while budget > 0 and self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            self.reuse(request)
            if not self.allocate(request, self.next_stop(request, budget), preempt=False):
                self.give_up_pages(request)
                break
            self.counters.cached_prompt_tokens += request.computed
            self.running.append(self.waiting.popleft())
            budget -= self.add_work(request, budget, work)
        return list(work.values())

    def next_stop(self, request: Request, budget: int) -> int:
        """One past the last position of the request's next rows, drafts included."""
        last = len(request.prompt) + request.max_tokens - 1  # where the last token is drawn
        return min(request.length + len(request.drafts), request.computed + budget, last)

    def add_work(self, request: Request, budget: int, work: dict[int, Work]) -> int:
        """Adds the next rows of a request; returns their number, 0 if there are no pages."""
        stop = self.next_stop(request, budget)
        if budget <= 0 or not self.allocate(request, stop, preempt=True, work=work):
            return 0
        work[request.id] = Work(request, request.computed, stop, max(0, stop - request.length))
        return stop - request.computed

    def allocate(
        self, request: Request, stop: int, preempt: bool, work: dict[int, Work] | None = None
    ) -> bool:
        """Pages for positions up to `stop`; with `preempt`, at the expense of younger requests."""
        while len(request.pages) * self.page < stop:
            page = self.allocator.allocate()
            if page is not None:
                request.pages.append(page)
                continue
            if not preempt:
                return False
            victim = self.running[-1]
            self.running.remove(victim)
            self.give_up_pages(victim)
            self.waiting.appendleft(victim)
            self.counters.preemptions += 1
            if work is not None:
                work.pop(victim.id, None)
            if victim is request:
                return False
        return True

    def reuse(self, request: Request) -> None:
        """Starts a request from the cached pages of an equal prompt."""
        if not self.reuse_prompts or request.pages:
            return
        pages, partial, length, keys = self.allocator.reuse(request.prompt)
        request.pages, request.keys = pages, keys
        request.computed = len(pages) * self.page
        if partial is not None:
            self.allocator.own(partial)  # so that the copy does not take its place
            page = self.allocator.allocate()
            if page is not None:
                self.pool.copy_page(partial, page)
                request.pages.append(page)
                request.computed = length
            self.allocator.release([partial])

    def give_up_pages(self, request: Request) -> None:
        """Releases the pages; what they hold has to be computed again."""
        self.allocator.release(request.pages)
        request.pages, request.keys, request.drafts = [], [], []
        request.computed = 0

    def offer_pages(self, request: Request) -> None:
        """Registers the pages of computed prompt tokens for later requests."""
        count = min(request.computed, len(request.prompt))
        while self.reuse_prompts and len(request.keys) * self.page < count:
            number = len(request.keys)
            tokens = tuple(request.prompt[number * self.page : count][: self.page])
            parent = request.keys[-1] if request.keys else ROOT
            key = self.allocator.register(request.pages[number], parent, tokens)
            if len(tokens) < self.page:
                return
            request.keys.append(key)

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
        samples: Iterator[Sample] = iter(())
        if rows:
            index = torch.tensor(rows, device=hidden.device)
            samples = iter(
                sample(self.model.logits(hidden[index]), samplings, positions, histories)
            )
        updates = []
        for item in work:
            request, count = item.request, max(0, item.stop - item.request.length + 1)
            drawn = [next(samples) for _ in range(count)]
            request.computed = item.stop
            self.offer_pages(request)
            if drawn:
                updates.append(self.accept(request, item.drafts, drawn))
        return updates

    def accept(self, request: Request, num_drafts: int, drawn: list[Sample]) -> Update:
        """Appends the first sample, and each further one while the draft before it was right."""
        drafts, request.drafts = request.drafts[:num_drafts], []
        first_length, text_before = request.length, len(request.text)
        accepted = 0
        for number, one in enumerate(drawn):
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
            if request.computed == request.length - 1:
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
        position = request.length + len(request.drafts) - 2
        fits = position < len(request.pages) * self.page
        return fits and len(request.drafts) < self.draft_tokens

    def predict(self, tokens: list[int], segments: list[Segment], hidden: Tensor) -> Tensor:
        """The states of the prediction layer, [N, hidden], in the order of the tokens."""
        batch = self.batch_of(tokens, segments)
        if batch.order is not None:
            hidden = hidden[batch.order.argsort()]
        return batch.in_order(self.model.run_prediction(hidden, batch, self.pool))


def take(rows: Tensor, index: list[int]) -> Tensor:
    """Some rows of a tensor."""
    return rows[torch.tensor(index, device=rows.device)]


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
    pages = sum(-(-(len(prompt) + max_new_tokens) // PAGE) for prompt in prompts)
    engine = Engine(model, num_pages=pages, max_running=max(1, len(prompts)), reuse_prompts=False)
    sampling = replace(sampling or Sampling(), max_new_tokens=max_new_tokens)
    results = [request.known for request in engine.generate(prompts, sampling)]
    if not isinstance(tokens, Tensor):
        return results
    longest = max(map(len, results), default=tokens.shape[1])
    rows = [row + row[-1:] * (longest - len(row)) for row in results]
    return torch.tensor(rows, device=tokens.device).view(len(rows), longest)
