// Exact counts of one launch, for each instruction of the PTX.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"

namespace deepkern::ptx {

struct Counts {
  uint64_t warps = 0;  // executions by a warp with at least one active lane
  uint64_t lanes = 0;  // executions by a lane
  uint64_t bytes = 0;  // that lanes ask for, or that a copy moves
  uint64_t sectors = 0;  // distinct 32-byte sectors of global memory in one execution
  uint64_t wavefronts = 0;  // passes over the 32 banks of shared memory
  uint64_t least_wavefronts = 0;  // that the same bytes would take without bank conflicts
  uint64_t flops = 0;  // of tensor cores, 2 for a multiply-add
};

struct Profile {
  std::vector<Counts> statements;  // [Kernel::statements]

  explicit Profile(const Kernel& kernel) : statements(kernel.statements.size()) {}

  void count(const Instruction& i, uint32_t mask) {
    Counts& c = statements[i.statement];
    c.warps += mask != 0;
    c.lanes += __builtin_popcount(mask);
  }

  // `addresses`: of the active lanes; `bytes`: of each (profile.cpp).
  void count_global(const Instruction& i, const std::vector<uint64_t>& addresses, uint32_t bytes);
  void count_shared(const Instruction& i, const std::vector<uint64_t>& addresses, uint32_t bytes);
};

}  // namespace deepkern::ptx
