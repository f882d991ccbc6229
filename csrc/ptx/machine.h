// The state of a running grid: warps, blocks, clusters, and what handlers use of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "api.h"
#include "program.h"

namespace deepkern::ptx {

struct Block;
struct Grid;

constexpr uint32_t SHARED_BASE = 1024;  // Hopper keeps the first 1 KiB of a block's shared memory
constexpr int RANK_SHIFT = 24;  // a shared address holds the block's rank in its cluster above it
// The generic address of a shared address is their sum. No host allocation has such an address.
constexpr uint64_t GENERIC_SHARED_BASE = 0x0000700000000000;

// Lanes that execute one path between a branch and the place where its lanes meet again.
struct Path {
  int32_t pc;
  int32_t reconverge;  // -1: at the exit
  uint32_t mask;
};

struct Warp {
  Grid* grid;
  Block* block;
  const Kernel* kernel;
  int index;  // in the block
  uint32_t live;  // lanes that have not exited
  std::vector<Path> paths;  // the last one is executed
  std::vector<uint32_t> registers;  // [slots][LANES]
  std::vector<uint32_t> predicates;  // a lane is a bit
  std::string waits_for;  // while blocked, for the report of a deadlock
  bool blocked = false;
  uint64_t executed = 0;

  uint32_t* u32(int slot) { return registers.data() + size_t(slot) * LANES; }
  int32_t* s32(int slot) { return reinterpret_cast<int32_t*>(u32(slot)); }
  float* f32(int slot) { return reinterpret_cast<float*>(u32(slot)); }
  uint64_t* u64(int slot) { return reinterpret_cast<uint64_t*>(u32(slot)); }
  int64_t* s64(int slot) { return reinterpret_cast<int64_t*>(u32(slot)); }
  double* f64(int slot) { return reinterpret_cast<double*>(u32(slot)); }

  // Throws Failure with kernel, source line, block, warp and, if it is not negative, the lane.
  [[noreturn]] void fail(const Instruction& instruction, int lane, const std::string& message);
};

// Lowest active lane.
inline int first_lane(uint32_t mask) { return __builtin_ctz(mask); }

}  // namespace deepkern::ptx
