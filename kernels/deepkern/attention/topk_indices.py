"""The indices of the k largest values of every row: the keys that sparse attention reads.

    out[s] = the k indices n < lengths[s] with the largest logits[s, n], ascending, then -1

A value becomes an int32 key with the same order. The k-th largest key (the threshold) is found bit
by bit from the top, by counting the keys that are at least as large, until exactly k are. All
larger keys are selected, and of the equal ones the first.

Parallelization: one program per row of at most 4096 values. Longer rows take three launches:

1. `topk_indices_maxima_kernel`, one program per 256 groups of columns: the maximum of each group.
   There are at least 2k groups. Group j has column r * GROUPS + (j + 256 r) % GROUPS for every r:
   without 256 r, each group of a row with period GROUPS would have equal values only.
2. `topk_indices_candidates_kernel`, one program per 1 to 4 chunks of 4096 values: finds a bound
   that k to k + k/8 maxima reach, and so at least k values (or all, if there are fewer). Appends
   the indices that reach it to the row's list: about 1.5k of values in random order.
3. `topk_indices_select_kernel`, one program per 4 chunks: finds the threshold in the list, counts
   the selected indices of earlier chunks there, and writes those of its own chunks.

In these a key and its index are one int64 rank, the lower index first, so that ties do not lengthen
the list. An atomic counter orders the chunks of the list; the result does not depend on it.

Limit: counting, 3 instructions per key and bit, of the row, or of its maxima and its list in each
program.

Source: radix selection with digits of one bit; maxima of groups as in Dr. Top-k (Gaihre et al.,
SC 2021).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv, next_power_of_2
from ..runtime.contract import check_that
from ..runtime.op import op

MAX_K = 4096
MAX_N = 2**30
TILES = (1024, 4096)  # values per program, or chunk: the first that holds the row, else the last
PART = 2048  # values per prefix sum of a row of one program
GROUPS_PER_PROGRAM = 256
CHUNKS_PER_PROGRAM = 4  # of the third launch; the second has at most as many
NO_KEY = tl.constexpr(-(2**31))  # less than the key of every value
NO_RANK = tl.constexpr(-(2**61))  # at most the rank of any column with NO_KEY
NO_COLUMN = tl.constexpr(2**31 - 1)


@op(logits="fp32|bf16 [S, N]", lengths="int32 [S]")
def topk_indices(logits: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
    """The indices of the k largest among the first `lengths` values of every row.

    Args:
        logits: fp32 or bf16 [S, N], N at most 2**30; rows may be strided. NaN counts as -inf, -0
            as 0.
        k: at most 4096; it may exceed N.
        lengths: int32 [S], the number of values of each row, clamped to [0, N]; N if None.

    Returns:
        int32 [S, k], each row in ascending order, then -1 if there are fewer than k values. Equal
        values are selected by lower index. -inf is an ordinary value.

    Raises:
        TypeError, ValueError: an argument is not as above; with DEEPKERN_DEBUG=1 also for lengths
            outside [0, N].

    Example:
        >>> deepkern.topk_indices(torch.tensor([[0.5, 3.0, 1.0, 2.0]]), 2)
        tensor([[1, 3]], dtype=torch.int32)
    """
    check_that("topk_indices", "k", 0 <= k <= MAX_K, f"a number from 0 to {MAX_K}", k)
    S, N = logits.shape
    check_that("topk_indices", "logits", N <= MAX_N, f"rows of at most {MAX_N} values",
               f"shape {tuple(logits.shape)}")  # fmt: skip
    # Fake kernel: allocates the output; the launcher of a backend computes it.
    return logits.new_empty((S, k), dtype=torch.int32)


@topk_indices.op.register_tile
def choose_tile(logits: Tensor, *_) -> int:
    """Values per program, or per chunk of a longer row."""
    return next((tile for tile in TILES if tile >= logits.shape[1]), TILES[-1])


@topk_indices.op.register_launcher("triton")
def _launch_triton(logits: Tensor, k: int, lengths: Tensor | None) -> Tensor:
    out = topk_indices.op.allocate(logits, k, lengths)
    (S, N), TILE = logits.shape, choose_tile(logits)
    if out.numel() == 0:
        return out
    rows = (logits, lengths, N, logits.stride(0))
    if N <= TILE:
        topk_indices_kernel[(S,)](*rows, out, k, TILE=TILE, PART=min(TILE, PART), num_warps=4)
    else:
        _select_from_long_rows(rows, out, TILE)
    return out


def _select_from_long_rows(rows: tuple, out: Tensor, CHUNK: int) -> None:
    """Writes the indices of rows of more than CHUNK values; `rows` as in the launcher."""
    (S, k), N = out.shape, rows[2]
    GROUPS, num_chunks = max(next_power_of_2(2 * k), 1024), cdiv(N, CHUNK)
    # Maxima that may reach the bound; exactly k would take twice as many steps.
    max_reached = k + k // 8
    capacity = min(max_reached * cdiv(N, GROUPS), N)  # a group has one value per GROUPS columns
    maxima = torch.empty((S, GROUPS), dtype=torch.int64, device=out.device)
    bounds, chunks = out.new_empty((S, 2)), out.new_empty((S, num_chunks, 2))
    candidates, num_candidates = out.new_empty((S, capacity)), out.new_empty(S)
    topk_indices_maxima_kernel[(S * (GROUPS // GROUPS_PER_PROGRAM),)](
        *rows, maxima, num_candidates, GROUPS=GROUPS, GROUPS_PER_PROGRAM=GROUPS_PER_PROGRAM,
        num_warps=2,
    )  # fmt: skip
    found = (bounds, candidates, num_candidates, chunks)
    # More chunks per program of a long row: each program searches all maxima.
    chunks_per_program = min(max(num_chunks // 16, 1), CHUNKS_PER_PROGRAM)
    topk_indices_candidates_kernel[(S * cdiv(num_chunks, chunks_per_program),)](
        *rows, maxima, *found, k, max_reached, num_chunks, chunks_per_program, capacity,
        GROUPS=GROUPS, CHUNK=CHUNK, num_warps=max(GROUPS // 1024, 4),
    )  # fmt: skip
    num_programs = cdiv(num_chunks, CHUNKS_PER_PROGRAM)
    topk_indices_select_kernel[(S * num_programs,)](
        *rows, *found, out, k, num_chunks, num_programs, capacity,
        LIST=GROUPS, CHUNK=CHUNK, CHUNKS_PER_PROGRAM=CHUNKS_PER_PROGRAM,
        num_warps=max(GROUPS // 512, 8),
    )  # fmt: skip


@triton.jit(do_not_specialize=["k"])
def topk_indices_kernel(
    logits_ptr,  # fp32 or bf16 [S, N]
    lengths_ptr,  # int32 [S], or None
    N,
    row_stride,  # elements
    out_ptr,  # int32 [S, k]
    k,
    TILE: tl.constexpr,  # values per program, at least N
    PART: tl.constexpr,  # values per prefix sum
):
    s = tl.program_id(0).to(tl.int64)
    row_ptr, length = logits_ptr + s * row_stride, row_length(lengths_ptr, s, N)
    keys = load_keys(row_ptr, tl.arange(0, TILE), length)
    lowest, highest = lowest_key(keys), tl.max(keys)
    threshold, _ = kth_key(keys, lowest, highest, k, k, None, length, row_ptr)
    num_ties = k - tl.sum((keys > threshold).to(tl.int32))  # keys equal to the threshold to select

    # Selected values are written part by part, with a prefix sum over each part.
    out_ptr += s * k
    larger_before, equal_before = 0, 0
    for first in range(0, length, PART):
        column = first + tl.arange(0, PART)
        key = load_keys(row_ptr, column, length)
        larger = key > threshold
        equal = key == threshold
        # One prefix sum counts both, in 16 bits each: each is at most PART.
        sums = tl.cumsum(tl.where(equal, 0x10000, larger.to(tl.int32)), 0)
        equal_rank = equal_before + (sums >> 16)
        slot = larger_before + (sums & 0xFFFF) + tl.minimum(equal_rank, num_ties) - 1
        tl.store(out_ptr + slot, column, mask=larger | (equal & (equal_rank <= num_ties)))
        larger_before += tl.sum(larger.to(tl.int32))
        equal_before += tl.sum(equal.to(tl.int32))
    for first in range(tl.minimum(length, k), k, PART):
        slot = first + tl.arange(0, PART)
        tl.store(out_ptr + slot, -1, mask=slot < k)


@triton.jit
def topk_indices_maxima_kernel(
    logits_ptr,  # fp32 or bf16 [S, N]
    lengths_ptr,  # int32 [S], or None
    N,
    row_stride,  # elements
    maxima_ptr,  # int64 [S, GROUPS], written
    num_candidates_ptr,  # int32 [S], written: 0
    GROUPS: tl.constexpr,
    GROUPS_PER_PROGRAM: tl.constexpr,
):
    num_programs: tl.constexpr = GROUPS // GROUPS_PER_PROGRAM
    s = (tl.program_id(0) // num_programs).to(tl.int64)
    program, lane = tl.program_id(0) % num_programs, tl.arange(0, GROUPS_PER_PROGRAM)
    row_ptr, length = logits_ptr + s * row_stride, row_length(lengths_ptr, s, N)
    maxima = tl.full((GROUPS_PER_PROGRAM,), NO_RANK, tl.int64)
    for first in range(0, length, 8 * GROUPS):
        for i in tl.static_range(8):  # so that eight loads are in flight
            # The same 256 groups have another place in each GROUPS columns.
            place = (program + first // GROUPS + i) % num_programs
            column = first + i * GROUPS + place * GROUPS_PER_PROGRAM + lane
            maxima = tl.maximum(maxima, load_ranks(row_ptr, column, length))
    tl.store(maxima_ptr + s * GROUPS + program * GROUPS_PER_PROGRAM + lane, maxima)
    tl.store(num_candidates_ptr + s, 0, mask=program == 0)


@triton.jit(do_not_specialize=["k", "max_reached", "num_chunks", "chunks_per_program", "capacity"])
def topk_indices_candidates_kernel(
    logits_ptr,  # fp32 or bf16 [S, N]
    lengths_ptr,  # int32 [S], or None
    N,
    row_stride,  # elements
    maxima_ptr,  # int64 [S, GROUPS]
    bounds_ptr,  # int32 [S, 2], written: a lower bound of the list's keys, and the highest
    candidates_ptr,  # int32 [S, capacity], written: columns, in order within a chunk
    num_candidates_ptr,  # int32 [S], 0, written
    chunks_ptr,  # int32 [S, num_chunks, 2], written: each chunk's entries of the list, [start, end)
    k,
    max_reached,  # maxima that may reach the bound
    num_chunks,  # ceil(N / CHUNK)
    chunks_per_program,
    capacity,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,  # values per chunk
):
    num_programs = tl.cdiv(num_chunks, chunks_per_program)
    s = (tl.program_id(0) // num_programs).to(tl.int64)
    first = tl.program_id(0) % num_programs * chunks_per_program
    row_ptr, length = logits_ptr + s * row_stride, row_length(lengths_ptr, s, N)
    if first * CHUNK < length:
        maxima = tl.load(maxima_ptr + s * GROUPS + tl.arange(0, GROUPS))
        keys = (maxima >> 30).to(tl.int32)
        lowest, highest = lowest_key(keys), tl.max(keys)
        bound = kth_rank(keys, maxima, lowest, highest, k, max_reached, None, GROUPS, row_ptr, N)
        tl.store(bounds_ptr + 2 * s, (bound >> 30).to(tl.int32), mask=first == 0)
        tl.store(bounds_ptr + 2 * s + 1, highest, mask=first == 0)
        for chunk in range(first, tl.minimum(first + chunks_per_program, tl.cdiv(length, CHUNK))):
            column = chunk * CHUNK + tl.arange(0, CHUNK)
            reaches = load_ranks(row_ptr, column, length) >= bound
            count = reaches.to(tl.int32)
            num_found = tl.sum(count)
            start = tl.atomic_add(num_candidates_ptr + s, num_found, sem="relaxed")
            entry = s * capacity + start + tl.cumsum(count, 0) - 1
            tl.store(candidates_ptr + entry, column, mask=reaches)
            chunk_ptr = chunks_ptr + (s * num_chunks + chunk) * 2
            tl.store(chunk_ptr, start)
            tl.store(chunk_ptr + 1, start + num_found)


@triton.jit(do_not_specialize=["k", "num_chunks", "num_programs", "capacity"])
def topk_indices_select_kernel(
    logits_ptr,  # fp32 or bf16 [S, N]
    lengths_ptr,  # int32 [S], or None
    N,
    row_stride,  # elements
    bounds_ptr,  # int32 [S, 2]: a lower bound of the list's keys, and the highest
    candidates_ptr,  # int32 [S, capacity], columns
    num_candidates_ptr,  # int32 [S]
    chunks_ptr,  # int32 [S, num_chunks, 2]: each chunk's entries of the list, [start, end)
    out_ptr,  # int32 [S, k]
    k,
    num_chunks,  # ceil(N / CHUNK)
    num_programs,  # per row
    capacity,
    LIST: tl.constexpr,  # candidates in registers
    CHUNK: tl.constexpr,  # values per chunk
    CHUNKS_PER_PROGRAM: tl.constexpr,
):
    s = (tl.program_id(0) // num_programs).to(tl.int64)
    chunk = tl.program_id(0) % num_programs * CHUNKS_PER_PROGRAM + tl.arange(0, CHUNKS_PER_PROGRAM)
    begin = tl.program_id(0) % num_programs * (CHUNKS_PER_PROGRAM * CHUNK)
    row_ptr, length = logits_ptr + s * row_stride, row_length(lengths_ptr, s, N)
    out_ptr += s * k
    if begin < length:
        candidates_ptr += s * capacity
        num_keys = tl.load(num_candidates_ptr + s)
        column = load_columns(candidates_ptr, tl.arange(0, LIST), num_keys)
        keys = load_keys(row_ptr, column, NO_COLUMN)
        ranks = as_ranks(keys, column)
        lowest, highest = tl.load(bounds_ptr + 2 * s), tl.load(bounds_ptr + 2 * s + 1)
        threshold = kth_rank(
            keys, ranks, lowest, highest, k, k, candidates_ptr, num_keys, row_ptr, N
        )
        earlier = count_earlier(ranks, threshold, begin)
        for first in range(LIST, num_keys, LIST):
            column = load_columns(candidates_ptr, first + tl.arange(0, LIST), num_keys)
            earlier += count_earlier(load_ranks(row_ptr, column, NO_COLUMN), threshold, begin)

        chunk_ptrs = chunks_ptr + (s * num_chunks + chunk) * 2
        start = tl.load(chunk_ptrs, mask=chunk * CHUNK < length, other=0)[:, None]
        end = tl.load(chunk_ptrs + 1, mask=chunk * CHUNK < length, other=0)[:, None]
        write_selected(row_ptr, candidates_ptr, start, end, threshold, out_ptr + earlier)
    first_slot = tl.minimum(length, k) + tl.program_id(0) % num_programs * 256
    for first in range(first_slot, k, num_programs * 256):
        slot = first + tl.arange(0, 256)
        tl.store(out_ptr + slot, -1, mask=slot < k)


@triton.jit
def write_selected(row_ptr, columns_ptr, start, end, threshold, out_ptr):
    """Writes the columns whose rank reaches the threshold, of entries [start, end) of each chunk.

    start, end: [CHUNKS, 1].
    """
    CHUNKS: tl.constexpr = start.shape[0]
    steps = tl.cdiv(tl.max(end - start), 256)
    counts = tl.zeros((CHUNKS, 1), tl.int32)
    for step in range(0, steps):
        column, selected = select_columns(row_ptr, columns_ptr, start + step * 256, end, threshold)
        counts += tl.sum(selected.to(tl.int32), 1, keep_dims=True)
    written = tl.cumsum(counts, 0) - counts
    for step in range(0, steps):
        column, selected = select_columns(row_ptr, columns_ptr, start + step * 256, end, threshold)
        count = selected.to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(count, 1) - 1, column, mask=selected)
        written += tl.sum(count, 1, keep_dims=True)


@triton.jit
def select_columns(row_ptr, columns_ptr, start, end, threshold):
    """256 columns of each chunk, and whether their ranks reach the threshold: [CHUNKS, 256]."""
    column = load_columns(columns_ptr, start + tl.arange(0, 256)[None, :], end)
    return column, load_ranks(row_ptr, column, NO_COLUMN) >= threshold


@triton.jit
def kth_key(
    keys,  # int32 [SIZE], NO_KEY where there is none
    lowest,  # at most the least key
    highest,  # the largest key
    k,
    max_reached,  # at least k
    columns_ptr,  # further keys are those of the columns from entry SIZE on; or None
    num_keys,  # with the further ones; those with NO_KEY may be counted too
    row_ptr,  # the row that the columns index
):
    """A threshold that at least k and at most `max_reached` keys reach, if ties permit.

    Also an upper bound of their number: `num_keys` if the threshold is `lowest`, as it is if there
    are fewer than k keys. Distances from `lowest` have few bits, so the search starts at the
    highest of these.
    """
    threshold, reached = lowest.to(tl.int64), num_keys
    # The exponent of a float32, which rounding may increase by one.
    spread = (highest.to(tl.int64) - threshold).to(tl.float32)
    bit = (spread.to(tl.int32, bitcast=True) >> 23) - 127
    while (reached > max_reached) & (bit >= 0):
        higher = threshold + (tl.full((), 1, tl.int64) << bit)
        num_higher = tl.sum((keys >= higher.to(tl.int32)).to(tl.int32))
        if columns_ptr is not None:
            rank = as_ranks(higher, 2**30 - 1)
            num_higher += count_further(columns_ptr, keys.shape[0], num_keys, row_ptr, rank)
        if (higher <= highest) & (num_higher >= k):
            threshold = higher
            reached = num_higher
        bit -= 1
    return threshold.to(tl.int32), reached


@triton.jit
def kth_rank(keys, ranks, lowest, highest, k, max_reached, columns_ptr, num_keys, row_ptr, N):
    """A threshold that at least k and at most `max_reached` ranks reach; all, if there are fewer.

    Parameters as in `kth_key`; ranks: those of `keys`; N: more than any column.
    """
    key, reached = kth_key(keys, lowest, highest, k, max_reached, columns_ptr, num_keys, row_ptr)
    threshold = as_ranks(key, N - 1)
    bit = (N.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    while (reached > max_reached) & (bit >= 0):
        higher = threshold + (1 << bit)
        num_higher = tl.sum((ranks >= higher).to(tl.int32))
        if columns_ptr is not None:
            num_higher += count_further(columns_ptr, keys.shape[0], num_keys, row_ptr, higher)
        if num_higher >= k:
            threshold = higher
            reached = num_higher
        bit -= 1
    return threshold


@triton.jit
def count_further(columns_ptr, SIZE: tl.constexpr, num_keys, row_ptr, threshold):
    """How many ranks of the columns from entry SIZE on reach the threshold."""
    count = 0
    for first in range(SIZE, num_keys, SIZE):
        column = load_columns(columns_ptr, first + tl.arange(0, SIZE), num_keys)
        count += tl.sum((load_ranks(row_ptr, column, NO_COLUMN) >= threshold).to(tl.int32))
    return count


@triton.jit
def count_earlier(ranks, threshold, begin):
    """How many ranks of columns before `begin` reach the threshold."""
    is_earlier = (ranks & (2**30 - 1)) >= 2**30 - begin
    return tl.sum(((ranks >= threshold) & is_earlier).to(tl.int32))


@triton.jit
def lowest_key(keys):
    """The lowest key, without NO_KEY."""
    return tl.min(tl.where(keys > NO_KEY, keys, 2**31 - 1))


@triton.jit
def row_length(lengths_ptr, s, N):
    """The length of row s, in [0, N]."""
    length = N
    if lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + s), 0), N)
    return length


@triton.jit
def load_columns(columns_ptr, entry, end):
    """Entries of a list; NO_COLUMN from entry `end` on."""
    return tl.load(columns_ptr + entry, mask=entry < end, other=NO_COLUMN)


@triton.jit
def load_ranks(row_ptr, column, length):
    """The int64 ranks of a row's values; NO_RANK from column `length` on."""
    return tl.where(column < length, as_ranks(load_keys(row_ptr, column, length), column), NO_RANK)


@triton.jit
def as_ranks(key, column):
    """int64 ranks of values: the key above 30 bits in which lower columns are larger."""
    return key.to(tl.int64) * 2**30 + (2**30 - 1 - column)


@triton.jit
def load_keys(row_ptr, column, length):
    """int32 keys in the order of a row's values (16 bits for bf16); NO_KEY from `length` on."""
    mask = column < length
    x = tl.load(row_ptr + column, mask=mask, other=0.0)
    x = tl.maximum(x.to(tl.float32), float("-inf")) + 0.0  # NaN is -inf, -0 is 0
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if row_ptr.dtype.element_ty == tl.bfloat16:
        key = key >> 16
    return tl.where(mask, key, NO_KEY)


@topk_indices.op.register_debug_check
def check_contents(logits: Tensor, k: int, lengths: Tensor | None) -> None:
    """For DEEPKERN_DEBUG=1: lengths are in [0, N]."""
    if lengths is not None:
        N = logits.shape[1]
        wrong = lengths[(lengths < 0) | (lengths > N)]
        check_that("topk_indices", "lengths", wrong.numel() == 0,
                   f"lengths in [0, {N}]", wrong[:1].tolist())  # fmt: skip
