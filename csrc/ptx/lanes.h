// Handlers over the 32 lanes of a warp from functions of one lane.
//
// Lanes<f> runs `f` on a register of each lane, PairLanes<f> on both halves of a packed register.
// The loops have no branch, so that the compiler vectorizes them. handler_of compiles each for the
// baseline and for AVX2 with FMA. Both give the same bits: -ffp-contract=off forms no FMA.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "machine.h"

#define PTX_INLINE inline __attribute__((always_inline))

namespace deepkern::ptx {

constexpr uint32_t ALL_LANES = 0xffffffffu;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
PTX_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// condition ? yes : no as arithmetic. The compiler makes a branch of some conditional expressions,
// and a loop with a branch does not vectorize.
template <class T>
PTX_INLINE T choose(bool condition, T yes, T no) {
  using U = std::conditional_t<sizeof(T) == 8, uint64_t,
                               std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  const U take = static_cast<U>(U(0) - U(condition));
  return bit_cast<T>(static_cast<U>((bit_cast<U>(yes) & take) | (bit_cast<U>(no) & ~take)));
}

// Registers of 8, 16 and 32 bits take a lane of 32 bits, zero-extended.
template <class T>
using Lane = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
PTX_INLINE T from_lane(Lane<T> lane) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(lane);
  } else if constexpr (sizeof(T) == 2) {
    return T{static_cast<uint16_t>(lane)};
  } else {
    return bit_cast<T>(lane);
  }
}

template <class T>
PTX_INLINE Lane<T> to_lane(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<std::make_unsigned_t<T>>(value);
  } else if constexpr (sizeof(T) == 2) {
    return value.bits;
  } else {
    return bit_cast<Lane<T>>(value);
  }
}

template <class L>
PTX_INLINE const L* lanes_of(Warp& warp, int slot) {
  return reinterpret_cast<const L*>(warp.u32(slot));
}

// A predicate source: Instruction::mode holds this bit for `!p` and for an immediate 1 (slot -1).
constexpr uint32_t INVERT = 1u << 31;

PTX_INLINE uint32_t predicate_of(const Warp& warp, int slot, bool invert) {
  return (slot < 0 ? 0 : warp.predicates[slot]) ^ (invert ? ALL_LANES : 0);
}

PTX_INLINE void set_predicate(Warp& warp, int slot, uint32_t mask, uint32_t bits) {
  if (slot >= 0) warp.predicates[slot] = (warp.predicates[slot] & ~mask) | (bits & mask);
}

// Writes `from` to the lanes of `mask`.
template <class L>
PTX_INLINE void blend(L* to, const L* from, uint32_t mask) {
#pragma GCC ivdep
  for (int lane = 0; lane < LANES; ++lane) {
    const L take = L(0) - L(mask >> lane & 1);
    to[lane] = (from[lane] & take) | (to[lane] & ~take);
  }
}

template <class T>
struct Source {
  const Lane<T>* lanes;
  PTX_INLINE Source(Warp& warp, const Instruction&, int slot)
      : lanes(lanes_of<Lane<T>>(warp, slot)) {}
  PTX_INLINE T at(int lane) const { return from_lane<T>(lanes[lane]); }
};

template <>
struct Source<bool> {
  uint32_t bits;
  PTX_INLINE Source(Warp& warp, const Instruction& instruction, int slot)
      : bits(predicate_of(warp, slot, instruction.mode & INVERT)) {}
  PTX_INLINE bool at(int lane) const { return bits >> lane & 1; }
};

// Bits of the operand that a lane function takes or returns; 1 for a predicate.
template <class T>
constexpr uint8_t BITS = std::is_same_v<T, bool> ? 1 : 8 * sizeof(T);

template <auto F, class = decltype(F)>
struct Lanes;

template <auto F, class D, class... S>
struct Lanes<F, D (*)(S...)> {
  static inline const std::vector<uint8_t> operands = {BITS<D>, BITS<S>...};

  static PTX_INLINE void compute(Lane<D>* out, Source<S>... sources) {
#pragma GCC ivdep
    for (int lane = 0; lane < LANES; ++lane) out[lane] = to_lane<D>(F(sources.at(lane)...));
  }

  static PTX_INLINE uint32_t compute_bits(Source<S>... sources) {
    uint32_t bits = 0;
    for (int lane = 0; lane < LANES; ++lane) bits |= uint32_t(F(sources.at(lane)...)) << lane;
    return bits;
  }

