// Integer arithmetic: add, sub, mul, mad, div, rem, min, max, abs, neg, sad, dp4a.
// Source: PTX ISA 9.0, section 9.7.1, "Integer Arithmetic Instructions".
#include <algorithm>
#include <limits>

#include "arithmetic.h"

namespace deepkern::ptx {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// The type of twice as many bits.
template <class T>
struct WideOf;
template <>
struct WideOf<uint16_t> {
  using type = uint32_t;
};
template <>
struct WideOf<int16_t> {
  using type = int32_t;
};
template <>
struct WideOf<uint32_t> {
  using type = uint64_t;
};
template <>
struct WideOf<int32_t> {
  using type = int64_t;
};
template <>
struct WideOf<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct WideOf<int64_t> {
  using type = __int128;
};
template <class T>
using Wide = typename WideOf<T>::type;

// Unsigned arithmetic of at least 32 bits: it wraps, and it has no promotion to a signed type.
template <class T>
using Wrap = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
PTX_INLINE T add(T a, T b) {
  return static_cast<T>(Wrap<T>(a) + Wrap<T>(b));
}
template <class T>
PTX_INLINE T sub(T a, T b) {
  return static_cast<T>(Wrap<T>(a) - Wrap<T>(b));
}
template <class T>
PTX_INLINE T mul_lo(T a, T b) {
  return static_cast<T>(Wrap<T>(a) * Wrap<T>(b));
}
template <class T>
PTX_INLINE T mul_hi(T a, T b) {
  return static_cast<T>((Wide<T>(a) * Wide<T>(b)) >> (8 * sizeof(T)));
}
template <class T>
PTX_INLINE Wide<T> mul_wide(T a, T b) {
  return Wide<T>(a) * Wide<T>(b);
}
template <class T>
PTX_INLINE T mad_lo(T a, T b, T c) {
  return add<T>(mul_lo<T>(a, b), c);
}
template <class T>
PTX_INLINE T mad_hi(T a, T b, T c) {
  return add<T>(mul_hi<T>(a, b), c);
}
template <class T>
PTX_INLINE Wide<T> mad_wide(T a, T b, Wide<T> c) {
  return add<Wide<T>>(Wide<T>(a) * Wide<T>(b), c);
}

PTX_INLINE int32_t clamp_s32(int64_t x) {
  return static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(x, INT32_MIN), INT32_MAX));
}
PTX_INLINE int32_t add_sat(int32_t a, int32_t b) { return clamp_s32(int64_t(a) + b); }
PTX_INLINE int32_t sub_sat(int32_t a, int32_t b) { return clamp_s32(int64_t(a) - b); }

// mul24 takes the low 24 bits of its operands; `hi` returns bits 16 to 47 of the product.
template <class T>
PTX_INLINE T low24(T a) {
  return static_cast<T>(static_cast<T>(uint32_t(a) << 8) >> 8);
}
template <class T, bool HI>
PTX_INLINE T mul24(T a, T b) {
  return static_cast<T>((Wide<T>(low24(a)) * Wide<T>(low24(b))) >> (HI ? 16 : 0));
}
template <class T, bool HI>
PTX_INLINE T mad24(T a, T b, T c) {
  return add<T>(mul24<T, HI>(a, b), c);
}

template <class T>
PTX_INLINE T sad(T a, T b, T c) {
  const T difference = a < b ? sub<T>(b, a) : sub<T>(a, b);
  return add<T>(c, difference);
}

// A division by zero gives an unspecified value: here all ones, and the dividend as the remainder.
// INT_MIN / -1 wraps.
template <class T>
PTX_INLINE T divide(T a, T b) {
  if constexpr (std::is_same_v<T, int32_t>) {
    // The quotient in float64 has the integer part of the exact one, and vectorizes.
    const bool special = (b == 0) | (b == -1);
    const int32_t quotient = static_cast<int32_t>(double(a) / double(special ? 1 : b));
    return b == 0 ? -1 : b == -1 ? static_cast<int32_t>(0u - uint32_t(a)) : quotient;
  } else {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return sub<T>(0, a);
    return a / b;
  }
}
template <class T>
PTX_INLINE T remainder(T a, T b) {
  if (b == 0) return a;
  return sub<T>(a, mul_lo<T>(divide<T>(a, b), b));
}

template <class T>
PTX_INLINE T minimum(T a, T b) {
  return a < b ? a : b;
}
template <class T>
PTX_INLINE T maximum(T a, T b) {
  return a > b ? a : b;
}
template <class T>
PTX_INLINE T minimum_relu(T a, T b) {
  return maximum<T>(minimum<T>(a, b), 0);
}
template <class T>
PTX_INLINE T maximum_relu(T a, T b) {
  return maximum<T>(maximum<T>(a, b), 0);
}
template <class T>
PTX_INLINE T negate(T a) {
  return sub<T>(0, a);
}
template <class T>
PTX_INLINE T absolute(T a) {
  return a < 0 ? sub<T>(0, a) : a;
}

