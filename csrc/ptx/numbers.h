// Number formats of PTX: conversions with the roundings of cvt, and 16-bit arithmetic.
//
// How: a value is sign * mantissa * 2^exponent with an integer mantissa of up to 53 bits, and
// encode() rounds it once to a format. Formats that occur often have a shorter way.
//
// Source: PTX ISA 9.0, sections 5.2.3 (alternate formats) and 9.7.9.22 (cvt); NaN is 0x7fff in
// f16 and bf16, 0x7f in e4m3 and e5m2, 0x7fffffff in f32 and tf32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace deepkern::ptx {

// RNA: to nearest, ties away from zero.
enum class Rounding { RN, RZ, RM, RP, RNA };

struct Format {
  int mantissa_bits;
  int bias;
  uint32_t largest;   // code of the largest finite magnitude
  uint32_t infinity;  // the largest magnitude where the format has no infinity
  uint32_t nan;       // likewise
  uint32_t sign;      // the bit of the sign
};

constexpr Format F16 = {10, 15, 0x7bff, 0x7c00, 0x7fff, 0x8000};
constexpr Format BF16 = {7, 127, 0x7f7f, 0x7f80, 0x7fff, 0x8000};
constexpr Format TF32 = {10, 127, 0x3fbff, 0x3fc00, 0x3ffff, 0x40000};  // without the 13 zeros
constexpr Format E4M3 = {3, 7, 0x7e, 0x7f, 0x7f, 0x80};
constexpr Format E5M2 = {2, 15, 0x7b, 0x7c, 0x7f, 0x80};
constexpr Format E3M2 = {2, 3, 0x1f, 0x1f, 0x1f, 0x20};
constexpr Format E2M3 = {3, 1, 0x1f, 0x1f, 0x1f, 0x20};
constexpr Format E2M1 = {1, 1, 0x7, 0x7, 0x7, 0x8};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint64_t double_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}

inline double bits_double(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

// .ftz: subnormal inputs and results become zeros of their sign.
inline float flush_subnormal(float x) {
  const uint32_t bits = float_bits(x);
  return bits & 0x7f800000 ? x : bits_float(bits & 0x80000000);
}

constexpr bool rounds_up(Rounding rounding, bool negative, uint64_t kept, uint64_t rest,
                         uint64_t half) {
  switch (rounding) {
    case Rounding::RN:
      return rest > half || (rest == half && (kept & 1));
    case Rounding::RNA:
      return rest >= half;
    case Rounding::RM:
      return negative && rest;
    case Rounding::RP:
      return !negative && rest;
    default:
      return false;
  }
}

// The code of +-mantissa * 2^exponent, rounded once; mantissa < 2^53. An overflow gives the largest
// finite magnitude if `saturate` or if the rounding is towards zero, else infinity.
constexpr uint32_t encode_parts(bool negative, uint64_t mantissa, int exponent,
                                const Format& format, Rounding rounding, bool saturate) {
  const uint32_t sign = negative ? format.sign : 0;
  if (mantissa == 0) return sign;
  const int top = 63 - __builtin_clzll(mantissa);
  const int lowest = 1 - format.bias;  // exponent of the smallest normal number
  const int own = top + exponent;
  const int binade = own > lowest ? own : lowest;
  int shift = binade - format.mantissa_bits - exponent;
  uint64_t kept = 0;
  if (shift <= 0) {
    // The mantissa has fewer bits than the format.
    kept = mantissa << -shift;
  } else {
    if (shift > 54) shift = 54;  // below half of the last bit
    kept = mantissa >> shift;
    const uint64_t rest = mantissa & ((uint64_t{1} << shift) - 1);
    kept += rounds_up(rounding, negative, kept, rest, uint64_t{1} << (shift - 1));
  }
  const uint64_t code = (static_cast<uint64_t>(binade - lowest) << format.mantissa_bits) + kept;
  if (code <= format.largest) return sign | static_cast<uint32_t>(code);
  const bool towards_zero = rounding == Rounding::RZ || (rounding == Rounding::RM && !negative) ||
                            (rounding == Rounding::RP && negative);
  return sign | (saturate || towards_zero ? format.largest : format.infinity);
}

// An infinity becomes the largest finite magnitude if `saturate`. NaN has no sign.
inline uint32_t encode(float x, const Format& format, Rounding rounding, bool saturate = false) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffff;
  const bool negative = bits >> 31;
  if (magnitude > 0x7f800000) return format.nan;
  if (magnitude == 0x7f800000) {
    return (negative ? format.sign : 0) | (saturate ? format.largest : format.infinity);
  }
  const uint32_t field = magnitude >> 23, fraction = magnitude & 0x7fffff;
  return encode_parts(negative, field ? fraction | 0x800000 : fraction,
                      static_cast<int>(field ? field : 1) - 150, format, rounding, saturate);
}

