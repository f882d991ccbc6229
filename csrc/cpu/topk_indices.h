// The places of the k largest values of rows, for one CPU thread.
#pragma once

#include <cstdint>

#include "real.h"

namespace deepkern {

struct TopkRows {
  const void* logits;  // rows of N values, `row` values apart
  Real type;           // bf16 or fp32
  int64_t row, N, k;
  const int32_t* lengths;  // of each row, `length_step` apart; null: N for all
  int64_t length_step;
  int32_t* out;  // k places a row, ascending, then -1
};

// Rows [first, last). `isa` is what cpu_isa() says.
void topk_rows(const TopkRows& rows, int64_t first, int64_t last, const char* isa);

}  // namespace deepkern
