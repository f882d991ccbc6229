"""Registers, spills and instructions of csrc/sm90 compiled with nvcc."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from bench import hopper
from bench.emulator import ROOT, alone

from .conftest import TILES, Tile

pytestmark = pytest.mark.proof
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


def compile(name: str) -> tuple[Path, str]:
    """The machine code of csrc/sm90/`name`.cu, and the output of ptxas; once for each content."""
    if NVCC is None:
        pytest.skip("no nvcc on PATH")
    target = ("-gencode", "arch=compute_90a,code=sm_90a")
    flags = (*target, "-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "-cubin")
    texts = [text for item in sorted(hopper.sources().items()) for text in item]
    content = "\0".join([run(NVCC, "--version"), *flags, *texts])
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    cubin = ROOT / "build" / "nvcc" / f"{name}-{digest}.cubin"
    printed = cubin.with_suffix(".txt")
    with alone(cubin):
        if not cubin.exists():
            fresh = cubin.with_suffix(f".{os.getpid()}")
            source = str(ROOT / "csrc" / "sm90" / f"{name}.cu")
            printed.write_text(run(NVCC, *flags, "-o", str(fresh), source))
            os.replace(fresh, cubin)
    return cubin, printed.read_text()


@pytest.fixture(scope="module")
def compiled() -> tuple[Path, str]:
    return compile("fp8_gemm")


@pytest.fixture(scope="module")
def mla_compiled() -> tuple[Path, str]:
    return compile("mla_decode")


@pytest.fixture(scope="module")
def mla_functions(mla_compiled) -> dict[str, str]:
    """The machine code of the kernels of mla_decode.cu, by key in MLA_KERNELS."""
    return {mla_kernel(part): part for part in functions(mla_compiled[0])}


def functions(cubin: Path) -> list[str]:
    """The machine code of each function, after its name."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return run(str(tool), "-sass", str(cubin)).split("Function : ")[1:]


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


def innermost_loop(part: str, *opcodes: str, count: int = 1) -> list[str]:
    """The instructions of the shortest loop that has each of `opcodes` `count` times."""
    code = instructions(part)
    places = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (address, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)$", text)
        if target and int(target[1], 16) <= address:
            body = [text for _, text in code[places[int(target[1], 16)] : i + 1]]
            loops += [body] if all("\n".join(body).count(o) >= count for o in opcodes) else []
    return min(loops, key=len)


# The most instructions of a warp per K block, outside of the promotion: one FFMA per product, and
# one FMUL where each column has its own scale (every other FMUL for A as the rhs with one scale
# of B). The mainloop of k-grouped products contains the clearing of the last columns of K.
BUDGET = {"dense": 100, "contiguous": 100, "masked": 100, "k_grouped": 200}


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


def test_membars_of_the_gpu(compiled, mla_functions):
    """Only clusters need them: at their start and end, and to exchange partial sums."""
    for part in [*functions(compiled[0]), *mla_functions.values()]:
        tile = tile_of(part.splitlines()[0])
        exchanges = tile is not None and tile.splits_k and tile.swapped
        expected = 3 if exchanges else 2 if tile is not None and tile.cluster > 1 else 0
        assert len(re.findall(r"MEMBAR\S*\.GPU", part)) <= expected, tile
        assert len(re.findall(r"CCTL\.IVALL", part)) <= (8 if exchanges else expected), tile


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
# received P), and those of a last even tile. TMA loads: nine column blocks of tokens; those of the
# queries in a loop, of which nvcc unrolls one. FP8 fetches: four places with ten loads, two with
# the scales of a token whose scales are not finite.
# Asynchronous copies of gathered tokens: 16 and 20 for the two pieces. Of sparse attention, the
# copies of each piece arrive at its barrier, and no thread waits for them. The second template
# argument is SPARSE.
MLA_KERNELS = {
    "mla_decodeILb0ELb0E": (RAISED, {"HGMMA": 2 * (36 + 4 + 4) + 4, "UTMALDG": 9 + 2,
                                     "LDGSTS": 36, "LDGDEPBAR": 2}),
    "mla_decodeILb1ELb0E": (RAISED, {"HGMMA": 2 * (36 + 8 + 2) + 2, "LDG.E.NA": 4 * 10 + 2,
                                     "UTMALDG": 2}),
    "mla_decodeILb0ELb1E": (RAISED, {"HGMMA": 2 * (36 + 4 + 4) + 4, "UTMALDG": 2, "LDGSTS": 36,
                                     "ARRIVES.LDGSTSBAR": 2}),
    "mla_decodeILb1ELb1E": (RAISED, {"HGMMA": 2 * (36 + 8 + 2) + 2, "LDG.E.NA": 4 * 10 + 2,
                                     "UTMALDG": 2}),
    "mla_combine": (80, {}),
}  # fmt: skip


