"""Products, fragments and wgmma of csrc/ptx/tensor_core.h, each against an oracle."""

from __future__ import annotations

import ctypes

import mmaemu.model
import numpy as np
import pytest
import torch
from numpy import ndarray

from tests.compiled import tensor_core_model as model
from tests.compiled.operands import (
    CASES,
    ELEMENTS,
    F16,
    F32,
    MMA,
    S32,
    SIZES,
    TCGEN05,
    WGMMA,
    Stored,
    a_place,
    b_place,
    c_place,
    fragment,
    library,
    multiply,
    pointer,
    random_codes,
    values_of,
)


@pytest.mark.parametrize("name", ELEMENTS[:5])
@pytest.mark.parametrize("shape", [(128, 128, 32), (16, 8, 16), (5, 24, 7)], ids=str)
def test_float32_sums_add_in_the_order_of_k(
    rng: np.random.Generator, name: str, shape: tuple[int, int, int]
):
    M, N, K = shape
    a, b = random_codes(rng, (M, K), name), random_codes(rng, (N, K), name)
    expected = rng.standard_normal((M, N)).astype(np.float32)
    got = multiply(a, b, name, expected)
    left, right = (values_of(x, name).astype(np.float32) for x in (a, b))
    for k in range(K):
        expected = expected + left[:, k, None] * right[:, k]
    assert got.tobytes() == expected.tobytes()


# name: (element, sm, unit, fraction bits, of the result, products at once, K)
FUSED = {
    "sm_80 bf16": ("bf16", 80, MMA, 24, 23, 8, 16), "sm_80 tf32": ("tf32", 80, MMA, 24, 23, 4, 8),
    "sm_80 f16": ("f16", 80, MMA, 24, 23, 8, 16), "sm_89 f16": ("f16", 89, MMA, 24, 23, 8, 16),
    "sm_89 e4m3": ("e4m3", 89, MMA, 13, 13, 16, 32),
    "sm_90 mma bf16": ("bf16", 90, MMA, 25, 23, 16, 16),
    "sm_90 bf16": ("bf16", 90, WGMMA, 25, 23, 16, 16),
    "sm_90 f16": ("f16", 90, WGMMA, 25, 23, 16, 16),
    "sm_90 tf32": ("tf32", 90, WGMMA, 25, 23, 8, 8),
    "sm_90 e4m3": ("e4m3", 90, WGMMA, 13, 13, 32, 128),
    "sm_90 e5m2": ("e5m2", 90, WGMMA, 13, 13, 32, 32),
    "sm_100 bf16": ("bf16", 100, TCGEN05, 25, 23, 16, 16),
    "sm_100 e4m3": ("e4m3", 100, TCGEN05, 25, 23, 32, 32),
    "sm_120 bf16": ("bf16", 120, MMA, 25, 23, 16, 16),
    "sm_120 e5m2": ("e5m2", 120, MMA, 25, 23, 32, 32),
}  # fmt: skip


def assert_same_bits(got: ndarray, want: ndarray, seed: int) -> None:
    wrong = got.view(np.int32) != want.view(np.int32)
    print(f"seed {seed}: {wrong.size} sums, {wrong.sum()} differ, {np.isnan(want).sum()} NaN, "
          f"{np.isinf(want).sum()} infinite, {(want == 0).sum()} zero")  # fmt: skip
    at = tuple(np.argwhere(wrong)[0]) if wrong.any() else ()
    assert not wrong.any(), f"seed {seed}, first at {at}: got {got[at]!r}, want {want[at]!r}"


@pytest.mark.parametrize("case", FUSED)
def test_hardware_sums_have_the_bits_of_mma_sim(rng: np.random.Generator, seed: int, case: str):
    """105,000 sums with subnormal numbers, cancellation, NaN and infinities, in integers."""
    name, target, unit, fraction, result, block, K = FUSED[case]
    rows, columns = (70, 1504) if K <= 32 else (70, 376)
    a, b = (model.hard_codes(rng, n, K, name, s) for n, s in ((rows, 1), (columns, -1)))
    c = model.hard_addends(rng, a, b, name)
    want = model.dot_add(a, b, name, c, fraction, result, block)
    assert_same_bits(multiply(a, b, name, c, target, unit), want, seed)


