// Sequences of different lengths, packed end to end in one tensor.
#pragma once

#include <vector>

#include "matrices.h"

namespace deepkern {

// A tensor [rows, heads, width], contiguous along the width.
struct HeadRows {
  const void* data;
  Real type;
  int64_t row_stride, head_stride, width;  // elements
  HeadRows(const Tensor& x, Real type_of_x)
      : data(x.const_data_ptr()),
        type(type_of_x),
        row_stride(x.stride(0)),
        head_stride(x.stride(1)),
        width(x.size(2)) {}
  int64_t at(int64_t row, int64_t head) const { return row * row_stride + head * head_stride; }
};

// Boundaries of sequences, int32 [B + 1]. Values are clamped to [0, rows], then raised to the
// largest preceding one.
struct Boundaries {
  const int32_t* data;
  int64_t stride, count, rows;
  Boundaries(const Tensor& x, int64_t num_rows)
      : data(deepkern::data<int32_t>(x)), stride(x.stride(0)), count(x.size(0)), rows(num_rows) {}
};

// Rows of one sequence and what they attend to. The rows before the first and after the last
// sequence are spans without rows on the other side.
struct Span {
  int64_t begin, end;
  int64_t other_begin, other_end;
  int64_t size() const { return end - begin; }
  int64_t other_size() const { return other_end - other_begin; }
};

inline std::vector<Span> ragged_spans(const Boundaries& cu, const Boundaries& other) {
  std::vector<Span> spans;
  int64_t end = 0, other_end = 0;
  for (int64_t i = 0; i <= cu.count; ++i) {
    const int64_t begin = end, other_begin = other_end;
    const int64_t bound = i < cu.count ? cu.data[i * cu.stride] : cu.rows;
    const int64_t other_bound = i < cu.count ? other.data[i * other.stride] : other.rows;
    end = std::max(end, std::min(bound, cu.rows));
    other_end = std::max(other_end, std::min(other_bound, other.rows));
    const bool is_sequence = i > 0 && i < cu.count;
    if (end > begin) {
      spans.push_back({begin, end, is_sequence ? other_begin : 0, is_sequence ? other_end : 0});
    }
  }
  return spans;
}

}  // namespace deepkern
