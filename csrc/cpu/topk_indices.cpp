// out[s] = the k indices n < lengths[s] of the largest logits[s, n], ascending, then -1
//
// A random sample of the row gives a lower bound that slightly more than k values should reach. One
// pass over the row collects the values that reach it; one vectorized comparison skips a chunk of
// 32 values without any. std::nth_element finds the k-th largest of the collected values. If fewer
// than k values were collected, a second pass collects all of them, so the result does not depend
// on the sample.
//
// Parallelization: the caller gives each thread a range of rows.
//
// Limit: memory bandwidth of one pass over the logits, in the usual case.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "isa.h"
#include "tensors.h"

namespace deepkern {
namespace {

struct TopkRows {
  const void* logits;  // [S, N] of `type`
  Real type;           // bf16 or fp32
  int64_t row_stride;  // elements from a row of logits to the next
  int64_t N, k;
  const int32_t* lengths;  // [S], valid values of each row; null: all N
  int64_t length_stride;   // elements
  int32_t* out;            // [S, k] contiguous: indices in ascending order, then -1
};

constexpr int64_t CHUNK = 32;          // values that one comparison skips
constexpr int64_t SAMPLE_SIZE = 1024;  // values
constexpr int32_t LOWEST_KEY = std::numeric_limits<int32_t>::min();  // less than every key

// An integer key that orders as the values do; NaN counts as -inf and -0 as 0.
DEEPKERN_INLINE int32_t sortable(float value) {
  int32_t bits = as_bits(value);
  bits = (bits & 0x7FFFFFFF) > INFINITY_BITS ? static_cast<int32_t>(0xFF800000) : bits;
  bits = bits == LOWEST_KEY ? 0 : bits;  // LOWEST_KEY has the bits of -0
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// The values that reach a bound, by ascending index.
struct Candidates {
  explicit Candidates(int64_t max_count)
      : keys(new int32_t[max_count + CHUNK]), indices(new int32_t[max_count + CHUNK]), count(0) {}
  std::unique_ptr<int32_t[]> keys, indices;  // up to a chunk is written past the last
  int64_t count;
};

template <Real type>
DEEPKERN_INLINE int32_t sampled_bound(const void* x, int64_t n, int64_t k) {
  const double expected = double(SAMPLE_SIZE) * double(k) / double(n);
  const auto rank = static_cast<int64_t>(expected + 3 * std::sqrt(expected) + 8);
  if (rank >= SAMPLE_SIZE || n < 4 * SAMPLE_SIZE) return LOWEST_KEY;
  int32_t keys[SAMPLE_SIZE];
  const int64_t stride = n / SAMPLE_SIZE;
  uint32_t random = 1;
  for (int64_t i = 0; i < SAMPLE_SIZE; ++i) {
    random = random * 1664525u + 1013904223u;
    keys[i] = sortable(load<type>(x, i * stride + (random >> 8) % stride));
  }
  std::nth_element(keys, keys + rank, keys + SAMPLE_SIZE, std::greater<int32_t>());
  return keys[rank];
}

template <Real type>
DEEPKERN_INLINE void collect(const void* x, int64_t n, int32_t bound, Candidates& out) {
  out.count = 0;
  for (int64_t first = 0; first < n; first += CHUNK) {
    int32_t keys[CHUNK];
    const int64_t size = std::min(CHUNK, n - first);
    int32_t largest = LOWEST_KEY;
    if (size == CHUNK) {
      for (int64_t j = 0; j < CHUNK; ++j) keys[j] = sortable(load<type>(x, first + j));
      for (int64_t j = 0; j < CHUNK; ++j) largest = std::max(largest, keys[j]);
    } else {
      for (int64_t j = 0; j < size; ++j) keys[j] = sortable(load<type>(x, first + j));
      largest = std::numeric_limits<int32_t>::max();
    }
    if (largest < bound) continue;
    for (int64_t j = 0; j < size; ++j) {
      out.keys[out.count] = keys[j];
      out.indices[out.count] = static_cast<int32_t>(first + j);
      out.count += keys[j] >= bound;
    }
  }
}

template <Real type>
DEEPKERN_INLINE void topk_row(const void* x, int64_t n, int64_t k, Candidates& candidates,
                              std::vector<int32_t>& scratch, int32_t* out) {
  if (n <= k) {
    for (int64_t i = 0; i < k; ++i) out[i] = i < n ? static_cast<int32_t>(i) : -1;
    return;
  }
  collect<type>(x, n, sampled_bound<type>(x, n, k), candidates);
  if (candidates.count < k) collect<type>(x, n, LOWEST_KEY, candidates);
  scratch.assign(candidates.keys.get(), candidates.keys.get() + candidates.count);
  std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(),
                   std::greater<int32_t>());
  const int32_t threshold = scratch[k - 1];
  int64_t num_larger = 0;
  for (int64_t i = 0; i < candidates.count; ++i) num_larger += candidates.keys[i] > threshold;
  int64_t ties = k - num_larger;  // values equal to the threshold that still belong to the k
  for (int64_t i = 0, count = 0; count < k; ++i) {
    const bool equal = candidates.keys[i] == threshold && ties > 0;
    ties -= equal;
    out[count] = candidates.indices[i];
    count += equal || candidates.keys[i] > threshold;
  }
}

template <Real type>
DEEPKERN_INLINE void topk_typed_rows(const TopkRows& rows, int64_t first, int64_t last) {
  constexpr int64_t size = type == Real::fp32 ? 4 : 2;
  Candidates candidates(rows.N);
  std::vector<int32_t> scratch;
  for (int64_t s = first; s < last; ++s) {
    int64_t n = rows.N;
    if (rows.lengths != nullptr) {
      n = std::clamp<int64_t>(rows.lengths[s * rows.length_stride], 0, rows.N);
    }
    const void* x = static_cast<const char*>(rows.logits) + s * rows.row_stride * size;
    topk_row<type>(x, n, rows.k, candidates, scratch, rows.out + s * rows.k);
  }
}

DEEPKERN_INLINE void topk_any_rows(const TopkRows& rows, int64_t first, int64_t last) {
  if (rows.type == Real::bf16) return topk_typed_rows<Real::bf16>(rows, first, last);
  return topk_typed_rows<Real::fp32>(rows, first, last);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void topk_avx2(const TopkRows& rows, int64_t first, int64_t last) {
  topk_any_rows(rows, first, last);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) void
topk_avx512(const TopkRows& rows, int64_t first, int64_t last) {
  topk_any_rows(rows, first, last);
}
#endif

void topk_rows(const TopkRows& rows, int64_t first, int64_t last, Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return topk_avx512(rows, first, last);
  if (isa == Isa::avx2) return topk_avx2(rows, first, last);
#else
  (void)isa;
#endif
  topk_any_rows(rows, first, last);
}

Tensor topk_indices(const Tensor& logits, int64_t k, const std::optional<Tensor>& lengths) {
  STD_TORCH_CHECK(logits.dim() == 2, "topk_indices: logits: expected rank 2, got rank ",
                  logits.dim());
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "topk_indices: logits: expected dtype float32 or bfloat16, got ", dtype);
  const int64_t S = logits.size(0), N = logits.size(1);
  STD_TORCH_CHECK(k >= 0 && k <= 4096, "topk_indices: k: expected 0 to 4096, got ", k);
  STD_TORCH_CHECK(N <= (int64_t{1} << 30), "topk_indices: logits: expected rows of at most 2^30");
  STD_TORCH_CHECK(N <= 1 || logits.stride(1) == 1,
                  "topk_indices: logits: expected stride 1 in the last dimension, got ",
                  logits.stride(1));
  const Isa isa = cpu_isa();
  TopkRows rows{};
  if (lengths.has_value()) {
    STD_TORCH_CHECK(lengths->dim() == 1 && lengths->size(0) == S,
                    "topk_indices: lengths: expected shape (", S, ")");
    STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Int,
                    "topk_indices: lengths: expected dtype int32, got ", lengths->scalar_type());
    rows.lengths = static_cast<const int32_t*>(lengths->const_data_ptr());
    rows.length_stride = lengths->stride(0);
  }
  Tensor out = new_tensor({S, k}, ScalarType::Int);
  if (S * k == 0) return out;
  rows.logits = logits.const_data_ptr();
  rows.type = dtype == ScalarType::Float ? Real::fp32 : Real::bf16;
  rows.row_stride = logits.stride(0);
  rows.N = N;
  rows.k = k;
  rows.out = static_cast<int32_t*>(out.mutable_data_ptr());
  parallel_ranges(S, N, [&](int64_t first, int64_t last) { topk_rows(rows, first, last, isa); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("topk_indices", TORCH_BOX(&topk_indices));
}

}  // namespace
}  // namespace deepkern
