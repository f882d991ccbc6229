"""Each primitive in the emulator against a formula in torch."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from bench.emulator import CSRC, ORDERS
from deepkern.testing import compare
from tests.compiled import tensor_core_model

from .conftest import EmulatorFailure, call

pytestmark = pytest.mark.slow  # compiles the emulator
FP8 = torch.float8_e4m3fn
every_order = pytest.mark.parametrize("order", ORDERS)


KERNELS = CSRC / "emulator" / "kernels"


class Product(ctypes.Structure):
    """Product of csrc/emulator/kernels/primitives.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "c", "out")),
        *(
            (name, ctypes.c_bool)
            for name in ("fp8", "fp16", "a_k_major", "b_k_major", "a_in_registers")
        ),
    ]


PRIMITIVES = (CSRC / "sm90" / "primitives.cuh").read_text()
WIDTHS = [int(n) for n in re.findall(r"^SM90_WGMMA\((\d+)", PRIMITIVES, re.MULTILINE)]
FP8_LAYOUT = {"fp8": True, "a_k_major": True, "b_k_major": True}
LAYOUTS = [FP8_LAYOUT] + [
    {"fp16": fp16, "a_k_major": a, "b_k_major": b, "a_in_registers": registers}
    for fp16 in (False, True)
    for a, registers in ((True, False), (False, False), (True, True))
    for b in (True, False)
]


def hopper_sums(a: torch.Tensor, b: torch.Tensor, c):
    """c + a · bᵀ as WGMMAs of 32 bytes of K add on Hopper."""
    name = {FP8: "e4m3", torch.bfloat16: "bf16", torch.float16: "f16"}[a.dtype]
    fraction, result, block = (13, 13, 32) if a.dtype == FP8 else (25, 23, 16)
    codes = [x.view(torch.uint8 if a.dtype == FP8 else torch.uint16).numpy() for x in (a, b)]
    return tensor_core_model.dot_add(*codes, name, c, fraction, result, block)


@pytest.mark.parametrize("N", WIDTHS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: " ".join(k for k, on in x.items() if on))
def test_wgmma(kernels, N, layout, generator):
    """The bits of Hopper's sums: all types and layouts, A in registers, with and without C."""
    K, dtype = 64, torch.float16 if layout.get("fp16") else torch.bfloat16
    if "fp8" in layout:
        K, dtype = 128, FP8
    a, b = (torch.randn(rows, K, generator=generator).to(dtype) for rows in (64, N))
    addend = torch.randn(64, N, generator=generator)
    stored = [x if k_major else x.T.contiguous()
              for x, k_major in ((a, layout["a_k_major"]), (b, layout["b_k_major"]))]  # fmt: skip
    for seed, c in enumerate((None, addend)):
        out = torch.full((64, N), torch.nan)
        addresses = [0 if x is None else x.data_ptr() for x in (*stored, c, out)]
        read = stored if c is None else [*stored, c]
        p = Product(*addresses, **layout)
        call(kernels, "emulate_product", ctypes.byref(p), N, read=read, write=[out], seed=seed)
        first = torch.zeros(64, N) if c is None else c
        compare.assert_bitwise(out, torch.from_numpy(hopper_sums(a, b, first.numpy())))


@every_order
def test_store_matrix_x4(kernels, order):
    out = torch.full((256,), -1, dtype=torch.int16)
    call(kernels, "emulate_store_matrix", out, write=[out], order=order)
    assert out.tolist() == list(range(256))


@every_order
def test_bulk_load_and_shuffles(kernels, order):
    x, out = torch.arange(32.0) + 1, torch.full((34,), torch.nan)
    name = "emulate_bulk_load_and_shuffles"
    call(kernels, name, x, out, read=[x], write=[out], order=order)
    assert out.tolist() == [*x.tolist(), x.sum().item(), 6.0]


@every_order
def test_copy_async(kernels, order, generator):
    x = torch.randint(1, 2**30, (2, 32, 4), generator=generator, dtype=torch.int32)
    out = torch.full_like(x, -1)
    call(kernels, "emulate_copy_async", x, out, read=[x], write=[out], order=order)
    compare.assert_bitwise(out, torch.where(torch.arange(32)[:, None] % 3 > 0, x, 0))