def test_mla_decode(mla_compiled, mla_functions):
    """Registers and instructions. ptxas must not serialize the WGMMAs."""
    _, output = mla_compiled
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
    for name, part in mla_functions.items():
        watched = r"HGMMA|UTMALDG|LDGSTS|LDG\.E\.NA|F2F|LDGDEPBAR|ARRIVES\.LDGSTSBAR"
        counts = Counter(re.findall(rf"\b({watched})\b", part))
        assert counts == MLA_KERNELS[name][1], f"{name}: {counts}"
        assert not re.search(r"MEMBAR\.\w+\.GPU|CCTL\.IVALL", part), name


def mla_kernel(part: str) -> str:
    """The key in MLA_KERNELS of the function whose mangled name starts `part`."""
    return next(name for name in MLA_KERNELS if name in part.splitlines()[0])


@pytest.mark.parametrize("sparse", [0, 1])
def test_mla_decode_prefetches_fp8_tokens(mla_functions, sparse):
    """The producer's loads of FP8 tokens come before its wait for the buffer."""
    part = mla_functions[f"mla_decodeILb1ELb{sparse}E"]
    loader = part.split("USETMAXREG.DEALLOC")[1]
    first_load = re.search(r"LDG\.E\.NA", loader).start()
    # The first wait is for the queries' buffer, before the loads.
    wait = loader.index("SYNCS.PHASECHK", first_load)
    assert len(re.findall(r"LDG\.E\.NA", loader[:wait])) == 20
    assert wait < loader.index("F2FP.F16.E4M3")


def test_gather_has_all_copies_in_flight(mla_functions):
    """The producer of mla_decode starts the 36 copies of a tile before it waits for the first of
    them. That of sparse attention does not wait: test_mla_sparse.py counts the copies in flight."""
    loader = mla_functions["mla_decodeILb0ELb0E"].split("USETMAXREG.DEALLOC")[1]
    copies = loader[loader.index("LDGSTS") :]
    assert len(re.findall("LDGSTS", copies[: copies.index("DEPBAR.LE")])) == 36


# The most instructions of a warp in the loops of a kernel, by an opcode and its count there: of
# a consumer warpgroup over a pair of tiles; of the producer over a tile (FP8: over 32 tokens),
# the rare loads of scales included.
LOOPS = {
    "mla_decodeILb0ELb1E": (("HGMMA", 44, 930), ("LDGSTS", 36, 270)),
    "mla_decodeILb1ELb1E": (("HGMMA", 46, 1350), ("F2FP.F16.E4M3", 64, 480)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_sparse_attention(mla_functions, name):
    for opcode, count, most in LOOPS[name]:
        loop = innermost_loop(mla_functions[name], opcode, count=count)
        assert not re.search(r"\b(STL|LDL)\b", "\n".join(loop)), name
        assert len(loop) <= most, f"{name}: {len(loop)}"


def test_mla_decode_overlaps_softmax_with_wgmma(mla_functions):
    """The exponentials of the odd tile come between P·V of the even tile and the wait for it."""
    part = mla_functions["mla_decodeILb0ELb0E"]
    overlapped = [p for p in part.split("WARPGROUP.DEPBAR") if "HGMMA.64x256" in p]
    exponentials = [p[p.index("HGMMA.64x256") :].count("MUFU.EX2") for p in overlapped]
    assert max(exponentials) >= 32, exponentials


def opcodes(part: str) -> list[str]:
    """Opcodes of machine code, each with its modifiers."""
    lines = re.findall(r"/\*[0-9a-f]{4,5}\*/ +(?:@!?U?P\w+ )?([A-Z][\w.]*)", part)
    assert len(lines) > 100
    return lines


@pytest.fixture(scope="module")
def bf16_decode(mla_functions) -> str:
    return mla_functions["mla_decodeILb0ELb0E"]


def test_mla_decode_publishes_p_before_it_scales(bf16_decode):
    """Between the scores of an even tile and the arrival that publishes P, the 128 sums of
    P·V are not scaled: that comes after the arrival. Warpgroup 0 arrives at barrier 2."""
    before, after = bf16_decode.split("BAR.ARV 0x2,")
    softmax = opcodes(before[before.rindex("WARPGROUP.DEPBAR") :])
    assert softmax.count("FMUL") < 20 and softmax.count("MUFU.EX2") >= 32
    scaling = opcodes(after[: after.index("HGMMA")])
    assert scaling.count("FMUL") >= 120


def test_mla_decode_softmax_instructions(bf16_decode):
    """Per warpgroup: one FMNMX and one FFMA a score, no chain of comparisons and selections."""
    code = opcodes(bf16_decode.split("USETMAXREG.DEALLOC")[0])
    counts = Counter(op.split(".")[0] for op in code)
    # 30 for positive and 30 for negative scales, and those of the shuffles.
    assert 2 * 60 <= counts["FMNMX"] <= 2 * 70, counts
    assert counts["FSETP"] < 60, counts  # tests for -inf, the epilogue
    loops = re.findall(r"HGMMA\.64x64x16", bf16_decode)
    assert len(loops) == 72
    scores = bf16_decode[bf16_decode.index("HGMMA.64x64x16") :].split("WARPGROUP.DEPBAR")[0]
    # 36 WGMMAs with four instructions for two descriptors each, and the waits.
    assert len(opcodes(scores)) < 36 * 6, len(opcodes(scores))
