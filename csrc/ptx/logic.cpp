// Bits: and, or, xor, not, cnot, lop3, shifts, bit fields, counts, prmt.
// Source: PTX ISA 9.0, sections 9.7.1 (bfe, bfi, popc, ...), 9.7.8 (logic and shift) and 9.7.9.7.
#include "arithmetic.h"

namespace deepkern::ptx {
namespace {

template <class T>
PTX_INLINE T bit_and(T a, T b) {
  return a & b;
}
template <class T>
PTX_INLINE T bit_or(T a, T b) {
  return a | b;
}
template <class T>
PTX_INLINE T bit_xor(T a, T b) {
  return a ^ b;
}
template <class T>
PTX_INLINE T bit_not(T a) {
  return static_cast<T>(~a);
}
template <class T>
PTX_INLINE T cnot(T a) {
  return a == 0 ? 1 : 0;
}

// A shift by the width or more gives zero, or the sign in every bit.
template <class T>
PTX_INLINE T shift_left(T a, uint32_t amount) {
  constexpr uint32_t BITS_OF_T = 8 * sizeof(T);
  const T shifted = static_cast<T>(a << (amount & (BITS_OF_T - 1)));
  return amount < BITS_OF_T ? shifted : 0;
}
template <class T>
PTX_INLINE T shift_right(T a, uint32_t amount) {
  constexpr uint32_t LAST = 8 * sizeof(T) - 1;
  if constexpr (std::is_signed_v<T>) {
    return static_cast<T>(a >> (amount < LAST ? amount : LAST));
  } else {
    const T shifted = static_cast<T>(a >> (amount & LAST));
    return amount <= LAST ? shifted : 0;
  }
}

template <bool LEFT, bool WRAP>
PTX_INLINE uint32_t funnel(uint32_t a, uint32_t b, uint32_t c) {
  const uint64_t both = uint64_t(b) << 32 | a;
  const uint32_t amount = WRAP ? c & 31 : c < 32 ? c : 32;
  return static_cast<uint32_t>(LEFT ? both << amount >> 32 : both >> amount);
}

// The fields' position and length are the low 8 bits of their operands.
template <class T>
PTX_INLINE T bfe(T a, uint32_t b, uint32_t c) {
  constexpr int LAST = 8 * sizeof(T) - 1;
  const int position = b & 0xff;
  const int length = c & 0xff;
  const int end = position + length - 1;
  const bool sign = std::is_signed_v<T> && length != 0 && (a >> (end < LAST ? end : LAST) & 1);
  using U = std::make_unsigned_t<T>;
  const U field = position > LAST ? 0 : U(U(a) >> (position & LAST));
  const U ones = ~U(0);
  const U kept = length > LAST ? ones : U(~(ones << (length & LAST)));
  const int above = length < LAST - position + 1 ? length : LAST - position + 1;
  const U known = above > LAST ? ones : above <= 0 ? 0 : U(~(ones << (above & LAST)));
  return static_cast<T>(sign ? (field & known) | ~known : field & kept);
}

template <class T>
PTX_INLINE T bfi(T a, T b, uint32_t c, uint32_t d) {
  constexpr uint32_t LAST = 8 * sizeof(T) - 1;
  const uint32_t position = c & 0xff;
  const uint32_t length = d & 0xff;
  const T low = length > LAST ? ~T(0) : static_cast<T>((T(1) << (length & LAST)) - 1);
  const T mask = position > LAST ? 0 : static_cast<T>(low << (position & LAST));
  return (static_cast<T>(a << (position & LAST)) & mask) | (b & ~mask);
}

PTX_INLINE uint32_t popc32(uint32_t a) { return __builtin_popcount(a); }
PTX_INLINE uint32_t popc64(uint64_t a) { return __builtin_popcountll(a); }
PTX_INLINE uint32_t clz32(uint32_t a) { return a ? __builtin_clz(a) : 32; }
PTX_INLINE uint32_t clz64(uint64_t a) { return a ? __builtin_clzll(a) : 64; }

PTX_INLINE uint32_t brev32(uint32_t a) {
  a = (a >> 1 & 0x55555555u) | (a & 0x55555555u) << 1;
  a = (a >> 2 & 0x33333333u) | (a & 0x33333333u) << 2;
  a = (a >> 4 & 0x0f0f0f0fu) | (a & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(a);
}
PTX_INLINE uint64_t brev64(uint64_t a) {
  return uint64_t(brev32(uint32_t(a))) << 32 | brev32(uint32_t(a >> 32));
}

// The position of the highest bit that differs from the sign; -1 without one.
template <class T, bool SHIFT_AMOUNT>
PTX_INLINE uint32_t bfind(T a) {
  const auto bits = static_cast<std::make_unsigned_t<T>>(std::is_signed_v<T> && a < 0 ? ~a : a);
  const uint32_t last = 8 * sizeof(T) - 1;
  const uint32_t zeros = sizeof(T) == 8 ? clz64(bits) : clz32(uint32_t(bits));
  if (zeros > last) return ~0u;
  return SHIFT_AMOUNT ? zeros : last - zeros;
}

template <bool SIGNED, bool WRAP>
PTX_INLINE uint32_t szext(uint32_t a, uint32_t b) {
  const uint32_t width = WRAP ? b & 31 : b;
  if (width >= 32) return a;
  if (width == 0) return 0;
  const uint32_t shifted = a << (32 - width);
  return SIGNED ? uint32_t(int32_t(shifted) >> (32 - width)) : shifted >> (32 - width);
}

template <bool WRAP>
PTX_INLINE uint32_t bmsk(uint32_t a, uint32_t b) {
  const uint32_t position = WRAP ? a & 31 : a;
  const uint32_t width = WRAP ? b & 31 : b;
  const uint32_t low = width >= 32 ? ~0u : (1u << (width & 31)) - 1;
  return position >= 32 ? 0 : low << (position & 31);
}

// ---- prmt: bytes of the pair {b, a} chosen by four selectors

PTX_INLINE uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t selector = selectors >> (4 * k);
    const uint32_t byte = static_cast<uint32_t>(both >> (8 * (selector & 7))) & 0xff;
    const uint32_t sign = (byte >> 7) * 0xffu;
    result |= (selector & 8 ? sign : byte) << (8 * k);
  }
  return result;
}

PTX_INLINE uint32_t prmt(uint32_t a, uint32_t b, uint32_t c) { return permute(a, b, c); }

// The named modes choose one of four selector words by the low two bits of c.
template <int A, int B, int C, int D>
PTX_INLINE uint32_t prmt_mode(uint32_t a, uint32_t b, uint32_t c) {
  const uint32_t k = c & 3;
  return permute(a, b, k == 0 ? A : k == 1 ? B : k == 2 ? C : D);
}

// A selector that is the same in every lane, without sign replication: shifts by scalars.
struct PermuteByConstant {
  static PTX_INLINE void compute(uint32_t* out, const uint32_t* const* from, const int* shift) {
    const uint32_t *p = from[0], *q = from[1], *r = from[2], *s = from[3];
    const int h = shift[0], i = shift[1], j = shift[2], k = shift[3];
#pragma GCC ivdep
    for (int lane = 0; lane < LANES; ++lane) {
      out[lane] = (p[lane] >> h & 0xff) | (q[lane] >> i & 0xff) << 8 | (r[lane] >> j & 0xff) << 16 |
                  (s[lane] >> k & 0xff) << 24;
    }
  }