@pytest.mark.parametrize("preset", ["hopper", "ada"])
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_fp8_sums_are_those_of_mmaemu(rng: np.random.Generator, seed: int, preset: str, name: str):
    """mmaemu's presets return the bits of an H100 and of an RTX 4060; 131,072 sums of each."""
    target, unit = {"hopper": (90, WGMMA), "ada": (89, MMA)}[preset]
    a, b = (model.hard_codes(rng, n, 32, name, s) for n, s in ((256, 1), (512, -1)))
    c, size = model.hard_addends(rng, a, b, name), (256, 512)
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    left, right = (torch.from_numpy(x).view(dtype) for x in (a, b))
    expected = mmaemu.model.dot(
        left[:, None].expand(*size, 32), right[None].expand(*size, 32), torch.from_numpy(c),
        preset=preset
    )  # fmt: skip
    assert_same_bits(multiply(a, b, name, c, target, unit), expected.numpy(), seed)


def test_nan_and_infinity_in_a_product():
    a = np.zeros((3, 16), np.uint16)
    a[0, 3], a[1, 4], a[2, 5] = 0x7F80, 0x7FC1, 0x3F80
    b = np.zeros((8, 16), np.uint16)
    b[:] = 0x3F80
    b[1, 3] = 0
    for target in (0, 90):
        d = multiply(a, b, "bf16", np.zeros((3, 8), np.float32), target, WGMMA).view(np.uint32)
        assert d[0, 0] == 0x7F800000 and d[0, 1] == 0x7FFFFFFF
        assert (d[1] == 0x7FFFFFFF).all() and (d[2] == 0x3F800000).sum() == 8


def test_sums_of_an_unknown_unit_are_refused():
    a = np.zeros((8, 32), np.uint8)
    with pytest.raises(AssertionError, match="mma.sync on sm_90"):
        multiply(a, a, "e4m3", np.zeros((8, 8), np.float32), 90, MMA)


MMA_SHAPES = [("tf32", 4, F32), ("tf32", 8, F32), ("f16", 8, F32), ("f16", 16, F32),
              ("f16", 8, F16), ("f16", 16, F16), ("bf16", 8, F32), ("bf16", 16, F32),
              ("e4m3", 16, F32), ("e4m3", 32, F32), ("e4m3", 32, F16), ("e5m2", 32, F32),
              ("s8", 16, S32), ("s8", 32, S32)]  # fmt: skip


