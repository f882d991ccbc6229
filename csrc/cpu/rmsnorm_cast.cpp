// h        = x + residual                                          rounded to the dtype of x
// normed   = h / sqrt(mean(h^2) + eps) * weight                    in fp32, rounded once
// q, scale = cast_per_token(normed)                                one scale per row and block
//
// The sum of squares has a fixed order: pairwise within 8192 columns, starting with neighbours,
// then over these sums from left to right. No multiplication is fused with an addition. So the
// result equals the reference bit for bit.
//
// Parallelization: threads take ranges of rows. A row is read twice, 128 columns at a time; the
// second time it is in the cache.
//
// Limit: memory bandwidth; per bf16 value 2 bytes read and 3 written, and 2 more of each with a
// residual.
//
// Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "scales.h"

namespace deepkern {
namespace {

struct RmsnormCast {
  RealRows x;          // [M, K]
  RealRows residual;   // [M, K] in the dtype of x; data is null without a residual
  const void* weight;  // [K]
  Real weight_type;
  uint8_t* q;  // e4m3 [M, K], contiguous as normed and new_residual
  const ScaleTensor& scale;
  void* normed;        // in the dtype of x
  void* new_residual;  // in the dtype of x; null without a residual
  int64_t K;
  float eps;
  bool ue8m0;
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/rmsnorm_cast.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> rmsnorm_cast(const Tensor& x, const Tensor& weight,
                                                        double eps,
                                                        const std::optional<Tensor>& residual,
                                                        const std::string& scale_format,
                                                        const std::string& scale_layout) {
  const Arguments arguments{"rmsnorm_cast"};
  const Real type = arguments.check_real("x", x, {-1, -1});
  const int64_t M = x.size(0), K = x.size(1);
  const Real weight_type = arguments.check_real("weight", weight, {K});
  if (residual.has_value()) arguments.check("residual", *residual, x.scalar_type(), {M, K});
  const bool ue8m0 = arguments.choose("scale_format", scale_format, "ue8m0", "fp32");
  const bool by_column = arguments.choose("scale_layout", scale_layout, "column", "row");
  Tensor q = new_tensor({M, K}, FP8);
  const ScaleTensor scale = new_scale(x, {M, ceil_div(K, 128)}, M, by_column);
  Tensor normed = new_tensor({M, K}, x.scalar_type());
  Tensor new_residual =
      residual.has_value() ? new_tensor({M, K}, x.scalar_type()) : new_tensor({0}, x.scalar_type());
  if (M * K == 0) return {q, scale.tensor, normed, new_residual};

  RealRows residual_rows{nullptr, type, 0};
  if (residual.has_value()) {
    residual_rows = {residual->const_data_ptr(), type, residual->stride(0)};
  }
  const RmsnormCast cast{{x.const_data_ptr(), type, x.stride(0)},
                         residual_rows,
                         weight.const_data_ptr(),
                         weight_type,
                         mutable_data<uint8_t>(q),
                         scale,
                         normed.mutable_data_ptr(),
                         residual.has_value() ? new_residual.mutable_data_ptr() : nullptr,
                         K,
                         static_cast<float>(eps),
                         ue8m0};
  const auto cast_rows = DEEPKERN_DISPATCH(cast_rows);
  parallel_ranges(M, K, [&](int64_t first, int64_t last) { cast_rows(cast, first, last); });
  return {q, scale.tensor, normed, new_residual};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("rmsnorm_cast", TORCH_BOX(&rmsnorm_cast));
}

}  // namespace
}  // namespace deepkern
#else
#include "arithmetic.h"
#include "cast_block.h"
#include "real_blocks.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

constexpr int64_t CHUNK = 8192;  // columns whose squares are added pairwise

// h of one block of row m, zero past column K; writes new_residual the first time.
template <Real type>
DEEPKERN_INLINE void load_h(const RmsnormCast& c, int64_t m, int64_t k, int64_t count, bool again,
                            float* h) {
  if (c.residual.data != nullptr && again) {
    load_block<type>(c.new_residual, m * c.K + k, count, h);
    return;
  }
  load_block<type>(c.x.data, m * c.x.stride + k, count, h);
  if (c.residual.data == nullptr) return;
  float residual[128];
  load_block<type>(c.residual.data, m * c.residual.stride + k, count, residual);
  for (int i = 0; i < 128; ++i) h[i] += residual[i];
  store_block<type>(c.new_residual, m * c.K + k, count, h);
  load_block<type>(c.new_residual, m * c.K + k, count, h);
}

// Σ h² of row m.
template <Real type>
float sum_squares(const RmsnormCast& c, int64_t m) {
  float h[128], sums[CHUNK / 128], sum = 0.0f;
  for (int64_t start = 0; start < c.K; start += CHUNK) {
    const int64_t end = std::min(c.K, start + CHUNK);
    int64_t blocks = 0;
    for (int64_t k = start; k < end; k += 128) {
      load_h<type>(c, m, k, std::min<int64_t>(128, end - k), false, h);
      sums[blocks++] = sum_squares_pairwise(h);
    }
    sum += sum_pairwise(sums, blocks);
  }
  return sum;
}

// Writes columns [start, end) of row m of normed, rounded to the dtype of x.
template <Real type>
DEEPKERN_INLINE void normalize(const RmsnormCast& c, int64_t m, int64_t start, int64_t end,
                               Floats inverse) {
  float h[128], weight[128];
  for (int64_t k = start; k < end; k += 128) {
    const int64_t count = std::min<int64_t>(128, end - k);
    load_h<type>(c, m, k, count, true, h);
    load_real_block(c.weight, c.weight_type, k, count, weight);
    for (int i = 0; i < 128; i += LANES) {
      const Floats scaled = load_vector<Floats>(h + i) * inverse;
      store_vector(h + i, scaled * load_vector<Floats>(weight + i));
    }
    store_block<type>(c.normed, m * c.K + k, count, h);
  }
}

template <Real type>
void cast_rows_of(const RmsnormCast& c, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; ++m) {
    const float mean = sum_squares<type>(c, m) / static_cast<float>(c.K);
    const Floats inverse = broadcast(1.0f / std::sqrt(mean + c.eps));
    for (int64_t k = 0; k < c.K; k += CAST_VALUES) {
      const int64_t end = std::min(c.K, k + CAST_VALUES);
      normalize<type>(c, m, k, end, inverse);
      cast_values<type>(c.normed, m * c.K + k, end - k, c.q + m * c.K + k, c.scale.at(m, k / 128),
                        c.scale.block, c.ue8m0);
    }
  }
}

void cast_rows(const RmsnormCast& c, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(c.x.type, cast_rows_of<type>(c, first, last));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
