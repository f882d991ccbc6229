// cvt from and to integers.
//
// An integer result narrower than its register is extended by its sign. A float becomes the nearest
// integer of the destination; a NaN becomes 0, or 2^(bits - 1) where a type has 64 bits.
// Source: PTX ISA 9.0, section 9.7.9, "Data Movement and Conversion Instructions": cvt.
#include <limits>

#include "convert.h"
#include "floats.h"

namespace deepkern::ptx {
namespace {

// ---- integer to integer

// W: the register of the result, D: its type.
template <class W, class D, class S>
PTX_INLINE W convert(S a) {
  return static_cast<W>(static_cast<D>(a));
}

template <class D, class S>
void add_pair(Forms& forms, const std::string& opcode) {
  add_form<convert<D, D, S>>(forms, opcode, Class::CONVERT);
  if constexpr (std::is_signed_v<D> && sizeof(D) == 1) {
    add_form<convert<int16_t, D, S>>(forms, opcode + "/16", Class::CONVERT);
  }
  if constexpr (std::is_signed_v<D> && sizeof(D) <= 2) {
    add_form<convert<int32_t, D, S>>(forms, opcode + "/32", Class::CONVERT);
  }
}

template <class D>
void add_from_integers(Forms& forms, const std::string& type) {
  add_pair<D, uint8_t>(forms, "cvt" + type + ".u8");
  add_pair<D, int8_t>(forms, "cvt" + type + ".s8");
  add_pair<D, uint16_t>(forms, "cvt" + type + ".u16");
  add_pair<D, int16_t>(forms, "cvt" + type + ".s16");
  add_pair<D, uint32_t>(forms, "cvt" + type + ".u32");
  add_pair<D, int32_t>(forms, "cvt" + type + ".s32");
  add_pair<D, uint64_t>(forms, "cvt" + type + ".u64");
  add_pair<D, int64_t>(forms, "cvt" + type + ".s64");
}

// The other forms: .sat, and a register of 64 bits that holds a narrower type.
struct IntegerConversion {
  int source_bits;
  bool source_signed;
  bool source_wide;  // its register has 64 bits
  int bits;
  bool is_signed;
  int register_bits;
  bool saturates;
};

__int128 extend(uint64_t value, int bits, bool is_signed) {
  if (is_signed) return static_cast<int64_t>(value << (64 - bits)) >> (64 - bits);
  return static_cast<uint64_t>(value << (64 - bits)) >> (64 - bits);
}

uint64_t convert_one(uint64_t lane, const IntegerConversion& c) {
  __int128 value = extend(lane, c.source_bits, c.source_signed);
  if (c.saturates) {
    const __int128 one = 1;
    const __int128 low = c.is_signed ? -(one << (c.bits - 1)) : 0;
    const __int128 high = (one << (c.is_signed ? c.bits - 1 : c.bits)) - 1;
    value = value < low ? low : value > high ? high : value;
  }
  const uint64_t result =
      static_cast<uint64_t>(extend(static_cast<uint64_t>(value), c.bits, c.is_signed));
  return static_cast<uint64_t>(extend(result, c.register_bits, false));
}

Status convert_general(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const auto& c = *static_cast<const IntegerConversion*>(instruction.extra.get());
  const uint64_t* wide = warp.u64(instruction.a);
  const uint32_t* narrow = warp.u32(instruction.a);
  uint64_t result[LANES];
  uint32_t low[LANES];
  for (int lane = 0; lane < LANES; ++lane) {
    result[lane] = convert_one(c.source_wide ? wide[lane] : narrow[lane], c);
    low[lane] = static_cast<uint32_t>(result[lane]);
  }
  if (c.register_bits == 64) {
    blend(warp.u64(instruction.d), result, mask);
  } else {
    blend(warp.u32(instruction.d), low, mask);
  }
  return Status::NEXT;
}

int integer_bits(const std::string& type) {
  if (type != "u8" && type != "s8" && type != "u16" && type != "s16" && type != "u32" &&
      type != "s32" && type != "u64" && type != "s64") {
    return 0;
  }
  return std::stoi(type.substr(1));
}

// ---- integer to float

// An integer as a float64, rounded to odd where float64 cannot hold it.
template <class I>
PTX_INLINE double odd_of(I x) {
  const double rounded = static_cast<double>(x);
  if constexpr (sizeof(I) < 8) {
    return rounded;
  } else {
    const __int128 error = static_cast<__int128>(x) - static_cast<__int128>(rounded);
    return to_odd(rounded, static_cast<double>(error));
  }
}

template <class T, class I, Mode M>
PTX_INLINE T from_integer(I x) {
  if constexpr (std::is_same_v<T, double>) return static_cast<double>(x);
  else if constexpr (std::is_same_v<T, float> && M == RN) return static_cast<float>(x);
  else return round_to<T, M>(odd_of(x));
}

// These forms are rare: one compilation, without AVX2, is enough.
template <auto F>
void add_baseline_form(Forms& forms, const std::string& opcode) {
  forms[opcode] = {run_baseline<Lanes<F>>, Class::CONVERT, &Lanes<F>::operands};
}

template <class I, Mode M>
void add_to_float(Forms& forms, const std::string& mode, const std::string& type) {
  add_form<from_integer<float, I, M>>(forms, "cvt" + mode + ".f32" + type, Class::CONVERT);
  add_baseline_form<from_integer<Float16, I, M>>(forms, "cvt" + mode + ".f16" + type);
  add_baseline_form<from_integer<BFloat16, I, M>>(forms, "cvt" + mode + ".bf16" + type);
  if constexpr (sizeof(I) < 8 || M == RN) {
    add_baseline_form<from_integer<double, I, M>>(forms, "cvt" + mode + ".f64" + type);
  }
}

// ---- float to integer

template <Mode M>
PTX_INLINE double integral(double x) {
  switch (M) {
    case RN: return __builtin_rint(x);
    case RZ: return __builtin_trunc(x);
    case RM: return __builtin_floor(x);
    case RP: return __builtin_ceil(x);
  }
  return x;
}

PTX_INLINE double to_double(double x) { return x; }
template <class T>
PTX_INLINE double to_double(T x) {
  return to_float(x);
}

template <class W, class I, class T, Mode M, bool FTZ_>
PTX_INLINE W to_integer(T x) {
  double value = 0;
  if constexpr (FTZ_) {
    value = to_double(flush(x));
  } else {
    value = to_double(x);
  }
  using Limits = std::numeric_limits<I>;
  constexpr bool WIDE = sizeof(I) == 8 || std::is_same_v<T, double>;
  if (value != value) {
    return static_cast<W>(static_cast<I>(WIDE ? uint64_t(1) << (8 * sizeof(I) - 1) : 0));
  }
  const double rounded = integral<M>(value);
  // The first number above the range is a power of two, hence exact.
  const double end = 2.0 * static_cast<double>(uint64_t(1) << (Limits::digits - 1));
  if (rounded >= end) return static_cast<W>(Limits::max());
  if (rounded < static_cast<double>(Limits::min())) return static_cast<W>(Limits::min());
  return static_cast<W>(static_cast<I>(rounded));
}

template <class I, class T, Mode M, bool FTZ_>
void add_to_integer(Forms& forms, const std::string& start, const std::string& types) {
  for (const char* sat : {"", ".sat"}) {
    const std::string opcode = start + sat + types;
    add_baseline_form<to_integer<I, I, T, M, FTZ_>>(forms, opcode);
    if constexpr (std::is_signed_v<I> && sizeof(I) == 1) {
      add_baseline_form<to_integer<int16_t, I, T, M, FTZ_>>(forms, opcode + "/16");
    }
    if constexpr (std::is_signed_v<I> && sizeof(I) <= 2) {
      add_baseline_form<to_integer<int32_t, I, T, M, FTZ_>>(forms, opcode + "/32");
    }
  }
}

template <class I, Mode M>
void add_from_floats(Forms& forms, const std::string& mode, const std::string& type) {
  add_to_integer<I, float, M, false>(forms, "cvt" + mode, type + ".f32");
  add_to_integer<I, float, M, true>(forms, "cvt" + mode + ".ftz", type + ".f32");
  add_to_integer<I, double, M, false>(forms, "cvt" + mode, type + ".f64");
  add_to_integer<I, Float16, M, false>(forms, "cvt" + mode, type + ".f16");
  add_to_integer<I, BFloat16, M, false>(forms, "cvt" + mode, type + ".bf16");
}

template <class I>
void add_type(Forms& forms, const std::string& type) {
  add_from_integers<I>(forms, type);
  add_to_float<I, RN>(forms, ".rn", type);
  add_to_float<I, RZ>(forms, ".rz", type);
  add_to_float<I, RM>(forms, ".rm", type);
  add_to_float<I, RP>(forms, ".rp", type);
  add_from_floats<I, RN>(forms, ".rni", type);
  add_from_floats<I, RZ>(forms, ".rzi", type);
  add_from_floats<I, RM>(forms, ".rmi", type);
  add_from_floats<I, RP>(forms, ".rpi", type);
}

}  // namespace

void add_integer_conversions(Forms& forms) {
  add_type<uint8_t>(forms, ".u8");
  add_type<int8_t>(forms, ".s8");
  add_type<uint16_t>(forms, ".u16");
  add_type<int16_t>(forms, ".s16");
  add_type<uint32_t>(forms, ".u32");
  add_type<int32_t>(forms, ".s32");
  add_type<uint64_t>(forms, ".u64");
  add_type<int64_t>(forms, ".s64");
}

bool bind_integer_conversion(Binder& binder) {
  const std::vector<std::string>& words = binder.statement.opcode;
  const bool saturates = words.size() == 4 && words[1] == "sat";
  if (words.size() != 3 && !saturates) return false;
  const std::string& to = words[words.size() - 2];
  const std::string& from = words.back();
  IntegerConversion c;
  c.bits = integer_bits(to);
  c.source_bits = integer_bits(from);
  if (c.bits == 0 || c.source_bits == 0) return false;
  if (binder.count() != 2) binder.fail("it has a wrong number of operands");
  c.is_signed = to[0] == 's';
  c.source_signed = from[0] == 's';
  c.source_wide = binder.width(1) == 64 || c.source_bits == 64;
  c.register_bits = std::max(binder.width(0), c.bits);
  c.saturates = saturates;
  binder.instruction.run = convert_general;
  binder.instruction.kind = Class::CONVERT;
  binder.instruction.d = binder.destination(0, c.register_bits == 64 ? 64 : c.bits);
  binder.instruction.a = binder.source(1, c.source_wide ? 64 : c.source_bits);
  binder.instruction.extra = std::make_shared<IntegerConversion>(c);
  return true;
}

}  // namespace deepkern::ptx
