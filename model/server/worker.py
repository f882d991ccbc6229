"""The thread that owns the engine, and the queues between it and asyncio.

    worker = EngineWorker(engine)
    worker.start()  # in the event loop
    ticket = await worker.submit([(prompt, sampling)])
    while (event := await ticket.next()) is not None:
        print(event.text)

The thread steps while there is work.  Between steps it runs commands: submit, cancel, stop.  What a
step gives goes to the event loop in one call.  A request that was accepted ends with exactly one
event that has a finish_reason, so `open`, the number of those that have not ended, cannot drift.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import anyio

from model.engine import Engine
from model.request import EngineStats, Request
from model.sampling import Sample, Sampling

logger = logging.getLogger("uvicorn.error")

Item = tuple[list[int], Sampling]


class Event(NamedTuple):
    """What a step added to one request of a ticket, that of choice number `choice`.

    finish_reason: None, "stop", "length", "cancelled", or "error" if the engine failed.
    """

    choice: int
    tokens: list[int]
    samples: list[Sample]
    text: str
    finish_reason: str | None


class QueueFull(Exception):
    """More requests than `max_open` have not ended."""


class Unavailable(Exception):
    """The server shuts down, or the engine failed."""


@dataclass(eq=False)
class Ticket:
    """The requests of one call.  The event loop owns it."""

    open: int  # requests that have not ended
    accepted: asyncio.Future[None]
    queue: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    created: float = field(default_factory=time.monotonic)

    async def next(self) -> Event | None:
        """The next event; None after the last one."""
        if not self.open and self.queue.empty():
            return None
        return await self.queue.get()


@dataclass
class Owner:
    """Where the updates of a request go.  The engine's thread owns it."""

    ticket: Ticket
    index: int
    request: Request
    sent: int = 0  # samples that were sent


class EngineWorker:
    """Runs an engine for asyncio; `max_open` limits the requests that have not ended."""

    def __init__(self, engine: Engine, max_open: int = 256) -> None:
        self.engine, self.max_open = engine, max_open
        self.open, self.draining = 0, False
        self.failure: BaseException | None = None
        self.finished: Counter[str] = Counter()  # by finish_reason
        self.stats: EngineStats = engine.stats()
        self.tickets: set[Ticket] = set()
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.owners: dict[int, Owner] = {}
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.stopping = False

    # in the event loop

    def start(self) -> None:
        """Starts the thread; the running event loop is that of all other calls."""
        self.loop, self.idle = asyncio.get_running_loop(), asyncio.Event()
        self.idle.set()
        self.thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step that it is in, and the open requests as cancelled."""
        self.draining = True

        def command() -> None:
            self.stopping = True

        self.commands.put(command)
        await asyncio.to_thread(self.thread.join)

    async def submit(self, items: Sequence[Item]) -> Ticket:
        """Queues the requests of a call, all or none.

        Raises:
            QueueFull, Unavailable, or ValueError of `Engine.submit`.
        """
        if self.draining or self.failure is not None:
            raise Unavailable
        if self.open + len(items) > self.max_open:
            raise QueueFull
        ticket = Ticket(len(items), self.loop.create_future())
        self.open += len(items)
        self.idle.clear()
        self.tickets.add(ticket)
        self.commands.put(lambda: self._submit(ticket, items))
        try:
            await ticket.accepted
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends the requests of a ticket that have not ended."""
        if ticket.open:
            self.commands.put(lambda: self._cancel(ticket))

    async def drain(self, timeout: float, interrupted: Callable[[], bool]) -> None:
        """Refuses new requests, and waits for the others; cancels those that are left then."""
        self.draining = True
        deadline = time.monotonic() + timeout
        while self.open and time.monotonic() < deadline and not interrupted():
            with anyio.move_on_after(0.1):
                await self.idle.wait()
        for ticket in list(self.tickets):
            self.cancel(ticket)
        with anyio.move_on_after(10):
            await self.idle.wait()

    def _deliver(self, events: list[tuple[Ticket, Event]], stats: EngineStats) -> None:
        self.stats = stats
        for ticket, event in events:
            if event.finish_reason is not None:
                self.finished[event.finish_reason] += 1
                self._close(ticket, 1)
            ticket.queue.put_nowait(event)

    def _accept(self, ticket: Ticket, error: Exception | None) -> None:
        if error is not None:
            self._close(ticket, ticket.open)
        if ticket.accepted.done():  # the call was cancelled
            return
        if error is None:
            ticket.accepted.set_result(None)
        else:
            ticket.accepted.set_exception(error)

    def _close(self, ticket: Ticket, count: int) -> None:
        ticket.open -= count
        self.open -= count
        if not ticket.open:
            self.tickets.discard(ticket)
        if not self.open:
            self.idle.set()

    # in the engine's thread

    def _run(self) -> None:
        while not self.stopping:
            try:
                self._commands_and_step()
            except Exception as error:
                logger.exception("the engine failed")
                self.failure = error
                self._end(list(self.owners.values()), "error")
        self._end(list(self.owners.values()), "cancelled")

    def _commands_and_step(self) -> None:
        if self.failure is not None or not self.engine.has_work:
            self.commands.get()()
        while not self.commands.empty():
            self.commands.get()()
        if self.failure is None and self.engine.has_work:
            self._step()

    def _step(self) -> None:
        events = []
        for request, tokens, text, reason in self.engine.step():
            owner = self.owners.get(request.id)
            if owner is not None:
                samples = request.samples[owner.sent : owner.sent + len(tokens)]
                owner.sent += len(tokens)
                events.append((owner.ticket, Event(owner.index, tokens, samples, text, reason)))
                if reason is not None:
                    del self.owners[request.id]
        self._send(events)

    def _send(self, events: list[tuple[Ticket, Event]]) -> None:
        self._call(self._deliver, events, self.engine.stats())

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Calls a function in the event loop, unless the program ends without waiting."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *arguments)

    def _submit(self, ticket: Ticket, items: Sequence[Item]) -> None:
        owners, error = [], None
        try:
            if self.failure is not None:
                raise Unavailable
            for index, (prompt, sampling) in enumerate(items):
                owners.append(Owner(ticket, index, self.engine.submit(prompt, sampling)))
        except Exception as refused:
            error = refused
            for owner in owners:
                self.engine.cancel(owner.request)
        else:
            self.owners.update({owner.request.id: owner for owner in owners})
        self._call(self._accept, ticket, error)

    def _cancel(self, ticket: Ticket) -> None:
        owners = [owner for owner in self.owners.values() if owner.ticket is ticket]
        if self.failure is None:
            for owner in owners:
                self.engine.cancel(owner.request)
        self._end(owners, "cancelled")

    def _end(self, owners: list[Owner], reason: str) -> None:
        for owner in owners:
            del self.owners[owner.request.id]
        self._send([(o.ticket, Event(o.index, [], [], "", reason)) for o in owners])