inline uint32_t encode(double x, const Format& format, Rounding rounding, bool saturate = false) {
  const uint64_t bits = double_bits(x), magnitude = bits & 0x7fffffffffffffff;
  const bool negative = bits >> 63;
  const uint64_t field = magnitude >> 52, fraction = magnitude & 0xfffffffffffff;
  if (field == 0x7ff && fraction) return format.nan;
  if (field == 0x7ff) {
    return (negative ? format.sign : 0) | (saturate ? format.largest : format.infinity);
  }
  return encode_parts(negative, field ? fraction | 0x10000000000000 : fraction,
                      static_cast<int>(field ? field : 1) - 1075, format, rounding, saturate);
}

// .relu: negative results become 0; NaN stays the canonical NaN.
inline uint32_t relu(uint32_t code, const Format& format) { return code & format.sign ? 0 : code; }

// ---- 16-bit formats

inline float bf16_to_float(uint16_t code) { return bits_float(uint32_t{code} << 16); }

inline uint16_t float_to_bf16_rn(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t float_to_bf16_rz(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>(bits >> 16);
}

inline uint16_t float_to_bf16(float x, Rounding rounding, bool saturate = false) {
  return static_cast<uint16_t>(encode(x, BF16, rounding, saturate));
}

// A NaN keeps its payload and becomes quiet.
inline float f16_to_float(uint16_t code) {
  const uint32_t sign = uint32_t{code & 0x8000u} << 16, magnitude = code & 0x7fff;
  if (magnitude > 0x7c00) return bits_float(sign | 0x7fc00000 | magnitude << 13);
  if (magnitude == 0x7c00) return bits_float(sign | 0x7f800000);
  // The exponent's bias is 15 instead of 127. The product is exact, of subnormals too.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_f16(float x, Rounding rounding, bool saturate = false) {
  return static_cast<uint16_t>(encode(x, F16, rounding, saturate));
}
inline uint16_t float_to_f16_rn(float x) { return float_to_f16(x, Rounding::RN); }
inline uint16_t float_to_f16_rz(float x) { return float_to_f16(x, Rounding::RZ); }
inline uint16_t double_to_f16_rn(double x) {
  return static_cast<uint16_t>(encode(x, F16, Rounding::RN));
}

// ---- tf32: a float32 whose last 13 bits are zero

inline float float_to_tf32(float x, Rounding rounding, bool saturate = false) {
  if (std::isnan(x)) return bits_float(0x7fffffff);
  return bits_float(encode(x, TF32, rounding, saturate) << 13);
}
inline float float_to_tf32_rna(float x) { return float_to_tf32(x, Rounding::RNA); }
inline float float_to_tf32_rn(float x) { return float_to_tf32(x, Rounding::RN); }
inline float float_to_tf32_rz(float x) { return float_to_tf32(x, Rounding::RZ); }

// ---- 8-bit and smaller formats

// The bits of a format are those of a float32 with another bias; the product is exact, of
// subnormals too.
template <int EXPONENT_BITS, int MANTISSA_BITS>
inline float small_to_float(uint32_t code) {
  constexpr int BIAS = (1 << (EXPONENT_BITS - 1)) - 1, ALL = EXPONENT_BITS + MANTISSA_BITS;
  const uint32_t magnitude = code & ((1u << ALL) - 1);
  const float scale = bits_float(static_cast<uint32_t>(254 - BIAS) << 23);
  const float x = bits_float(magnitude << (23 - MANTISSA_BITS)) * scale;
  return bits_float(float_bits(x) | (code >> ALL & 1) << 31);
}

inline float e4m3_to_float(uint8_t code) {
  return (code & 0x7f) == 0x7f ? bits_float(0x7fffffff) : small_to_float<4, 3>(code);
}

inline float e5m2_to_float(uint8_t code) {
  if ((code & 0x7f) > 0x7c) return bits_float(0x7fffffff);
  if ((code & 0x7f) == 0x7c) return bits_float(uint32_t{code & 0x80u} << 24 | 0x7f800000);
  return small_to_float<5, 2>(code);
}

inline float e3m2_to_float(uint8_t code) { return small_to_float<3, 2>(code); }
inline float e2m3_to_float(uint8_t code) { return small_to_float<2, 3>(code); }
inline float e2m1_to_float(uint8_t code) { return small_to_float<2, 1>(code); }
inline float ue8m0_to_float(uint8_t code) {
  return bits_float(code == 255 ? 0x7fffffff : code ? uint32_t{code} << 23 : 0x400000);
}

inline uint16_t e4m3_to_f16(uint8_t code) { return float_to_f16_rn(e4m3_to_float(code)); }
inline uint16_t e5m2_to_f16(uint8_t code) {
  if ((code & 0x7f) > 0x7c) return 0x7fff;
  return static_cast<uint16_t>(code << 8);  // the upper half of an f16
}

// cvt.rn.f16x2.e4m3x2 and .e5m2x2.
inline uint32_t e4m3x2_to_f16x2(uint16_t codes) {
  return uint32_t{e4m3_to_f16(codes & 255)} |
         uint32_t{e4m3_to_f16(static_cast<uint8_t>(codes >> 8))} << 16;
}
inline uint32_t e5m2x2_to_f16x2(uint16_t codes) {
  return uint32_t{e5m2_to_f16(codes & 255)} |
         uint32_t{e5m2_to_f16(static_cast<uint8_t>(codes >> 8))} << 16;
}

inline uint8_t float_to_e4m3_satfinite(float x) {
  return static_cast<uint8_t>(encode(x, E4M3, Rounding::RN, true));
}
inline uint8_t float_to_e5m2_satfinite(float x) {
  return static_cast<uint8_t>(encode(x, E5M2, Rounding::RN, true));
}
inline uint8_t float_to_e3m2_satfinite(float x) {
  return static_cast<uint8_t>(encode(x, E3M2, Rounding::RN, true));
}
inline uint8_t float_to_e2m3_satfinite(float x) {
  return static_cast<uint8_t>(encode(x, E2M3, Rounding::RN, true));
}
inline uint8_t float_to_e2m1_satfinite(float x) {
  return static_cast<uint8_t>(encode(x, E2M1, Rounding::RN, true));
}

// ---- arithmetic of f16 and bf16 with one rounding

// a * b + c rounded to odd: exact if the double holds it, else the neighbour whose last bit is 1.
// A later rounding to 51 bits or fewer then gives what one rounding of the exact value gives,
// because an odd number is never a tie nor a number of the narrower format. The product of two
// numbers of 11 bits is exact, and so is the error of the sum (Knuth's TwoSum): the smallest bit,
// 2^-266, and the largest number, 2^256, are far inside double's range.
inline double fma_to_odd(float a, float b, float c) {
  const double product = double{a} * double{b}, addend = double{c};
  const double sum = product + addend;
  if (!std::isfinite(sum)) return sum;
  const double other = sum - product;
  const double error = (product - (sum - other)) + (addend - other);
  const uint64_t bits = double_bits(sum);
  if (error == 0 || (bits & 1)) return sum;
  return bits_double((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}

inline uint16_t bf16_fma(uint16_t a, uint16_t b, uint16_t c, Rounding rounding = Rounding::RN) {
  return static_cast<uint16_t>(
      encode(fma_to_odd(bf16_to_float(a), bf16_to_float(b), bf16_to_float(c)), BF16, rounding));
}
// 1 * a + b keeps the sign of zeros; so does a * b - 0.
inline uint16_t bf16_add(uint16_t a, uint16_t b) { return bf16_fma(a, 0x3f80, b); }
inline uint16_t bf16_sub(uint16_t a, uint16_t b) { return bf16_fma(b, 0xbf80, a); }
inline uint16_t bf16_mul(uint16_t a, uint16_t b) { return bf16_fma(a, b, 0x8000); }

inline uint16_t f16_fma(uint16_t a, uint16_t b, uint16_t c, Rounding rounding = Rounding::RN) {
  return static_cast<uint16_t>(
      encode(fma_to_odd(f16_to_float(a), f16_to_float(b), f16_to_float(c)), F16, rounding));
}
inline uint16_t f16_add(uint16_t a, uint16_t b) { return f16_fma(a, 0x3c00, b); }
inline uint16_t f16_sub(uint16_t a, uint16_t b) { return f16_fma(b, 0xbc00, a); }
inline uint16_t f16_mul(uint16_t a, uint16_t b) { return f16_fma(a, b, 0x8000); }

}  // namespace deepkern::ptx
