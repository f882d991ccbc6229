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
void add_pair(Forms& forms, const std::string& types) {
  add_form<convert<D, D, S>>(forms, "cvt" + types, Class::CONVERT);
}

// The conversions that kernels use most; convert_general does the others.
void add_frequent_pairs(Forms& forms) {
  add_pair<uint16_t, uint32_t>(forms, ".u16.u32");
  add_pair<uint32_t, uint16_t>(forms, ".u32.u16");
  add_pair<uint32_t, uint64_t>(forms, ".u32.u64");
  add_pair<uint64_t, uint32_t>(forms, ".u64.u32");
  add_pair<int64_t, int32_t>(forms, ".s64.s32");
}

// Every conversion between integers, with .sat, and with registers wider than the types.
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

// 0 for a type that is not an integer.
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
  if constexpr (std::is_same_v<T, double>)
    return static_cast<double>(x);
  else if constexpr (std::is_same_v<T, float> && M == RN)
    return static_cast<float>(x);
  else
    return round_to<T, M>(odd_of(x));
}

template <class I>
void add_to_float(Forms& forms, const std::string& type) {
  add_form<from_integer<float, I, RN>>(forms, "cvt.rn.f32" + type, Class::CONVERT);
}

// What a conversion between an integer and a float needs where no handler of its own exists.
struct NumberConversion {
  int integer_bits, register_bits;  // of the integer and of its register
  bool is_signed;
  int float_bits;
  bool brain;  // bf16
  Mode mode;
  bool flushes;
};

template <class T, class I>
uint64_t round_as(I x, Mode mode) {
  switch (mode) {
    case RN:
      return to_lane<T>(from_integer<T, I, RN>(x));
    case RZ:
      return to_lane<T>(from_integer<T, I, RZ>(x));
    case RM:
      return to_lane<T>(from_integer<T, I, RM>(x));
    case RP:
      return to_lane<T>(from_integer<T, I, RP>(x));
  }
  return 0;
}

template <class I>
uint64_t float_of(I x, const NumberConversion& c) {
  if (c.float_bits == 64) {
    // Only integers of 64 bits need rounding, which is to the nearest: see bind_number_conversion.
    return to_lane<double>(static_cast<double>(x));
  }
  if (c.float_bits == 32) return round_as<float>(x, c.mode);
  return c.brain ? round_as<BFloat16>(x, c.mode) : round_as<Float16>(x, c.mode);
}

Status convert_to_float(Warp& warp, const Instruction& i, uint32_t mask) {
  const auto& c = *static_cast<const NumberConversion*>(i.extra.get());
  uint64_t result[LANES];
  uint32_t low[LANES];
  for (int lane = 0; lane < LANES; ++lane) {
    const uint64_t bits = c.register_bits == 64 ? warp.u64(i.a)[lane] : warp.u32(i.a)[lane];
    const __int128 value = extend(bits, c.integer_bits, c.is_signed);
    result[lane] = c.is_signed ? float_of(static_cast<int64_t>(value), c)
                               : float_of(static_cast<uint64_t>(value), c);
    low[lane] = static_cast<uint32_t>(result[lane]);
  }
  if (c.float_bits == 64)
    blend(warp.u64(i.d), result, mask);
  else
    blend(warp.u32(i.d), low, mask);
  return Status::NEXT;
}

// ---- float to integer

PTX_INLINE double integral(double x, Mode mode) {
  switch (mode) {
    case RN:
      return __builtin_rint(x);
    case RZ:
      return __builtin_trunc(x);
    case RM:
      return __builtin_floor(x);
    case RP:
      return __builtin_ceil(x);
  }
  return x;
}

template <class W, class I, class T, Mode M>
PTX_INLINE W to_integer(T x) {
  const double value = to_float(x);
  using Limits = std::numeric_limits<I>;
  if (value != value) return static_cast<W>(sizeof(I) == 8 ? uint64_t(1) << 63 : 0);
  const double rounded = integral(value, M);
  // The first number above the range is a power of two, hence exact.
  const double end = 2.0 * static_cast<double>(uint64_t(1) << (Limits::digits - 1));
  if (rounded >= end) return static_cast<W>(Limits::max());
  if (rounded < static_cast<double>(Limits::min())) return static_cast<W>(Limits::min());
  return static_cast<W>(static_cast<I>(rounded));
}

double float_value(uint64_t bits, const NumberConversion& c) {
  if (c.float_bits == 64) return bit_cast<double>(bits);
  const auto low = static_cast<uint32_t>(bits);
  if (c.float_bits == 32) return c.flushes ? flush(bit_cast<float>(low)) : bit_cast<float>(low);
  const auto code = static_cast<uint16_t>(low);
  return c.brain ? to_float(BFloat16{code}) : to_float(Float16{code});
}

