#include "shared_memory.h"

#include <algorithm>

#include "machine.h"

namespace emulator {

namespace {

void raise(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

bool has(const std::vector<uint32_t>& completed, int barrier, uint32_t phase) {
  return barrier < static_cast<int>(completed.size()) && completed[barrier] > phase;
}

}  // namespace

void Clock::merge(const Clock& other) {
  raise(phases, other.phases);
  raise(fenced_phases, other.fenced_phases);
  merge_blocks(other);
}

void Clock::merge_blocks(const Clock& other) {
  for (int i = 0; i < MAX_CLUSTER; ++i) blocks[i] = std::max(blocks[i], other.blocks[i]);
}

void Clock::observe_phase(int barrier, uint32_t completed) {
  if (static_cast<int>(phases.size()) <= barrier) phases.resize(barrier + 1);
  phases[barrier] = std::max(phases[barrier], completed);
}

bool Clock::observed_phase(int barrier, uint32_t phase) const {
  return has(phases, barrier, phase);
}

bool Clock::fenced_phase(int barrier, uint32_t phase) const {
  return has(fenced_phases, barrier, phase);
}

void SharedMemory::reset(uint32_t bytes, bool in_cluster) {
  unfenced_writer_.assign(bytes, 0);
  copies_.assign(bytes / 16 + 1, {});
  if (in_cluster) store_times_.assign(bytes / 4 + 1, 0);
}

void SharedMemory::fail_unfenced(uint32_t at, const char* what, const char* verb) const {
  fail(std::string(what) + " " + verb + " shared memory at offset " + std::to_string(at) +
       ", which thread " + std::to_string(unfenced_writer_[at] - 1) +
       " wrote and no fence_async_proxy followed");
}

void SharedMemory::check_copies(uint32_t offset, uint32_t bytes, const Clock& clock,
                                const char* what, const char* verb) const {
  for (uint32_t chunk = offset / 16; chunk <= (offset + bytes - 1) / 16; ++chunk) {
    const Copy& copy = copies_[chunk];
    if (copy.barrier < 0 || clock.observed_phase(copy.barrier, copy.phase)) continue;
    fail(std::string(what) + " " + verb + " shared memory at offset " +
         std::to_string(chunk * 16) + ", which a copy wrote: this thread has not waited for " +
         "phase " + std::to_string(copy.phase) + " of its barrier, nor been told by one that has");
  }
}

void SharedMemory::check_fences(uint32_t offset, uint32_t bytes, const Clock& clock,
                                const char* what, const char* verb) const {
  for (uint32_t chunk = offset / 16; chunk <= (offset + bytes - 1) / 16; ++chunk) {
    const Copy& copy = copies_[chunk];
    if (!copy.generic || clock.fenced_phase(copy.barrier, copy.phase)) continue;
    fail(std::string(what) + " " + verb + " shared memory at offset " +
         std::to_string(chunk * 16) + ", which cp.async wrote: no fence_async_proxy followed the " +
         "wait for phase " + std::to_string(copy.phase) + " of its barrier");
  }
}

void SharedMemory::store(uint32_t offset, uint32_t bytes, const char* what) {
  copy_store(offset, bytes, what);
  current().unfenced_stores.emplace_back(offset, bytes);
}

void SharedMemory::copy_store(uint32_t offset, uint32_t bytes, const char* what) {
  Thread& t = current();
  check_copies(offset, bytes, t.clock, what, "overwrites");
  std::fill_n(unfenced_writer_.begin() + offset, bytes, static_cast<uint16_t>(t.index + 1));
  if (store_times_.empty()) return;
  std::fill_n(store_times_.begin() + offset / 4, (bytes + 3) / 4, t.block->machine->time);
  const auto found = remote_loads_.find(offset / 16);
  for (int rank = 0; found != remote_loads_.end() && rank < MAX_CLUSTER; ++rank) {
    if (found->second[rank] > t.clock.blocks[rank]) {
      fail(std::string(what) + " overwrites shared memory at offset " + std::to_string(offset) +
           ", which block " + std::to_string(rank) +
           " of the cluster loads: no release and acquire of cluster scope order the two");
    }
  }
}

void SharedMemory::copy_arrived(uint32_t offset, uint32_t bytes, int barrier, uint32_t phase) {
  std::fill_n(unfenced_writer_.begin() + offset, bytes, uint16_t{0});
  for (uint32_t chunk = offset / 16; chunk < (offset + bytes) / 16; ++chunk) {
    copies_[chunk] = {barrier, phase, true};
  }
}

void SharedMemory::load(uint32_t offset, uint32_t bytes, const char* what) const {
  check_copies(offset, bytes, current().clock, what, "reads");
}

void SharedMemory::load_from(int rank, const Clock& clock, uint32_t offset, uint32_t bytes,
                             const char* what) {
  for (uint32_t word = offset / 4; word < (offset + bytes) / 4; ++word) {
    if (store_times_[word] <= clock.blocks[rank]) continue;
    fail(std::string(what) + ": block " + std::to_string(rank) + " stored at offset " +
         std::to_string(word * 4) +
         ": no release and acquire of cluster scope order that before this load");
  }
  remote_loads_[offset / 16][current().block->rank] = current().block->machine->time;
}

void SharedMemory::fence_async_proxy() {
  Thread& t = current();
  for (const auto& [offset, bytes] : t.unfenced_stores) {
    for (uint32_t i = offset; i < offset + bytes; ++i) {
      if (unfenced_writer_[i] == t.index + 1) unfenced_writer_[i] = 0;
    }
  }
  t.unfenced_stores.clear();
  t.clock.fenced_phases = t.clock.phases;
}

void SharedMemory::async_load(uint32_t offset, uint32_t bytes, const char* what,
                              const std::vector<Clock>& clocks) const {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (unfenced_writer_[i]) fail_unfenced(i, what, "reads");
  }
  if (clocks.empty()) check_fences(offset, bytes, current().clock, what, "reads");
  for (const Clock& clock : clocks) {
    check_copies(offset, bytes, clock, what, "reads");
    check_fences(offset, bytes, clock, what, "reads");
  }
}

void SharedMemory::check_async_store(uint32_t offset, uint32_t bytes, const char* what) const {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (unfenced_writer_[i]) fail_unfenced(i, what, "overwrites");
  }
  check_fences(offset, bytes, current().clock, what, "overwrites");
}

void SharedMemory::async_store(uint32_t offset, uint32_t bytes, int barrier, uint32_t phase,
                               const char* what) {
  check_async_store(offset, bytes, what);
  for (uint32_t chunk = offset / 16; chunk < (offset + bytes) / 16; ++chunk) {
    copies_[chunk] = {barrier, phase, false};
  }
}

}  // namespace emulator
