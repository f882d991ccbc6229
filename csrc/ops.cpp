// deepkern._C: native ops, registered through torch's stable ABI, so one build serves every torch
// from 2.11 on and every Python from 3.10 on.
//
// They live in the namespace `deepkern_native` under the names of the Python ops:
// torch.ops.deepkern_native.X on CPU tensors is the `cpu` backend of torch.ops.deepkern.X.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/cast_per_token.h"
#include "python_module.h"

namespace deepkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Real real_type(const char* op, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return Real::bf16;
  if (dtype == ScalarType::Half) return Real::fp16;
  STD_TORCH_CHECK(dtype == ScalarType::Float, op,
                  ": x: expected dtype bfloat16, float16 or float32, got ", dtype);
  return Real::fp32;
}

// The Python op has checked the arguments; what is checked here is what memory safety needs.
std::tuple<Tensor, Tensor> cast_per_token(const Tensor& x, const std::string& scale_format) {
  STD_TORCH_CHECK(x.dim() >= 1, "cast_per_token: x: expected rank 1 or more, got rank 0");
  const bool ue8m0 = scale_format == "ue8m0";
  STD_TORCH_CHECK(ue8m0 || scale_format == "fp32",
                  "cast_per_token: scale_format: expected fp32 or ue8m0, got ", scale_format);
  const char* isa = cpu_isa();
  STD_TORCH_CHECK(isa != nullptr,
                  "cast_per_token: DEEPKERN_CPU_ISA names an instruction set that this CPU lacks");
  const Real type = real_type("cast_per_token", x.scalar_type());
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t K = shape.back();
  const int64_t blocks = (K + 127) / 128;
  int64_t M = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) M *= shape[i];

  Tensor q = torch::stable::new_empty(x, shape, ScalarType::Float8_e4m3fn);
  shape.back() = blocks;
  Tensor scale = torch::stable::new_empty(x, shape, ScalarType::Float);
  if (M * K == 0) return {q, scale};

  const Tensor rows = torch::stable::reshape(x, {M, K});  // a view where strides allow it
  STD_TORCH_CHECK(K == 1 || rows.stride(1) == 1,
                  "cast_per_token: x: expected stride 1 in the last dimension, got ",
                  rows.stride(1));
  const void* in = rows.const_data_ptr();
  auto* codes = static_cast<uint8_t*>(q.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  const int64_t stride = rows.stride(0);
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / K);  // about 32K values a task
  torch::stable::parallel_for(0, M, grain, [&](int64_t first, int64_t last) {
    cast_rows(in, type, stride, codes, scales, first, last, K, ue8m0, isa);
  });
  return {q, scale};
}

STABLE_TORCH_LIBRARY(deepkern_native, m) {
  m.def("cast_per_token(Tensor x, str scale_format) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("cast_per_token", TORCH_BOX(&cast_per_token));
}

}  // namespace
}  // namespace deepkern

DEEPKERN_EMPTY_PYTHON_MODULE(_C)