template <class T>
PTX_INLINE int32_t byte_of(uint32_t x, int k) {
  return static_cast<T>(x >> (8 * k));
}
template <class A, class B>
PTX_INLINE uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int k = 0; k < 4; ++k) c += uint32_t(byte_of<A>(a, k) * byte_of<B>(b, k));
  return c;
}

template <class T>
void add_common(Forms& forms, const std::string& type) {
  add_form<add<T>>(forms, "add" + type, Class::INTEGER);
  add_form<sub<T>>(forms, "sub" + type, Class::INTEGER);
  add_form<mul_lo<T>>(forms, "mul.lo" + type, Class::INTEGER);
  add_form<mul_hi<T>>(forms, "mul.hi" + type, Class::INTEGER);
  add_form<mad_lo<T>>(forms, "mad.lo" + type, Class::INTEGER);
  add_form<mad_hi<T>>(forms, "mad.hi" + type, Class::INTEGER);
  add_form<sad<T>>(forms, "sad" + type, Class::INTEGER);
  add_form<divide<T>>(forms, "div" + type, Class::INTEGER);
  add_form<remainder<T>>(forms, "rem" + type, Class::INTEGER);
  add_form<minimum<T>>(forms, "min" + type, Class::INTEGER);
  add_form<maximum<T>>(forms, "max" + type, Class::INTEGER);
  if constexpr (sizeof(T) < 8) {
    add_form<mul_wide<T>>(forms, "mul.wide" + type, Class::INTEGER);
    add_form<mad_wide<T>>(forms, "mad.wide" + type, Class::INTEGER);
  }
  if constexpr (std::is_signed_v<T>) {
    add_form<negate<T>>(forms, "neg" + type, Class::INTEGER);
    add_form<absolute<T>>(forms, "abs" + type, Class::INTEGER);
  }
}

template <class T>
void add_24(Forms& forms, const std::string& type) {
  add_form<mul24<T, false>>(forms, "mul24.lo" + type, Class::INTEGER);
  add_form<mul24<T, true>>(forms, "mul24.hi" + type, Class::INTEGER);
  add_form<mad24<T, false>>(forms, "mad24.lo" + type, Class::INTEGER);
  add_form<mad24<T, true>>(forms, "mad24.hi" + type, Class::INTEGER);
}

template <class T>
void add_packed(Forms& forms, const std::string& type) {
  add_pair_form<add<T>>(forms, "add" + type, Class::INTEGER);
  add_pair_form<minimum<T>>(forms, "min" + type, Class::INTEGER);
  add_pair_form<maximum<T>>(forms, "max" + type, Class::INTEGER);
}

}  // namespace

void add_integer_forms(Forms& forms) {
  add_common<uint16_t>(forms, ".u16");
  add_common<int16_t>(forms, ".s16");
  add_common<uint32_t>(forms, ".u32");
  add_common<int32_t>(forms, ".s32");
  add_common<uint64_t>(forms, ".u64");
  add_common<int64_t>(forms, ".s64");
  add_24<uint32_t>(forms, ".u32");
  add_24<int32_t>(forms, ".s32");
  add_packed<uint16_t>(forms, ".u16x2");
  add_packed<int16_t>(forms, ".s16x2");
  add_form<add_sat>(forms, "add.sat.s32", Class::INTEGER);
  add_form<sub_sat>(forms, "sub.sat.s32", Class::INTEGER);
  add_form<minimum_relu<int32_t>>(forms, "min.relu.s32", Class::INTEGER);
  add_form<maximum_relu<int32_t>>(forms, "max.relu.s32", Class::INTEGER);
  add_pair_form<minimum_relu<int16_t>>(forms, "min.relu.s16x2", Class::INTEGER);
  add_pair_form<maximum_relu<int16_t>>(forms, "max.relu.s16x2", Class::INTEGER);
  add_form<dp4a<uint8_t, uint8_t>>(forms, "dp4a.u32.u32", Class::INTEGER);
  add_form<dp4a<uint8_t, int8_t>>(forms, "dp4a.u32.s32", Class::INTEGER);
  add_form<dp4a<int8_t, uint8_t>>(forms, "dp4a.s32.u32", Class::INTEGER);
  add_form<dp4a<int8_t, int8_t>>(forms, "dp4a.s32.s32", Class::INTEGER);
}

}  // namespace deepkern::ptx
