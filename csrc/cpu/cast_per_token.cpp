// scale[m, j] = max(|x[m, 128j : 128j+128]|, 1e-4) / 448        (rounded up to 2^n for ue8m0)
// q[m, k]     = e4m3(x[m, k] * (1 / scale[m, k / 128]))
//
// Parallelization: threads take ranges of rows. The casts of up to 8 blocks of a row overlap
// (cast_block.h).
//
// Limit: memory bandwidth.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <string>
#include <tuple>

#include "scales.h"

namespace deepkern {
namespace {

struct CastPerToken {
  RealRows x;  // [M, K]
  uint8_t* q;  // e4m3 [M, K], contiguous
  const ScaleTensor& scale;
  int64_t K;
  bool ue8m0;
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/cast_per_token.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

std::tuple<Tensor, Tensor> cast_per_token(const Tensor& x, const std::string& scale_format,
                                          const std::string& scale_layout) {
  const Arguments arguments{"cast_per_token"};
  const Real type = real_type("cast_per_token", "x", x.scalar_type());
  arguments.require(x.dim() >= 1, "x", "rank 1 or more");
  arguments.check_last_stride("x", x);
  const bool ue8m0 = arguments.choose("scale_format", scale_format, "ue8m0", "fp32");
  const bool by_column = arguments.choose("scale_layout", scale_layout, "column", "row");
  const int64_t K = x.size(x.dim() - 1);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
  Tensor q = new_tensor(x.sizes().data(), x.dim(), FP8);
  std::vector<int64_t> scale_shape(x.sizes().begin(), x.sizes().end());
  scale_shape.back() = ceil_div(K, 128);
  const ScaleTensor scale = new_scale(x, scale_shape, M, by_column);
  if (M * K == 0) return {q, scale.tensor};

  const Tensor rows = x.dim() == 2 ? x : torch::stable::reshape(x, {M, K});  // a view if the strides allow it
  const CastPerToken cast{{rows.const_data_ptr(), type, rows.stride(0)},
                          static_cast<uint8_t*>(q.mutable_data_ptr()),
                          scale,
                          K,
                          ue8m0};
  const auto cast_rows = DEEPKERN_DISPATCH(cast_rows);
  parallel_ranges(M, K, [&](int64_t first, int64_t last) { cast_rows(cast, first, last); });
  return {q, scale.tensor};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("cast_per_token", TORCH_BOX(&cast_per_token));
}

}  // namespace
}  // namespace deepkern
#else
#include "cast_block.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

template <Real type>
void cast_rows_of(const CastPerToken& c, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; ++m) {
    for (int64_t k = 0; k < c.K; k += CAST_VALUES) {
      const int64_t count = std::min(CAST_VALUES, c.K - k);
      cast_values<type>(c.x.data, m * c.x.stride + k, count, c.q + m * c.K + k,
                        c.scale.at(m, k / 128), c.scale.block, c.ue8m0);
    }
  }
}

void cast_rows(const CastPerToken& c, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(c.x.type, cast_rows_of<type>(c, first, last));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
