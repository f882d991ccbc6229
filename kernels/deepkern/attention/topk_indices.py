"""The indices of the k largest values of every row: the keys that sparse attention reads.

    out[s] = the k indices n < lengths[s] with the largest logits[s, n], ascending, then -1

Each value is converted to an int32 key with the same order. The k-th largest key (the threshold) is
found bit by bit from the top, by counting the keys that are at least as large, until exactly k are.
All larger keys are selected, and of the equal ones the first, by a prefix sum over the indices.

Parallelization: one program selects k of a chunk of a row, at most 16384 values, which it keeps in
registers. A longer row has several chunks. The kernel then runs again on their candidates, with
keys and indices, until one chunk is left. So a long row has as much parallelism as many short ones.
No atomics are needed, and the result does not depend on the chunks.

Limit: counting, 3 instructions per value and bit, until exactly k keys are left.

Source: radix selection, with digits of one bit.
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
TILES = (1024, 4096, 16384)  # values per chunk: the first that holds the row, else the last
PART = 2048  # values per prefix sum; one over 16384 values spills 632 bytes on sm_90
EMPTY_KEY = tl.constexpr(-0x80000000)  # less than the key of every value


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
    """Values per chunk."""
    return next((tile for tile in TILES if tile >= logits.shape[1]), TILES[-1])


@topk_indices.op.register_launcher("triton")
def _launch_triton(logits: Tensor, k: int, lengths: Tensor | None) -> Tensor:
    out = topk_indices.op.allocate(logits, k, lengths)
    (S, N), TILE = logits.shape, choose_tile(logits)
    if out.numel() == 0:
        return out
    values, indices, row_stride, is_last = logits, None, logits.stride(0), False
    while not is_last:
        num_chunks = max(cdiv(N, TILE), 1)
        is_last = num_chunks == 1
        selected = out if is_last else out.new_empty((S, num_chunks * k))
        selected_keys = None if is_last else torch.empty_like(selected)
        topk_indices_kernel[(S * num_chunks,)](
            values, indices, lengths, selected_keys, selected, N, k, num_chunks, row_stride,
            LOWEST_BIT=16 if logits.dtype == torch.bfloat16 else 0, TILE=TILE, PART=min(TILE, PART),
            num_warps=max(TILE // 1024, 4),
        )  # fmt: skip
        values, indices, lengths = selected_keys, selected, None
        N = row_stride = num_chunks * k
    return out


@triton.jit(do_not_specialize=["k", "num_chunks"])
def topk_indices_kernel(
    values_ptr,  # fp32 or bf16 [S, N]; after the first round int32 keys of candidates
    indices_ptr,  # int32 [S, N], the indices of the candidates; None in the first round
    lengths_ptr,  # int32 [S], or None
    selected_keys_ptr,  # int32 [S, num_chunks, k]; None in the last round
    selected_ptr,  # int32 [S, num_chunks, k], indices
    N,
    k,
    num_chunks,  # ceil(N / TILE)
    row_stride,  # elements, of values and indices
    LOWEST_BIT: tl.constexpr,  # lowest bit of a key that is not always 0
    TILE: tl.constexpr,  # values per chunk
    PART: tl.constexpr,  # values per prefix sum
):
    s = (tl.program_id(0) // num_chunks).to(tl.int64)
    first = tl.program_id(0) % num_chunks * TILE
    length = N
    if lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + s), 0), N)
    row_ptr = values_ptr + s * row_stride
    keys = load_keys(row_ptr, first + tl.arange(0, TILE), length)
    threshold, num_valid = kth_largest(keys, k, LOWEST_BIT)
    num_ties = k - tl.sum((keys > threshold).to(tl.int32))  # keys equal to the threshold to select

    # Selected values are written part by part, with a prefix sum over each part.
    out = tl.program_id(0).to(tl.int64) * k
    larger_before, equal_before = 0, 0
    for begin in range(first, tl.minimum(first + TILE, length), PART):
        column = begin + tl.arange(0, PART)
        key = load_keys(row_ptr, column, length)
        larger = key > threshold
        equal = (key == threshold) & (key > EMPTY_KEY)
        # One prefix sum counts both, in 16 bits each: each is at most PART.
        sums = tl.cumsum(tl.where(equal, 0x10000, larger.to(tl.int32)), 0)
        equal_rank = equal_before + (sums >> 16)
        slot = larger_before + (sums & 0xFFFF) + tl.minimum(equal_rank, num_ties) - 1
        selected = larger | (equal & (equal_rank <= num_ties))
        index = column
        if indices_ptr is not None:
            index = tl.load(indices_ptr + s * row_stride + column, mask=selected, other=-1)
        tl.store(selected_ptr + out + slot, index, mask=selected)
        if selected_keys_ptr is not None:
            tl.store(selected_keys_ptr + out + slot, key, mask=selected)
        larger_before += tl.sum(larger.to(tl.int32))
        equal_before += tl.sum(equal.to(tl.int32))
    for begin in range(tl.minimum(num_valid, k), k, PART):
        slot = begin + tl.arange(0, PART)
        tl.store(selected_ptr + out + slot, -1, mask=slot < k)
        if selected_keys_ptr is not None:
            tl.store(selected_keys_ptr + out + slot, EMPTY_KEY, mask=slot < k)


@triton.jit
def kth_largest(
    keys,  # int32 [TILE], EMPTY_KEY where there is no value
    k,
    LOWEST_BIT: tl.constexpr,
):
    """The largest threshold with keys >= threshold for at least k keys, and the number of values.

    The threshold is EMPTY_KEY if there are fewer than k values. The search ends early at a
    threshold with exactly k keys: it selects the same keys.
    """
    threshold = EMPTY_KEY
    num_valid = tl.sum((keys > threshold).to(tl.int32))
    count = num_valid
    bit = 31
    while (bit >= LOWEST_BIT) & (count > k):
        higher = threshold ^ (1 << bit)
        num_higher = tl.sum((keys >= higher).to(tl.int32))
        if num_higher >= k:
            threshold = higher
            count = num_higher
        bit -= 1
    return threshold, num_valid


@triton.jit
def load_keys(
    row_ptr,  # fp32 or bf16 values, or int32 keys
    column,  # [COLUMNS]
    length,  # columns from here on have EMPTY_KEY
):
    """The keys of a row's values."""
    mask = column < length
    if row_ptr.dtype.element_ty == tl.int32:
        key = tl.load(row_ptr + column, mask=mask, other=EMPTY_KEY)
    else:
        key = order_preserving_key(tl.load(row_ptr + column, mask=mask, other=0.0))
        key = tl.where(mask, key, EMPTY_KEY)
    return key


@triton.jit
def order_preserving_key(x):
    """int32 keys in the order of the values; the lower 16 bits are 0 for bf16."""
    bits = tl.where(x == x, x.to(tl.float32), float("-inf")).to(tl.int32, bitcast=True)
    bits = tl.where(bits == -0x80000000, 0, bits)  # -0 is 0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if x.dtype == tl.bfloat16:
        key = key & -0x10000
    return key


@topk_indices.op.register_debug_check
def check_contents(logits: Tensor, k: int, lengths: Tensor | None) -> None:
    """For DEEPKERN_DEBUG=1: lengths are in [0, N]."""
    if lengths is not None:
        N = logits.shape[1]
        wrong = lengths[(lengths < 0) | (lengths > N)]
        check_that("topk_indices", "lengths", wrong.numel() == 0,
                   f"lengths in [0, {N}]", wrong[:1].tolist())  # fmt: skip
