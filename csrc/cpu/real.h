// float32 values from and to the types a tensor may hold, in straight integer and float arithmetic
// with selects instead of branches, which the compiler vectorises for any instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "../fp8_gemm.h"

#define DEEPKERN_INLINE inline __attribute__((always_inline))

namespace deepkern {

constexpr int32_t kInfinity = 0x7F800000;

DEEPKERN_INLINE float as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

DEEPKERN_INLINE int32_t as_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <Real type>
DEEPKERN_INLINE float load(const void* x, int64_t i) {
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

// Rounds to nearest even.
template <Real type>
DEEPKERN_INLINE void store(void* x, int64_t i, float value) {
  if constexpr (type == Real::fp32) {
    static_cast<float*>(x)[i] = value;
    return;
  }
  const int32_t bits = as_bits(value), magnitude = bits & 0x7FFFFFFF;
  const int32_t sign = bits >> 16 & 0x8000;
  int32_t rounded;
  if constexpr (type == Real::bf16) {
    const uint32_t finite = (uint32_t(magnitude) + 0x7FFF + (magnitude >> 16 & 1)) >> 16;
    rounded = magnitude > kInfinity ? 0x7FC0 : static_cast<int32_t>(finite);
  } else {
    const int32_t normal = (magnitude - (112 << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    // Below 2^-14 whole units of 2^-24 are left: those of a float32 just above 1/2.
    const int32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    const int32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const int32_t special = magnitude > kInfinity ? 0x7E00 : 0x7C00;
    rounded = magnitude >= 0x477FF000 ? special : finite;  // 65520 and more are inf
  }
  static_cast<uint16_t*>(x)[i] = static_cast<uint16_t>(sign | rounded);
}

}  // namespace deepkern
