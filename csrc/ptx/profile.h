// Exact counts of one launch, for each instruction of the PTX.
//
// The counts do not depend on the order in which warps run: an instruction that blocks is counted
// once, when it goes on. Loops that poll global memory are the exception.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "api.h"
#include "program.h"

namespace deepkern::ptx {

struct Counts {
  uint64_t issued = 0;  // executions by a warp, with or without active lanes
  uint64_t warps = 0;   // executions by a warp with at least one active lane
  uint64_t lanes = 0;   // executions by a lane
  uint64_t bytes =
      0;  // that lanes ask for, that a copy moves, or operands of MMAs in shared memory
  uint64_t sectors = 0;           // distinct 32-byte sectors of global memory in one execution
  uint64_t wavefronts = 0;        // passes over the 32 banks of shared memory
  uint64_t least_wavefronts = 0;  // that the same bytes would take without bank conflicts
  uint64_t flops = 0;             // of tensor cores, 2 for a multiply-add
};

// The sectors of global memory that a launch reads and writes, each once.
class Sectors {
 public:
  void add(uint64_t sector, bool read, bool write);
  uint64_t read() const { return count(0); }
  uint64_t written() const { return count(2); }

 private:
  uint64_t count(int first) const;
  // 128 sectors of 4 KiB: two words of bits for those read, two for those written.
  std::unordered_map<uint64_t, std::array<uint64_t, 4>> pages_;
};

struct Profile {
  std::vector<Counts> statements;  // [Kernel::statements]
  std::vector<uint32_t> blocks;    // instructions issued by each block of the grid
  uint32_t every = 1;              // the clusters that run: 0, `every`, 2 * `every`, ...
  Sectors touched;

  Profile(const Kernel& kernel, const LaunchConfig& config, uint32_t every);

  void count(const Instruction& i, uint32_t mask, uint32_t block) {
    Counts& c = statements[i.statement];
    c.issued++;
    c.warps += mask != 0;
    c.lanes += __builtin_popcount(mask);
    blocks[block]++;
  }

  // `addresses`: of the active lanes; `bytes`: of each (profile.cpp).
  void count_global(const Instruction& i, const std::vector<uint64_t>& addresses, uint32_t bytes);
  void count_shared(const Instruction& i, const std::vector<uint64_t>& addresses, uint32_t bytes);
  // The sectors of a copy of consecutive bytes.
  void count_copy(const Instruction& i, uint64_t address, uint64_t bytes);

 private:
  std::vector<uint8_t> reads_, writes_;  // [statements]: global memory
};

// The profiles of the launches since it was turned on (profile_log.cpp).
class ProfileLog {
 public:
  static ProfileLog& get();
  void turn_on(uint32_t every);  // 0: off
  // A profile to fill, or null while the log is off.
  std::unique_ptr<Profile> start(const Kernel& kernel, const LaunchConfig& config);
  void keep(std::shared_ptr<Kernel> kernel, const LaunchConfig& config, const Profile& profile);
  // The launches since the last call as JSON.
  std::string take();

 private:
  std::mutex mutex_;
  uint32_t every_ = 0;
  std::vector<std::string> launches_;
};

}  // namespace deepkern::ptx
