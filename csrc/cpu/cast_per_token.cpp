// scale[m, j] = max(|x[m, 128j : 128j+128]|, 1e-4) / 448        (rounded up to 2^n for ue8m0)
// q[m, k]     = e4m3(x[m, k] * (1 / scale[m, k / 128]))
//
// One source, compiled for three instruction sets and chosen at run time: everything is straight
// integer and float arithmetic with selects instead of branches, which the compiler vectorises, and
// every operation is IEEE, so all three give the same bits. Built with -ffp-contract=off. Speed is
// that of memory: a block is read from memory once and a second time from L1.
#include "cast_per_token.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace deepkern {
namespace {

constexpr int64_t kBlock = 128;
constexpr int32_t kInfinity = 0x7F800000;

inline __attribute__((always_inline)) float as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline __attribute__((always_inline)) int32_t as_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <Real type>
inline __attribute__((always_inline)) float load(const void* x, int64_t i) {
  if constexpr (type == Real::fp32) return static_cast<const float*>(x)[i];
  const int32_t bits = static_cast<const uint16_t*>(x)[i];
  if constexpr (type == Real::bf16) return as_float(static_cast<int32_t>(uint32_t(bits) << 16));
  // fp16: move the exponent's bias from 15 to 127. Subnormals lack the leading one: let the
  // smallest normal stand in for it and subtract it again, which is exact.
  const int32_t magnitude = (bits & 0x7FFF) << 13;
  const float normal = as_float(magnitude + (112 << 23));
  const float subnormal = as_float(magnitude + (113 << 23)) - 0x1p-14f;
  const float special = as_float(magnitude | kInfinity);
  const int32_t exponent = bits & 0x7C00;
  const float value = exponent == 0x7C00 ? special : exponent == 0 ? subnormal : normal;
  return as_float(as_bits(value) | static_cast<int32_t>(uint32_t(bits & 0x8000) << 16));
}

// Nearest even, saturating at 448; NaN is 0x7F.
inline __attribute__((always_inline)) uint8_t to_e4m3(float x) {
  const int32_t bits = as_bits(x);
  const int32_t magnitude = bits & 0x7FFFFFFF;
  const int32_t clamped = std::min(magnitude, int32_t{0x43E00000});  // 448
  // Keep 3 mantissa bits, ties to even, and move the exponent's bias from 127 to 7.
  const int32_t normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - (120 << 3);
  // Below 2^-6 the code counts units of 2^-9: adding 1.5 * 2^23 rounds to whole units.
  const int32_t small = as_bits(as_float(clamped) * 512.0f + 12582912.0f) & 0xFF;
  const int32_t code = (clamped < 0x3C800000 ? small : normal) | ((bits >> 24) & 0x80);
  return static_cast<uint8_t>(magnitude > kInfinity ? 0x7F : code);
}

inline __attribute__((always_inline)) float block_scale(int32_t amax_bits, bool ue8m0) {
  if (amax_bits >= kInfinity) return as_float(0x7FC00000);  // NaN: inf or NaN spoils its block
  const float scale = std::max(as_float(amax_bits), 1e-4f) / 448.0f;
  return ue8m0 ? as_float((as_bits(scale) + 0x7FFFFF) & kInfinity) : scale;
}

template <Real type>
inline __attribute__((always_inline)) void rows(const void* x, int64_t x_stride, uint8_t* q,
                                                float* scale, int64_t first, int64_t last,
                                                int64_t K, bool ue8m0) {
  const int64_t blocks = (K + kBlock - 1) / kBlock;
  for (int64_t m = first; m < last; ++m) {
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t from = m * x_stride + j * kBlock;
      const int64_t count = std::min(kBlock, K - j * kBlock);
      int32_t amax = 0;  // |x| as bits: they order as the numbers do, inf and NaN on top
      for (int64_t i = 0; i < count; ++i) {
        amax = std::max(amax, as_bits(load<type>(x, from + i)) & 0x7FFFFFFF);
      }
      const float s = block_scale(amax, ue8m0);
      const float inverse = 1.0f / s;
      scale[m * blocks + j] = s;
      uint8_t* out = q + m * K + j * kBlock;
      for (int64_t i = 0; i < count; ++i) out[i] = to_e4m3(load<type>(x, from + i) * inverse);
    }
  }
}

inline __attribute__((always_inline)) void rows_of(const void* x, Real type, int64_t x_stride,
                                                   uint8_t* q, float* scale, int64_t first,
                                                   int64_t last, int64_t K, bool ue8m0) {
  switch (type) {
    case Real::bf16: return rows<Real::bf16>(x, x_stride, q, scale, first, last, K, ue8m0);
    case Real::fp16: return rows<Real::fp16>(x, x_stride, q, scale, first, last, K, ue8m0);
    case Real::fp32: return rows<Real::fp32>(x, x_stride, q, scale, first, last, K, ue8m0);
  }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void rows_avx2(const void* x, Real type, int64_t x_stride,
                                               uint8_t* q, float* scale, int64_t first,
                                               int64_t last, int64_t K, bool ue8m0) {
  rows_of(x, type, x_stride, q, scale, first, last, K, ue8m0);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) void
rows_avx512(const void* x, Real type, int64_t x_stride, uint8_t* q, float* scale, int64_t first,
            int64_t last, int64_t K, bool ue8m0) {
  rows_of(x, type, x_stride, q, scale, first, last, K, ue8m0);
}
#endif

}  // namespace

void cast_rows(const void* x, Real type, int64_t x_stride, uint8_t* q, float* scale, int64_t first,
               int64_t last, int64_t K, bool ue8m0, const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx512") == 0) {
    return rows_avx512(x, type, x_stride, q, scale, first, last, K, ue8m0);
  }
  if (std::strcmp(isa, "avx2") == 0) {
    return rows_avx2(x, type, x_stride, q, scale, first, last, K, ue8m0);
  }
#else
  (void)isa;
#endif
  rows_of(x, type, x_stride, q, scale, first, last, K, ue8m0);
}

const char* cpu_isa() {
  const char* wanted = std::getenv("DEEPKERN_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && (any || std::strcmp(wanted, "avx512") == 0)) return "avx512";
  const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2 && (any || std::strcmp(wanted, "avx2") == 0)) return "avx2";
#endif
  if (any || std::strcmp(wanted, "portable") == 0) return "portable";
  return nullptr;
}

}  // namespace deepkern
