// latent'[t] = latent[t] / sqrt(mean(latent[t]²) + eps) * norm_weight     (RMSNorm, if given)
// rope'[t]   = k_rope[t], each pair (2i, 2i + 1) rotated by its position's angle  (if given)
// cache[slot[t]] = (latent'[t], rope'[t]), rounded once to the cache's format
//
// The result equals the reference bitwise: squares are added pairwise, neighbours first, and no
// multiplication is fused with an addition.
//
// Parallelization: threads take ranges of tokens. A token's latents are kept in L1 between the norm
// and the cast.
//
// Limit: memory bandwidth.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_cache.h"
#include "scratch.h"

namespace deepkern {
namespace {

struct MlaCacheAppend {
  RealRows latent, rope;     // [T, R], [T, D]
  LatentCache cache;         // written
  const int64_t* slots;      // [T]
  const void* norm_weight;   // [R]; null: no RMSNorm
  Real weight_type;          // of norm_weight
  const int64_t* positions;  // [T]; null: no rotation
  const float* cos_sin;      // [max_positions, D]; null: no rotation
  int64_t cos_sin_stride, max_positions;
  float eps;
  int64_t padded;  // R rounded up to a power of two, at least 128
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/mla_cache_append.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

void mla_cache_append(const Tensor& latent, const Tensor& k_rope, const Tensor& cache,
                      const Tensor& slot_mapping, const std::optional<Tensor>& norm_weight,
                      const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin,
                      double eps) {
  const Arguments arguments{"mla_cache_append"};
  MlaCacheAppend append{};
  append.latent.type = arguments.check_real("latent", latent, {-1, -1});
  const int64_t T = latent.size(0), R = latent.size(1);
  append.rope.type = arguments.check_real("k_rope", k_rope, {T, -1});
  const int64_t D = k_rope.size(1);
  arguments.check("slot_mapping", slot_mapping, ScalarType::Long, {T});
  append.cache = latent_cache(arguments, cache, R);
  arguments.require(append.cache.D == D, "cache", "a last dimension that holds R + D values");
  arguments.require(positions.has_value() == cos_sin.has_value(), "positions",
                    "positions and cos_sin together, or neither");
  if (norm_weight.has_value()) {
    append.weight_type = arguments.check_real("norm_weight", *norm_weight, {R});
    append.norm_weight = norm_weight->const_data_ptr();
  }
  if (positions.has_value()) {
    arguments.check("positions", *positions, ScalarType::Long, {T});
    arguments.check("cos_sin", *cos_sin, ScalarType::Float, {-1, D});
    arguments.require(D % 2 == 0, "k_rope", "an even number of values to rotate in pairs");
    append.positions = data<int64_t>(positions);
    append.cos_sin = data<float>(cos_sin);
    append.cos_sin_stride = cos_sin->stride(0);
    append.max_positions = cos_sin->size(0);
  }
  if (T == 0 || cache.numel() == 0) return;
  append.latent = {latent.const_data_ptr(), append.latent.type, latent.stride(0)};
  append.rope = {k_rope.const_data_ptr(), append.rope.type, k_rope.stride(0)};
  append.slots = data<int64_t>(slot_mapping);
  append.eps = static_cast<float>(eps);
  append.padded = 128;
  while (append.padded < R) append.padded *= 2;
  const auto append_tokens = DEEPKERN_DISPATCH(append_tokens);
  parallel_ranges(T, 2 * (R + D),
                  [&](int64_t first, int64_t last) { append_tokens(append, first, last); });
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("mla_cache_append", TORCH_BOX(&mla_cache_append));
}

}  // namespace
}  // namespace deepkern
#else
#include "attention_tokens.h"
#include "cast_block.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

void load_row(const RealRows& rows, int64_t m, int64_t count, float* out) {
  const char* row = static_cast<const char*>(rows.data) + m * rows.stride * size_of(rows.type);
  DEEPKERN_FOR_REAL(rows.type, widen_values<type>(row, count, out));
}

// The sum of count = 2^n squares at x, added pairwise; scratch holds count floats.
float sum_of_squares(const float* x, float* scratch, int64_t count) {
  for (int64_t i = 0; i < count / 2; ++i) {
    scratch[i] = x[2 * i] * x[2 * i] + x[2 * i + 1] * x[2 * i + 1];
  }
  float* from = scratch;
  float* to = scratch + count / 2;
  for (int64_t width = count / 4; width > 0; width /= 2) {
    float* __restrict out = to;
    const float* __restrict in = from;
    for (int64_t i = 0; i < width; ++i) out[i] = in[2 * i] + in[2 * i + 1];
    to = from;
    from = out;
  }
  return from[0];
}

void normalize(const MlaCacheAppend& a, const float* weight, float* latent, float* scratch) {
  const float squares = sum_of_squares(latent, scratch, a.padded);
  const float mean = squares / static_cast<float>(a.cache.R);
  const float inverse = 1.0f / std::sqrt(mean + a.eps);
  for (int64_t i = 0; i < a.cache.R; ++i) latent[i] = latent[i] * inverse * weight[i];
}

void rotate(const float* cos_sin, int64_t D, float* x) {
  for (int64_t i = 0; i < D / 2; ++i) {
    const float cos = cos_sin[i], sin = cos_sin[D / 2 + i];
    const float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * cos - odd * sin;
    x[2 * i + 1] = odd * cos + even * sin;
  }
}

void store_token(const LatentCache& cache, const float* latent, const float* rope, char* token) {
  if (!cache.fp8) {
    DEEPKERN_FOR_REAL(cache.type, store_values<type>(token, latent, cache.R);
                      store_values<type>(token + cache.rope_offset(), rope, cache.D));
    return;
  }
  for (int64_t i = 0; i < cache.R; i += CAST_VALUES) {
    const int64_t count = std::min(CAST_VALUES, cache.R - i);
    float scale[CAST_VALUES / 128];
    cast_values<Real::fp32>(latent, i, count, reinterpret_cast<uint8_t*>(token + i), scale, 1,
                            false);
    std::memcpy(token + cache.R + i / 128 * sizeof(float), scale,
                ceil_div(count, 128) * sizeof(float));
  }
  store_values<Real::bf16>(token + cache.rope_offset(), rope, cache.D);
}

void append_tokens(const MlaCacheAppend& a, int64_t first, int64_t last) {
  const int64_t R = a.cache.R, D = a.cache.D;
  // Latents (zero past R), norm weight and scratch, `padded` floats each; then RoPE values.
  float* latent = thread_scratch(3 * a.padded + D);
  std::memset(latent, 0, a.padded * sizeof(float));
  float* weight = latent + a.padded;
  float* scratch = weight + a.padded;
  float* rope = scratch + a.padded;
  if (a.norm_weight != nullptr) load_row({a.norm_weight, a.weight_type, 0}, 0, R, weight);
  for (int64_t t = first; t < last; ++t) {
    const int64_t slot = a.slots[t];
    if (slot < 0 || slot >= a.cache.num_slots()) continue;
    const int64_t position = a.positions != nullptr ? a.positions[t] : 0;
    if (a.positions != nullptr && (position < 0 || position >= a.max_positions)) continue;
    load_row(a.latent, t, R, latent);
    load_row(a.rope, t, D, rope);
    if (a.norm_weight != nullptr) normalize(a, weight, latent, scratch);
    if (a.positions != nullptr) rotate(a.cos_sin + position * a.cos_sin_stride, D, rope);
    store_token(a.cache, latent, rope, a.cache.slot(slot));
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
