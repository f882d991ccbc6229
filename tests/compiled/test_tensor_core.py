"""The PTX machine's number formats, tensor-core products and layouts, each against an oracle."""

from __future__ import annotations

import ctypes
import functools
from fractions import Fraction

import mmaemu.model
import numpy as np
import pytest
import torch
from numpy import ndarray

from bench.emulator import CSRC, build

PARTS = ("tensor_core", "fragments", "matrix_descriptor", "tcgen05_layout", "hooks")
ELEMENTS = ("f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8")  # ptx::Element
SIZES = {"f16": 2, "bf16": 2, "tf32": 4}
F32, F16, S32 = range(3)  # ptx::Accumulators
MMA, WGMMA, TCGEN05 = range(3)  # ptx::Unit

# name: (index in hooks.cpp, exponent bits, mantissa bits, has infinity, codes above the largest)
FORMATS = {"f16": (0, 5, 10, True), "bf16": (1, 8, 7, True), "tf32": (2, 8, 10, True),
           "e4m3": (3, 4, 3, False), "e5m2": (4, 5, 2, True), "e3m2": (5, 3, 2, False),
           "e2m3": (6, 2, 3, False), "e2m1": (7, 2, 1, False)}  # fmt: skip
NANS = {"f16": 0x7FFF, "bf16": 0x7FFF, "tf32": 0x3FFFF, "e4m3": 0x7F, "e5m2": 0x7F, "e3m2": 0x1F,
        "e2m3": 0x1F, "e2m1": 0x7}  # fmt: skip
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")


@functools.cache
def library() -> ctypes.CDLL:
    names = [f"ptx/{p}.cpp" for p in PARTS]
    names += [str(p.relative_to(CSRC)) for p in (CSRC / "ptx").glob("*.h")]
    loaded = build({name: (CSRC / name).read_text() for name in names})
    loaded.deepkern_ptx_test_error.restype = ctypes.c_char_p
    return loaded


def pointer(x: ndarray | None) -> ctypes.c_void_p | None:
    return None if x is None else ctypes.c_void_p(x.ctypes.data)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@functools.cache
def finite_values(name: str) -> ndarray:
    """The magnitude of each code from 0 to the largest finite one, by the format's definition."""
    _, exponent_bits, mantissa_bits, infinity = FORMATS[name]
    bias = 2 ** (exponent_bits - 1) - 1
    count = 2 ** (exponent_bits + mantissa_bits)
    count -= 2**mantissa_bits if infinity else 1 if name == "e4m3" else 0
    codes = np.arange(count)
    exponent, mantissa = codes >> mantissa_bits, codes % 2**mantissa_bits / 2.0**mantissa_bits
    normal = (1 + mantissa) * 2.0 ** (exponent - bias)
    return np.where(exponent > 0, normal, mantissa * 2.0 ** (1 - bias))