  static PTX_INLINE Status run(Warp& warp, const Instruction& instruction, uint32_t mask) {
    const uint32_t* sources[2] = {warp.u32(instruction.a), warp.u32(instruction.b)};
    const uint32_t* from[4];
    int shift[4];
    for (int k = 0; k < 4; ++k) {
      const uint32_t selector = instruction.mode >> (4 * k) & 7;
      from[k] = sources[selector >> 2];
      shift[k] = 8 * (selector & 3);
    }
    if (mask == ALL_LANES) {
      compute(warp.u32(instruction.d), from, shift);
    } else {
      uint32_t result[LANES];
      compute(result, from, shift);
      blend(warp.u32(instruction.d), result, mask);
    }
    return Status::NEXT;
  }
};

// ---- lop3: the truth table in `mode`

struct Lop3 {
  static PTX_INLINE Status run(Warp& warp, const Instruction& instruction, uint32_t mask) {
    uint32_t terms[8];
    for (int k = 0; k < 8; ++k) terms[k] = instruction.mode >> k & 1 ? ~0u : 0;
    const uint32_t* a = warp.u32(instruction.a);
    const uint32_t* b = warp.u32(instruction.b);
    const uint32_t* c = warp.u32(instruction.c);
    uint32_t result[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      const uint32_t x = a[lane], y = b[lane], z = c[lane];
      const uint32_t low =
          (~y & ((~z & terms[0]) | (z & terms[1]))) | (y & ((~z & terms[2]) | (z & terms[3])));
      const uint32_t high =
          (~y & ((~z & terms[4]) | (z & terms[5]))) | (y & ((~z & terms[6]) | (z & terms[7])));
      result[lane] = (~x & low) | (x & high);
    }
    blend(warp.u32(instruction.d), result, mask);
    return Status::NEXT;
  }
};

// ---- predicates

enum PredicateOperation : uint32_t { AND, OR, XOR, NOT };

Status predicate_logic(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const uint32_t a = predicate_of(warp, instruction.a, false);
  const uint32_t b = instruction.b < 0 ? 0 : warp.predicates[instruction.b];
  const uint32_t results[] = {a & b, a | b, a ^ b, ~a};
  set_predicate(warp, instruction.d, mask, results[instruction.mode]);
  return Status::NEXT;
}

bool bind_predicate_logic(Binder& binder) {
  static const char* const names[] = {"and.pred", "or.pred", "xor.pred", "not.pred"};
  Instruction& instruction = binder.instruction;
  for (uint32_t k = AND; k <= NOT; ++k) {
    if (binder.statement.text() != names[k]) continue;
    const size_t sources = k == NOT ? 1 : 2;
    if (binder.count() != sources + 1) binder.fail("it has a wrong number of operands");
    instruction.run = predicate_logic;
    instruction.kind = Class::PREDICATE;
    instruction.mode = k;
    instruction.d = binder.predicate(0);
    instruction.a = binder.predicate(1);
    if (sources == 2) instruction.b = binder.predicate(2);
    if (instruction.a < 0 || (sources == 2 && instruction.b < 0)) {
      binder.fail("its source is not a predicate");
    }
    return true;
  }
  return false;
}

template <class T>
void add_shift_right(Forms& forms, const std::string& type) {
  add_form<shift_right<T>>(forms, "shr" + type, Class::INTEGER);
}

template <class T>
void add_bitwise(Forms& forms, const std::string& type) {
  add_form<bit_and<T>>(forms, "and" + type, Class::INTEGER);
  add_form<bit_or<T>>(forms, "or" + type, Class::INTEGER);
  add_form<bit_xor<T>>(forms, "xor" + type, Class::INTEGER);
  add_form<bit_not<T>>(forms, "not" + type, Class::INTEGER);
  add_form<cnot<T>>(forms, "cnot" + type, Class::INTEGER);
  add_form<shift_left<T>>(forms, "shl" + type, Class::INTEGER);
  add_shift_right<T>(forms, type);
}

template <class T>
void add_fields(Forms& forms, const std::string& type) {
  add_form<bfe<T>>(forms, "bfe" + type, Class::INTEGER);
  add_form<bfind<T, false>>(forms, "bfind" + type, Class::INTEGER);
  add_form<bfind<T, true>>(forms, "bfind.shiftamt" + type, Class::INTEGER);
}

}  // namespace

