"""bf16 arithmetic, reductions, scans, fma and dots of the interpreter against exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from deepkern import interpreter

if not interpreter.active():
    pytest.skip("needs the interpreter: TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # inf and NaN are intended
SPECIAL = [0.0, 1.0, 1.0078125, 3.0, 256.0, 2.0**-133, 2.0**-126, 2.0**-60, 3.3e38, math.inf]


def bf16_pairs():
    special = torch.tensor([s * v for v in SPECIAL for s in (1, -1)] + [math.nan])
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (2, 2**14), generator=generator).short()
    near = torch.randn(2, 2**14, generator=generator).to(torch.bfloat16)
    grid = torch.cartesian_prod(special, special).T.to(torch.bfloat16)
    return torch.cat([bits.view(torch.bfloat16), near, grid], dim=1)


def to_bf16(exact):
    """float64 -> bf16 to nearest even, by its definition (independent of any cast)."""
    with np.errstate(all="ignore"):
        fraction, exponent = np.frexp(exact)
        step = np.ldexp(1.0, np.maximum(exponent - 8, -133))
        rounded = np.rint(exact / step) * step  # np.rint rounds ties to even
    out = np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, exact), rounded)
    return torch.from_numpy(np.where(np.isfinite(exact), out, exact))


def same(got, expected):
    """Equal values and signs of zeros; NaN for NaN."""
    got, expected = got.double(), expected.double()
    nan = got.isnan() & expected.isnan()
    assert ((got == expected) & (got.signbit() == expected.signbit()) | nan).all()


@triton.jit
def binary_kernel(x, y, out, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0.0)
    b = tl.load(y + i, mask=i < n, other=0.0)
    if OP == "add":
        r = a + b
    elif OP == "sub":
        r = a - b
    elif OP == "mul":
        r = a * b
    elif OP == "div":
        r = a / b
    elif OP == "max":
        r = tl.maximum(a, b)
    elif OP == "min":
        r = tl.minimum(a, b)
    elif OP == "max_nan":
        r = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "min_nan":
        r = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "clamp":
        r = tl.clamp(a, -b, b)
    elif OP == "lt":
        r = a < b
    elif OP == "ge":
        r = a >= b
    elif OP == "eq":
        r = a == b
    elif OP == "ne":
        r = a != b
    elif OP == "where":
        r = tl.where(a > b, a, b)
    elif OP == "abs":
        r = tl.abs(a)
    elif OP == "twice":
        r = a * 2.0
    elif OP == "less_third":
        r = a - 0.333333333
    tl.store(out + i, r, mask=i < n)


def run_binary(a, b, op, dtype=torch.bfloat16):
    out = torch.empty(a.shape, dtype=dtype)
    n = a.numel()
    binary_kernel[(1,)](a.contiguous(), b.contiguous(), out, n, op, triton.next_power_of_2(n))
    return out


@pytest.mark.parametrize("op", ["add", "sub", "mul", "twice", "less_third"])
def test_bf16_rounds_once(op):
    a, b = bf16_pairs()
    x, y = a.double().numpy(), b.double().numpy()
    third = float(torch.tensor(0.333333333).to(torch.bfloat16))
    with np.errstate(all="ignore"):
        exact = {"add": x + y, "sub": x - y, "mul": x * y, "twice": x * 2, "less_third": x - third}
    same(run_binary(a, b, op), to_bf16(exact[op]))


def test_bf16_division_is_float32():
    a, b = bf16_pairs()
    same(run_binary(a, b, "div", torch.float32), a.float() / b.float())


def ordered(x, y, largest):
    """max or min of Python floats with +0 above -0."""
    key = (x, math.copysign(1, x)) if (x == y) else (x, 0)
    other = (y, math.copysign(1, y)) if (x == y) else (y, 0)
    return (x if key >= other else y) if largest else (x if key <= other else y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op", ["max", "min", "max_nan", "min_nan"])
def test_min_max(op, dtype):
    a, b = (t.to(dtype) for t in bf16_pairs())
    expected = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        if x != x or y != y:
            expected.append(math.nan if op.endswith("nan") else (y if x != x else x))
        else:
            expected.append(ordered(x, y, op.startswith("max")))
    same(run_binary(a, b, op, dtype), torch.tensor(expected, dtype=torch.float64))


def test_bf16_comparisons_select_and_abs():
    a, b = bf16_pairs()
    for op, torch_op in {"lt": "lt", "ge": "ge", "eq": "eq", "ne": "ne"}.items():
        assert torch.equal(run_binary(a, b, op, torch.int8).bool(), getattr(torch, torch_op)(a, b))
    same(run_binary(a, b, "where"), torch.where(a > b, a, b))
    same(run_binary(a, b, "abs"), a.abs())
    b = b.nan_to_num().abs()
    same(run_binary(a.nan_to_num(), b, "clamp") + 0.0, a.nan_to_num().clamp(-b, b) + 0.0)


def test_fp8_arithmetic_raises():
    x = torch.ones(16).to(torch.float8_e4m3fn)
    for op in ("add", "lt", "max"):
        with pytest.raises(Exception, match="no GPU has arithmetic or comparisons on fp8e4nv"):
            run_binary(x, x, op)


@triton.jit
def fma_kernel(x, y, z, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fma_rounds_once(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 2048, generator=generator).to(dtype)
    z[::2] = (-x.double() * y.double()).to(dtype)[::2]  # cancellation
    z[1::4] *= 2.0**-30  # the product is a tie, and a much smaller addend decides
    half = 1 + torch.finfo(dtype).eps  # its square is 1 + 2 eps + eps^2
    x[1::8], y[1::8] = half, half
    out = torch.empty_like(x)
    fma_kernel[(1,)](x, y, z, out, 2048)
    finfo = torch.finfo(dtype)
    for a, b, c, got in zip(*(t.tolist() for t in (x, y, z, out)), strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        if exact == 0:
            assert got == 0
            continue
        exponent = math.floor(math.log2(abs(exact)))
        exponent -= Fraction(2) ** exponent > abs(exact)
        exponent += Fraction(2) ** (exponent + 1) <= abs(exact)
        step = Fraction(2) ** max(exponent, int(math.log2(finfo.tiny))) * Fraction(finfo.eps)
        assert Fraction(got) == round(exact / step) * step  # round() of a Fraction: ties to even


@triton.jit
def combine_last_true(a_value, a_valid, b_value, b_valid):
    take = b_valid != 0 and a_valid == a_valid
    return tl.where(take, b_value, a_value), a_valid | b_valid


@triton.jit
def reduce_kernel(x, out, ROWS: tl.constexpr, COLS: tl.constexpr, OP: tl.constexpr):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    tile = tl.load(x + rows[:, None] * COLS + cols[None, :])
    if OP == "sum":
        tl.store(out + rows, tl.sum(tile, 1))
    elif OP == "max":
        tl.store(out + rows, tl.max(tile, 1))
    elif OP == "min":
        tl.store(out + rows, tl.min(tile, 1))
    elif OP == "argmax":
        tl.store(out + rows, tl.argmax(tile, 1))
    elif OP == "argmin":
        tl.store(out + rows, tl.argmin(tile, 1))
    elif OP == "max_of_all":
        tl.store(out, tl.max(tile))
    elif OP == "kept":
        tl.store(out + rows[:, None], tl.sum(tile, 1, keep_dims=True))
    elif OP == "cumsum":
        tl.store(out + rows[:, None] * COLS + cols[None, :], tl.cumsum(tile, 1))
    elif OP == "cumsum_reverse":
        tl.store(out + rows[:, None] * COLS + cols[None, :], tl.cumsum(tile, 1, reverse=True))
    elif OP == "sort":
        tl.store(out + rows[:, None] * COLS + cols[None, :], tl.sort(tile, 1))
    elif OP == "last":
        last, _ = tl.reduce((tile, (tile > 0).to(tl.int32)), 1, combine_last_true)
        tl.store(out + rows, last)
    elif OP == "scan_last":
        last, _ = tl.associative_scan((tile, (tile > 0).to(tl.int32)), 1, combine_last_true)
        tl.store(out + rows[:, None] * COLS + cols[None, :], last)


def run_reduce(x, op, out):
    reduce_kernel[(1,)](x, out, x.shape[0], x.shape[1], op)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reductions(dtype):
    # Small integers, so that sums are exact in any order; both signs, many ties.
    x = torch.randint(-8, 8, (16, 32), generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = x.double()
    rows = torch.empty(16)
    same(run_reduce(x, "sum", rows), wide.sum(1))
    same(run_reduce(x, "kept", rows), wide.sum(1))
    same(run_reduce(x, "max", rows), wide.amax(1))
    same(run_reduce(x, "min", rows), wide.amin(1))
    assert run_reduce(x, "max_of_all", rows)[0] == wide.max()
    index = torch.empty(16, dtype=torch.int32)
    for op, best in {"argmax": wide.amax(1), "argmin": wide.amin(1)}.items():
        first = (wide == best[:, None]).int().argmax(1)  # ties go to the lower index
        assert torch.equal(run_reduce(x, op, index).long(), first)
    tile = torch.empty(16, 32)
    same(run_reduce(x, "cumsum", tile), wide.cumsum(1))
    same(run_reduce(x, "cumsum_reverse", tile), wide.flip(1).cumsum(1).flip(1))
    same(run_reduce(x, "sort", tile), wide.sort(1).values)


def test_bf16_sum_rounds_at_every_step():
    x = torch.full((1, 128), 1.0, dtype=torch.bfloat16)
    x[0, 0] = 256.0  # plus 1 is a tie and stays 256; plus 2, 4, 8 ... is exact
    assert run_reduce(x, "sum", torch.empty(1)).item() == 382.0


def test_max_ignores_nan_and_signs_zeros():
    nan = math.nan
    x = torch.tensor([[nan, -1.0], [nan, nan], [-0.0, 0.0], [0.0, -0.0]])
    same(run_reduce(x, "max", torch.empty(4)), torch.tensor([-1.0, nan, 0.0, 0.0]))
    same(run_reduce(x, "min", torch.empty(4)), torch.tensor([-1.0, nan, -0.0, -0.0]))


def test_sum_does_not_depend_on_tile():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    whole = run_reduce(x, "sum", torch.empty(64))
    for row in (0, 17, 63):
        alone = run_reduce(x[row : row + 1], "sum", torch.empty(1))
        assert torch.equal(alone, whole[row : row + 1])


def test_custom_combine_function_order():
    x = torch.randint(-3, 2, (8, 32), generator=torch.Generator().manual_seed(0)).bfloat16()
    last = [[v for v in row if v > 0][-1:] or row[:1] for row in x.tolist()]
    same(run_reduce(x, "last", torch.empty(8)), torch.tensor(last).flatten())
    scanned = run_reduce(x, "scan_last", torch.empty(8, 32))
    same(scanned[:, -1], torch.tensor(last).flatten())
    same(scanned[:, 0], x[:, 0])


@triton.jit
def dot_kernel(a, b, acc, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
               PRECISION: tl.constexpr, IMPRECISE: tl.constexpr):  # fmt: skip
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + i[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + j[None, :])
    here = i[:, None] * N + j[None, :]
    total = tl.dot(x, y, tl.load(acc + here), input_precision=PRECISION,
                   max_num_imprecise_acc=IMPRECISE, out_dtype=acc.dtype.element_ty)  # fmt: skip
    tl.store(out + here, total)


def run_dot(a, b, acc, precision="ieee", imprecise=None):
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty_like(acc)
    dot_kernel[(1,)](a.contiguous(), b.contiguous(), acc, out, m, n, k, precision, imprecise)
    return out


def operands(dtype, m=32, n=16, k=64, other=None):
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.int8:
        a = torch.randint(-128, 128, (m, k), generator=generator, dtype=dtype)
        b = torch.randint(-128, 128, (k, n), generator=generator, dtype=dtype)
        return a, b, torch.randint(-99, 99, (m, n), generator=generator, dtype=torch.int32)
    a, b, acc = (torch.randn(s, generator=generator) for s in ((m, k), (k, n), (m, n)))
    acc = acc.double() if dtype == torch.float64 else acc
    return a.to(dtype), b.to(other or dtype), acc


DOTS = [
    (torch.bfloat16, None, "bf16"),
    (torch.float16, None, "fp16"),
    (torch.float8_e4m3fn, None, "e4m3"),
    (torch.float8_e5m2, None, "e5m2"),
    (torch.float8_e4m3fn, torch.float8_e5m2, "e4m3 x e5m2"),
    (torch.float32, None, "fp32"),
]


@pytest.mark.parametrize("dtype, other", [d[:2] for d in DOTS], ids=[d[2] for d in DOTS])
def test_dot_is_exact_sum_rounded_once(dtype, other):
    a, b, acc = operands(dtype, other=other)
    got = run_dot(a, b, acc)
    for i, row in enumerate(a.double().tolist()):
        for j, column in enumerate(b.double().T.tolist()):
            terms = [x * y for x, y in zip(row, column, strict=True)]  # exact in float64
            assert got[i, j] == torch.tensor(math.fsum(terms), dtype=torch.float32) + acc[i, j]


def test_dot_of_int8_fp64_and_to_fp16():
    a, b, acc = operands(torch.int8)
    assert torch.equal(run_dot(a, b, acc), a.int() @ b.int() + acc)
    a, b, acc = operands(torch.float64)
    torch.testing.assert_close(run_dot(a, b, acc), a @ b + acc, rtol=1e-14, atol=1e-14)
    a, b, acc = operands(torch.float16)
    half = (a.double() @ b.double()).half() + acc.half()
    assert torch.equal(run_dot(a, b, acc.half()), half)
    a, b, acc = operands(torch.float8_e4m3fn)
    assert torch.equal(run_dot(a, b, acc), run_dot(a, b, acc, imprecise=32))


def test_tf32_dot_drops_low_bits():
    a, b, acc = operands(torch.float32)

    def truncate(x):
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32).double()

    expected = (truncate(a) @ truncate(b)).float() + acc
    assert torch.equal(run_dot(a, b, acc, "tf32"), expected)
    ieee, thrice = run_dot(a, b, acc), run_dot(a, b, acc, "tf32x3")
    assert not torch.equal(ieee, expected)
    assert 0 < (ieee - thrice).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_dot_does_not_depend_on_tile(dtype):
    a, b, acc = operands(dtype, 64, 64, 128)
    whole = run_dot(a, b, acc)
    for m, n in ((16, 16), (32, 64), (64, 16)):
        part = run_dot(a[:m], b[:, :n], acc[:m, :n].contiguous())
        assert torch.equal(part, whole[:m, :n])


@triton.jit
def batched_kernel(a, b, out, S: tl.constexpr):
    g, i, j = tl.arange(0, 4)[:, None, None], tl.arange(0, S)[:, None], tl.arange(0, S)[None, :]
    here = g * S * S + i[None] * S + j[None]
    tl.store(out + here, tl.dot(tl.load(a + here), tl.load(b + here)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_batched_dot(dtype):
    a, b = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(4, 32, 32)
    batched_kernel[(1,)](a, b, out, 32)
    assert torch.equal(out, (a.double() @ b.double()).float())


@triton.jit
def atomic_kernel(x, index, out, old, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    was = tl.atomic_add(out + tl.load(index + i), tl.load(x + i), mask=i < BLOCK - 1)
    tl.store(old + i, was, mask=i < BLOCK - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_atomic_add(dtype):
    x = torch.tensor([256.0, 1.0, 1.0, 0.5, 2.0, 3.0, 4.0, 1e30], dtype=torch.float32)
    x = x.clamp(max=60000).to(dtype)
    index = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0], dtype=torch.int32)
    out, old = torch.zeros(2, dtype=dtype), torch.zeros(8, dtype=dtype)
    atomic_kernel[(1,)](x, index, out, old, 8)
    assert out.tolist() == [256.0 if dtype == torch.bfloat16 else 258.0, 9.5]
    assert old.tolist()[:2] == [0.0, 256.0] and old.tolist()[3:7] == [0.0, 0.5, 2.5, 5.5]


@triton.jit
def dot_scaled_kernel(a, a_scale, b, b_scale, out, M: tl.constexpr, K: tl.constexpr):
    i, k, s = tl.arange(0, M), tl.arange(0, K), tl.arange(0, K // 32)
    x = tl.load(a + i[:, None] * K + k[None, :])
    y = tl.load(b + i[None, :] * K + k[:, None])
    x_scale = tl.load(a_scale + i[:, None] * (K // 32) + s[None, :])
    y_scale = tl.load(b_scale + i[:, None] * (K // 32) + s[None, :])
    tile = tl.dot_scaled(x, x_scale, "e4m3", y, y_scale, "e4m3")
    tl.store(out + i[:, None] * M + i[None, :], tile)


def test_dot_scaled():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 16, 64, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.randint(120, 135, (2, 16, 2), generator=generator, dtype=torch.uint8)
    out = torch.empty(16, 16)
    launch = dot_scaled_kernel[(1,)]
    if not hasattr(triton.runtime.interpreter.InterpreterBuilder, "create_dot_scaled"):
        with pytest.raises(Exception, match="has no tl.dot_scaled"):
            launch(a, scales[0], b, scales[1], out, 16, 64)
        pytest.skip("this Triton's interpreter has no tl.dot_scaled: checked that it raises")
    launch(a, scales[0], b, scales[1], out, 16, 64)
    powers = 2.0 ** (scales.double() - 127).repeat_interleave(32, -1)
    left, right = a.double() * powers[0], b.double() * powers[1]
    # 64 products are summed in float32.
    bound = left.abs() @ right.abs().T * 64 * 2**-24
    assert ((out.double() - left @ right.T).abs() <= bound).all()
