// Floating-point functions of one lane: conversions without a branch, and the rounding modes.
//
// Every inexact operation in another mode than round-to-nearest, and every operation of 16 bits,
// is computed in float64, rounded to odd, and rounded once more to its type. Rounding to odd with
// at least two more bits than the type has makes the second rounding exact.
// Source: S. Boldo and G. Melquiond, "Emulation of a FMA and correctly rounded sums: proved
// algorithms using rounding to odd", IEEE Transactions on Computers 57(4), 2008.
#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace deepkern::ptx {

enum Mode { RN, RZ, RM, RP };

// What an NVIDIA GPU returns where the result is a NaN.
constexpr uint32_t NAN_F32 = 0x7fffffff;
constexpr uint16_t NAN_16 = 0x7fff;

PTX_INLINE float canonical(float x) { return choose(x != x, bit_cast<float>(NAN_F32), x); }

// ---- 16 bits to float

PTX_INLINE float to_float(float x) { return x; }

PTX_INLINE float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

PTX_INLINE float to_float(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t normal = magnitude + (112u << 23);
  // A subnormal has the exponent of 2^-14: the subtraction removes the implicit bit.
  const float subnormal = bit_cast<float>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t special = choose(magnitude == 0x0f800000u, 0x7f800000u, NAN_F32);
  uint32_t bits = choose(magnitude < 0x00800000u, bit_cast<uint32_t>(subnormal), normal);
  bits = choose(magnitude >= 0x0f800000u, special, bits);
  return bit_cast<float>(bits | choose(bits == NAN_F32, 0u, sign));
}

// ---- float to 16 bits, to nearest even

template <class T>
PTX_INLINE T nearest(float x);

template <>
PTX_INLINE float nearest<float>(float x) {
  return canonical(x);
}

template <>
PTX_INLINE BFloat16 nearest<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(choose(x != x, uint32_t(NAN_16), rounded))};
}

template <>
PTX_INLINE Float16 nearest<Float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  // The last bit of 0.5 is 2^-24, the smallest subnormal: the addition rounds to it.
  const float half = 0.5f;
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + half) - bit_cast<uint32_t>(half);
  uint32_t result = choose(magnitude < (113u << 23), subnormal, normal);
  result = choose(magnitude >= 0x47800000u, 0x7c00u, result);
  return {static_cast<uint16_t>(choose(magnitude > 0x7f800000u, uint32_t(NAN_16), result | sign))};
}

// ---- rounding modes

// The sum that `rounded` approximates, less `rounded`, has the sign of `error`: rounds to odd.
PTX_INLINE double to_odd(double rounded, double error) {
  const uint64_t bits = bit_cast<uint64_t>(rounded);
  const uint64_t differ = (bit_cast<uint64_t>(error) ^ bits) >> 63;
  const uint64_t step = (uint64_t(1) - 2 * differ) & (uint64_t(0) - (~bits & 1));
  return bit_cast<double>(bits + choose(std::fabs(error) > 0, step, uint64_t(0)));
}

PTX_INLINE float to_odd_float(double x) {
  const float rounded = static_cast<float>(x);
  const double error = x - static_cast<double>(rounded);
  const uint32_t bits = bit_cast<uint32_t>(rounded);
  // An error of any size, but not the NaN of an infinite x. Integers of 32 bits vectorize.
  const uint64_t error_bits = bit_cast<uint64_t>(error);
  const uint32_t high = static_cast<uint32_t>(error_bits >> 32);
  const uint32_t size = high & 0x7fffffffu;
  const bool inexact = ((size | static_cast<uint32_t>(error_bits)) != 0) & (size <= 0x7ff00000u);
  const uint32_t differ = (high ^ bits) >> 31;
  const uint32_t step = (1u - 2 * differ) & (0u - (~bits & 1));
  return bit_cast<float>(bits + choose(inexact, step, 0u));
}

// Moves the bits of a value rounded to nearest by one where `M` rounds to its other neighbour.
template <Mode M, class Bits>
PTX_INLINE Bits redirect(Bits bits, double rounded, double exact) {
  const bool negative = bits >> (8 * sizeof(Bits) - 1);
  if (M == RZ && std::fabs(rounded) > std::fabs(exact)) return bits - 1;
  if (M == RM && rounded > exact) return negative ? bits + 1 : bits - 1;
  if (M == RP && rounded < exact) return negative ? bits - 1 : bits + 1;
  return bits;
}

