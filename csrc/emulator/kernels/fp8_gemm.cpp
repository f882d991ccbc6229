// csrc/sm90/fp8_gemm.cuh in the emulator, as C functions for tests.
#include "../../sm90/choose.h"
#include "../../sm90/fp8_gemm.cuh"

#include <algorithm>
#include <climits>
#include <cstdio>
#include <vector>

#include "../primitives.h"

namespace {

using emulator::Launch;
using deepkern::GemmVariant;
using deepkern::Real;
using sm90::GemmArguments;
using sm90::GemmTile;
using sm90::TensorMap;

struct Operand {
  char* data;
  uint64_t rows, row_bytes;
};

template <class Tile>
void run(const Operand& a, const Operand& b, GemmArguments p, Launch launch) {
  const auto K = static_cast<uint64_t>(p.K), N = static_cast<uint64_t>(p.N);
  const uint32_t left = Tile::M / Tile::CLUSTER_N, right = Tile::N / Tile::CLUSTER_M;
  const TensorMap a_map{a.data, K, a.rows, a.row_bytes, 128, Tile::SWAPPED ? right : left, 1, true};
  const TensorMap b_map{b.data, K, b.rows, b.row_bytes, 128, Tile::SWAPPED ? left : right, 1, true};
  const uint32_t size = p.out_type == Real::fp32 ? 4 : 2;
  const bool d_per_group =
      Tile::VARIANT == GemmVariant::masked || Tile::VARIANT == GemmVariant::k_grouped;
  const uint64_t rows = uint64_t{d_per_group ? 1u * p.groups : 1u} * p.M;
  const TensorMap out{static_cast<char*>(p.out), N, rows, N * size, 128 / size, 64, size, true};
  std::vector<int> group_bounds(2 * p.groups, 0);
  if (Tile::VARIANT == GemmVariant::contiguous) {
    std::fill_n(group_bounds.begin(), p.groups, INT_MAX);
    p.group_bounds = group_bounds.data();
    emulator::memory().add_allocation({"group_bounds", group_bounds.data(),
                                       static_cast<int64_t>(group_bounds.size() * 4), true});
    Launch prepass = launch;
    prepass.blocks = 2;
    emulator::Machine(prepass, [&] {
      sm90::find_group_bounds(p.group_index, group_bounds.data(), static_cast<char*>(p.out), p.M,
                              p.groups, int64_t{p.N} * size);
    }).run();
  }
  launch.cluster = Tile::CLUSTER_SPLIT_K ? p.num_splits : Tile::CLUSTER;
  launch.blocks = std::max(launch.blocks / launch.cluster, 1) * launch.cluster;
  launch.threads = Tile::THREADS;
  launch.shared_bytes = Tile::SMEM_BYTES;
  emulator::Machine(launch, [&] { sm90::fp8_gemm<Tile>(a_map, b_map, out, p); }).run();
}

void run_tile(int tile, const Operand& a, const Operand& b, const GemmArguments& p,
              const Launch& launch) {
  int number = 0;
#define TILE(variant, ...)                                                    \
  if (number++ == tile) {                                                  \
    return run<GemmTile<GemmVariant::variant, __VA_ARGS__>>(a, b, p, launch);        \
  }
#include "../../sm90/fp8_gemm_tiles.h"
#undef TILE
  throw emulator::Failure("tile: no tile " + std::to_string(tile));
}

}  // namespace

// 0: success; 1: failure, and `message` has the error. a, b: rows and bytes from a row to the next.
// tile: index in sm90/fp8_gemm_tiles.h.
extern "C" int emulate_fp8_gemm(char* a, int64_t a_rows, int64_t a_row, char* b, int64_t b_rows,
                                int64_t b_row, const GemmArguments* p, int tile, int blocks,
                                uint64_t seed, int order, char* message, int message_bytes) {
  Launch launch;
  launch.blocks = blocks;
  launch.seed = seed;
  launch.order = static_cast<emulator::Order>(order);
  try {
    run_tile(tile, {a, static_cast<uint64_t>(a_rows), static_cast<uint64_t>(a_row)},
             {b, static_cast<uint64_t>(b_rows), static_cast<uint64_t>(b_row)}, *p, launch);
  } catch (const std::exception& error) {
    std::snprintf(message, message_bytes, "%s", error.what());
    return 1;
  }
  return 0;
}

// The choices of the launcher on 132 SMs.
extern "C" int chosen_splits(int64_t N, int64_t K) {
  return deepkern::choose_num_splits(GemmVariant::dense, N, K);
}
extern "C" int chosen_tile(int variant, int64_t M, int64_t N, int64_t K, int64_t groups,
                           int64_t b_rows) {
  return deepkern::choose_tile(static_cast<GemmVariant>(variant), M, N, K, groups, b_rows, 132);
}
