"""Cases of instructions that Triton emits rarely or never; see instruction_cases.py.

Oracles of warp instructions see a multiple of 32 lanes.
Source: PTX ISA 9.0, section 9.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np

from tests.compiled.instruction_cases import (
    BITS,
    Case,
    decode,
    encode,
    fused,
    minus,
    plus,
    rounded,
    times,
    wrapped,
)

TINY = {"f32": 2.0**-126}


def each(kind: str, function: Callable) -> Callable:
    """An oracle of the bits of one lane."""

    def oracle(*arrays: np.ndarray) -> np.ndarray:
        unsigned = np.dtype(BITS[kind]).str.replace("i", "u")
        mask = (1 << np.iinfo(BITS[kind]).bits) - 1
        rows = zip(*(map(int, a) for a in arrays), strict=True)
        return np.array([function(*row) & mask for row in rows], unsigned).view(BITS[kind])

    return oracle


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < TINY["f32"] else x


def flushing(function: Callable) -> Callable:
    def one(*bits: int) -> int:
        values = [flushed(decode(b, "f32")) for b in bits]
        if all(math.isfinite(v) for v in values):
            exact = function(*map(Fraction, values))
            negative = exact == 0 and math.copysign(1, function(*values)) < 0
            # The result is flushed as well; a result that rounds up to the least normal is not.
            small = abs(exact) < Fraction(TINY["f32"])
            code = encode(exact, "f32", "rn", negative)
            return code & 0x80000000 if small and not code & 0x7F800000 else code
        return encode(function(*values), "f32")

    return each("f32", one)


def saturating(function: Callable) -> Callable:
    def one(*bits: int) -> int:
        values = [decode(b, "f32") for b in bits]
        finite = all(map(math.isfinite, values))
        result = function(*map(Fraction, values)) if finite else function(*values)
        return encode(min(max(result, 0), 1), "f32") if result == result else 0

    return each("f32", one)


def float_cases() -> Iterator[Case]:
    two, three = ("f64",) * 2, ("f64",) * 3
    for name, function in (("add", plus), ("sub", minus), ("mul", times)):
        yield Case(f"{name}.rn.f64 %d, %a, %b", "f64", two, rounded("f64", two, function))
        yield Case(f"{name}.ftz.f32 %d, %a, %b", "f32", ("f32",) * 2, flushing(function))
        yield Case(f"{name}.sat.f32 %d, %a, %b", "f32", ("f32",) * 2, saturating(function))
    yield Case("fma.rn.f64 %d, %a, %b, %c", "f64", three, rounded("f64", three, fused))
    tests: dict[str, Callable] = {
        "finite": math.isfinite, "infinite": math.isinf, "notanumber": math.isnan,
        "number": lambda x: not math.isnan(x),
    }  # fmt: skip
    for kind in ("f32", "f64"):
        least = 2.0**-126 if kind == "f32" else 2.0**-1022
        tests["normal"] = lambda x, m=least: math.isfinite(x) and abs(x) >= m
        tests["subnormal"] = lambda x, m=least: 0 < abs(x) < m
        for name, test in tests.items():
            one = each("pred", lambda a, k=kind, t=test: int(t(decode(a, k))))
            yield Case(f"testp.{name}.{kind} %d, %a", "pred", (kind,), one)
        top = 1 << (31 if kind == "f32" else 63)
        yield Case(f"copysign.{kind} %d, %a, %b", kind, (kind, kind),
                   each(kind, lambda a, b, t=top: (a & t) | (b & ~t)))  # fmt: skip
    yield Case("max.f32 %d, %a, %b, %c", "f32", ("f32",) * 3, each("f32", largest))


def largest(*codes: int) -> int:
    numbers = [c for c in codes if not math.isnan(decode(c, "f32"))]
    key = lambda c: (decode(c, "f32"), math.copysign(1, decode(c, "f32")))  # noqa: E731
    return max(numbers, key=key) if numbers else 0x7FFFFFFF


def low24(x: int, signed: bool) -> int:
    x &= 0xFFFFFF
    return x - (1 << 24) if signed and x >> 23 else x


def dot(a: int, b: int, c: int, signed: bool) -> int:
    part = lambda x, k: low24((x >> 8 * k & 255) << 16, signed) >> 16  # noqa: E731
    return c + sum(part(a, k) * part(b, k) for k in range(4))


def extended(a: int, n: int, signed: bool) -> int:
    """szext.wrap: the low n bits, sign- or zero-extended."""
    if n == 0:
        return 0
    a &= (1 << n) - 1
    return a - (1 << n) if signed and a >> (n - 1) else a


PRMT: dict[str, Callable[[int, int], int]] = {
    "f4e": lambda k, n: k + n, "b4e": lambda k, n: (n - k) % 8, "rc8": lambda k, n: n,
    "ecl": lambda k, n: max(k, n), "ecr": lambda k, n: min(k, n),
    "rc16": lambda k, n: n % 2 * 2 + k % 2,
}  # fmt: skip


def permuted(mode: str, a: int, b: int, c: int) -> int:
    data = (b << 32 | a).to_bytes(8, "little")
    return int.from_bytes(bytes(data[PRMT[mode](k, c & 3)] for k in range(4)), "little")


def field(a: int, position: int, length: int, width: int) -> int:
    """bfe of a signed type: bits beyond the sign bit repeat it, a field of no bits is 0."""
    position, length = position & 255, length & 255
    if length == 0:
        return 0
    value = (a >> min(position, width - 1)) if position >= width else a >> position
    return extended(value, min(length, width), True) if position < width else value


def integer_cases() -> Iterator[Case]:
    for s in ("u32", "s32"):
        signed, three = s == "s32", (s,) * 3
        yield Case(f"mul24.lo.{s} %d, %a, %b", s, (s, s),
                   each(s, lambda a, b, g=signed: low24(a, g) * low24(b, g)))  # fmt: skip
        yield Case(f"mul24.hi.{s} %d, %a, %b", s, (s, s),
                   each(s, lambda a, b, g=signed: low24(a, g) * low24(b, g) >> 16))  # fmt: skip
        yield Case(f"mad24.lo.{s} %d, %a, %b, %c", s, three,
                   each(s, lambda a, b, c, g=signed: low24(a, g) * low24(b, g) + c))  # fmt: skip
        yield Case(f"mad.hi.{s} %d, %a, %b, %c", s, three,
                   wrapped(s, lambda a, b, c: (a * b >> 32) + c))  # fmt: skip
        yield Case(f"sad.{s} %d, %a, %b, %c", s, three,
                   each(s, lambda a, b, c: abs(a - b) + c))  # fmt: skip
        yield Case(f"dp4a.{s}.{s} %d, %a, %b, %c", s, three,
                   each(s, lambda a, b, c, g=signed: dot(a, b, c, g)))  # fmt: skip
        yield Case(f"szext.wrap.{s} %d, %a, %b", s, (s, "u32"),
                   each(s, lambda a, b, g=signed: extended(a, b & 31, g)))  # fmt: skip
        yield Case(f"szext.clamp.{s} %d, %a, %b", s, (s, "u32"),
                   each(s, lambda a, b, g=signed: extended(a, min(b, 32), g)))  # fmt: skip
        yield Case(f"set.lt.u32.{s} %d, %a, %b", "u32", (s, s),
                   each("u32", lambda a, b: -(a < b)))  # fmt: skip
        yield Case(f"set.lt.f32.{s} %d, %a, %b", "f32", (s, s),
                   each("f32", lambda a, b: 0x3F800000 * (a < b)))  # fmt: skip
        yield Case(f"bfind.shiftamt.{s} %d, %a", "u32", (s,), each("u32", shift_amount))
    for kind in ("u16", "s16"):
        yield Case(f"min.{kind} %d, %a, %b", kind, (kind,) * 2, wrapped(kind, min))
        yield Case(f"max.{kind} %d, %a, %b", kind, (kind,) * 2, wrapped(kind, max))
    for width in (32, 64):
        s = f"s{width}"
        yield Case(f"bfe.{s} %d, %a, %b, %c", s, (s, "u32", "u32"),
                   each(s, lambda a, b, c, w=width: field(a, b, c, w)))  # fmt: skip
    yield Case("slct.b32.s32 %d, %a, %b, %c", "u32", ("u32", "u32", "s32"),
               each("u32", lambda a, b, c: a if c >= 0 else b))  # fmt: skip
    yield Case("bmsk.wrap.b32 %d, %a, %b", "u32", ("u32", "u32"),
               each("u32", lambda a, b: ((1 << (b & 31)) - 1) << (a & 31)))  # fmt: skip
    yield Case("bmsk.clamp.b32 %d, %a, %b", "u32", ("u32", "u32"),
               each("u32", lambda a, b: ((1 << min(b, 32)) - 1) << min(a, 32)))  # fmt: skip
    for mode in PRMT:
        yield Case(f"prmt.b32.{mode} %d, %a, %b, %c", "u32", ("u32",) * 3,
                   each("u32", lambda a, b, c, m=mode: permuted(m, a, b, c)))  # fmt: skip


def shift_amount(a: int) -> int:
    length = (a if a >= 0 else ~a).bit_length()
    return 32 - length if length else 0xFFFFFFFF


def by_warp(kind: str, function: Callable) -> Callable:
    """An oracle that maps the values of a warp to those of its lanes."""

    def oracle(array: np.ndarray) -> np.ndarray:
        rows = [function([int(x) for x in warp]) for warp in array.reshape(-1, 32)]
        return np.array(rows, np.uint64).reshape(-1).astype(BITS[kind])

    return oracle


def mask_of(flags: list[bool]) -> int:
    return sum(1 << k for k, flag in enumerate(flags) if flag)


def matches(warp: list[int]) -> list[int]:
    return [mask_of([(x ^ y) & 3 == 0 for y in warp]) for x in warp]


def warp_cases() -> Iterator[Case]:
    small = "and.b32 %d, %a, 3;\n"
    yield Case(small + "match.any.sync.b32 %d, %d, -1", "u32", ("u32",),
               by_warp("u32", matches))  # fmt: skip
    for mode, count in (("any", 1), ("all", 32)):
        vote = by_warp("u32", lambda w, n=count: [int(sum(x % 4 < 3 for x in w) >= n)] * 32)
        yield Case(
            small + "setp.lt.u32 %q, %d, 3;\n" + f"vote.sync.{mode}.pred %q, %q, -1;\n"
            "selp.b32 %d, 1, 0, %q", "u32", ("u32",), vote,
        )  # fmt: skip
    uniform = by_warp("u32", lambda w: [int(len({x % 4 < 3 for x in w}) == 1)] * 32)
    yield Case(
        small + "setp.lt.u32 %q, %d, 3;\nvote.sync.uni.pred %q, %q, -1;\nselp.b32 %d, 1, 0, %q",
        "u32", ("u32",), uniform,
    )  # fmt: skip
    yield Case("activemask.b32 %d", "u32", (), lambda: np.full(128, 2**32 - 1, np.uint32))
    yield Case("redux.sync.max.f32 %d, %a, -1", "f32", ("f32",),
               by_warp("f32", lambda w: [largest(*w)] * 32))  # fmt: skip


def cases() -> list[Case]:
    return [c for part in (float_cases, integer_cases, warp_cases) for c in part()]
