// The indices of the k largest values of each row, on the calling thread: see topk_indices.cpp.
#pragma once

#include <cstdint>

#include "real.h"

namespace deepkern {

struct TopkRows {
  const void* logits;  // [S, N] of `type`
  Real type;           // bf16 or fp32
  int64_t row_stride;  // elements from a row of logits to the next
  int64_t N, k;
  const int32_t* lengths;  // [S], valid values of each row; null: all N
  int64_t length_stride;   // elements
  int32_t* out;            // [S, k] contiguous: indices in ascending order, then -1
};

// Computes rows [first, last). `isa` is a result of cpu_isa().
void topk_rows(const TopkRows& rows, int64_t first, int64_t last, const char* isa);

}  // namespace deepkern
