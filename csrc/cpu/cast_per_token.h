// FP8 cast of rows with one scale per 128 values, for one CPU thread.
#pragma once

#include <cstdint>

namespace deepkern {

enum class Real { bf16, fp16, fp32 };

// Casts rows [first, last). `x` has rows of K values, `x_stride` values apart; `q` and `scale` are
// contiguous: K codes and ceil(K / 128) scales a row. `isa` is "avx512", "avx2" or "portable".
void cast_rows(const void* x, Real type, int64_t x_stride, uint8_t* q, float* scale, int64_t first,
               int64_t last, int64_t K, bool ue8m0, const char* isa);

// The best instruction set this CPU has, or the one that DEEPKERN_CPU_ISA names (for tests).
const char* cpu_isa();

}  // namespace deepkern
