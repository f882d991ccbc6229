// row      = start[e] + number of earlier assignments to e              for e = topk_idx[t, j]
// out[row] = x[t];  group_index[row] = e;  handle[t, j] = row
// start[e] = Σ_{i<e} tokens_per_expert[i], each rounded up to a multiple of `alignment`
//
// With `cast`, q, scale = cast_per_token(x) replaces x.
//
// Parallelization: see expert_rows.cpp.
//
// Limit: memory bandwidth of the copy, (1 + topk) rows per token.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "expert_rows.h"

namespace deepkern {
namespace {

// Checks the arguments but topk_idx; returns the rows to allocate.
int64_t check_dispatch(const Arguments& arguments, const Tensor& x, const Tensor& topk_idx,
                       int64_t num_experts, const std::optional<Tensor>& x_scale, int64_t alignment,
                       const std::optional<std::string>& cast,
                       std::optional<int64_t> num_assigned) {
  if (x_scale.has_value()) {
    const int64_t blocks = ceil_div(x.size(1), 128);
    arguments.check("x_scale", *x_scale, ScalarType::Float, {x.size(0), blocks}, false);
  }
  arguments.require(num_experts >= 1, "num_experts", "at least 1");
  arguments.require(alignment >= 1, "alignment", "at least 1");
  if (cast.has_value()) {
    const bool castable = x.scalar_type() != FP8 && !x_scale.has_value();
    arguments.require(castable, "cast", "None with FP8 rows or scales");
  }
  const int64_t N = topk_idx.numel();
  const int64_t rows = max_expert_rows(N, num_experts, alignment);
  arguments.require(rows <= MAX_ASSIGNMENTS, "topk_idx", "fewer than 2^31 rows to write");
  if (!num_assigned.has_value()) return rows;
  arguments.require(*num_assigned >= 0, "num_assigned", "at least 0");
  return max_expert_rows(std::min(N, *num_assigned), num_experts, alignment);
}

void copy_in_parallel(const RowCopy& copy) {
  if (copy.rows * copy.K == 0) return;
  parallel_ranges(copy.T * copy.pieces(), std::min(copy.K, RowCopy::COLUMNS) * (copy.topk + 1),
                  [&](int64_t first, int64_t last) { copy_to_rows(copy, first, last); });
  parallel_ranges(copy.rows, copy.K,
                  [&](int64_t first, int64_t last) { clear_rows(copy, first, last); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_dispatch(
    const Tensor& x, const Tensor& topk_idx, int64_t num_experts,
    const std::optional<Tensor>& x_scale, int64_t alignment, const std::optional<std::string>& cast,
    std::optional<int64_t> num_assigned) {
  const Arguments arguments{"expert_dispatch"};
  const bool is_fp8 = x.scalar_type() == FP8;
  Real type = Real::fp32;
  if (is_fp8) {
    arguments.check("x", x, FP8, {-1, -1});
  } else {
    type = arguments.check_real("x", x, {-1, -1});
  }
  const int64_t T = x.size(0), K = x.size(1), blocks = ceil_div(K, 128);
  const bool is_int64 = check_topk_idx(arguments, topk_idx, T);
  const bool ue8m0 = cast.has_value() && arguments.choose("cast", *cast, "ue8m0", "fp32");
  const int64_t rows =
      check_dispatch(arguments, x, topk_idx, num_experts, x_scale, alignment, cast, num_assigned);
  const int64_t topk = topk_idx.size(1);
  const bool has_scale = x_scale.has_value() || cast.has_value();

  Tensor out = new_tensor({rows, K}, cast.has_value() ? FP8 : x.scalar_type());
  Tensor scale = has_scale ? new_tensor({rows, blocks}, ScalarType::Float)
                           : new_tensor({0}, ScalarType::Float);
  Tensor group_index = new_tensor({rows}, ScalarType::Int);
  Tensor tokens_per_expert = new_tensor({num_experts}, ScalarType::Int);
  Tensor handle = new_tensor({T, topk}, ScalarType::Int);
  place_rows({topk_idx.const_data_ptr(), is_int64, topk_idx.stride(0), T, topk, num_experts,
              alignment, rows, mutable_data<int32_t>(group_index),
              mutable_data<int32_t>(tokens_per_expert), mutable_data<int32_t>(handle)});

  RowCopy copy{};
  copy.x = x.const_data_ptr();
  copy.x_stride = x.stride(0);
  copy.element_size = cast.has_value() ? 1 : static_cast<int64_t>(x.element_size());
  copy.cast = cast.has_value();
  copy.type = type;
  copy.ue8m0 = ue8m0;
  if (x_scale.has_value()) {
    copy.x_scale = data<float>(*x_scale);
    copy.x_scale_row = x_scale->stride(0);
    copy.x_scale_block = x_scale->stride(1);
  }
  copy.T = T, copy.topk = topk, copy.rows = rows, copy.K = K;
  copy.handle = data<int32_t>(handle);
  copy.group_index = data<int32_t>(group_index);
  copy.out = out.mutable_data_ptr();
  copy.scale = has_scale ? mutable_data<float>(scale) : nullptr;
  copy_in_parallel(copy);
  return {out, scale, group_index, tokens_per_expert, handle};
}

Tensor expert_dispatch_backward(const Tensor& grad, const Tensor& handle) {
  const Arguments arguments{"expert_dispatch_backward"};
  const Real type = arguments.check_real("grad", grad, {-1, -1});
  arguments.check("handle", handle, ScalarType::Int, {-1, -1});
  arguments.require(handle.numel() <= MAX_ASSIGNMENTS, "handle", "fewer than 2^31 assignments");
  const int64_t T = handle.size(0), K = grad.size(1);
  Tensor out = new_tensor({T, K}, grad.scalar_type());
  RowSum sum{};
  sum.y = {grad.const_data_ptr(), type, grad.stride(0)};
  sum.rows = grad.size(0), sum.K = K, sum.T = T, sum.topk = handle.size(1);
  sum.handle = data<int32_t>(handle);
  sum.handle_stride = handle.stride(0);
  sum.out_type = type;
  sum.out = out.mutable_data_ptr();
  parallel_ranges(T * sum.pieces(), std::min(K, RowSum::COLUMNS) * (sum.topk + 1),
                  [&](int64_t first, int64_t last) { combine_rows(sum, first, last); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("expert_dispatch", TORCH_BOX(&expert_dispatch));
  m.impl("expert_dispatch_backward", TORCH_BOX(&expert_dispatch_backward));
}

}  // namespace
}  // namespace deepkern
