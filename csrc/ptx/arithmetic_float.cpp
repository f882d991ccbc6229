// Arithmetic of f32, f64, f32x2, and of f32 with f16 or bf16 operands.
//
// f32 in the modes .rz, .rm and .rp is computed in float64, rounded to odd, then to f32.
// f64 is computed in round-to-nearest only.
// Source: PTX ISA 9.0, sections 9.7.3 (f32, f64, f32x2) and 9.7.5 (mixed precision).
#include "arithmetic.h"
#include "floats.h"

namespace deepkern::ptx {
namespace {

PTX_INLINE float negate(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) ^ 0x80000000u); }
PTX_INLINE float magnitude(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) & 0x7fffffffu); }
PTX_INLINE double negate64(double x) { return -x; }
PTX_INLINE double magnitude64(double x) { return __builtin_fabs(x); }

template <int FLAGS>
PTX_INLINE float in(float x) {
  return input<(FLAGS & FTZ) != 0>(x);
}

template <Mode M, int FLAGS>
PTX_INLINE float add(float a, float b) {
  a = in<FLAGS>(a);
  b = in<FLAGS>(b);
  return finish<FLAGS>(M == RN ? canonical(a + b) : round_to<float, M>(odd_sum<M>(a, b)));
}
template <Mode M, int FLAGS>
PTX_INLINE float sub(float a, float b) {
  return add<M, FLAGS>(a, negate(b));
}
template <Mode M, int FLAGS>
PTX_INLINE float mul(float a, float b) {
  a = in<FLAGS>(a);
  b = in<FLAGS>(b);
  // A product of two float32 is exact in float64.
  return finish<FLAGS>(M == RN ? canonical(a * b) : round_to<float, M>(double(a) * double(b)));
}
template <Mode M, int FLAGS>
PTX_INLINE float fma(float a, float b, float c) {
  a = in<FLAGS>(a);
  b = in<FLAGS>(b);
  c = in<FLAGS>(c);
  return finish<FLAGS>(M == RN ? canonical(__builtin_fmaf(a, b, c))
                               : round_to<float, M>(odd_sum<M>(double(a) * double(b), c)));
}

// The remainder a - q * b of a float64 quotient of two float32 is exact.
template <Mode M, int FLAGS>
PTX_INLINE float div(float a, float b) {
  a = in<FLAGS>(a);
  b = in<FLAGS>(b);
  if (M == RN) return finish<FLAGS>(canonical(a / b));
  const double quotient = double(a) / double(b);
  const double rest = __builtin_fma(-quotient, double(b), double(a));
  return finish<FLAGS>(round_to<float, M>(to_odd(quotient, b < 0 ? -rest : rest)));
}
template <Mode M, int FLAGS>
PTX_INLINE float rcp(float a) {
  return div<M, FLAGS>(1.0f, a);
}
template <Mode M, int FLAGS>
PTX_INLINE float sqrt(float a) {
  a = in<FLAGS>(a);
  if (M == RN) return finish<FLAGS>(canonical(__builtin_sqrtf(a)));
  const double root = __builtin_sqrt(double(a));
  return finish<FLAGS>(round_to<float, M>(to_odd(root, __builtin_fma(-root, root, double(a)))));
}

template <bool MAX, bool NAN_WINS, int FLAGS>
PTX_INLINE float extreme(float a, float b) {
  return finish<FLAGS>(extremum<MAX, NAN_WINS>(in<FLAGS>(a), in<FLAGS>(b)));
}
template <bool MAX, bool NAN_WINS, int FLAGS>
PTX_INLINE float extreme3(float a, float b, float c) {
  return extreme<MAX, NAN_WINS, FLAGS>(extreme<MAX, NAN_WINS, FLAGS>(a, b), c);
}
template <int FLAGS>
PTX_INLINE float neg(float a) {
  return negate(in<FLAGS>(a));
}
template <int FLAGS>
PTX_INLINE float abs(float a) {
  return magnitude(in<FLAGS>(a));
}

