"""Bugs planted in the PTX of our kernels are found, by a check or by a wrong value."""

from __future__ import annotations

import re

import pytest

import deepkern
from tests.compiled.planted import Edit, Planted

pytestmark = pytest.mark.proof
SEEDS = 10

BOUNDS = "out of bounds"
RACE = "race: |nothing wrote"
DEADLOCK = "deadlock|while copies are in flight|did not expect"
MISALIGNED = "misaligned"
VALUE = "value"

UNGUARD_LOAD = Edit(r"@!?%p\d+ (ld\.global)", r"\1")
UNGUARD_STORE = Edit(r"@!?%p\d+ (st\.global)", r"\1")
UNGUARD_LAST_STORE = Edit(r"@!?%p\d+ (st\.global)", r"\1", -1)
NO_BARRIER = Edit(r"bar\.sync")
NO_LAST_BARRIER = Edit(r"bar\.sync", "", -1)
NO_BARRIERS = Edit(r"bar\.sync", "", every=True)
NO_WAIT = Edit(r"cp\.async\.wait_group")
NO_LAST_WAIT = Edit(r"cp\.async\.wait_group", "", -1)
LATE_WAIT = Edit(r"(cp\.async\.wait_group)\s+(0x)?\d+", r"\1 15")
NO_COMMITS = Edit(r"cp\.async\.commit_group", "", every=True)
UNGUARD_COPY = Edit(r"(cp\.async\.c[ag]\S* .*), %r\d+;", r"\1;")
SHIFTED_COPY = Edit(r"(cp\.async\.c[ag]\S* \[ ?%r\d+ ?\+) 0", r"\1 16")
NO_COPY = Edit(r"cp\.async\.c[ag]\.")
SHIFTED_LDMATRIX = Edit(r"(ldmatrix.*\[ ?%r\d+)(\+\d+)?", r"\1+16")
SHIFTED_LOAD = Edit(r"(ld\.global\S* .*\[ ?%rd\d+)( \+ 0)?", r"\1+4")
SHIFTED_STORE = Edit(r"(st\.global\S* \[ ?%rd\d+)( \+ 0)?", r"\1+4")
SHIFTED_SHARED_STORE = Edit(r"(st\.shared\S* \[ ?%r\d+)( ?\+ ?0)?", r"\1+16")
SHIFTED_LAST_SHARED_STORE = Edit(r"(st\.shared\S* \[ ?%r\d+)( ?\+ ?0)?", r"\1+16", -1)
SHIFTED_SHARED_LOAD = Edit(r"(ld\.shared\S* .*\[ ?%r\d+)( \+ 0|\+\d+)?", r"\1+16")
NARROW_STORE = Edit(
    r"st\.global\.v4\.b32 (.*)\{ (%r\d+, %r\d+), .*\};", r"st.global.v2.b32 \1{ \2 };"
)
MEMBERS = Edit(r"(shfl\S* .*), -1", r"\1, 65535")
OTHER_LANE = Edit(r"(shfl\.sync\.bfly\.b32.*), \d+, 31", r"\1, 0, 31", every=True)
OTHER_SHIFT = Edit(r"(shl\.b32\s+%r\d+, %r\d+), \d+", r"\1, 3", -1)
FEWER_BYTES = Edit(r"(expect_tx\S* _, \[\S+\]), \d+;", r"\1, 4096;")
NO_EXPECT = Edit(r"expect_tx")
MORE_ARRIVALS = Edit(r"(mbarrier\.init\S* \[\S+\]), 1", r"\1, 2")
NO_INIT = Edit(r"mbarrier\.init")
PARITY = Edit(r"(try_wait\S* \S+, \[\S+\]), %r\d+", r"\1, 1")
LAST_PARITY = Edit(r"(try_wait\S* \S+, \[\S+\]), %r\d+", r"\1, 1", -1)
UNGUARD_BULK = Edit(r"@%p\d+ (cp\.async\.bulk)", r"\1")
NO_WGMMA_WAIT = Edit(r"wgmma\.wait_group")
LATE_WGMMA_WAIT = Edit(r"(wgmma\.wait_group\S*)\s+\d+", r"\1 7")
NO_WGMMA_FENCE = Edit(r"wgmma\.fence")
NO_WGMMA_COMMIT = Edit(r"wgmma\.commit_group")
NO_PROXY_FENCES = Edit(r"fence\.proxy\.async", "", every=True)
NO_WAIT_LD = Edit(r"tcgen05\.wait::ld", "", every=True)
NO_COMMIT = Edit(r"tcgen05\.commit")
NO_DEALLOC = Edit(r"tcgen05\.dealloc")
OTHER_COLUMN = Edit(r"(tcgen05\.ld.*\[ ?%r\d+) \+ 0", r"\1 + 32")
OTHER_DESCRIPTOR = Edit(
    r"(or\.b64|add\.s64|mov\.b64)(\s+%rd\d+, %rd\d+), (4611\d+)", r"\1\2, 4611686293305294848"
)


