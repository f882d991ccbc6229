"""Reads the resources of a compiled kernel: registers, spills, shared memory, key instructions.

NVIDIA: `cuobjdump` of Triton's own wheel on the cubin. AMD: the assembly text with its metadata.
A record is a dict for JSON; `read` documents its fields.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

from deepkern.runtime.arch import Arch

# Per SM: (threads, blocks, shared bytes). Vendors' occupancy tables; 64 K registers.
_NVIDIA_LIMITS = {
    "sm_80": (2048, 32, 164 << 10),
    "sm_89": (1536, 24, 100 << 10),
    "sm_90": (2048, 32, 228 << 10),
    "sm_100": (2048, 32, 228 << 10),
    "sm_120": (1536, 24, 100 << 10),
}
_NVIDIA_RESERVED = 1 << 10  # shared memory of every block that CUDA reserves

_SASS = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)([^;\n]*)", re.M
)
_GCN = re.compile(r"^\s+([a-z][a-z0-9_]+)", re.M)
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def read(kernel, target: Arch) -> dict:
    """The record of a CompiledKernel.

    registers: per thread.
    spill_bytes: stored to and loaded from local memory in loops, per thread, each instruction
        counted once. Spills that run once per block cost less than the registers they save.
    shared: bytes per block.
    blocks: resident blocks per SM, and limit: the resource that bounds them.
    matrix: tensor-core instructions by mnemonic.
    dots: tl.dot operations in the IR. Without matrix instructions they use plain arithmetic.
    tma, async_copy: bulk tensor copies, and asynchronous copies to shared memory.
    """
    threads = kernel.metadata.num_warps * target.warp_size
    read_asm = _read_cubin(kernel.asm["cubin"]) if target.backend == "cuda" else _read_gcn(kernel)
    record = {"shared": kernel.metadata.shared, "threads": threads, **read_asm}
    limits = blocks(target, record["registers"], record["shared"], threads)
    record["limit"] = min(limits, key=limits.get)
    record["blocks"] = limits[record["limit"]]
    record["dots"] = len(re.findall(r"\btt\.dot(?:_scaled)?\b", kernel.asm["ttir"]))
    return record


def _read_cubin(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_cuobjdump()), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return read_sass(text)


def _cuobjdump() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def read_sass(text: str) -> dict:
    """Registers, spills and instruction counts from what `cuobjdump -res-usage -sass` prints."""
    registers = int(re.search(r"\bREG:(\d+)", text)[1])
    instructions = [(int(at, 16), *rest) for at, *rest in _SASS.findall(text)]
    counts = Counter(name for _, name, *_ in instructions)
    loops = [(int(target[1], 16), at) for at, name, _, operands in instructions
             if name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", operands))
             and int(target[1], 16) < at]  # fmt: skip
    spill_bytes = 0
    for at, name, modifiers, _ in instructions:
        if name in ("STL", "LDL") and any(begin <= at <= end for begin, end in loops):
            spill_bytes += next((_WIDTH[m] for m in modifiers.split(".") if m in _WIDTH), 4)
    return {
        "registers": registers,
        "spill_bytes": spill_bytes,
        "matrix": {name: n for name, n in sorted(counts.items()) if name.endswith("MMA")},
        "tma": sum(counts[n] for n in ("UTMALDG", "UTMASTG", "UTMAREDG")),
        "async_copy": counts["LDGSTS"],
        "instructions": counts.total(),
    }


def _read_gcn(kernel) -> dict:
    return read_gcn(kernel.asm["amdgcn"])


def read_gcn(text: str) -> dict:
    """The same from AMD assembly. All scratch memory is spills: Triton uses it for nothing else."""

    def metadata(name: str) -> int:
        match = re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.M)
        return int(match[1]) if match else 0

    counts = Counter(_GCN.findall(text))
    matrix = {n: c for n, c in sorted(counts.items()) if n.startswith(("v_mfma_", "v_smfmac_"))}
    vgpr_spill_bytes = 4 * metadata("vgpr_spill_count")
    return {
        "registers": metadata("vgpr_count"),
        "spill_bytes": max(vgpr_spill_bytes, metadata("private_segment_fixed_size")),
        "matrix": matrix,
        "tma": 0,
        "async_copy": len(re.findall(r"^\s+(?:buffer|global)_load\w*.*\blds\b", text, re.M)),
        "instructions": counts.total(),
    }


def blocks(target: Arch, registers: int, shared: int, threads: int) -> dict[str, int]:
    """How many blocks fit on an SM by each limit; the smallest applies."""
    rule = _blocks_nvidia if target.backend == "cuda" else _blocks_amd
    return rule(target, registers, shared, threads)


def _blocks_nvidia(target: Arch, registers: int, shared: int, threads: int) -> dict[str, int]:
    most_threads, most_blocks, most_shared = _NVIDIA_LIMITS[target.name]
    warps = threads // target.warp_size
    per_warp = -(-registers * target.warp_size // 256) * 256  # allocated in units of 256 per warp
    return {
        "registers": 65536 // max(per_warp * warps, 1),
        "shared": most_shared // (shared + _NVIDIA_RESERVED),
        "threads": most_threads // threads,
        "blocks": most_blocks,
    }


def _blocks_amd(target: Arch, registers: int, shared: int, threads: int) -> dict[str, int]:
    """CDNA 3 and 4: four SIMDs, each with 512 registers a lane and at most 8 wavefronts."""
    waves = min(8, 512 // max(-(-registers // 8) * 8, 8))
    return {
        "registers": 4 * waves * target.warp_size // threads,
        "shared": target.smem // max(shared, 1),
        "threads": 4 * 8 * target.warp_size // threads,
    }
