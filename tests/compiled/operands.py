"""Number formats, matrix fragments and stored operands, and the test hooks of csrc/ptx."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
from numpy import ndarray

from bench.emulator import CSRC, build

PARTS = ("tensor_core", "fragments", "matrix_descriptor", "tcgen05_layout", "hooks")
ELEMENTS = ("f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8")  # ptx::Element
SIZES = {"f16": 2, "bf16": 2, "tf32": 4}
F32, F16, S32 = range(3)  # ptx::Accumulators
MMA, WGMMA, TCGEN05 = range(3)  # ptx::Unit

# name: (index in hooks.cpp, exponent bits, mantissa bits, has infinity)
FORMATS = {"f16": (0, 5, 10, True), "bf16": (1, 8, 7, True), "tf32": (2, 8, 10, True),
           "e4m3": (3, 4, 3, False), "e5m2": (4, 5, 2, True), "e3m2": (5, 3, 2, False),
           "e2m3": (6, 2, 3, False), "e2m1": (7, 2, 1, False)}  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    names = [f"ptx/{p}.cpp" for p in PARTS]
    names += [str(p.relative_to(CSRC)) for p in (CSRC / "ptx").glob("*.h")]
    loaded = build({name: (CSRC / name).read_text() for name in names})
    loaded.deepkern_ptx_test_error.restype = ctypes.c_char_p
    return loaded


def pointer(x: ndarray | None) -> ctypes.c_void_p | None:
    return None if x is None else ctypes.c_void_p(x.ctypes.data)


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


# The formulas of fragments are those of the PTX ISA, element by element


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


SWIZZLES = (16, 32, 64, 128)  # bytes of a row


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


CASES = [(name, width, mn) for name in ("bf16", "f16", "e4m3", "tf32") for width in SWIZZLES
         for mn in (False, True) if not mn or SIZES.get(name, 1) == 2]  # fmt: skip
