"""Which rows of which requests the next step computes, and who owns the pages.

Generating requests come first, then prompts by age, up to the budget of rows.  A request is
admitted when there are pages for all that it knows.  When pages run out later, the youngest request
gives up its own, waits, and computes them again; the oldest one can always go on.
"""

from __future__ import annotations

from collections import deque

from deepkern.arithmetic import cdiv
from model.cache import CachePool
from model.pages import ROOT, PageAllocator
from model.request import Request, Work


class Scheduler:
    """The queue, the running requests, the oldest first, and the pages of one pool.

    budget: rows of a step at most.
    max_running: requests that own pages at most.
    preemptions, reused_tokens: counters.
    """

    def __init__(self, pool: CachePool, budget: int, max_running: int, reuse_prompts: bool) -> None:
        self.pool, self.page = pool, pool.page_size
        self.allocator = PageAllocator(pool.num_pages, pool.page_size)
        self.budget, self.max_running = budget, max_running
        self.reuse_prompts = reuse_prompts
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = self.reused_tokens = 0
        self.blocked: tuple[int, int] | None = None  # a request, and releases when it did not fit

    def remove(self, request: Request) -> None:
        """Forgets a request and releases its pages."""
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self.running.remove(request)
        self.give_up_pages(request)

    def next_work(self) -> list[Work]:
        """The rows of the next step; none if there is no request."""
        work: dict[int, Work] = {}
        before = self.preemptions
        budget = self.budget
        for request in sorted(self.running, key=lambda r: r.length - r.computed > 1):
            if request in self.running:  # it may have been preempted meanwhile
                budget -= self.add_work(request, budget, work)
        while budget > 0 and self.preemptions == before and self.admit():
            budget -= self.add_work(self.running[-1], budget, work)
        return list(work.values())

    def admit(self) -> bool:
        """Moves the oldest waiting request to the running ones, if its known tokens fit."""
        if not self.waiting or len(self.running) >= self.max_running:
            return False
        request = self.waiting[0]
        attempt = request.id, self.allocator.releases
        if attempt == self.blocked:
            return False
        reused = self.allocator.reuse(request.prompt) if self.reuse_prompts else None
        shared = reused.pages if reused else []
        last = len(request.prompt) + request.max_tokens - 1
        pages = cdiv(min(request.length + 1, last), self.page) - len(shared)
        if pages > self.allocator.num_available:
            self.allocator.release(shared)
            self.blocked = request.id, self.allocator.releases
            return False
        request.pages, request.computed = shared, len(shared) * self.page
        if reused:
            request.keys = reused.keys
            if reused.partial is not None:
                self.copy_page(request, reused.partial, reused.length)
        self.reused_tokens += request.computed
        self.running.append(self.waiting.popleft())
        return True

    def copy_page(self, request: Request, source: int, length: int) -> None:
        """Gives a request its own copy of a page; `length` of its tokens are cached then."""
        self.allocator.own(source)  # so that the copy does not take its place
        page = self.allocator.allocate()
        if page is not None:
            self.pool.copy_page(source, page)
            request.pages.append(page)
            request.computed = length
        self.allocator.release([source])

    def add_work(self, request: Request, budget: int, work: dict[int, Work]) -> int:
        """Adds the next rows of a request; returns their number, 0 if there are no pages."""
        last = len(request.prompt) + request.max_tokens - 1  # where the last token is drawn
        known = request.length + len(request.drafts)
        stop = min(known, request.computed + budget, last)
        if budget <= 0 or not self.allocate(request, stop, work):
            return 0
        work[request.id] = Work(request, request.computed, stop, max(0, stop - request.length))
        return stop - request.computed

    def allocate(self, request: Request, stop: int, work: dict[int, Work]) -> bool:
        """Pages for positions up to `stop`, at the expense of younger requests."""
        while len(request.pages) * self.page < stop:
            page = self.allocator.allocate()
            if page is not None:
                request.pages.append(page)
                continue
            victim = self.running.pop()
            self.give_up_pages(victim)
            self.waiting.appendleft(victim)
            self.preemptions += 1
            work.pop(victim.id, None)
            if victim is request:
                return False
        return True

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
            page = request.pages[number]
            if len(tokens) < self.page and self.allocator.holds(page, len(tokens)):
                return
            parent = request.keys[-1] if request.keys else ROOT
            key = self.allocator.register(page, parent, tokens)
            if len(tokens) < self.page:
                return
            request.keys.append(key)
