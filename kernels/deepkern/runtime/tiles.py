"""Which tile a matrix product is cut into, by a model of what bounds it: no call times anything.

Each architecture has a short list of tiles, all of which compile without spills (a test holds them
to it). The number of pipeline stages follows from the shared memory; the tile, from an estimate of
the time that the busiest multiprocessor takes, as `seconds` states it, unless `python -m bench
tune` found a faster one for the shape on a GPU and its find is committed (`tuned.py`). A wrong
choice costs speed, never correctness, and by the rules below not a bit of the result either.

Batch invariance. M enters the choice, so all tiles of one architecture must give a value the same
bits: each sums 128 values of K at a time in K's order, and each list stays within one family of
matrix instruction. Hence no tile of 16 or 32 rows where instructions take 64 (sm_90's wgmma,
sm_100's tcgen05; a smaller tile would fall back to mma.sync): there few rows of A become the right
operand (`swapped`), which may be narrow. On AMD one instruction width is kept. Where the sum over K
is cut into splits, N and K alone say into how many; M says only whether programs share them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from . import tuned
from .arch import Arch

BLOCK_K = 128
# Per multiprocessor; near enough for all parts in arch.py. Bytes a second, and seconds.
L2_RATE = 45e9
SHARED_RATE = 220e9
LATENCY = 1e-6  # from asking for a tile of A and B to having it
STEP = 1e-7  # barriers and addresses of a step, however small it is
FILL_AND_DRAIN = 2e-6  # a program's first loads, and its stores
SECOND_KERNEL = 2e-6  # from the end of the products to the sum of their shares
MAX_STAGES = {"cuda": 8, "hip": 4}  # on AMD, more take the compiler half a minute
# Where a step is still read, or copied to shared memory asynchronously, while the next one loads.
ASYNC = ("sm_90", "sm_100", "gfx950")

# (BLOCK_M, BLOCK_N, warps), and whether A is the right operand.
_WARP_TILES = ((16, 32, 4), (16, 64, 4), (32, 64, 4), (64, 64, 4), (64, 128, 8), (128, 128, 8))
_WARPGROUP_TILES = ((64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8))
_SWAPPED_TILES = ((16, 64, 4, True), (16, 128, 4, True), (32, 128, 4, True))
GEMM_TILES = {
    # 128x128 spills: operands widened to 16 bits take its registers. So does 32x64, by 8 bytes.
    "sm_80": (*_WARP_TILES[:2], *_WARP_TILES[3:-1]),
    "sm_89": (*_WARP_TILES[:2], *_WARP_TILES[3:]),  # as does 32x64 here
    "sm_90": _SWAPPED_TILES + _WARPGROUP_TILES,
    "sm_100": (*_SWAPPED_TILES, *_WARPGROUP_TILES[:2], (64, 128, 8), *_WARPGROUP_TILES[3:]),
    # 128x128 spills, and 64x64 is bound by the tensor core already.
    "sm_120": (*_WARP_TILES[:3], (64, 64, 8)),
    "gfx942": _WARP_TILES,
    "gfx950": _WARP_TILES[:1] + _WARP_TILES[2:],
}
# (architecture, form, rows of b that share a scale) -> tiles that spill there, on some Triton.
LACKING = {
    ("sm_80", "m_grouped", 1): ((64, 64), (64, 128)),
    ("sm_90", "k_grouped", 1): ((32, 128),),
    ("sm_100", "m_grouped", 1): ((64, 64), (64, 128), (128, 64)),
    ("sm_100", "k_grouped", 1): ((16, 64), (32, 128), (64, 32), (64, 128)),
    ("sm_120", "k_grouped", 1): ((64, 64),),
    ("gfx942", "m_grouped", 128): ((128, 128),),
}


@dataclass(frozen=True)
class GemmTile:
    """How a GEMM is cut: BLOCK_M x BLOCK_N of the output a program, BLOCK_K a step."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int  # steps in flight
    swapped: bool = False  # B is the left operand of the matrix instruction
    splits: int = 1  # runs of K that are summed for themselves first
    spread: bool = False  # a program for each of them
    origin: str = field(default="cost model", compare=False)  # who chose it

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

    @property
    def store_bytes(self) -> int:
        """Shared memory through which a float32 tile is stored, while the next one is loaded."""
        return self.BLOCK_M * self.BLOCK_N * 4

    def grid(self, arch: Arch, tiles: int) -> int:
        """Programs to launch for so many tiles, if each goes on to the next: what the GPU holds."""
        return min(tiles, arch.num_sms * self.residents)

    def options(self, arch: Arch) -> dict[str, int]:
        """The launch options of Triton that go with the tile."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"matrix_instr_nonkdim": 16} if arch.backend == "hip" else {})

    def __str__(self) -> str:
        shape = f"{self.BLOCK_M}x{self.BLOCK_N}x{BLOCK_K}"
        words = [shape, f"{self.num_warps} warps", f"{self.num_stages} stages"]
        if self.swapped:
            words.append("B left")
        if self.splits > 1:
            words.append(f"K in {self.splits} splits{' at once' if self.spread else ''}")
        return f"{', '.join(words)} ({self.origin})"


@functools.cache
def gemm_tiles(arch: Arch, b_rows: int) -> tuple[GemmTile, ...]:
    """The tiles that a GEMM may take on `arch` when a scale of B covers `b_rows` rows, 128 or 1."""
    if arch.name not in GEMM_TILES:
        raise LookupError(f"no GEMM tiles are listed for {arch.name}")
    tiles = (_with_stages(arch, GemmTile(*t[:3], 1, *t[3:])) for t in GEMM_TILES[arch.name])
    # A scale per row of B is a vector in registers, for which 128x128 has none to spare.
    return tuple(t for t in tiles if b_rows > 1 or t.BLOCK_M * t.BLOCK_N < 128 * 128)


def _with_stages(arch: Arch, tile: GemmTile) -> GemmTile:
    shared = arch.smem // tile.residents - 1024 - (tile.store_bytes if arch.tma else 0)
    steps = shared // tile.step_bytes
    stages = steps if arch.name in ASYNC else steps + 1
    return replace(tile, num_stages=min(stages, MAX_STAGES[arch.backend]))


def k_splits(arch: Arch, N: int, K: int) -> int:
    """Into how many runs a sum over K is cut: a power of 2, by N and K alone.

    More than one only where the tiles of a single row block would leave three quarters of the
    multiprocessors idle, and no run is shorter than four blocks.
    """
    tiles, blocks = -(-N // 64), -(-K // BLOCK_K)
    splits = 1
    if 4 * tiles <= arch.num_sms:
        while 2 * splits * tiles <= arch.num_sms and blocks >= 8 * splits:
            splits *= 2
    return splits


def choosable(arch: Arch, N: int, K: int, b_rows: int = 128, form: str = "dense") -> list[GemmTile]:
    """The tiles that a product with these N and K may take on `arch`; M has no say in it."""
    lacking = LACKING.get((arch.name, form, b_rows), ())
    tiles = [t for t in gemm_tiles(arch, b_rows) if (t.BLOCK_M, t.BLOCK_N) not in lacking]
    splits = k_splits(arch, N, K) if form == "dense" else 1
    if splits > 1:  # Few rows go to small tiles, many make programs enough. (Larger tiles spill.)
        few = [t for t in tiles if t.BLOCK_M * t.BLOCK_N < 64 * 128]
        many = [t for t in tiles if t.BLOCK_M == 64 and t.BLOCK_N < 128]
        tiles = [replace(t, splits=splits, spread=True) for t in few]
        tiles += [replace(t, splits=splits) for t in many]
    return tiles


_choosing: list[Callable[..., GemmTile]] = []


@contextlib.contextmanager
def choosing(choose: Callable[..., GemmTile]) -> Iterator[None]:
    """Inside, launches take the tile that `choose` says, with `gemm_tile`'s arguments: to tune."""
    _choosing.append(choose)
    try:
        yield
    finally:
        _choosing.pop()


