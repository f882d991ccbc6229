// cvt between floating-point types.
//
// An e4m3, e5m2, tf32, f16 or bf16 result is a NaN without a sign where the source is a NaN.
// Source: PTX ISA 9.0, section 9.7.9, "Data Movement and Conversion Instructions": cvt.
#include <array>

#include "convert.h"
#include "floats.h"
#include "numbers.h"

namespace deepkern::ptx {
namespace {

PTX_INLINE double exact(double x) { return x; }
template <class T>
PTX_INLINE double exact(T x) {
  return to_float(x);
}

// To f32, f16 and bf16, from a type that float64 holds. .ftz flushes f32 sources and results.
template <class D, class S, Mode M, int FLAGS>
PTX_INLINE D narrow(S x) {
  constexpr bool FLUSH = (FLAGS & FTZ) != 0 && std::is_same_v<S, float>;
  constexpr int REST = std::is_same_v<D, float> ? FLAGS : FLAGS & ~FTZ;
  const S source = input<FLUSH>(x);
  if constexpr (M == RN && !std::is_same_v<S, double>) {
    return finish<REST>(nearest<D>(to_float(source)));
  } else {
    return finish<REST>(round_to<D, M>(exact(source)));
  }
}

// The first source goes to the high half.
template <class D, Mode M, int FLAGS>
PTX_INLINE uint32_t narrow_pair(float a, float b) {
  return uint32_t(narrow<D, float, M, FLAGS>(a).bits) << 16 | narrow<D, float, M, FLAGS>(b).bits;
}

template <class S, bool FTZ_>
PTX_INLINE double widen(S x) {
  return exact(input<FTZ_>(x));
}

// .rni and others: to an integral value of the same type.
template <class T, Mode M, int FLAGS>
PTX_INLINE T integral(T x) {
  if constexpr (std::is_same_v<T, double>) {
    const double r = M == RN   ? __builtin_rint(x)
                     : M == RZ ? __builtin_trunc(x)
                     : M == RM ? __builtin_floor(x)
                               : __builtin_ceil(x);
    return FLAGS & SAT ? saturate(r) : r;
  } else {
    constexpr bool FLUSH = (FLAGS & FTZ) != 0;
    const float source = to_float(input<FLUSH>(x));
    const float r = M == RN   ? __builtin_rintf(source)
                    : M == RZ ? __builtin_truncf(source)
                    : M == RM ? __builtin_floorf(source)
                              : __builtin_ceilf(source);
    return finish<FLAGS>(nearest<T>(r));
  }
}

// ---- tf32

PTX_INLINE float tf32_away(float x) {
  const uint32_t bits = (bit_cast<uint32_t>(x) + 0x1000u) & 0xffffe000u;
  return choose(x != x, bit_cast<float>(NAN_F32), bit_cast<float>(bits));
}
template <Rounding R, bool SATURATE, bool RELU_>
PTX_INLINE float tf32(float x) {
  const float result = float_to_tf32(x, R, SATURATE);
  return RELU_ ? relu(result) : result;
}

// ---- 8 bits

// To nearest even; an overflow and an infinity become the largest finite number.
template <int MANTISSA, int BIAS, uint32_t LARGEST, bool RELU_>
PTX_INLINE uint32_t encode8(float x) {
  constexpr int DROPPED = 23 - MANTISSA;
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (uint32_t(127 - BIAS) << 23) + ((1u << (DROPPED - 1)) - 1) +
                           (magnitude >> DROPPED & 1)) >>
                          DROPPED;
  // A float32 of this size has the smallest subnormal as its last bit.
  const float size = bit_cast<float>(uint32_t(127 + 24 - BIAS - MANTISSA) << 23);
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + size) - bit_cast<uint32_t>(size);
  uint32_t code = choose(magnitude < (uint32_t(128 - BIAS) << 23), subnormal, normal);
  code = code > LARGEST ? LARGEST : code;
  code |= bits >> 24 & 0x80u;
  if (RELU_) code = code & 0x80u ? 0 : code;
  return choose(magnitude > 0x7f800000u, 0x7fu, code);
}
template <bool RELU_>
PTX_INLINE uint16_t to_e4m3x2(float a, float b) {
  return static_cast<uint16_t>(encode8<3, 7, 0x7e, RELU_>(a) << 8 | encode8<3, 7, 0x7e, RELU_>(b));
}
template <bool RELU_>
PTX_INLINE uint16_t to_e5m2x2(float a, float b) {
  return static_cast<uint16_t>(encode8<2, 15, 0x7b, RELU_>(a) << 8 |
                               encode8<2, 15, 0x7b, RELU_>(b));
}
PTX_INLINE float high_half(uint32_t x) { return to_float(Float16{static_cast<uint16_t>(x >> 16)}); }
PTX_INLINE float low_half(uint32_t x) { return to_float(Float16{static_cast<uint16_t>(x)}); }
template <bool RELU_>
PTX_INLINE uint16_t pair_to_e4m3x2(uint32_t x) {
  return to_e4m3x2<RELU_>(high_half(x), low_half(x));
}
template <bool RELU_>
PTX_INLINE uint16_t pair_to_e5m2x2(uint32_t x) {
  return to_e5m2x2<RELU_>(high_half(x), low_half(x));
}

