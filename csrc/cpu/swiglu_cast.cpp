// y[m, i]  = silu(gate[m, i]) * up[m, i] * weights[m]      [gate | up] = gate_up, silu(g) = g·σ(g)
// q, scale = cast_per_token(y)                             y in fp32: one scale per row and block
//
// With a limit, gate = min(gate, limit) and up = clamp(up, -limit, limit) come first. The factors
// are multiplied from left to right and each product is rounded to float32, as in the reference.
//
// The backward pass reads the input of the forward pass, optionally stored in FP8, and recomputes
// y.
//
// Parallelization: threads take ranges of blocks of 128 columns. Up to 8 blocks of y, 4 KB, stay
// in the L1 cache from the product to the cast.
//
// Backward, threads take ranges of rows, because the gradient of a weight is a sum over its row.
//
// Limit: the exponential and the division of σ; then memory bandwidth, 5 bytes per value in bf16.
//
// Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.3: the inputs of SwiGLU are
// stored in FP8 and its output is recomputed in the backward pass.
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

void swiglu_backward_rows(const SwigluBackward& backward, int64_t first, int64_t last) {
  DEEPKERN_DISPATCH(backward_rows)(backward, first, last);
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
  Tensor q = new_tensor({M, I}, FP8);
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

// The real or FP8 gate_up of the backward pass, checked.
void check_gate_up(const Arguments& arguments, const Tensor& gate_up,
                   const std::optional<Tensor>& gate_up_scale, int64_t M, int64_t I,
                   SwigluBackward& backward) {
  if (gate_up.scalar_type() == FP8) {
    arguments.check("gate_up", gate_up, FP8, {M, 2 * I});
    arguments.require(gate_up_scale.has_value(), "gate_up_scale", "a scale for FP8 gate_up");
    arguments.check("gate_up_scale", *gate_up_scale, ScalarType::Float, {M, ceil_div(2 * I, 128)},
                    false);
    backward.scale = data<float>(gate_up_scale);
    backward.scale_row = gate_up_scale->stride(0);
    backward.scale_block = gate_up_scale->stride(1);
  } else {
    backward.gate_up.type = arguments.check_real("gate_up", gate_up, {M, 2 * I});
    arguments.require(!gate_up_scale.has_value(), "gate_up_scale", "None for real gate_up");
  }
  backward.gate_up.data = gate_up.const_data_ptr();
  backward.gate_up.stride = gate_up.stride(0);
}

std::tuple<Tensor, Tensor, Tensor> swiglu_cast_backward(const Tensor& grad, const Tensor& gate_up,
                                                        const std::optional<Tensor>& gate_up_scale,
                                                        const std::optional<Tensor>& weights,
                                                        std::optional<double> limit) {
  const Arguments arguments{"swiglu_cast_backward"};
  const Real type = arguments.check_real("grad", grad, {-1, -1});
  const int64_t M = grad.size(0), I = grad.size(1);
  SwigluBackward backward{};
  check_gate_up(arguments, gate_up, gate_up_scale, M, I, backward);
  if (weights.has_value()) arguments.check("weights", *weights, ScalarType::Float, {M});
  arguments.require(!limit.has_value() || *limit >= 0, "limit", "a number >= 0");
  Tensor grad_gate_up = new_tensor({M, 2 * I}, grad.scalar_type());
  Tensor y = new_tensor({M, I}, grad.scalar_type());
  Tensor grad_weights = new_tensor({weights.has_value() ? M : 0}, ScalarType::Float);
  backward.grad = {grad.const_data_ptr(), type, grad.stride(0)};
  backward.weights = data<float>(weights);
  if (limit.has_value()) backward.limit = static_cast<float>(*limit);
  backward.I = I;
  backward.grad_gate_up = grad_gate_up.mutable_data_ptr();
  backward.y = y.mutable_data_ptr();
  backward.grad_weights = mutable_data<float>(grad_weights);
  parallel_ranges(
      M, 8 * I, [&](int64_t first, int64_t last) { swiglu_backward_rows(backward, first, last); });
  return {grad_gate_up, y, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("swiglu_cast_backward", TORCH_BOX(&swiglu_cast_backward));
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

// y of the block of row m that starts at `column`.
template <Real type>
DEEPKERN_INLINE void multiply_block(const SwigluCast& c, int64_t m, int64_t column, float* y) {
  float gate[128], up[128];
  const int64_t count = std::min<int64_t>(128, c.I - column);
  const int64_t offset = m * c.gate_up.stride + column;
  load_block<type>(c.gate_up.data, offset, count, gate);
  load_block<type>(c.gate_up.data, offset + c.I, count, up);
  if (c.limit.has_value()) clamp_gate_up(gate, up, *c.limit);
  for (int k = 0; k < 128; k += LANES) {
    const Floats product = swiglu(load_vector<Floats>(gate + k), load_vector<Floats>(up + k));
    store_vector(y + k, c.weights == nullptr ? product : product * c.weights[m]);
  }
}

template <Real type>
void cast_blocks_of(const SwigluCast& c, int64_t first, int64_t last) {
  float y[CAST_VALUES];
  const int64_t blocks = c.blocks();
  for (int64_t i = first; i < last;) {
    const int64_t m = i / blocks, j = i % blocks;  // the next blocks of row m, from block j on
    const int64_t count = std::min({last - i, blocks - j, CAST_VALUES / 128});
    for (int64_t b = 0; b < count; ++b) multiply_block<type>(c, m, (j + b) * 128, y + b * 128);
    cast_values<Real::fp32>(y, 0, std::min(count * 128, c.I - j * 128), c.q + m * c.I + j * 128,
                            c.scale + m * c.scale_row + j * c.scale_block, c.scale_block, c.ue8m0);
    i += count;
  }
}

void cast_blocks(const SwigluCast& c, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(c.gate_up.type, cast_blocks_of<type>(c, first, last));
}

// Backward.

// Loads count <= 128 columns of gate_up from `column` on, multiplied by their scales if there are
// any; zero up to 128.
void load_gate_up(const SwigluBackward& b, int64_t m, int64_t column, int64_t count, float* out) {
  const int64_t offset = m * b.gate_up.stride + column;
  if (b.scale == nullptr) {
    load_real_block(b.gate_up.data, b.gate_up.type, offset, count, out);
    return;
  }
  uint8_t codes[128] = {};
  std::memcpy(codes, static_cast<const uint8_t*>(b.gate_up.data) + offset, count);
  for (int i = 0; i < 128; i += LANES) store_vector(out + i, widen_e4m3(codes + i));
  const float* scale = b.scale + m * b.scale_row + column / 128 * b.scale_block;
  const int64_t boundary = std::min<int64_t>(count, 128 - column % 128);
  for (int64_t i = 0; i < boundary; ++i) out[i] *= scale[0];
  if (boundary == count) return;
  for (int64_t i = boundary; i < count; ++i) out[i] *= scale[b.scale_block];
}

// The gradients of one block, in the operations and the order of the Triton kernel; adds grad · y
// without the weight to `dot`. Writes grad_gate and grad_up over `gate` and `up`.
DEEPKERN_INLINE void backward_block(const SwigluBackward& b, float weight, const float* grad,
                                    float* gate, float* up, float* y, Floats* dot) {
  float raw_gate[128], raw_up[128];
  std::memcpy(raw_gate, gate, sizeof raw_gate);
  std::memcpy(raw_up, up, sizeof raw_up);
  const Floats limit = broadcast(b.limit.value_or(0.0f));
  if (b.limit.has_value()) clamp_gate_up(gate, up, *b.limit);
  for (int i = 0; i < 128; i += LANES) {
    const Floats g = load_vector<Floats>(gate + i), u = load_vector<Floats>(up + i);
    Floats d = load_vector<Floats>(grad + i);
    const Floats s = exact_sigmoid(g), silu = g * s, product = silu * u;
    dot[i / LANES % 4] += d * product;
    d = b.weights == nullptr ? d : d * weight;
    store_vector(y + i, b.weights == nullptr ? product : product * weight);
    Floats grad_gate = d * u * (s * (g * (1.0f - s) + 1.0f)), grad_up = d * silu;
    if (b.limit.has_value()) {
      grad_gate = load_vector<Floats>(raw_gate + i) > limit ? Floats{} : grad_gate;
      grad_up = abs(load_vector<Floats>(raw_up + i)) > limit ? Floats{} : grad_up;
    }
    store_vector(gate + i, grad_gate);
    store_vector(up + i, grad_up);
  }
}

template <Real type>
void backward_rows_of(const SwigluBackward& b, int64_t first, int64_t last) {
  float grad[128], gate[128], up[128], y[128];
  for (int64_t m = first; m < last; ++m) {
    if (b.group_index != nullptr && b.group_index[m] < 0) continue;
    const float weight = b.weights == nullptr ? 1.0f : b.weights[m];
    Floats dot[4] = {};
    for (int64_t k = 0; k < b.I; k += 128) {
      const int64_t count = std::min<int64_t>(128, b.I - k);
      load_block<type>(b.grad.data, m * b.grad.stride + k, count, grad);
      load_gate_up(b, m, k, count, gate);
      load_gate_up(b, m, b.I + k, count, up);
      backward_block(b, weight, grad, gate, up, y, dot);
      store_block<type>(b.grad_gate_up, m * 2 * b.I + k, count, gate);
      store_block<type>(b.grad_gate_up, m * 2 * b.I + b.I + k, count, up);
      if (b.y != nullptr) store_block<type>(b.y, m * b.I + k, count, y);
    }
    if (b.weights == nullptr) continue;
    b.grad_weights[m] = sum_of_lanes((dot[0] + dot[1]) + (dot[2] + dot[3]));
  }
}

void backward_rows(const SwigluBackward& b, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(b.grad.type, backward_rows_of<type>(b, first, last));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