def values_of(codes: ndarray, name: str) -> ndarray:
    """float64 of an array of codes, none of which is infinite or NaN."""
    if name in ("s8", "u8"):
        return codes.view(np.int8 if name == "s8" else np.uint8).astype(np.float64)
    if name == "tf32":
        return (codes & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    sign = 1 << 8 * SIZES.get(name, 1) - 1
    return finite_values(name)[codes & (sign - 1)] * np.where(codes & sign, -1, 1)


def random_codes(rng: np.random.Generator, shape: tuple[int, ...], name: str) -> ndarray:
    """Any finite code; bf16 and tf32 have exponents near 0, so that products are normal."""
    if name in ("bf16", "tf32"):
        x = rng.standard_normal(shape).astype(np.float32) * 2.0 ** rng.integers(-20, 20, shape)
        bits = x.astype(np.float32).view(np.uint32)
        return (bits >> 16).astype(np.uint16) if name == "bf16" else bits
    if name in ("s8", "u8"):
        return rng.integers(0, 256, shape, dtype=np.uint8)
    dtype = np.uint16 if name == "f16" else np.uint8
    codes = rng.integers(0, len(finite_values(name)), shape)
    sign = 1 << 8 * SIZES.get(name, 1) - 1
    return (codes + sign * rng.integers(0, 2, shape)).astype(dtype)


def rounded(x: ndarray, name: str, rounding: str, saturate: bool) -> ndarray:
    """Codes of finite x: a search in the table of all values."""
    values = finite_values(name)
    step = values[-1] - values[-2]
    table = np.append(values, values[-1] + step)  # the first value past the largest
    magnitude, negative = np.abs(x), np.signbit(x)
    low = np.searchsorted(table, magnitude, side="right") - 1
    high = np.minimum(low + (table[low] < magnitude), len(values))
    below, above = magnitude - table[low], table[high] - magnitude
    nearest = np.where(below < above, low, high)
    tie = below == above
    even = np.where(low % 2 == 0, low, high)
    chosen = {"rn": np.where(tie, even, nearest), "rna": np.where(tie, high, nearest), "rz": low,
              "rm": np.where(negative, high, low), "rp": np.where(negative, low, high)}  # fmt: skip
    codes = chosen[rounding]
    beyond = codes >= len(values)
    towards_zero = {"rz": True, "rm": ~negative, "rp": negative}.get(rounding, False)
    limit = len(values) - 1
    infinity = limit + 1 if FORMATS[name][3] or name == "e4m3" else limit
    codes = np.where(beyond, np.where(saturate | towards_zero, limit, infinity), codes)
    sign = 1 << FORMATS[name][1] + FORMATS[name][2]
    return (codes + np.where(negative, sign, 0)).astype(np.uint32)


@pytest.mark.parametrize("saturate", [False, True], ids=["", "satfinite"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_conversion_rounds_to_a_neighbour(
    rng: np.random.Generator, name: str, rounding: str, saturate: bool
):
    values, count = finite_values(name), 20_000
    i = rng.integers(0, len(values) - 1, count)
    between = values[i] + (values[i + 1] - values[i]) * rng.choice([0, 0.5, 0.25, 0.75], count)
    any_size = 2.0 ** rng.uniform(np.log2(values[1]) - 4, np.log2(values[-1]) + 2, count)
    edges = values[-1] * np.array([1, 1 + 1e-9, 1.02, 1.04, 1.07, 1.13, 1.2, 1.5, 4])
    x = np.concatenate([between, any_size, edges, [0.0]])
    x *= rng.choice([-1, 1], len(x))
    codes = np.empty(len(x), np.uint32)
    index = FORMATS[name][0]
    library().deepkern_ptx_test_encode(
        pointer(x), len(x), index, ROUNDINGS.index(rounding), saturate, pointer(codes)
    )
    assert codes.tolist() == rounded(x, name, rounding, saturate).tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_conversion_of_infinity_and_nan(name: str):
    x, codes = np.array([np.inf, -np.inf, np.nan, -np.nan]), np.empty(4, np.uint32)
    library().deepkern_ptx_test_encode(pointer(x), 4, FORMATS[name][0], 0, 1, pointer(codes))
    largest = len(finite_values(name)) - 1
    sign = 1 << FORMATS[name][1] + FORMATS[name][2]
    assert codes.tolist() == [largest, largest + sign, NANS[name], NANS[name]]


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_16_bit_fma_rounds_once(rng: np.random.Generator, name: str):
    values, count = finite_values(name), 3000
    index = rng.integers(0, len(values), (3, count))
    # Addends near half of the last bit of the product make ties and near-ties.
    if name == "bf16":
        index[:2] = rng.integers(100 << 7, 140 << 7, (2, count))
        index[2] = (index[0] >> 7) + (index[1] >> 7) - 127 + rng.integers(-12, 12, count) << 7
        # An odd number of 8 bits times 1.5 is a tie; an addend below 2^-53 of it decides.
        ties = slice(count // 2)
        index[0, ties] = (index[0, ties] & ~127) + rng.integers(0, 21, count // 2) * 2 + 1
        index[1, ties] = index[1, ties] & ~127 | 64
        index[2, ties] = index[2, ties] - (60 << 7)
    negative = rng.integers(0, 2, (3, count))
    codes = (index + (negative << 15)).astype(np.uint16)
    d = np.empty(count, np.uint16)
    library().deepkern_ptx_test_fma(
        *(pointer(c) for c in codes), count, ("bf16", "f16").index(name), pointer(d)
    )
    for i in range(count):
        a, b, c = (Fraction(values[k]) * (1 - 2 * int(n))
                   for k, n in zip(index[:, i], negative[:, i], strict=True))  # fmt: skip
        exact = a * b + c
        if exact == 0:
            continue  # the sign of a zero sum is the default rounding's
        error = [abs(abs(exact) - Fraction(v)) for v in _near(values, float(abs(exact)))]
        got = int(d[i]) & 0x7FFF
        if abs(exact) >= Fraction(values[-1]) + Fraction(values[-1] - values[-2]) / 2:
            assert got == len(values)
            continue
        best = abs(abs(exact) - Fraction(values[got]))
        assert best == min(error), (codes[:, i], d[i])
        assert error.count(best) == 1 or got % 2 == 0, (codes[:, i], d[i])
        assert (d[i] >> 15 == 1) == (exact < 0)


def _near(values: ndarray, x: float) -> ndarray:
    i = int(np.searchsorted(values, x))
    return values[max(i - 2, 0) : i + 2]


def multiply(
    a: ndarray, b: ndarray, name: str, c: ndarray, target: int = 0, unit: int = 0, f16: bool = False
) -> ndarray:
    """multiply_add of codes a[M, K], b[N, K]; float32 sums if target is 0."""
    d = np.ascontiguousarray(c, np.float32).copy()
    element = ELEMENTS.index(name)
    failed = library().deepkern_ptx_test_multiply(
        len(a), len(b), a.shape[1], element, element, pointer(a), pointer(b), pointer(d), target,
        unit, f16
    )  # fmt: skip
    assert not failed, library().deepkern_ptx_test_error()
    return d


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


FUSED = {  # name: (element, sm, unit, fraction bits, block)
    "sm_80 bf16": ("bf16", 80, MMA, 24, 8), "sm_89 f16": ("f16", 89, MMA, 24, 8),
    "sm_80 tf32": ("tf32", 80, MMA, 24, 4), "sm_90 mma bf16": ("bf16", 90, MMA, 25, 16),
    "sm_90 wgmma f16": ("f16", 90, WGMMA, 25, 16), "sm_90 wgmma tf32": ("tf32", 90, WGMMA, 25, 8),
    "sm_100 bf16": ("bf16", 100, TCGEN05, 25, 16), "sm_100 e4m3": ("e4m3", 100, TCGEN05, 25, 32),
    "sm_120 e5m2": ("e5m2", 120, MMA, 25, 32), "sm_90 e4m3": ("e4m3", 90, WGMMA, 13, 32),
}  # fmt: skip


def fused(a: ndarray, b: ndarray, c: float, fraction: int, result: int, least: int) -> float:
    """Algorithm of MMA-Sim, arXiv 2511.10909, in exact arithmetic."""

    def exponent(x: float, lowest: int) -> int:
        return max(int(np.frexp(x)[1]) - 1, lowest)

    terms, exponents = [Fraction(c)], [exponent(c, -126) if c else -126]
    for x, y in zip(a, b, strict=True):
        if x and y:
            terms.append(Fraction(x) * Fraction(y))
            exponents.append(exponent(x, least) + exponent(y, least))
    unit = Fraction(2) ** (max(exponents) - fraction)
    total = sum(int(t / unit) for t in terms) * unit  # int() truncates
    if not total:
        return 0.0
    last = Fraction(2) ** (exponent(float(total), -126) - result)
    return float(int(total / last) * last)


@pytest.mark.parametrize("case", FUSED)
def test_hardware_sums_truncate_at_the_largest_exponent(rng: np.random.Generator, case: str):
    name, target, unit, fraction, block = FUSED[case]
    K = {"tf32": 8, "f16": 16, "bf16": 16}.get(name, 32)
    a, b = random_codes(rng, (12, K), name), random_codes(rng, (8, K), name)
    c = rng.standard_normal((12, 8)).astype(np.float32) * 2.0 ** rng.integers(-30, 30, (12, 8))
    c[rng.random(c.shape) < 0.2] = 0
    got = multiply(a, b, name, c, target, unit)
    left, right = values_of(a, name), values_of(b, name)
    least = {"f16": -14, "e5m2": -14, "e4m3": -6}.get(name, -126)
    for m in range(len(a)):
        for n in range(len(b)):
            x = float(np.float32(c[m, n]))
            for k in range(0, K, block):
                part = slice(k, k + block)
                x = fused(left[m, part], right[n, part], x, fraction, 13 if fraction == 13 else 23,
                          least)  # fmt: skip
            assert got[m, n] == np.float32(x), (m, n)


@pytest.mark.parametrize("preset", ["hopper", "ada"])
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_fp8_sums_are_those_of_mmaemu(rng: np.random.Generator, preset: str, name: str):
    """mmaemu's presets return the bits of an H100 and of an RTX 4060."""
    target, unit = {"hopper": (90, WGMMA), "ada": (89, MMA)}[preset]
    a, b = random_codes(rng, (128, 32), name), random_codes(rng, (256, 32), name)
    a[rng.random(a.shape) < 0.1] = 0
    a[:, 1:][rng.random((128, 31)) < rng.random((128, 1))] &= 0x8F  # few large terms
    size = (128, 256)
    c = rng.standard_normal(size) * 2.0 ** rng.integers(-30, 30, size) * rng.integers(0, 2, size)
    c = c.astype(np.float32)
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    left, right = (torch.from_numpy(x).view(dtype) for x in (a, b))
    expected = mmaemu.model.dot(
        left[:, None].expand(*size, 32), right[None].expand(*size, 32), torch.from_numpy(c),
        preset=preset
    )  # fmt: skip
    got = multiply(a, b, name, c, target, unit)
    assert (got.view(np.int32) != expected.numpy().view(np.int32)).sum() == 0


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


# ---- fragments; the formulas are those of the PTX ISA, element by element


def a_place(name: str, K: int, lane: int, i: int) -> tuple[int, int]:
    """Row and column of element a_i."""
    group, thread = lane >> 2, lane % 4
    if name == "tf32":
        return group + 8 * (i % 2), thread + 4 * (i >= 2)
    if SIZES.get(name, 1) == 2:
        row = group if i < 2 or 4 <= i < 6 else group + 8
        return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    row = group if i < 4 or 8 <= i < 12 else group + 8
    return row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)


def b_place(name: str, lane: int, i: int) -> tuple[int, int]:
    """Column of B and k of element b_i."""
    group, thread = lane >> 2, lane % 4
    if name == "tf32":
        return group, thread + 4 * i
    if SIZES.get(name, 1) == 2:
        return group, thread * 2 + (i & 1) + 8 * (i >= 2)
    return group, thread * 4 + (i & 3) + 16 * (i >= 4)


def c_place(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + 8 * (i % 4 >= 2), (lane % 4) * 2 + (i & 1) + i // 4 * 8


def fragment(x: ndarray, registers: int, place) -> ndarray:
    """Registers [registers][32 lanes] of matrix x."""
    per = 4 // x.itemsize
    words = np.zeros((registers, 32, per), x.dtype)
    for lane in range(32):
        for i in range(registers * per):
            words[i // per, lane, i % per] = x[place(lane, i)]
    return words.view(np.uint32)[..., 0].copy()


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


# ---- operands in shared memory

SWIZZLES = (16, 32, 64, 128)  # bytes of a row
WGMMA_MODES = {16: 0, 128: 1, 64: 2, 32: 3}
TCGEN05_MODES = {16: 0, 128: 2, 64: 4, 32: 6}


class Stored:
    """x[rows, K], a quarter of a matrix in shared memory that a TMA copy with a swizzle wrote."""

    def __init__(
        self, rng: np.random.Generator, rows: int, K: int, name: str, width: int, mn_major: bool
    ):
        whole = random_codes(rng, (rows, 4 * K), name)
        size = whole.itemsize
        lines = whole.T if mn_major else whole  # of contiguous elements
        line, i = np.indices(lines.shape)
        tile, byte = np.divmod(i * size, width)
        # Tiles of `width` bytes by all lines, one after another.
        tile_bytes = width * -(-len(lines) // 8) * 8
        swap = {16: 0 * line, 32: line // 4 % 2, 64: line // 2 % 4, 128: line % 8}[width]
        at = 4096 + tile * tile_bytes + line * width + (byte // 16 ^ swap) * 16 + byte % 16
        self.memory = rng.integers(0, 256, 64 * 1024, dtype=np.uint8)
        self.memory.view(whole.dtype)[at // size] = lines
        part = slice(K * (first := int(rng.integers(0, 4))), K * (first + 1))
        self.x = np.ascontiguousarray(whole[:, part])
        place = (at.T if mn_major else at)[:, part]
        self.start, self.used = int(place[0, 0]), np.zeros(len(self.memory), bool)
        self.used.view(f"V{size}")[place // size] = np.ones(size, bool).view(f"V{size}")
        self.leading, self.stride = 16, 8 * width
        if width == 16 and mn_major:  # the offsets exchange their parts
            self.leading, self.stride = 8 * width, tile_bytes
        elif width == 16 or mn_major:
            self.leading = tile_bytes

    def descriptor(self, mode_bits: int) -> int:
        fields = self.start >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32
        return fields | mode_bits


def wgmma(shape, a, b, d, flags, memory, ranges) -> int:
    N, K, name = shape
    return library().deepkern_ptx_test_wgmma(
        N, K, ELEMENTS.index(name), flags, pointer(a) if isinstance(a, ndarray) else None,
        ctypes.c_uint64(0 if isinstance(a, ndarray) else a), ctypes.c_uint64(b), pointer(d),
        pointer(memory), len(memory), pointer(ranges), len(ranges)
    )  # fmt: skip


CASES = [(name, width, mn) for name in ("bf16", "f16", "e4m3", "tf32") for width in SWIZZLES
         for mn in (False, True) if not mn or SIZES.get(name, 1) == 2]  # fmt: skip


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


# ---- tcgen05

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
