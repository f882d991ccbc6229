// The tiles of fp8_gemm.cuh that are compiled, for GPUs and for the emulator:
// TILE(form, warpgroups of 64 left rows, right rows, buffers, blocks to a cluster, whether A is the
// right operand, rows of B that share a scale). Of two that are estimated alike, the first is taken.
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
