// gate_up[row] = cast(x[t]) · w13[e]ᵀ                          row = handle[t, j], e = topk_idx[t,
// j] h[row]       = cast(silu(gate) * up) out[t]       = Σ_j topk_weights[t, j] · (h[row] · w2[e]ᵀ)
//
// gate_up and the outputs of the product with w2 are rounded to the dtype of x; sums are in
// float32.
//
// Backward, with gradients cast to FP8 after a multiplication by 2^48 (see fp8_linear.py):
//
//     g[row]       = cast(grad[t]) · w2[e]                         without the weight
//     grad_weights = <g[row], silu(gate) * up>
//     grad_x[t]    = Σ_j cast(weight · swiglu'(gate_up; g))[row] · w13[e]
//
// g and the gradients of gate_up and of a row are rounded to bf16, or not if grad is float32.
//
// Parallelization: rows are sorted by expert. Each product covers all experts that have rows
// (fp8_gemm_products.cpp); it reads the token of a row through an index, so tokens are cast once
// and are not copied. The steps between products take ranges of blocks or rows.
//
// Limit: in decoding, reading the weights of the experts that have rows. In large batches,
// multiplication.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "expert_rows.h"
#include "fp8_gemm_arguments.h"
#include "swiglu.h"

namespace deepkern {
namespace {

constexpr float GRAD_SCALE = 0x1p48f;  // factor of gradients before a cast

// The tokens, cast to FP8.
struct TokenCast {
  RealRows x;  // [T, K]
  int64_t K;
  float factor;  // x is multiplied by it first; a power of two
  uint8_t* q;    // e4m3 [T, K]
  float* scale;  // [T, ceil(K / 128)], of the multiplied values

  int64_t blocks() const { return ceil_div(K, 128); }
};

// The gradients of gate_up and of the weights of rows.
struct ActivationBackward {
  const void* grad;  // [rows, I] of type `wide`, of silu(gate) * up
  Real wide;         // bf16 or fp32
  int64_t I;
  const uint8_t* gate_up;  // e4m3 [rows, 2I]
  int64_t gate_up_stride;
  const float* gate_up_scale;  // [rows, ceil(2I / 128)]
  int64_t gate_up_scale_stride;
  const float* weights;  // [rows]
  uint8_t* q;            // e4m3 [rows, 2I], written: the gradient of gate_up, rounded to `wide`
  float* scale;          // [rows, ceil(2I / 128)], written, divided by GRAD_SCALE
  float* grad_weights;   // [rows], written
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/moe_forward.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

// The checked arguments that both passes have.
struct Layer {
  const Arguments& arguments;
  int64_t T, topk, E, K, I;
  bool is_int64;      // topk_idx
  Real weights_type;  // topk_weights
  int64_t w13_rows_per_scale, w2_rows_per_scale;
};

Layer check_layer(const Arguments& arguments, const Tensor& topk_weights, const Tensor& topk_idx,
                  const Tensor& w13, const Tensor& w13_scale, const Tensor& w2,
                  const Tensor& w2_scale, int64_t T, int64_t K) {
  Layer layer{arguments, T, 0, 0, K, 0, false, Real::fp32, 0, 0};
  layer.weights_type = arguments.check_real("topk_weights", topk_weights, {T, -1});
  layer.topk = topk_weights.size(1);
  layer.is_int64 = check_topk_idx(arguments, topk_idx, T);
  arguments.check_shape("topk_idx", topk_idx, {T, layer.topk});
  arguments.check("w13", w13, FP8, {-1, -1, K}, false);
  layer.E = w13.size(0);
  arguments.check("w2", w2, FP8, {layer.E, K, -1}, false);
  layer.I = w2.size(2);
  arguments.require(layer.E >= 1, "w13", "at least 1 expert");
  arguments.require(w13.size(1) == 2 * layer.I, "w13", "2I rows, [gate, up], for w2's I");
  layer.w13_rows_per_scale = check_b_scale(arguments, "w13_scale", w13, w13_scale);
  layer.w2_rows_per_scale = check_b_scale(arguments, "w2_scale", w2, w2_scale);
  return layer;
}

// The assignments of tokens to experts as rows, sorted by expert, then token, then slot.
struct Rows {
  std::vector<int32_t> expert;  // of each row; -1 from `count` on
  std::vector<int32_t> per_expert;
  std::vector<int32_t> handle;  // [T, topk], the row of each assignment, -1 for none
  std::vector<int32_t> token;   // of each row
  int64_t count = 0;            // rows with a token

