// What the implementations of the primitives share. All functions act for the current thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "machine.h"

namespace emulator {

inline Machine& machine() { return *current().block->machine; }
inline Cluster& cluster() { return *current().block->cluster; }

// Block `rank` of the thread's cluster.
Block& cluster_block(int rank, const char* what);

enum CollectiveKind { SYNC, SHUFFLE, ELECT, MATRIX, REGISTERS };

// A collective operation of the `size` threads of warp or warpgroup `group`: thread `rank` of them
// contributes `value`. Returns the values of all.
std::vector<uint64_t> collect(CollectiveKind kind, int group, int size, int rank, uint64_t value,
                              const char* what);
std::vector<uint64_t> warp_collect(CollectiveKind kind, uint64_t value, const char* what);

// An .aligned instruction: each lane of the warp must make the same calls in the same order, with
// the same operands. True for the last lane to make this one.
bool converge(const char* what, uint64_t operands = 0);
// The same, and waits for the other lanes.
void converge_and_wait(const char* what, uint64_t operands = 0);

// Counts the bytes of a copy that is done on the barrier at an offset of `block`'s shared memory.
void complete_bytes(Block& block, Mbarrier& barrier, uint32_t bytes);
// An arrival of the current thread by its copies, which are done now: it passes no clock on.
void complete_arrival(Mbarrier& barrier);
// The barrier that a copy to `block` completes on.
Mbarrier& barrier_of_copy(Block& block, uint32_t offset);

// Only barrier operations may access a barrier.
void check_no_barrier(const Block& block, uint32_t offset, uint32_t bytes, const char* what);

// The 128-byte swizzle: the offset of a 16-byte chunk of a tile of 128-byte rows. It depends on the
// address, so tiles are aligned to 1024 bytes.
inline uint32_t swizzled(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

}  // namespace emulator
