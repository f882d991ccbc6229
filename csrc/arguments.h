// Converts arguments of torch's stable ABI for the native ops.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "fp8_gemm.h"

namespace deepkern {

// `dtype` as a Real; an error that names the op and the argument for any other dtype.
inline Real real_type(const char* op, const char* argument, torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::BFloat16) return Real::bf16;
  if (dtype == ScalarType::Half) return Real::fp16;
  STD_TORCH_CHECK(dtype == ScalarType::Float, op, ": ", argument,
                  ": expected dtype bfloat16, float16 or float32, got ", dtype);
  return Real::fp32;
}

}  // namespace deepkern