// The f16 of each code.
template <uint16_t (*CONVERT)(uint8_t)>
const uint16_t* codes_of() {
  static const std::array<uint16_t, 256> codes = [] {
    std::array<uint16_t, 256> table{};
    for (int code = 0; code < 256; ++code) table[code] = CONVERT(static_cast<uint8_t>(code));
    return table;
  }();
  return codes.data();
}
template <uint16_t (*CONVERT)(uint8_t), bool RELU_>
PTX_INLINE uint32_t from_8bit(uint16_t x) {
  const uint16_t* codes = codes_of<CONVERT>();
  Float16 high{codes[x >> 8]}, low{codes[x & 0xff]};
  if (RELU_) {
    high = relu(high);
    low = relu(low);
  }
  return uint32_t(high.bits) << 16 | low.bits;
}

// ---- tables

template <class D, Mode M, int FLAGS>
void add_from_f32(Forms& forms, const std::string& modifiers, const std::string& type) {
  const std::string start = "cvt" + modifiers + type;
  add_form<narrow<D, float, M, FLAGS>>(forms, start + ".f32", Class::CONVERT);
  if constexpr ((FLAGS & (SAT | FTZ)) == 0) {
    add_form<narrow_pair<D, M, FLAGS>>(forms, start + "x2.f32", Class::CONVERT);
  }
}

// .rn and .rz have .relu and .satfinite.
template <class D, Mode M>
void add_small(Forms& forms, const std::string& mode, const std::string& type) {
  add_from_f32<D, M, NONE>(forms, mode, type);
  add_from_f32<D, M, RELU>(forms, mode + ".relu", type);
  add_from_f32<D, M, SATFINITE>(forms, mode + ".satfinite", type);
  add_from_f32<D, M, RELU | SATFINITE>(forms, mode + ".relu.satfinite", type);
  add_from_f32<D, M, RELU | SATFINITE>(forms, mode + ".satfinite.relu", type);
}

template <Mode M>
void add_mode(Forms& forms, const std::string& mode) {
  const Class kind = Class::CONVERT;
  add_form<narrow<float, double, M, NONE>>(forms, "cvt" + mode + ".f32.f64", kind);
  add_form<narrow<float, double, M, FTZ>>(forms, "cvt" + mode + ".ftz.f32.f64", kind);
  add_form<narrow<float, double, M, SAT>>(forms, "cvt" + mode + ".sat.f32.f64", kind);
  add_form<narrow<float, double, M, FTZ | SAT>>(forms, "cvt" + mode + ".ftz.sat.f32.f64", kind);
  add_form<narrow<Float16, double, M, NONE>>(forms, "cvt" + mode + ".f16.f64", kind);
  add_form<narrow<BFloat16, double, M, NONE>>(forms, "cvt" + mode + ".bf16.f64", kind);
  add_form<narrow<Float16, float, M, NONE>>(forms, "cvt" + mode + ".f16.f32", kind);
  add_form<narrow<Float16, float, M, FTZ>>(forms, "cvt" + mode + ".ftz.f16.f32", kind);
  add_form<narrow<Float16, float, M, SAT>>(forms, "cvt" + mode + ".sat.f16.f32", kind);
  add_form<narrow<Float16, float, M, FTZ | SAT>>(forms, "cvt" + mode + ".ftz.sat.f16.f32", kind);
  add_form<narrow<BFloat16, float, M, NONE>>(forms, "cvt" + mode + ".bf16.f32", kind);
  add_form<narrow<BFloat16, Float16, M, NONE>>(forms, "cvt" + mode + ".bf16.f16", kind);
  add_form<narrow<Float16, BFloat16, M, NONE>>(forms, "cvt" + mode + ".f16.bf16", kind);
}

template <class T, Mode M>
void add_integral(Forms& forms, const std::string& mode, const std::string& type) {
  const std::string end = type + type;
  add_form<integral<T, M, NONE>>(forms, "cvt" + mode + end, Class::CONVERT);
  add_form<integral<T, M, SAT>>(forms, "cvt" + mode + ".sat" + end, Class::CONVERT);
  if constexpr (std::is_same_v<T, float>) {
    add_form<integral<T, M, FTZ>>(forms, "cvt" + mode + ".ftz" + end, Class::CONVERT);
    add_form<integral<T, M, FTZ | SAT>>(forms, "cvt" + mode + ".ftz.sat" + end, Class::CONVERT);
  }
}

template <class T>
void add_integral_modes(Forms& forms, const std::string& type) {
  add_integral<T, RN>(forms, ".rni", type);
  add_integral<T, RZ>(forms, ".rzi", type);
  add_integral<T, RM>(forms, ".rmi", type);
  add_integral<T, RP>(forms, ".rpi", type);
}

