// Conversions of the primitives: bfloat16, float16 and e4m3, with the rounding of the hardware.
#include <algorithm>
#include <cmath>

#include "primitives.h"

namespace sm90 {

bf16 to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

fp16 to_fp16(float x) {
  const uint32_t bits = float_bits(x);
  const uint16_t sign = bits >> 16 & 0x8000;
  if (std::isnan(x)) return {0x7fff};
  const float magnitude = std::fabs(x);
  if (magnitude == 0.0f) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(magnitude, &exponent);
  const int last_bit = std::max(exponent - 11, -24);  // exponent of the last mantissa bit
  const auto mantissa = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -last_bit)));
  const uint32_t code = last_bit == -24 ? mantissa : ((last_bit + 24) << 10) + mantissa;
  return {static_cast<uint16_t>(sign | code)};
}

float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float to_float(fp16 x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                         : std::ldexp(static_cast<float>(mantissa), -24);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

uint32_t e4m3_to_fp16(uint16_t codes) {
  const auto convert = [](int code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    float magnitude =
        exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    if ((code & 127) == 127) magnitude = NAN;
    return to_fp16(code & 128 ? -magnitude : magnitude);
  };
  return pack(convert(codes & 255), convert(codes >> 8));
}

uint32_t multiply_fp16(uint32_t x, uint32_t y) {
  return pack(to_fp16(to_float(low_fp16(x)) * to_float(low_fp16(y))),
              to_fp16(to_float(high_fp16(x)) * to_float(high_fp16(y))));
}

}  // namespace sm90
