#include "isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace deepkern {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx = 0, edx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  const bool fma = (ecx & bit_FMA) != 0, fp16 = (ecx & bit_F16C) != 0;
  if (!__builtin_cpu_supports("avx2") || !fma || !fp16) return Isa::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::avx512 : Isa::avx2;
#else
  return Isa::portable;
#endif
}

}  // namespace

Isa cpu_isa() {
  static const Isa best = best_isa();
  const char* requested = std::getenv("DEEPKERN_CPU_ISA");
  if (requested == nullptr || *requested == '\0') return best;
  const std::string name = requested;
  for (const auto& [isa, isa_name] :
       {std::pair(Isa::portable, "portable"), std::pair(Isa::avx2, "avx2"),
        std::pair(Isa::avx512, "avx512")}) {
    if (name == isa_name && isa <= best) return isa;
  }
  STD_TORCH_CHECK(false, "DEEPKERN_CPU_ISA: expected an instruction set of this CPU (portable",
                  best >= Isa::avx2 ? ", avx2" : "", best >= Isa::avx512 ? ", avx512" : "",
                  "), got ", name);
}

}  // namespace deepkern