@pytest.mark.parametrize(("name", "K", "accumulators"), MMA_SHAPES, ids=str)
def test_mma_sync_fragments(rng: np.random.Generator, name: str, K: int, accumulators: int):
    a, b = random_codes(rng, (16, K), name), random_codes(rng, (8, K), name)
    row_bytes = K * a.itemsize
    left = np.zeros((4, 32), np.uint32)
    left[: row_bytes // 8] = fragment(a, row_bytes // 8, lambda t, i: a_place(name, K, t, i))
    right = np.zeros((2, 32), np.uint32)
    right[: row_bytes // 16] = fragment(b, row_bytes // 16, lambda t, i: b_place(name, t, i))
    if name == "s8":
        c = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
        expected = c + (values_of(a, name) @ values_of(b, name).T).astype(np.int32)
    else:
        c = rng.standard_normal((16, 8)).astype(np.float16 if accumulators == F16 else np.float32)
        expected = multiply(a, b, name, c, f16=accumulators == F16).astype(c.dtype)
    count = 2 if accumulators == F16 else 4
    d = np.zeros((4, 32), np.uint32)
    d[:count] = fragment(c, count, c_place)
    element = ELEMENTS.index(name)
    library().deepkern_ptx_test_mma(
        K, element, accumulators, pointer(left), pointer(right), pointer(d)
    )
    assert d[:count].tolist() == fragment(expected, count, c_place).tolist()


@pytest.mark.parametrize("transposed", [False, True], ids=["", "trans"])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix_and_stmatrix(rng: np.random.Generator, matrices: int, transposed: bool):
    x = rng.integers(0, 1 << 16, (matrices, 8, 8)).astype(np.uint16)
    d = np.zeros((matrices, 32, 2), np.uint16)
    library().deepkern_ptx_test_ldmatrix(matrices, transposed, pointer(x), pointer(d), 0)
    # Thread t holds elements 2 (t % 4) and 2 (t % 4) + 1 of row t / 4.
    rows = (x.transpose(0, 2, 1) if transposed else x).reshape(matrices, 32, 2)
    assert (d == rows).all()
    back = np.zeros_like(x)
    library().deepkern_ptx_test_ldmatrix(matrices, transposed, pointer(back), pointer(d), 1)
    assert (back == x).all()


WGMMA_MODES = {16: 0, 128: 1, 64: 2, 32: 3}


def wgmma(shape, a, b, d, flags, memory, ranges) -> int:
    N, K, name = shape
    return library().deepkern_ptx_test_wgmma(
        N, K, ELEMENTS.index(name), flags, pointer(a) if isinstance(a, ndarray) else None,
        ctypes.c_uint64(0 if isinstance(a, ndarray) else a), ctypes.c_uint64(b), pointer(d),
        pointer(memory), len(memory), pointer(ranges), len(ranges)
    )  # fmt: skip


# An MN-major operand has at least `width` bytes of rows.
WGMMA_CASES = [
    (*case, N) for case in CASES for N in (8, 64, 256) if not case[2] or case[1] <= 2 * N
]


@pytest.mark.parametrize("a_place_", ["registers", "shared"])
@pytest.mark.parametrize(("name", "width", "mn_major", "N"), WGMMA_CASES, ids=str)
def test_wgmma(
    rng: np.random.Generator, name: str, width: int, mn_major: bool, N: int, a_place_: str
):
    K = 32 // SIZES.get(name, 1)
    right = Stored(rng, N, K, name, width, mn_major)
    left = Stored(rng, 64, K, name, width, mn_major)
    a, b = left.x, right.x
    memory = np.concatenate([right.memory, left.memory])
    left.start += len(right.memory)
    mode = WGMMA_MODES[width] << 62
    c = rng.standard_normal((64, N)).astype(np.float32)
    place = [fragment(c[16 * w : 16 * w + 16], N // 2, c_place) for w in range(4)]
    d = np.concatenate(place)
    flags = 32 | 4 * mn_major | 2 * mn_major | 16
    operand: ndarray | int
    if a_place_ == "registers":
        parts = [fragment(a[16 * w : 16 * w + 16], 4, lambda t, i: a_place(name, K, t, i))
                 for w in range(4)]  # fmt: skip
        operand, flags = np.concatenate(parts), flags | 1
    else:
        operand = left.descriptor(mode)
    ranges = np.zeros((1000, 2), np.uint32)
    count = wgmma((N, K, name), operand, right.descriptor(mode), d, flags, memory, ranges)
    assert count >= 0, library().deepkern_ptx_test_error()
    negative = b ^ b.dtype.type(1 << 8 * b.itemsize - 1)  # imm-scale-b is -1
    expected = multiply(a, negative, name, c)
    place = [fragment(expected[16 * w : 16 * w + 16], N // 2, c_place) for w in range(4)]
    assert (d == np.concatenate(place)).all()
    touched = np.zeros(len(memory), bool)
    for start, size in ranges[:count]:
        assert not touched[start : start + size].any()
        touched[start : start + size] = True
    used = np.concatenate([right.used, left.used & (a_place_ == "shared")])
    assert (touched == used).all()


def test_wgmma_outside_shared_memory_fails(rng: np.random.Generator):
    b = Stored(rng, 64, 16, "bf16", 32, False)
    d, a = np.zeros((4 * 32, 32), np.uint32), np.zeros((16, 32), np.uint32)
    memory, ranges = b.memory[:5000].copy(), np.zeros((10, 2), np.uint32)
    got = wgmma((64, 16, "bf16"), a, b.descriptor(3 << 62), d, 1, memory, ranges)
    assert got == -1
    assert b"wgmma: B: reads shared memory at" in library().deepkern_ptx_test_error()
