"""All-to-all in a process group, with timeouts and errors that name the rank out of step.

A call is one or two exchanges. The first sends a header to each rank, about a dozen integers: the
call, the values that must be equal on all ranks, and the number of rows that follow. If ranks
disagree, all of them learn it from the headers, before any row is sent (gloo ends the process when
sizes differ). The second sends the rows, as bytes because gloo sends no FP8, by one all_to_all
with uneven splits.

Reading the headers waits for the other ranks. On a GPU it stalls the host as well, so calls whose
sizes are known skip it on a GPU, unless DEEPKERN_DEBUG=1.

A wait that fails or times out raises an `ExpertParallelError`. To name the missing ranks, each rank
that fails leaves a note in the group's store, and waits briefly for the notes of the others.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .peer_memory import PeerMemory

CALLS = ("dispatch", "combine", "backward of combine", "backward of dispatch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
GRADIENTS = ("none", "x", "topk_weights", "x and topk_weights")
# The values that all ranks must send alike, with the words for each in messages.
FIELDS = {
    "call": CALLS,
    "number_of_calls": None,
    "number_of_the_dispatch": None,
    "num_experts": None,
    "K": None,
    "dtype": DTYPES,
    "topk": None,
    "x_scale": ("not given", "given"),
    "gradients_of": GRADIENTS,
}
MAGIC = 0x6465657065786368
MAX_NOTE_WAIT = 5.0  # seconds that a failed rank waits for the notes of the others
_exchanges: Counter[str] = Counter()  # per group, to number the notes


class ExpertParallelError(RuntimeError):
    """Ranks disagree, or one did not answer in time. The object cannot be used afterwards."""


class Exchange:
    """All-to-all among the ranks of one process group."""

    def __init__(self, group: dist.ProcessGroup, timeout: float):
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.ranks = dist.get_process_group_ranks(group)  # global ranks
        self.note_wait = min(MAX_NOTE_WAIT, timeout / 4)
        self.timeout, self.limit = timeout, timedelta(seconds=timeout - self.note_wait)
        self.calls = 0
        self.failure: str | None = None
        self.memory: PeerMemory | None = None  # sends the rows in place of the all_to_all
        _exchanges[group.group_name] += 1
        self.note = f"deepkern/exchange{_exchanges[group.group_name]}/"

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return f"group {self.group.group_desc or self.group.group_name!r} (ranks {ranks})"

    def begin(self, call: str) -> None:
        """Counts the call; raises if an earlier call failed."""
        if self.failure is not None:
            raise ExpertParallelError(f"{call}: after an earlier failure: {self.failure}")
        self.calls += 1

    def agree(self, call: str, counts: Tensor, **same: int) -> tuple[list, list]:
        """Sends a header to each rank, and checks the received headers.

        Args:
            call: one of CALLS.
            counts: int64 [size, 2], two counts for each rank.
            same: values of FIELDS, equal on all ranks; 0 by default.

        Returns:
            `counts` and the counts received from each rank, as lists [size][2].
        """
        same |= {"call": CALLS.index(call), "number_of_calls": self.calls}
        values = [MAGIC, *(same.get(field, 0) for field in FIELDS)]
        header = torch.tensor(values, device=counts.device).expand(self.size, -1)
        sent = torch.cat([header, counts], 1)
        received = torch.empty_like(sent)
        what = f"{call} {self.calls} of {self}: waiting for the headers of the other ranks"
        self._wait(self._all_to_all(received, sent, None, None, what), what, block=True)
        sent, received = torch.stack([sent, received]).tolist()
        self._compare(call, values, received)
        return [row[len(values) :] for row in sent], [row[len(values) :] for row in received]

    def agree_again(self, call: str, sent: list, received: list, like: Tensor, **same: int) -> None:
        """`agree` for a call whose counts [size] are known; a no-op if it would stall the host."""
        if like.device.type != "cpu" and os.environ.get("DEEPKERN_DEBUG") != "1":
            return
        counts = torch.tensor([[rows, 0] for rows in sent], device=like.device)
        _, got = self.agree(call, counts, **same)
        for rank, want, (rows, _) in zip(self.ranks, received, got, strict=True):
            if rows != want:
                self._fail(f"{call} {self.calls} of {self}: expected {want} rows from rank {rank}, "
                           f"which has {rows}")  # fmt: skip

    def start(self, call: str, rows: Tensor, sent: list, received: list) -> Transfer:
        """Sends rows (uint8 [sum(sent), width], sorted by destination rank)."""
        kind = Transfer if self.memory is None else PeerTransfer
        what = f"{call} {self.calls} of {self}: waiting for rows"
        return kind(self, what, rows[: sum(sent)], sent, received)

    def _all_to_all(self, out: Tensor, rows: Tensor, received, sent, what: str) -> dist.Work:
        options = dist.AllToAllOptions()
        options.timeout = self.limit  # gloo's threads keep trying without it
        options.asyncOp = True
        try:
            return self.group.alltoall_base(out, rows, received or [], sent or [], options)
        except RuntimeError as error:
            self._fail(what, error)

    def _wait(self, work: dist.Work, what: str, block: bool) -> None:
        """Waits for `work`: the stream on a GPU, and the host as well with `block`."""
        try:
            work.wait(self.limit) if block else work.wait()
        except RuntimeError as error:
            self._fail(what, error)

    def _compare(self, call: str, values: list[int], headers: list[list[int]]) -> None:
        where = f"{call} {self.calls} of {self}"
        for rank, header in zip(self.ranks, headers, strict=True):
            if header[0] != MAGIC:
                self._fail(f"{where}: rank {rank} sent no header")
        for i, (field, words) in enumerate(FIELDS.items(), 1):
            others = {
                r: h[i] for r, h in zip(self.ranks, headers, strict=True) if h[i] != values[i]
            }
            if others:
                field = field.replace("_", " ")
                name = (lambda value, words=words: words[value]) if words else str
                got = ", ".join(f"rank {r} has {name(value)}" for r, value in others.items())
                own = f"rank {self.ranks[self.rank]} (this one) has {name(values[i])}"
                self._fail(f"{where}: {field} must be the same on all ranks: {own}, {got}")

    def _fail(self, what: str, error: Exception | None = None) -> None:
        if error is not None:
            what = f"{what}: {self._missing()} ({str(error).splitlines()[0][:200]})"
        self.failure = what
        raise ExpertParallelError(what) from error

    def _missing(self) -> str:
        """Names the ranks without a note, after a wait for those that are about to fail as well."""
        try:
            store = dist.distributed_c10d._get_process_group_store(self.group)
            store.set(f"{self.note}{self.rank}", "failed")
            until = time.monotonic() + self.note_wait
            while True:
                silent = [
                    r for i, r in enumerate(self.ranks) if not store.check([self.note + str(i)])
                ]
                if not silent or time.monotonic() > until:
                    break
                time.sleep(0.05)
        except RuntimeError:
            return "no answer from the group's store, which is usually on the first rank of the job"
        if not silent:
            return f"all ranks gave up, after at most {self.timeout:g} s"
        return f"no answer from rank {', '.join(map(str, silent))} within {self.timeout:g} s"


class Transfer:
    """Rows being sent; `wait()` returns the received rows, uint8 [sum(received), width]."""

    def __init__(self, exchange: Exchange, what: str, rows: Tensor, sent: list, received: list):
        self.exchange, self.what, self.rows = exchange, what, rows
        self.out = rows.new_empty((sum(received), rows.shape[1]))
        self.work = exchange._all_to_all(self.out, rows, received, sent, what)

    def wait(self) -> Tensor:
        if self.work is not None:
            self.exchange._wait(self.work, self.what, block=self.out.device.type == "cpu")
            self.work = self.rows = None
        return self.out


class PeerTransfer:
    """A `Transfer` through peer memory; at most two may be pending."""

    def __init__(self, exchange: Exchange, what: str, rows: Tensor, sent: list, received: list):
        self.exchange, self.what, self.received = exchange, what, received
        num_bytes, capacity = max(*sent, *received) * rows.shape[1], exchange.memory.region_bytes
        if num_bytes > capacity:
            exchange._fail(f"{what}: {num_bytes} bytes go from one rank to another, and the peer "
                           f"buffer has room for {capacity}")  # fmt: skip
        self.out = rows.new_empty((sum(received), rows.shape[1]))
        self.call = exchange.memory.put(rows, sent)

    def wait(self) -> Tensor:
        if self.call is not None:
            self.exchange.memory.take(self.out, self.received, self.call)
            silent = self.exchange.memory.silent()
            if silent:
                ranks = ", ".join(str(self.exchange.ranks[i]) for i in silent)
                self.exchange._fail(f"{self.what}: nothing came from rank {ranks}")
            self.call = None
        return self.out