def gemm_tile(
    arch: Arch, M: int, N: int, K: int, b_rows: int = 128, groups: int = 1, form: str = "dense"
) -> GemmTile:
    """The tile of an [M, N] product over K on `arch`: a committed one, else the model's.

    form: "dense", or "m_grouped" or "k_grouped" for `groups` such products.
    """
    choose = _choosing[-1] if _choosing else best_tile
    return choose(arch, M, N, K, b_rows, groups, form)


@functools.lru_cache(4096)
def best_tile(arch: Arch, M: int, N: int, K: int, b_rows: int, groups: int, form: str) -> GemmTile:
    found = tuned.find(arch.name, form, b_rows, groups, M, N, K)
    if found is None:
        return modelled_tile(arch, M, N, K, b_rows, groups, form)
    for tile in choosable(arch, N, K, b_rows, form):
        if (tile.BLOCK_M, tile.BLOCK_N, tile.spread) == found.tile:
            return replace(tile, origin=f"tuned at {found.varying}")
    raise found.error("a tile that this shape may take on " + arch.name, found.tile)


def modelled_tile(
    arch: Arch, M: int, N: int, K: int, b_rows: int = 128, groups: int = 1, form: str = "dense"
) -> GemmTile:
    """The tile with the lowest estimate."""
    tiles = choosable(arch, N, K, b_rows, form)
    return min(tiles, key=lambda tile: seconds(arch, tile, M, N, K, groups))


def seconds(
    arch: Arch, tile: GemmTile, M: int, N: int, K: int, groups: int = 1
) -> tuple[float, float]:
    """The estimated time of products, and to break a tie, the same without the memory's part."""
    shares = tile.splits if tile.spread else 1
    programs = groups * -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N) * shares
    rounds = max(-(-programs // arch.num_sms), 1)  # programs of the busiest multiprocessor
    together = min(rounds, tile.residents)
    flops = (arch.fp8_tflops if arch.native_fp8 else arch.bf16_tflops) * 1e12 / arch.num_sms
    step = max(
        2 * tile.BLOCK_M * tile.BLOCK_N * BLOCK_K / flops,
        (min(tile.BLOCK_M, M) + tile.BLOCK_N) * BLOCK_K / L2_RATE,
        _shared_reads(tile) / SHARED_RATE,
        LATENCY / ((tile.num_stages - 1) * together),
    )
    step += STEP / together
    steps = -(-K // (BLOCK_K * shares))
    work = rounds * steps * step + FILL_AND_DRAIN * -(-rounds // together)
    memory = groups * (M * K + N * K + 2 * M * N) / (arch.bandwidth * 1e9)
    if tile.spread:
        work += SECOND_KERNEL + 2 * 4 * shares * M * N / (arch.bandwidth * 1e9)
    return max(work, memory), work


def _shared_reads(tile: GemmTile) -> int:
    """Bytes that a step reads from shared memory: B once per 64 rows, A once per 128 columns."""
    left, right = tile.BLOCK_M, tile.BLOCK_N
    if tile.swapped:
        left, right = right, left
    return (-(-right // 128) * left + -(-left // 64) * right) * BLOCK_K
