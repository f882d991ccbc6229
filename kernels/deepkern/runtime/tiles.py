"""Which tile a matrix product is cut into, by a model of what bounds it: nothing is timed.

Each architecture has a short list of tiles, all of which compile without spills (a test holds them
to it). The number of pipeline stages follows from the shared memory; the tile, from an estimate of
the time that the busiest multiprocessor takes, as `seconds` states it. A wrong estimate costs
speed, never correctness, and by the rules below not a bit of the result either.

Batch invariance. M enters the choice, so all tiles of one architecture must give a value the same
bits: each sums 128 values of K at a time in K's order, and each list stays within one family of
matrix instruction. Hence no tile of 16 or 32 rows where instructions take 64 (sm_90's wgmma,
sm_100's tcgen05; a smaller tile would fall back to mma.sync), and one instruction width on AMD.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .arch import Arch

BLOCK_K = 128
# Per multiprocessor; near enough for all parts in arch.py. Bytes a second, and seconds.
L2_RATE = 45e9
SHARED_RATE = 220e9
LATENCY = 1e-6  # from asking for a tile of A and B to having it
STEP = 1e-7  # barriers and addresses of a step, however small it is
FILL_AND_DRAIN = 2e-6  # a program's first loads, and its stores
MAX_STAGES = {"cuda": 8, "hip": 4}  # on AMD, more take the compiler half a minute
# Where a step is still read, or copied to shared memory asynchronously, while the next one loads.
ASYNC = ("sm_90", "sm_100", "gfx950")

# (BLOCK_M, BLOCK_N, warps)
_WARP_TILES = ((16, 32, 4), (16, 64, 4), (32, 64, 4), (64, 64, 4), (64, 128, 8), (128, 128, 8))
_WARPGROUP_TILES = ((64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8))
GEMM_TILES = {
    "sm_80": _WARP_TILES[:-1],  # 128x128 spills: operands widened to 16 bits take its registers
    "sm_89": _WARP_TILES,
    "sm_90": _WARPGROUP_TILES,
    "sm_100": _WARPGROUP_TILES,
    "sm_120": _WARP_TILES[:-2],  # 128x128 spills, and 64x64 is bound by the tensor core already
    "gfx942": _WARP_TILES,
    "gfx950": _WARP_TILES[:1] + _WARP_TILES[2:],
}


@dataclass(frozen=True)
class GemmTile:
    """How a GEMM is cut: BLOCK_M x BLOCK_N of the output a program, BLOCK_K a step."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int  # steps in flight

    @property
    def GROUP_M(self) -> int:
        """Row blocks in the band that programs go through together: 1024 rows."""
        return 1024 // self.BLOCK_M

    @property
    def residents(self) -> int:
        """Programs that share a multiprocessor; registers and shared memory are divided by it."""
        return 8 // self.num_warps

    @property
    def step_bytes(self) -> int:
        """Shared memory for one step of A and B."""
        return (self.BLOCK_M + self.BLOCK_N) * BLOCK_K

    def options(self, arch: Arch) -> dict[str, int]:
        """The launch options of Triton that go with the tile."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"matrix_instr_nonkdim": 16} if arch.backend == "hip" else {})

    def __str__(self) -> str:
        shape = f"{self.BLOCK_M}x{self.BLOCK_N}x{BLOCK_K}"
        return f"{shape}, {self.num_warps} warps, {self.num_stages} stages"


@functools.cache
def gemm_tiles(arch: Arch, b_rows: int) -> tuple[GemmTile, ...]:
    """The tiles that a GEMM may take on `arch` when a scale of B covers `b_rows` rows, 128 or 1."""
    if arch.name not in GEMM_TILES:
        raise LookupError(f"no GEMM tiles are listed for {arch.name}")
    tiles = (_with_stages(arch, *tile) for tile in GEMM_TILES[arch.name])
    # A scale per row of B is a vector in registers, for which 128x128 has none to spare.
    return tuple(t for t in tiles if b_rows > 1 or t.BLOCK_M * t.BLOCK_N < 128 * 128)


def _with_stages(arch: Arch, block_m: int, block_n: int, warps: int) -> GemmTile:
    tile = GemmTile(block_m, block_n, warps, num_stages=1)
    steps = (arch.shared // tile.residents - 1024) // tile.step_bytes
    stages = steps if arch.name in ASYNC else steps + 1
    return GemmTile(block_m, block_n, warps, min(stages, MAX_STAGES[arch.backend]))


@functools.lru_cache(4096)
def gemm_tile(arch: Arch, M: int, N: int, K: int, b_rows: int = 128) -> GemmTile:
    """The tile of an [M, N] product over K on `arch`: the one with the lowest estimate."""
    return min(gemm_tiles(arch, b_rows), key=lambda tile: seconds(arch, tile, M, N, K))


def seconds(arch: Arch, tile: GemmTile, M: int, N: int, K: int) -> tuple[float, float]:
    """The estimated time of a product, and to break a tie, the same without the memory's part."""
    programs = -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N)
    rounds = -(-programs // arch.units)  # programs of the busiest multiprocessor
    together = min(rounds, tile.residents)
    flops = (arch.fp8_tflops if arch.native_fp8 else arch.bf16_tflops) * 1e12 / arch.units
    step = max(
        2 * tile.BLOCK_M * tile.BLOCK_N * BLOCK_K / flops,
        (min(tile.BLOCK_M, M) + tile.BLOCK_N) * BLOCK_K / L2_RATE,
        _shared_reads(tile) / SHARED_RATE,
        LATENCY / ((tile.num_stages - 1) * together),
    )
    step += STEP / together
    work = rounds * -(-K // BLOCK_K) * step + FILL_AND_DRAIN * -(-rounds // together)
    memory = (M * K + N * K + 2 * M * N) / (arch.bandwidth * 1e9)
    return max(work, memory), work


def _shared_reads(tile: GemmTile) -> int:
    """Bytes that a step reads from shared memory: B once per 64 rows, A once per 128 columns."""
    again_a, again_b = -(-tile.BLOCK_N // 128), -(-tile.BLOCK_M // 64)
    return (again_a * tile.BLOCK_M + again_b * tile.BLOCK_N) * BLOCK_K
