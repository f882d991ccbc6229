// y              = scale · H x                      in fp32, not rounded in between
// out_scale[, j] = max(|y[, 128j : 128j+128]|, 1e-4) / 448       (rounded up to 2^n for ue8m0)
// q[, i]         = e4m3(y[, i] * (1 / out_scale[, i // 128]))
//
// Parallelization: threads take ranges of rows. A row stays in the L1 cache until it is cast.
//
// Limit: memory bandwidth, 3 bytes per bf16 value; log2(N) additions per value.
//
// Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace deepkern {
namespace {

constexpr int64_t MAX_LENGTH = 2048;

struct HadamardCast {
  RealRows x;      // [M, N]
  uint8_t* q;      // e4m3 [M, N], contiguous
  float* q_scale;  // [M, ceil(N / 128)], contiguous
  int64_t N;
  float scale;
  bool ue8m0;
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/hadamard_cast.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

std::tuple<Tensor, Tensor> hadamard_cast(const Tensor& x, double scale,
                                         const std::string& scale_format) {
  const Arguments arguments{"hadamard_cast"};
  const Real type = real_type("hadamard_cast", "x", x.scalar_type());
  arguments.require(x.dim() >= 1, "x", "rank 1 or more");
  arguments.check_last_stride("x", x);
  const int64_t N = x.size(x.dim() - 1);
  arguments.require(N <= MAX_LENGTH && (N & (N - 1)) == 0, "x",
                    "a power of two up to 2048 columns");
  const bool ue8m0 = arguments.choose("scale_format", scale_format, "ue8m0", "fp32");
  Tensor q = new_tensor(x.sizes().data(), x.dim(), FP8);
  std::vector<int64_t> scale_shape(x.sizes().begin(), x.sizes().end());
  scale_shape.back() = ceil_div(N, 128);
  Tensor q_scale = new_tensor(scale_shape.data(), scale_shape.size(), ScalarType::Float);
  if (q.numel() == 0) return {q, q_scale};
  const MergedRows rows(x);
  const HadamardCast cast{{rows.tensor.const_data_ptr(), type, rows.stride},
                          mutable_data<uint8_t>(q),
                          mutable_data<float>(q_scale),
                          N,
                          static_cast<float>(scale),
                          ue8m0};
  const auto cast_rows = DEEPKERN_DISPATCH(cast_rows);
  parallel_ranges(rows.count, N,
                  [&](int64_t first, int64_t last) { cast_rows(cast, first, last); });
  return {q, q_scale};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("hadamard_cast", TORCH_BOX(&hadamard_cast));
}

}  // namespace
}  // namespace deepkern
#else
#include "cast_block.h"
#include "hadamard.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

template <Real type>
void cast_rows_of(const HadamardCast& c, int64_t first, int64_t last) {
  float y[MAX_LENGTH];
  const int64_t blocks = ceil_div(c.N, 128);
  for (int64_t m = first; m < last; ++m) {
    hadamard_row<type>(c.x.data, m * c.x.stride, c.N, c.scale, y);
    for (int64_t k = 0; k < c.N; k += CAST_VALUES) {
      cast_values<Real::fp32>(y, k, std::min(CAST_VALUES, c.N - k), c.q + m * c.N + k,
                              c.q_scale + m * blocks + k / 128, 1, c.ue8m0);
    }
  }
}

void cast_rows(const HadamardCast& c, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(c.x.type, cast_rows_of<type>(c, first, last));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
