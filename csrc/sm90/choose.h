// Chooses among the compiled FP8 GEMM tiles by a cost model: an estimate of the time of the busiest
// SM. Nothing is timed. kernels/deepkern/runtime/tiles.py has another model, for Triton's tiles.
// Compiles with any host compiler.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace deepkern {

enum class GemmVariant { dense, contiguous, masked, k_grouped };

struct Sm90Tile {
  GemmVariant variant;
  int lhs_rows;   // rows of the left MMA operand (lhs): 64 for each wave of a consumer warpgroup
  int columns;    // rows of the right MMA operand (rhs)
  int stages;     // buffers in the operand ring
  int cluster_m;  // thread blocks of neighbouring tile rows that share a tile of B
  int cluster_n;  // thread blocks of neighbouring tile columns that share a tile of A
  bool swapped;   // B is the lhs and A the rhs
  int b_rows;     // rows of B per scale: 1 or 128

  constexpr int warpgroups() const { return lhs_rows == 64 ? 1 : 2; }  // consumers
  constexpr int waves() const { return lhs_rows / (64 * warpgroups()); }
  constexpr int cluster() const { return cluster_m * cluster_n; }
  constexpr int d_rows() const { return (swapped ? columns : lhs_rows) * cluster_m; }
  constexpr int d_columns() const { return (swapped ? lhs_rows : columns) * cluster_n; }
  // Thread blocks per SM. The 111 KiB are what half of an SM has for operands and a tile of D.
  constexpr int resident_blocks() const {
    const int bytes = stages * (lhs_rows + columns) * 128 + lhs_rows * columns * 4;
    return warpgroups() == 1 && bytes <= 111 << 10 ? 2 : 1;
  }
  // Two waves leave no smem for the sums of earlier splits.
  constexpr bool supports_splits() const { return waves() == 1; }
};

inline constexpr Sm90Tile SM90_TILES[] = {
#define TILE(VARIANT, ROWS, COLUMNS, STAGES, CLUSTER_M, CLUSTER_N, SWAPPED, B_ROWS) \
  {GemmVariant::VARIANT, ROWS, COLUMNS, STAGES, CLUSTER_M, CLUSTER_N, SWAPPED, B_ROWS},
#include "fp8_gemm_tiles.h"
#undef TILE
};

constexpr int MAX_SPLITS = 8;           // the largest cluster size that every GPU supports
constexpr int64_t CLUSTER_SMS = 128;    // SMs of 132 that clusters of 4 or 8 blocks can use
constexpr int MIN_BLOCKS_PER_SPLIT = 4;  // K blocks

// The number of splits of K of a dense product: a power of 2 that depends on N and K only, so the
// bits of a row do not depend on M. Split-K starts where one row of tiles of 64 columns uses less
// than half of the SMs. It stops at the number of SMs and at MIN_BLOCKS_PER_SPLIT. 64 SMs read at
// 3.8 TB/s (L2_RATE), nearly what the memory gives to all; and more rows than 64 would pay for
// splits.
inline int choose_num_splits(GemmVariant variant, int64_t N, int64_t K) {
  const int64_t tiles = (N + 63) / 64, blocks = (K + 127) / 128;
  int splits = 1;
  if (variant != GemmVariant::dense || 2 * tiles >= CLUSTER_SMS) return splits;
  while (splits < MAX_SPLITS && 2 * splits * tiles <= CLUSTER_SMS &&
         blocks >= 2 * MIN_BLOCKS_PER_SPLIT * splits) {
    splits *= 2;
  }
  return splits;
}

// Thread blocks per cluster: those that split K of one tile of D, or those that share an operand.
inline int cluster_size(const Sm90Tile& t, int splits) { return t.swapped ? splits : t.cluster(); }

// Thread blocks that an [M, N] product can use. M: rows of all groups if contiguous, else per
// group.
inline int64_t count_blocks(const Sm90Tile& t, int64_t M, int64_t N, int64_t groups, int splits) {
  if (t.variant == GemmVariant::contiguous) M = (M + groups - 1) / groups;
  const int64_t tile_rows = (M + t.d_rows() - 1) / t.d_rows();
  const int64_t tile_columns = (N + t.d_columns() - 1) / t.d_columns();
  return groups * tile_rows * cluster_size(t, splits) * tile_columns;
}

// Rates of an H200. CLOCK: what 1979 TFLOPS and 4096 multiply-adds per clock and SM imply.
constexpr double CLOCK = 1.83e9;
// Bytes/s of an SM from L2 while all SMs read. DeepGEMM's 128x128 tile in pairs (24 KiB per K block
// and 4.2 MFLOP) reached 1358 TFLOPS on an H800: 60e9. Its model of 2025 has 8e12 / 132 = 61e9.
constexpr double L2_RATE = 60e9;
constexpr double HBM_RATE = 4.2e12;  // bytes/s of the GPU: 4.3 measured by copies