  template <size_t... K>
  static PTX_INLINE void body(Warp& w, const Instruction& i, uint32_t mask,
                              std::index_sequence<K...>) {
    const int slots[] = {i.a, i.b, i.c, i.e};
    if constexpr (std::is_same_v<D, bool>) {
      set_predicate(w, i.d, mask, compute_bits(Source<S>(w, i, slots[K])...));
    } else {
      Lane<D>* out = reinterpret_cast<Lane<D>*>(w.u32(i.d));
      if (mask == ALL_LANES) {
        compute(out, Source<S>(w, i, slots[K])...);
      } else {
        Lane<D> result[LANES];
        compute(result, Source<S>(w, i, slots[K])...);
        blend(out, result, mask);
      }
    }
  }

  static PTX_INLINE Status run(Warp& warp, const Instruction& instruction, uint32_t mask) {
    body(warp, instruction, mask, std::index_sequence_for<S...>());
    return Status::NEXT;
  }
};

// Packed registers: f16x2, bf16x2, s16x2 and u16x2 in 32 bits, f32x2 in 64 bits.
template <auto F, class = decltype(F)>
struct PairLanes;

template <auto F, class E, class... S>
struct PairLanes<F, E (*)(S...)> {
  using Element = std::conditional_t<sizeof(E) == 2, uint16_t, uint32_t>;
  using Pair = std::conditional_t<sizeof(E) == 2, uint32_t, uint64_t>;
  static inline const std::vector<uint8_t> operands = {16 * sizeof(E), 16 * sizeof(S)...};

  static PTX_INLINE E element(Element bits) {
    if constexpr (std::is_integral_v<E>) {
      return static_cast<E>(bits);
    } else if constexpr (sizeof(E) == 2) {
      return E{bits};
    } else {
      return bit_cast<E>(bits);
    }
  }

  static PTX_INLINE Element bits_of(E value) {
    if constexpr (std::is_integral_v<E>) {
      return static_cast<Element>(value);
    } else if constexpr (sizeof(E) == 2) {
      return value.bits;
    } else {
      return bit_cast<Element>(value);
    }
  }

  template <class... P>
  static PTX_INLINE void compute(Element* out, P... sources) {
#pragma GCC ivdep
    for (int k = 0; k < 2 * LANES; ++k) out[k] = bits_of(F(element(sources[k])...));
  }

  template <size_t... K>
  static PTX_INLINE void body(Warp& w, const Instruction& i, uint32_t mask,
                              std::index_sequence<K...>) {
    const int slots[] = {i.a, i.b, i.c, i.e};
    // The copies keep accesses of 16 and of 32 bits to the same memory apart.
    Element in[sizeof...(S)][2 * LANES];
    (std::memcpy(in[K], w.u32(slots[K]), sizeof(in[K])), ...);
    Element result[2 * LANES];
    compute(result, in[K]...);
    Pair pairs[LANES];
    std::memcpy(pairs, result, sizeof(pairs));
    if (mask == ALL_LANES) {
      std::memcpy(w.u32(i.d), pairs, sizeof(pairs));
    } else {
      blend(reinterpret_cast<Pair*>(w.u32(i.d)), pairs, mask);
    }
  }

  static PTX_INLINE Status run(Warp& warp, const Instruction& instruction, uint32_t mask) {
    body(warp, instruction, mask, std::index_sequence_for<S...>());
    return Status::NEXT;
  }
};

template <class L>
Status run_baseline(Warp& warp, const Instruction& instruction, uint32_t mask) {
  return L::run(warp, instruction, mask);
}

#if defined(__x86_64__)
template <class L>
__attribute__((target("avx2,fma"))) Status run_avx2(Warp& warp, const Instruction& instruction,
                                                    uint32_t mask) {
  return L::run(warp, instruction, mask);
}
#endif

template <class L>
Handler handler_of() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return run_avx2<L>;
#endif
  return run_baseline<L>;
}

// An opcode with all its modifiers: its handler and the bits of its operands, destination first.
struct Form {
  Handler run;
  Class kind;
  const std::vector<uint8_t>* operands;
};
using Forms = std::unordered_map<std::string, Form>;

template <auto F>
void add_form(Forms& forms, const std::string& opcode, Class kind) {
  forms[opcode] = {handler_of<Lanes<F>>(), kind, &Lanes<F>::operands};
}

template <auto F>
void add_pair_form(Forms& forms, const std::string& opcode, Class kind) {
  forms[opcode] = {handler_of<PairLanes<F>>(), kind, &PairLanes<F>::operands};
}

// The slots of the operands of `form`, in order: d, a, b, c, e.
void bind_form(Binder& binder, const Form& form);
// A predicate source, which may be an immediate or, with `negatable`, !p. Sets INVERT.
int bind_predicate_source(Binder& binder, size_t operand, bool negatable);

}  // namespace deepkern::ptx
