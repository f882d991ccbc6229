"""Registers, spills and instructions of csrc/sm90 compiled with nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from bench.emulator import ROOT

from .conftest import TILES, Tile

VARIANTS = ("dense", "contiguous", "masked", "k_grouped")  # deepkern::GemmVariant
NVCC = shutil.which("nvcc")
# Registers per thread at launch of kernels that raise them later. With fewer, setmaxnreg.inc would
# wait forever.
RAISED = 168


def run(*command: str) -> str:
    got = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert got.returncode == 0, got.stderr[-3000:]
    return got.stdout + got.stderr


def tile_of(name: str) -> Tile | None:
    """The tile in the mangled name of a GEMM kernel, or None for other kernels."""
    found = re.search(r"11GemmVariantE(\d)E((?:Li\d+E){5})Lb(\d)ELi(\d+)E", name)
    if not found:
        return None
    variant, sizes, swapped, b_rows = found.groups()
    numbers = map(int, re.findall(r"\d+", sizes))
    return Tile(VARIANTS[int(variant)], *numbers, bool(int(swapped)), int(b_rows))


def compile(name: str, folder: Path) -> tuple[Path, str]:
    """The machine code of csrc/sm90/`name`.cu, and the output of ptxas."""
    if NVCC is None:
        pytest.skip("no nvcc on PATH")
    cubin = folder / f"{name}.cubin"
    source = ROOT / "csrc" / "sm90" / f"{name}.cu"
    target = ("-gencode", "arch=compute_90a,code=sm_90a")
    flags = (*target, "-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "-cubin")
    return cubin, run(NVCC, *flags, "-o", str(cubin), str(source))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[Path, str]:
    return compile("fp8_gemm", tmp_path_factory.mktemp("nvcc"))


def functions(cubin: Path) -> list[str]:
    """The machine code of each function, after its name."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return run(str(tool), "-sass", str(cubin)).split("Function : ")[1:]


@pytest.mark.slow
def test_registers_and_spills(compiled):
    parts = compiled[1].split("Compiling entry function '")[1:]
    tiles = set()
    for part in parts:
        tile = tile_of(part.splitlines()[0])
        tiles.add(tile)
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes (?:spill|stack)", part))
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        assert spilled == 0, f"{tile} spills {spilled} bytes"
        raised = tile is not None and tile.warpgroups == 2
        # One warpgroup: two blocks on an SM, or one with a deep ring.
        most = 32 if tile is None else 128 if tile.stages <= 10 else 255
        fits = registers == RAISED if raised else registers <= most
        assert fits, f"{tile}: {registers}"
    assert tiles == {*TILES, None}


@pytest.mark.slow
def test_instructions(compiled):
    for part in functions(compiled[0]):
        tile = tile_of(part.splitlines()[0])
        counts = Counter(re.findall(r"\b(QGMMA|UTMALDG|UTMASTG|STL|LDL)\b", part))
        assert not counts["STL"] and not counts["LDL"], f"{tile}: {counts}"
        if tile:
            assert counts["QGMMA"] == 4 * tile.waves and counts["UTMALDG"], f"{tile}: {counts}"
            assert bool(counts["UTMASTG"]) == (not tile.swapped and tile.variant != "contiguous")
            assert (".MULTICAST" in part) == (tile.cluster > 1), f"{tile}: {counts}"
            # Cluster split-K: eight loads of 16 bytes per lane from the other blocks.
            cluster_split_k = tile.variant == "dense" and tile.swapped
            assert len(re.findall(r"\bLD\.E\.128 ", part)) == 8 * cluster_split_k, tile


