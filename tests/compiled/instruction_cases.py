"""PTX instructions of registers, each with an oracle in numpy or in exact fractions.

A case is a line with the operands `%d`, `%a`, `%b`, `%c`, their types, and a function of arrays.
Source: PTX ISA 9.0, section 9.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# Type of an operand -> the numpy type of its bits, and its PTX register.
BITS = {
    "u8": np.uint8, "s8": np.int8, "u16": np.uint16, "s16": np.int16, "u32": np.uint32,
    "s32": np.int32, "u64": np.uint64, "s64": np.int64, "f32": np.uint32, "f64": np.uint64,
    "f16": np.uint16, "bf16": np.uint16, "pred": np.uint32,
}  # fmt: skip
# Mantissa bits without the implicit one, exponent bits.
FORMATS = {"f16": (10, 5), "bf16": (7, 8), "f32": (23, 8), "tf32": (10, 8), "f64": (52, 11)}


@dataclass(frozen=True)
class Case:
    line: str  # "add.s32 %d, %a, %b"
    result: str
    sources: tuple[str, ...]
    oracle: Callable[..., np.ndarray]  # bits to bits, as BITS has them

    @property
    def name(self) -> str:
        return self.line.replace(" ", "_").replace("%", "").replace(",", "")


def decode(bits: int, kind: str) -> float:
    """The value of a float of type `kind`."""
    mantissa, exponent = FORMATS[kind]
    sign = -1.0 if bits >> (mantissa + exponent) & 1 else 1.0
    field = bits >> mantissa & (1 << exponent) - 1
    fraction = bits & (1 << mantissa) - 1
    bias = (1 << exponent - 1) - 1
    if field == (1 << exponent) - 1:
        return math.nan if fraction else sign * math.inf
    if field == 0:
        return sign * math.ldexp(fraction, 1 - bias - mantissa)
    return sign * math.ldexp(fraction + (1 << mantissa), field - bias - mantissa)


def encode(
    value: Fraction | float, kind: str, mode: str = "rn", negative_zero: bool = False
) -> int:
    """The bits of `value` rounded once; a NaN has all bits except the sign."""
    mantissa, exponent = FORMATS[kind]
    sign_bit = 1 << mantissa + exponent
    infinity = ((1 << exponent) - 1) << mantissa
    if isinstance(value, float):
        if math.isnan(value):
            return sign_bit - 1
        if math.isinf(value):
            return infinity | (sign_bit if value < 0 else 0)
        negative_zero = value == 0 and math.copysign(1, value) < 0
        value = Fraction(value)
    if value == 0:
        return sign_bit if negative_zero else 0
    size, sign = abs(value), sign_bit if value < 0 else 0
    bias = (1 << exponent - 1) - 1
    power = max(size.numerator.bit_length() - size.denominator.bit_length() - 1, 1 - bias)
    while size >= Fraction(2) ** (power + 1):
        power += 1
    scaled = size / Fraction(2) ** (power - mantissa)
    kept, rest = divmod(scaled, 1)
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and kept % 2 == 1),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": sign != 0 and rest > 0,
        "rp": sign == 0 and rest > 0,
    }[mode]
    code = int(kept) + up + (power + bias - 1 << mantissa)
    if code < infinity:
        return sign | code
    stays = mode == "rz" or (mode == "rm" and not sign) or (mode == "rp" and sign != 0)
    return sign | (infinity - 1 if stays else infinity)


def exact(values: list[float], function: Callable, special: Callable) -> tuple[object, bool]:
    """`function` of fractions, or `special` of floats where one is not finite."""
    if not all(math.isfinite(v) for v in values):
        # Only the sign of a finite operand counts here, and a product of two large ones overflows.
        return special(*(max(min(v, 1.0), -1.0) if math.isfinite(v) else v for v in values)), False
    result = function(*map(Fraction, values))
    # In a zero result float64 decides the sign, as it is exact there.
    return result, result == 0 and math.copysign(1, special(*values)) < 0


def rounded(kind: str, sources: tuple[str, ...], function: Callable, mode: str = "rn") -> Callable:
    """An oracle that computes in fractions and rounds once."""

    def oracle(*arrays: np.ndarray) -> np.ndarray:
        result = np.empty(len(arrays[0]), BITS[kind])
        for i, bits in enumerate(zip(*arrays, strict=True)):
            values = [decode(int(b), s) for b, s in zip(bits, sources, strict=True)]
            value, negative = exact(values, function, function)
            result[i] = encode(value, kind, mode, negative)
        return result

    return oracle


def wrapped(kind: str, function: Callable) -> Callable:
    """An oracle of Python integers, modulo the width."""

    def oracle(*arrays: np.ndarray) -> np.ndarray:
        info = np.iinfo(BITS[kind])
        unsigned = np.dtype(BITS[kind]).str.replace("i", "u")
        values = [
            function(*map(int, row)) & int(info.max) * (1 if info.min == 0 else 2) + (info.min != 0)
            for row in zip(*arrays, strict=True)
        ]
        return np.array(values, unsigned).view(BITS[kind])

    return oracle


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def integer_cases() -> Iterator[Case]:
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        width = int(kind[1:])
        table: dict[str, Callable] = {
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul.lo": lambda a, b: a * b,
            "mul.hi": lambda a, b, w=width: a * b >> w,
            "min": min,
            "max": max,
            # By zero the quotient is unspecified; the machine gives all ones and the dividend.
            "div": lambda a, b: truncated(a, b) if b else -1,
            "rem": lambda a, b: a - b * truncated(a, b) if b else a,
        }
        for name, function in table.items():
            line = f"{name}.{kind} %d, %a, %b"
            yield Case(line, kind, (kind, kind), wrapped(kind, function))
        yield Case(
            f"mad.lo.{kind} %d, %a, %b, %c", kind, (kind,) * 3,
            wrapped(kind, lambda a, b, c: a * b + c),
        )  # fmt: skip
        if width < 64:
            wide = f"{kind[0]}{2 * width}"
            function = wrapped(wide, lambda a, b: a * b)
            yield Case(f"mul.wide.{kind} %d, %a, %b", wide, (kind, kind), function)
            function = wrapped(wide, lambda a, b, c: a * b + c)
            yield Case(f"mad.wide.{kind} %d, %a, %b, %c", wide, (kind, kind, wide), function)
    yield Case("min.relu.s32 %d, %a, %b", "s32", ("s32", "s32"),
               wrapped("s32", lambda a, b: max(min(a, b), 0)))  # fmt: skip


def reverse(value: int, width: int) -> int:
    return int(f"{value:0{width}b}"[::-1], 2)


def extract(a: int, position: int, length: int, width: int) -> int:
    """bfe: bits of a sign-extended field; Python integers extend `a` without end."""
    position, length = position & 255, length & 255
    if length == 0:
        return 0
    top = min(position + length, width) - 1
    field = (a >> position) & ((1 << length) - 1) if position < width else 0
    if a < 0:  # a signed type whose sign bit fills the bits past the end
        field = (a >> position) & ((1 << length) - 1)
    sign = a < 0 if top == width - 1 else False
    return field if not sign else field | -1 << min(length, 64)


def insert(a: int, b: int, position: int, length: int, width: int) -> int:
    position, length = position & 255, length & 255
    mask = ((1 << length) - 1) << position & (1 << width) - 1
    return (a << position & mask) | (b & ~mask)


def permute(a: int, b: int, selectors: int) -> int:
    data = (b << 32 | a).to_bytes(8, "little")
    result = []
    for k in range(4):
        selector = selectors >> 4 * k
        byte = data[selector & 7]
        result.append((255 if byte & 128 else 0) if selector & 8 else byte)
    return int.from_bytes(result, "little")


def logic_cases() -> Iterator[Case]:
    for width in (16, 32, 64):
        kind, signed = f"u{width}", f"s{width}"
        for name, function in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
            line = f"{name}.b{width} %d, %a, %b"
            yield Case(line, kind, (kind, kind), wrapped(kind, function))
        yield Case(f"not.b{width} %d, %a", kind, (kind,), wrapped(kind, lambda a: ~a))
        yield Case(f"shl.b{width} %d, %a, %b", kind, (kind, "u32"),
                   wrapped(kind, lambda a, b: a << min(b, 64)))  # fmt: skip
        for k in (kind, signed):
            yield Case(f"shr.{k} %d, %a, %b", k, (k, "u32"),
                       wrapped(k, lambda a, b: a >> min(b, 64)))  # fmt: skip
        if width == 16:
            continue
        yield Case(f"popc.b{width} %d, %a", "u32", (kind,), wrapped("u32", int.bit_count))
        yield Case(f"clz.b{width} %d, %a", "u32", (kind,),
                   wrapped("u32", lambda a, w=width: w - a.bit_length()))  # fmt: skip
        yield Case(f"brev.b{width} %d, %a", kind, (kind,),
                   wrapped(kind, lambda a, w=width: reverse(a, w)))  # fmt: skip
        yield Case(f"bfe.u{width} %d, %a, %b, %c", kind, (kind, "u32", "u32"),
                   wrapped(kind, lambda a, b, c, w=width: extract(a, b, c, w)))  # fmt: skip
        yield Case(f"bfi.b{width} %d, %a, %b, %c, 7", kind, (kind, kind, "u32"),
                   wrapped(kind, lambda a, b, c, w=width: insert(a, b, c, 7, w)))  # fmt: skip
    for k in ("u32", "s32"):
        yield Case(f"bfind.{k} %d, %a", "s32", (k,),
                   wrapped("s32", lambda a: (a if a >= 0 else ~a).bit_length() - 1))  # fmt: skip
    three = ("u32", "u32", "u32")
    yield Case("prmt.b32 %d, %a, %b, %c", "u32", three, wrapped("u32", permute))
    yield Case("prmt.b32 %d, %a, %b, 21520", "u32", three[:2],
               wrapped("u32", lambda a, b: permute(a, b, 0x5410)))  # fmt: skip
    yield Case("prmt.b32 %d, %a, %b, 48026", "u32", three[:2],
               wrapped("u32", lambda a, b: permute(a, b, 0xBB9A)))  # fmt: skip
    yield Case("lop3.b32 %d, %a, %b, %c, 202", "u32", three,
               wrapped("u32", lambda a, b, c: (a & b) | (~a & c)))  # fmt: skip
    yield Case("shf.l.wrap.b32 %d, %a, %b, %c", "u32", three,
               wrapped("u32", lambda a, b, c: (b << 32 | a) << (c & 31) >> 32))  # fmt: skip
    yield Case("shf.r.clamp.b32 %d, %a, %b, %c", "u32", three,
               wrapped("u32", lambda a, b, c: (b << 32 | a) >> min(c, 32)))  # fmt: skip


def times(a, b):
    return a * b


def plus(a, b):
    return a + b


def minus(a, b):
    return a - b


def fused(a, b, c):
    return a * b + c


def float_cases() -> Iterator[Case]:
    for kind in ("f32", "f16", "bf16"):
        for mode in ("rn", "rz", "rm", "rp") if kind == "f32" else ("rn",):
            two, three = (kind,) * 2, (kind,) * 3
            for name, function in (("add", plus), ("sub", minus), ("mul", times)):
                if mode == "rm" and name != "mul":
                    continue  # the sign of an exact zero differs from float64's
                line = f"{name}.{mode}.{kind} %d, %a, %b"
                yield Case(line, kind, two, rounded(kind, two, function, mode))
            if mode != "rm":
                line = f"fma.{mode}.{kind} %d, %a, %b, %c"
                yield Case(line, kind, three, rounded(kind, three, fused, mode))
    for kind in ("f16", "bf16"):
        mixed = (kind, "f32")
        yield Case(f"add.rn.f32.{kind} %d, %a, %b", "f32", mixed, rounded("f32", mixed, plus))
        mixed = (kind, kind, "f32")
        yield Case(f"fma.rn.f32.{kind} %d, %a, %b, %c", "f32", mixed,
                   rounded("f32", mixed, fused))  # fmt: skip


def same(a):
    return a


def narrowing_cases() -> Iterator[Case]:
    for kind in ("f16", "bf16"):
        for mode in ("rn", "rz"):
            yield Case(f"cvt.{mode}.{kind}.f32 %d, %a", kind, ("f32",),
                       rounded(kind, ("f32",), same, mode))  # fmt: skip
        yield Case(f"cvt.f32.{kind} %d, %a", "f32", (kind,), rounded("f32", (kind,), same))
    for mode in ("rn", "rz", "rm", "rp"):
        yield Case(f"cvt.{mode}.f32.f64 %d, %a", "f32", ("f64",),
                   rounded("f32", ("f64",), same, mode))  # fmt: skip
        for kind in ("s32", "u64", "s64"):
            yield Case(f"cvt.{mode}.f32.{kind} %d, %a", "f32", (kind,),
                       from_integer("f32", mode))  # fmt: skip


def from_integer(kind: str, mode: str) -> Callable:
    return lambda a: np.array([encode(Fraction(int(x)), kind, mode) for x in a], BITS[kind])


def to_integer(kind: str, source: str, function: Callable) -> Callable:
    """A float to the nearest integer of the type, by `function`; a NaN to 0 or 2^(bits - 1)."""
    info = np.iinfo(BITS[kind])
    width = info.bits

    def one(bits: int) -> int:
        value = decode(bits, source)
        if math.isnan(value):
            wide = width == 64 or source == "f64"
            nan = 1 << (width - 1) if wide else 0
            return nan if info.min == 0 else -nan
        if math.isinf(value):
            return int(info.max if value > 0 else info.min)
        return min(max(function(Fraction(value)), int(info.min)), int(info.max))

    return lambda a: np.array([one(int(x)) for x in a], BITS[kind])


def conversion_cases() -> Iterator[Case]:
    kinds = ("u16", "s16", "u32", "s32", "u64", "s64")
    for kind in kinds:
        for source in kinds:
            yield Case(f"cvt.{kind}.{source} %d, %a", kind, (source,), wrapped(kind, same))
            low, high = np.iinfo(BITS[kind]).min, np.iinfo(BITS[kind]).max
            clamp = wrapped(kind, lambda a, lo=int(low), hi=int(high): min(max(a, lo), hi))
            yield Case(f"cvt.sat.{kind}.{source} %d, %a", kind, (source,), clamp)
        for source in ("f32", "f64", "f16"):
            table = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
            for mode, function in table.items():
                line = f"cvt.{mode}.{kind}.{source} %d, %a"
                yield Case(line, kind, (source,), to_integer(kind, source, function))
    yield from narrowing_cases()


def comparison(kind: str, name: str) -> Callable:
    ordered = {"eq", "ne", "lt", "le", "gt", "ge"}
    base = name if name in ordered else name[:-1]

    def one(x: int, y: int) -> int:
        a, b = (decode(x, kind), decode(y, kind)) if kind in FORMATS else (x, y)
        nan = a != a or b != b
        if name in ("num", "nan"):
            return int(nan == (name == "nan"))
        table = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
        return int(name not in ordered if nan else table[base])

    return lambda a, b: np.array(
        [one(int(x), int(y)) for x, y in zip(a, b, strict=True)], np.uint32
    )


def comparison_cases() -> Iterator[Case]:
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64", "f16", "bf16"):
        names = ["eq", "ne", "lt", "le", "gt", "ge"]
        if kind in FORMATS:
            names += ["equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
        for name in names:
            line = f"setp.{name}.{kind} %d, %a, %b"
            yield Case(line, "pred", (kind, kind), comparison(kind, name))


def cases() -> list[Case]:
    parts = (integer_cases, logic_cases, float_cases, conversion_cases, comparison_cases)
    return [case for part in parts for case in part()]


def inputs(kind: str, count: int, generator: np.random.Generator) -> np.ndarray:
    """Random bits, small numbers, and the special values of the type."""
    info = np.iinfo(BITS[kind])
    values = generator.integers(info.min, info.max, count, BITS[kind], endpoint=True)
    if kind not in FORMATS:
        small = generator.integers(0, 70, count).astype(BITS[kind])
        extremes = np.array([0, 1, info.max, info.min, info.max - 1], BITS[kind])
        special = generator.choice(extremes, count)
    else:
        mantissa, exponent = FORMATS[kind]
        infinity, sign = ((1 << exponent) - 1) << mantissa, 1 << mantissa + exponent
        one = ((1 << exponent - 1) - 1) << mantissa
        table = [0, 1, infinity, infinity + 1, infinity - 1, (1 << mantissa) - 1, one, one + 1]
        special = generator.choice(
            np.array([x | s for x in table for s in (0, sign)], np.uint64), count
        )
        # Exponents near that of 1, so that sums and integers are not trivial.
        low = one - (8 << mantissa)
        small = generator.integers(low, low + (20 << mantissa), count).astype(np.uint64)
        small |= np.where(generator.random(count) < 0.5, np.uint64(sign), np.uint64(0))
    choice = generator.integers(0, 4, count)
    values = np.where(choice == 0, special.astype(BITS[kind]), values)
    return np.where(choice >= 2, small.astype(BITS[kind]), values).astype(BITS[kind])