void add_exact(Forms& forms) {
  const Class kind = Class::CONVERT;
  add_form<narrow<float, Float16, RN, NONE>>(forms, "cvt.f32.f16", kind);
  add_form<narrow<float, Float16, RN, FTZ>>(forms, "cvt.ftz.f32.f16", kind);
  add_form<narrow<float, Float16, RN, SAT>>(forms, "cvt.sat.f32.f16", kind);
  add_form<narrow<float, Float16, RN, FTZ | SAT>>(forms, "cvt.ftz.sat.f32.f16", kind);
  add_form<narrow<float, BFloat16, RN, NONE>>(forms, "cvt.f32.bf16", kind);
  add_form<narrow<float, BFloat16, RN, FTZ>>(forms, "cvt.ftz.f32.bf16", kind);
  add_form<narrow<float, float, RN, NONE>>(forms, "cvt.f32.f32", kind);
  add_form<narrow<float, float, RN, FTZ>>(forms, "cvt.ftz.f32.f32", kind);
  add_form<narrow<float, float, RN, SAT>>(forms, "cvt.sat.f32.f32", kind);
  add_form<narrow<float, float, RN, FTZ | SAT>>(forms, "cvt.ftz.sat.f32.f32", kind);
  add_form<narrow<Float16, Float16, RN, SAT>>(forms, "cvt.sat.f16.f16", kind);
  add_form<widen<float, false>>(forms, "cvt.f64.f32", kind);
  add_form<widen<float, true>>(forms, "cvt.ftz.f64.f32", kind);
  add_form<widen<Float16, false>>(forms, "cvt.f64.f16", kind);
  add_form<widen<BFloat16, false>>(forms, "cvt.f64.bf16", kind);
}

void add_tf32(Forms& forms) {
  const Class kind = Class::CONVERT;
  add_form<tf32_away>(forms, "cvt.rna.tf32.f32", kind);
  add_form<tf32<Rounding::RNA, true, false>>(forms, "cvt.rna.satfinite.tf32.f32", kind);
  add_form<tf32<Rounding::RN, false, false>>(forms, "cvt.rn.tf32.f32", kind);
  add_form<tf32<Rounding::RN, false, true>>(forms, "cvt.rn.relu.tf32.f32", kind);
  add_form<tf32<Rounding::RN, true, false>>(forms, "cvt.rn.satfinite.tf32.f32", kind);
  add_form<tf32<Rounding::RZ, false, false>>(forms, "cvt.rz.tf32.f32", kind);
  add_form<tf32<Rounding::RZ, false, true>>(forms, "cvt.rz.relu.tf32.f32", kind);
  add_form<tf32<Rounding::RZ, true, false>>(forms, "cvt.rz.satfinite.tf32.f32", kind);
}

void add_8bit(Forms& forms) {
  const Class kind = Class::CONVERT;
  const std::string start = "cvt.rn.satfinite";
  add_form<to_e4m3x2<false>>(forms, start + ".e4m3x2.f32", kind);
  add_form<to_e4m3x2<true>>(forms, start + ".relu.e4m3x2.f32", kind);
  add_form<to_e5m2x2<false>>(forms, start + ".e5m2x2.f32", kind);
  add_form<to_e5m2x2<true>>(forms, start + ".relu.e5m2x2.f32", kind);
  add_form<pair_to_e4m3x2<false>>(forms, start + ".e4m3x2.f16x2", kind);
  add_form<pair_to_e4m3x2<true>>(forms, start + ".relu.e4m3x2.f16x2", kind);
  add_form<pair_to_e5m2x2<false>>(forms, start + ".e5m2x2.f16x2", kind);
  add_form<pair_to_e5m2x2<true>>(forms, start + ".relu.e5m2x2.f16x2", kind);
  add_form<from_8bit<e4m3_to_f16, false>>(forms, "cvt.rn.f16x2.e4m3x2", kind);
  add_form<from_8bit<e4m3_to_f16, true>>(forms, "cvt.rn.relu.f16x2.e4m3x2", kind);
  add_form<from_8bit<e5m2_to_f16, false>>(forms, "cvt.rn.f16x2.e5m2x2", kind);
  add_form<from_8bit<e5m2_to_f16, true>>(forms, "cvt.rn.relu.f16x2.e5m2x2", kind);
}

}  // namespace

void add_float_conversions(Forms& forms) {
  add_mode<RN>(forms, ".rn");
  add_mode<RZ>(forms, ".rz");
  add_mode<RM>(forms, ".rm");
  add_mode<RP>(forms, ".rp");
  add_small<Float16, RN>(forms, ".rn", ".f16");
  add_small<Float16, RZ>(forms, ".rz", ".f16");
  add_small<BFloat16, RN>(forms, ".rn", ".bf16");
  add_small<BFloat16, RZ>(forms, ".rz", ".bf16");
  add_integral_modes<float>(forms, ".f32");
  add_integral_modes<double>(forms, ".f64");
  add_integral_modes<Float16>(forms, ".f16");
  add_exact(forms);
  add_tf32(forms);
  add_8bit(forms);
}

}  // namespace deepkern::ptx
