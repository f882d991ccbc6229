"""Every cast of the interpreter against an oracle that enumerates the values of each format."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from deepkern import interpreter

if not interpreter.active():
    pytest.skip("needs the interpreter: TRITON_INTERPRET=1", allow_module_level=True)

TORCH = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2fnuz": torch.float8_e5m2fnuz,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
# exponent bits, mantissa bits, bias, top exponent is special, code of NaN, saturates
LAYOUT = {
    "e4m3": (4, 3, 7, False, 0x7F, True),
    "e5m2": (5, 2, 15, True, 0x7F, True),
    "e4m3fnuz": (4, 3, 8, False, 0x80, True),
    "e5m2fnuz": (5, 2, 16, False, 0x80, True),
    "bf16": (8, 7, 127, True, 0x7FFF, False),
    "fp16": (5, 10, 15, True, 0x7FFF, False),
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # inf and NaN are intended
BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def ladder(fmt):
    """The finite values >= 0 of a format in ascending order; the index of a value is its code."""
    exponent_bits, mantissa_bits, bias, special, nan, _ = LAYOUT[fmt]
    values = []
    for exponent in range((1 << exponent_bits) - special):
        for mantissa in range(1 << mantissa_bits):
            scale = 2.0 ** (max(exponent, 1) - bias - mantissa_bits)
            values.append((mantissa + (exponent > 0) * 2.0**mantissa_bits) * scale)
    if fmt == "e4m3":
        values.pop()  # S.1111.111 is NaN, the other codes of that exponent are numbers
    return np.array(values)


def decoded(fmt):
    """float64 value of each code of a format, NaN and infinities included."""
    _, mantissa_bits, _, special, nan, _ = LAYOUT[fmt]
    width = 8 if fmt.startswith("e") else 16
    half = np.full(1 << width - 1, np.nan)
    finite = ladder(fmt)
    half[: len(finite)] = finite
    if special:
        half[len(finite)] = np.inf
    whole = np.concatenate([half, -half])
    if nan == 0x80:
        whole[0x80] = np.nan
    return whole


def nearest(x, fmt, toward_zero=False):
    """The code of the value of `fmt` nearest to each float64, ties to the even code."""
    *_, nan, saturates = LAYOUT[fmt]
    values = ladder(fmt)
    next_value = values[-1] + (values[-1] - values[-2])  # if the format had one more
    magnitude = np.abs(x)
    low = np.searchsorted(values, magnitude, "right") - 1
    up = np.append(values, next_value)[low + 1] - magnitude
    down = magnitude - values[low]
    code = low + ((up < down) | ((up == down) & (low % 2 == 1)))
    if toward_zero:
        code = np.where(np.isinf(x), len(values), low)
    elif saturates:
        code = np.minimum(code, len(values) - 1)
    else:
        code = np.where(np.isinf(x), len(values), code)
    sign = np.signbit(x) & ((code != 0) | (nan != 0x80))
    code = code + np.where(sign, 1 << (7 if fmt.startswith("e") else 15), 0)
    return np.where(np.isnan(x), nan, code)


def inputs(source):
    """All values of a format of up to 16 bits; for wider formats, values around rounding points."""
    if source in LAYOUT:
        width = TORCH[source].itemsize
        codes = np.arange(1 << 8 * width).astype(f"u{width}")
        return torch.from_numpy(codes).view(TORCH[source]), decoded(source)
    kind = {"fp32": np.float32, "fp64": np.float64}[source]
    turns = [np.array([0.0, 1e-300, 1e-42, 2.0**-149, 1e38, 3.4e38, 1e300, np.inf, np.nan])]
    for fmt in LAYOUT:
        values = ladder(fmt)
        turns += [values, (values[1:] + values[:-1]) / 2, [values[-1] * 1.5]]
        turns += [(values[-1] + (values[-1] - values[-2]) * np.array([0.25, 0.5, 0.75, 1, 2]))]
    at = np.unique(np.concatenate(turns)).astype(kind)
    width = f"u{at.itemsize}"
    noise = np.random.default_rng(0).integers(0, 1 << 8 * at.itemsize, 60000, dtype=width)
    around = [np.nextafter(at, kind(np.inf)), np.nextafter(at, kind(-np.inf))]
    x = np.concatenate([at, *around, noise.view(kind)])
    x = np.concatenate([x, -x])
    return torch.from_numpy(x), x.astype(np.float64)


@triton.jit
def cast_kernel(x, y, n, BLOCK: tl.constexpr, ROUNDING: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n)
    tl.store(y + i, value.to(y.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=i < n)


def run_cast(x, dtype, rounding=None):
    y = torch.empty(x.shape, dtype=dtype)
    block = min(65536, triton.next_power_of_2(x.numel()))
    cast_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), block, rounding)
    return y


def codes(y):
    return y.view(BITS[y.dtype.itemsize]).numpy()


@pytest.mark.parametrize("source, target", list(permutations(TORCH, 2)))
def test_cast(source, target):
    x, value = inputs(source)
    if source == "e5m2" and target == "bf16":
        # What Triton's sm_90 code does: exponent 31 is one more ordinary exponent.
        big = np.array([1.0, 1.25, 1.5, 1.75]) * 65536
        value[0x7C:0x80], value[0xFC:] = big, -big
    y = run_cast(x, TORCH[target])
    if target in LAYOUT:
        np.testing.assert_array_equal(codes(y), nearest(value, target))
    else:
        expected = value.astype(y.numpy().dtype)
        np.testing.assert_array_equal(y.numpy(), expected)
        zero = expected == 0
        assert (np.signbit(y.numpy()) == np.signbit(expected))[zero].all()


@pytest.mark.parametrize("target", ["bf16", "fp16", "e5m2"])
@pytest.mark.parametrize("source", ["fp32", "fp64"])
def test_cast_toward_zero(source, target):
    x, value = inputs(source)
    y = run_cast(x, TORCH[target], "rtz")
    np.testing.assert_array_equal(codes(y), nearest(value, target, toward_zero=True))


def test_cast_toward_zero_to_e4m3_raises():
    with pytest.raises(Exception, match="fp8e4nv.*rtz"):
        run_cast(torch.ones(16), torch.float8_e4m3fn, "rtz")


def integers(dtype):
    info = torch.iinfo(dtype)
    rng = np.random.default_rng(0)
    picked = {info.min, info.max, 0, 1, 255, 256, 257, 258, 259}
    for shift in range(8, info.bits):  # halfway between bf16 neighbours, and one off it
        for offset in (-1, 0, 1):
            for top in (257, 259, 129 * 2 + 1):
                picked |= {s * ((top << shift - 8) + offset) for s in (1, -1)}
    picked |= set(rng.integers(info.min, info.max, 2000, dtype=str(dtype)[6:]).tolist())
    return sorted(v for v in picked if info.min <= v <= info.max)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_to_bf16_rounds_once(dtype):
    values = integers(dtype)
    got = run_cast(torch.tensor(values, dtype=dtype), torch.bfloat16).double().tolist()
    for value, result in zip(values, got, strict=True):
        step = 1 << max(abs(value).bit_length() - 8, 0)
        quotient, rest = divmod(abs(value), step)
        quotient += 2 * rest > step or (2 * rest == step and quotient % 2 == 1)
        assert abs(result) == quotient * step and (result < 0) == (value < 0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_float_to_integer_clamps(source, dtype):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    x = x * 2.0 ** torch.arange(-10, 70).repeat(50)
    special = torch.tensor([0.0, -0.0, 0.99, -0.99, 254.5, 300.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([x, special]).to(source)
    got = run_cast(x, dtype).tolist()
    info = torch.iinfo(dtype)
    # cvt has no 8-bit target: it clamps to 16 bits and the low byte is kept
    clamp = {torch.int8: torch.iinfo(torch.int16), torch.uint8: SimpleNamespace(min=0, max=65535)}
    clamp = clamp.get(dtype, info)
    for value, result in zip(x.tolist(), got, strict=True):
        if value != value:
            expected = -(2**63) if dtype == torch.int64 else 0
        else:
            expected = int(max(min(value, 2.0**80), -(2.0**80)))
            expected = max(min(expected, clamp.max), clamp.min)
            expected = (expected - info.min) % (1 << info.bits) + info.min
        assert result == expected, value
