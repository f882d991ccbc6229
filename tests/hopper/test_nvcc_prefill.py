"""Spills, waits and instructions of mla_prefill and its gradients compiled with nvcc."""

from __future__ import annotations

import re

import pytest

from .test_nvcc import compile, functions

pytestmark = pytest.mark.proof
# Kernel -> for each loop over steps: WGMMAs, exponentials between their issue and the last wait,
# and at most that many instructions.
PREFILL = [(12 + 8, 64 + 2, 890), (12 + 8, 64 + 2, 520)]  # with a mask, without
# Kernel -> bytes that a thread spills, stores and loads: per work item, none in a step.
SPILLS = {"mla_prefill": 52, "mla_prefill_dq": 132, "mla_prefill_dkv": 264}
DQ = [(12 + 8 + 4, 32, 520), (12 + 8 + 4, 32, 370)]


@pytest.fixture(scope="module")
def machine_code() -> dict[str, str]:
    """Machine code by kernel."""
    found = {}
    for source in ("mla_prefill", "mla_prefill_backward"):
        cubin, output = compile(source)
        assert "serialized" not in output, output
        for kernel in output.split("Compiling entry function '")[1:]:
            spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", kernel))
            name = next((name for name in SPILLS if f"{len(name)}{name}E" in kernel[:80]), "")
            assert spilled <= SPILLS.get(name, 0), f"{kernel[:80]}: {spilled}"
        for part in functions(cubin):
            name = re.match(r"_ZN4sm90(\d+)(\w+)", part)
            assert name is not None, part[:80]
            found[name[2][: int(name[1])]] = part
    return found


def loops(part: str) -> list[str]:
    """The bodies of the innermost loops that have a WGMMA, in their order."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?;)", part)
    address = {int(at, 16): i for i, (at, _) in enumerate(lines)}
    spans = []
    for i, (at, text) in enumerate(lines):
        target = re.match(r"@!?U?P\d+ BRA 0x([0-9a-f]+)", text)  # others return from a wait
        if target and int(target[1], 16) < int(at, 16):
            first = address[int(target[1], 16)]
            if any("HGMMA" in text for _, text in lines[first : i + 1]):
                spans.append((first, i))
    inner = [(a, b) for a, b in spans if not any(a <= c and d < b for c, d in spans)]
    return ["\n".join(text for _, text in lines[a : b + 1]) for a, b in inner]


@pytest.mark.parametrize(("kernel", "want"), [("mla_prefill", PREFILL), ("mla_prefill_dq", DQ)])
def test_steps(machine_code, kernel, want):
    """The exponentials come between the issue of the WGMMAs and the last wait. ptxas moves waits
    over arithmetic, and this would put most of them behind it."""
    steps = loops(machine_code[kernel])
    assert len(steps) == len(want)
    for step, (wgmmas, exponentials, most) in zip(steps, want, strict=True):
        issued, *overlapped, _ = step.split("WARPGROUP.DEPBAR")
        assert issued.count("HGMMA") == wgmmas
        assert "".join(overlapped).count("MUFU.EX2") == exponentials
        assert step.count(";") <= most, step.count(";")
        assert not re.search(r"\b(STL|LDL|F2F|CCTL|MEMBAR\.\w+\.GPU)\b", step)


def test_steps_of_dkv(machine_code):
    """Warpgroup 0: 12 + 8 WGMMAs, with a mask and without; warpgroup 1: 8 + 8."""
    steps = loops(machine_code["mla_prefill_dkv"])
    assert sorted(step.count("HGMMA") for step in steps) == [8 + 8, 2 * (12 + 8)]
    for step in steps:
        assert not re.search(r"\b(STL|LDL|F2F|CCTL|MEMBAR\.\w+\.GPU)\b", step)
    ds, weights = sorted(steps, key=lambda step: step.count("HGMMA"))
    assert ds.count(";") <= 740, ds.count(";")
    # The reads of Pᵀ, and the products that give dSᵀ, come before the last wait.
    assert ds.split("WARPGROUP.DEPBAR")[-1].count("FMUL") == 0
    assert ds.split("WARPGROUP.DEPBAR")[-2].count("FMUL") >= 64
    overlapped = [part for part in weights.split("WARPGROUP.DEPBAR") if "MUFU.EX2" in part]
    assert [part.count("MUFU.EX2") for part in overlapped] == [64, 64]
