#include "memory.h"

#include <algorithm>

#include "primitives.h"

namespace emulator {
namespace {

// Instead of a block: several; atomically; as a constant.
constexpr uint16_t MANY = 0xffff, ATOMIC = 0xfffe, CONSTANT = 0xfffd;

std::string who_is(uint16_t mark, int grid) {
  const std::string of = grid ? " of the dependent grid" : "";
  if (mark == MANY) return "several blocks" + of;
  if (mark == ATOMIC) return "an atomic operation" + of;
  if (mark == CONSTANT) return "load_global" + of;
  return "block " + std::to_string(mark - 1) + of;
}

}  // namespace

Memory& memory() {
  static Memory all;
  return all;
}

void Memory::register_only(const Allocation* allocations, int count) {
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
        throw Failure("the host registered " + tensors_[r.tensor].name + " over " +
                      tensors_[merged.back().tensor].name);
      }
      merged.push_back(r);
    }
  }
  ranges_ = merged;
}

void Memory::unregister() {
  register_only(nullptr, 0);
  checks_ = false;
}

void Memory::also(const Allocation& scratch) {
  if (!checks_) return;
  const char* begin = static_cast<const char*>(scratch.begin);
  ranges_.push_back({begin, begin + scratch.bytes, static_cast<int>(tensors_.size())});
  tensors_.push_back({scratch.tensor, begin, scratch.writable, {}});
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Range& x, const Range& y) { return x.begin < y.begin; });
}

void Memory::forget() {
  for (Tensor& t : tensors_) t.marks.clear();
  for (const Range& r : ranges_) {
    Tensor& t = tensors_[r.tensor];
    if (t.writable) t.marks.resize(std::max<size_t>(t.marks.size(), r.end - t.begin));
  }
}

// The last range that begins at or before p.
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

std::string Memory::place(const char* p) {
  const Range* r = find(p);
  if (!r && ranges_.empty()) return "memory that nobody registered";
  const Tensor& t = tensors_[(r ? r : &ranges_.front())->tensor];
  return "offset " + std::to_string(p - t.begin) + " from the start of " + t.name;
}

void Memory::check(const void* p, int64_t bytes, bool write, const char* what) {
  if (!checks_ || bytes == 0) return;
  const char* at = static_cast<const char*>(p);
  const Range* r = find(at);
  if (!r || at + bytes > r->end) {
    fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at " + place(at) +
         " lie beyond it, and in no other tensor");
  }
  if (write && !tensors_[r->tensor].writable) {
    fail(std::string(what) + ": writes at " + place(at) + ", which is only read");
  }
}

void Memory::touch(Touch how, const Toucher& who, const void* p, int64_t bytes, const char* what,
                   const void* value) {
  const bool write = how == Touch::write || how == Touch::atomic;
  check(p, bytes, write, what);
  if (!checks_ || bytes == 0) return;
  const char* at = static_cast<const char*>(p);
  Tensor& t = tensors_[find(at)->tensor];
  if (!t.writable) return;
  const uint16_t me = how == Touch::atomic ? ATOMIC : static_cast<uint16_t>(who.block + 1);
  const int other = 1 - who.grid;
  const auto race = [&](int64_t i, const char* before, uint16_t mark, int grid, const char* why) {
    fail(std::string(what) + " at " + place(at + i) + ", which " + who_is(mark, grid) + " " +
         before + why);
  };
  for (int64_t i = 0; i < bytes; ++i) {
    Marks& m = t.marks[at - t.begin + i];
    // A grid that has not waited for the one before must touch nothing that this one writes, nor
    // write what it reads. Whichever comes first in this run, it is found out.
    const bool unordered = who.grid == 0 || who.early;
    const char* unwaited = who.grid == 0 ? " without grid_dependency_wait"
                                         : ": no grid_dependency_wait came before";
    if (unordered && m.writer[other]) race(i, "wrote", m.writer[other], other, unwaited);
    if (unordered && write && m.reader[other]) race(i, "read", m.reader[other], other, unwaited);
    // Blocks of one grid run in no order.
    const uint16_t writer = m.writer[who.grid], reader = m.reader[who.grid];
    const bool differs = !value || at[i] != static_cast<const char*>(value)[i];
    if (writer && writer != me && (!write || differs)) {
      race(i, "wrote", writer, who.grid, ": nothing orders the two");
    }
    if (write && reader && reader != me) {
      race(i, "read", reader, who.grid, ": nothing orders the two");
    }
    if (how == Touch::constant) {
      if (writer) race(i, "wrote", writer, who.grid, ": load_global is for what nobody writes");
      if (m.writer[other]) {
        race(i, "wrote", m.writer[other], other, ": load_global is for what nobody writes");
      }
    }
    if (write) {
      m.writer[who.grid] = me;
    } else if (how == Touch::constant) {
      m.reader[who.grid] = CONSTANT;
    } else {
      m.reader[who.grid] = reader && reader != me ? MANY : me;
    }
  }
}

}  // namespace emulator

// The memory that kernels may touch, and none else, until it is forgotten.
extern "C" int emulate_memory(const emulator::Allocation* allocations, int count) {
  try {
    emulator::memory().register_only(allocations, count);
  } catch (const emulator::Failure&) {
    return 1;
  }
  return 0;
}

extern "C" void emulate_any_memory() { emulator::memory().unregister(); }

namespace sm90 {

void touch_global(emulator::Touch how, const void* p, uint32_t bytes, const char* what, const void* value) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) {
    emulator::fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at an address that is no " +
         "multiple of it");
  }
  emulator::current().block->machine->touch(how, p, bytes, what, value);
}

}  // namespace sm90
