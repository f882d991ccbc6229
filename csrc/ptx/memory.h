// How a load, a store or an atomic accesses memory.
#pragma once

#include "machine.h"

namespace deepkern::ptx {

enum class Atomic : uint8_t { NONE, ADD, MIN, MAX, INC, DEC, CAS, EXCH, AND, OR, XOR };
enum class Number : uint8_t { UNSIGNED, SIGNED, F32, F64 };

struct MemoryAccess {
  Space space = Space::GENERIC;
  Number number = Number::UNSIGNED;
  Atomic atomic = Atomic::NONE;
  int element_bytes = 4;
  int count = 1;           // elements of a vector
  int register_bits = 32;  // 16, 32 or 64
  int address_bits = 64;
  bool sign_extend = false;
  bool relaxed = false, acquire = false, release = false;

  uint32_t bytes() const { return element_bytes * count; }
};

inline const MemoryAccess& memory_access(const Instruction& i) {
  return *static_cast<const MemoryAccess*>(i.extra.get());
}

uint64_t address_of(Warp& warp, const Instruction& i, const MemoryAccess& m, int lane);
void count_access(Warp& warp, const Instruction& i, const MemoryAccess& m, uint32_t mask);

// Operand numbers of the address and of the registers of a load or a store (memory_bind.cpp).
void bind_access(Binder& binder, size_t address, size_t registers);
void bind_atomic(Binder& binder);
bool bind_tensor_map(Binder& binder);  // tensor_map.cpp: tensormap, fence.proxy.tensormap

}  // namespace deepkern::ptx
