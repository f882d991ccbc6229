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
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#if defined(DEEPKERN_OWN_THREADS)
#include <thread>
#endif

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

// Whether new_tensor fills tensors with bytes 0xFF, which are NaN in every floating-point type, so
// that tests see what an op leaves unwritten. testing/compare.py sets it.
extern bool poison_new_tensors;

// An uninitialized contiguous CPU tensor. Faster than torch::stable::new_empty, which dispatches.
inline Tensor new_tensor(const int64_t* shape, int64_t rank, ScalarType dtype) {
  int64_t strides[16], stride = 1;
  STD_TORCH_CHECK(rank <= 16, "expected rank 16 or less, got ", rank);
  for (int64_t i = rank - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, shape, strides, type,
                                                  aoti_torch_device_type_cpu(), 0, &result));
  Tensor tensor(result);
  if (poison_new_tensors && tensor.numel() > 0) {
    std::memset(tensor.mutable_data_ptr(), 0xFF, tensor.numel() * tensor.element_size());
  }
  return tensor;
}

inline Tensor new_tensor(std::initializer_list<int64_t> shape, ScalarType dtype) {
  return new_tensor(shape.begin(), static_cast<int64_t>(shape.size()), dtype);
}

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

// Rows of a real matrix, contiguous within a row.
struct RealRows {
  const void* data;
  Real type;
  int64_t stride;  // elements from a row to the next
};

// A tensor [..., K] as rows of K elements.
struct MergedRows {
  Tensor tensor;  // owns the data
  int64_t count;
  int64_t stride;  // elements from a row to the next

  explicit MergedRows(const Tensor& x) : tensor(x), count(1), stride(0) {
    const int64_t rank = x.dim();
    for (int64_t i = 0; i + 1 < rank; ++i) count *= x.size(i);
    if (rank == 2) stride = x.stride(0);
    if (rank <= 2 || x.numel() == 0) return;
    const int64_t K = x.size(rank - 1);
    tensor = torch::stable::reshape(x, {count, K});  // a view if the strides allow it
    stride = tensor.stride(0);
  }
};

// Calls function(first, last) for ranges of [0, count) on several threads; a range has at least
// `grain` items. A build for ThreadSanitizer starts threads of its own: the sanitizer does not see
// how torch's thread pool synchronizes.
template <class Function>
void parallel_for(int64_t count, int64_t grain, const Function& function) {
#if defined(DEEPKERN_OWN_THREADS)
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t step = std::max(std::max<int64_t>(1, grain), ceil_div(count, threads));
  std::vector<std::thread> workers;
  for (int64_t first = 0; first < count; first += step) {
    workers.emplace_back(function, first, std::min(count, first + step));
  }
  for (std::thread& worker : workers) worker.join();
#else
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, grain), function);
#endif
}

// The same for items that cost as much as moving `values_per_item` values: a range has at least
// about 32K values.
template <class Function>
void parallel_ranges(int64_t count, int64_t values_per_item, const Function& function) {
  parallel_for(count, (1 << 15) / std::max<int64_t>(1, values_per_item), function);
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
