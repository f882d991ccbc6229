"""Rows straight into the memory of the other ranks: for ranks that share NVLink, or one GPU.

Each rank has a buffer that all ranks can write (`torch.distributed._symmetric_memory`):

    flags    ready[s]   the last call whose rows rank s has written here
             taken[d]   the last call whose rows rank d has taken out of what was written for it
    regions  [2][ranks] for odd and even calls, what each rank writes here

A call: wait until the others have taken the rows of the call before last (taken), write each rank's
rows into its buffer, set its `ready`; then wait for the own `ready` flags, copy the rows out, set
the writers' `taken`. Everything happens on the device, in stream order. Flags count calls and are
never reset. Where a region starts depends on nothing, so no offsets need be exchanged.

Cut: spans of bytes between two buffers, BLOCK words of 4 bytes a program, 16 bytes an access; the
waiting is done by one program, so that spinning keeps no rank of the same GPU from running. NVLink
limits the speed of the writes. A wait gives up after `limit` looks (about a microsecond each), and
the copies after it do nothing.

Sources: DeepEP's and FlashInfer's one-sided all-to-all; the memory model is PTX's: a release at
system scope after the kernel that wrote, an acquire before the kernel that reads.

Compiled for every target and interpreted, with all ranks in one process. Never run on hardware.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2

ALIGN = 16  # bytes; regions and rows are multiples
BLOCK = 8192  # words that one program copies
LOOKS_PER_SECOND = 1_000_000  # a guess: a look goes to the L2 cache and back


class PeerMemory:
    """The buffers of all ranks, as one of them sees them.

    Args:
        base: int32 [words] from which `offsets` count: this rank's buffer.
        offsets: where each rank's buffer starts, in words from the start of `base`. They may lie
            outside of `base`: peers' memory is mapped into the same address space.
        words: the length of each buffer; its flags must start as 0.
        rank: this one.
        limit: looks at flags before a wait gives up.
    """

    def __init__(self, base: Tensor, offsets: list[int], words: int, rank: int, limit: int):
        self.base, self.rank, self.size, self.limit = base, rank, len(offsets), limit
        self.flags = -(-2 * self.size // 64) * 64  # words
        self.region = (words - self.flags) // (2 * self.size) // (ALIGN // 4) * (ALIGN // 4)
        self.offsets, self.call = offsets, 0
        self.status = torch.zeros(self.size, dtype=torch.int32, device=base.device)
        # Of each rank: my flag there. ready and taken lie side by side.
        self.ready_there = self._table([o + rank for o in offsets])
        self.taken_there = self._table([o + self.size + rank for o in offsets])

    @property
    def region_bytes(self) -> int:
        """What one rank may send to another in a call, at most."""
        return 4 * self.region

    def put(self, rows: Tensor, sent: list[int]) -> int:
        """Starts a call: uint8 [Σ sent, width], ordered by rank, into the ranks' buffers.

        Returns the call's number, for `take`. A third call waits until the first was taken.
        """
        call = self.call = wrapped(self.call + 1)
        width = rows.shape[1] // 4
        self._wait(self.size, wrapped(call - 2))
        here = self._here(self.rank, call)
        there = [offset + here for offset in self.offsets]
        self._copy(rows.view(torch.int32), self._starts(sent, width), self.base, there, sent, width)
        self._signal(self.ready_there, call)
        return call

    def take(self, out: Tensor, received: list[int], call: int) -> None:
        """Ends a call: what the ranks wrote here, into uint8 [Σ received, width]."""
        width = out.shape[1] // 4
        self._wait(0, call)
        here = [self.offsets[self.rank] + self._here(r, call) for r in range(self.size)]
        starts = self._starts(received, width)
        self._copy(self.base, here, out.view(torch.int32), starts, received, width)
        self._signal(self.taken_there, call)

    def silent(self) -> list[int]:
        """The ranks that a wait gave up on. Waits for the device."""
        return self.status.nonzero().flatten().tolist()

    def _here(self, rank: int, call: int) -> int:
        """Where in a buffer `rank` writes in a call."""
        return self.flags + (call % 2 * self.size + rank) * self.region

    @staticmethod
    def _starts(counts: list[int], width: int) -> list[int]:
        return [sum(counts[:r]) * width for r in range(len(counts))]

    def _table(self, values: list[int]) -> Tensor:
        table = torch.tensor(values, dtype=torch.int64)
        if self.base.device.type == "cpu":
            return table
        return table.pin_memory().to(self.base.device, non_blocking=True)

    def _copy(self, source, source_starts, target, target_starts, counts, width) -> None:
        most = max(counts) * width
        if most == 0:
            return
        spans = self._table([source_starts, target_starts, [n * width for n in counts]])
        copy_kernel[(cdiv(most, BLOCK), self.size)](
            source, target, spans, self.status, self.size, BLOCK=BLOCK, num_warps=8
        )

    def _wait(self, first: int, call: int) -> None:
        flags = self.base[self.offsets[self.rank] + first :]
        lanes = next_power_of_2(self.size)
        wait_kernel[(1,)](flags, self.status, self.size, call, self.limit, LANES=lanes, num_warps=1)

    def _signal(self, flags: Tensor, call: int) -> None:
        lanes = next_power_of_2(self.size)
        signal_kernel[(1,)](
            self.base, flags, self.status, self.size, call, LANES=lanes, num_warps=1
        )


def wrapped(call: int) -> int:
    """As int32 counts: after 2^31 - 1 comes -2^31."""
    return (call + 2**31) % 2**32 - 2**31


def connect(group: dist.ProcessGroup, buffer_bytes: int, timeout: float) -> PeerMemory:
    """Makes this rank's buffer and maps those of the others; all ranks of `group` call it."""
    import torch.distributed._symmetric_memory as symmetric_memory

    words = buffer_bytes // 4
    device = torch.device("cuda", torch.cuda.current_device())
    buffer = symmetric_memory.empty(words, dtype=torch.int32, device=device).zero_()
    torch.cuda.synchronize(device)  # zero before another rank can know the buffer
    handle = symmetric_memory.rendezvous(buffer, group.group_name)
    peers = [handle.get_buffer(r, (words,), torch.int32) for r in range(group.size())]
    offsets = [(peer.data_ptr() - buffer.data_ptr()) // 4 for peer in peers]
    limit = max(1, min(int(timeout * LOOKS_PER_SECOND), 2**31 - 1))
    memory = PeerMemory(buffer, offsets, words, group.rank(), limit)
    memory.mapped = handle, peers  # for as long as it lives
    return memory


@triton.jit(do_not_specialize=["call", "limit"])
def wait_kernel(flags_ptr, status_ptr, size, call, limit, LANES: tl.constexpr):
    """Until all flags are at `call` or later; status[r] = 1 where that took too long."""
    lane = tl.arange(0, LANES)
    behind = tl.full((LANES,), 1, tl.int32)
    looks = 0
    while (tl.max(behind) != 0) & (looks < limit):
        flag = tl.atomic_add(flags_ptr + lane, 0, mask=lane < size, sem="acquire", scope="sys")
        # The difference, so that counting may overflow.
        behind = ((flag - call < 0) & (lane < size)).to(tl.int32)
        looks += 1
    tl.store(status_ptr + lane, 1, mask=(behind != 0) & (lane < size))


@triton.jit(do_not_specialize=["call"])
def signal_kernel(base_ptr, flags_ptr, status_ptr, size, call, LANES: tl.constexpr):
    """This rank's flag at every rank = call, visible after all that earlier kernels wrote."""
    lane = tl.arange(0, LANES)
    given_up = tl.max(tl.load(status_ptr + lane, mask=lane < size, other=0)) != 0
    flag = tl.load(flags_ptr + lane, mask=lane < size, other=0)
    mask = (lane < size) & (not given_up)
    call = tl.full((LANES,), 0, tl.int32) + call
    tl.atomic_xchg(base_ptr + flag, call, mask=mask, sem="release", scope="sys")


@triton.jit
def copy_kernel(source_ptr, target_ptr, spans_ptr, status_ptr, size, BLOCK: tl.constexpr):
    """For each rank r spans[2, r] words: from spans[0, r] of source to spans[1, r] of target."""
    rank = tl.program_id(1)
    source = source_ptr + tl.multiple_of(tl.load(spans_ptr + rank), 4)
    target = target_ptr + tl.multiple_of(tl.load(spans_ptr + size + rank), 4)
    words = tl.multiple_of(tl.load(spans_ptr + 2 * size + rank), 4)
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (word < words) & (tl.load(status_ptr + rank) == 0)
    tl.store(target + word, tl.load(source + word, mask=inside), mask=inside)