  Rows(const Layer& layer, const Tensor& topk_idx)
      : expert(layer.T * layer.topk),
        per_expert(layer.E),
        handle(layer.T * layer.topk),
        token(layer.T * layer.topk) {
    place_rows({topk_idx.const_data_ptr(), layer.is_int64, topk_idx.stride(0), layer.T, layer.topk,
                layer.E, 1, static_cast<int64_t>(expert.size()), expert.data(), per_expert.data(),
                handle.data()});
    for (size_t i = 0; i < handle.size(); ++i) {
      if (handle[i] < 0) continue;
      token[handle[i]] = static_cast<int32_t>(i / layer.topk);
      ++count;
    }
  }

  // Multiplies the rows of each expert e by matrix e of b. Row i reads row a_rows[i] of A, or row i
  // if a_rows is null, and writes row i of `out`.
  void multiply(Fp8Product product, const int32_t* a_rows, const Tensor& b, const Tensor& scale,
                void* out, Real out_type) const {
    std::vector<Fp8Product> products;
    product.gemm.out_type = out_type;
    const int64_t out_stride = product.gemm.b.rows * size_of(out_type);
    int64_t first = 0;
    for (size_t e = 0; e < per_expert.size(); first += per_expert[e++]) {
      if (per_expert[e] == 0) continue;
      products.push_back(group_product(product, b, scale, static_cast<int64_t>(e)));
      Fp8Product& group = products.back();
      group.rows = per_expert[e];
      group.a_rows = a_rows != nullptr ? a_rows + first : nullptr;
      if (a_rows == nullptr) {
        group.gemm.a.codes += first * group.gemm.a.row_stride;
        group.gemm.a.scale += first * group.gemm.a.scale_row_stride;
      }
      group.gemm.out = static_cast<char*>(out) + first * out_stride;
    }
    multiply_products(products);
  }
};

// FP8 values [rows, columns] and their scales, contiguous.
struct Fp8Buffer {
  int64_t rows, columns, blocks;
  AlignedBuffer codes, scale;

  Fp8Buffer(int64_t rows, int64_t columns)
      : rows(rows),
        columns(columns),
        blocks(ceil_div(columns, 128)),
        codes(rows * columns),
        scale(rows * blocks * sizeof(float)) {}

