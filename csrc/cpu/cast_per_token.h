// FP8 cast of rows with one scale per 128 values, on the calling thread: see cast_per_token.cpp.
#pragma once

#include <cstdint>

#include "real.h"

namespace deepkern {

// Output scales: the scale of row m and block j is data[m * row_stride + j * block_stride].
struct ScaleOutput {
  float* data;
  int64_t row_stride, block_stride;  // floats
};

// Casts rows [first, last) of x to q and scale.
void cast_rows(const void* x,      // [rows, K] of `type`
               Real type,          //
               int64_t x_stride,   // elements from a row of x to the next
               uint8_t* q,         // e4m3 [rows, K], contiguous
               ScaleOutput scale,  // [rows, ceil(K / 128)]
               int64_t first, int64_t last, int64_t K,
               bool ue8m0,        // round scales up to a power of two
               const char* isa);  // a result of cpu_isa()

// The best instruction set of this CPU, "avx512", "avx2" or "portable", or the one that
// DEEPKERN_CPU_ISA names (for tests). Null if that one is unknown or this CPU does not have it.
const char* cpu_isa();

}  // namespace deepkern
