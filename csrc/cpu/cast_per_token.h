// FP8 cast of rows with one scale per 128 values, for one CPU thread.
#pragma once

#include <cstdint>

#include "real.h"

namespace deepkern {

// Where the scale of row m and block j goes: scales[m * row + j * block].
struct Scales {
  float* scales;
  int64_t row, block;
};

// Casts rows [first, last). `x` has rows of K values, `x_stride` values apart; `q` is contiguous, K
// codes a row. `isa` is what cpu_isa() says.
void cast_rows(const void* x, Real type, int64_t x_stride, uint8_t* q, Scales to, int64_t first,
               int64_t last, int64_t K, bool ue8m0, const char* isa);

// The best instruction set this CPU has, or the one that DEEPKERN_CPU_ISA names (for tests).
const char* cpu_isa();

}  // namespace deepkern