// Rounds a value that is exact, or rounded to odd, to T.
template <class T, Mode M>
PTX_INLINE T round_to(double x) {
  if constexpr (std::is_same_v<T, float>) {
    const float rounded = static_cast<float>(x);
    if (M == RN || x != x) return canonical(rounded);
    return bit_cast<float>(redirect<M>(bit_cast<uint32_t>(rounded), double(rounded), x));
  } else {
    const T rounded = nearest<T>(to_odd_float(x));
    if (M == RN || x != x) return rounded;
    return T{redirect<M>(rounded.bits, double(to_float(rounded)), x)};
  }
}

// x + y rounded to odd; zero has the sign that `M` gives it.
template <Mode M>
PTX_INLINE double odd_sum(double x, double y) {
  const double sum = x + y;
  const double part = sum - x;
  const double error = (x - (sum - part)) + (y - part);
  if (M == RM && sum == 0 && std::signbit(x) != std::signbit(y)) return -0.0;
  return to_odd(sum, error);
}

// ---- flush to zero, saturation

PTX_INLINE float flush(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bit_cast<float>(choose((bits & 0x7f800000u) != 0, bits, bits & 0x80000000u));
}
PTX_INLINE Float16 flush(Float16 x) {
  return {static_cast<uint16_t>((x.bits & 0x7c00) ? x.bits : x.bits & 0x8000)};
}
PTX_INLINE BFloat16 flush(BFloat16 x) {
  return {static_cast<uint16_t>((x.bits & 0x7f80) ? x.bits : x.bits & 0x8000)};
}

template <bool FTZ, class T>
PTX_INLINE T input(T x) {
  if constexpr (FTZ) return flush(x);
  return x;
}

// .sat clamps to [0, 1] and turns a NaN and -0 into +0.
template <class T>
PTX_INLINE T saturate(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    const T positive = x > T(0) ? x : T(0);
    return positive < T(1) ? positive : T(1);
  } else {
    const float value = to_float(x);
    return nearest<T>(saturate(value));
  }
}

// .satfinite turns an infinity into the largest finite number.
template <class T>
PTX_INLINE T saturate_finite(T x) {
  const uint16_t infinity = std::is_same_v<T, Float16> ? 0x7c00 : 0x7f80;
  return {static_cast<uint16_t>((x.bits & 0x7fff) == infinity ? x.bits - 1 : x.bits)};
}

// .relu turns negative values into +0 and keeps NaN.
template <class T>
PTX_INLINE T relu(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    return x < T(0) || x == T(0) ? T(0) : x;
  } else {
    const float value = to_float(x);
    return value != value ? x : T{static_cast<uint16_t>(x.bits & 0x8000 ? 0 : x.bits)};
  }
}

enum Flags { NONE = 0, FTZ = 1, SAT = 2, RELU = 4, SATFINITE = 8 };

template <int FLAGS, class T>
PTX_INLINE T finish(T x) {
  if constexpr (FLAGS & FTZ) x = flush(x);
  if constexpr (FLAGS & SAT) x = saturate(x);
  if constexpr (FLAGS & RELU) x = relu(x);
  if constexpr (FLAGS & SATFINITE) x = saturate_finite(x);
  return x;
}

// ---- minimum and maximum: -0 < +0

// .NaN returns a NaN if an operand is one, else the operand that is a number is returned.
template <bool MAX, bool NAN_WINS, class T>
PTX_INLINE T extremum(T x, T y) {
  const auto a = to_float(x);
  const auto b = to_float(y);
  const uint32_t p = bit_cast<uint32_t>(a);
  const uint32_t q = bit_cast<uint32_t>(b);
  const bool first = MAX ? a > b : a < b;
  uint32_t r = a == b ? (MAX ? p & q : p | q) : first ? p : q;
  if (NAN_WINS) {
    r = a != a || b != b ? NAN_F32 : r;
  } else {
    r = a != a ? q : b != b ? p : r;
    r = a != a && b != b ? NAN_F32 : r;
  }
  if constexpr (std::is_same_v<T, float>) {
    return bit_cast<float>(r);
  } else {
    return nearest<T>(bit_cast<float>(r));
  }
}

}  // namespace deepkern::ptx
