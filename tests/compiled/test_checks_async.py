"""Each check of the machine on mbarriers, copies, wgmma and tcgen05: reported, and its twin passes.

Source: csrc/ptx/mbarrier.cpp, async.cpp, matrix.cpp, tcgen05.cpp.
"""

from __future__ import annotations

import pytest

from tests.compiled.checked import ORDERS, Check, assert_passes, assert_reported, distinct

INIT = """
@%first mbarrier.init.shared::cta.b64 [%bar], 1;
bar.sync 0;
"""
AGAIN = """
AGAIN:
mbarrier.try_wait.parity.shared::cta.b64 %p1, [%bar], 0;
@!%p1 bra.uni AGAIN;
"""
BARRIER = INIT + "@%first mbarrier.arrive.shared::cta.b64 _, [%bar];" + AGAIN
LOAD = (
    "@%first cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
    "[%shared], [%map, {%zero, %zero}], [%bar];"
)
EXPECT = "@%first mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 1024;\n"
TMA = INIT + EXPECT + LOAD + AGAIN + "ld.shared.b32 %r1, [%slot];"
BULK = TMA.replace(
    LOAD,
    "mov.b32 %r9, 1024;\n"
    "@%first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
    "[%shared], [%x], %r9, [%bar];",
)
# A generic store, then a copy of TMA to the same place.
REUSE = (
    "st.shared.b32 [%slot], %lane;\nfence.proxy.async.shared::cta;\n"
    + INIT + EXPECT + LOAD + AGAIN
)  # fmt: skip
MULTICAST = """
@%first mbarrier.init.shared::cta.b64 [%bar], 1;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
@%first mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 1024;
mov.b16 %h1, 3;
mad.lo.u32 %r3, %block, 1024, %thread;
setp.eq.u32 %p3, %r3, 0;
@%p3 TENSOR_COPY.multicast::cluster [%shared], [%map, {%zero, %zero}], [%bar], %h1;
AGAIN:
mbarrier.try_wait.parity.shared::cta.b64 %p1, [%bar], 0;
@!%p1 bra.uni AGAIN;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
""".replace(
    "TENSOR_COPY", "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
)
COPY = """
cp.async.ca.shared.global [%slot], [%a], 4;
cp.async.commit_group;
cp.async.wait_group 0;
ld.shared.b32 %r1, [%slot];
"""
# Two warps copy and arrive by their copies.
ARRIVE = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%bar];"
ARRIVAL = (
    INIT.replace("], 1;", "], 64;")
    + COPY.split("cp.async.commit")[0] + ARRIVE + AGAIN
    + "xor.b32 %r1, %thread, 33;\nmad.lo.u32 %r2, %r1, 4, %shared;\nld.shared.b32 %r1, [%r2];"
)  # fmt: skip
ARRIVAL_STORED = (
    ARRIVAL + "\nfence.proxy.async.shared::cta;\nbar.sync 0;\nmov.b32 %r9, 128;\n"
    "@%first cp.async.bulk.global.shared::cta.bulk_group [%x], [%shared], %r9;\n"
    "@%first cp.async.bulk.commit_group;\n@%first cp.async.bulk.wait_group.read 0;"
)
STORE = """
st.shared.b32 [%slot], %lane;
fence.proxy.async.shared::cta;
bar.sync 0;
mov.b32 %r9, 128;
@%first cp.async.bulk.global.shared::cta.bulk_group [%x], [%shared], %r9;
@%first cp.async.bulk.commit_group;
@%first cp.async.bulk.wait_group.read 0;
bar.sync 0;
st.shared.b32 [%slot], %lane;
"""
ZEROS = "{%zero, %zero, %zero, %zero}"
OPERANDS = f"""
mad.lo.u32 %r9, %thread, 64, %shared;
st.shared.v4.b32 [%r9], {ZEROS};
st.shared.v4.b32 [%r9+16], {ZEROS};
st.shared.v4.b32 [%r9+32], {ZEROS};
st.shared.v4.b32 [%r9+48], {ZEROS};
fence.proxy.async.shared::cta;
bar.sync 0;
shr.u32 %r10, %shared, 4;
cvt.u64.u32 %d1, %r10;
"""
WGMMA = (
    OPERANDS
    + """
or.b64 %d2, %d1, 0x0000001000080000;
add.u64 %d3, %d2, 256;
mov.b32 %f0, 0f00000000;
mov.b32 %f1, 0f00000000;
mov.b32 %f2, 0f00000000;
mov.b32 %f3, 0f00000000;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d2, %d3, %yes, SIGNS;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
add.f32 %f4, %f0, %f1;
mov.b32 %f1, 0f00000000;
bar.sync 0;
st.shared.b32 [%slot], %zero;
""".replace("SIGNS", "1, 1, 0, 0")
)
TENSOR = """
mov.b32 %r11, 32;
@%warp0 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%bar+16], %r11;
@%first mbarrier.init.shared::cta.b64 [%bar], 1;
bar.sync 0;
ld.shared.b32 %r12, [%bar+16];
""" + OPERANDS + """
or.b64 %d2, %d1, 0x0000401000080000;
add.u64 %d3, %d2, 256;
mov.b32 %r13, 134481040;
@%first tcgen05.mma.cta_group::1.kind::f16 [%r12], %d2, %d3, %r13, %no;
@%first tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%bar];
AGAIN:
mbarrier.try_wait.parity.shared::cta.b64 %p1, [%bar], 0;
@!%p1 bra.uni AGAIN;
tcgen05.fence::after_thread_sync;
shl.b32 %r14, %warp, 21;
add.u32 %r15, %r12, %r14;
tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r16}, [%r15];
tcgen05.wait::ld.sync.aligned;
add.u32 %r17, %r16, 1;
tcgen05.fence::before_thread_sync;
bar.sync 0;
@%warp0 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r12, 32;
"""  # fmt: skip
ON = r"the mbarrier at byte 8192 of shared memory"
MBARRIERS = [
    Check("not initialized", BARRIER, ("@%first mbarrier.init.shared::cta.b64 [%bar], 1;",
          "@%first st.shared.b64 [%bar], 1;"), (ON + " was not initialized", "lane 0")),
    Check("initialized twice", BARRIER, ("bar.sync 0;",
          "@%first mbarrier.init.shared::cta.b64 [%bar], 1;"),
          ("initializes " + ON + " again without mbarrier.inval", "lane 0")),
    Check("count of 0", BARRIER, ("[%bar], 1;", "[%bar], 0;"), ("for 0 arrivals", )),
    Check("too many arrivals", BARRIER, ("_, [%bar];", "_, [%bar], 2;"),
          (ON + " gets more than its 1 arrivals in phase 0", "lane 0")),
    Check("too many bytes expected", INIT +
          "@%first mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%bar], 0;",
          ("[%bar], 0", "[%bar], 1048576"), ("expects 1048576 bytes, more than", )),
    Check("ordinary load", BARRIER + "ld.shared.b32 %r1, [%bar+8];".replace(
          "ld", "@%first st.shared.b32 [%bar+8], %zero;\nbar.sync 0;\nld"),
          ("%r1, [%bar+8]", "%r1, [%bar+4]"),
          ("reads " + ON + " by an ordinary access", "lane 0")),
    Check("ordinary store", BARRIER + "st.shared.b32 [%slot], %zero;",
          ("[%slot]", "[%bar+4]"), ("writes " + ON + " by an ordinary access", )),
    Check("misaligned mbarrier", BARRIER.replace("%bar]", "%bar+8]"), ("bar+8", "bar+4"),
          ("8 bytes misaligned", )),
    Check("wait for the wrong parity", BARRIER, ("[%bar], 0;\n@!", "[%bar], 1;\n@!"),
          ("deadlock", f"waits for {ON}, phase 1, which misses 1 of 1 arrivals and 0 bytes"
           "|waits for memory"), located=False),
    Check("missing arrival", BARRIER, ("[%bar], 1;", "[%bar], 2;"),
          ("deadlock", f"waits for {ON}, phase 0, which misses 1 of 2 arrivals and 0 bytes"
           "|waits for memory"), located=False),
    Check("init without a barrier", BARRIER, ("bar.sync 0;", ""),
          ("race|was not initialized", "byte 8192 of shared memory"), block=64),
    Check("exit with missing bytes", INIT + EXPECT + LOAD + AGAIN, ("1024;", "1040;"),
          ("misses 16 bytes|deadlock", ), located=False),
    Check("exit before the bytes arrive", INIT + EXPECT + LOAD + AGAIN,
          (AGAIN, ""), ("exits while .* misses 1024 bytes of copies", ), orders=("latest", )),
]  # fmt: skip
COPIES = [
    Check("too few bytes expected", TMA, ("1024;", "1008;"),
          ("deadlock", "misses 0 of 1 arrivals and -16 bytes|memory that no warp changes"),
          located=False),
    Check("read before the wait", TMA, (AGAIN, ""),
          (r"race: reads 4 bytes at byte \d+ of shared memory, which a copy on the mbarrier", )),
    Check("bulk copy read before the wait", BULK, (AGAIN, ""),
          (r"race: reads 4 bytes at byte \d+ of shared memory, which a copy on the mbarrier", )),
    Check("bulk copy of odd size", BULK, ("%r9, 1024", "%r9, 1020"), ("multiples of 16", )),
    Check("bulk copy past the tensor", BULK, ("%r9, 1024", "%r9, 1040"),
          ("copies from 1 bytes out of bounds", "argument 0 float32")),
    Check("write while a copy is in flight", TMA, (LOAD, LOAD + "\nst.shared.b32 [%slot], %lane;"),
          (r"race: writes 4 bytes at byte \d+ of shared memory, which a copy on", )),
    Check("copy without fence.proxy.async", REUSE, ("fence.proxy.async.shared::cta;", ""),
          ("race: writes 1024 bytes", "there is no fence.proxy.async between the two",
           "warp 0 wrote")),
    Check("copy without a barrier", REUSE, ("bar.sync 0;", ""),
          ("race|not initialized", ), block=64),
    Check("copy to a misaligned address", TMA, (LOAD, "add.u32 %shared, %shared, 64;\n" + LOAD),
          ("a tensor copy at shared address 0x[0-9a-f]+, which 128 does not divide", )),
    Check("misaligned tensor map", TMA, (LOAD, "add.u64 %map, %map, 16;\n" + LOAD),
          ("a tensor map at an address that 64 does not divide", "lane 0")),
    Check("no tensor map", TMA, ("[%map, ", "[%x, "), ("are no tensor map|64 does not", )),
    Check("tensor map of another rank", TMA, ("2d.shared::cluster", "1d.shared::cluster"),
          ("INVALID_PTX", "a number of coordinates other than"),
          located=False, named=False),
    Check("copy over the mbarrier", TMA, (LOAD, "sub.u32 %shared, %bar, 128;\n" + LOAD),
          ("a copy writes over the mbarrier at byte 8192", )),
    Check("copy on no mbarrier", TMA, (LOAD, 
          LOAD.replace("[%bar]", "[%r20]").replace("@", "add.u32 %r20, %bar, 8;\n@")),
          ("was not initialized", )),
    Check("multicast to a missing block", MULTICAST, ("%h1, 3", "%h1, 7"),
          ("a multicast to blocks outside the cluster", ), grid=2, cluster=2),
    Check("cp.async never committed", COPY, ("cp.async.commit_group;\ncp.async.wait_group 0;\n"
          "ld.shared.b32 %r1, [%slot];", ""), ("exits with a cp.async group that was never", )),
    Check("cp.async never waited for", COPY, ("cp.async.wait_group 0;\nld.shared.b32 %r1, "
          "[%slot];", ""), ("exits with a cp.async group in flight", )),
    Check("cp.async read before the wait", COPY, ("wait_group 0", "wait_group 1"),
          (r"race: reads 4 bytes at byte \d+ of shared memory, which a cp.async of warp 0", )),
    Check("cp.async read without a barrier", COPY.replace("ld.", "bar.sync 0;\n@%warp1 mov.u32 "
          "%slot, %shared;\nld."), ("bar.sync 0;", ""),
          ("race|nothing wrote", ), block=64),
    Check("cp.async arrives, read before the wait", ARRIVAL, (AGAIN, "\n"),
          ("race: reads 4 bytes|nothing wrote", ), block=64),
    Check("cp.async arrives too rarely", ARRIVAL, ("], 64;", "], 65;"),
          ("deadlock", "misses 1 of 65 arrivals"), located=False, block=64),
    Check("cp.async arrives at no mbarrier", ARRIVAL, (ARRIVE, ARRIVE.replace("]", "+8]")),
          ("was not initialized", ), block=64),
    Check("cp.async arrives and is waited for", ARRIVAL, (ARRIVE, ARRIVE + "\ncp.async.wait_all;"),
          ("of which some arrive at an mbarrier: not supported", ), block=64),
    Check("a store before an arrival of cp.async", ARRIVAL,
          ("cp.async.ca.shared.global [%slot], [%a], 4;", "st.shared.b32 [%slot], %lane;"),
          (r"race: reads 4 bytes at byte \d+ of shared memory, which warp", ), block=64),
    Check("cp.async arrives, no fence.proxy.async", ARRIVAL_STORED,
          ("fence.proxy.async.shared::cta;", ""),
          ("race: reads 128 bytes", "there is no fence.proxy.async between the two"), block=64),
    Check("cp.async past the tensor", COPY, ("[%a], 4", "[%a+1000], 4"),
          ("copies from .* out of bounds", "argument 0 float32")),
    Check("cp.async misaligned", COPY, ("[%a], 4", "[%a+2], 4"), ("misaligned", )),
    Check("bulk store overwritten before wait_group.read", STORE,
          ("@%first cp.async.bulk.wait_group.read 0;", ""),
          (r"race: writes 4 bytes at byte \d+ of shared memory, which a bulk copy of warp 0 read",
           )),
    Check("bulk store without fence.proxy.async", STORE, ("fence.proxy.async.shared::cta;", ""),
          ("race: reads 128 bytes", "there is no fence.proxy.async between the two")),
    Check("bulk store never committed", STORE, ("@%first cp.async.bulk.commit_group;\n"
          "@%first cp.async.bulk.wait_group.read 0;\nbar.sync 0;\nst.shared.b32 [%slot], %lane;",
          ""), ("exits with a bulk copy group that was never committed", )),
    Check("bulk store not waited for", STORE, ("@%first cp.async.bulk.wait_group.read 0;\n"
          "bar.sync 0;\nst.shared.b32 [%slot], %lane;", ""), ("exits with", )),
]  # fmt: skip
WAIT = "wgmma.wait_group.sync.aligned 0;"
BEHIND = WGMMA[WGMMA.index(WAIT) :].strip()
MATRICES = [
    Check("accumulator read before the wait", WGMMA, (WAIT + "\nadd",
          "add"), ("reads an accumulator of a wgmma.mma_async before wgmma.wait_group", ),
          block=128),
    Check("wait for too few groups", WGMMA, (WAIT, WAIT.replace("0", "1")),
          ("reads an accumulator of a wgmma.mma_async before wgmma.wait_group", ), block=128),
    Check("accumulator written before the wait", WGMMA, (WAIT + "\nadd.f32 %f4, %f0, %f1;", ""),
          ("writes a register of a wgmma.mma_async before wgmma.wait_group", ), block=128),
    Check("wgmma never committed", WGMMA, ("wgmma.commit_group.sync.aligned;\n" + BEHIND, ""),
          ("exits with a wgmma group that was never committed", ), block=128),
    Check("wgmma never waited for", WGMMA, (BEHIND, ""),
          ("exits with a wgmma group in flight", ), block=128),
    Check("operand overwritten before the wait", WGMMA, (WAIT + "\nadd.f32 %f4, %f0, %f1;\n"
          "mov.b32 %f1, 0f00000000;", ""), ("race: writes 4 bytes at byte \\d+ of shared memory, "
          "which a wgmma of warp \\d read", ), block=128),
    Check("operand without fence.proxy.async", WGMMA, ("fence.proxy.async.shared::cta;", ""),
          ("race: reads .* bytes", "there is no fence.proxy.async between the two"), block=128),
    Check("operand without a barrier", WGMMA, ("bar.sync 0;", ""), ("race|nothing wrote", ),
          block=128),
    Check("operand nothing wrote", WGMMA, ("%d2, 256;", "%d2, 510;"),
          ("nothing wrote|outside|by an ordinary|bounds", ), block=128),
    Check("accumulator written behind wgmma.fence", WGMMA, ("wgmma.fence.sync.aligned;",
          "wgmma.fence.sync.aligned;\nmov.b32 %f2, 0f00000000;"),
          ("reads a register that was written after the last wgmma.fence, at PTX line \\d+", ),
          block=128),
    Check("no wgmma.fence", WGMMA, ("wgmma.fence.sync.aligned;", ""),
          ("is issued before the first wgmma.fence of the warp", ), block=128),
    Check("wgmma by a part of the warp", WGMMA, ("wgmma.mma_async", "@%lane0 wgmma.mma_async"),
          ("the whole warp has to execute it", ), block=128),
    Check("scale-d differs between lanes", WGMMA, ("%yes, 1", "%lane0, 1"),
          ("scale-d differs between lanes", ), block=128),
    Check("descriptor differs between lanes", WGMMA, ("%d3, %d2, 256;",
          "%d3, %d2, 256;\ncvt.u64.u32 %d4, %lane;\nadd.u64 %d3, %d3, %d4;"),
          ("the descriptor of B differs", ), block=128),
    Check("tcgen05.ld read before wait::ld", TENSOR, ("tcgen05.wait::ld.sync.aligned;", ""),
          ("reads a register of a tcgen05.ld before tcgen05.wait::ld", ), "sm_100", block=128),
    Check("tcgen05.ld overwritten before wait::ld", TENSOR, ("tcgen05.wait::ld.sync.aligned;\n"
          "add.u32 %r17, %r16, 1;", "mov.u32 %r16, 1;"),
          ("writes a register of a tcgen05.ld before tcgen05.wait::ld", ), "sm_100", block=128),
    Check("column not allocated", TENSOR, ("{%r16}, [%r15]", "{%r16}, [%r15+32]"),
          (r"column \d+ of tensor memory is not allocated", ), "sm_100", block=128),
    Check("lanes of another warp", TENSOR, ("{%r16}, [%r15]", "{%r16}, [%r12]"),
          (r"warp \d accesses lane 0 of tensor memory, expected \d+ to", ), "sm_100", block=128),
    Check("not deallocated", TENSOR, ("@%warp0 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r12,"
          " 32;", ""), ("exits without tcgen05.dealloc", ), "sm_100", block=128),
    Check("deallocated twice", TENSOR, ("@%warp0 tcgen05.dealloc", "@%warp0 tcgen05.dealloc."
          "cta_group::1.sync.aligned.b32 %r12, 32;\n@%warp0 tcgen05.dealloc"),
          ("frees tensor memory that is not allocated", ), "sm_100", block=128),
    Check("deallocated while others read", TENSOR, ("tcgen05.fence::before_thread_sync;\n"
          "bar.sync 0;", ""), (r"race: writes lane \d+, column \d+ of tensor memory, which warp "
          r"\d read|is not allocated", ), "sm_100", block=128),
    Check("48 columns", TENSOR, ("%r11, 32", "%r11, 48"), ("allocates 48 columns", ), "sm_100",
          block=128),
    Check("product read before the commit's mbarrier", TENSOR, (AGAIN.strip(), ""),
          (r"race: reads lane \d+, column \d+ of tensor memory, which a tcgen05.mma wrote"
           r"|race: writes lane \d+, column \d+ of tensor memory, which warp \d read", ), "sm_100",
          block=128),
    Check("product without a commit", TENSOR, ("@%first tcgen05.commit", "@%no tcgen05.commit"),
          ("deadlock", ON + ".*misses 1 of 1 arrivals|memory that no warp changes"), "sm_100",
          block=128, located=False),
    Check("tcgen05 operand without fence.proxy.async", TENSOR, ("fence.proxy.async.shared::cta;",
          ""), ("race: reads .* bytes", "there is no fence.proxy.async between the two"), "sm_100",
          block=128),
    Check("accumulates what nothing wrote", TENSOR, ("%r13, %no", "%r13, %yes"),
          ("of tensor memory, which nothing wrote", ), "sm_100", block=128),
]  # fmt: skip
CHECKS = MBARRIERS + COPIES + MATRICES


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_check_reports_the_fault(check: Check, seed: int):
    assert_reported(check, seed)


@pytest.mark.parametrize("check", distinct(CHECKS), ids=lambda check: check.name)
def test_check_passes_the_correct_kernel(check: Check, seed: int):
    assert_passes(check, seed)


@pytest.mark.parametrize("order", ORDERS)
def test_copy_fills_the_outside_of_the_tensor_with_zeros(seed: int, order: str):
    """The box begins 2 rows above the tensor; the kernel copies it back to the whole of y."""
    body = (
        TMA.replace("%zero, %zero}", "%zero, %r20}")
        + """
        mad.wide.u32 %d5, %lane, 4, %y;
        st.global.b32 [%d5], %r1;
        ld.shared.b32 %r2, [%slot+256];
        st.global.b32 [%d5+128], %r2;
    """
    )
    y = Check("", "mov.b32 %r20, -2;\n" + body, ("", ""), ()).run(
        "mov.b32 %r20, -2;\n" + body, seed, order
    )
    assert y[:32].tolist() == [0] * 32  # row -2
    assert y[32:].view(dtype=y.dtype).tolist() != [0] * 32  # row 0: 0.0 to 31.0
