// y[m, i]  = silu(gate[m, i]) * up[m, i] * weights[m]      [gate | up] = gate_up, silu(g) = g·σ(g)
// q, scale = cast_per_token(y)                             y in fp32: one scale per row and block
//
// With a limit, gate = min(gate, limit) and up = clamp(up, -limit, limit) come first. The factors
// are multiplied from left to right and each product is rounded to float32, as in the reference.
//
// Parallelization: threads take ranges of blocks of 128 columns. A block of y stays in the L1 cache
// from the product to the cast.
//
// Limit: the exponential and the division of σ; then memory bandwidth, 5 bytes per value in bf16.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "scales.h"
#include "swiglu.h"

#define DEEPKERN_FILE "cpu/swiglu_cast.cpp"
#include "every_isa.h"

namespace deepkern {

void swiglu_cast_blocks(const SwigluCast& cast, int64_t first, int64_t last) {
  DEEPKERN_DISPATCH(cast_blocks)(cast, first, last);
}

namespace {

std::tuple<Tensor, Tensor> swiglu_cast(const Tensor& gate_up, const std::optional<Tensor>& weights,
                                       std::optional<double> limit, const std::string& scale_format,
                                       const std::string& scale_layout) {
  const Arguments arguments{"swiglu_cast"};
  const Real type = arguments.check_real("gate_up", gate_up, {-1, -1});
  const int64_t M = gate_up.size(0), I = gate_up.size(1) / 2;
  if (weights.has_value()) arguments.check("weights", *weights, ScalarType::Float, {M});
  arguments.require(gate_up.size(1) % 2 == 0, "gate_up", "an even number of columns");
  arguments.require(!limit.has_value() || *limit >= 0, "limit", "a number >= 0");
  const bool ue8m0 = arguments.choose("scale_format", scale_format, "ue8m0", "fp32");
  const bool by_column = arguments.choose("scale_layout", scale_layout, "column", "row");
  Tensor q = empty_tensor({M, I}, FP8);
  const ScaleTensor scale = new_scale(gate_up, {M, ceil_div(I, 128)}, M, by_column);
  if (M * I == 0) return {q, scale.tensor};

  SwigluCast cast{{gate_up.const_data_ptr(), type, gate_up.stride(0)},
                  I,
                  data<float>(weights),
                  std::nullopt,
                  ue8m0,
                  mutable_data<uint8_t>(q),
                  scale.data,
                  scale.row,
                  scale.block};
  if (limit.has_value()) cast.limit = static_cast<float>(*limit);
  const auto cast_blocks = DEEPKERN_DISPATCH(cast_blocks);
  parallel_ranges(M * cast.blocks(), 256,
                  [&](int64_t first, int64_t last) { cast_blocks(cast, first, last); });
  return {q, scale.tensor};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("swiglu_cast", TORCH_BOX(&swiglu_cast));
}

}  // namespace
}  // namespace deepkern
#else
#include "arithmetic.h"
#include "cast_block.h"
#include "real_blocks.h"
#include "swiglu_blocks.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

template <Real type>
void cast_blocks_of(const SwigluCast& c, int64_t first, int64_t last) {
  float gate[128], up[128], y[128];
  const int64_t blocks = c.blocks();
  int64_t m = first / blocks, j = first % blocks;
  for (int64_t i = first; i < last; ++i) {
    const int64_t count = std::min<int64_t>(128, c.I - j * 128);
    const int64_t offset = m * c.gate_up.stride + j * 128;
    load_block<type>(c.gate_up.data, offset, count, gate);
    load_block<type>(c.gate_up.data, offset + c.I, count, up);
    if (c.limit.has_value()) clamp_gate_up(gate, up, *c.limit);
    for (int k = 0; k < 128; k += LANES) {
      const Floats g = load_vector<Floats>(gate + k), u = load_vector<Floats>(up + k);
      const Floats product = g * exact_sigmoid(g) * u;
      store_vector(y + k, c.weights == nullptr ? product : product * c.weights[m]);
    }
    // The block cast wants zeros past the last column; an infinite weight makes them NaN.
    for (int64_t k = count; k < 128; ++k) y[k] = 0.0f;
    float* scale = c.scale + m * c.scale_row + j * c.scale_block;
    *scale = cast_block(y, count, c.q + m * c.I + j * 128, c.ue8m0);
    if (++j == blocks) ++m, j = 0;
  }
}

void cast_blocks(const SwigluCast& c, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(c.gate_up.type, cast_blocks_of<type>(c, first, last));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
