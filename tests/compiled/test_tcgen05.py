"""tcgen05 of csrc/ptx/tcgen05_layout.h: products, instruction descriptors, cells."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from numpy import ndarray

from tests.compiled.operands import (
    CASES,
    SIZES,
    Stored,
    a_place,
    c_place,
    library,
    multiply,
    pointer,
)

TCGEN05_MODES = {16: 0, 128: 2, 64: 4, 32: 6}
KINDS = {"f16": 0, "bf16": 0, "tf32": 1, "e4m3": 2, "e5m2": 2}
CODES = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 0, "e5m2": 1}


def instruction(name: str, M: int, N: int, a_mn: bool = False, b_mn: bool = False) -> int:
    types = CODES[name] << 7 | CODES[name] << 10
    return 1 << 4 | types | a_mn << 15 | b_mn << 16 | N >> 3 << 17 | M >> 4 << 24


def tcgen05(word, kind, d, in_tensor, a, b, accumulate, memory, cells) -> int:
    u64 = ctypes.c_uint64
    return library().deepkern_ptx_test_tcgen05(
        word, kind, d, in_tensor, u64(a), u64(b), accumulate, pointer(memory), len(memory),
        pointer(cells)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("M", "lane", "a_in_tensor_memory"),
    [(128, 0, False), (64, 0, False), (64, 16, False), (128, 0, True)],
    ids=["M 128", "M 64", "M 64 at lane 16", "A in tensor memory"],
)
@pytest.mark.parametrize(
    ("name", "width", "mn_major"),
    [*CASES, ("e4m3", 128, True), ("e5m2", 64, False)],
    ids=str,
)
def test_tcgen05_mma(
    rng: np.random.Generator, name: str, width: int, mn_major: bool, M: int, lane: int,
    a_in_tensor_memory: bool
):  # fmt: skip
    N, K = 128, 32 // SIZES.get(name, 1)
    right = Stored(rng, N, K, name, width, mn_major)
    left = Stored(rng, M, K, name, width, mn_major)
    a, b = left.x, right.x
    left.start += len(right.memory)
    memory = np.concatenate([right.memory, left.memory])
    cells = rng.standard_normal((128, 512)).astype(np.float32)
    column, rows = 64, np.arange(M)
    lanes = rows if M == 128 else rows // 16 * 32 + rows % 16 + lane
    if a_in_tensor_memory:
        cells[:, 8:16] = a.reshape(M, -1).view(np.float32)
    expected = cells.copy()
    expected[lanes, column : column + N] = multiply(a, b, name, cells[lanes, column : column + N])
    mode = TCGEN05_MODES[width] << 61 | 1 << 46
    operand = 8 if a_in_tensor_memory else left.descriptor(mode)
    word = instruction(name, M, N, mn_major and not a_in_tensor_memory, mn_major)
    d = lane << 16 | column
    failed = tcgen05(word, KINDS[name], d, a_in_tensor_memory, operand, right.descriptor(mode), 1,
                     memory, cells)  # fmt: skip
    assert not failed, library().deepkern_ptx_test_error()
    assert cells.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (instruction("f16", 128, 64) | 4, "sparse"),
        (instruction("f16", 128, 64) & ~16, "f16 accumulators"),
        (instruction("f16", 128, 8), "N: expected a multiple of 16 up to 256, got 8"),
        (instruction("f16", 256, 64), "M: expected 64 or 128, got 256"),
        (instruction("tf32", 128, 64), "A: type 2 is not valid"),
    ],
    ids=["sparse", "f16 sums", "N", "M", "type"],
)
def test_tcgen05_refuses_an_instruction(word: int, message: str):
    cells, memory = np.zeros((128, 512), np.uint32), np.zeros(65536, np.uint8)
    assert tcgen05(word, 0, 0, 0, 1 << 46, 1 << 46, 0, memory, cells)
    assert message in library().deepkern_ptx_test_error().decode()


def tensor_cells(shape: int, registers: int, half_offset: int = 0) -> ndarray:
    """[32 lanes][registers] -> lane of tensor memory, column."""
    cells = np.zeros((32, registers, 2), np.int32)
    for lane in range(32):
        for reg in range(registers):
            library().deepkern_ptx_test_tensor_cell(
                shape, lane, reg, half_offset, pointer(cells[lane, reg])
            )
    return cells


SHAPES = {"32x32b": (0, 1, 32, 1), "16x64b": (1, 1, 16, 2), "16x128b": (2, 2, 16, 4),
          "16x256b": (3, 4, 16, 8), "16x32bx2": (4, 1, 16, 2)}  # fmt: skip


@pytest.mark.parametrize("number", [1, 2, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_tensor_memory_shapes_access_each_cell_once(shape: str, number: int):
    index, per, lanes, columns = SHAPES[shape]
    cells = tensor_cells(index, per * number, half_offset=number)
    expected = {(i, j) for i in range(lanes) for j in range(columns * number)}
    assert sorted(map(tuple, cells.reshape(-1, 2).tolist())) == sorted(expected)


def test_tensor_memory_shapes_are_those_of_fragments():
    """The ISA draws 16x256b as the accumulators of m16n8, 16x128b as m16n8k8's A of 32 bits."""
    wide, half = tensor_cells(3, 8), tensor_cells(2, 2)
    for lane in range(32):
        assert [tuple(c) for c in wide[lane]] == [c_place(lane, i) for i in range(8)]
        assert [tuple(c) for c in half[lane]] == [a_place("tf32", 4, lane, i) for i in range(2)]
