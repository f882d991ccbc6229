// Arithmetic of f16, bf16, f16x2 and bf16x2.
//
// add, sub and mul of f16 and add and sub of bf16 are computed in float32, whose 24 bits make the
// second rounding harmless. The product of two bf16 can be subnormal in float32, and an fma has a
// longer sum: both are computed in float64 and rounded to odd.
// Source: PTX ISA 9.0, section 9.7.4, "Half Precision Floating Point Instructions".
#include "arithmetic.h"
#include "floats.h"

namespace deepkern::ptx {
namespace {

template <class H, int FLAGS>
PTX_INLINE H add(H a, H b) {
  a = input<(FLAGS & FTZ) != 0>(a);
  b = input<(FLAGS & FTZ) != 0>(b);
  return finish<FLAGS>(nearest<H>(to_float(a) + to_float(b)));
}
template <class H, int FLAGS>
PTX_INLINE H sub(H a, H b) {
  a = input<(FLAGS & FTZ) != 0>(a);
  b = input<(FLAGS & FTZ) != 0>(b);
  return finish<FLAGS>(nearest<H>(to_float(a) - to_float(b)));
}
template <class H, int FLAGS>
PTX_INLINE H mul(H a, H b) {
  a = input<(FLAGS & FTZ) != 0>(a);
  b = input<(FLAGS & FTZ) != 0>(b);
  if constexpr (std::is_same_v<H, Float16>) {
    return finish<FLAGS>(nearest<H>(to_float(a) * to_float(b)));
  } else {
    return finish<FLAGS>(round_to<H, RN>(double(to_float(a)) * double(to_float(b))));
  }
}
template <class H, int FLAGS>
PTX_INLINE H fma(H a, H b, H c) {
  a = input<(FLAGS & FTZ) != 0>(a);
  b = input<(FLAGS & FTZ) != 0>(b);
  c = input<(FLAGS & FTZ) != 0>(c);
  const double product = double(to_float(a)) * double(to_float(b));
  return finish<FLAGS>(round_to<H, RN>(odd_sum<RN>(product, double(to_float(c)))));
}
template <class H, bool MAX, bool NAN_WINS, int FLAGS>
PTX_INLINE H extreme(H a, H b) {
  a = input<(FLAGS & FTZ) != 0>(a);
  b = input<(FLAGS & FTZ) != 0>(b);
  return finish<FLAGS>(extremum<MAX, NAN_WINS>(a, b));
}
template <class H, int FLAGS>
PTX_INLINE H neg(H a) {
  a = input<(FLAGS & FTZ) != 0>(a);
  return {static_cast<uint16_t>(a.bits ^ 0x8000)};
}
template <class H, int FLAGS>
PTX_INLINE H abs(H a) {
  a = input<(FLAGS & FTZ) != 0>(a);
  return {static_cast<uint16_t>(a.bits & 0x7fff)};
}

// The form of one value and the form of two packed values.
template <auto F>
void add_both(Forms& forms, const std::string& opcode) {
  add_form<F>(forms, opcode, Class::HALF);
  add_pair_form<F>(forms, opcode + "x2", Class::HALF);
}

template <class H, int FLAGS>
void add_arithmetic(Forms& forms, const std::string& flags, const std::string& type) {
  for (const char* mode : {"", ".rn"}) {
    const std::string end = mode + flags + type;
    add_both<add<H, FLAGS>>(forms, "add" + end);
    add_both<sub<H, FLAGS>>(forms, "sub" + end);
    add_both<mul<H, FLAGS>>(forms, "mul" + end);
  }
  add_both<fma<H, FLAGS>>(forms, "fma.rn" + flags + type);
}

template <class H, int FLAGS>
void add_simple(Forms& forms, const std::string& flags, const std::string& type) {
  add_both<neg<H, FLAGS>>(forms, "neg" + flags + type);
  add_both<abs<H, FLAGS>>(forms, "abs" + flags + type);
  add_both<extreme<H, false, false, FLAGS>>(forms, "min" + flags + type);
  add_both<extreme<H, false, true, FLAGS>>(forms, "min" + flags + ".NaN" + type);
  add_both<extreme<H, true, false, FLAGS>>(forms, "max" + flags + type);
  add_both<extreme<H, true, true, FLAGS>>(forms, "max" + flags + ".NaN" + type);
}

}  // namespace

void add_half_forms(Forms& forms) {
  add_arithmetic<Float16, NONE>(forms, "", ".f16");
  add_arithmetic<Float16, FTZ>(forms, ".ftz", ".f16");
  add_arithmetic<Float16, SAT>(forms, ".sat", ".f16");
  add_arithmetic<Float16, FTZ | SAT>(forms, ".ftz.sat", ".f16");
  add_arithmetic<BFloat16, NONE>(forms, "", ".bf16");
  add_both<fma<Float16, RELU>>(forms, "fma.rn.relu.f16");
  add_both<fma<Float16, FTZ | RELU>>(forms, "fma.rn.ftz.relu.f16");
  add_both<fma<BFloat16, RELU>>(forms, "fma.rn.relu.bf16");
  add_simple<Float16, NONE>(forms, "", ".f16");
  add_simple<Float16, FTZ>(forms, ".ftz", ".f16");
  add_simple<BFloat16, NONE>(forms, "", ".bf16");
}

}  // namespace deepkern::ptx
