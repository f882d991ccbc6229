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

// A cast per token of x * factor with scales that are multiplied by scale_factor; powers of two.
struct RowCast {
  RealRows x;  // [rows, K]
  int64_t K;
  float factor, scale_factor;
  uint8_t* q;    // e4m3 [rows, K], written
  float* scale;  // [rows, ceil(K / 128)], written

  int64_t blocks() const { return ceil_div(K, 128); }
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

Fp8Buffer cast_rows(RealRows x, int64_t rows, int64_t K, float factor, float scale_factor) {
  Fp8Buffer out(rows, K);
  const RowCast cast{x, K, factor, scale_factor, out.codes.as<uint8_t>(), out.scale.as<float>()};
  const auto cast_row_blocks = DEEPKERN_DISPATCH(cast_row_blocks);
  parallel_ranges(rows * out.blocks, 128,
                  [&](int64_t first, int64_t last) { cast_row_blocks(cast, first, last); });
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
  Tensor out = new_tensor({layer.T, K}, x.scalar_type());
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
    const Fp8Buffer tokens =
        cast_rows({x.const_data_ptr(), type, x.stride(0)}, layer.T, K, 1.0f, 1.0f);
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
  Tensor grad_x = new_tensor({T, K}, grad.scalar_type());
  Tensor grad_weights = new_tensor({T, topk}, ScalarType::Float);
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
    const Fp8Buffer tokens = cast_rows({grad.const_data_ptr(), type, grad.stride(0)}, T, K,
                                       GRAD_SCALE, 1.0f);  // the product stays scaled
    Fp8Product product{};
    product.gemm.a = tokens.matrix();
    set_b(product, w2, w2_t_scale, kBlock);
    rows.multiply(product, rows.token.data(), w2, w2_t_scale, grad_h.as<void>(), wide);
  }
  const AlignedBuffer grad_gate_up(rows.count * 2 * I * size_of(wide));
  std::vector<float> weights(rows.count), row_grads(rows.count);
  weights_of_rows(layer, rows, topk_weights, weights.data());
  SwigluBackward backward{};
  backward.grad = {grad_h.as<void>(), wide, I};
  backward.gate_up = {gate_up.const_data_ptr(), Real::fp32, gate_up.stride(0)};
  backward.scale = data<float>(gate_up_scale);
  backward.scale_row = gate_up_scale.stride(0), backward.scale_block = 1;
  backward.weights = weights.data();
  backward.I = I;
  backward.grad_gate_up = grad_gate_up.as<void>();
  backward.grad_weights = row_grads.data();
  parallel_ranges(rows.count, 8 * I, [&](int64_t first, int64_t last) {
    swiglu_backward_rows(backward, first, last);
  });
  for (int64_t i = 0; i < T * topk; ++i) {
    const int32_t row = rows.handle[i];
    if (row >= 0) mutable_data<float>(grad_weights)[i] = row_grads[row] * (1 / GRAD_SCALE);
  }
  const Fp8Buffer casted =
      cast_rows({grad_gate_up.as<void>(), wide, 2 * I}, rows.count, 2 * I, 1.0f, 1 / GRAD_SCALE);
  const AlignedBuffer y(rows.count * K * size_of(wide));
  Fp8Product product{};
  product.gemm.a = casted.matrix();
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
#include "cast_block.h"
#include "real_blocks.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// Casts blocks [first, last) of all rows, numbered row by row.
void cast_row_blocks(const RowCast& c, int64_t first, int64_t last) {
  const int64_t blocks = c.blocks();
  float values[CAST_VALUES];
  for (int64_t i = first; i < last;) {
    const int64_t row = i / blocks, k = i % blocks * 128;
    const int64_t count = std::min({CAST_VALUES, c.K - k, (last - i) * 128});
    const int64_t end = i + ceil_div(count, 128);
    for (int64_t j = 0; j < count; j += 128) {
      load_real_block(c.x.data, c.x.type, row * c.x.stride + k + j,
                      std::min<int64_t>(128, count - j), values + j);
    }
    for (int64_t j = 0; j < count; ++j) values[j] *= c.factor;
    cast_values<Real::fp32>(values, 0, count, c.q + row * c.K + k, c.scale + i, 1, false);
    for (; i < end; ++i) c.scale[i] *= c.scale_factor;
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
