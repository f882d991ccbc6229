"""Each error that the emulator must report: kernels of csrc/emulator/kernels/misuses.cpp."""

from __future__ import annotations

import re

import pytest
import torch

from bench.emulator import CSRC

from .conftest import EmulatorFailure, call

pytestmark = pytest.mark.slow  # compiles the emulator

# The error of each kernel of csrc/emulator/kernels/misuses.cpp.
ERRORS = {
    "too much shared memory": "at most 232448 bytes of shared memory per block, got 232449",
    "too many registers": "at most 255 registers per thread, got 256",
    "too large a cluster": "at most 8 blocks per cluster, got 16",
    "a barrier not initialized": "barrier_arrive: no initialized barrier at offset 4096",
    "barrier count 0": "barrier_init: count: expected 1 to 2.20 - 1, got 0",
    "a barrier initialized twice": "barrier_init: the barrier is initialized already",
    "a barrier not aligned": "barrier_init: address is not aligned",
    "a barrier without an arrival": r"barrier at offset 4096, parity 0 \(pending: 1 of 1 arrivals",
    "parity 2": "barrier_wait: parity: expected 0 or 1, got 2",
    "too many arrivals": r"barrier at offset 4096, parity 1 \(pending: 63 of 64 arrivals",
    "too many bytes": "a barrier expects more than 2.20 - 1 bytes",
    "fewer bytes than expected": r"\(pending: 0 of 1 arrivals and 16 bytes",
    "a store to a barrier": "store_shared overwrites the barrier at offset 4096",
    "a copy over a barrier": "bulk_load overwrites the barrier at offset 4096",
    "a box over a barrier": "tma_load overwrites the barrier at offset 4096",
    "half of a named barrier's threads": "32 lanes wait for named barrier 3",
    "named barrier 16": "named barrier: id: expected 1 to 15, got 16",
    "named barrier 0": "named barrier 0 is reserved for block_sync",
    "a named barrier of two sizes": "named barrier 2: threads: expected .* as in another call",
    "a named barrier of 100 threads": "named barrier: threads: expected .* up to 1024, got 100",
    "two arrivals of one thread": "named barrier 1: the warp arrives twice in one phase",
    "warp_sync without one lane": "31 lanes wait for warp_sync by all lanes",
    "block_sync without one thread": "31 lanes wait for block_sync",
    "half a warp at a named barrier": "16 lanes wait for named barrier 1 by all lanes",
    "a warp at two named barriers": "lanes of the warp diverge: .* named_barrier_sync with other",
    "one lane at a barrier it need not wait for": "named_barrier_arrive: called by 1 lanes",
    "cluster_arrive without one lane": "cluster_arrive: called by 31 lanes of the warp only",
    "cluster_wait without cluster_arrive": "cluster_wait: no cluster_arrive since the last call",
    "cluster_arrive without cluster_wait": "cluster_arrive: no cluster_wait since the last call",
    "a missing rank": "barrier_arrive_remote: no block of rank 1",
    "multicast to a missing rank": "tma_load_multicast: no block of rank 1",
    "a store past shared memory": "store_shared: 4 bytes at offset 16384 are not in the 16384",
    "a load before shared memory": "load_shared: 4 bytes at offset -4 are not in",
    "a plain store past shared memory": "wrote past the end of its shared memory",
    "a store not aligned": "store_shared: address is not aligned",
    "a load not aligned": "load_shared: address is not aligned",
    "four floats not aligned": "load_shared_at: address is not aligned",
    "a matrix not aligned": "store_matrix_x4: address is not aligned",
    "lane 32": "shuffle_from: lane: expected 0 to 31, got 32",
    "lane mask 32": "shuffle_xor: lane mask: expected 0 to 31, got 32",
    "a map past its tensor": r"tma_load: out of bounds: 32 bytes at offset 32 .* write\[0\]",
    "a map with too small a row stride": "tma_load: unsupported shape or row stride",
    "a map of rows of 24 bytes": "tma_load: rows are not multiples of 16 bytes",
    "a box of 257 rows": "tma_load: 8224 bytes|tma_load: box is too large",
    "a swizzled box of 32 bytes": "tma_load: rows of a swizzled box must have 128 bytes",
    "a box not aligned": "tma_load: tile is not aligned",
    "a copy of 24 bytes": "bulk_load: addresses and size must be multiples of 16 bytes",
    "a copy without barrier_init_fence": "bulk_load: no barrier_init_fence after barrier_init",
    "a copy past its tensor": r"bulk_load: out of bounds: 48 bytes at offset 0 .* read\[0\]",
    "an asynchronous copy not aligned": "copy_async: addresses must be multiples of 16 bytes",
    "an asynchronous copy past its tensor": r"copy_async: out of bounds: 16 bytes .* read\[0\]",
    "an asynchronous copy over a barrier": "copy_async overwrites the barrier at offset 4096",
    "copies that arrive at no barrier": "barrier_arrive_after_copies: no initialized barrier",
    "copies that arrive once too often": r"barrier at offset 4096, parity 1 \(pending: 63 of 64",
    "copies that arrived, read without a wait": "a copy wrote: this thread has not waited",
    "copies that arrived, overwritten by a copy": "overwrites .* cp.async wrote: no fence_async",
    "copies that arrived, stored by TMA": "tma_store reads .* cp.async wrote: no fence",
    "a copy over stores without a fence": "bulk_load overwrites .* thread 0 wrote and no fence",
    "a load of a copy without a wait": "load_shared reads .* a copy wrote: this thread has not",
    "a store over a copy without a wait": "store_shared overwrites .* a copy wrote: this thread",
    "a copy that one of two warps waits for": "load_shared reads .* a copy wrote: this thread",
    "more bytes than announced": "more than 2.20 - 1 bytes that no thread has announced",
    "a TMA store without a fence": "tma_store reads .* no fence_async_proxy followed",
    "a TMA store not committed": "the thread ends with uncommitted TMA stores",
    "a TMA store not waited for": "the block ends while a TMA store still reads",
    "a TMA store to a read-only tensor": r"tma_store: writes at .* read\[0\], which is read-only",
    "an operand from row 1": "expected a tile aligned to 8 rows of 128 bytes",
    "an operand without swizzle": "expected the 128-byte swizzle",
    "a reserved bit in a descriptor": "wgmma: descriptor: a reserved bit is set",
    "a base offset": "wgmma: descriptor: expected base offset 0",
    "an operand copied without a wait": "wgmma reads .* a copy wrote: this thread has not waited",
    "an operand not aligned": "matrix_descriptor: address and strides must be multiples of 16",
    "too large a stride": "matrix_descriptor: expected strides below 2.18 bytes",
    "different operands in a warpgroup": "the threads of the warpgroup issue different operands",
    "an operand not fenced": "wgmma reads .* which thread 0 wrote and no fence_async_proxy",
    "an operand copied asynchronously, fenced before the wait": "thread 0 wrote and no fence_async",
    "an operand copied asynchronously, without a wait": "which thread 0 wrote and no fence_async",
    "an operand that arrived, fenced before the wait": "cp.async wrote: no fence_async_proxy",
    "an operand that arrived, fenced by one warp": "cp.async wrote: no fence_async_proxy followed",
    "an operand that arrived, without a wait": "a copy wrote: this thread|wrote and no fence_async",
    "wgmma without a fence": "no wgmma_fence since its registers were last written",
    "wgmma fenced before its sums are set": "written after the last wgmma_fence",
    "wgmma on its result without a fence": "no wgmma_fence since its registers were last written",
    "wgmma without one lane's commit": "diverge: one calls wgmma_\\w+, another wgmma_",
    "wgmma never waited for": "the thread ends without a wait for its last WGMMA",
    "100 registers": "setmaxnreg: expected a multiple of 8 from 24 to 256, got 100",
    "20 registers": "setmaxnreg: expected a multiple of 8 from 24 to 256, got 20",
    "an increase to fewer registers": "setmaxnreg: cannot increase from 255 to 40",
    "a read past a tensor": r"load_global: out of bounds: 4 bytes at offset 32 .* read\[0\]",
    "a read before a tensor": "load_written: out of bounds: 4 bytes",
    "a write past a tensor": r"store_global: out of bounds: 4 bytes at offset 32 .* write\[0\]",
    "a write to a read-only tensor": r"store_global: writes at .* read\[0\], which is read-only",
    "a read not aligned": "load_global: address is not aligned to 4 bytes",
    "two blocks write": r"store_global: data race at offset \d .* write\[0\], which block \d",
    "one block reads, one writes": r"write\[0\], which block \d (read|wrote): .* not synchronized",
    "atomic and plain": r"which (block \d|an atomic operation) wrote: .* not synchronized",
    "a constant read of written memory": "which load_global read: .* not synchronized",
    "an exception of the kernel": "message of the kernel",
}


