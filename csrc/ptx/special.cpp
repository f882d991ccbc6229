// The approximate functions: ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh and division.
//
// A GPU returns an approximation whose error the ISA bounds. The machine computes in float64 and
// rounds once, so that its error is half of the last bit (ulp), up to the error of float64.
// The bounds of the ISA: ex2.approx.f32 2 ulp, lg2.approx.f32 2^-22 (absolute near 1, else
// relative), rcp.approx.f32 1 ulp, rsqrt.approx.f32 2^-22.9 and sqrt.approx.f32 2^-23 (relative),
// sin and cos.approx.f32 2^-20.5 (absolute) in [-pi, pi], tanh.approx.f32 2^-11 (relative),
// div.approx.f32 and div.full.f32 2 ulp, ex2.approx.f16 2^-9.9 and bf16 2^-7 (relative),
// tanh.approx.f16 2^-10.987 and bf16 2^-8 (absolute).
// Source: PTX ISA 9.0, sections 9.7.3 and 9.7.4.
#include <cmath>

#include "arithmetic.h"
#include "floats.h"

namespace deepkern::ptx {
namespace {

// 2^x in float64 without a call, so that the loop over lanes vectorizes. The Taylor series of
// exp(y) for |y| <= ln(2) / 2 has a remainder of 4e-18 after the term y^13.
PTX_INLINE double exp2_of(double x) {
  double bounded = choose(x > 1000, 1000.0, x);
  bounded = choose(bounded < -1000, -1000.0, bounded);
  constexpr double SHIFT = 6755399441055744.0;  // 1.5 * 2^52: the addition rounds to an integer
  const double shifted = bounded + SHIFT;
  const double whole = shifted - SHIFT;
  const double y = (bounded - whole) * 0.69314718055994530942;
  double sum = 1.0 / 6227020800.0;
  sum = sum * y + 1.0 / 479001600.0;
  sum = sum * y + 1.0 / 39916800.0;
  sum = sum * y + 1.0 / 3628800.0;
  sum = sum * y + 1.0 / 362880.0;
  sum = sum * y + 1.0 / 40320.0;
  sum = sum * y + 1.0 / 5040.0;
  sum = sum * y + 1.0 / 720.0;
  sum = sum * y + 1.0 / 120.0;
  sum = sum * y + 1.0 / 24.0;
  sum = sum * y + 1.0 / 6.0;
  sum = sum * y + 0.5;
  sum = sum * y + 1.0;
  sum = sum * y + 1.0;
  // The low bits of `shifted` are the integer. It goes to the exponent of a power of two.
  const uint64_t exponent = (bit_cast<uint64_t>(shifted) + 1023) << 52;
  const double result = sum * bit_cast<double>(exponent);
  return choose(x != x, x, result);
}

PTX_INLINE double lg2_of(double x) { return std::log2(x); }
PTX_INLINE double rcp_of(double x) { return 1.0 / x; }
PTX_INLINE double rsqrt_of(double x) { return 1.0 / __builtin_sqrt(x); }
PTX_INLINE double sqrt_of(double x) { return __builtin_sqrt(x); }
PTX_INLINE double sin_of(double x) { return std::sin(x); }
PTX_INLINE double cos_of(double x) { return std::cos(x); }
PTX_INLINE double tanh_of(double x) { return std::tanh(x); }

template <double (*F)(double), bool FTZ_, class T>
PTX_INLINE T approximate(T x) {
  x = input<FTZ_>(x);
  return finish<FTZ_ ? int(FTZ) : int(NONE)>(round_to<T, RN>(F(double(to_float(x)))));
}

// A divisor of more than 2^126 in magnitude gives zero for a finite dividend, and NaN for an
// infinite one.
template <bool FTZ_>
PTX_INLINE float div_approx(float a, float b) {
  a = input<FTZ_>(a);
  b = input<FTZ_>(b);
  const float size = std::fabs(b);
  const float divisor = size > 0x1p126f && size <= __FLT_MAX__ ? std::copysign(INFINITY, b) : b;
  return finish<FTZ_ ? int(FTZ) : int(NONE)>(canonical(a / divisor));
}

template <bool FTZ_>
PTX_INLINE float div_full(float a, float b) {
  a = input<FTZ_>(a);
  b = input<FTZ_>(b);
  return finish<FTZ_ ? int(FTZ) : int(NONE)>(canonical(a / b));
}

template <double (*F)(double)>
void add_function(Forms& forms, const std::string& name) {
  add_form<approximate<F, false, float>>(forms, name + ".approx.f32", Class::SPECIAL);
  add_form<approximate<F, true, float>>(forms, name + ".approx.ftz.f32", Class::SPECIAL);
}

template <auto F>
void add_both(Forms& forms, const std::string& opcode) {
  add_form<F>(forms, opcode, Class::SPECIAL);
  add_pair_form<F>(forms, opcode + "x2", Class::SPECIAL);
}

}  // namespace

void add_special_forms(Forms& forms) {
  add_function<exp2_of>(forms, "ex2");
  add_function<lg2_of>(forms, "lg2");
  add_function<rcp_of>(forms, "rcp");
  add_function<rsqrt_of>(forms, "rsqrt");
  add_function<sqrt_of>(forms, "sqrt");
  add_function<sin_of>(forms, "sin");
  add_function<cos_of>(forms, "cos");
  add_form<approximate<tanh_of, false, float>>(forms, "tanh.approx.f32", Class::SPECIAL);
  add_both<approximate<tanh_of, false, Float16>>(forms, "tanh.approx.f16");
  add_both<approximate<tanh_of, false, BFloat16>>(forms, "tanh.approx.bf16");
  add_both<approximate<exp2_of, false, Float16>>(forms, "ex2.approx.f16");
  // The ISA defines ex2 of bf16 with .ftz only.
  add_both<approximate<exp2_of, true, BFloat16>>(forms, "ex2.approx.ftz.bf16");
  add_form<div_full<false>>(forms, "div.full.f32", Class::SPECIAL);
  add_form<div_full<true>>(forms, "div.full.ftz.f32", Class::SPECIAL);
  add_form<div_approx<false>>(forms, "div.approx.f32", Class::SPECIAL);
  add_form<div_approx<true>>(forms, "div.approx.ftz.f32", Class::SPECIAL);
}

}  // namespace deepkern::ptx
