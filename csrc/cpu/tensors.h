// Checks of the native ops' arguments and access to their elements.
//
// The C++ checks reject what the contract of the Python op rejects. Their messages are short:
// the Python op then repeats its own checks and raises the full message (runtime/op.py).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../arguments.h"
#include "real.h"

namespace deepkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr ScalarType FP8 = ScalarType::Float8_e4m3fn;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The arguments of one op.
struct Arguments {
  const char* op;

  void require(bool condition, const char* argument, const char* expected) const {
    STD_TORCH_CHECK(condition, op, ": ", argument, ": expected ", expected);
  }

  // A CPU tensor of this dtype and shape; -1 accepts any size. Of a tensor with `last_contiguous`
  // the last dimension has stride 1.
  void check(const char* argument, const Tensor& x, ScalarType dtype,
             std::initializer_list<int64_t> shape, bool last_contiguous = true) const {
    STD_TORCH_CHECK(x.scalar_type() == dtype, op, ": ", argument, ": expected dtype ", dtype,
                    ", got ", x.scalar_type());
    check_shape(argument, x, shape, last_contiguous);
  }

  // The same for bfloat16, float16 or float32.
  Real check_real(const char* argument, const Tensor& x, std::initializer_list<int64_t> shape,
                  bool last_contiguous = true) const {
    const Real type = real_type(op, argument, x.scalar_type());
    check_shape(argument, x, shape, last_contiguous);
    return type;
  }

  void check_shape(const char* argument, const Tensor& x, std::initializer_list<int64_t> shape,
                   bool last_contiguous = true) const {
    require(x.is_cpu(), argument, "a CPU tensor");
    const auto rank = static_cast<int64_t>(shape.size());
    STD_TORCH_CHECK(x.dim() == rank, op, ": ", argument, ": expected rank ", rank, ", got rank ",
                    x.dim());
    int64_t i = 0;
    for (const int64_t size : shape) {
      STD_TORCH_CHECK(size == -1 || x.size(i) == size, op, ": ", argument, ": expected size ", size,
                      " in dimension ", i, ", got ", x.size(i));
      ++i;
    }
    if (last_contiguous) check_last_stride(argument, x);
  }

  void check_last_stride(const char* argument, const Tensor& x) const {
    const int64_t last = x.dim() - 1;
    const bool has_stride = x.dim() > 0 && x.size(last) > 1 && x.numel() > 0;
    STD_TORCH_CHECK(!has_stride || x.stride(last) == 1, op, ": ", argument,
                    ": expected stride 1 in the last dimension, got ", x.stride(last));
  }

  // Whether `text` is `yes`; an error if it is neither `yes` nor `no`.
  bool choose(const char* argument, const std::string& text, const char* yes,
              const char* no) const {
    STD_TORCH_CHECK(text == yes || text == no, op, ": ", argument, ": expected ", yes, " or ", no,
                    ", got ", text);
    return text == yes;
  }
};

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// The data of an optional argument; null without it.
template <class T>
const T* data(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// Whether new tensors start as NaN (integers: -1), so that tests see an element that is not
// written.
inline bool poisons_memory() {
  static const bool poisons = std::getenv("DEEPKERN_POISON") != nullptr;
  return poisons;
}

// An uninitialized contiguous CPU tensor. torch::stable::new_empty takes 2 µs for the dispatcher,
// this function 0.5 µs.
inline Tensor empty_tensor(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  constexpr size_t MAX_RANK = 8;
  const size_t rank = shape.size();
  int64_t strides[MAX_RANK], stride = 1;
  if (rank > MAX_RANK) return torch::stable::empty(shape, dtype);
  for (size_t i = rank; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(rank), shape.data(),
                                                         strides, type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  if (poisons_memory() && tensor.numel() > 0) {
    std::memset(tensor.mutable_data_ptr(), 0xFF, tensor.numel() * tensor.element_size());
  }
  return tensor;
}

// Rows of a real matrix, contiguous within a row.
struct RealRows {
  const void* data;
  Real type;
  int64_t stride;  // elements from a row to the next
};

// Calls function(first, last) for ranges of [0, count) in parallel. A task gets at least about
// 32K values of `values_per_item`.
template <class Function>
void parallel_ranges(int64_t count, int64_t values_per_item, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, values_per_item));
  torch::stable::parallel_for(0, count, grain, function);
}

}  // namespace deepkern

// Calls `call` with a constexpr Real named `type` for the run-time value `real`.
#define DEEPKERN_FOR_REAL(real, ...)                \
  do {                                              \
    if ((real) == ::deepkern::Real::bf16) {         \
      constexpr auto type = ::deepkern::Real::bf16; \
      __VA_ARGS__;                                  \
    } else if ((real) == ::deepkern::Real::fp16) {  \
      constexpr auto type = ::deepkern::Real::fp16; \
      __VA_ARGS__;                                  \
    } else {                                        \
      constexpr auto type = ::deepkern::Real::fp32; \
      __VA_ARGS__;                                  \
    }                                               \
  } while (false)
