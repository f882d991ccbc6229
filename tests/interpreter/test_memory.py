"""Bounds, alignment and races: what raises, with which message, and what does not."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from deepkern import interpreter
from deepkern.interpreter import InterpreterMemoryError, InterpreterRaceError

if not interpreter.active():
    pytest.skip("needs the interpreter: TRITON_INTERPRET=1", allow_module_level=True)

OUTSIDE = InterpreterMemoryError


@triton.jit
def copy_kernel(x, y, shift_x, shift_y, limit, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i + shift_x, mask=i < limit, other=7.0)
    tl.store(y + i + shift_y, value, mask=i < limit)


def copy(x, y, shift_x=0, shift_y=0, limit=32):
    copy_kernel[(2,)](x, y, shift_x, shift_y, limit, 16)


def test_access_inside_is_allowed():
    x, y = torch.randn(32), torch.zeros(32)
    copy(x, y)
    assert torch.equal(x, y)


@pytest.mark.parametrize("shift", [1, -1, 17, -100, 2**40, -(2**40), 2**44])
def test_load_outside(shift):
    with pytest.raises(OUTSIDE, match="kernel 'copy_kernel'.*load of argument 'x'"):
        copy(torch.zeros(32), torch.zeros(32), shift_x=shift)


@pytest.mark.parametrize("shift", [1, -1, 17, -100, 2**40])
def test_store_outside(shift):
    y = torch.zeros(96)
    with pytest.raises(OUTSIDE, match="store to argument 'y'"):
        copy(torch.ones(32), y[32:64], shift_y=shift)
    assert not y[:32].any() and not y[64:].any()


def test_message_names_tensor_and_lane():
    with pytest.raises(OUTSIDE) as caught:
        copy(torch.zeros(32, dtype=torch.bfloat16), torch.zeros(32), shift_x=1)
    message = str(caught.value)
    for part in ("kernel 'copy_kernel'", "program (1, 0, 0)", "load of argument 'x'",
                 "element offset 32 (byte 64)", "outside [0, 32)", "torch.bfloat16", "lane (15,)",
                 "1 lanes bad"):  # fmt: skip
        assert part in message, message


def test_masked_lanes_may_point_anywhere():
    x, y = torch.randn(20), torch.zeros(20)
    copy(x, y, limit=20)
    assert torch.equal(x, y)
    copy(x, y, shift_x=2**42, shift_y=-(2**42), limit=0)
    with pytest.raises(OUTSIDE, match="element offset 20 "):
        copy(x, y, limit=21)


def test_empty_tensors():
    copy(torch.zeros(0), torch.zeros(0), limit=0)
    with pytest.raises(OUTSIDE, match=r"outside \[0, 0\)"):
        copy(torch.zeros(0), torch.zeros(32), limit=1)


def test_neighbouring_tensor_is_outside():
    pool = torch.zeros(64)
    x, y = pool[:32], pool[32:]
    copy(x, y)
    with pytest.raises(OUTSIDE, match="argument 'x' at element offset 32 "):
        copy(x, y, shift_x=1)


def test_range_of_strided_view():
    base = torch.arange(100.0)
    view = base[10:74].view(32, 2)[:, 0]  # elements 10, 12, ... 72: reaches 63 elements
    y = torch.zeros(32)
    copy(view, y, shift_x=63 - 32)
    assert torch.equal(y, base[41:73])
    with pytest.raises(OUTSIDE, match=r"outside \[0, 63\)"):
        copy(view, y, shift_x=64 - 32)
    copy(torch.ones(1).expand(32), y, limit=1)
    with pytest.raises(OUTSIDE, match=r"outside \[0, 1\)"):
        copy(torch.ones(1).expand(32), y, limit=2)


@triton.jit
def pick_kernel(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    pointers = tl.where(i % 2 == 0, x + i, y + i)
    tl.store(out + i, tl.load(pointers))


def test_one_load_from_two_arguments():
    x, y, out = torch.zeros(32), torch.ones(32), torch.empty(32)
    pick_kernel[(1,)](x, y, out, 32)
    assert out.tolist() == [0.0, 1.0] * 16
    with pytest.raises(OUTSIDE, match="argument 'y' at element offset 31 "):
        pick_kernel[(1,)](x, y[:31], out, 32)


@triton.jit
def table_kernel(table, x, y, BLOCK: tl.constexpr):
    pointer = tl.load(table).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(pointer + i))


def test_pointers_loaded_from_memory():
    x, y = torch.randn(32), torch.empty(32)
    table_kernel[(1,)](torch.tensor([x.data_ptr()]), x, y, 32)
    assert torch.equal(x, y)
    hidden = torch.zeros(32)
    with pytest.raises(OUTSIDE, match="is in no tensor argument"):
        table_kernel[(1,)](torch.tensor([hidden.data_ptr()]), x, y, 32)


@triton.jit
def bytes_kernel(x, y, start, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load((x + start).to(tl.pointer_type(tl.float32)) + i))


def test_reinterpreted_and_misaligned_pointers():
    x, y = torch.randn(17), torch.empty(16)
    bytes_kernel[(1,)](x.view(torch.uint8), y, 4, 16)
    assert torch.equal(x[1:], y)
    with pytest.raises(OUTSIDE, match="misaligned for 4-byte elements"):
        bytes_kernel[(1,)](x.view(torch.uint8), y, 2, 16)
    with pytest.raises(OUTSIDE, match="element offset 17 "):
        bytes_kernel[(1,)](x.view(torch.uint8), y, 8, 16)


@triton.jit
def atomic_kernel(x, shift, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK) + shift
    if KIND == "add":
        tl.atomic_add(x + i, 1, mask=i < BLOCK + 1)
    elif KIND == "max":
        tl.atomic_max(x + i, 1)
    else:
        tl.atomic_cas(x + i, i * 0, i)


@pytest.mark.parametrize("kind", ["add", "max", "cas"])
def test_atomics(kind):
    x = torch.zeros(48, dtype=torch.int32)
    atomic_kernel[(1,)](x[16:32], 0, kind, 16)
    expected = torch.arange(16) if kind == "cas" else torch.ones(16)
    assert x[16:32].tolist() == expected.tolist() and not x[:16].any() and not x[32:].any()
    for shift in (-1, 1):
        with pytest.raises(OUTSIDE, match="atomic on argument 'x'"):
            atomic_kernel[(1,)](x[16:32], shift, kind, 16)


@triton.jit
def descriptor_kernel(x, y, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr,
                      PAD: tl.constexpr):  # fmt: skip
    source = tl.make_tensor_descriptor(x, [rows, cols], [cols, 1], [ROWS, COLS], PAD)
    tile = source.load([0, 0])
    out = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(y + out, tile)


@triton.jit
def host_descriptor_kernel(source, target, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    target.store([row, 0], source.load([row, 0]))


def test_descriptor_made_in_the_kernel():
    x, y = torch.randn(20, 16), torch.empty(32, 16)
    descriptor_kernel[(1,)](x, y, 20, 16, 32, 16, "zero")
    assert torch.equal(y[:20], x) and not y[20:].any()
    with pytest.raises(OUTSIDE, match="argument 'x' at element offset 320 "):
        descriptor_kernel[(1,)](x, y, 21, 16, 32, 16, "zero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_descriptor_pads_with_nan(dtype):
    x, y = torch.randn(20, 16).to(dtype), torch.zeros(32, 16).to(dtype)
    descriptor_kernel[(1,)](x, y, 20, 16, 32, 16, "nan")
    assert torch.equal(y[:20].float(), x.float()) and y[20:].float().isnan().all()


def test_host_descriptor():
    x, y = torch.randn(40, 32), torch.zeros(40, 32)
    source = TensorDescriptor(x, [40, 32], [32, 1], [16, 32])
    host_descriptor_kernel[(3,)](source, TensorDescriptor(y, [40, 32], [32, 1], [16, 32]), 16)
    assert torch.equal(x, y)
    target = TensorDescriptor(y[:39], [40, 32], [32, 1], [16, 32])
    with pytest.raises(OUTSIDE, match="store to argument 'target' at element offset 1248 "):
        host_descriptor_kernel[(3,)](source, target, 16)


@triton.jit
def block_pointer_kernel(x, y, n, BLOCK: tl.constexpr):
    source = tl.make_block_ptr(x, (n,), (1,), (8,), (BLOCK,), (0,))
    tile = tl.load(source, boundary_check=(0,), padding_option="nan")
    tl.store(y + tl.arange(0, BLOCK), tile)


@pytest.mark.skipif(
    not hasattr(triton.runtime.interpreter.InterpreterBuilder, "create_tensor_pointer_load"),
    reason="this version of Triton has no block pointers",
)
@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_pointer(dtype):
    x, y = torch.randn(20).to(dtype), torch.empty(16, dtype=dtype)
    block_pointer_kernel[(1,)](x, y, 20, 16)
    assert torch.equal(y[:12], x[8:]) and y[12:].isnan().all()
    with pytest.raises(OUTSIDE, match="argument 'x' at element offset 20 "):
        block_pointer_kernel[(1,)](x, y, 21, 16)


@triton.jit
def tuple_kernel(pair, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(pair[0] + i) + tl.load(pair[1] + i))


def test_tuple_arguments_are_named():
    x, out = torch.ones(32), torch.empty(32)
    tuple_kernel[(1,)]((x, x), out, 32)
    assert (out == 2).all()
    with pytest.raises(OUTSIDE, match=r"argument 'pair\[1\]'"):
        tuple_kernel[(1,)]((x, x[:31]), out, 32)


@triton.jit
def scatter_kernel(index, value, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + tl.load(index + i), tl.load(value + i))


def scatter(index, value, out):
    index = torch.tensor(index, dtype=torch.int32)
    scatter_kernel[(2,)](index, value, out, 4)


def test_two_programs_write_different_values():
    value, out = torch.arange(8.0), torch.zeros(8)
    scatter([0, 1, 2, 3, 4, 5, 6, 7], value, out)
    assert torch.equal(out, value)
    with pytest.raises(InterpreterRaceError) as caught:
        scatter([0, 1, 2, 3, 4, 5, 6, 2], value, out)
    message = str(caught.value)
    for part in ("kernel 'scatter_kernel'", "program (1, 0, 0)", "store to argument 'out'",
                 "element offset 2", "program (0, 0, 0)", "2.0 and 7.0"):  # fmt: skip
        assert part in message, message


def test_two_programs_write_the_same_bits():
    scatter([0, 1, 2, 3, 0, 1, 2, 3], torch.tensor([1.0, 2.0, torch.nan, 4.0] * 2), torch.zeros(8))
    with pytest.raises(InterpreterRaceError, match="0x80000000"):  # -0 == 0, but not the same bits
        scatter([0, 1, 2, 3, 0, 4, 5, 6], torch.tensor([0.0] * 4 + [-0.0] * 4), torch.zeros(8))


def test_two_lanes_write_different_values():
    with pytest.raises(InterpreterRaceError, match="two lanes of this store"):
        scatter([0, 1, 1, 3, 4, 5, 6, 7], torch.arange(8.0), torch.zeros(8))


@triton.jit
def halves_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(x + i, i + 1)
    else:
        tl.store(y + i, i + 1)


def test_race_between_views_of_one_storage():
    pool = torch.zeros(24, dtype=torch.int32)
    halves_kernel[(2,)](pool[:8], pool[8:], 8)
    with pytest.raises(InterpreterRaceError, match="argument 'y' at element offset 0"):
        halves_kernel[(2,)](pool[:8], pool[7:], 8)
    halves = pool.view(torch.int16)
    halves_kernel[(2,)](pool[:8], halves[16:], 8)
    halves_kernel[(2,)](halves[16:], pool[:8], 8)
    for x, y in ((pool[:8], halves[15:]), (halves[15:], pool[:8])):
        with pytest.raises(InterpreterRaceError, match="argument 'y'"):
            halves_kernel[(2,)](x, y, 8)


@triton.jit
def neighbour_kernel(x, shift, BLOCK: tl.constexpr):
    i = 4 + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i + shift)
    tl.store(x + i, value + 1)


def test_load_after_store_of_another_program():
    x = torch.zeros(40)
    neighbour_kernel[(2,)](x, 0, 16)
    assert (x[4:36] == 1).all()
    with pytest.raises(InterpreterRaceError, match="which program .0, 0, 0. .* wrote"):
        neighbour_kernel[(2,)](x, -1, 16)


@triton.jit
def record_kernel(out, count):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(out + (x * 2 + y) * 3 + z, tl.atomic_add(count, 1))


def test_order_of_programs(monkeypatch):
    def programs_in_order():
        when, count = torch.zeros(24, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        record_kernel[(4, 2, 3)](when, count)
        return when.argsort().tolist()

    assert programs_in_order() == list(range(24))
    monkeypatch.setenv("DEEPKERN_INTERPRETER_ORDER", "reverse")
    assert programs_in_order() == list(range(23, -1, -1))
    with pytest.raises(InterpreterRaceError, match="which program .1, 0, 0. .* wrote"):
        neighbour_kernel[(2,)](torch.zeros(40), 1, 16)
    monkeypatch.setenv("DEEPKERN_INTERPRETER_ORDER", "random:3")
    assert sorted(programs_in_order()) == list(range(24)) and programs_in_order() != list(range(24))
    monkeypatch.setenv("DEEPKERN_INTERPRETER_ORDER", "backwards")
    with pytest.raises(ValueError, match="expected reverse or random:SEED"):
        programs_in_order()


@triton.jit
def last_one_sums_kernel(x, slots, count, out, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
                         SEM: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    tl.store(slots + pid, tl.sum(tl.load(x + pid * BLOCK + tl.arange(0, BLOCK)), 0))
    if tl.atomic_add(count, 1, sem=SEM) == PROGRAMS - 1:
        tl.store(out, tl.sum(tl.load(slots + tl.arange(0, PROGRAMS)), 0))


def last_one_sums(sem):
    x, out = torch.ones(64), torch.zeros(1)
    slots, count = torch.zeros(4), torch.zeros(1, dtype=torch.int32)
    last_one_sums_kernel[(4,)](x, slots, count, out, 4, 16, sem)
    return out.item()


def test_ordering_atomics_prevent_races():
    assert last_one_sums("acq_rel") == 64
    with pytest.raises(InterpreterRaceError, match="load of argument 'slots'"):
        last_one_sums("relaxed")


@triton.jit
def locked_kernel(lock, out):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(out, tl.load(out) + tl.program_id(0))
    tl.atomic_xchg(lock, 0)


@triton.jit
def histogram_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + tl.load(x + i), 1, sem="relaxed")


def test_locks_and_plain_atomics():
    out = torch.zeros(1, dtype=torch.int32)
    locked_kernel[(5,)](torch.zeros(1, dtype=torch.int32), out)
    assert out.item() == 10
    x = torch.randint(0, 8, (64,), dtype=torch.int32)
    counts = torch.zeros(8, dtype=torch.int32)
    histogram_kernel[(4,)](x, counts, 16)
    assert torch.equal(counts, x.bincount(minlength=8).int())


@triton.jit
def flag_kernel(x, flag, out):
    if tl.program_id(0) == 0:
        tl.atomic_store(x, 5)
        tl.atomic_store(flag, 1)
    else:
        tl.atomic_poll(flag, 1)
        tl.store(out, tl.atomic_load(x))


@pytest.mark.skipif(not hasattr(tl, "atomic_poll"), reason="this Triton has no atomic_poll")
def test_atomic_load_store_and_poll():
    x, flag, out = torch.zeros(3, dtype=torch.int32).split(1)
    flag_kernel[(2,)](x, flag, out)
    assert out.item() == 5


@triton.jit
def clear_and_count_kernel(out):
    if tl.program_id(0) == 0:
        tl.store(out, 0)
    else:
        tl.atomic_add(out, 1, sem="relaxed")


def test_atomic_after_store_of_another_program():
    with pytest.raises(InterpreterRaceError, match="atomic on argument 'out'"):
        clear_and_count_kernel[(2,)](torch.zeros(1, dtype=torch.int32))


def test_new_launch_clears_race_record():
    x = torch.zeros(40)
    for shift in (0, 1, 2):
        neighbour_kernel[(1,)](x, shift, 16)
        neighbour_kernel[(1,)](x[16:], shift, 16)