def gemm(target: str, name: str, edit: Edit, report: str) -> Planted:
    return Planted(f"{target} product: {name}", target, "fp8_gemm_nt", 1, edit, report)


def cast(name: str, edit: Edit, report: str) -> Planted:
    return Planted(f"cast: {name}", "sm_80", "cast_per_token", 1, edit, report)


def norm(name: str, edit: Edit, report: str) -> Planted:
    return Planted(f"norm: {name}", "sm_80", "rmsnorm_cast", 1, edit, report)


def decode(name: str, edit: Edit, report: str) -> Planted:
    return Planted(f"decode: {name}", "sm_80", "mla_decode", 0, edit, report)


def count(name: str, edit: Edit, report: str) -> Planted:
    return Planted(f"count: {name}", "sm_90", "expert_load", 1, edit, report)


def logits(name: str, edit: Edit, report: str) -> Planted:
    return Planted(f"logits: {name}", "sm_90", "mqa_logits", 2, edit, report)


BUGS = [
    gemm("sm_80", "no last barrier", NO_LAST_BARRIER, RACE),
    gemm("sm_80", "no wait for copies", NO_WAIT, RACE),
    gemm("sm_80", "no last wait for copies", NO_LAST_WAIT, RACE),
    gemm("sm_80", "waits for too few copies", LATE_WAIT, RACE),
    gemm("sm_80", "copies never committed", NO_COMMITS, f"{RACE}|never committed"),
    gemm("sm_80", "unguarded load", UNGUARD_LOAD, BOUNDS),
    gemm("sm_80", "unguarded store", UNGUARD_STORE, BOUNDS),
    gemm("sm_80", "unguarded copy", UNGUARD_COPY, BOUNDS),
    gemm("sm_80", "copy to a wrong offset", SHIFTED_COPY, RACE),
    gemm("sm_80", "copy left out", NO_COPY, RACE),
    gemm("sm_80", "load from a wrong offset", SHIFTED_LOAD, BOUNDS),
    gemm("sm_80", "store to a wrong offset", SHIFTED_STORE, MISALIGNED),
    gemm("sm_80", "ldmatrix from a wrong offset", SHIFTED_LDMATRIX, RACE),
    cast("no barrier", NO_BARRIER, RACE),
    cast("unguarded load", UNGUARD_LOAD, BOUNDS),
    cast("unguarded store", UNGUARD_STORE, BOUNDS),
    cast("unguarded scale", UNGUARD_LAST_STORE, BOUNDS),
    cast("load from a wrong offset", SHIFTED_LOAD, MISALIGNED),
    cast("shared store to a wrong offset", SHIFTED_SHARED_STORE, BOUNDS),
    cast("shuffle with half of the members", MEMBERS, "member mask"),
    cast("narrower store", NARROW_STORE, VALUE),
    norm("no barrier", NO_BARRIER, RACE),
    norm("no last barrier", NO_LAST_BARRIER, RACE),
    norm("no reduction over lanes", OTHER_LANE, VALUE),
    norm("narrower store", NARROW_STORE, VALUE),
    norm("last shared store to a wrong offset", SHIFTED_LAST_SHARED_STORE, f"{VALUE}|{RACE}"),
    decode("no barrier", NO_BARRIER, RACE),
    decode("no wait for copies", NO_WAIT, RACE),
    decode("waits for too few copies", LATE_WAIT, RACE),
    decode("unguarded load", UNGUARD_LOAD, BOUNDS),
    decode("unguarded store", UNGUARD_STORE, f"{RACE}|{BOUNDS}"),
    decode("another shift of an address", OTHER_SHIFT, MISALIGNED),
    decode("copy left out", NO_COPY, RACE),
    decode("narrower store", NARROW_STORE, VALUE),
    count("no barrier", NO_BARRIER, RACE),
    count("unguarded load", UNGUARD_LOAD, BOUNDS),
    count("another comparison", Edit(r"setp\.lt\.s32", "setp.le.s32"), f"{VALUE}|{BOUNDS}"),
    gemm("sm_90", "no wait for the product", NO_WGMMA_WAIT, "before wgmma.wait_group"),
    gemm("sm_90", "waits for too few products", LATE_WGMMA_WAIT, "before wgmma.wait_group"),
    gemm("sm_90", "product never committed", NO_WGMMA_COMMIT, "never committed|wait_group"),
    gemm("sm_90", "no wgmma.fence", NO_WGMMA_FENCE, r"wgmma\.fence"),
    gemm("sm_90", "too few bytes expected", FEWER_BYTES, DEADLOCK),
    gemm("sm_90", "no bytes expected", NO_EXPECT, DEADLOCK),
    gemm("sm_90", "mbarrier for two arrivals", MORE_ARRIVALS, DEADLOCK),
    gemm("sm_90", "mbarrier not initialized", NO_INIT, "was not initialized"),
    gemm("sm_90", "wait for another parity", PARITY, f"{RACE}|in flight"),
    gemm("sm_90", "copy by every thread", UNGUARD_BULK, f"{DEADLOCK}|{RACE}"),
    gemm("sm_90", "unguarded store", UNGUARD_LAST_STORE, BOUNDS),
    logits("no fence.proxy.async", NO_PROXY_FENCES, r"fence\.proxy\.async"),
    logits("no wait for the product", NO_WGMMA_WAIT, "before wgmma.wait_group"),
    logits("no barriers", NO_BARRIERS, RACE),
    gemm("sm_100", "no barrier behind the allocation", NO_BARRIER, RACE),
    gemm("sm_100", "no wait for the load", NO_WAIT_LD, "before tcgen05.wait::ld"),
    gemm("sm_100", "no commit of the product", NO_COMMIT, DEADLOCK),
    gemm("sm_100", "no deallocation", NO_DEALLOC, "without tcgen05.dealloc"),
    gemm("sm_100", "load of other columns", OTHER_COLUMN, "is not allocated|value"),
    gemm("sm_100", "another descriptor", OTHER_DESCRIPTOR, "descriptor"),
    gemm("sm_100", "wait for another parity", LAST_PARITY, f"{RACE}|in flight"),
    gemm("sm_100", "too few bytes expected", FEWER_BYTES, DEADLOCK),
    gemm("sm_120", "too few bytes expected", FEWER_BYTES, DEADLOCK),
    gemm("sm_120", "mbarrier for two arrivals", MORE_ARRIVALS, DEADLOCK),
    gemm("sm_120", "mbarrier not initialized", NO_INIT, "was not initialized"),
    gemm("sm_120", "wait for another parity", PARITY, f"{RACE}|in flight"),
    gemm("sm_120", "copy by every thread", UNGUARD_BULK, f"{DEADLOCK}|{RACE}"),
    gemm("sm_120", "ldmatrix from a wrong offset", SHIFTED_LDMATRIX, RACE),
]
KERNELS = list({(b.target, b.op, b.size): b for b in BUGS}.values())


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_found(bug: Planted, seed: int):
    fault = bug.search(seed, SEEDS, bug.edit)
    assert fault is not None, "nothing reports the bug"
    if isinstance(fault, deepkern.KernelFailure):
        assert re.search(bug.report, str(fault)), f"expected {bug.report}: {fault}"
        assert "_kernel: " in str(fault)
    else:
        assert "value" in bug.report, f"expected {bug.report}, got a wrong value: {fault}"


@pytest.mark.parametrize("bug", KERNELS, ids=lambda bug: f"{bug.op} {bug.target}")
def test_kernel_without_the_bug_passes_the_search(bug: Planted, seed: int):
    assert bug.search(seed, SEEDS, None) is None
