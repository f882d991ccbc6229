"""The emulator's primitives one by one against formulas of torch, and what it refuses."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from bench.emulator import CSRC, ORDERS, build, sources
from deepkern.testing import compare

from .conftest import EmulatorFailure, only

FP8 = torch.float8_e4m3fn
every_order = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return build(sources())


KERNELS = CSRC / "emulator" / "kernels"


class How(ctypes.Structure):
    """How of csrc/emulator/kernels/harness.h."""

    _fields_ = [("seed", ctypes.c_uint64), ("order", ctypes.c_int),
                ("message", ctypes.c_char_p), ("room", ctypes.c_int)]  # fmt: skip


class Product(ctypes.Structure):
    """Product of csrc/emulator/kernels/primitives.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "given", "out")),
        *((name, ctypes.c_bool) for name in ("fp8", "a_by_row", "b_by_row", "a_in_registers")),
    ]


def call(library, name: str, *args, read=(), write=(), seed=0, order="random") -> None:
    """Runs a kernel, which may touch the tensors in `read` and `write`."""
    named = [{f"{kind}[{i}]": x for i, x in enumerate(tensors)}
             for kind, tensors in (("read", read), ("write", write))]  # fmt: skip
    message = ctypes.create_string_buffer(4096)
    how = How(seed, ORDERS[order], ctypes.cast(message, ctypes.c_char_p), len(message))
    args = [pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
    with only(library, *named):
        failed = getattr(library, name)(*args, how)
    if failed:
        raise EmulatorFailure(message.value.decode())


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


PRIMITIVES = (CSRC / "sm90" / "primitives.cuh").read_text()
WIDTHS = [int(n) for n in re.findall(r"^SM90_WGMMA\((\d+)", PRIMITIVES, re.MULTILINE)]
BY_ROW = {"fp8": True, "a_by_row": True, "b_by_row": True, "a_in_registers": False}
LAYOUTS = [BY_ROW] + [
    {"fp8": False, "a_by_row": a, "b_by_row": b, "a_in_registers": registers}
    for a, registers in ((True, False), (False, False), (True, True))
    for b in (True, False)
]


@pytest.mark.parametrize("N", WIDTHS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: " ".join(k for k, on in x.items() if on))
def test_wgmma(kernels, N, layout, generator):
    """Both types, operands by row or across, A from registers; added to what is given, or not."""
    K, dtype = (128, FP8) if layout["fp8"] else (64, torch.bfloat16)
    a, b = (torch.randn(rows, K, generator=generator).to(dtype) for rows in (64, N))
    given = torch.randn(64, N, generator=generator)
    lying = [x if by_row else x.T.contiguous()
             for x, by_row in ((a, layout["a_by_row"]), (b, layout["b_by_row"]))]  # fmt: skip
    for seed, start in enumerate((None, given)):
        out = torch.full((64, N), torch.nan)
        places = [0 if x is None else x.data_ptr() for x in (*lying, start, out)]
        read = lying if start is None else [*lying, start]
        p = Product(*places, **layout)
        call(kernels, "emulate_product", ctypes.byref(p), N, read=read, write=[out], seed=seed)
        want = a.double() @ b.double().T
        compare.assert_close(out, want if start is None else want + given.double())


@every_order
def test_store_matrix(kernels, order):
    out = torch.full((256,), -1, dtype=torch.int16)
    call(kernels, "emulate_store_matrix", out, write=[out], order=order)
    assert out.tolist() == list(range(256))


@every_order
def test_bulk_load_and_shuffles(kernels, order):
    given, out = torch.arange(32.0) + 1, torch.full((34,), torch.nan)
    name = "emulate_bulk_load_and_shuffles"
    call(kernels, name, given, out, read=[given], write=[out], order=order)
    assert out.tolist() == [*given.tolist(), given.sum().item(), 6.0]


@pytest.mark.parametrize("swizzle", [False, True])
@pytest.mark.parametrize("row", [-40, -5, 0, 3, 30, 60])
def test_boxes(kernels, row, swizzle, generator):
    """Boxes that reach over any edge: zeros come from outside, and nothing is stored there."""
    rows = 40
    given = torch.randint(1, 2**15, (rows, 64), generator=generator, dtype=torch.int16)
    for column in (-80, -9, 0, 8, 50, 64):
        swizzled = ctypes.c_bool(swizzle)
        out, back = torch.full((32, 64), -1, dtype=torch.int16), torch.full_like(given, -1)
        call(kernels, "emulate_boxes", given, back, out, rows, row, column, swizzled,
             read=[given], write=[back, out], seed=row + 40)  # fmt: skip
        wide = torch.nn.functional.pad(given, (100, 100, 100, 100))
        compare.assert_bitwise(out, wide[100 + row : 132 + row, 100 + column : 164 + column])
        inside = torch.zeros_like(given, dtype=torch.bool)
        inside[max(row, 0) : max(row + 32, 0), max(column, 0) : max(column + 64, 0)] = True
        compare.assert_bitwise(back, torch.where(inside, given, -1))


@every_order
def test_waits_for_stores(kernels, order):
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
    given = torch.arange(32.0)
    for seed in range(10):
        out = torch.full((4,), torch.nan)
        call(kernels, "emulate_cluster", given, out, read=[given], write=[out], order=order,
             seed=seed)  # fmt: skip
        assert out.tolist() == [496, 596, 496, 596]


@every_order
def test_distributed_shared_memory(kernels, order):
    want = [[10 * rank + i for i in range(4)] for rank in (1, 2, 3, 0)]
    for seed in range(10):
        out = torch.full((4, 4), torch.nan)
        how = {"write": [out], "order": order, "seed": seed}
        call(kernels, "emulate_distributed", out, 0, **how)
        assert out.tolist() == want
        with pytest.raises(EmulatorFailure, match="waited for no barrier of the cluster"):
            call(kernels, "emulate_distributed", out, 1, **how)
        with pytest.raises(EmulatorFailure, match="of a block that has ended"):
            call(kernels, "emulate_distributed", out, 2, **how)


def test_elect_one(kernels):
    for seed in range(10):
        out = torch.full((4,), -1, dtype=torch.int32)
        call(kernels, "emulate_elect", out, write=[out], seed=seed)
        assert out.tolist() == [101] * 4


def test_registers(kernels):
    out = torch.zeros(1, dtype=torch.int32)
    call(kernels, "emulate_registers", out, ctypes.c_bool(False), write=[out])
    assert out.item() == 1
    with pytest.raises(EmulatorFailure, match="32 lanes wait for registers, to have 224"):
        call(kernels, "emulate_registers", out, ctypes.c_bool(True), write=[out])


def test_atomics(kernels, generator):
    numbers = torch.randint(-1000, 1000, (500,), generator=generator, dtype=torch.int32)
    least, most = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    call(kernels, "emulate_atomics", numbers, least, most, read=[numbers], write=[least, most])
    assert (least.item(), most.item()) == (numbers.min().item(), numbers.max().item())


DEPENDENT_BUGS = {
    1: "no grid_dependency_wait came before|without grid_dependency_wait",  # does not wait
    2: "load_global is for what nobody writes",  # from a cache that may be out of date
    3: "no grid_dependency_wait came before|without grid_dependency_wait",  # writes too soon
    4: "no grid_dependency_wait came before|without grid_dependency_wait",  # what is still read
}


@every_order
def test_dependent_grids(kernels, order):
    for seed in range(10):
        squares, sums = (torch.zeros(n, dtype=torch.int32) for n in (192, 6))
        how = {"write": [squares, sums], "order": order, "seed": seed}
        call(kernels, "emulate_dependent_grid", squares, sums, 0, **how)
        assert sums.tolist() == [sum(i * i for i in range(32))] * 6
        for bug, said in DEPENDENT_BUGS.items():
            with pytest.raises(EmulatorFailure, match=said):
                call(kernels, "emulate_dependent_grid", squares, sums, bug, **how)


def test_streamed(kernels, generator):
    given = torch.randint(0, 2**15, (32, 8), generator=generator, dtype=torch.int16)
    there = torch.randint(0, 2, (32,), generator=generator, dtype=torch.int32)
    out = torch.full_like(given, -1)
    call(kernels, "emulate_streamed", given, out, there, read=[given, there], write=[out])
    compare.assert_bitwise(out, given * there[:, None].short())
    # What is not there is not read.
    part = given[there > 0]
    if len(part) < 32:
        with pytest.raises(EmulatorFailure, match="beyond"):
            call(kernels, "emulate_streamed", given, out, there + 1, read=[given[:0], there],
                 write=[out])  # fmt: skip


def numbers(kernels, name: str, *given: torch.Tensor, dtype) -> torch.Tensor:
    """The function on 32-bit words, its results as `dtype`."""
    words = [x.contiguous().flatten().view(torch.int32) for x in given]
    words += [torch.zeros_like(words[0])] * (3 - len(words))
    words = [x.clone() for x in words]
    out = torch.zeros_like(words[0])
    call(kernels, "emulate_numbers", name.encode(), *words, out, len(out), read=words, write=[out])
    return out.view(dtype)


def any_floats(generator, n: int = 4000) -> torch.Tensor:
    """Of any exponent, ties of bf16 and fp16 among them, and special ones."""
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


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Bit for bit, any NaN for a NaN."""
    nan = want.isnan()
    assert bool((got.isnan() == nan).all())
    compare.assert_bitwise(torch.where(nan, 0, got), torch.where(nan, 0, want))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_conversions(kernels, name, dtype, generator):
    x = any_floats(generator)
    pairs = numbers(kernels, f"to_{name}", x, x.flip(0), dtype=torch.int32)
    halves = pairs.view(dtype).view(-1, 2)
    same(halves[:, 0], x.to(dtype))
    same(halves[:, 1], x.flip(0).to(dtype))
    every = torch.arange(2**16).int().short().view(dtype)
    words = torch.stack([every, every.flip(0)], 1).view(torch.int32)
    same(numbers(kernels, f"low_{name}", words, dtype=torch.float32), every.float())
    same(numbers(kernels, f"high_{name}", words, dtype=torch.float32), every.flip(0).float())


def test_e4m3(kernels):
    codes = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8)
    words = torch.cat([codes, torch.zeros_like(codes)], 1).view(torch.int32).flatten()
    got = numbers(kernels, "e4m3_to_bf16", words, dtype=torch.bfloat16)
    same(got.view(-1, 2), codes.view(FP8).bfloat16())


def test_arithmetic(kernels, generator):
    x, y, z = (torch.randn(512, generator=generator) for _ in range(3))
    pairs = [v.bfloat16().view(torch.int32) for v in (x, y)]
    product = numbers(kernels, "multiply_bf16", *pairs, dtype=torch.bfloat16)
    same(product, (x.bfloat16().double() * y.bfloat16().double()).bfloat16())
    fused = numbers(kernels, "fused_multiply_add", x, y, z, dtype=torch.float32)
    same(fused, (x.double() * y.double() + z.double()).float())  # 48 bits of 53, then rounded once
    for name, want in (("divide", x.double() / y.double()), ("exp2_of", torch.exp2(x.double()))):
        got = numbers(kernels, name, x, y, dtype=torch.float32)
        assert bool(((got - want).abs() <= 2.0**-22 * want.abs()).all())
    want = x.abs().double().log2()
    got = numbers(kernels, "log2_of", x.abs(), dtype=torch.float32)
    assert bool(((got - want).abs() <= 2.0**-22 * want.abs().clamp(min=1)).all())
    edges = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0])
    same(numbers(kernels, "exp2_of", edges, dtype=torch.float32), torch.exp2(edges))


FOLLOWED = (
    r"(?:^|[;{}])\s*\*[^;=]*=[^=]",  # *to = x
    r"[=(,!&|+]\s*\*(?:reinterpret|static)_cast",  # y = *static_cast<T*>(from)
    r"_cast<[^;()]*\*>\([^;()]*\)\[",  # static_cast<T*>(from)[i]
    r"\bp\.[a-z_]+\[",  # p.lse[i]: arguments are global memory
)


def followed(code: str) -> list[str]:
    """Where a pointer is followed, and no function of primitives.cuh does it."""
    code = re.sub(r"//.*", "", code)
    return [found for how in FOLLOWED for found in re.findall(how, code, re.MULTILINE)]


def test_kernels_touch_memory_by_name():
    """What the emulator does not see, it cannot check."""
    for path in sorted((CSRC / "sm90").glob("*.cuh")):
        if path.name != "primitives.cuh":
            assert not followed(path.read_text()), f"{path.name}: load_global, store_shared ..."
    for wrong in ("  *to = x;", "y = *static_cast<const int*>(p);", "p.lse[at] = lse;",
                  "return static_cast<const float*>(p)[i];"):  # fmt: skip
        assert followed(wrong), wrong


# How each misuse of csrc/emulator/kernels/misuses.cpp is refused.
REFUSED = {
    "too much shared memory": "asks for 232449 bytes of shared memory, there are 232448",
    "too many registers": "more registers at launch than there are",
    "too large a cluster": "a cluster of more than 8 blocks",
    "a barrier not initialised": "barrier_arrive: no barrier was initialised at offset 4096",
    "a barrier for nobody": "barrier_init: count 0",
    "a barrier initialised twice": "barrier_init: initialised twice",
    "a barrier not aligned": "barrier_init: not aligned",
    "a barrier nobody arrives at": r"32 lanes wait for barrier at offset 4096, parity 0 \(1 of 1",
    "a third parity": "barrier_wait: parity 2",
    "too many arrivals": r"wait for barrier at offset 4096, parity 1 \(63 of 64",
    "too many bytes": "more than 2.20 - 1 bytes",
    "bytes that do not come": r"\(0 of 1 arrivals and 16 bytes to come",
    "a barrier overwritten": "store_shared over the barrier at offset 4096",
    "a copy over a barrier": "bulk_load over the barrier at offset 4096",
    "a box over a barrier": "tma_load over the barrier at offset 4096",
    "half of a named barrier": "32 lanes wait for named barrier 3",
    "named barrier 16": "named barrier 16: there are 1 to 15",
    "named barrier 0": "named barrier 0 is that of block_sync",
    "named barrier of two sizes": "named barrier 2: .* threads here",
    "named barrier of 100": "named barrier: 100 threads",
    "arrives twice": "named barrier 1: arrives again before it is complete",
    "a lane less": "31 lanes wait for warp_sync by all lanes",
    "a thread less": "31 lanes wait for block_sync",
    "cluster_wait alone": "cluster_wait: no cluster_arrive before",
    "cluster_arrive twice": "cluster_arrive: twice without cluster_wait",
    "no such rank": "barrier_arrive_at: no block of rank 1",
    "multicast to nobody": "tma_load_multicast: no block of rank 1",
    "beyond shared memory": "store_shared: 4 bytes at offset 16384 are not in the 16384 bytes",
    "before shared memory": "load_shared: 4 bytes at offset -4 are not in",
    "behind shared memory": "wrote behind its shared memory",
    "a store not aligned": "store_shared: not aligned",
    "a load not aligned": "load_shared: not aligned",
    "four floats not aligned": "load_shared_at: not aligned",
    "a matrix not aligned": "store_matrix_x4: row is not aligned",
    "lane 32": "shuffle_from: a warp has 32 lanes",
    "32 lanes further": "shuffle_xor: a warp has 32 lanes",
    "a map beyond its tensor": r"tma_load: 32 bytes at offset 32 from the start of write\[0\]",
    "a map with rows too close": "tma_load: no tensor map has such a shape",
    "a map of rows of 24 bytes": "tma_load: rows are not multiples of 16 bytes",
    "a box of 257 rows": "tma_load: 8224 bytes|tma_load: box is too large",
    "a swizzled box of 32 bytes": "tma_load: swizzled rows have 128 bytes",
    "a box not aligned": "tma_load: tile is not aligned",
    "a copy of 24 bytes": "bulk_load: addresses and size are multiples of 16 bytes",
    "a copy without barrier_init_fence": "bulk_load: no barrier_init_fence after barrier_init",
    "a copy beyond its tensor": r"bulk_load: 48 bytes at offset 0 from the start of read\[0\]",
    "a store of what is not fenced": "tma_store reads .* no fence_async_proxy followed",
    "a store not committed": "ends with TMA stores that it has not committed",
    "a store not waited for": "the block ends while a TMA store still reads",
    "a store to what is read": r"offset 0 from the start of read\[0\], which is only read",
    "a tile from row 1": "a tile begins at a multiple of 8 rows",
    "a tile without swizzle": "expected the 128-byte swizzle",
    "a tile not aligned": "matrix_descriptor: addresses and distances are multiples of 16",
    "rows too far apart": "matrix_descriptor: distances have 14 bits",
    "different tiles": "other operands than those of the warpgroup's other threads",
    "a tile not fenced": "wgmma reads .* which thread 0 wrote and no fence_async_proxy",
    "wgmma without a fence": "no wgmma_fence since its registers were last written",
    "wgmma never waited for": "ends with a WGMMA whose result it has not waited for",
    "registers not by eights": "setmaxnreg: 100",
    "20 registers": "setmaxnreg: 20",
    "fewer registers by increase": "setmaxnreg: from 255 to 40",
    "reads beyond a tensor": r"load_global: 4 bytes at offset 32 from the start of read\[0\] lie",
    "reads before a tensor": "load_written: 4 bytes at .* lie beyond it|nobody registered",
    "writes beyond a tensor": r"store_global: 4 bytes at offset 32 from the start of write\[0\]",
    "writes what is read": r"writes at offset 0 from the start of read\[0\], which is only read",
    "an access not aligned": "load_global: 4 bytes at an address that is no multiple of it",
    "two blocks write": r"store_global at offset \d from the start of write\[0\], which block",
    "one block reads, one writes": r"write\[0\], which block \d (read|wrote): nothing orders",
    "atomic and plain": r"write\[0\], which (block \d|an atomic operation) wrote: nothing orders",
    "reads as constant what it writes": "which load_global read: nothing orders the two",
    "the kernel's own exception": "what it says",
}


def refusal(kernels, misuse: str, order: str) -> str:
    changing, constants = (torch.zeros(8, dtype=torch.int32) for _ in range(2))
    with pytest.raises(EmulatorFailure) as caught:
        call(kernels, "emulate_misuse", misuse.encode(), changing, constants, read=[constants],
             write=[changing], order=order)  # fmt: skip
    return str(caught.value)


@pytest.mark.parametrize("misuse", REFUSED)
def test_refuses(kernels, misuse):
    order = "latest" if misuse == "a store not waited for" else "random"
    said = refusal(kernels, misuse, order)
    assert re.search(REFUSED[misuse], said, re.DOTALL), said


def test_every_misuse_has_its_refusal():
    text = (KERNELS / "misuses.cpp").read_text()
    planted = set(re.findall(r'name [!=]= "([^"]+)"', text))
    assert planted == set(REFUSED), planted ^ set(REFUSED)


def test_every_primitive_is_used_here():
    """What primitives.cuh declares, the kernels of these tests call."""
    declared = set(re.findall(r"^SM90_DEVICE .*?(\w+)\(", PRIMITIVES, re.MULTILINE))
    text = "".join((KERNELS / f"{name}.cpp").read_text() for name in ("primitives", "misuses"))
    called = set(re.findall(r"\b(\w+)(?:<[^<>;]*>)?\(", text))
    assert len(declared) > 50 and declared <= called, declared - called