ERROR_ORDERS = {  # where one order alone shows the error
    "a TMA store not waited for": "latest",
    **dict.fromkeys(
        ("a load of a copy without a wait", "a store over a copy without a wait",
         "a copy that one of two warps waits for", "an operand copied without a wait",
         "copies that arrived, read without a wait",
         "more bytes than announced"), "earliest"),
}  # fmt: skip


def error_of(kernels, misuse: str, order: str) -> str:
    writable, constants = (torch.zeros(8, dtype=torch.int32) for _ in range(2))
    with pytest.raises(EmulatorFailure) as caught:
        call(kernels, "emulate_misuse", misuse.encode(), writable, constants, read=[constants],
             write=[writable], order=order)  # fmt: skip
    return str(caught.value)


@pytest.mark.parametrize("misuse", ERRORS)
def test_misuse_is_reported(kernels, misuse):
    message = error_of(kernels, misuse, ERROR_ORDERS.get(misuse, "random"))
    assert re.search(ERRORS[misuse], message, re.DOTALL), message


def test_every_misuse_has_an_error():
    text = (CSRC / "emulator" / "kernels" / "misuses.cpp").read_text()
    planted = set(re.findall(r'name [!=]= "([^"]+)"', text))
    assert planted == set(ERRORS), planted ^ set(ERRORS)