@every_order
def test_copy_arrivals(kernels, order, generator):
    """Copies are done when the barrier's phase completes; a store of the same thread may not be."""
    x = torch.randint(1, 2**30, (2, 32, 4), generator=generator, dtype=torch.int32)
    want, wrong = torch.where(torch.arange(32)[:, None] % 3 > 0, x, 0), 0
    for seed in range(5):
        for bug in (False, True):
            out = torch.full_like(x, -1)
            call(kernels, "emulate_copy_arrivals", x, out, ctypes.c_bool(bug), read=[x],
                 write=[out], order=order, seed=seed)  # fmt: skip
            right = bool((out == want).all())
            assert right or bug
            wrong += not right
    assert wrong == (0 if order == "earliest" else 5)


@pytest.mark.parametrize("swizzle", [False, True])
@pytest.mark.parametrize("row", [-40, -5, 0, 3, 30, 60])
def test_tma_boxes_across_edges(kernels, row, swizzle, generator):
    """TMA loads zeros for the part of a box outside the matrix and does not store that part."""
    rows = 40
    x = torch.randint(1, 2**15, (rows, 64), generator=generator, dtype=torch.int16)
    for column in (-80, -9, 0, 8, 50, 64):
        swizzled = ctypes.c_bool(swizzle)
        out, back = torch.full((32, 64), -1, dtype=torch.int16), torch.full_like(x, -1)
        call(kernels, "emulate_boxes", x, back, out, rows, row, column, swizzled,
             read=[x], write=[back, out], seed=row + 40)  # fmt: skip
        padded = torch.nn.functional.pad(x, (100, 100, 100, 100))
        compare.assert_bitwise(out, padded[100 + row : 132 + row, 100 + column : 164 + column])
        inside = torch.zeros_like(x, dtype=torch.bool)
        inside[max(row, 0) : max(row + 32, 0), max(column, 0) : max(column + 64, 0)] = True
        compare.assert_bitwise(back, torch.where(inside, x, -1))


@every_order
def test_tma_store_waits(kernels, order):
    for seed in range(10):
        out, total = torch.full((256,), torch.nan), torch.full((1,), torch.nan)
        call(kernels, "emulate_store_waits", out, total, write=[out, total], order=order, seed=seed)
        assert out.tolist() == list(range(256)) and total.item() == sum(range(256))


@every_order
def test_named_barriers(kernels, order):
    for seed in range(10):
        out = torch.full((10, 32), -1, dtype=torch.int32)
        call(kernels, "emulate_named_barriers", out, write=[out], order=order, seed=seed)
        assert out.flip(1).flatten().tolist() == list(range(320))


@every_order
def test_clusters(kernels, order):
    x = torch.arange(32.0)
    for seed in range(10):
        out = torch.full((4,), torch.nan)
        call(kernels, "emulate_cluster", x, out, read=[x], write=[out], order=order,
             seed=seed)  # fmt: skip
        assert out.tolist() == [496, 596, 496, 596]


@every_order
def test_distributed_shared_memory(kernels, order):
    want = [[10 * rank + i for i in range(4)] for rank in (1, 2, 3, 0)]
    for seed in range(10):
        out = torch.full((4, 4), torch.nan)
        options = {"write": [out], "order": order, "seed": seed}
        call(kernels, "emulate_distributed", out, 0, **options)
        assert out.tolist() == want
        with pytest.raises(EmulatorFailure, match="has not passed a cluster barrier"):
            call(kernels, "emulate_distributed", out, 1, **options)
        with pytest.raises(EmulatorFailure, match="a block that has ended"):
            call(kernels, "emulate_distributed", out, 2, **options)


SCOPE_BUGS = {
    1: "no release and acquire of cluster scope order that before this load",
    2: "no release and acquire of cluster scope order that before this load",
    3: "overwrites shared memory .* no release and acquire of cluster scope",
    4: "overwrites shared memory .* no release and acquire of cluster scope",
}


@every_order
def test_scopes_of_barriers(kernels, order):
    want = [[[100 * i + 10 * (1 - rank) + n for n in range(4)] for rank in (0, 1)] for i in (0, 1)]
    for seed in range(5):
        out = torch.full((2, 2, 4), torch.nan)
        options = {"write": [out], "order": order, "seed": seed}
        call(kernels, "emulate_exchange", out, 0, **options)
        assert out.tolist() == want
        for bug, message in SCOPE_BUGS.items():
            with pytest.raises(EmulatorFailure, match=message):
                call(kernels, "emulate_exchange", out, bug, **options)


@every_order
def test_stores_may_wait_for_a_sync(kernels, order):
    """A lane sees its own store at once, and another's after warp_sync for certain."""
    name, wrong = "emulate_neighbours", 0
    for seed in range(5):
        for bug in (False, True):
            out = torch.full((32,), torch.nan)
            call(kernels, name, out, ctypes.c_bool(bug), write=[out], order=order, seed=seed)
            right = out.tolist() == list(range(31, -1, -1))
            assert right or bug
            wrong += not right
    assert wrong == 5, "a missing warp_sync shows in every run"


