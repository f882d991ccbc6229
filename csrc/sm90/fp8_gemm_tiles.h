// The compiled tiles of fp8_gemm.cuh, for GPUs and for the emulator:
// TILE(variant, consumer warpgroups of 64 lhs rows, rhs rows, stages, thread blocks per cluster,
// swapped (A is the rhs), rows of B per scale). The fields are those of Sm90Tile (choose.h). Among
// tiles with equal estimates the first is chosen.
TILE(dense, 2, 16, 10, 1, true, 128)
TILE(dense, 1, 16, 10, 1, true, 128)
TILE(dense, 2, 64, 8, 1, true, 128)
TILE(dense, 2, 128, 4, 2, false, 128)
TILE(dense, 2, 128, 4, 1, false, 128)
TILE(dense, 1, 64, 6, 1, false, 128)
TILE(dense, 2, 128, 4, 1, false, 1)
TILE(dense, 2, 32, 10, 1, true, 1)
TILE(contiguous, 2, 128, 4, 1, false, 128)
TILE(contiguous, 2, 32, 10, 1, true, 128)
TILE(contiguous, 2, 128, 4, 1, false, 1)
TILE(masked, 2, 128, 4, 1, false, 128)
TILE(masked, 2, 32, 10, 1, true, 128)
TILE(masked, 2, 128, 4, 1, false, 1)
TILE(k_grouped, 2, 128, 4, 1, false, 1)
TILE(k_grouped, 1, 64, 5, 1, false, 1)
