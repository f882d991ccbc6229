"""The places of the k largest values of every row: which keys sparse attention reads.

    out[s] = the k places n < lengths[s] with the largest logits[s, n], ascending, then -1

A value becomes an integer that orders as values do; the k-th largest of these is found bit by bit
from the top, by counting how many are at least as large, until exactly k are. Then all larger ones
are taken, and of equal ones the first, in the order of their places (a prefix sum).

Cut: a program takes a chunk of a row, at most 16384 values, and keeps it in registers while it
counts. Of a longer row every chunk gives its own k, with their integers, and the same kernel
chooses among these, chunks of them again, until one is left. So a long row is as parallel as many
short ones, no atomic is needed, and whatever the cut, the result is the same. Counting bounds the
speed: 3 instructions a value and bit, until exactly k are left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..runtime.contract import check_that
from ..runtime.op import op

MAX_K = 4096
MAX_N = 2**30
TILES = (1024, 4096, 16384)  # values of a chunk, for rows up to that length; the last for all
PART = 2048  # values of a chunk whose places are given out at a time
ABSENT = tl.constexpr(-0x80000000)  # below the key of every value


@op(logits="fp32|bf16 [S, N]", lengths="int32 [S]")
def topk_indices(logits: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
    """The places of the k largest values in the first `lengths` of every row.

    Args:
        logits: fp32 or bf16 [S, N], N at most 2**30; rows may be strided. NaN counts as -inf, -0
            as 0.
        k: at most 4096; it may exceed N.
        lengths: int32 [S], how many values of a row count, clamped to [0, N]; N for all if None.

    Returns:
        int32 [S, k], each row in ascending order, then -1 where there are fewer than k values. Of
        equal values those with lower places are taken. -inf is a value like any other.

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for lengths
            outside [0, N].
    """
    check_that("topk_indices", "k", 0 <= k <= MAX_K, f"a number from 0 to {MAX_K}", k)
    S, N = logits.shape
    check_that("topk_indices", "logits", N <= MAX_N, f"rows of at most {MAX_N} values",
               f"shape {tuple(logits.shape)}")  # fmt: skip
    return logits.new_empty((S, k), dtype=torch.int32)


@topk_indices.op.register_tile
def choose_tile(logits: Tensor, *_) -> int:
    """Values of a chunk."""
    return next((t for t in TILES if t >= logits.shape[1]), TILES[-1])


@topk_indices.op.register_launcher("triton")
def _launch_triton(logits: Tensor, k: int, lengths: Tensor | None) -> Tensor:
    out = topk_indices.op.allocate(logits, k, lengths)
    (S, N), TILE = logits.shape, choose_tile(logits)
    if out.numel() == 0:
        return out
    keys, places, row, last = logits, None, logits.stride(0), False
    while not last:
        chunks = max(cdiv(N, TILE), 1)
        last = chunks == 1
        chosen = out if last else out.new_empty((S, chunks * k))
        chosen_keys = None if last else torch.empty_like(chosen)
        topk_indices_kernel[(S * chunks,)](
            keys, places, lengths, chosen_keys, chosen, N, k, chunks, row,
            LOWEST_BIT=16 if logits.dtype == torch.bfloat16 else 0, TILE=TILE, PART=min(TILE, PART),
            num_warps=max(TILE // 1024, 4),
        )  # fmt: skip
        keys, places, lengths = chosen_keys, chosen, None
        N = row = chunks * k
    return out


@triton.jit(do_not_specialize=["k", "chunks"])
def topk_indices_kernel(
    keys_ptr, places_ptr, length_ptr, chosen_keys_ptr, chosen_ptr, N, k, chunks, row,
    LOWEST_BIT: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Chooses among a chunk of a row: of logits, or of candidates with their keys and places."""
    s = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * TILE
    length = N
    if length_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(length_ptr + s), 0), N)
    keys = keys_ptr + s * row
    chunk = load_keys(keys, first + tl.arange(0, TILE), length)
    threshold, present = kth_largest(chunk, k, LOWEST_BIT)
    room = k - tl.sum((chunk > threshold).to(tl.int32))  # for values equal to the threshold

    # Places are given out part by part: a prefix sum over all would take too many registers.
    out = tl.program_id(0).to(tl.int64) * k
    larger_before, equal_before = 0, 0
    for begin in range(first, tl.minimum(first + TILE, length), PART):
        at = begin + tl.arange(0, PART)
        key = load_keys(keys, at, length)
        larger = key > threshold
        equal = (key == threshold) & (key > ABSENT)
        # Both are counted by one sum: each is at most PART.
        sums = tl.cumsum(tl.where(equal, 0x10000, larger.to(tl.int32)), 0)
        equal_rank = equal_before + (sums >> 16)
        slot = larger_before + (sums & 0xFFFF) + tl.minimum(equal_rank, room) - 1
        taken = larger | (equal & (equal_rank <= room))
        place = at
        if places_ptr is not None:
            place = tl.load(places_ptr + s * row + at, mask=taken, other=-1)
        tl.store(chosen_ptr + out + slot, place, mask=taken)
        if chosen_keys_ptr is not None:
            tl.store(chosen_keys_ptr + out + slot, key, mask=taken)
        larger_before += tl.sum(larger.to(tl.int32))
        equal_before += tl.sum(equal.to(tl.int32))
    for begin in range(tl.minimum(present, k), k, PART):
        rest = begin + tl.arange(0, PART)
        tl.store(chosen_ptr + out + rest, -1, mask=rest < k)
        if chosen_keys_ptr is not None:
            tl.store(chosen_keys_ptr + out + rest, ABSENT, mask=rest < k)


@triton.jit
def kth_largest(keys, k, LOWEST_BIT: tl.constexpr):
    """The largest threshold that k keys reach (ABSENT if they are fewer), and how many there are.

    A threshold that exactly k reach will do as well: no key lies between the two.
    """
    threshold = ABSENT
    present = tl.sum((keys > threshold).to(tl.int32))
    count = present
    bit = 31
    while (bit >= LOWEST_BIT) & (count > k):
        higher = threshold ^ (1 << bit)
        reached = tl.sum((keys >= higher).to(tl.int32))
        if reached >= k:
            threshold = higher
            count = reached
        bit -= 1
    return threshold, present


@triton.jit
def load_keys(keys, at, length):
    """The keys of values, or keys as they are (int32); ABSENT past the length."""
    if keys.dtype.element_ty == tl.int32:
        key = tl.load(keys + at, mask=at < length, other=ABSENT)
    else:
        key = sortable(tl.load(keys + at, mask=at < length, other=0.0))
        key = tl.where(at < length, key, ABSENT)
    return key


@triton.jit
def sortable(x):
    """int32 that order as the values do; of bf16 the lower half is zero."""
    bits = tl.where(x == x, x.to(tl.float32), float("-inf")).to(tl.int32, bitcast=True)
    bits = tl.where(bits == -0x80000000, 0, bits)  # -0 is 0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if x.dtype == tl.bfloat16:
        key = key & -0x10000
    return key


@topk_indices.op.register_debug_check
def check_contents(logits: Tensor, k: int, lengths: Tensor | None) -> None:
    if lengths is not None:
        N = logits.shape[1]
        wrong = lengths[(lengths < 0) | (lengths > N)]
        check_that("topk_indices", "lengths", wrong.numel() == 0,
                   f"lengths in [0, {N}]", wrong[:1].tolist())  # fmt: skip
