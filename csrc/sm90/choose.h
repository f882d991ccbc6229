// Chooses among the compiled FP8 GEMM tiles with the cost model of
// kernels/deepkern/runtime/tiles.py: an estimate of the time of the busiest SM. Nothing is timed.
// Compiles with any host compiler.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace deepkern {

enum class GemmVariant { dense, contiguous, masked, k_grouped };

struct Sm90Tile {
  GemmVariant variant;
  int warpgroups;  // consumer warpgroups, each with 64 rows of the left MMA operand (lhs)
  int columns;     // rows of the right MMA operand (rhs)
  int stages;      // buffers in the operand ring
  int cluster;     // thread blocks that share a tile of B
  bool swapped;    // B is the lhs and A the rhs
  int b_rows;      // rows of B per scale: 1 or 128

  int lhs_rows() const { return 64 * warpgroups; }
  int d_rows() const { return (swapped ? columns : lhs_rows()) * cluster; }
  int d_columns() const { return swapped ? lhs_rows() : columns; }
  int resident_blocks() const { return warpgroups == 1 ? 2 : 1; }  // thread blocks per SM
};

inline constexpr Sm90Tile SM90_TILES[] = {
#define TILE(VARIANT, WARPGROUPS, COLUMNS, STAGES, CLUSTER, SWAPPED, B_ROWS) \
  {GemmVariant::VARIANT, WARPGROUPS, COLUMNS, STAGES, CLUSTER, SWAPPED, B_ROWS},
#include "fp8_gemm_tiles.h"
#undef TILE
};

constexpr int MAX_SPLITS = 8;           // the largest cluster size that every GPU supports
constexpr int64_t CLUSTER_SMS = 128;    // SMs of 132 that clusters of 4 or 8 blocks can use
constexpr int MIN_BLOCKS_PER_SPLIT = 4;  // K blocks

// The number of splits of K of a dense product: a power of 2 that depends on N and K only, so the
// bits of a row do not depend on M. Split-K starts where one row of tiles uses at most a quarter of
// the SMs. It stops at the number of SMs and at MIN_BLOCKS_PER_SPLIT.
inline int choose_num_splits(GemmVariant variant, int64_t N, int64_t K) {
  const int64_t tiles = (N + 127) / 128, blocks = (K + 127) / 128;
  int splits = 1;
  if (variant != GemmVariant::dense || 4 * tiles > CLUSTER_SMS) return splits;
  while (splits < MAX_SPLITS && 2 * splits * tiles <= CLUSTER_SMS &&
         blocks >= 2 * MIN_BLOCKS_PER_SPLIT * splits) {
    splits *= 2;
  }
  return splits;
}

// Thread blocks per cluster: those that split K of one tile of D, or those that share a tile of B.
inline int cluster_size(const Sm90Tile& t, int splits) { return t.swapped ? splits : t.cluster; }

// Thread blocks that an [M, N] product can use. M: rows of all groups if contiguous, else per
// group.
inline int64_t count_blocks(const Sm90Tile& t, int64_t M, int64_t N, int64_t groups, int splits) {
  if (t.variant == GemmVariant::contiguous) M = (M + groups - 1) / groups;
  const int64_t tile_rows = (M + t.d_rows() - 1) / t.d_rows();
  const int64_t tile_columns = (N + t.d_columns() - 1) / t.d_columns();
  return groups * tile_rows * cluster_size(t, splits) * tile_columns;
}

// The estimated time of the product with tile `t`, in seconds.
inline double estimate_seconds(const Sm90Tile& t, int64_t M, int64_t N, int64_t K, int64_t groups,
                               int64_t num_sms) {
  constexpr double L2_RATE = 45e9;       // bytes/s per SM
  constexpr double LATENCY = 1e-6;       // s, of a load
  constexpr double STEP_OVERHEAD = 1e-7;  // s per K block
  constexpr double FILL_AND_DRAIN = 2e-6;  // s per wave
  constexpr double FLOPS = 1979e12;      // FLOP/s of the GPU
  constexpr double SMEM_RATE = 220e9;    // bytes/s per SM
  constexpr double CLUSTER_REDUCE = 1e-6;  // s: partial sums through smem and a cluster barrier
  const int splits = choose_num_splits(t.variant, N, K), cluster = cluster_size(t, splits);
  const int64_t usable_sms =
      cluster > 2 ? std::max<int64_t>(num_sms * CLUSTER_SMS / 132, 1) : num_sms;
  const int64_t rounds = (count_blocks(t, M, N, groups, splits) + usable_sms - 1) / usable_sms;
  const int64_t resident = std::min<int64_t>(rounds, t.resident_blocks());
  if (rounds == 0) return 0;
  const double loaded_rows =
      std::min<int64_t>(t.d_rows() / t.cluster, M) + t.d_columns() / t.cluster;
  const double step =
      std::max({2.0 * t.lhs_rows() * t.columns * 128 / (FLOPS / num_sms),
                loaded_rows * 128 / L2_RATE, LATENCY / (t.stages * resident)}) +
      STEP_OVERHEAD / resident;
  const int64_t blocks = (K / (t.variant == GemmVariant::k_grouped ? groups : 1) + 127) / 128;
  const int64_t steps = t.swapped ? (blocks + splits - 1) / splits : blocks;
  const double reduce = splits == 1 ? 0
                        : t.swapped ? CLUSTER_REDUCE
                                    : (splits - 1) * 8.0 * t.lhs_rows() * t.columns / SMEM_RATE;
  return rounds * (steps * step + reduce) + FILL_AND_DRAIN * ((rounds + resident - 1) / resident);
}

// The index in SM90_TILES of the fastest tile by the estimate, or -1 if no tile fits. Ties go to
// the first tile.
inline int choose_tile(GemmVariant variant, int64_t M, int64_t N, int64_t K, int64_t groups,
                       int64_t b_rows, int64_t num_sms) {
  int best = -1;
  double best_seconds = 0;
  for (int i = 0; i < static_cast<int>(std::size(SM90_TILES)); ++i) {
    const Sm90Tile& t = SM90_TILES[i];
    if (t.variant != variant || t.b_rows != b_rows) continue;
    const double seconds = estimate_seconds(t, M, N, K, groups, num_sms);
    if (best < 0 || seconds < best_seconds) best = i, best_seconds = seconds;
  }
  return best;
}

}  // namespace deepkern
