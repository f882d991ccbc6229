"""How long the hardware takes at least for the counts of a profile, for each of its limits.

Each limit is the time of one unit that works without a pause while all others are free. A kernel
takes at least as long as its longest limit. Two kinds:

- CERTAIN: counts that the compiler behind PTX cannot lower: tensor cores, floating-point and
  special functions, shuffles, passes over shared memory, bytes that the launch has to move.
- estimates: integer arithmetic, conversions and issue slots, because ptxas merges and removes such
  instructions, and L2, because the L1 cache serves a part of what loads ask for.

Sources. Operations per SM and clock: CUDA C++ Best Practices Guide, "Throughput of native
arithmetic instructions"; conversions to narrower floats are its 16 per clock. Tensor FLOPS per SM
and clock: NVIDIA's white papers of A100, H100, Ada and Blackwell; with the peak in runtime/arch.py
they give the clock. Shared memory has 32 banks of 4 bytes per clock and an SM 4 schedulers (CUDA
programming guide). L2: 5120 bytes per clock on A100 and H100 (PMC10448217, table 3, has 7219 and
8986 GB/s at 1410 and 1755 MHz); of the others no figure is known here, and L2 is no limit there.

Shared memory counts operands that wgmma and tcgen05 read and bytes that copies write, without
conflicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deepkern.runtime.arch import Arch
from deepkern.runtime.profile import Launch, Statement
from deepkern.testing.costs import Cost


@dataclass(frozen=True)
class Rates:
    """Per SM and clock: dense bf16 tensor FLOPS, and lanes of an instruction of each kind."""

    tensor: int
    fp32: int
    half: int  # lanes of f16x2
    integer: int
    widen: int = 64  # conversions, other than to a narrower float
    narrow: int = 16
    special: int = 16
    shuffle: int = 32
    shared_bytes: int = 128
    issue: int = 4
    l2_bytes: int | None = None  # of all SMs together


RATES = {
    "sm_80": Rates(2048, 64, 128, 64, l2_bytes=5120),
    "sm_89": Rates(1024, 128, 64, 64),
    "sm_90": Rates(4096, 128, 128, 64, l2_bytes=5120),
    "sm_100": Rates(8192, 128, 128, 64),
    "sm_120": Rates(512, 128, 64, 128),
}
CERTAIN = ("tensor", "fp32", "special", "shuffle", "shared", "HBM")
ESTIMATES = ("integer", "convert", "issue", "L2")
NAMES = {
    "tensor": "tensor cores",
    "fp32": "FP32 and FP16 arithmetic",
    "special": "special functions (exp2, sqrt, division)",
    "shuffle": "warp shuffles",
    "shared": "shared memory and L1",
    "HBM": "HBM",
    "integer": "integer arithmetic and predicates",
    "convert": "conversions",
    "issue": "issue slots",
    "L2": "L2",
}
SECTOR = 32
_FP8 = ("e4m3", "e5m2", "f8f6f4", "s8", "u8")
_NARROW = ("f16", "bf16", "f16x2", "bf16x2", "e4m3x2", "e5m2x2")


def clock(target: Arch) -> float:
    """The clock in Hz at which the tensor cores reach the published peak."""
    return target.bf16_tflops * 1e12 / (target.num_sms * RATES[target.name].tensor)


def is_fp8(s: Statement, target: Arch) -> bool:
    """Whether an MMA runs at the FP8 rate. On sm_90 and sm_100 mma.sync of FP8 is f16 inside."""
    if s.opcode.startswith("mma.sync") and target.name in ("sm_90", "sm_100"):
        return False
    return target.fp8_tflops > 0 and any(word in s.opcode for word in _FP8)


def is_narrowing(s: Statement) -> bool:
    """Whether a cvt makes 16- or 8-bit floats from wider ones."""
    words = s.opcode.split(".")
    return len(words) > 2 and words[-1] == "f32" and words[-2] in _NARROW


def imbalance(launch: Launch, target: Arch) -> float:
    """Work of the SM that has most over the mean. Exact if all blocks issue the same."""
    if launch.uniform:
        return math.ceil(launch.blocks / target.num_sms) * target.num_sms / launch.blocks
    issued = launch.total("issued") * launch.scale
    return max(1.0, launch.most_issued * target.num_sms / issued)


def tensor_cycles(launch: Launch, target: Arch) -> float:
    rate = RATES[target.name].tensor
    fp8_rate = rate * target.fp8_tflops / target.bf16_tflops
    cycles = 0.0
    for s in launch.statements:
        if s.flops:
            slower = 2 if "tf32" in s.opcode else 1
            cycles += s.flops * slower / (fp8_rate if is_fp8(s, target) else rate)
    return cycles


def shared_cycles(launch: Launch, target: Arch) -> float:
    """Passes over shared memory, operands of MMAs and copies into it, and accesses through L1."""
    bytes_moved = launch.total("bytes", "tensor_core", "async_copy")
    bytes_moved += launch.total("sectors", "global") * SECTOR
    return launch.total("wavefronts") + bytes_moved / RATES[target.name].shared_bytes


def cycles(launch: Launch, target: Arch) -> dict[str, float]:
    """Clocks of all SMs together for each limit of the SM."""
    rates = RATES[target.name]
    conversions = [s for s in launch.statements if s.kind == "convert"]
    narrow = sum(s.lanes for s in conversions if is_narrowing(s))
    wide = sum(s.lanes for s in conversions) - narrow
    issued = launch.total("issued") - launch.total("issued", "move")
    return {
        "tensor": tensor_cycles(launch, target),
        "fp32": launch.total("lanes", "float") / rates.fp32
        + launch.total("lanes", "half") / rates.half,
        "special": launch.total("lanes", "special") / rates.special,
        "shuffle": launch.total("lanes", "shuffle") / rates.shuffle,
        "shared": shared_cycles(launch, target),
        "integer": launch.total("lanes", "integer", "predicate") / rates.integer,
        "convert": wide / rates.widen + narrow / rates.narrow,
        "issue": issued / rates.issue,
    }


def times(launch: Launch, target: Arch) -> dict[str, float]:
    """Seconds for each limit. HBM: the distinct sectors, of the whole grid only."""
    factor = launch.scale * imbalance(launch, target) / target.num_sms / clock(target)
    result = {name: n * factor for name, n in cycles(launch, target).items()}
    l2 = RATES[target.name].l2_bytes
    if l2 is not None:
        result["L2"] = launch.total("sectors") * SECTOR * launch.scale / l2 / clock(target)
    if launch.blocks_run == launch.blocks:
        sectors = launch.sectors_read + launch.sectors_written
        result["HBM"] = sectors * SECTOR / (target.bandwidth * 1e9)
    return result


def roof(cost: Cost, target: Arch) -> float:
    """The least seconds of the op: its useful FLOPs at the peak, its bytes at the bandwidth."""
    tflops = target.fp8_tflops if cost.fp8 and target.fp8_tflops else target.bf16_tflops
    return max(cost.flops / (tflops * 1e12), cost.bytes / (target.bandwidth * 1e9))


def resident_blocks(launch: Launch, target: Arch, registers: int | None) -> dict[str, int]:
    """Blocks that fit on an SM by each limit; without `registers` where they are not known."""
    from .assembly import blocks

    limits = blocks(target, registers or 1, launch.shared, launch.threads)
    if registers is None:
        del limits["registers"]
    return limits