uint64_t integer_of(double value, const NumberConversion& c) {
  const int digits = c.integer_bits - (c.is_signed ? 1 : 0);
  const uint64_t most = ~uint64_t(0) >> (64 - digits);
  const bool wide = c.integer_bits == 64 || c.float_bits == 64;
  uint64_t result = 0;
  if (value != value) {
    result = wide ? uint64_t(1) << (c.integer_bits - 1) : 0;
  } else {
    const double rounded = integral(value, c.mode);
    const double end = 2.0 * static_cast<double>(uint64_t(1) << (digits - 1));
    const double least = c.is_signed ? -end : 0;
    if (rounded >= end)
      result = most;
    else if (rounded < least)
      result = c.is_signed ? ~most : 0;
    else if (c.is_signed)
      result = static_cast<uint64_t>(static_cast<int64_t>(rounded));
    else
      result = static_cast<uint64_t>(rounded);
  }
  return static_cast<uint64_t>(extend(result, c.integer_bits, c.is_signed));
}

Status convert_to_integer(Warp& warp, const Instruction& i, uint32_t mask) {
  const auto& c = *static_cast<const NumberConversion*>(i.extra.get());
  uint64_t result[LANES];
  uint32_t low[LANES];
  for (int lane = 0; lane < LANES; ++lane) {
    const uint64_t bits = c.float_bits == 64 ? warp.u64(i.a)[lane] : warp.u32(i.a)[lane];
    const uint64_t value = integer_of(float_value(bits, c), c);
    result[lane] = static_cast<uint64_t>(extend(value, c.register_bits, false));
    low[lane] = static_cast<uint32_t>(result[lane]);
  }
  if (c.register_bits == 64)
    blend(warp.u64(i.d), result, mask);
  else
    blend(warp.u32(i.d), low, mask);
  return Status::NEXT;
}

// Reads .rn, .rni and their kin; false for another word.
bool read_mode(const std::string& word, bool integral_mode, Mode& mode) {
  static const std::pair<const char*, Mode> NAMES[] = {
      {"rn", RN}, {"rz", RZ}, {"rm", RM}, {"rp", RP}};
  for (const auto& [name, value] : NAMES) {
    if (word == std::string(name) + (integral_mode ? "i" : "")) return mode = value, true;
  }
  return false;
}

}  // namespace

void add_integer_conversions(Forms& forms) {
  add_frequent_pairs(forms);
  add_to_float<int32_t>(forms, ".s32");
  add_to_float<uint32_t>(forms, ".u32");
  add_to_float<int64_t>(forms, ".s64");
  add_form<to_integer<int32_t, int32_t, float, RZ>>(forms, "cvt.rzi.s32.f32", Class::CONVERT);
  add_form<to_integer<uint32_t, uint32_t, float, RZ>>(forms, "cvt.rzi.u32.f32", Class::CONVERT);
  add_form<to_integer<int32_t, int32_t, float, RN>>(forms, "cvt.rni.s32.f32", Class::CONVERT);
}

bool bind_number_conversion(Binder& binder) {
  const std::vector<std::string>& words = binder.statement.opcode;
  const std::string& to = words[words.size() - 2];
  const std::string& from = words.back();
  const bool to_float = integer_bits(from) != 0;
  const std::string& number = to_float ? to : from;
  if (integer_bits(to_float ? from : to) == 0 || binder.count() != 2) return false;
  if (number != "f16" && number != "bf16" && number != "f32" && number != "f64") return false;
  NumberConversion c{};
  size_t k = 1;
  if (!read_mode(words[k++], !to_float, c.mode)) return false;
  if (words[k] == "ftz" && number == "f32" && !to_float) c.flushes = true, ++k;
  if (words[k] == "sat" && !to_float) ++k;  // the range is the limit in any case
  if (k != words.size() - 2) return false;
  const std::string& integer = to_float ? from : to;
  c.integer_bits = integer_bits(integer);
  c.is_signed = integer[0] == 's';
  c.brain = number == "bf16";
  c.float_bits = std::stoi(number.substr(c.brain ? 2 : 1));
  if (to_float && c.float_bits == 64 && c.integer_bits == 64 && c.mode != RN) return false;
  const int integer_register = binder.width(to_float ? 1 : 0);
  c.register_bits = std::max(integer_register, c.integer_bits);
  const int wide = c.register_bits == 64 ? 64 : c.integer_bits;
  Instruction& i = binder.instruction;
  i.kind = Class::CONVERT;
  i.run = to_float ? convert_to_float : convert_to_integer;
  i.d = binder.destination(0, to_float ? c.float_bits : wide);
  i.a = binder.source(1, to_float ? wide : c.float_bits);
  i.extra = std::make_shared<NumberConversion>(c);
  return true;
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
