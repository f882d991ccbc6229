// csrc/sm90/fp8_gemm_nt.cuh in the emulator, for tests: one C function.
#include "../../sm90/fp8_gemm_nt.cuh"

#include <algorithm>
#include <cstdio>

#include "../primitives.h"

namespace {

using emulator::Launch;
using sm90::GemmArguments;
using sm90::GemmTile;
using sm90::TensorMap;

template <int GROUPS, int BLOCK_N, int STAGES, int CLUSTER>
void run(const TensorMap& a, const TensorMap& b, const TensorMap& out, const GemmArguments& p,
         Launch launch) {
  using Tile = GemmTile<GROUPS, BLOCK_N, STAGES, CLUSTER>;
  TensorMap a_map = a, b_map = b;
  a_map.box_rows = Tile::M;
  b_map.box_rows = Tile::N / CLUSTER;
  launch.cluster = CLUSTER;
  launch.blocks = std::max(launch.blocks / CLUSTER, 1) * CLUSTER;
  launch.threads = Tile::THREADS;
  launch.shared_bytes = Tile::SHARED_BYTES;
  emulator::Machine(launch, [&] {
    sm90::fp8_gemm_nt<GROUPS, BLOCK_N, STAGES, CLUSTER>(a_map, b_map, out, p);
  }).run();
}

}  // namespace

// 0, or 1 and what went wrong in `message`. `form` names the tile: see the table at the end.
extern "C" int emulate_fp8_gemm_nt(char* a, char* b, const GemmArguments* p, int64_t a_row,
                                   int64_t b_row, int form, int blocks, uint64_t seed, int order,
                                   int accumulator_bits, char* message, int room) {
  const uint32_t size = p->out_type == sm90::Type::fp32 ? 4 : 2;
  const auto M = static_cast<uint64_t>(p->M), N = static_cast<uint64_t>(p->N),
             K = static_cast<uint64_t>(p->K);
  const TensorMap a_map{a, K, M, static_cast<uint64_t>(a_row), 128, 0, 1, true};
  const TensorMap b_map{b, K, N, static_cast<uint64_t>(b_row), 128, 0, 1, true};
  const TensorMap out_map{static_cast<char*>(p->out), N,   M,  static_cast<uint64_t>(p->out_row) * size,
                          128 / size,                 64, size, true};
  Launch launch;
  launch.blocks = blocks;
  launch.seed = seed;
  launch.order = static_cast<emulator::Order>(order);
  launch.accumulator_bits = accumulator_bits;
  try {
    switch (form) {
      case 0: run<2, 128, 4, 1>(a_map, b_map, out_map, *p, launch); break;
      case 1: run<2, 128, 4, 2>(a_map, b_map, out_map, *p, launch); break;
      case 2: run<1, 64, 6, 1>(a_map, b_map, out_map, *p, launch); break;
      default: throw emulator::Failure("no such form");
    }
  } catch (const std::exception& error) {
    std::snprintf(message, room, "%s", error.what());
    return 1;
  }
  return 0;
}
