// A set of bytes of a memory: which ones were written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace deepkern::ptx {

// One bit for each byte.
class Bits {
 public:
  explicit Bits(uint32_t bytes) : words_((bytes + 63) / 64, 0) {}

  void set(uint32_t begin, uint32_t bytes, bool value) {
    visit(begin, bytes, [&](uint64_t& word, uint64_t mask, uint32_t) {
      word = value ? word | mask : word & ~mask;
      return true;
    });
  }
  // The first byte whose bit is 0, or begin + bytes.
  uint32_t first_clear(uint32_t begin, uint32_t bytes) {
    uint32_t result = begin + bytes;
    visit(begin, bytes, [&](uint64_t& word, uint64_t mask, uint32_t base) {
      uint64_t clear = ~word & mask;
      if (clear != 0) result = base + uint32_t(__builtin_ctzll(clear));
      return clear == 0;
    });
    return result;
  }

 private:
  template <class F>
  void visit(uint32_t begin, uint32_t bytes, F f) {
    uint32_t end = begin + bytes;
    while (begin < end) {
      uint32_t base = begin & ~63u;
      uint32_t stop = std::min(end, base + 64);
      uint64_t mask = (~0ull >> (64 - (stop - begin))) << (begin - base);
      if (!f(words_[base / 64], mask, base)) return;
      begin = stop;
    }
  }
  std::vector<uint64_t> words_;
};

}  // namespace deepkern::ptx