  Fp8Matrix matrix() const {
    return {codes.as<uint8_t>(), rows, columns, scale.as<float>(), 1, blocks, 1};
  }
};

Fp8Buffer cast_tokens(const Tensor& x, Real type, float factor) {
  Fp8Buffer out(x.size(0), x.size(1));
  const TokenCast cast{{x.const_data_ptr(), type, x.stride(0)},
                       out.columns,
                       factor,
                       out.codes.as<uint8_t>(),
                       out.scale.as<float>()};
  const auto cast_token_blocks = DEEPKERN_DISPATCH(cast_token_blocks);
  parallel_ranges(out.rows * out.blocks, 128,
                  [&](int64_t first, int64_t last) { cast_token_blocks(cast, first, last); });
  return out;
}

// out[t] = Σ_j weights[t, j] · y[handle[t, j]]; all weights are 1 if weights.data is null.
void combine(const Layer& layer, const Rows& rows, RealRows y, RealRows weights, void* out,
             Real out_type) {
  RowSum sum{};
  sum.y = y;
  sum.rows = rows.count, sum.K = layer.K, sum.T = layer.T, sum.topk = layer.topk;
  sum.weights = weights;
  sum.handle = rows.handle.data();
  sum.handle_stride = layer.topk;
  sum.out = out;
  sum.out_type = out_type;
  parallel_ranges(layer.T * sum.pieces(), std::min(layer.K, RowSum::COLUMNS) * (layer.topk + 1),
                  [&](int64_t first, int64_t last) { combine_rows(sum, first, last); });
}

Tensor moe_forward(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_idx,
                   const Tensor& w13_codes, const Tensor& w13_scale, const Tensor& w2_codes,
                   const Tensor& w2_scale) {
  const Arguments arguments{"moe_forward"};
  const Real type = arguments.check_real("x", x, {-1, -1});
  const Layer layer = check_layer(arguments, topk_weights, topk_idx, w13_codes, w13_scale, w2_codes,
                                  w2_scale, x.size(0), x.size(1));
  const int64_t K = layer.K, I = layer.I;
  Tensor out = empty_tensor({layer.T, K}, x.scalar_type());
  if (layer.T * K == 0) return out;
  const Tensor w13 = readable_b(w13_codes), w2 = readable_b(w2_codes);
  const Rows rows(layer, topk_idx);
  if (rows.count == 0 || I == 0) {
    std::memset(out.mutable_data_ptr(), 0, layer.T * K * size_of(type));
    return out;
  }

  const AlignedBuffer y(rows.count * K * size_of(type));
  Fp8Buffer h(rows.count, I);
  {
    const Fp8Buffer tokens = cast_tokens(x, type, 1.0f);
    const AlignedBuffer gate_up(rows.count * 2 * I * size_of(type));
    Fp8Product product{};
    product.gemm.a = tokens.matrix();
    set_b(product, w13, w13_scale, layer.w13_rows_per_scale);
    rows.multiply(product, rows.token.data(), w13, w13_scale, gate_up.as<void>(), type);
    const SwigluCast cast{{gate_up.as<void>(), type, 2 * I},
                          I,
                          nullptr,
                          std::nullopt,
                          false,
                          h.codes.as<uint8_t>(),
                          h.scale.as<float>(),
                          h.blocks,
                          1};
    parallel_ranges(rows.count * h.blocks, 1024,
                    [&](int64_t first, int64_t last) { swiglu_cast_blocks(cast, first, last); });
  }
  Fp8Product product{};
  product.gemm.a = h.matrix();
  set_b(product, w2, w2_scale, layer.w2_rows_per_scale);
  rows.multiply(product, nullptr, w2, w2_scale, y.as<void>(), type);
  const RealRows weights{topk_weights.const_data_ptr(), layer.weights_type, topk_weights.stride(0)};
  combine(layer, rows, {y.as<void>(), type, K}, weights, out.mutable_data_ptr(), type);
  return out;
}

// Writes the weight of each row to `out` [rows].
void weights_of_rows(const Layer& layer, const Rows& rows, const Tensor& topk_weights, float* out) {
  for (int64_t t = 0; t < layer.T; ++t) {
    for (int64_t j = 0; j < layer.topk; ++j) {
      const int32_t row = rows.handle[t * layer.topk + j];
      const int64_t i = t * topk_weights.stride(0) + j;
      if (row < 0) continue;
      DEEPKERN_FOR_REAL(layer.weights_type,
                        out[row] = load<type>(topk_weights.const_data_ptr(), i));
    }
  }
}

std::tuple<Tensor, Tensor> moe_forward_backward(const Tensor& grad, const Tensor& topk_weights,
                                                const Tensor& topk_idx, const Tensor& gate_up,
                                                const Tensor& gate_up_scale,
                                                const Tensor& w13_codes, const Tensor& w13_scale,
                                                const Tensor& w2_codes, const Tensor& w2_scale) {
  const Arguments arguments{"moe_forward_backward"};
  const Real type = arguments.check_real("grad", grad, {-1, -1});
  const Layer layer = check_layer(arguments, topk_weights, topk_idx, w13_codes, w13_scale, w2_codes,
                                  w2_scale, grad.size(0), grad.size(1));
  const int64_t T = layer.T, topk = layer.topk, K = layer.K, I = layer.I;
  arguments.check("gate_up", gate_up, FP8, {T * topk, 2 * I});
  arguments.check("gate_up_scale", gate_up_scale, ScalarType::Float,
                  {T * topk, ceil_div(2 * I, 128)});
  arguments.require(w13_scale.size(1) == ceil_div(2 * I, 128), "w13_scale", "one per 128x128");
  arguments.require(w2_scale.size(1) == ceil_div(K, 128), "w2_scale", "one per 128x128");
  Tensor grad_x = empty_tensor({T, K}, grad.scalar_type());
  Tensor grad_weights = empty_tensor({T, topk}, ScalarType::Float);
  std::memset(grad_weights.mutable_data_ptr(), 0, T * topk * sizeof(float));
  const Rows rows(layer, topk_idx);
  if (rows.count == 0 || w13_codes.numel() == 0) {
    std::memset(grad_x.mutable_data_ptr(), 0, T * K * size_of(type));
    return {grad_x, grad_weights};
  }

  // The products read the weights transposed.
  const auto transposed = [](const Tensor& w) { return torch::stable::transpose(w, 1, 2); };
  const Tensor w2 = readable_b(transposed(w2_codes)), w2_t_scale = transposed(w2_scale);
  const Tensor w13 = readable_b(transposed(w13_codes)), w13_t_scale = transposed(w13_scale);
  const Real wide = type == Real::fp32 ? Real::fp32 : Real::bf16;
  const AlignedBuffer grad_h(rows.count * I * size_of(wide));
  {
    const Fp8Buffer tokens = cast_tokens(grad, type, GRAD_SCALE);
    Fp8Product product{};
    product.gemm.a = tokens.matrix();
    set_b(product, w2, w2_t_scale, kBlock);
    rows.multiply(product, rows.token.data(), w2, w2_t_scale, grad_h.as<void>(), wide);
  }
  const Fp8Buffer grad_gate_up(rows.count, 2 * I);
  std::vector<float> weights(rows.count), row_grads(rows.count);
  weights_of_rows(layer, rows, topk_weights, weights.data());
  const ActivationBackward backward{grad_h.as<void>(),
                                    wide,
                                    I,
                                    data<uint8_t>(gate_up),
                                    gate_up.stride(0),
                                    data<float>(gate_up_scale),
                                    gate_up_scale.stride(0),
                                    weights.data(),
                                    grad_gate_up.codes.as<uint8_t>(),
                                    grad_gate_up.scale.as<float>(),
                                    row_grads.data()};
  const auto activation_backward = DEEPKERN_DISPATCH(activation_backward);
  parallel_ranges(rows.count, 8 * I,
                  [&](int64_t first, int64_t last) { activation_backward(backward, first, last); });
  for (int64_t i = 0; i < T * topk; ++i) {
    const int32_t row = rows.handle[i];
    if (row >= 0) mutable_data<float>(grad_weights)[i] = row_grads[row] * (1 / GRAD_SCALE);
  }
  const AlignedBuffer y(rows.count * K * size_of(wide));
  Fp8Product product{};
  product.gemm.a = grad_gate_up.matrix();
  set_b(product, w13, w13_t_scale, kBlock);
  rows.multiply(product, nullptr, w13, w13_t_scale, y.as<void>(), wide);
  combine(layer, rows, {y.as<void>(), wide, K}, {nullptr, Real::fp32, 0}, grad_x.mutable_data_ptr(),
          type);
  return {grad_x, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("moe_forward", TORCH_BOX(&moe_forward));
  m.impl("moe_forward_backward", TORCH_BOX(&moe_forward_backward));
}

}  // namespace
}  // namespace deepkern
#else
#include "arithmetic.h"
#include "cast_block.h"
#include "real_blocks.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// Casts blocks [first, last) of all tokens, numbered token by token.
void cast_token_blocks(const TokenCast& c, int64_t first, int64_t last) {
  const int64_t blocks = c.blocks();
  float values[128];
  for (int64_t i = first; i < last; ++i) {
    const int64_t t = i / blocks, k = i % blocks * 128;
    const int64_t count = std::min<int64_t>(128, c.K - k);
    load_real_block(c.x.data, c.x.type, t * c.x.stride + k, count, values);
    for (int j = 0; j < 128; ++j) values[j] *= c.factor;
    c.scale[i] = cast_block(values, count, c.q + t * c.K + k, false);
  }
}

// Loads FP8 gates or ups [start, start + count) of a row, count <= LANES, as floats.
DEEPKERN_INLINE Floats load_gate_up(const ActivationBackward& b, int64_t row, int64_t start,
                                    int64_t count) {
  uint8_t codes[LANES] = {};
  std::memcpy(codes, b.gate_up + row * b.gate_up_stride + start, count);
  const float* scale = b.gate_up_scale + row * b.gate_up_scale_stride;
  Floats scales;
  for (int64_t i = 0; i < LANES; ++i) {
    scales[i] = scale[(start + std::min(i, count - 1)) / 128];
  }
  return widen_e4m3(codes) * scales;
}

// The gradient of the row's weight; writes that of its gate_up, rounded to `wide`, to
// grad_gate_up [2I] in that type.
template <Real wide>
float differentiate_row(const ActivationBackward& b, int64_t row, void* grad_gate_up) {
  const Floats weight = broadcast(b.weights[row]);
  Floats dot = {};
  for (int64_t i = 0; i < b.I; i += LANES) {
    const int64_t count = std::min<int64_t>(LANES, b.I - i), at = row * b.I + i;
    const Floats grad =
        count == LANES ? load_floats<wide>(b.grad, at) : load_first_floats<wide>(b.grad, at, count);
    const Floats gate = load_gate_up(b, row, i, count), up = load_gate_up(b, row, b.I + i, count);
    const Floats s = exact_sigmoid(gate), weighted = grad * weight;
    const Floats grad_gate = weighted * up * (s * (gate * (1.0f - s) + 1.0f));
    const Floats grad_up = weighted * (gate * s);
    // Lanes past I: grad is 0, but gate may be NaN from the scale.
    const Floats product = grad * (gate * s) * up;
    dot += count == LANES                               ? product
           : lane_index() < static_cast<int32_t>(count) ? product
                                                        : Floats{};
    if (count == LANES) {
      store_floats<wide>(grad_gate_up, i, grad_gate);
      store_floats<wide>(grad_gate_up, b.I + i, grad_up);
    } else {
      store_first_floats<wide>(grad_gate_up, i, grad_gate, count);
      store_first_floats<wide>(grad_gate_up, b.I + i, grad_up, count);
    }
  }
  return sum_of_lanes(dot);
}

template <Real wide>
void activation_backward_of(const ActivationBackward& b, int64_t first, int64_t last) {
  const int64_t columns = 2 * b.I, blocks = (columns + 127) / 128;
  std::vector<float> grad_gate_up(columns);  // of type `wide`
  float values[128];
  for (int64_t row = first; row < last; ++row) {
    b.grad_weights[row] = differentiate_row<wide>(b, row, grad_gate_up.data());
    for (int64_t k = 0; k < columns; k += 128) {
      const int64_t count = std::min<int64_t>(128, columns - k);
      load_block<wide>(grad_gate_up.data(), k, count, values);
      const float scale = cast_block(values, count, b.q + row * columns + k, false);
      b.scale[row * blocks + k / 128] = scale / GRAD_SCALE;
    }
  }
}

void activation_backward(const ActivationBackward& b, int64_t first, int64_t last) {
  if (b.wide == Real::fp32) return activation_backward_of<Real::fp32>(b, first, last);
  activation_backward_of<Real::bf16>(b, first, last);
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
