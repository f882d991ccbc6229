// The instruction set that the native ops use.
#pragma once

namespace deepkern {

enum class Isa { portable, avx2, avx512 };

// The best instruction set of this CPU, or the one that DEEPKERN_CPU_ISA names: portable, avx2
// (with FMA and F16C) or avx512 (F, BW, VL, DQ). Throws if that one is unknown or the CPU lacks it.
Isa cpu_isa();

}  // namespace deepkern

// The function of that name that is compiled for cpu_isa(); see every_isa.h.
#if defined(__x86_64__)
#define DEEPKERN_DISPATCH(function)                                    \
  (::deepkern::cpu_isa() == ::deepkern::Isa::avx512 ? avx512::function \
   : ::deepkern::cpu_isa() == ::deepkern::Isa::avx2 ? avx2::function   \
                                                    : portable::function)
#else
#define DEEPKERN_DISPATCH(function) (::deepkern::cpu_isa(), portable::function)
#endif
