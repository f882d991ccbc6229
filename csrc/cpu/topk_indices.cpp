// out[s] = the k places n < lengths[s] with the largest logits[s, n], ascending, then -1
//
// From a sample of a row comes a bound that somewhat more than k values should reach. One pass over
// the row collects those that do; nearly all blocks of it are told by one vectorised comparison to
// hold none. Among the collected the k-th largest is found by std::nth_element. Should the sample
// have misled, so that fewer than k were collected, all values are. So the result never depends on
// the sample, and the usual speed is that of one pass.
#include "topk_indices.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

namespace deepkern {
namespace {

constexpr int64_t kBlock = 32;
constexpr int64_t kSample = 1024;
constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();  // below every key

// Orders as values do; NaN as -inf, -0 as 0.
DEEPKERN_INLINE int32_t sortable(float value) {
  int32_t bits = as_bits(value);
  bits = (bits & 0x7FFFFFFF) > kInfinity ? static_cast<int32_t>(0xFF800000) : bits;
  bits = bits == kLowest ? 0 : bits;  // the bits of -0
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// Values that reach a bound, in the order of their places.
struct Collected {
  explicit Collected(int64_t most)
      : keys(new int32_t[most + kBlock]), places(new int32_t[most + kBlock]), count(0) {}
  std::unique_ptr<int32_t[]> keys, places;  // a block may be written past the last
  int64_t count;
};

template <Real type>
DEEPKERN_INLINE int32_t sampled_bound(const void* x, int64_t n, int64_t k) {
  const double expected = double(kSample) * double(k) / double(n);
  const auto rank = static_cast<int64_t>(expected + 3 * std::sqrt(expected) + 8);
  if (rank >= kSample || n < 4 * kSample) return kLowest;
  int32_t keys[kSample];
  const int64_t stride = n / kSample;
  uint32_t random = 1;
  for (int64_t i = 0; i < kSample; ++i) {
    random = random * 1664525u + 1013904223u;
    keys[i] = sortable(load<type>(x, i * stride + (random >> 8) % stride));
  }
  std::nth_element(keys, keys + rank, keys + kSample, std::greater<int32_t>());
  return keys[rank];
}

template <Real type>
DEEPKERN_INLINE void collect(const void* x, int64_t n, int32_t bound, Collected& to) {
  to.count = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    int32_t keys[kBlock];
    const int64_t size = std::min(kBlock, n - first);
    int32_t largest = kLowest;
    if (size == kBlock) {
      for (int64_t j = 0; j < kBlock; ++j) keys[j] = sortable(load<type>(x, first + j));
      for (int64_t j = 0; j < kBlock; ++j) largest = std::max(largest, keys[j]);
    } else {
      for (int64_t j = 0; j < size; ++j) keys[j] = sortable(load<type>(x, first + j));
      largest = std::numeric_limits<int32_t>::max();
    }
    if (largest < bound) continue;
    for (int64_t j = 0; j < size; ++j) {
      to.keys[to.count] = keys[j];
      to.places[to.count] = static_cast<int32_t>(first + j);
      to.count += keys[j] >= bound;
    }
  }
}

template <Real type>
DEEPKERN_INLINE void one_row(const void* x, int64_t n, int64_t k, Collected& found,
                             std::vector<int32_t>& scratch, int32_t* out) {
  if (n <= k) {
    for (int64_t i = 0; i < k; ++i) out[i] = i < n ? static_cast<int32_t>(i) : -1;
    return;
  }
  collect<type>(x, n, sampled_bound<type>(x, n, k), found);
  if (found.count < k) collect<type>(x, n, kLowest, found);
  scratch.assign(found.keys.get(), found.keys.get() + found.count);
  std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(),
                   std::greater<int32_t>());
  const int32_t threshold = scratch[k - 1];
  int64_t larger = 0;
  for (int64_t i = 0; i < found.count; ++i) larger += found.keys[i] > threshold;
  int64_t room = k - larger;  // for values equal to the threshold
  for (int64_t i = 0, taken = 0; taken < k; ++i) {
    const bool equal = found.keys[i] == threshold && room > 0;
    room -= equal;
    out[taken] = found.places[i];
    taken += equal || found.keys[i] > threshold;
  }
}

template <Real type>
DEEPKERN_INLINE void rows_of(const TopkRows& rows, int64_t first, int64_t last) {
  constexpr int64_t size = type == Real::fp32 ? 4 : 2;
  Collected found(rows.N);
  std::vector<int32_t> scratch;
  for (int64_t s = first; s < last; ++s) {
    int64_t n = rows.N;
    if (rows.lengths != nullptr) {
      n = std::clamp<int64_t>(rows.lengths[s * rows.length_step], 0, rows.N);
    }
    const void* x = static_cast<const char*>(rows.logits) + s * rows.row * size;
    one_row<type>(x, n, rows.k, found, scratch, rows.out + s * rows.k);
  }
}

DEEPKERN_INLINE void of_type(const TopkRows& rows, int64_t first, int64_t last) {
  if (rows.type == Real::bf16) return rows_of<Real::bf16>(rows, first, last);
  return rows_of<Real::fp32>(rows, first, last);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void topk_avx2(const TopkRows& rows, int64_t first,
                                               int64_t last) {
  of_type(rows, first, last);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) void
topk_avx512(const TopkRows& rows, int64_t first, int64_t last) {
  of_type(rows, first, last);
}
#endif

}  // namespace

void topk_rows(const TopkRows& rows, int64_t first, int64_t last, const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx512") == 0) return topk_avx512(rows, first, last);
  if (std::strcmp(isa, "avx2") == 0) return topk_avx2(rows, first, last);
#else
  (void)isa;
#endif
  of_type(rows, first, last);
}

}  // namespace deepkern
