// out[t] = Σ_j topk_weights[t, j] · y[handle[t, j]]  (+ shared[t])
//
// The sum is in float32, in the order of the slots, with the shared expert last and one rounding at
// the end.
//
// Backward: grad_y[handle[t, j]] = topk_weights[t, j] · grad[t], 0 in the rows that no slot names;
//           grad_weights[t, j]   = <grad[t], y[handle[t, j]]>
//
// Parallelization: threads take ranges of tokens, in the forward pass of 1024 columns of a token,
// and of rows to clear. If several slots name one row, the last one writes it.
//
// Limit: memory bandwidth, (topk + 1) rows per token, in the backward pass (2 topk + 1).
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "expert_rows.h"

namespace deepkern {
namespace {

struct CombineBackward {
  RealRows grad;          // [T, K]
  RealRows y;             // [rows, K]
  RealRows weights;       // [T, topk]
  const int32_t* handle;  // [T, topk]
  int64_t handle_stride;
  const int64_t* owner;  // [rows], the slot t * topk + j that writes each row, -1 for none
  void* grad_y;          // [rows, K] in the dtype of y, contiguous
  float* grad_weights;   // [T, topk], contiguous
  int64_t topk, rows, K;
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/expert_combine.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

RealRows rows_of(const Tensor& x, Real type) { return {x.const_data_ptr(), type, x.stride(0)}; }

void check_handle(const Arguments& arguments, const Tensor& handle, const Tensor& topk_weights) {
  arguments.check("handle", handle, ScalarType::Int, {topk_weights.size(0), topk_weights.size(1)});
  arguments.require(handle.numel() <= MAX_ASSIGNMENTS, "handle", "fewer than 2^31 assignments");
}

Tensor expert_combine(const Tensor& y, const Tensor& topk_weights, const Tensor& handle,
                      const std::optional<Tensor>& shared) {
  const Arguments arguments{"expert_combine"};
  const Real type = arguments.check_real("y", y, {-1, -1});
  const Real weights_type = arguments.check_real("topk_weights", topk_weights, {-1, -1});
  check_handle(arguments, handle, topk_weights);
  const int64_t T = handle.size(0), K = y.size(1);
  RowSum sum{};
  if (shared.has_value()) {
    sum.shared = rows_of(*shared, arguments.check_real("shared", *shared, {T, K}));
  }
  Tensor out = new_tensor({T, K}, y.scalar_type());
  sum.y = rows_of(y, type);
  sum.rows = y.size(0), sum.K = K, sum.T = T, sum.topk = handle.size(1);
  sum.weights = rows_of(topk_weights, weights_type);
  sum.handle = data<int32_t>(handle);
  sum.handle_stride = handle.stride(0);
  sum.out_type = type;
  sum.out = out.mutable_data_ptr();
  parallel_ranges(T * sum.pieces(), std::min(K, RowSum::COLUMNS) * (sum.topk + 1),
                  [&](int64_t first, int64_t last) { combine_rows(sum, first, last); });
  return out;
}

// The last slot that names each row, -1 for none.
std::vector<int64_t> find_owners(const CombineBackward& c, int64_t T) {
  std::vector<int64_t> owner(c.rows, -1);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t j = 0; j < c.topk; ++j) {
      const int64_t row = c.handle[t * c.handle_stride + j];
      if (row >= 0 && row < c.rows) owner[row] = t * c.topk + j;
    }
  }
  return owner;
}

std::tuple<Tensor, Tensor> expert_combine_backward(const Tensor& grad, const Tensor& y,
                                                   const Tensor& topk_weights,
                                                   const Tensor& handle) {
  const Arguments arguments{"expert_combine_backward"};
  const Real grad_type = arguments.check_real("grad", grad, {-1, -1});
  const int64_t T = grad.size(0), K = grad.size(1);
  const Real type = arguments.check_real("y", y, {-1, K});
  const Real weights_type = arguments.check_real("topk_weights", topk_weights, {T, -1});
  check_handle(arguments, handle, topk_weights);
  const int64_t topk = handle.size(1), rows = y.size(0);
  Tensor grad_y = new_tensor({rows, K}, y.scalar_type());
  Tensor grad_weights = new_tensor({T, topk}, ScalarType::Float);
  CombineBackward c{rows_of(grad, grad_type),
                    rows_of(y, type),
                    rows_of(topk_weights, weights_type),
                    data<int32_t>(handle),
                    handle.stride(0),
                    nullptr,
                    grad_y.mutable_data_ptr(),
                    mutable_data<float>(grad_weights),
                    topk,
                    rows,
                    K};
  const std::vector<int64_t> owner = find_owners(c, T);
  c.owner = owner.data();
  const auto backward_tokens = DEEPKERN_DISPATCH(backward_tokens);
  parallel_ranges(T, K * (2 * topk + 1),
                  [&](int64_t first, int64_t last) { backward_tokens(c, first, last); });
  const int64_t row_size = K * static_cast<int64_t>(y.element_size());
  parallel_ranges(rows, K, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      if (c.owner[row] >= 0) continue;
      std::memset(static_cast<char*>(c.grad_y) + row * row_size, 0, row_size);
    }
  });
  return {grad_y, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("expert_combine", TORCH_BOX(&expert_combine));
  m.impl("expert_combine_backward", TORCH_BOX(&expert_combine_backward));
}

}  // namespace
}  // namespace deepkern
#else
#include "cast_block.h"
#include "real_blocks.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// Returns <grad[t], y[row]>; writes grad_y[row] = weight * grad[t] if `owns`.
template <Real type>
float backward_slot(const CombineBackward& c, int64_t t, int64_t row, float weight, bool owns) {
  float grad[128], y[128], product[128];
  Floats dot[4] = {};
  for (int64_t k = 0; k < c.K; k += 128) {
    const int64_t count = std::min<int64_t>(128, c.K - k);
    load_real_block(c.grad.data, c.grad.type, t * c.grad.stride + k, count, grad);
    load_block<type>(c.y.data, row * c.y.stride + k, count, y);
    for (int i = 0; i < 128; i += LANES) {
      const Floats g = load_vector<Floats>(grad + i);
      dot[i / LANES % 4] = fma(g, load_vector<Floats>(y + i), dot[i / LANES % 4]);
      store_vector(product + i, g * weight);
    }
    if (owns) store_block<type>(c.grad_y, row * c.K + k, count, product);
  }
  return sum_of_lanes((dot[0] + dot[1]) + (dot[2] + dot[3]));
}

template <Real type>
void backward_tokens_of(const CombineBackward& c, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    for (int64_t j = 0; j < c.topk; ++j) {
      const int64_t row = c.handle[t * c.handle_stride + j], slot = t * c.topk + j;
      c.grad_weights[slot] = 0.0f;
      if (row < 0 || row >= c.rows) continue;
      const float weight = load_real(c.weights.data, c.weights.type, t * c.weights.stride + j);
      c.grad_weights[slot] = backward_slot<type>(c, t, row, weight, c.owner[row] == slot);
    }
  }
}

void backward_tokens(const CombineBackward& c, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(c.y.type, backward_tokens_of<type>(c, first, last));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
