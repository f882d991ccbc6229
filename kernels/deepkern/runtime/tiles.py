"""Tile choice of the FP8 GEMMs: an analytic cost model, no timing at call time.

Each architecture has a short list of tiles. All of them compile without spills, which a test checks
(bench/budgets.json). The number of pipeline stages follows from the shared memory. The tile with
the lowest estimated time is used (`estimate_seconds`), unless `python -m bench tune` found a faster
one for the shape on a GPU and the result is committed (`tuned.py`). A wrong choice costs speed. It
changes no result, not even a bit, by the following rules.

Batch invariance. M takes part in the choice, so all tiles of one architecture must give a value the
same bits:

- each tile sums 128 values of K at a time, in the order of K;
- the tiles of one architecture use one family of matrix instruction. On sm_90 (wgmma) and sm_100
  (tcgen05), whose instructions take 64 rows, there is no tile of 16 or 32 rows of A, because it
  would fall back to mma.sync. There, small M becomes the right operand (`swapped`), which can be
  narrow. On AMD the instruction width is fixed;
- the number of split-K parts depends on N and K only. M decides whether several programs or one
  program sums them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from . import tuned
from .arch import Arch

BLOCK_K = 128
# Per SM, about right for all products in arch.py. Bytes per second, and seconds.
L2_RATE = 45e9
SMEM_RATE = 220e9
LOAD_LATENCY = 1e-6  # from the issue of the loads of A and B to their arrival
STEP_OVERHEAD = 1e-7  # barriers and address arithmetic of one step
FILL_AND_DRAIN = 2e-6  # the first loads of a program, and its stores
SECOND_KERNEL = 2e-6  # launch of the split-K reduction after the GEMM
MAX_STAGES = {"cuda": 8, "hip": 4}  # more than 4 take half a minute to compile on AMD
# Targets on which each stage needs a buffer of its own, because loads are asynchronous.
ASYNC = ("sm_90", "sm_100", "gfx950")

# (BLOCK_M, BLOCK_N, num_warps), and whether the operands are swapped.
_WARP_TILES = ((16, 32, 4), (16, 64, 4), (32, 64, 4), (64, 64, 4), (64, 128, 8), (128, 128, 8))
_WARPGROUP_TILES = ((64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8))
_SWAPPED_TILES = ((16, 64, 4, True), (16, 128, 4, True), (32, 128, 4, True))
GEMM_TILES = {
    # 128x128 spills, because operands are widened to 16 bits in registers; 32x64 spills 8 bytes.
    "sm_80": (*_WARP_TILES[:2], *_WARP_TILES[3:-1]),
    "sm_89": (*_WARP_TILES[:2], *_WARP_TILES[3:]),  # 32x64 spills
    "sm_90": _SWAPPED_TILES + _WARPGROUP_TILES,
    "sm_100": (*_SWAPPED_TILES, *_WARPGROUP_TILES[:2], (64, 128, 8), *_WARPGROUP_TILES[3:]),
    # 128x128 spills; 64x64 is already bound by the tensor core.
    "sm_120": (*_WARP_TILES[:3], (64, 64, 8)),
    "gfx942": _WARP_TILES,
    "gfx950": _WARP_TILES[:1] + _WARP_TILES[2:],
}
# (architecture, variant, rows of b per scale) -> tiles that spill with some version of Triton or
# are at the register limit.
SPILLING_TILES = {
    ("sm_80", "m_grouped", 1): ((64, 64), (64, 128)),
    ("sm_90", "m_grouped", 1): ((128, 128),),  # at the register limit with Triton 3.7.1
    ("sm_90", "k_grouped", 1): ((32, 128),),
    ("sm_100", "m_grouped", 1): ((64, 64), (64, 128), (128, 64)),
    ("sm_100", "k_grouped", 1): ((16, 64), (32, 128), (64, 32), (64, 128)),
    ("sm_120", "k_grouped", 1): ((64, 64),),
    ("gfx942", "m_grouped", 128): ((128, 128),),
}

# Tiles of the GEMMs of real dtypes, of those that the architecture has.
REAL_TILES = ((16, 32), (16, 64), (64, 64), (64, 128), (128, 128))


@dataclass(frozen=True)
class GemmTile:
    """The tile of one program: BLOCK_M x BLOCK_N of the output, BLOCK_K per step."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int  # pipeline stages
    swapped: bool = False  # B is the left operand of the matrix instruction
    num_splits: int = 1  # split-K parts, each summed separately first
    parallel_splits: bool = False  # one program per part; else one program sums them in order
    origin: str = field(default="cost model", compare=False)  # what chose the tile

    @property
    def GROUP_M(self) -> int:
        """Tile rows per L2 group: 1024 rows of A."""
        return 1024 // self.BLOCK_M

    @property
    def programs_per_sm(self) -> int:
        """Resident programs per SM: 8 warps, of 255 registers per thread, fill its registers."""
        return max(8 // self.num_warps, 1)

    @property
    def step_bytes(self) -> int:
        """Shared memory of one stage of A and B."""
        return (self.BLOCK_M + self.BLOCK_N) * BLOCK_K

    @property
    def store_bytes(self) -> int:
        """Shared memory of the float32 output tile, which is stored while the next tile loads."""
        return self.BLOCK_M * self.BLOCK_N * 4

    def grid(self, arch: Arch, num_tiles: int) -> int:
        """Grid size of a persistent launch: min(num_tiles, SMs x resident programs)."""
        return min(num_tiles, arch.num_sms * self.programs_per_sm)

    def options(self, arch: Arch) -> dict[str, int]:
        """The launch options of Triton for this tile."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"matrix_instr_nonkdim": 16} if arch.backend == "hip" else {})

    def __str__(self) -> str:
        shape = f"{self.BLOCK_M}x{self.BLOCK_N}x{BLOCK_K}"
        words = [shape, f"{self.num_warps} warps", f"{self.num_stages} stages"]
        if self.swapped:
            words.append("operands swapped")
        if self.num_splits > 1:
            how = "in parallel" if self.parallel_splits else "in one program"
            words.append(f"split-K {self.num_splits} {how}")
        return f"{', '.join(words)} ({self.origin})"


@functools.cache
def supported_tiles(arch: Arch, b_rows: int) -> tuple[GemmTile, ...]:
    """The tiles for `arch`, where one scale of B covers `b_rows` rows: 128 or 1."""
    if arch.name not in GEMM_TILES:
        raise LookupError(f"no GEMM tiles are listed for {arch.name}")
    tiles = (_with_stages(arch, GemmTile(*t[:3], 1, *t[3:])) for t in GEMM_TILES[arch.name])
    # Per-row B scales need one register per column; 128x128 spills with them, except on sm_90
    # (`block_scales_product` loads them at once there).
    if b_rows > 1 or arch.name == "sm_90":
        return tuple(tiles)
    return tuple(t for t in tiles if t.BLOCK_M * t.BLOCK_N < 128 * 128)


def _with_stages(arch: Arch, tile: GemmTile) -> GemmTile:
    smem = arch.smem // tile.programs_per_sm - 1024 - (tile.store_bytes if arch.tma else 0)
    steps = smem // tile.step_bytes
    stages = steps if arch.name in ASYNC else steps + 1
    return replace(tile, num_stages=min(stages, MAX_STAGES[arch.backend]))


def choose_num_splits(arch: Arch, N: int, K: int) -> int:
    """The number of split-K parts: a power of 2 that depends on N and K only.

    It is more than 1 only if one row of tiles leaves three quarters of the SMs idle. Each part has
    at least four blocks of 128.
    """
    tiles, blocks = -(-N // 64), -(-K // BLOCK_K)
    num_splits = 1
    if 4 * tiles <= arch.num_sms:
        while 2 * num_splits * tiles <= arch.num_sms and blocks >= 8 * num_splits:
            num_splits *= 2
    return num_splits


def candidate_tiles(
    arch: Arch, N: int, K: int, b_rows: int = 128, variant: str = "dense"
) -> list[GemmTile]:
    """The tiles to choose from for these N and K on `arch`; independent of M (batch invariance)."""
    spilling = SPILLING_TILES.get((arch.name, variant, b_rows), ())
    tiles = [t for t in supported_tiles(arch, b_rows) if (t.BLOCK_M, t.BLOCK_N) not in spilling]
    if variant.startswith("real"):
        tiles = [t for t in tiles if (t.BLOCK_M, t.BLOCK_N) in REAL_TILES]
    if variant == "real, unaligned":  # larger tiles spill: values are loaded one by one
        tiles = [t for t in tiles if t.BLOCK_M * t.BLOCK_N <= 16 * 64]
    num_splits = choose_num_splits(arch, N, K) if variant == "dense" else 1
    if num_splits > 1:
        # Small M uses small tiles with parallel splits; large M has programs enough. Larger tiles
        # spill with splits in one program.
        small = [t for t in tiles if t.BLOCK_M * t.BLOCK_N < 64 * 128]
        large = [t for t in tiles if t.BLOCK_M == 64 and t.BLOCK_N < 128]
        tiles = [replace(t, num_splits=num_splits, parallel_splits=True) for t in small]
        tiles += [replace(t, num_splits=num_splits) for t in large]
    return tiles


_overrides: list[Callable[..., GemmTile]] = []


@contextlib.contextmanager
def override_tile_choice(choose: Callable[..., GemmTile]) -> Iterator[None]:
    """Launches inside the block use the tile that `choose` returns, for tuning and tests.

    `choose` receives the arguments of `choose_gemm_tile`, by position.
    """
    _overrides.append(choose)
    try:
        yield
    finally:
        _overrides.pop()


def choose_gemm_tile(
    arch: Arch, M: int, N: int, K: int, b_rows: int = 128, groups: int = 1, variant: str = "dense"
) -> GemmTile:
    """The tile of an [M, N] GEMM over K on `arch`: tuned, else the one with the best estimate.

    variant: "dense"; or "m_grouped" or "k_grouped" for `groups` GEMMs of this size; or "real" or
    "real, unaligned" for GEMMs of 16-bit types, whose K counts bytes.
    """
    choose = _overrides[-1] if _overrides else tuned_or_modelled_tile
    return choose(arch, M, N, K, b_rows, groups, variant)


@functools.lru_cache(4096)
def tuned_or_modelled_tile(
    arch: Arch, M: int, N: int, K: int, b_rows: int, groups: int, variant: str
) -> GemmTile:
    """The committed tile of this or a near shape; else the one with the lowest estimate."""
    record = tuned.find(arch.name, variant, b_rows, groups, M, N, K)
    if record is None:
        return fastest_modelled_tile(arch, M, N, K, b_rows, groups, variant)
    for tile in candidate_tiles(arch, N, K, b_rows, variant):
        if (tile.BLOCK_M, tile.BLOCK_N, tile.parallel_splits) == record.tile:
            return replace(tile, origin=f"tuned at {record.varying}")
    raise record.error(f"a tile that is a candidate for this shape on {arch.name}", record.tile)


def fastest_modelled_tile(
    arch: Arch, M: int, N: int, K: int, b_rows: int = 128, groups: int = 1, variant: str = "dense"
) -> GemmTile:
    """The candidate with the lowest estimated time."""
    tiles = candidate_tiles(arch, N, K, b_rows, variant)
    return min(tiles, key=lambda tile: estimate_seconds(arch, tile, M, N, K, groups))


def estimate_seconds(
    arch: Arch, tile: GemmTile, M: int, N: int, K: int, groups: int = 1
) -> tuple[float, float]:
    """The estimated time of the GEMM; second, for ties, the same without the DRAM limit.

    The slowest SM processes `rounds` programs, `resident` of them at a time. One step along K takes
    the largest of: tensor core time, L2 traffic, shared memory reads, and the load latency that the
    pipeline does not hide.
    """
    splits = tile.num_splits if tile.parallel_splits else 1
    programs = groups * -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N) * splits
    rounds = max(-(-programs // arch.num_sms), 1)  # programs of the SM that has most
    resident = min(rounds, tile.programs_per_sm)
    flops = (arch.fp8_tflops if arch.native_fp8 else arch.bf16_tflops) * 1e12 / arch.num_sms
    step = max(
        2 * tile.BLOCK_M * tile.BLOCK_N * BLOCK_K / flops,
        (min(tile.BLOCK_M, M) + tile.BLOCK_N) * BLOCK_K / L2_RATE,
        _smem_bytes_read(tile) / SMEM_RATE,
        LOAD_LATENCY / ((tile.num_stages - 1) * resident),
    )
    step += STEP_OVERHEAD / resident
    steps = -(-K // (BLOCK_K * splits))
    work = rounds * steps * step + FILL_AND_DRAIN * -(-rounds // resident)
    dram = groups * (M * K + N * K + 2 * M * N) / (arch.bandwidth * 1e9)
    if tile.parallel_splits:
        work += SECOND_KERNEL + 2 * 4 * splits * M * N / (arch.bandwidth * 1e9)
    return max(work, dram), work


def _smem_bytes_read(tile: GemmTile) -> int:
    """Bytes read from shared memory per step: B once per 64 rows, A once per 128 columns."""
    lhs, rhs = tile.BLOCK_M, tile.BLOCK_N
    if tile.swapped:
        lhs, rhs = rhs, lhs
    return (-(-rhs // 128) * lhs + -(-lhs // 64) * rhs) * BLOCK_K