void add_logic_forms(Forms& forms) {
  add_bitwise<uint16_t>(forms, ".b16");
  add_bitwise<uint32_t>(forms, ".b32");
  add_bitwise<uint64_t>(forms, ".b64");
  add_shift_right<uint16_t>(forms, ".u16");
  add_shift_right<int16_t>(forms, ".s16");
  add_shift_right<uint32_t>(forms, ".u32");
  add_shift_right<int32_t>(forms, ".s32");
  add_shift_right<uint64_t>(forms, ".u64");
  add_shift_right<int64_t>(forms, ".s64");
  add_fields<uint32_t>(forms, ".u32");
  add_fields<int32_t>(forms, ".s32");
  add_fields<uint64_t>(forms, ".u64");
  add_fields<int64_t>(forms, ".s64");
  add_form<bfi<uint32_t>>(forms, "bfi.b32", Class::INTEGER);
  add_form<bfi<uint64_t>>(forms, "bfi.b64", Class::INTEGER);
  add_form<popc32>(forms, "popc.b32", Class::INTEGER);
  add_form<popc64>(forms, "popc.b64", Class::INTEGER);
  add_form<clz32>(forms, "clz.b32", Class::INTEGER);
  add_form<clz64>(forms, "clz.b64", Class::INTEGER);
  add_form<brev32>(forms, "brev.b32", Class::INTEGER);
  add_form<brev64>(forms, "brev.b64", Class::INTEGER);
  add_form<funnel<true, true>>(forms, "shf.l.wrap.b32", Class::INTEGER);
  add_form<funnel<true, false>>(forms, "shf.l.clamp.b32", Class::INTEGER);
  add_form<funnel<false, true>>(forms, "shf.r.wrap.b32", Class::INTEGER);
  add_form<funnel<false, false>>(forms, "shf.r.clamp.b32", Class::INTEGER);
  add_form<szext<false, true>>(forms, "szext.wrap.u32", Class::INTEGER);
  add_form<szext<true, true>>(forms, "szext.wrap.s32", Class::INTEGER);
  add_form<szext<false, false>>(forms, "szext.clamp.u32", Class::INTEGER);
  add_form<szext<true, false>>(forms, "szext.clamp.s32", Class::INTEGER);
  add_form<bmsk<true>>(forms, "bmsk.wrap.b32", Class::INTEGER);
  add_form<bmsk<false>>(forms, "bmsk.clamp.b32", Class::INTEGER);
  add_form<prmt>(forms, "prmt.b32", Class::INTEGER);
  add_form<prmt_mode<0x3210, 0x4321, 0x5432, 0x6543>>(forms, "prmt.b32.f4e", Class::INTEGER);
  add_form<prmt_mode<0x5670, 0x6701, 0x7012, 0x0123>>(forms, "prmt.b32.b4e", Class::INTEGER);
  add_form<prmt_mode<0x0000, 0x1111, 0x2222, 0x3333>>(forms, "prmt.b32.rc8", Class::INTEGER);
  add_form<prmt_mode<0x3210, 0x3211, 0x3222, 0x3333>>(forms, "prmt.b32.ecl", Class::INTEGER);
  add_form<prmt_mode<0x0000, 0x1110, 0x2210, 0x3210>>(forms, "prmt.b32.ecr", Class::INTEGER);
  add_form<prmt_mode<0x1010, 0x3232, 0x1010, 0x3232>>(forms, "prmt.b32.rc16", Class::INTEGER);
}