def test_elect_one(kernels):
    for seed in range(10):
        out = torch.full((4,), -1, dtype=torch.int32)
        call(kernels, "emulate_elect", out, write=[out], seed=seed)
        assert out.tolist() == [101] * 4


def test_register_reallocation(kernels):
    out = torch.zeros(1, dtype=torch.int32)
    call(kernels, "emulate_registers", out, ctypes.c_bool(False), write=[out])
    assert out.item() == 1
    with pytest.raises(EmulatorFailure, match="32 lanes wait for 224 registers per thread"):
        call(kernels, "emulate_registers", out, ctypes.c_bool(True), write=[out])


def test_atomics(kernels, generator):
    numbers = torch.randint(-1000, 1000, (500,), generator=generator, dtype=torch.int32)
    lowest, highest = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    out = [lowest, highest]
    call(kernels, "emulate_atomics", numbers, *out, read=[numbers], write=out)
    assert (lowest.item(), highest.item()) == (numbers.min().item(), numbers.max().item())


NO_GRID_WAIT = "has not called grid_dependency_wait|without grid_dependency_wait"
DEPENDENT_BUGS = {
    1: NO_GRID_WAIT,  # does not wait
    2: "load_global needs memory that no block writes",
    3: NO_GRID_WAIT,  # writes before it waits
    4: NO_GRID_WAIT,  # writes memory that the first grid still reads
}


@every_order
def test_dependent_grids(kernels, order):
    for seed in range(10):
        squares, sums = (torch.zeros(n, dtype=torch.int32) for n in (192, 6))
        options = {"write": [squares, sums], "order": order, "seed": seed}
        call(kernels, "emulate_dependent_grid", squares, sums, 0, **options)
        assert sums.tolist() == [sum(i * i for i in range(32))] * 6
        for bug, message in DEPENDENT_BUGS.items():
            with pytest.raises(EmulatorFailure, match=message):
                call(kernels, "emulate_dependent_grid", squares, sums, bug, **options)


def test_load_streamed(kernels, generator):
    """An invalid chunk is 0 and its memory is not read."""
    x = torch.randint(0, 2**15, (32, 8), generator=generator, dtype=torch.int16)
    valid = torch.randint(0, 2, (32,), generator=generator, dtype=torch.int32)
    out = torch.full_like(x, -1)
    call(kernels, "emulate_streamed", x, out, valid, read=[x, valid], write=[out])
    compare.assert_bitwise(out, x * valid[:, None].short())
    none = torch.zeros_like(valid)
    call(kernels, "emulate_streamed", x, out, none, read=[x[:0], none], write=[out])
    compare.assert_bitwise(out, torch.zeros_like(out))
    every = torch.ones_like(valid)
    with pytest.raises(EmulatorFailure, match="load_global: out of bounds"):
        call(kernels, "emulate_streamed", x, out, every, read=[x[:0], every], write=[out])


def apply(kernels, name: str, *inputs: torch.Tensor, dtype) -> torch.Tensor:
    """The results of a function on 32-bit words, as `dtype`."""
    words = [x.contiguous().flatten().view(torch.int32) for x in inputs]
    words += [torch.zeros_like(words[0])] * (3 - len(words))
    words = [x.clone() for x in words]
    out = torch.zeros_like(words[0])
    call(kernels, "emulate_numbers", name.encode(), *words, out, len(out), read=words, write=[out])
    return out.view(dtype)


