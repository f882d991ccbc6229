"""All-to-all in a process group, in which every wait ends and a rank out of step is named.

A call is one or two exchanges. First a header to each rank, a dozen integers: which call this is
and what must be the same on all ranks, and how many rows will follow. Ranks that disagree find out
here, all of them at once, before any row is sent (gloo ends the process when sizes differ). Then
the rows, as bytes, since gloo sends no FP8, by one all_to_all of uneven parts.

Reading the headers is a wait for the other ranks. On a GPU it stalls the host as well, so there
calls whose sizes are known skip it, unless DEEPKERN_DEBUG=1.

A wait that fails or takes too long becomes an `ExpertParallelError`. To say who is missing, each
rank that fails leaves a note in the group's store, and waits a moment for the notes of the others.
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
# What all ranks must send alike, with the words for its values.
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
PATIENCE = 5.0  # seconds that a rank which failed waits for the others' notes, at most
_made: Counter[str] = Counter()  # exchanges per group, to tell their notes apart


class ExpertParallelError(RuntimeError):
    """Ranks disagree, or one did not answer in time. The group cannot be used for more."""


class Exchange:
    """All-to-all among the ranks of one process group."""

    def __init__(self, group: dist.ProcessGroup, timeout: float):
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.ranks = dist.get_process_group_ranks(group)  # as the whole job counts them
        self.patience = min(PATIENCE, timeout / 4)
        self.timeout, self.limit = timeout, timedelta(seconds=timeout - self.patience)
        self.calls = 0
        self.failure: str | None = None
        self.memory: PeerMemory | None = None  # through which rows travel, where there is one
        _made[group.group_name] += 1
        self.note = f"deepkern/exchange{_made[group.group_name]}/"

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return f"group {self.group.group_desc or self.group.group_name!r} (ranks {ranks})"

    def begin(self, call: str) -> None:
        """Counts the call; an error if an earlier one failed."""
        if self.failure is not None:
            raise ExpertParallelError(f"{call}: after an earlier failure: {self.failure}")
        self.calls += 1

    def agree(self, call: str, counts: Tensor, **same: int) -> tuple[list, list]:
        """Sends each rank a header, and checks the headers that come.

        Args:
            call: one of CALLS.
            counts: int64 [size, 2], what this rank tells each of the others.
            same: values of FIELDS (0 if left out) which all ranks must send alike.

        Returns:
            `counts` and what the others told this rank, as lists [size][2].
        """
        same |= {"call": CALLS.index(call), "number_of_calls": self.calls}
        values = [MAGIC, *(same.get(field, 0) for field in FIELDS)]
        header = torch.tensor(values, device=counts.device).expand(self.size, -1)
        sent = torch.cat([header, counts], 1)
        received = torch.empty_like(sent)
        what = f"{call} {self.calls} of {self}: waiting for the headers of the other ranks"
        self._wait(self._all_to_all(received, sent, None, None, what), what, block=True)
        counts, got = torch.stack([sent, received]).tolist()
        self._compare(call, values, got)
        return [row[len(values) :] for row in counts], [row[len(values) :] for row in got]

    def agree_again(self, call: str, sent: list, received: list, like: Tensor, **same: int) -> None:
        """`agree` for a call whose counts [size] are known, where it does not stall the host."""
        if like.device.type != "cpu" and os.environ.get("DEEPKERN_DEBUG") != "1":
            return
        counts = torch.tensor([[rows, 0] for rows in sent], device=like.device)
        _, got = self.agree(call, counts, **same)
        for rank, want, (rows, _) in zip(self.ranks, received, got, strict=True):
            if rows != want:
                self._fail(f"{call} {self.calls} of {self}: expected {want} rows from rank {rank}, "
                           f"which has {rows}")  # fmt: skip

    def start(self, call: str, rows: Tensor, sent: list, received: list) -> Transfer:
        """Sends uint8 [Σ sent, width], ordered by rank, to whom it concerns."""
        kind = Transfer if self.memory is None else PeerTransfer
        what = f"{call} {self.calls} of {self}: waiting for rows"
        return kind(self, what, rows[: sum(sent)], sent, received)

    def _all_to_all(self, out: Tensor, rows: Tensor, received, sent, what: str) -> dist.Work:
        options = dist.AllToAllOptions()
        options.timeout = self.limit  # for gloo, whose threads would go on trying
        options.asyncOp = True
        try:
            return self.group.alltoall_base(out, rows, received or [], sent or [], options)
        except RuntimeError as error:
            self._fail(what, error)

    def _wait(self, work: dist.Work, what: str, block: bool) -> None:
        """Waits; on a GPU the stream waits, and the host too if it is to `block`."""
        try:
            work.wait(self.limit) if block else work.wait()
        except RuntimeError as error:
            self._fail(what, error)

    def _compare(self, call: str, mine: list[int], headers: list[list[int]]) -> None:
        here = f"{call} {self.calls} of {self}"
        for rank, header in zip(self.ranks, headers, strict=True):
            if header[0] != MAGIC:
                self._fail(f"{here}: rank {rank} sent something else than a header")
        for i, (field, words) in enumerate(FIELDS.items(), 1):
            others = {r: h[i] for r, h in zip(self.ranks, headers, strict=True) if h[i] != mine[i]}
            if others:
                say = (lambda value, words=words: words[value]) if words else str
                got = ", ".join(f"rank {r} has {say(value)}" for r, value in others.items())
                own = f"rank {self.ranks[self.rank]} (this one) has {say(mine[i])}"
                self._fail(
                    f"{here}: {field.replace('_', ' ')} must be the same on all ranks: {own}, {got}"
                )

    def _fail(self, what: str, error: Exception | None = None) -> None:
        if error is not None:
            what = f"{what}: {self._missing()} ({str(error).splitlines()[0][:200]})"
        self.failure = what
        raise ExpertParallelError(what) from error

    def _missing(self) -> str:
        """Whom no note came from, after a moment for those that are about to fail too."""
        try:
            store = dist.distributed_c10d._get_process_group_store(self.group)
            store.set(f"{self.note}{self.rank}", "failed")
            until = time.monotonic() + self.patience
            while True:
                silent = [
                    r for i, r in enumerate(self.ranks) if not store.check([self.note + str(i)])
                ]
                if not silent or time.monotonic() > until:
                    break
                time.sleep(0.05)
        except RuntimeError:
            return "no word from the group's store, which a job's first rank keeps as a rule"
        if not silent:
            return f"all ranks gave up, after at most {self.timeout:g} s"
        return f"no word from rank {', '.join(map(str, silent))} within {self.timeout:g} s"


class Transfer:
    """Rows on their way; `wait()` returns those that came, uint8 [Σ received, width]."""

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
    """The same through the ranks' shared memory; at most two may be under way."""

    def __init__(self, exchange: Exchange, what: str, rows: Tensor, sent: list, received: list):
        self.exchange, self.what, self.received = exchange, what, received
        most, room = max(*sent, *received) * rows.shape[1], exchange.memory.region_bytes
        if most > room:
            exchange._fail(f"{what}: {most} bytes go from one rank to another, and the peer buffer "
                           f"has room for {room}")  # fmt: skip
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
