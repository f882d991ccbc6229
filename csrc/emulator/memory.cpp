#include "memory.h"

#include <algorithm>

#include "primitives.h"

namespace emulator {
namespace {

// Values of a record that are not index + 1 of a block.
constexpr uint16_t SEVERAL_BLOCKS = 0xffff, ATOMIC = 0xfffe, CONSTANT = 0xfffd;

std::string accessor_name(uint16_t mark, int grid) {
  const std::string suffix = grid ? " of the dependent grid" : "";
  if (mark == SEVERAL_BLOCKS) return "several blocks" + suffix;
  if (mark == ATOMIC) return "an atomic operation" + suffix;
  if (mark == CONSTANT) return "load_global" + suffix;
  return "block " + std::to_string(mark - 1) + suffix;
}

}  // namespace

Memory& memory() {
  static Memory instance;
  return instance;
}

void Memory::register_allocations(const Allocation* allocations, int count) {
  checks_ = true;
  ranges_.clear();
  tensors_.clear();
  last_ = 0;
  for (int i = 0; i < count; ++i) {
    const Allocation& a = allocations[i];
    const char* begin = static_cast<const char*>(a.begin);
    if (tensors_.empty() || tensors_.back().name != a.tensor) {
      tensors_.push_back({a.tensor, begin, a.writable, {}});
    }
    tensors_.back().begin = std::min(tensors_.back().begin, begin);
    ranges_.push_back({begin, begin + a.bytes, static_cast<int>(tensors_.size()) - 1});
  }
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Range& x, const Range& y) { return x.begin < y.begin; });
  std::vector<Range> merged;
  for (const Range& r : ranges_) {
    if (!merged.empty() && merged.back().tensor == r.tensor && r.begin <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, r.end);
    } else {
      if (!merged.empty() && r.begin < merged.back().end) {
        throw Failure("registered tensors overlap: " + tensors_[r.tensor].name + " and " +
                      tensors_[merged.back().tensor].name);
      }
      merged.push_back(r);
    }
  }
  ranges_ = merged;
}

void Memory::disable_checks() {
  register_allocations(nullptr, 0);
  checks_ = false;
}

void Memory::add_allocation(const Allocation& scratch) {
  if (!checks_) return;
  const char* begin = static_cast<const char*>(scratch.begin);
  ranges_.push_back({begin, begin + scratch.bytes, static_cast<int>(tensors_.size())});
  tensors_.push_back({scratch.tensor, begin, scratch.writable, {}});
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Range& x, const Range& y) { return x.begin < y.begin; });
}

void Memory::clear_records() {
  for (Tensor& t : tensors_) t.records.clear();
  for (const Range& r : ranges_) {
    Tensor& t = tensors_[r.tensor];
    if (t.writable) t.records.resize(std::max<size_t>(t.records.size(), r.end - t.begin));
  }
}

// The last range that starts at or before p; null: none.
const Memory::Range* Memory::find(const char* p) {
  if (last_ < ranges_.size() && ranges_[last_].begin <= p && p < ranges_[last_].end) {
    return &ranges_[last_];
  }
  auto after = std::upper_bound(ranges_.begin(), ranges_.end(), p,
                                [](const char* x, const Range& r) { return x < r.begin; });
  if (after == ranges_.begin()) return nullptr;
  last_ = after - ranges_.begin() - 1;
  return &ranges_[last_];
}

std::string Memory::describe(const char* p) {
  const Range* r = find(p);
  if (!r && ranges_.empty()) return "unregistered memory";
  const Tensor& t = tensors_[(r ? r : &ranges_.front())->tensor];
  return "offset " + std::to_string(p - t.begin) + " from the start of " + t.name;
}

void Memory::check(const void* p, int64_t bytes, bool write, const char* what) {
  if (!checks_ || bytes == 0) return;
  const char* begin = static_cast<const char*>(p);
  const Range* r = find(begin);
  if (!r || begin + bytes > r->end) {
    fail(std::string(what) + ": out of bounds: " + std::to_string(bytes) + " bytes at " +
         describe(begin));
  }
  if (write && !tensors_[r->tensor].writable) {
    fail(std::string(what) + ": writes at " + describe(begin) + ", which is read-only");
  }
}

void Memory::record(Access access, const Accessor& accessor, const void* p, int64_t bytes,
                    const char* what, const void* value) {
  const bool write = access == Access::write || access == Access::atomic;
  check(p, bytes, write, what);
  if (!checks_ || bytes == 0) return;
  const char* begin = static_cast<const char*>(p);
  Tensor& t = tensors_[find(begin)->tensor];
  if (!t.writable) return;
  const uint16_t mark =
      access == Access::atomic ? ATOMIC : static_cast<uint16_t>(accessor.block + 1);
  const int grid = accessor.grid, other_grid = 1 - grid;
  const auto race = [&](int64_t i, const char* verb, uint16_t by, int by_grid, const char* why) {
    fail(std::string(what) + ": data race at " + describe(begin + i) + ", which " +
         accessor_name(by, by_grid) + " " + verb + why);
  };
  for (int64_t i = 0; i < bytes; ++i) {
    Record& r = t.records[begin - t.begin + i];
    // Before it waits for the first grid, the dependent grid must neither access what the first
    // grid writes nor write what the first grid reads. Either order of the two accesses fails.
    const bool unordered = grid == 0 || accessor.unordered;
    const char* no_wait = grid == 0 ? " without grid_dependency_wait"
                                    : ": this thread has not called grid_dependency_wait";
    const uint16_t other_writer = r.writer[other_grid], other_reader = r.reader[other_grid];
    if (unordered && other_writer) race(i, "wrote", other_writer, other_grid, no_wait);
    if (unordered && write && other_reader) race(i, "read", other_reader, other_grid, no_wait);
    // The blocks of one grid are unordered.
    constexpr char NOT_SYNCHRONIZED[] = ": the accesses are not synchronized";
    const uint16_t writer = r.writer[grid], reader = r.reader[grid];
    const bool differs = !value || begin[i] != static_cast<const char*>(value)[i];
    if (writer && writer != mark && (!write || differs)) {
      race(i, "wrote", writer, grid, NOT_SYNCHRONIZED);
    }
    if (write && reader && reader != mark) race(i, "read", reader, grid, NOT_SYNCHRONIZED);
    if (access == Access::constant) {
      constexpr char NOT_CONSTANT[] = ": load_global needs memory that no block writes";
      if (writer) race(i, "wrote", writer, grid, NOT_CONSTANT);
      if (other_writer) race(i, "wrote", other_writer, other_grid, NOT_CONSTANT);
    }
    if (write) {
      r.writer[grid] = mark;
    } else if (access == Access::constant) {
      r.reader[grid] = CONSTANT;
    } else {
      r.reader[grid] = reader && reader != mark ? SEVERAL_BLOCKS : mark;
    }
  }
}

}  // namespace emulator

// Registers all memory that kernels may access from now on. 1: two tensors overlap.
extern "C" int emulate_memory(const emulator::Allocation* allocations, int count) {
  try {
    emulator::memory().register_allocations(allocations, count);
  } catch (const emulator::Failure&) {
    return 1;
  }
  return 0;
}

// Lets kernels access any memory again.
extern "C" void emulate_any_memory() { emulator::memory().disable_checks(); }

namespace sm90 {

void access_global(emulator::Access access, const void* p, uint32_t bytes, const char* what,
                   const void* value) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) {
    emulator::fail(std::string(what) + ": address is not aligned to " + std::to_string(bytes) +
                   " bytes");
  }
  emulator::current().block->machine->record_access(access, p, bytes, what, value);
}

}  // namespace sm90
