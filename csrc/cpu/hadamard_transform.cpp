// out[..., i] = scale · Σ_j (-1)^popcount(i & j) x[..., j]
//
// log2(N) rounds of butterflies in float32, lowest bit of the index first, and one rounding at the
// end.
//
// Parallelization: threads take ranges of rows. A row stays in the cache for all rounds.
//
// Limit: memory bandwidth for short rows; log2(N) additions per value.
//
// Source: Fino and Algazi, "Unified matrix treatment of the fast Walsh-Hadamard transform" (1976).
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <vector>

#include "tensors.h"

namespace deepkern {
namespace {

constexpr int64_t MAX_N = 32768;

struct HadamardTransform {
  RealRows x;  // [M, N]
  void* out;   // [M, N] in the dtype of x, contiguous
  int64_t N;
  float scale;
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/hadamard_transform.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

Tensor hadamard_transform(const Tensor& x, double scale) {
  const Arguments arguments{"hadamard_transform"};
  const Real type = real_type("hadamard_transform", "x", x.scalar_type());
  arguments.require(x.dim() >= 1, "x", "rank 1 or more");
  arguments.check_last_stride("x", x);
  const int64_t N = x.size(x.dim() - 1);
  arguments.require(N <= MAX_N && (N & (N - 1)) == 0, "x", "a power of two up to 32768 columns");
  Tensor out = new_tensor(x.sizes().data(), x.dim(), x.scalar_type());
  if (out.numel() == 0) return out;
  const MergedRows rows(x);
  const HadamardTransform transform{{rows.tensor.const_data_ptr(), type, rows.stride},
                                    out.mutable_data_ptr(),
                                    N,
                                    static_cast<float>(scale)};
  const auto transform_rows = DEEPKERN_DISPATCH(transform_rows);
  parallel_ranges(rows.count, N,
                  [&](int64_t first, int64_t last) { transform_rows(transform, first, last); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("hadamard_transform", TORCH_BOX(&hadamard_transform));
}

}  // namespace
}  // namespace deepkern
#else
#include "cast_block.h"
#include "hadamard.h"
#include "real_blocks.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

template <Real type>
void transform_rows_of(const HadamardTransform& h, int64_t first, int64_t last) {
  std::vector<float> row(h.N);
  for (int64_t m = first; m < last; ++m) {
    hadamard_row<type>(h.x.data, m * h.x.stride, h.N, h.scale, row.data());
    store_block<type>(h.out, m * h.N, h.N, row.data());
  }
}

void transform_rows(const HadamardTransform& h, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(h.x.type, transform_rows_of<type>(h, first, last));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
