// scale[t]       = max(|k[t]|, 1e-4) / 448         (rounded up to 2^n for ue8m0)
// cache[slot[t]] = e4m3(k[t] * (1 / scale[t])), scale[t]
//
// Parallelization: threads take ranges of tokens. A token is loaded as float32 into L1 and cast.
//
// Limit: memory bandwidth.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "attention_cache.h"
#include "scratch.h"

namespace deepkern {
namespace {

struct IndexerCacheAppend {
  RealRows k;  // [T, D]
  IndexerCache cache;
  const int64_t* slots;  // [T]
  bool ue8m0;
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/indexer_cache_append.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

void indexer_cache_append(const Tensor& k, const Tensor& cache, const Tensor& slot_mapping,
                          const std::string& scale_format) {
  const Arguments arguments{"indexer_cache_append"};
  IndexerCacheAppend append{};
  const Real type = arguments.check_real("k", k, {-1, -1});
  const int64_t T = k.size(0), D = k.size(1);
  append.cache = indexer_cache(arguments, cache, D);
  arguments.check("slot_mapping", slot_mapping, ScalarType::Long, {T});
  arguments.require(D <= 8192, "k", "at most 8192 columns");
  append.ue8m0 = arguments.choose("scale_format", scale_format, "ue8m0", "fp32");
  if (T == 0 || cache.numel() == 0) return;
  append.k = {k.const_data_ptr(), type, k.stride(0)};
  append.slots = data<int64_t>(slot_mapping);
  const auto append_tokens = DEEPKERN_DISPATCH(append_indexer_tokens);
  parallel_ranges(T, D, [&](int64_t first, int64_t last) { append_tokens(append, first, last); });
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("indexer_cache_append", TORCH_BOX(&indexer_cache_append));
}

}  // namespace
}  // namespace deepkern
#else
#include "attention_tokens.h"
#include "cast_block.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// padded: D rounded up to a multiple of LANES; x is zero past D and codes has `padded` bytes.
float cast_token(const float* x, int64_t padded, bool ue8m0, uint8_t* codes) {
  Ints amax = {};
  for (int64_t i = 0; i < padded; i += LANES) {
    const Ints magnitude = bits_of(load_vector<Floats>(x + i)) & 0x7FFFFFFF;
    amax = magnitude > amax ? magnitude : amax;
  }
  const float scale = block_scale(largest_lane(amax), ue8m0);
  const Floats inverse = broadcast(1.0f / scale);
  for (int64_t i = 0; i < padded; i += LANES) {
    store_e4m3(codes + i, load_vector<Floats>(x + i) * inverse);
  }
  return scale;
}

void append_indexer_tokens(const IndexerCacheAppend& a, int64_t first, int64_t last) {
  const int64_t D = a.cache.D, padded = (D + LANES - 1) / LANES * LANES;
  float* values = thread_scratch(2 * padded);
  std::memset(values, 0, padded * sizeof(float));
  auto* codes = reinterpret_cast<uint8_t*>(values + padded);
  const int64_t row_bytes = a.k.stride * size_of(a.k.type);
  for (int64_t t = first; t < last; ++t) {
    const int64_t slot = a.slots[t];
    if (slot < 0 || slot >= a.cache.num_pages * a.cache.page_size) continue;
    const int64_t page = slot / a.cache.page_size, offset = slot % a.cache.page_size;
    const char* row = static_cast<const char*>(a.k.data) + t * row_bytes;
    DEEPKERN_FOR_REAL(a.k.type, widen_values<type>(row, D, values));
    const float scale = cast_token(values, padded, a.ue8m0, codes);
    std::memcpy(a.cache.codes(page, offset), codes, D);
    std::memcpy(a.cache.scale(page, offset), &scale, sizeof scale);
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
