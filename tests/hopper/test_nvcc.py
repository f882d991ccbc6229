"""csrc/sm90 compiled by nvcc, where there is one: registers, spills and instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from .conftest import ROOT

NVCC = shutil.which("nvcc")
# A tile's template arguments -> the registers that it may have.
REGISTERS = {(2, 128, 4, 1): 168, (2, 128, 4, 2): 168, (1, 64, 6, 1): 128}
# What a tile must use: WGMMA on FP8, TMA to load and to store.
NEEDED = ("QGMMA", "UTMALDG", "UTMASTG")


def run(*command: str) -> str:
    got = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert got.returncode == 0, got.stderr[-3000:]
    return got.stdout + got.stderr


def tile_of(mangled: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"Li(\d+)E", mangled))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[Path, str]:
    """The machine code, and what ptxas says of it."""
    if NVCC is None:
        pytest.skip("no nvcc on PATH: csrc/sm90 is not compiled for a GPU here")
    cubin = tmp_path_factory.mktemp("nvcc") / "fp8_gemm_nt.cubin"
    source = ROOT / "csrc" / "sm90" / "fp8_gemm_nt.cu"
    target = ("-gencode", "arch=compute_90a,code=sm_90a")
    said = run(NVCC, *target, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", "-o", str(cubin),
               str(source))  # fmt: skip
    return cubin, said


@pytest.mark.slow
def test_registers_and_spills(compiled):
    parts = compiled[1].split("Compiling entry function '")[1:]
    found = {}
    for part in parts:
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes (?:spill|stack)", part))
        found[tile_of(part.splitlines()[0])] = (
            int(re.search(r"Used (\d+) registers", part)[1]),
            spilled,
        )
    assert found.keys() == REGISTERS.keys()
    for tile, (registers, spilled) in found.items():
        assert spilled == 0, f"{tile} spills {spilled} bytes"
        assert registers <= REGISTERS[tile], f"{tile} takes {registers} registers"


@pytest.mark.slow
def test_instructions(compiled):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for part in run(str(tool), "-sass", str(compiled[0])).split("Function : ")[1:]:
        counts = Counter(re.findall(r"\b(QGMMA|UTMALDG|UTMASTG|STL|LDL)\b", part))
        tile = tile_of(part.splitlines()[0])
        assert all(counts[name] for name in NEEDED), f"{tile}: {counts}"
        assert not counts["STL"] and not counts["LDL"], f"{tile}: {counts}"
        assert (".MULTICAST" in part) == (tile[3] > 1)
