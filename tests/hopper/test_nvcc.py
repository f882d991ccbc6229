"""csrc/sm90 compiled by nvcc, where there is one: registers, spills and instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from bench.emulator import ROOT

from .conftest import TILES, Tile

FORMS = ("dense", "contiguous", "masked", "k_grouped")  # sm90::Form
NVCC = shutil.which("nvcc")
# Of a thread at launch, where warpgroups raise theirs later: with fewer, there would not be enough
# to raise them to, and setmaxnreg would wait for ever.
RAISED = 168


def run(*command: str) -> str:
    got = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert got.returncode == 0, got.stderr[-3000:]
    return got.stdout + got.stderr


def tile_of(name: str) -> Tile | None:
    """The tile that a mangled kernel's name is about, if it is about one."""
    found = re.search(r"4FormE(\d)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELb(\d)ELi(\d+)E", name)
    if not found:
        return None
    form, groups, columns, stages, cluster, swapped, b_rows = map(int, found.groups())
    return Tile(FORMS[form], groups, columns, stages, cluster, bool(swapped), b_rows)


def compile(name: str, folder: Path) -> tuple[Path, str]:
    """The machine code of csrc/sm90/`name`.cu, and what ptxas says of it."""
    if NVCC is None:
        pytest.skip("no nvcc on PATH: csrc/sm90 is not compiled for a GPU here")
    cubin = folder / f"{name}.cubin"
    source = ROOT / "csrc" / "sm90" / f"{name}.cu"
    target = ("-gencode", "arch=compute_90a,code=sm_90a")
    flags = (*target, "-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "-cubin")
    said = run(NVCC, *flags, "-o", str(cubin), str(source))
    return cubin, said


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[Path, str]:
    return compile("fp8_gemm", tmp_path_factory.mktemp("nvcc"))


def functions(cubin: Path) -> list[str]:
    """The machine code of each function, its name first."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return run(str(tool), "-sass", str(cubin)).split("Function : ")[1:]


@pytest.mark.slow
def test_registers_and_spills(compiled):
    parts = compiled[1].split("Compiling entry function '")[1:]
    seen = set()
    for part in parts:
        tile = tile_of(part.splitlines()[0])
        seen.add(tile)
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes (?:spill|stack)", part))
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        assert spilled == 0, f"{tile} spills {spilled} bytes"
        raised = tile is not None and tile.groups == 2
        fits = registers == RAISED if raised else registers <= (128 if tile else 32)
        assert fits, f"{tile}: {registers}"
    assert seen == {*TILES, None}


@pytest.mark.slow
def test_instructions(compiled):
    for part in functions(compiled[0]):
        tile = tile_of(part.splitlines()[0])
        counts = Counter(re.findall(r"\b(QGMMA|UTMALDG|UTMASTG|STL|LDL)\b", part))
        assert not counts["STL"] and not counts["LDL"], f"{tile}: {counts}"
        if tile:
            assert counts["QGMMA"] == 4 and counts["UTMALDG"], f"{tile}: {counts}"
            assert bool(counts["UTMASTG"]) == (not tile.swapped and tile.form != "contiguous")
            assert (".MULTICAST" in part) == (tile.cluster > 1), f"{tile}: {counts}"
            # Other blocks' shares, 16 bytes a lane of each of eight: all in flight together.
            spread = tile.form == "dense" and tile.swapped
            assert len(re.findall(r"\bLD\.E\.128 ", part)) == 8 * spread, tile


# Registers at launch, and instructions. WGMMAs of each warpgroup's loop: 36 of 16 values of q and
# key, 4 of 16 tokens for either tile (FP8: two blocks of columns; of a tile that was given in a
# loop), and those of a last tile alone. Nine columns by TMA; FP8 tokens are asked for at four
# places, by six loads each. Of out, 16 columns a store.
MLA_KERNELS = {
    "mla_decodeILb0E": (RAISED, {"HGMMA": 2 * (36 + 4 + 4) + 4, "UTMALDG": 9, "STSM": 32}),
    "mla_decodeILb1E": (RAISED, {"HGMMA": 2 * (36 + 8 + 2) + 2, "LDG.E.NA": 24, "STSM": 32}),
    "mla_combine": (80, {}),
}


@pytest.mark.slow
def test_mla_decode(tmp_path):
    """Registers and instructions; WGMMAs follow each other without waits that ptxas put between."""
    cubin, said = compile("mla_decode", tmp_path)
    assert "serialized" not in said, said
    parts = said.split("Compiling entry function '")[1:]
    assert len(parts) == len(MLA_KERNELS)
    for part in parts:
        name = mla_kernel(part)
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes (?:spill|stack)", part))
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        assert spilled == 0, f"{name} spills {spilled} bytes"
        fits = registers == RAISED if "decode" in name else registers <= MLA_KERNELS[name][0]
        assert fits, f"{name}: {registers}"
    for part in functions(cubin):
        name = mla_kernel(part)
        counts = Counter(re.findall(r"\b(HGMMA|UTMALDG|LDG\.E\.NA|STSM|STL|LDL)\b", part))
        assert counts == MLA_KERNELS[name][1], f"{name}: {counts}"


def mla_kernel(part: str) -> str:
    """Which of MLA_KERNELS a part that begins with a mangled name is about."""
    return next(name for name in MLA_KERNELS if name in part.splitlines()[0])


@pytest.mark.slow
def test_mla_decode_asks_for_fp8_tokens_before_it_waits(tmp_path):
    """In the loader's loop no token is asked for only once its buffer is free."""
    part = next(p for p in functions(compile("mla_decode", tmp_path)[0]) if "Lb1E" in p[:200])
    loader = part.split("USETMAXREG.DEALLOC")[1]
    first_load = re.search(r"LDG\.E\.NA", loader).start()
    assert len(re.findall(r"LDG\.E\.NA", loader[: loader.index("SYNCS.PHASECHK")])) == 12
    assert first_load < loader.index("SYNCS.PHASECHK") < loader.index("F2FP.F16.E4M3")


@pytest.mark.slow
def test_mla_decode_makes_weights_while_products_run(tmp_path):
    """The seesaw: between a P · V and the wait for it stand the exponentials of the other tile."""
    part = next(p for p in functions(compile("mla_decode", tmp_path)[0]) if "Lb0E" in p[:200])
    waited_for = [p for p in part.split("WARPGROUP.DEPBAR") if "HGMMA.64x256" in p]
    meanwhile = [p[p.index("HGMMA.64x256") :].count("MUFU.EX2") for p in waited_for]
    assert max(meanwhile) >= 32, meanwhile
