// Converts bfloat16, float16 and float32 tensor elements to float32 and back.
//
// The code is integer and float arithmetic with selects and without branches, so the compiler
// vectorizes it for any instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "../fp8_gemm.h"

#define DEEPKERN_INLINE inline __attribute__((always_inline))

namespace deepkern {

constexpr int64_t size_of(Real type) { return type == Real::fp32 ? 4 : 2; }  // bytes

constexpr int32_t INFINITY_BITS = 0x7F800000;

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
  // fp16: change the exponent's bias from 15 to 127. A subnormal has no leading one: add the
  // smallest normal as the leading one and subtract it again, which is exact.
  const int32_t magnitude = (bits & 0x7FFF) << 13;
  const float normal = as_float(magnitude + (112 << 23));
  const float subnormal = as_float(magnitude + (113 << 23)) - 0x1p-14f;
  const float special = as_float(magnitude | INFINITY_BITS);
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
    rounded = magnitude > INFINITY_BITS ? 0x7FC0 : static_cast<int32_t>(finite);
  } else {
    const int32_t normal = (magnitude - (112 << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    // Below 2^-14 fp16 counts units of 2^-24. A float32 in [1/2, 1) has the same unit, so adding
    // 1/2 rounds.
    const int32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    const int32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const int32_t special = magnitude > INFINITY_BITS ? 0x7E00 : 0x7C00;
    rounded = magnitude >= 0x477FF000 ? special : finite;  // 65520 and more are inf
  }
  static_cast<uint16_t*>(x)[i] = static_cast<uint16_t>(sign | rounded);
}

}  // namespace deepkern
