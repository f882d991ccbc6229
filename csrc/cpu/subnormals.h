// Keeps subnormal floats from being flushed to zero.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace deepkern {

// While an object lives, its thread computes with subnormal floats, also after
// torch.set_flush_denormal(True). The arithmetic has to be in a function that is not inlined: the
// compiler may move other arithmetic across.
class KeepSubnormals {
 public:
  KeepSubnormals() : saved_(mode()) { set_mode(saved_ & ~FLUSH); }
  ~KeepSubnormals() { set_mode(saved_); }
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t FLUSH = 0x8040;  // results and operands
  static uint64_t mode() { return _mm_getcsr(); }
  static void set_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t FLUSH = uint64_t{1} << 24;
  static uint64_t mode() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static constexpr uint64_t FLUSH = 0;
  static uint64_t mode() { return 0; }
  static void set_mode(uint64_t) {}
#endif

  const uint64_t saved_;
};

}  // namespace deepkern