PTX_INLINE double add64(double a, double b) { return a + b; }
PTX_INLINE double sub64(double a, double b) { return a - b; }
PTX_INLINE double mul64(double a, double b) { return a * b; }
PTX_INLINE double div64(double a, double b) { return a / b; }
PTX_INLINE double rcp64(double a) { return 1.0 / a; }
PTX_INLINE double sqrt64(double a) { return __builtin_sqrt(a); }
PTX_INLINE double fma64(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <bool MAX>
PTX_INLINE double extreme64(double a, double b) {
  const uint64_t p = bit_cast<uint64_t>(a);
  const uint64_t q = bit_cast<uint64_t>(b);
  const bool first = MAX ? a > b : a < b;
  const uint64_t number = a == b ? (MAX ? p & q : p | q) : first ? p : q;
  return bit_cast<double>(a != a ? q : b != b ? p : number);
}

// Operands of 16 bits are converted, which is exact, and the result is rounded once.
template <class H, Mode M, int FLAGS>
PTX_INLINE float add_mixed(H a, float b) {
  return add<M, FLAGS>(to_float(a), b);
}
template <class H, Mode M, int FLAGS>
PTX_INLINE float sub_mixed(H a, float b) {
  return sub<M, FLAGS>(to_float(a), b);
}
template <class H, Mode M, int FLAGS>
PTX_INLINE float fma_mixed(H a, H b, float c) {
  return fma<M, FLAGS>(to_float(a), to_float(b), c);
}

PTX_INLINE float copysign32(float a, float b) {
  const uint32_t sign = bit_cast<uint32_t>(a) & 0x80000000u;
  return bit_cast<float>(sign | (bit_cast<uint32_t>(b) & 0x7fffffffu));
}
PTX_INLINE double copysign64(double a, double b) { return __builtin_copysign(b, a); }

enum Test { FINITE, INFINITE, NUMBER, NOT_A_NUMBER, NORMAL, SUBNORMAL };
template <class T, Test TEST>
PTX_INLINE bool testp(T x) {
  const T size = std::fabs(x);
  const T largest = sizeof(T) == 8 ? T(__DBL_MAX__) : T(__FLT_MAX__);
  const T smallest = sizeof(T) == 8 ? T(__DBL_MIN__) : T(__FLT_MIN__);
  switch (TEST) {
    case FINITE:
      return size <= largest;
    case INFINITE:
      return size > largest;
    case NUMBER:
      return x == x;
    case NOT_A_NUMBER:
      return x != x;
    case NORMAL:
      return size >= smallest && size <= largest;
    case SUBNORMAL:
      return size < smallest && x != 0;
  }
  return false;
}

// add.f32 without a mode rounds to nearest, as add.rn.f32.
template <Mode M, int FLAGS>
void add_rounded(Forms& forms, const std::string& mode, const std::string& flags) {
  const std::string end = mode + flags + ".f32";
  add_form<add<M, FLAGS>>(forms, "add" + end, Class::FLOAT);
  add_form<sub<M, FLAGS>>(forms, "sub" + end, Class::FLOAT);
  add_form<mul<M, FLAGS>>(forms, "mul" + end, Class::FLOAT);
  if (mode.empty()) return;
  add_form<fma<M, FLAGS>>(forms, "fma" + end, Class::FLOAT);
  add_form<fma<M, FLAGS>>(forms, "mad" + end, Class::FLOAT);
  if constexpr ((FLAGS & SAT) == 0) {
    add_form<div<M, FLAGS>>(forms, "div" + end, Class::SPECIAL);
    add_form<rcp<M, FLAGS>>(forms, "rcp" + end, Class::SPECIAL);
    add_form<sqrt<M, FLAGS>>(forms, "sqrt" + end, Class::SPECIAL);
    add_pair_form<add<M, FLAGS>>(forms, "add" + end + "x2", Class::FLOAT);
    add_pair_form<sub<M, FLAGS>>(forms, "sub" + end + "x2", Class::FLOAT);
    add_pair_form<mul<M, FLAGS>>(forms, "mul" + end + "x2", Class::FLOAT);
    add_pair_form<fma<M, FLAGS>>(forms, "fma" + end + "x2", Class::FLOAT);
  }
}

template <Mode M>
void add_mode(Forms& forms, const std::string& mode) {
  add_rounded<M, NONE>(forms, mode, "");
  add_rounded<M, FTZ>(forms, mode, ".ftz");
  add_rounded<M, SAT>(forms, mode, ".sat");
  add_rounded<M, FTZ | SAT>(forms, mode, ".ftz.sat");
}

template <class H, Mode M, int FLAGS>
void add_mixed_forms(Forms& forms, const std::string& flags, const std::string& type) {
  const std::string end = flags + ".f32" + type;
  add_form<add_mixed<H, M, FLAGS>>(forms, "add" + end, Class::FLOAT);
  add_form<sub_mixed<H, M, FLAGS>>(forms, "sub" + end, Class::FLOAT);
  add_form<fma_mixed<H, M, FLAGS>>(forms, "fma" + end, Class::FLOAT);
}

// sm_100 and newer take a third source.
template <bool MAX, bool NAN_WINS, int FLAGS>
void add_extreme(Forms& forms, const std::string& opcode) {
  add_form<extreme<MAX, NAN_WINS, FLAGS>>(forms, opcode, Class::FLOAT);
  add_form<extreme3<MAX, NAN_WINS, FLAGS>>(forms, opcode + THREE_SOURCES, Class::FLOAT);
}

template <int FLAGS>
void add_flag_forms(Forms& forms, const std::string& flags) {
  add_form<neg<FLAGS>>(forms, "neg" + flags + ".f32", Class::FLOAT);
  add_form<abs<FLAGS>>(forms, "abs" + flags + ".f32", Class::FLOAT);
  add_extreme<false, false, FLAGS>(forms, "min" + flags + ".f32");
  add_extreme<false, true, FLAGS>(forms, "min" + flags + ".NaN.f32");
  add_extreme<true, false, FLAGS>(forms, "max" + flags + ".f32");
  add_extreme<true, true, FLAGS>(forms, "max" + flags + ".NaN.f32");
}

template <class T>
void add_tests(Forms& forms, const std::string& type) {
  add_form<testp<T, FINITE>>(forms, "testp.finite" + type, Class::PREDICATE);
  add_form<testp<T, INFINITE>>(forms, "testp.infinite" + type, Class::PREDICATE);
  add_form<testp<T, NUMBER>>(forms, "testp.number" + type, Class::PREDICATE);
  add_form<testp<T, NOT_A_NUMBER>>(forms, "testp.notanumber" + type, Class::PREDICATE);
  add_form<testp<T, NORMAL>>(forms, "testp.normal" + type, Class::PREDICATE);
  add_form<testp<T, SUBNORMAL>>(forms, "testp.subnormal" + type, Class::PREDICATE);
}

void add_f64_forms(Forms& forms) {
  for (const char* mode : {"", ".rn"}) {
    const std::string end = std::string(mode) + ".f64";
    add_form<add64>(forms, "add" + end, Class::FLOAT);
    add_form<sub64>(forms, "sub" + end, Class::FLOAT);
    add_form<mul64>(forms, "mul" + end, Class::FLOAT);
  }
  add_form<fma64>(forms, "fma.rn.f64", Class::FLOAT);
  add_form<fma64>(forms, "mad.rn.f64", Class::FLOAT);
  add_form<div64>(forms, "div.rn.f64", Class::SPECIAL);
  add_form<rcp64>(forms, "rcp.rn.f64", Class::SPECIAL);
  add_form<sqrt64>(forms, "sqrt.rn.f64", Class::SPECIAL);
  add_form<negate64>(forms, "neg.f64", Class::FLOAT);
  add_form<magnitude64>(forms, "abs.f64", Class::FLOAT);
  add_form<extreme64<false>>(forms, "min.f64", Class::FLOAT);
  add_form<extreme64<true>>(forms, "max.f64", Class::FLOAT);
  add_form<copysign64>(forms, "copysign.f64", Class::FLOAT);
}

template <class H>
void add_mixed_type(Forms& forms, const std::string& type) {
  add_mixed_forms<H, RN, NONE>(forms, ".rn", type);
  add_mixed_forms<H, RZ, NONE>(forms, ".rz", type);
  add_mixed_forms<H, RM, NONE>(forms, ".rm", type);
  add_mixed_forms<H, RP, NONE>(forms, ".rp", type);
  add_mixed_forms<H, RN, SAT>(forms, ".rn.sat", type);
  add_form<add_mixed<H, RN, NONE>>(forms, "add.f32" + type, Class::FLOAT);
  add_form<sub_mixed<H, RN, NONE>>(forms, "sub.f32" + type, Class::FLOAT);
}

}  // namespace

void add_float_forms(Forms& forms) {
  add_mode<RN>(forms, ".rn");
  add_mode<RN>(forms, "");
  add_mode<RZ>(forms, ".rz");
  add_mode<RM>(forms, ".rm");
  add_mode<RP>(forms, ".rp");
  for (const char* flags : {"", ".ftz"}) {
    for (const char* operation : {"add", "sub", "mul"}) {
      const std::string start = std::string(operation);
      forms[start + flags + ".f32x2"] = forms.at(start + ".rn" + flags + ".f32x2");
    }
  }
  add_flag_forms<NONE>(forms, "");
  add_flag_forms<FTZ>(forms, ".ftz");
  add_mixed_type<Float16>(forms, ".f16");
  add_mixed_type<BFloat16>(forms, ".bf16");
  add_form<copysign32>(forms, "copysign.f32", Class::FLOAT);
  add_tests<float>(forms, ".f32");
  add_tests<double>(forms, ".f64");
  add_f64_forms(forms);
}

}  // namespace deepkern::ptx