def any_floats(generator, n: int = 4000) -> torch.Tensor:
    """Floats of any exponent, ties between two bf16 or fp16 values, and special values."""
    words = torch.randint(-(2**31), 2**31, (n,), generator=generator).int()
    words[: n // 4] &= ~0xFFFF
    words[: n // 4] |= 0x8000
    near = torch.randn(n, generator=generator) * torch.logspace(-9, 5, n)
    ties = (
        near.half().float() + torch.nextafter(near.half(), torch.tensor(9e4).half()).float()
    ) / 2
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65519.9, 65520.0]
    special += [2.0**-24, 2.0**-25, 3 * 2.0**-25, 3.3895314e38, 3.4e38, 1e-45]
    special = torch.tensor(special)
    return torch.cat([words.view(torch.float32), near, ties, special, special[:2]])


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Bit for bit, except that any NaN equals any NaN."""
    nan = want.isnan()
    assert bool((got.isnan() == nan).all())
    compare.assert_bitwise(torch.where(nan, 0, got), torch.where(nan, 0, want))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_conversions(kernels, name, dtype, generator):
    x = any_floats(generator)
    pairs = apply(kernels, f"to_{name}", x, x.flip(0), dtype=torch.int32)
    packed = apply(kernels, f"pack_{name}", x, x.flip(0), dtype=torch.int32)
    compare.assert_bitwise(packed, pairs)
    halves = pairs.view(dtype).view(-1, 2)
    assert_same_bits(halves[:, 0], x.to(dtype))
    assert_same_bits(halves[:, 1], x.flip(0).to(dtype))
    every = torch.arange(2**16).int().short().view(dtype)
    words = torch.stack([every, every.flip(0)], 1).view(torch.int32)
    assert_same_bits(apply(kernels, f"low_{name}", words, dtype=torch.float32), every.float())
    assert_same_bits(
        apply(kernels, f"high_{name}", words, dtype=torch.float32), every.flip(0).float()
    )


def test_e4m3_to_fp16(kernels):
    codes = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8)
    words = torch.cat([codes, torch.zeros_like(codes)], 1).view(torch.int32).flatten()
    got = apply(kernels, "e4m3_to_fp16", words, dtype=torch.float16)
    assert_same_bits(got.view(-1, 2), codes.view(FP8).half())


def test_arithmetic(kernels, generator):
    x, y, z = (torch.randn(512, generator=generator) for _ in range(3))
    pairs = [v.half().view(torch.int32) for v in (x, y)]
    product = apply(kernels, "multiply_fp16", *pairs, dtype=torch.float16)
    assert_same_bits(product, (x.half().double() * y.half().double()).half())
    fused = apply(kernels, "fused_multiply_add", x, y, z, dtype=torch.float32)
    want = x.double() * y.double() + z.double()  # the product has 48 of 53 bits, so it is exact
    assert_same_bits(fused, want.float())
    for name, want in (("divide", x.double() / y.double()), ("exp2_of", torch.exp2(x.double()))):
        got = apply(kernels, name, x, y, dtype=torch.float32)
        assert bool(((got - want).abs() <= 2.0**-22 * want.abs()).all())
    want = x.abs().double().log2()
    got = apply(kernels, "log2_of", x.abs(), dtype=torch.float32)
    assert bool(((got - want).abs() <= 2.0**-22 * want.abs().clamp(min=1)).all())
    edges = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0]).repeat(4)
    for name, want in (("max_of", torch.fmax), ("min_of", torch.fmin)):
        other = edges.view(4, 4).T.flatten()
        assert_same_bits(apply(kernels, name, x, y, dtype=torch.float32), want(x, y))
        assert_same_bits(
            apply(kernels, name, edges, other, dtype=torch.float32), want(edges, other)
        )
    edges = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0])
    assert_same_bits(apply(kernels, "exp2_of", edges, dtype=torch.float32), torch.exp2(edges))


DEREFERENCES = (
    r"(?:^|[;{}])\s*\*[^;=]*=[^=]",  # *to = x
    r"[=(,!&|+]\s*\*(?:reinterpret|static)_cast",  # y = *static_cast<T*>(from)
    r"_cast<[^;()]*\*>\([^;()]*\)\[",  # static_cast<T*>(from)[i]
    r"\bp\.[a-z_]+\[",  # p.lse[i]: arguments are global memory
)


def dereferences(code: str) -> list[str]:
    """Where code accesses memory without a function of primitives.cuh."""
    code = re.sub(r"//.*", "", code)
    return [hit for pattern in DEREFERENCES for hit in re.findall(pattern, code, re.MULTILINE)]


def test_kernels_use_primitives_for_memory():
    """The emulator checks accesses through primitives only."""
    for path in sorted((CSRC / "sm90").glob("*.cuh")):
        if path.name != "primitives.cuh":
            found = dereferences(path.read_text())
            assert not found, f"{path.name}: use load_global, store_shared ...: {found}"
    for wrong in ("  *to = x;", "y = *static_cast<const int*>(p);", "p.lse[at] = lse;",
                  "return static_cast<const float*>(p)[i];"):  # fmt: skip
        assert dereferences(wrong), wrong


def test_every_primitive_is_tested():
    """The kernels of these tests call each function that primitives.cuh declares."""
    declared = set(re.findall(r"^SM90_DEVICE .*?(\w+)\(", PRIMITIVES, re.MULTILINE))
    text = "".join((KERNELS / f"{name}.cpp").read_text() for name in ("primitives", "misuses"))
    called = set(re.findall(r"\b(\w+)(?:<[^<>;]*>)?\(", text))
    assert len(declared) > 50 and declared <= called, declared - called
