"""Each check of the machine on ordinary memory, barriers and lanes: reported, and its twin passes.

Source: csrc/ptx/memory.cpp, control.cpp, machine.cpp.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

import deepkern
from deepkern.runtime.ptx_library import PtxModule
from tests.compiled.checked import Check, assert_passes, assert_reported, distinct, text

SHARE = """
st.shared.b32 [%slot], %lane;
bar.sync 0;
@%first st.shared.b32 [%shared], 7;
bar.sync 1;
ld.shared.b32 %r1, [%shared];
"""
FLAG = """
@%block1 bra WAIT;
@%first st.global.b32 [%x], 7;
bar.warp.sync -1;
@%first st.release.gpu.global.b32 [%y], 1;
ret;
WAIT:
ld.acquire.gpu.global.b32 %r1, [%y];
setp.ne.b32 %p1, %r1, 1;
@%p1 bra WAIT;
ld.global.b32 %r2, [%x];
"""
FENCED_FLAG = FLAG.replace("st.release", "fence.acq_rel.gpu;\n@%first st.relaxed").replace(
    "bar.warp.sync -1;\n@%first fence", "bar.warp.sync -1;\nfence"
)
FENCED_READ = FLAG.replace("ld.acquire", "ld.relaxed").replace(
    "bra WAIT;\nld.global", "bra WAIT;\nfence.acq_rel.gpu;\nld.global"
)
GLOBAL = [
    Check("after the tensor", "ld.global.b32 %r1, [%a+896];", ("896", "900"),
          ("loads 4 bytes out of bounds", "argument 0 float32", "lane 31")),
    Check("before the tensor", "st.global.b32 [%a], %lane;", ("[%a]", "[%a+-4]"),
          ("stores 4 bytes out of bounds", "argument 0 float32", "lane 0")),
    Check("far from a tensor", "ld.global.b32 %r1, [%a];", ("[%a]", "[%a+1099511627776]"),
          ("loads 4 bytes out of bounds", "0x", "lane 0")),
    Check("null pointer", "ld.global.b32 %r1, [%a];\nmov.b64 %d1, 0;", ("%a", "%d2"),
          ("loads 4 bytes", )),
    Check("address 0", "mov.b64 %d1, %x;\nld.global.b32 %r1, [%d1];", ("%d1, %x", "%d1, 0"),
          ("loads 4 bytes out of bounds", "null|0x0", "lane 0")),
    Check("vector past the end", "ld.global.v2.b32 {%r1, %r2}, [%x+1016];", ("1016", "1024"),
          ("loads 8 bytes out of bounds", "argument 0 float32")),
    Check("misaligned vector", "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%x+16];", ("+16", "+8"),
          ("loads 16 bytes misaligned", "in global memory", "0x[0-9a-f]+8", "lane 0")),
    Check("misaligned word", "st.global.b32 [%x+4], %lane;".replace("st", "@%first st"),
          ("+4", "+2"), ("stores 4 bytes misaligned", "lane 0")),
    Check("atomic past the end", "red.global.add.u32 [%y+252], 1;", ("252", "256"),
          ("updates 4 bytes out of bounds", "argument 1 int32")),
    Check("store to a parameter", "ld.param.u64 %d1, [p_x];", ("ld.param.u64 %d1, [p_x]",
          "mov.b64 %d1, p_x;\nst.u64 [%d1], %x"), ("kernel parameter", )),
    Check("two blocks write", "@%block0 st.global.b32 [%a], %lane;",
          ("@%block0 st.global.b32 [%a], %lane", "add.u32 %r1, %lane, %block;\n"
           "st.global.b32 [%a], %r1"),
          ("race: writes 4 bytes at .*argument 0 float32", "block [01] wrote at checked.cu",
           "lane 0"), grid=2),
    Check("a block reads what another writes", "@%block0 st.global.b32 [%a], %lane;\n"
          "@%block0 ld.global.b32 %r1, [%a];", ("@%block0 ld", "@%block1 ld"),
          ("race: (reads|writes) 4 bytes at .*argument 0", "block [01] (wrote|read) at"), grid=2),
    Check("atomic against a plain store", "red.global.add.u32 [%y], 1;",
          ("red.global.add.u32 [%y], 1;", "@%block1 red.global.add.u32 [%y], 1;\n"
           "@%block0 st.global.b32 [%y], 5;"), ("race: ", "argument 1 int32"), grid=2),
    Check("relaxed store of a flag", FLAG, ("release.gpu", "relaxed.gpu"),
          ("race: reads 4 bytes at .*argument 0", "block 0 wrote at checked.cu"), grid=2),
    Check("relaxed load of a flag", FLAG, ("acquire.gpu", "relaxed.gpu"),
          ("race: reads 4 bytes at .*argument 0", "block 0 wrote at checked.cu"), grid=2),
    Check("no fence before a relaxed store of a flag", FENCED_FLAG, ("fence.acq_rel.gpu;", ""),
          ("race: reads 4 bytes at .*argument 0", "block 0 wrote at checked.cu"), grid=2),
    Check("no fence behind a relaxed load of a flag", FENCED_READ, ("fence.acq_rel.gpu;", ""),
          ("race: reads 4 bytes at .*argument 0", "block 0 wrote at checked.cu"), grid=2),
]  # fmt: skip
SHARED = [
    Check("after shared memory", "st.shared.b32 [%slot+9088], %lane;", ("9088", "9216"),
          ("stores 4 bytes out of bounds of shared memory: byte 9216 of 9216", "lane 0")),
    Check("before shared memory", "st.shared.b32 [%slot], %lane;", ("[%slot]", "[%slot+-4]"),
          ("stores 4 bytes out of bounds of shared memory: byte -4 of", "lane 0")),
    Check("far from shared memory", "st.shared.b32 [%slot], %lane;", ("slot]", "slot+1048576]"),
          ("stores 4 bytes out of bounds of shared memory", "lane 0")),
    Check("misaligned shared", "st.shared.v2.b32 [%slot], {%lane, %lane};".replace(
          "st", "@%first st"), ("[%slot]", "[%slot+4]"),
          ("stores 8 bytes misaligned", "in shared memory", "lane 0")),
    Check("shared memory of a block that does not exist", "@%first st.shared::cluster.b32 "
          "[%slot], %lane;", ("[%slot]", "[%slot+33554432]"), ("of block 2 of a cluster of 1", )),
    Check("nothing wrote", "st.shared.b32 [%slot], %lane;\nld.shared.b32 %r1, [%slot];",
          ("ld.shared.b32 %r1, [%slot]", "ld.shared.b32 %r1, [%slot+128]"),
          ("reads 4 bytes at byte 128 of shared memory, which nothing wrote", "lane 0")),
    Check("half of it nothing wrote", "st.shared.b16 [%slot], 1;\nst.shared.b16 [%slot+2], 1;\n"
          "ld.shared.b32 %r1, [%slot];", ("st.shared.b16 [%slot+2], 1;", ""),
          ("reads 4 bytes at byte 2 of shared memory, which nothing wrote", )),
    Check("two warps write", "@%first st.shared.b32 [%shared], %thread;", ("%first", "%lane0"),
          ("race: writes 4 bytes at byte 0 of shared memory, which warp [01] wrote at "
           "checked.cu:1", "lane 0"), block=64),
    Check("write and read", SHARE, ("bar.sync 1;", ""),
          ("race: (reads|writes) 4 bytes at byte 0 of shared memory, which .* (wrote|read) at",
           "nothing orders the two"), block=64),
    Check("read and write", SHARE + "bar.sync 0;\n@%warp1 st.shared.b32 [%shared], %lane;",
          ("bar.sync 0;\n@%warp1", "@%warp1"), ("race: (reads|writes) 4 bytes at byte 0", ),
          block=64),
    Check("lanes without bar.warp.sync", "st.shared.b32 [%slot], %lane;\nbar.warp.sync -1;\n"
          "xor.b32 %r1, %slot, 4;\nld.shared.b32 %r2, [%r1];", ("bar.warp.sync -1;", ""),
          ("race: reads 4 bytes at byte \\d+ of shared memory, which lane \\d+ of the same warp "
           "wrote", )),
    Check("atomic against a store", "@%first st.shared.b32 [%shared], 0;\nbar.sync 0;\n"
          "red.shared.add.u32 [%shared], 1;", ("bar.sync 0;", ""),
          ("race|nothing wrote", "byte 0 of shared memory"), block=64),
]  # fmt: skip
BARRIERS = [
    Check("divergent bar.sync", "setp.lt.u32 %p1, %lane, 16;\nbar.sync 0;",
          ("bar.sync 0", "@%p1 bar.sync 0"), ("lanes 0xffff0000 of the warp do not reach", )),
    Check("bar.sync on two paths", "setp.lt.u32 %p1, %lane, 16;\n@%p1 bra OTHER;\nOTHER:\n"
          "bar.sync 0;", ("OTHER:\nbar.sync 0;", "bar.sync 0;\nret;\nOTHER:\nbar.sync 0;"),
          ("of the warp do not reach this aligned instruction", )),
    Check("a warp has exited", "bar.sync 0;", ("bar", "@%warp1 ret;\nbar"),
          ("barrier 0, which 32 of 64 threads reached|deadlock", ), block=64, located=False),
    Check("a warp exits after bar.arrive", "@%warp1 bar.arrive 1, 64;\n@%warp0 bar.sync 1, 64;",
          ("@%warp1 bar.arrive 1, 64;\n", ""), ("the other threads have exited|deadlock", ),
          block=64, located=False),
    Check("wrong count", "bar.sync 1, 64;", ("64", "%r1"), ("barrier 1 for ", ), block=64),
    Check("odd count", "bar.sync 1, 64;", ("64", "48"),
          ("barrier 1 for 48 threads, expected a multiple of 32", ), block=64),
    Check("two counts", "bar.sync 1, 96;\nbar.sync 2;", ("bar.sync 1, 96;", "@%warp0 bar.sync 1, "
          "96;\n@%warp1 bar.sync 1, 64;"), ("barrier 1 is used for|deadlock", ), block=96,
          located=False),
    Check("barrier 16", "bar.sync 15;", ("15", "16"), ("barrier 16, expected 0 to 15", )),
    Check("deadlock of two barriers", "bar.sync 0;", ("bar.sync 0;", "@%warp0 bar.sync 0;\n"
          "@%warp1 bar.sync 1;"), ("deadlock: no warp can go on, seed \\d+",
          "block 0, warp 0 waits for barrier 0, which 32 of 64 threads reached at checked.cu:1",
          "block 0, warp 1 waits for barrier 1, which 32 of 64 threads reached at checked.cu:2"),
          block=64, located=False),
    Check("spin on memory", "SPIN:\nld.relaxed.gpu.global.b32 %r1, [%y];\n"
          "setp.eq.b32 %p1, %r1, 1;\n@%p1 bra SPIN;", ("setp.eq", "setp.ne"),
          ("deadlock", "block 0, warp 0 waits for memory that no warp changes at checked.cu:[234]"),
          located=False),
    Check("cluster barrier twice", "barrier.cluster.arrive.aligned;\n"
          "barrier.cluster.wait.aligned;", ("arrive.aligned;\nbarrier.cluster.wait.aligned",
          "arrive.aligned;\nbarrier.cluster.arrive.aligned"),
          ("arrives twice at the cluster barrier", ), grid=2, cluster=2),
    Check("cluster barrier without arrival", "barrier.cluster.arrive.aligned;\n"
          "barrier.cluster.wait.aligned;", ("barrier.cluster.arrive.aligned;", ""),
          ("waits at the cluster barrier without an arrival", ), grid=2, cluster=2),
    Check("bar.warp.sync without some lanes", "bar.warp.sync -1;", ("-1", "65535"),
          ("bar.warp.sync with member mask 0xffff is executed by lanes 0xffffffff", )),
    Check("trap", "@%no trap;", ("@%no", "@%lane0"), ("trap", "lane 0")),
    Check("bra.uni that diverges", "@%yes bra.uni END;\nEND:", ("%yes", "%lane0"),
          ("bra.uni is not taken by every active lane", )),
    Check("mapa to a block that does not exist", "mov.u32 %r2, 1;\n"
          "mapa.shared::cluster.u32 %r1, %bar, %r2;", ("%r2, 1", "%r2, 2"),
          ("mapa to block 2 of a cluster of 2", "lane 0"), grid=2, cluster=2),
    Check("cvta of an address elsewhere", "cvt.u64.u32 %d2, %shared;\ncvta.shared.u64 %d1, %d2;\n"
          "cvta.to.shared.u64 %d1, %d1;",
          ("cvta.to.shared.u64 %d1, %d1", "cvta.to.shared.u64 %d1, %x"),
          ("the address is not one of shared memory", "lane 0")),
    Check("shfl without its lane", "shfl.sync.bfly.b32 %r1, %lane, 1, 31, -1;", ("-1", "-2"),
          ("mask", "lane")),
    Check("shfl by a part of the members", "setp.lt.u32 %p1, %lane, 16;\n"
          "shfl.sync.bfly.b32 %r1, %lane, 1, 31, -1;", ("shfl", "@%p1 shfl"), ("mask", "lane")),
    Check("vote by a part of the members", "setp.lt.u32 %p1, %lane, 16;\n"
          "vote.sync.ballot.b32 %r1, %p1, -1;", ("vote", "@%p1 vote"), ("mask", )),
    Check("ldmatrix by a part of the warp", "mad.lo.u32 %r1, %lane, 16, %shared;\n"
          "st.shared.v4.b32 [%r1], {%lane, %lane, %lane, %lane};\nbar.warp.sync -1;\n"
          "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];",
          ("ldmatrix", "@%lane0 ldmatrix"),
          ("the whole warp has to execute it", )),
]  # fmt: skip
CHECKS = GLOBAL + SHARED + BARRIERS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_check_reports_the_fault(check: Check, seed: int):
    assert_reported(check, seed)


@pytest.mark.parametrize("check", distinct(CHECKS), ids=lambda check: check.name)
def test_check_passes_the_correct_kernel(check: Check, seed: int):
    assert_passes(check, seed)


@pytest.mark.parametrize("body", [FENCED_FLAG, FENCED_READ], ids=["store", "load"])
def test_fence_with_a_relaxed_access_orders(body: str, seed: int):
    assert_passes(Check("flag", body, ("", ""), (), grid=2), seed)


def test_tensor_that_is_no_argument_is_out_of_bounds():
    x, hidden = torch.zeros(256), torch.zeros(1024)
    body = "ld.global.b32 %r1, [%y];"
    with deepkern.compiled("sm_90"):
        module = PtxModule(text(body))
        arguments = (x, ctypes.c_uint64(hidden.data_ptr()), bytes(128))
        with pytest.raises(deepkern.KernelFailure, match="loads 4 bytes out of bounds"):
            module.run_kernel("checked", *arguments)
        with deepkern.runtime.compiled.reachable(hidden=hidden):
            module.run_kernel("checked", *arguments)


@pytest.mark.parametrize(
    ("statement", "report"),
    [
        ("frobnicate.b32 %r1, %r2;", "frobnicate"),
        ("add.sideways.u32 %r1, %r2, %r3;", "sideways"),
        ("ld.global.sometimes.b32 %r1, [%x];", "sometimes"),
        ("bar.red.popc.u32 %r1, 0, %p1;", "barrier reductions are not supported"),
        ("fence.proxy.alias;", "only fence.proxy.async is supported"),
        ("mov.u32 %r1, %nosuch;", "nosuch"),
        ("bra NOWHERE;", "unknown label"),
    ],
    ids=["opcode", "modifier", "modifier of a load", "bar.red", "proxy", "register", "label"],
)
def test_unknown_instruction_is_named(statement: str, report: str):
    with deepkern.compiled("sm_90"), pytest.raises(deepkern.KernelFailure) as caught:
        PtxModule(text(statement)).run_kernel("checked", *[torch.zeros(4)] * 2, bytes(128))
    message = str(caught.value)
    opcode = statement.split()[0].rstrip(";")
    assert report in message and re.search(
        rf"PTX line \d+: .*{opcode}|checked: unknown special register", message
    )


def test_addresses_of_the_cluster():
    """mapa, cvta and isspacep: block 1 stores to block 0, through a generic address."""
    body = """
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        mapa.shared::cluster.u32 %r1, %slot, %zero;
        cvt.u64.u32 %d1, %r1;
        cvta.shared::cluster.u64 %d2, %d1;
        isspacep.shared::cluster %p1, %d2;
        isspacep.global %p2, %d2;
        selp.b32 %r2, 1, 0, %p1;
        selp.b32 %r3, 16, 0, %p2;
        add.u32 %r4, %r2, %r3;
        add.u32 %r4, %r4, %lane;
        @%block1 st.b32 [%d2], %r4;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        mad.wide.u32 %d5, %lane, 4, %y;
        @%block1 ret;
        ld.shared.b32 %r5, [%slot];
        st.global.b32 [%d5], %r5;
    """
    y = Check("", body, ("", ""), (), grid=2, cluster=2).run(body, 0, "random")
    assert y[:32].tolist() == list(range(1, 33))
