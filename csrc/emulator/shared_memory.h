// Who wrote the smem of a block, and which of those writes a thread may rely on.
//
// How: every thread has a clock of what it has observed. Barriers pass clocks on: those of a block
// to its threads, and a release and an acquire of cluster scope between blocks. A generic store
// reaches memory late, at the latest when its thread next releases anything.
//
// Limit: 16 bytes of records per 16 bytes of smem, and a clock per thread. Stores are ordered by
// block, not by thread: a race between two threads of a block shows only in the values read.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <vector>

namespace emulator {

constexpr int MAX_CLUSTER = 8;  // blocks

// What a thread has observed.
struct Clock {
  std::vector<uint32_t> phases;                // completed ones of each mbarrier, by its number
  std::vector<uint32_t> fenced_phases;         // those that a fence_async_proxy followed
  std::array<uint64_t, MAX_CLUSTER> blocks{};  // accesses to smem by that block, up to this time

  void merge(const Clock& other);  // of a thread of the same block
  void merge_blocks(const Clock& other);
  void observe_phase(int barrier, uint32_t phases_completed);
  bool observed_phase(int barrier, uint32_t phase) const;
  bool fenced_phase(int barrier, uint32_t phase) const;
};

// A generic store that has not reached memory.
struct DelayedStore {
  uint32_t offset, bytes;
  std::array<char, 16> data;
};

// Records of a block's smem. Functions fail as of the current thread.
class SharedMemory {
 public:
  void reset(uint32_t bytes, bool in_cluster);

  // A generic store or load of the current thread.
  void store(uint32_t offset, uint32_t bytes, const char* what);
  // A cp.async copy of the current thread starts. A fence counts after the thread's wait for it.
  void copy_store(uint32_t offset, uint32_t bytes, const char* what);
  // It is done, and the current thread arrives by it at a barrier, which is in `phase`. A fence
  // counts in each thread that has waited for this phase.
  void copy_arrived(uint32_t offset, uint32_t bytes, int barrier, uint32_t phase);
  void load(uint32_t offset, uint32_t bytes, const char* what) const;
  // A load by a thread of block `rank` of the cluster, which is another block.
  void load_from(int rank, const Clock& clock, uint32_t offset, uint32_t bytes, const char* what);
  // Makes the current thread's stores visible to the async proxy.
  void fence_async_proxy();

  // The async proxy reads. `clocks`: of the threads that issued the read.
  void async_load(uint32_t offset, uint32_t bytes, const char* what,
                  const std::vector<Clock>& clocks = {}) const;
  // A copy writes; before it is done and when it is. Its barrier is in `phase`.
  void check_async_store(uint32_t offset, uint32_t bytes, const char* what) const;
  void async_store(uint32_t offset, uint32_t bytes, int barrier, uint32_t phase, const char* what);

 private:
  struct Copy {
    int barrier = -1;  // number of the mbarrier that it completed on; -1: no copy
    uint32_t phase = 0;
    bool generic = false;  // of cp.async: the async proxy sees it after a fence
  };
  std::vector<uint16_t> unfenced_writer_;  // per byte: index + 1 of the thread, 0: fenced
  std::vector<Copy> copies_;               // last one, per 16 bytes
  std::vector<uint64_t> store_times_;      // per 4 bytes, in a cluster
  std::map<uint32_t, std::array<uint64_t, MAX_CLUSTER>> remote_loads_;  // times, by offset / 16

  void fail_unfenced(uint32_t at, const char* what, const char* verb) const;
  void check_fences(uint32_t offset, uint32_t bytes, const Clock& clock, const char* what,
                    const char* verb) const;
  void check_copies(uint32_t offset, uint32_t bytes, const Clock& clock, const char* what,
                    const char* verb) const;
};

}  // namespace emulator
