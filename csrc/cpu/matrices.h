// Matrices of floats in scratch memory, and tasks of threads, for kernels that use product.h.
#pragma once

#include <atomic>
#include <memory>
#include <new>
#include <type_traits>

#include "tensors.h"

namespace deepkern {

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

template <int rows>
using Rows = std::integral_constant<int, rows>;

// The stride in floats of a matrix with `width` columns in scratch memory: an odd number of cache
// lines, with room for a multiple of 32 columns.
constexpr int64_t padded_width(int64_t width) { return ceil_div(width, 32) * 32 + 16; }

// A matrix of floats, contiguous within a row.
struct Matrix {
  float* data;
  int64_t stride;  // floats from a row to the next
  Matrix from(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
  float* row(int64_t i) const { return data + i * stride; }
};

// An uninitialized buffer of floats, aligned to 64 bytes, that is handed out from its beginning.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(static_cast<float*>(::operator new(floats * 4 + 64, std::align_val_t(64)))),
        next_(memory_.get()) {}
  // Of at most 64 bytes more than a multiple of 64 bytes.
  float* take(int64_t floats) {
    float* result = next_;
    next_ += ceil_div(floats, 16) * 16;
    return result;
  }
  Matrix matrix(int64_t rows, int64_t width) {
    return {take(rows * padded_width(width)), padded_width(width)};
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> memory_;
  float* next_;
};

// An online softmax: of rows of scores, over keys that come a tile at a time.
struct OnlineSoftmax {
  static int64_t floats(int64_t rows, int64_t keys) { return (keys + 3) * padded_width(rows); }
  OnlineSoftmax(Scratch& memory, int64_t rows, int64_t keys)
      : scores(memory.matrix(keys, rows)),
        row_max(memory.take(padded_width(rows))),
        row_sum(memory.take(padded_width(rows))),
        alpha(memory.take(padded_width(rows))) {}
  Matrix scores;   // [keys, rows] of a tile, then the weights
  float* row_max;  // [rows], of the scaled scores, to base 2
  float* row_sum;  // [rows], of the weights
  float* alpha;    // [rows], sums over the preceding keys must be multiplied by it
};

// Calls task(i, state) for every i in [0, count) with the state of its thread, new_state(). Threads
// take the tasks in order, one at a time. Less than `work` >= 64K operations use one thread.
template <class NewState, class Task>
void parallel_tasks(int64_t count, double work, const NewState& new_state, const Task& task) {
  std::atomic<int64_t> next{0};
  const auto run = [&](int64_t, int64_t) {
    auto state = new_state();
    for (int64_t i = next++; i < count; i = next++) task(i, state);
  };
  const auto threads =
      std::min<int64_t>(count, work < 65536 ? 1 : torch::stable::get_num_threads());
  if (threads <= 1) return run(0, 1);
  parallel_for(threads, 1, run);
}

}  // namespace deepkern