// What limits a K block of one thread block, in clocks. The limits overlap: the largest counts.
struct StepLimits {
  double tensor;  // WGMMAs at 4096 multiply-adds per clock
  double smem;    // WGMMAs read 64 + columns rows of 128 bytes, TMA writes; 128 bytes per clock
  double l2;      // bytes of both operands, without what the other block of the cluster loads
  double issue;   // instructions of a scheduler: promotion, and about 50 around it (test_nvcc.py)
  double chain;   // of one warpgroup: wait, WGMMAs, promotion, one after the other
  double latency;  // of a load, divided by the buffers of the ring

  double longest() const { return std::max({tensor, smem, l2, issue, chain, latency}); }
};

inline StepLimits step_limits(const Sm90Tile& t, int64_t M) {
  constexpr double LATENCY = 1000;  // clocks from a free buffer to data, under load
  const int parts = t.warpgroups() * t.waves();  // of 64 lhs rows
  const int scaling = t.swapped || t.b_rows == 1 ? 2 : 1;  // instructions per product
  const double part_tensor = 64.0 * t.columns * 128 / 4096;
  const double part_issue = scaling * t.columns / 2.0 + 50;
  const double a_rows = std::min<int64_t>(t.swapped ? t.columns : t.lhs_rows, M);
  const double b_rows = t.swapped ? t.lhs_rows : t.columns;
  StepLimits limits;
  limits.tensor = parts * part_tensor;
  limits.smem = parts * (64 + t.columns) + t.lhs_rows + t.columns;
  limits.l2 = (a_rows / t.cluster_n + b_rows / t.cluster_m) * 128 / (L2_RATE / CLOCK);
  limits.issue = parts * part_issue;
  limits.chain = 60 + t.waves() * (part_tensor + 60 + part_issue);
  limits.latency = LATENCY / t.stages;
  return limits;
}

// The estimated time of the product with tile `t`, in seconds.
inline double estimate_seconds(const Sm90Tile& t, int64_t M, int64_t N, int64_t K, int64_t groups,
                               int64_t num_sms) {
  constexpr double FILL_AND_DRAIN = 2e-6;  // s per launch: start, first loads, last store
  constexpr double EPILOGUE = 1500;        // clocks per tile of 128x128
  constexpr double CLUSTER_REDUCE = 1800;  // clocks: partial sums through smem, two membars
  const int splits = choose_num_splits(t.variant, N, K), cluster = cluster_size(t, splits);
  const int64_t usable_sms =
      cluster > 2 ? std::max<int64_t>(num_sms * CLUSTER_SMS / 132, 1) : num_sms;
  const int64_t tiles = count_blocks(t, M, N, groups, splits);
  const int64_t rounds = (tiles + usable_sms - 1) / usable_sms;
  if (rounds == 0) return 0;
  const int64_t resident = std::min<int64_t>(rounds, t.resident_blocks());
  // Resident blocks share an SM's rates, and hide each other's waits.
  StepLimits limits = step_limits(t, M);
  limits.chain /= resident, limits.latency /= resident;
  const int64_t blocks = (K / (t.variant == GemmVariant::k_grouped ? groups : 1) + 127) / 128;
  const int64_t steps = t.swapped ? (blocks + splits - 1) / splits : blocks;
  double tile_end = EPILOGUE * t.lhs_rows * t.columns / (128 * 128);
  if (splits > 1) {
    tile_end += t.swapped ? CLUSTER_REDUCE : (splits - 1) * 8.0 * t.lhs_rows * t.columns / 128;
  }
  const double busy = rounds * (steps * limits.longest() + tile_end) / CLOCK;
  // A contiguous or k-grouped A and B are read once, others once per group.
  const double b_groups =
      t.variant == GemmVariant::contiguous || t.variant == GemmVariant::masked ? groups : 1;
  const double a_groups = t.variant == GemmVariant::masked ? groups : 1;
  const double bytes = (a_groups * M + b_groups * N) * static_cast<double>(K);
  return std::max(busy, bytes / HBM_RATE) + FILL_AND_DRAIN;
}

// The index in SM90_TILES of the fastest tile by the estimate, or -1 if no tile fits. Ties go to
// the first tile.
inline int choose_tile(GemmVariant variant, int64_t M, int64_t N, int64_t K, int64_t groups,
                       int64_t b_rows, int64_t num_sms) {
  int best = -1;
  double best_seconds = 0;
  for (int i = 0; i < static_cast<int>(std::size(SM90_TILES)); ++i) {
    const Sm90Tile& t = SM90_TILES[i];
    if (t.variant != variant || t.b_rows != b_rows || t.cluster() > num_sms) continue;
    if (choose_num_splits(variant, N, K) > 1 && !t.supports_splits()) continue;
    const double seconds = estimate_seconds(t, M, N, K, groups, num_sms);
    if (best < 0 || seconds < best_seconds) best = i, best_seconds = seconds;
  }
  return best;
}

}  // namespace deepkern