bool bind_logic(Binder& binder) {
  Instruction& instruction = binder.instruction;
  if (bind_predicate_logic(binder)) return true;
  const std::string opcode = binder.statement.text();
  if (opcode == "lop3.b32") {
    if (binder.count() != 5) binder.fail("it has a wrong number of operands");
    instruction.run = handler_of<Lop3>();
    instruction.kind = Class::INTEGER;
    instruction.d = binder.destination(0, 32);
    instruction.a = binder.source(1, 32);
    instruction.b = binder.source(2, 32);
    instruction.c = binder.source(3, 32);
    instruction.mode = static_cast<uint32_t>(binder.immediate(4));
    if (instruction.mode > 0xff) binder.fail("its truth table has more than 8 bits");
    return true;
  }
  if (opcode == "prmt.b32" && binder.count() == 4 &&
      binder.statement.operands[3].kind == OperandText::IMMEDIATE &&
      (binder.immediate(3) & 0x8888) == 0) {
    instruction.run = handler_of<PermuteByConstant>();
    instruction.kind = Class::INTEGER;
    instruction.d = binder.destination(0, 32);
    instruction.a = binder.source(1, 32);
    instruction.b = binder.source(2, 32);
    instruction.mode = binder.immediate(3) & 0x7777;
    return true;
  }
  return false;
}

}  // namespace deepkern::ptx