def instructions(part: str) -> list[tuple[int, str]]:
    """The address and the text of each instruction of a function."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", part, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found]


def innermost_loop(part: str, *opcodes: str) -> list[str]:
    """The instructions of the shortest loop that has all `opcodes`."""
    code = instructions(part)
    places = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (address, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)$", text)
        if target and int(target[1], 16) <= address:
            body = [text for _, text in code[places[int(target[1], 16)] : i + 1]]
            loops += [body] if all(o in "\n".join(body) for o in opcodes) else []
    return min(loops, key=len)


# The most instructions of a warp per K block, outside of the promotion: one FFMA per product, and
# one FMUL where each column has its own scale (every other FMUL for A as the rhs with one scale
# of B). The mainloop of k-grouped products contains the clearing of the last columns of K.
BUDGET = {"dense": 100, "contiguous": 100, "masked": 100, "k_grouped": 200}


@pytest.mark.slow
def test_mainloops(compiled):
    """No membar of the GPU, no invalidation of L1, no global loads; scales come before the wait."""
    for part in functions(compiled[0]):
        tile = tile_of(part.splitlines()[0])
        if tile is None:
            continue
        loop = innermost_loop(part, "QGMMA")
        text = "\n".join(loop)
        assert not re.search(r"MEMBAR\S*\.(GPU|SYS)|CCTL|LDG|STL|LDL", text), f"{tile}: {text}"
        waves = text.split("WARPGROUP.DEPBAR")
        assert len(waves) == tile.waves + 1, tile
        assert all("LDS" in wave for wave in waves[:-1]) and "LDS" not in waves[-1], tile
        promotion = len(re.findall(r"\b(?:FFMA|FMUL)\b", text))
        assert len(loop) - promotion <= BUDGET[tile.variant] + 20 * tile.waves, (
            f"{tile}: {len(loop)}"
        )
        scaled = tile.b_rows == 1 or tile.swapped
        products = tile.waves * tile.columns // 2
        assert promotion <= products * (2 if scaled else 1) + 2 * tile.waves, f"{tile}: {promotion}"


@pytest.mark.slow
def test_membars_of_the_gpu(compiled, tmp_path):
    """Only clusters need them: at their start and end, and to exchange partial sums."""
    for part in functions(compiled[0]) + functions(compile("mla_decode", tmp_path)[0]):
        tile = tile_of(part.splitlines()[0])
        exchanges = tile is not None and tile.splits_k and tile.swapped
        expected = 3 if exchanges else 2 if tile is not None and tile.cluster > 1 else 0
        assert len(re.findall(r"MEMBAR\S*\.GPU", part)) <= expected, tile
        assert len(re.findall(r"CCTL\.IVALL", part)) <= (8 if exchanges else expected), tile


@pytest.mark.slow
def test_scales_are_loaded_in_batches(compiled):
    """The producer loads the scales of several K blocks before it waits for a buffer."""
    for part in functions(compiled[0]):
        tile = tile_of(part.splitlines()[0])
        if tile is None:
            continue
        before, *_ = "\n".join(innermost_loop(part, "LDG.E.CONSTANT", "STS")).split(
            "SYNCS.PHASECHK"
        )
        assert len(re.findall(r"LDG\.E\.CONSTANT", before)) >= 4, f"{tile}: {before}"


# Registers at launch, and counts of instructions. WGMMAs in the loop of each warpgroup: 36 for Q·Kᵀ
# (16 values each), 4 for P·V of each of two tiles (16 tokens each; FP8: 8, and 2 in a loop for the
# received P), and those of a last even tile. TMA loads: nine column blocks. FP8 fetches: four
# places with six loads. Stores of out: 16 columns each.
MLA_KERNELS = {
    "mla_decodeILb0E": (RAISED, {"HGMMA": 2 * (36 + 4 + 4) + 4, "UTMALDG": 9, "STSM": 32}),
    "mla_decodeILb1E": (RAISED, {"HGMMA": 2 * (36 + 8 + 2) + 2, "LDG.E.NA": 24, "STSM": 32}),
    "mla_combine": (80, {}),
}


@pytest.mark.slow
def test_mla_decode(tmp_path):
    """Registers and instructions. ptxas must not serialize the WGMMAs."""
    cubin, output = compile("mla_decode", tmp_path)
    assert "serialized" not in output, output
    parts = output.split("Compiling entry function '")[1:]
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
    """The key in MLA_KERNELS of the function whose mangled name starts `part`."""
    return next(name for name in MLA_KERNELS if name in part.splitlines()[0])


@pytest.mark.slow
def test_mla_decode_prefetches_fp8_tokens(tmp_path):
    """The producer's loads of FP8 tokens come before its wait for the buffer."""
    part = next(p for p in functions(compile("mla_decode", tmp_path)[0]) if "Lb1E" in p[:200])
    loader = part.split("USETMAXREG.DEALLOC")[1]
    first_load = re.search(r"LDG\.E\.NA", loader).start()
    assert len(re.findall(r"LDG\.E\.NA", loader[: loader.index("SYNCS.PHASECHK")])) == 12
    assert first_load < loader.index("SYNCS.PHASECHK") < loader.index("F2FP.F16.E4M3")


@pytest.mark.slow
def test_mla_decode_overlaps_softmax_with_wgmma(tmp_path):
    """The exponentials of the odd tile come between P·V of the even tile and the wait for it."""
    part = next(p for p in functions(compile("mla_decode", tmp_path)[0]) if "Lb0E" in p[:200])
    overlapped = [p for p in part.split("WARPGROUP.DEPBAR") if "HGMMA.64x256" in p]
    exponentials = [p[p.index("HGMMA.64x256") :].count("MUFU.EX2") for p in overlapped]
    assert max(exponentials) >= 32, exponentials


@pytest.mark.slow
def test_mla_prefill(tmp_path):
    """No spills; in a step the exponentials come between the issue of P·V and the wait for it."""
    cubin, output = compile("mla_prefill", tmp_path)
    assert "serialized" not in output, output
    assert not re.search(r"[1-9]\d* bytes (spill|stack)", output), output
    part = next(p for p in functions(cubin) if "11mla_prefill" in p.splitlines()[0])
    registers = re.search(r"Used (\d+) registers, used 16 barriers", output)
    assert registers is not None and int(registers[1]) == RAISED
    assert not re.search(r"\b(STL|LDL)\b", part)
    # Three instances of Q·Kᵀ with 12 WGMMAs each and of P·V with 8, for 16 values or keys.
    assert part.count("HGMMA.64x128x16") == 3 * (12 + 8)
    # The loop of the unmasked steps: the last backward branch over both products.
    steps = [s for s in main_loops(part) if s.count("HGMMA") == 12 + 8]
    assert len(steps) == 2
    for step, instructions in zip(steps, (890, 520), strict=True):
        issued, softmax, after = step.split("WARPGROUP.DEPBAR")
        assert issued.count("HGMMA") == 12 + 8 and softmax.count("MUFU.EX2") == 64 + 2
        assert step.count(";") <= instructions and "F2F." not in step, step.count(";")
        assert "CCTL" not in step and "MEMBAR" not in step


def main_loops(part: str) -> list[str]:
    """The bodies of the innermost loops with WGMMAs: from the target of a backward branch on."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*;)", part)
    address = {int(at, 16): i for i, (at, _) in enumerate(lines)}
    loops = []
    for i, (at, text) in enumerate(lines):
        target = re.search(r"\bBRA (?:`\(.*\)|0x([0-9a-f]+))", text)
        if target and target[1] and int(target[1], 16) < int(at, 16):
            loops.append((address[int(target[1], 16)], i))
    inner = [(a, b) for a, b in loops if not any(a < c and d < b for c, d in loops)]
    bodies = ["\n".join(text for _, text in lines[a : b + 1]) for a, b in inner]
    return [body for body in bodies if "HGMMA" in body]
