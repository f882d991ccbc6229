// Products of real matrices, D = A·Bᵀ, with one B or one per group of rows: see real_gemm.cpp.
#pragma once

#include <vector>

#include "tensors.h"

namespace deepkern {

// A matrix of `type` with any strides, in elements.
struct RealMatrix {
  const void* data;
  Real type;
  int64_t row_stride, k_stride;
};

struct RealGemm {
  RealMatrix a;  // [rows, K]
  RealMatrix b;  // [N, K], the layout of every group's B; the type is that of A
  int64_t N, K;
  const int32_t* rows;  // rows of A and D in the order of the groups, or null: 0, 1, 2, ...
  void* out;            // D, contiguous
  Real out_type;
};

// The rows from `first` to `end` in the order of `RealGemm::rows`.
struct RealGroup {
  const void* b;
  int64_t first, end;
};

// Writes the rows of D that belong to a group.
void multiply_groups(const RealGemm& gemm, const std::vector<RealGroup>& groups);

// The address of element `offset`.
inline const void* element(const void* data, Real type, int64_t offset) {
  return static_cast<const char*>(data) + offset * size_of(type);
}

}  // namespace deepkern
