// setp, set, selp and slct.
//
// A comparison gives a mask of 32 lanes. setp combines it with a predicate and writes it and its
// complement; set writes all ones, or 1.0, where it holds.
// Source: PTX ISA 9.0, sections 9.7.6 and 9.7.7, "Comparison and Selection Instructions".
#include "arithmetic.h"
#include "floats.h"

namespace deepkern::ptx {
namespace {

enum Comparison { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NOT_NUM };

// The comparisons of numbers are false with a NaN, those that end in U are true.
template <Comparison C, class V>
PTX_INLINE bool compare(V a, V b) {
  const bool unordered = a != a || b != b;
  switch (C) {
    case EQ:
      return a == b;
    case NE:
      return a != b && !unordered;
    case LT:
      return a < b;
    case LE:
      return a <= b;
    case GT:
      return a > b;
    case GE:
      return a >= b;
    case EQU:
      return a == b || unordered;
    case NEU:
      return a != b;
    case LTU:
      return !(a >= b);
    case LEU:
      return !(a > b);
    case GTU:
      return !(a <= b);
    case GEU:
      return !(a < b);
    case NUM:
      return !unordered;
    case NOT_NUM:
      return unordered;
  }
  return false;
}

template <Comparison C, class T>
PTX_INLINE bool compare_integers(T a, T b) {
  return compare<C>(a, b);
}
template <Comparison C, bool FTZ_, class T>
PTX_INLINE bool compare_floats(T a, T b) {
  if constexpr (std::is_same_v<T, double>) {
    return compare<C>(a, b);
  } else {
    return compare<C>(to_float(input<FTZ_>(a)), to_float(input<FTZ_>(b)));
  }
}
// Half `H` of a packed register.
template <Comparison C, bool FTZ_, class T, int H>
PTX_INLINE bool compare_half(uint32_t a, uint32_t b) {
  return compare_floats<C, FTZ_>(T{static_cast<uint16_t>(a >> (16 * H))},
                                 T{static_cast<uint16_t>(b >> (16 * H))});
}

enum Combination : uint32_t { REPLACE, AND, OR, XOR };

// What the handlers keep in Instruction::mode, below INVERT of the third operand.
constexpr uint32_t COMBINATION = 3;
constexpr uint32_t ONE = 4;  // set writes 1.0 instead of all ones

PTX_INLINE uint32_t combine(Warp& warp, const Instruction& instruction, uint32_t bits) {
  const uint32_t combination = instruction.mode & COMBINATION;
  if (combination == REPLACE) return bits;
  const uint32_t other = predicate_of(warp, instruction.c, instruction.mode & INVERT);
  return combination == AND ? bits & other : combination == OR ? bits | other : bits ^ other;
}

template <auto F>
struct Setp {
  template <class T>
  static PTX_INLINE uint32_t bits_of(Warp& warp, const Instruction& i, bool (*)(T, T)) {
    return Lanes<F>::compute_bits(Source<T>(warp, i, i.a), Source<T>(warp, i, i.b));
  }
  static PTX_INLINE Status run(Warp& warp, const Instruction& i, uint32_t mask) {
    const uint32_t bits = bits_of(warp, i, F);
    // The third operand is read before p is written: it may be the same predicate.
    const uint32_t p = combine(warp, i, bits);
    const uint32_t q = combine(warp, i, ~bits);
    set_predicate(warp, i.d, mask, p);
    set_predicate(warp, i.e, mask, q);
    return Status::NEXT;
  }
};

// p receives the comparison of the low halves, q that of the high halves.
template <auto LOW, auto HIGH>
struct SetpPair {
  static PTX_INLINE Status run(Warp& warp, const Instruction& i, uint32_t mask) {
    const uint32_t low = combine(warp, i, Setp<LOW>::bits_of(warp, i, LOW));
    const uint32_t high = combine(warp, i, Setp<HIGH>::bits_of(warp, i, HIGH));
    set_predicate(warp, i.d, mask, low);
    set_predicate(warp, i.e, mask, high);
    return Status::NEXT;
  }
};

template <auto F>
struct Set {
  static PTX_INLINE Status run(Warp& warp, const Instruction& i, uint32_t mask) {
    const uint32_t bits = combine(warp, i, Setp<F>::bits_of(warp, i, F));
    const uint32_t value = i.mode & ONE ? bit_cast<uint32_t>(1.0f) : ~0u;
    uint32_t result[LANES];
    for (int lane = 0; lane < LANES; ++lane) result[lane] = bits >> lane & 1 ? value : 0;
    blend(warp.u32(i.d), result, mask);
    return Status::NEXT;
  }
};

// A comparison of a type: the handlers of setp and set, and the width of its operands.
struct Comparer {
  Handler setp;
  Handler set;  // null for packed types
  int bits;
  bool packed;
};
using Comparers = std::unordered_map<std::string, Comparer>;

template <auto F>
void add_comparer(Comparers& table, const std::string& key) {
  table[key] = {handler_of<Setp<F>>(), handler_of<Set<F>>(), Lanes<F>::operands[1], false};
}

template <class T>
void add_equal(Comparers& table, const std::string& type) {
  add_comparer<compare_integers<EQ, T>>(table, "eq" + type);
  add_comparer<compare_integers<NE, T>>(table, "ne" + type);
}

template <class T>
void add_integers(Comparers& table, const std::string& type) {
  add_equal<T>(table, type);
  add_comparer<compare_integers<LT, T>>(table, "lt" + type);
  add_comparer<compare_integers<LE, T>>(table, "le" + type);
  add_comparer<compare_integers<GT, T>>(table, "gt" + type);
  add_comparer<compare_integers<GE, T>>(table, "ge" + type);
  if (std::is_signed_v<T>) return;
  table["lo" + type] = table["lt" + type];
  table["ls" + type] = table["le" + type];
  table["hi" + type] = table["gt" + type];
  table["hs" + type] = table["ge" + type];
}

template <Comparison C, bool FTZ_, class T>
void add_float(Comparers& table, const char* name, const std::string& type) {
  add_comparer<compare_floats<C, FTZ_, T>>(table, name + type);
  if constexpr (sizeof(T) == 2) {
    using Pair = SetpPair<compare_half<C, FTZ_, T, 0>, compare_half<C, FTZ_, T, 1>>;
    table[name + type + "x2"] = {handler_of<Pair>(), nullptr, 32, true};
  }
}

template <bool FTZ_, class T>
void add_floats(Comparers& table, const std::string& type) {
  add_float<EQ, FTZ_, T>(table, "eq", type);
  add_float<NE, FTZ_, T>(table, "ne", type);
  add_float<LT, FTZ_, T>(table, "lt", type);
  add_float<LE, FTZ_, T>(table, "le", type);
  add_float<GT, FTZ_, T>(table, "gt", type);
  add_float<GE, FTZ_, T>(table, "ge", type);
  add_float<EQU, FTZ_, T>(table, "equ", type);
  add_float<NEU, FTZ_, T>(table, "neu", type);
  add_float<LTU, FTZ_, T>(table, "ltu", type);
  add_float<LEU, FTZ_, T>(table, "leu", type);
  add_float<GTU, FTZ_, T>(table, "gtu", type);
  add_float<GEU, FTZ_, T>(table, "geu", type);
  add_float<NUM, FTZ_, T>(table, "num", type);
  add_float<NOT_NUM, FTZ_, T>(table, "nan", type);
}

const Comparers& comparers() {
  static const Comparers all = [] {
    Comparers table;
    add_equal<uint16_t>(table, ".b16");
    add_equal<uint32_t>(table, ".b32");
    add_equal<uint64_t>(table, ".b64");
    add_integers<uint16_t>(table, ".u16");
    add_integers<int16_t>(table, ".s16");
    add_integers<uint32_t>(table, ".u32");
    add_integers<int32_t>(table, ".s32");
    add_integers<uint64_t>(table, ".u64");
    add_integers<int64_t>(table, ".s64");
    add_floats<false, float>(table, ".f32");
    add_floats<true, float>(table, ".ftz.f32");
    add_floats<false, double>(table, ".f64");
    add_floats<false, Float16>(table, ".f16");
    add_floats<true, Float16>(table, ".ftz.f16");
    add_floats<false, BFloat16>(table, ".bf16");
    return table;
  }();
  return all;
}

// Takes the comparison, its combination and .ftz out of the opcode: `eq.ftz` from `eq.and.ftz`.
std::string comparison_key(Binder& binder, std::vector<std::string> words) {
  std::string key = words.at(1);
  for (size_t k = 2; k < words.size(); ++k) {
    const bool combination = words[k] == "and" || words[k] == "or" || words[k] == "xor";
    if (!combination) {
      key += "." + words[k];
      continue;
    }
    if (binder.instruction.mode & COMBINATION) binder.fail("it has two Boolean operators");
    binder.instruction.mode |= words[k] == "and" ? AND : words[k] == "or" ? OR : XOR;
  }
  return key;
}

const Comparer& find_comparer(Binder& binder, const std::string& key) {
  const auto comparer = comparers().find(key);
  if (comparer == comparers().end()) binder.fail("this comparison of this type is unknown");
  const bool combined = binder.instruction.mode & COMBINATION;
  if (binder.count() != (combined ? 4u : 3u)) binder.fail("it has a wrong number of operands");
  binder.instruction.a = binder.source(1, comparer->second.bits);
  binder.instruction.b = binder.source(2, comparer->second.bits);
  if (combined) binder.instruction.c = bind_predicate_source(binder, 3, true);
  return comparer->second;
}

void bind_setp(Binder& binder) {
  Instruction& instruction = binder.instruction;
  const Comparer& comparer = find_comparer(binder, comparison_key(binder, binder.statement.opcode));
  const OperandText& destination = binder.statement.operands.at(0);
  const bool pair = destination.kind == OperandText::PAIR;
  if (comparer.packed && !pair) binder.fail("a comparison of packed values needs p|q");
  instruction.run = comparer.setp;
  instruction.kind = Class::PREDICATE;
  instruction.d = binder.predicate(pair ? destination.parts.at(0) : destination);
  if (pair) instruction.e = binder.predicate(destination.parts.at(1));
}

// set.CmpOp.dtype.stype
void bind_set(Binder& binder) {
  std::vector<std::string> words = binder.statement.opcode;
  if (words.size() < 4) binder.fail("it needs two types");
  const std::string type = words[words.size() - 2];
  if (type != "u32" && type != "s32" && type != "f32") {
    binder.fail("this type of its destination is unknown");
  }
  words.erase(words.end() - 2);
  const Comparer& comparer = find_comparer(binder, comparison_key(binder, words));
  if (comparer.set == nullptr) binder.fail("set of packed values is unknown");
  if (type == "f32") binder.instruction.mode |= ONE;
  binder.instruction.run = comparer.set;
  binder.instruction.kind = Class::PREDICATE;
  binder.instruction.d = binder.destination(0, 32);
}

template <class T>
PTX_INLINE T select(T a, T b, bool c) {
  return choose(c, a, b);
}
template <class T>
PTX_INLINE T select_sign(T a, T b, int32_t c) {
  return c >= 0 ? a : b;
}
template <class T, bool FTZ_>
PTX_INLINE T select_float(T a, T b, float c) {
  return input<FTZ_>(c) >= 0 ? a : b;
}

template <class T>
void add_selections(Forms& forms, const std::string& type) {
  add_form<select<T>>(forms, "selp" + type, Class::PREDICATE);
  add_form<select_sign<T>>(forms, "slct" + type + ".s32", Class::INTEGER);
  add_form<select_float<T, false>>(forms, "slct" + type + ".f32", Class::FLOAT);
  add_form<select_float<T, true>>(forms, "slct.ftz" + type + ".f32", Class::FLOAT);
}

const Forms& selections() {
  static const Forms all = [] {
    Forms forms;
    for (const char* type : {".b16", ".u16", ".s16"}) add_selections<uint16_t>(forms, type);
    for (const char* type : {".b32", ".u32", ".s32", ".f32"}) add_selections<uint32_t>(forms, type);
    for (const char* type : {".b64", ".u64", ".s64", ".f64"}) add_selections<uint64_t>(forms, type);
    return forms;
  }();
  return all;
}

}  // namespace

bool bind_compare(Binder& binder) {
  const std::string& name = binder.statement.opcode.at(0);
  if (name == "setp") {
    bind_setp(binder);
  } else if (name == "set") {
    bind_set(binder);
  } else if (name == "selp" || name == "slct") {
    const auto form = selections().find(binder.statement.text());
    if (form == selections().end()) binder.fail("this combination of modifiers is unknown");
    bind_form(binder, form->second);
  } else {
    return false;
  }
  return true;
}

}  // namespace deepkern::ptx
