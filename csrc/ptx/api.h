// The machine as its users see it: libcuda.cpp, python through ctypes, tests.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "program.h"

namespace deepkern::ptx {

// Memory that a kernel may touch.
struct Allocation {
  uint64_t address;
  uint64_t bytes;
  std::string name;  // of the tensor: "b_scale float32 [56, 16]"
};

struct LaunchConfig {
  uint32_t grid[3] = {1, 1, 1};
  uint32_t block[3] = {1, 1, 1};
  uint32_t cluster[3] = {1, 1, 1};
  uint32_t dynamic_shared_bytes = 0;
  bool programmatic = false;  // programmatic dependent launch
};

struct Options {
  uint64_t seed = 0;
  // How warps and asynchronous work are ordered: RANDOM, or the extremes. EARLIEST completes a copy
  // or an MMA as it is issued, LATEST when nothing else can run.
  enum Order { RANDOM, EARLIEST, LATEST } order = RANDOM;
  bool check_races = true;        // shared and global memory
  bool check_initialized = true;  // shared and tensor memory
  bool hardware_sums = true;      // tensor cores add as the target's hardware does, else in float32
  int resident_blocks = 8;
  uint64_t max_instructions = 0;  // of warps in all; 0: no limit
};

// Counts of one launch; see profile.h.
struct Profile;

// A kernel did what a GPU forbids or leaves undefined. what() names the kernel, the source line,
// block, warp, lane, address and tensor.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs a whole grid. `parameters` has the address of each parameter's bytes, as for
// cuLaunchKernel. Throws Failure.
void launch(const Kernel& kernel, Module& module, const LaunchConfig& config,
            void* const* parameters, const std::vector<Allocation>& allocations,
            const Options& options, Profile* profile);

}  // namespace deepkern::ptx
