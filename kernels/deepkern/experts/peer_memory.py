"""Writes rows directly to the memory of other ranks, which share NVLink or one GPU.

Each rank has a buffer that all ranks can write (`torch.distributed._symmetric_memory`):

    flags    ready[s]   the last call whose rows rank s has written to this buffer
             taken[d]   the last call whose rows from this rank rank d has copied out
    regions  [2][ranks] for odd and even calls: the rows that each rank writes to this buffer

A call waits until the others have copied out the rows of the call before last (taken), writes each
rank's rows to its buffer and sets its `ready`. Then it waits for the own `ready` flags, copies the
rows out and sets the writers' `taken`. All of it runs on the device, in stream order. Flags count
calls and are never reset. The offset of a region is fixed, so no offsets are exchanged.

Parallelization: one program copies BLOCK words of 4 bytes between two buffers, 16 bytes per access.
One program waits, so that spinning does not block the other ranks of the same GPU.

Limit: NVLink bandwidth of the writes. A wait ends after `limit` polls (about a microsecond each);
the copies after it are then no-ops.

Source: the one-sided all-to-all of DeepEP and FlashInfer. The memory model is PTX's: a release at
system scope after the kernel that writes, an acquire before the kernel that reads.

Compiled for every target and interpreted, with all ranks in one process. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2

ALIGN = 16  # bytes; regions and rows are multiples
BLOCK = 8192  # words per program of a copy
POLLS_PER_SECOND = 1_000_000  # an estimate: a poll is a round trip to the L2 cache


class PeerMemory:
    """The buffers of all ranks, as one rank addresses them.

    Args:
        base: int32 [words], this rank's buffer; `offsets` count from its start.
        offsets: the start of each rank's buffer, in words from the start of `base`. They may be
            outside of `base`: peers' memory is mapped into the same address space.
        words: the length of each buffer; its flags must start as 0.
        rank: this rank.
        limit: polls of the flags before a wait gives up.
    """

    def __init__(self, base: Tensor, offsets: list[int], words: int, rank: int, limit: int):
        self.base, self.rank, self.size, self.limit = base, rank, len(offsets), limit
        self.flags = -(-2 * self.size // 64) * 64  # words
        self.region = (words - self.flags) // (2 * self.size) // (ALIGN // 4) * (ALIGN // 4)
        self.offsets, self.call = offsets, 0
        self.status = torch.zeros(self.size, dtype=torch.int32, device=base.device)
        # The offset of this rank's flags in each rank's buffer: ready, then taken.
        self.ready_flags = self._table([o + rank for o in offsets])
        self.taken_flags = self._table([o + self.size + rank for o in offsets])

    @property
    def region_bytes(self) -> int:
        """The most bytes that one rank can send to another in a call."""
        return 4 * self.region

    def put(self, rows: Tensor, sent: list[int]) -> int:
        """Starts a call: writes rows (uint8 [sum(sent), width], sorted by rank) to the ranks.

        Returns the call's number, for `take`. A third call waits for the `take` of the first.
        """
        call = self.call = wrap_int32(self.call + 1)
        width = rows.shape[1] // 4
        self._wait(self.size, wrap_int32(call - 2))
        region = self._region_offset(self.rank, call)
        targets = [offset + region for offset in self.offsets]
        self._copy(rows.view(torch.int32), self._starts(sent, width), self.base, targets, sent,
                   width)  # fmt: skip
        self._signal(self.ready_flags, call)
        return call

    def take(self, out: Tensor, received: list[int], call: int) -> None:
        """Ends a call: copies the received rows to out, uint8 [sum(received), width]."""
        width = out.shape[1] // 4
        self._wait(0, call)
        own = self.offsets[self.rank]
        sources = [own + self._region_offset(r, call) for r in range(self.size)]
        starts = self._starts(received, width)
        self._copy(self.base, sources, out.view(torch.int32), starts, received, width)
        self._signal(self.taken_flags, call)

    def silent(self) -> list[int]:
        """The ranks for which a wait gave up. Synchronizes with the device."""
        return self.status.nonzero().flatten().tolist()

    def _region_offset(self, rank: int, call: int) -> int:
        """The offset in a buffer of the region that `rank` writes in a call, in words."""
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
        max_words = max(counts) * width
        if max_words == 0:
            return
        spans = self._table([source_starts, target_starts, [n * width for n in counts]])
        peer_memory_copy_kernel[(cdiv(max_words, BLOCK), self.size)](
            source, target, spans, self.status, self.size, BLOCK=BLOCK, num_warps=8
        )

    def _wait(self, first: int, call: int) -> None:
        flags = self.base[self.offsets[self.rank] + first :]
        lanes = next_power_of_2(self.size)
        peer_memory_wait_kernel[(1,)](
            flags, self.status, self.size, call, self.limit, LANES=lanes, num_warps=1
        )

    def _signal(self, flags: Tensor, call: int) -> None:
        lanes = next_power_of_2(self.size)
        peer_memory_signal_kernel[(1,)](
            self.base, flags, self.status, self.size, call, LANES=lanes, num_warps=1
        )


def wrap_int32(call: int) -> int:
    """The int32 counter after an overflow: 2^31 - 1 is followed by -2^31."""
    return (call + 2**31) % 2**32 - 2**31


def connect(group: dist.ProcessGroup, buffer_bytes: int, timeout: float) -> PeerMemory:
    """Allocates this rank's buffer and maps those of the others; all ranks of `group` call it."""
    import torch.distributed._symmetric_memory as symmetric_memory

    words = buffer_bytes // 4
    device = torch.device("cuda", torch.cuda.current_device())
    buffer = symmetric_memory.empty(words, dtype=torch.int32, device=device).zero_()
    torch.cuda.synchronize(device)  # the buffer is 0 before another rank can map it
    handle = symmetric_memory.rendezvous(buffer, group.group_name)
    peers = [handle.get_buffer(r, (words,), torch.int32) for r in range(group.size())]
    offsets = [(peer.data_ptr() - buffer.data_ptr()) // 4 for peer in peers]
    limit = max(1, min(int(timeout * POLLS_PER_SECOND), 2**31 - 1))
    memory = PeerMemory(buffer, offsets, words, group.rank(), limit)
    memory.mapped = handle, peers  # keeps the mappings alive
    return memory


@triton.jit(do_not_specialize=["call", "limit"])
def peer_memory_wait_kernel(
    flags_ptr,  # int32 [size], in this rank's buffer
    status_ptr,  # int32 [size], written: 1 for ranks whose flag did not reach `call`
    size,  # ranks
    call,  # int32, the value to wait for
    limit,  # polls
    LANES: tl.constexpr,  # size, rounded up to a power of two
):
    lane = tl.arange(0, LANES)
    behind = tl.full((LANES,), 1, tl.int32)
    polls = 0
    while (tl.max(behind) != 0) & (polls < limit):
        flag = tl.atomic_add(flags_ptr + lane, 0, mask=lane < size, sem="acquire", scope="sys")
        # The sign of the difference is right after an overflow, too.
        behind = ((flag - call < 0) & (lane < size)).to(tl.int32)
        polls += 1
    tl.store(status_ptr + lane, 1, mask=(behind != 0) & (lane < size))


@triton.jit(do_not_specialize=["call"])
def peer_memory_signal_kernel(
    base_ptr,  # int32, this rank's buffer
    flags_ptr,  # int64 [size], the offset of this rank's flag in each rank's buffer, in words
    status_ptr,  # int32 [size], no flag is set if any entry is not 0
    size,  # ranks
    call,  # int32, the value to set, after all writes of earlier kernels
    LANES: tl.constexpr,  # size, rounded up to a power of two
):
    lane = tl.arange(0, LANES)
    given_up = tl.max(tl.load(status_ptr + lane, mask=lane < size, other=0)) != 0
    flag = tl.load(flags_ptr + lane, mask=lane < size, other=0)
    mask = (lane < size) & (not given_up)
    call = tl.full((LANES,), 0, tl.int32) + call
    tl.atomic_xchg(base_ptr + flag, call, mask=mask, sem="release", scope="sys")


@triton.jit
def peer_memory_copy_kernel(
    source_ptr,  # int32
    target_ptr,  # int32
    spans_ptr,  # int64 [3, size]: start in source, start in target, length, in words
    status_ptr,  # int32 [size], ranks that are not 0 are skipped
    size,  # ranks
    BLOCK: tl.constexpr,  # words per program
):
    rank = tl.program_id(1)
    source = source_ptr + tl.multiple_of(tl.load(spans_ptr + rank), 4)
    target = target_ptr + tl.multiple_of(tl.load(spans_ptr + size + rank), 4)
    words = tl.multiple_of(tl.load(spans_ptr + 2 * size + rank), 4)
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (word < words) & (tl.load(status_ptr + rank) == 0)
    tl.store(target + word, tl.load(source + word, mask=mask), mask=mask)
