// Which of the compiled tiles a product takes, by the model of kernels/deepkern/runtime/tiles.py:
// the time of the busiest multiprocessor, estimated; nothing is timed. For any host compiler.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace deepkern {

enum class GemmForm { dense, contiguous, masked, k_grouped };

struct Sm90Tile {
  GemmForm form;
  int groups, columns, stages, cluster;
  bool swapped;
  int b_rows;

  int left() const { return 64 * groups; }
  int tokens() const { return (swapped ? columns : left()) * cluster; }  // rows of D
  int features() const { return swapped ? left() : columns; }
  int resident() const { return groups == 1 ? 2 : 1; }  // blocks that a multiprocessor holds
};

inline constexpr Sm90Tile SM90_TILES[] = {
#define TILE(FORM, GROUPS, COLUMNS, STAGES, CLUSTER, SWAPPED, B_ROWS) \
  {GemmForm::FORM, GROUPS, COLUMNS, STAGES, CLUSTER, SWAPPED, B_ROWS},
#include "fp8_gemm_tiles.h"
#undef TILE
};

// Into how many runs the sum over K of a dense product is cut: a power of 2, by N and K alone, as
// then a row's bits do not depend on M. More than one only where one row of tiles would leave three
// quarters of the multiprocessors idle; then as many as find multiprocessors, and no run is shorter
// than four blocks.
constexpr int MOST_SPLITS = 8;      // blocks of a cluster that every GPU takes
constexpr int64_t CLUSTERED = 128;  // multiprocessors that clusters of 4 or 8 find on 132
inline int k_splits(GemmForm form, int64_t N, int64_t K) {
  const int64_t tiles = (N + 127) / 128, blocks = (K + 127) / 128;
  int splits = 1;
  if (form != GemmForm::dense || 4 * tiles > CLUSTERED) return splits;
  while (splits < MOST_SPLITS && 2 * splits * tiles <= CLUSTERED && blocks >= 8 * splits) {
    splits *= 2;
  }
  return splits;
}

// Blocks that share a tile of D, or a tile of B.
inline int cluster_of(const Sm90Tile& t, int splits) { return t.swapped ? splits : t.cluster; }

// How many blocks an [M, N] product has work for; M rows of all groups if contiguous, else of each.
inline int64_t blocks_of(const Sm90Tile& t, int64_t M, int64_t N, int64_t groups, int splits) {
  if (t.form == GemmForm::contiguous) M = (M + groups - 1) / groups;
  const int64_t rows = (M + t.tokens() - 1) / t.tokens();
  return groups * rows * cluster_of(t, splits) * ((N + t.features() - 1) / t.features());
}

inline double seconds(const Sm90Tile& t, int64_t M, int64_t N, int64_t K, int64_t groups,
                      int64_t units) {
  constexpr double L2_RATE = 45e9, LATENCY = 1e-6, STEP = 1e-7, FILL_AND_DRAIN = 2e-6;
  constexpr double FLOPS = 1979e12, SHARED_RATE = 220e9;
  constexpr double EXCHANGE = 1e-6;  // shares to shared memory, a barrier of the cluster, and back
  const int splits = k_splits(t.form, N, K), cluster = cluster_of(t, splits);
  const int64_t reached = cluster > 2 ? units * CLUSTERED / 132 : units;
  const int64_t rounds = (blocks_of(t, M, N, groups, splits) + reached - 1) / reached;
  const int64_t together = std::min<int64_t>(rounds, t.resident());
  if (rounds == 0) return 0;
  const double loaded = std::min<int64_t>(t.tokens() / t.cluster, M) + t.features() / t.cluster;
  const double step =
      std::max({2.0 * t.left() * t.columns * 128 / (FLOPS / units), loaded * 128 / L2_RATE,
                LATENCY / (t.stages * together)}) +
      STEP / together;
  const int64_t blocks = (K / (t.form == GemmForm::k_grouped ? groups : 1) + 127) / 128;
  const int64_t steps = t.swapped ? (blocks + splits - 1) / splits : blocks;
  const double adding = splits == 1 ? 0
                        : t.swapped ? EXCHANGE
                                    : (splits - 1) * 8.0 * t.left() * t.columns / SHARED_RATE;
  return rounds * (steps * step + adding) + FILL_AND_DRAIN * ((rounds + together - 1) / together);
}

// The number of the tile in SM90_TILES, or -1 if none serves.
inline int choose_tile(GemmForm form, int64_t M, int64_t N, int64_t K, int64_t groups,
                       int64_t b_rows, int64_t units) {
  int best = -1;
  double least = 0;
  for (int i = 0; i < static_cast<int>(std::size(SM90_TILES)); ++i) {
    const Sm90Tile& t = SM90_TILES[i];
    if (t.form != form || t.b_rows != b_rows) continue;
    const double time = seconds(t, M, N, K, groups, units);
    if (best < 0 || time < least) best = i, least = time;
  }
  return best;
}

}  // namespace deepkern
