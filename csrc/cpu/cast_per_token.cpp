// scale[m, j] = max(|x[m, 128j : 128j+128]|, 1e-4) / 448        (rounded up to 2^n for ue8m0)
// q[m, k]     = e4m3(x[m, k] * (1 / scale[m, k / 128]))
//
// Parallelization: the caller gives each thread a range of rows. Within a row the compiler
// vectorizes: the code is integer and float arithmetic with selects and without branches. The one
// source is compiled for three instruction sets, and cpu_isa() chooses at run time. Every operation
// is IEEE and -ffp-contract=off is set, so all three give the same bits.
//
// Limit: memory bandwidth. A block is read once from memory and a second time from L1.
#include "cast_per_token.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace deepkern {
namespace {

constexpr int64_t SCALE_BLOCK = 128;  // values per scale

// Rounds to nearest even, saturates at 448; NaN becomes 0x7F.
DEEPKERN_INLINE uint8_t to_e4m3(float x) {
  const int32_t bits = as_bits(x);
  const int32_t magnitude = bits & 0x7FFFFFFF;
  const int32_t clamped = std::min(magnitude, int32_t{0x43E00000});  // 448
  // Keep 3 mantissa bits, ties to even, and change the exponent's bias from 127 to 7.
  const int32_t normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - (120 << 3);
  // Below 2^-6 the code counts units of 2^-9: adding 1.5 * 2^23 rounds to integers.
  const int32_t small = as_bits(as_float(clamped) * 512.0f + 12582912.0f) & 0xFF;
  const int32_t code = (clamped < 0x3C800000 ? small : normal) | ((bits >> 24) & 0x80);
  return static_cast<uint8_t>(magnitude > INFINITY_BITS ? 0x7F : code);
}

DEEPKERN_INLINE float block_scale(int32_t amax_bits, bool ue8m0) {
  if (amax_bits >= INFINITY_BITS) return as_float(0x7FC00000);  // inf or NaN makes the block NaN
  const float scale = std::max(as_float(amax_bits), 1e-4f) / 448.0f;
  return ue8m0 ? as_float((as_bits(scale) + 0x7FFFFF) & INFINITY_BITS) : scale;
}

template <Real type>
DEEPKERN_INLINE void cast_typed_rows(const void* x, int64_t x_stride, uint8_t* q,
                                     ScaleOutput scale, int64_t first, int64_t last, int64_t K,
                                     bool ue8m0) {
  const int64_t blocks = (K + SCALE_BLOCK - 1) / SCALE_BLOCK;
  for (int64_t m = first; m < last; ++m) {
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t offset = m * x_stride + j * SCALE_BLOCK;
      const int64_t count = std::min(SCALE_BLOCK, K - j * SCALE_BLOCK);
      int32_t amax = 0;  // bits of |x|: they order as the values do, inf and NaN last
      for (int64_t i = 0; i < count; ++i) {
        amax = std::max(amax, as_bits(load<type>(x, offset + i)) & 0x7FFFFFFF);
      }
      const float s = block_scale(amax, ue8m0);
      const float inverse = 1.0f / s;
      scale.data[m * scale.row_stride + j * scale.block_stride] = s;
      uint8_t* out = q + m * K + j * SCALE_BLOCK;
      for (int64_t i = 0; i < count; ++i) out[i] = to_e4m3(load<type>(x, offset + i) * inverse);
    }
  }
}

DEEPKERN_INLINE void cast_any_rows(const void* x, Real type, int64_t x_stride, uint8_t* q,
                                   ScaleOutput scale, int64_t first, int64_t last, int64_t K,
                                   bool ue8m0) {
  switch (type) {
    case Real::bf16:
      return cast_typed_rows<Real::bf16>(x, x_stride, q, scale, first, last, K, ue8m0);
    case Real::fp16:
      return cast_typed_rows<Real::fp16>(x, x_stride, q, scale, first, last, K, ue8m0);
    case Real::fp32:
      return cast_typed_rows<Real::fp32>(x, x_stride, q, scale, first, last, K, ue8m0);
  }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void cast_rows_avx2(const void* x, Real type, int64_t x_stride,
                                                    uint8_t* q, ScaleOutput scale, int64_t first,
                                                    int64_t last, int64_t K, bool ue8m0) {
  cast_any_rows(x, type, x_stride, q, scale, first, last, K, ue8m0);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) void
cast_rows_avx512(const void* x, Real type, int64_t x_stride, uint8_t* q, ScaleOutput scale,
                 int64_t first, int64_t last, int64_t K, bool ue8m0) {
  cast_any_rows(x, type, x_stride, q, scale, first, last, K, ue8m0);
}
#endif

}  // namespace

void cast_rows(const void* x, Real type, int64_t x_stride, uint8_t* q, ScaleOutput scale,
               int64_t first, int64_t last, int64_t K, bool ue8m0, const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx512") == 0) {
    return cast_rows_avx512(x, type, x_stride, q, scale, first, last, K, ue8m0);
  }
  if (std::strcmp(isa, "avx2") == 0) {
    return cast_rows_avx2(x, type, x_stride, q, scale, first, last, K, ue8m0);
  }
#else
  (void)isa;
#endif
  cast_any_rows(x, type, x_stride, q, scale, first, last, K, ue8m0);
}

const char* cpu_isa() {
  const char* requested = std::getenv("DEEPKERN_CPU_ISA");
  const bool automatic = requested == nullptr || *requested == '\0';
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && (automatic || std::strcmp(requested, "avx512") == 0)) return "avx512";
  const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2 && (automatic || std::strcmp(requested, "avx2") == 0)) return "avx2";
#endif
  if (automatic || std::strcmp(requested, "portable") == 0) return "portable";
  return nullptr;
}

}  // namespace deepkern
