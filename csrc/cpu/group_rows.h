// The rows of a matrix sorted by group, for the grouped products of the contiguous layout.
#pragma once

#include <vector>

#include "tensors.h"

namespace deepkern {

// The rows of group g are rows[first(g)], ..., rows[end(g) - 1], in ascending order. A row whose
// index is outside [0, G) is in no group.
class GroupRows {
 public:
  // group_index: int32 [M], any stride.
  GroupRows(const Tensor& group_index, int64_t G)
      : rows(group_index.size(0)),
        index_(data<int32_t>(group_index)),
        stride_(group_index.stride(0)),
        end_(G + 1) {
    for (int64_t m = 0; m < M(); ++m) {
      if (has_group(m)) ++end_[group(m) + 1];
    }
    for (int64_t g = 0; g < G; ++g) end_[g + 1] += end_[g];
    for (int64_t m = 0; m < M(); ++m) {
      if (has_group(m)) rows[end_[group(m)]++] = static_cast<int32_t>(m);
    }
  }

  std::vector<int32_t> rows;

  int64_t first(int64_t g) const { return g == 0 ? 0 : end_[g - 1]; }
  int64_t end(int64_t g) const { return end_[g]; }

  // Zeros the rows of `out` [M, row_bytes] that are in no group.
  void zero_other_rows(void* out, int64_t row_bytes) const {
    for (int64_t m = 0; m < M(); ++m) {
      if (!has_group(m)) std::memset(static_cast<char*>(out) + m * row_bytes, 0, row_bytes);
    }
  }

 private:
  int64_t M() const { return static_cast<int64_t>(rows.size()); }
  int64_t group(int64_t m) const { return index_[m * stride_]; }
  bool has_group(int64_t m) const {
    return group(m) >= 0 && group(m) + 1 < static_cast<int64_t>(end_.size());
  }

  const int32_t* index_;
  int64_t stride_;
  std::vector<int64_t> end_;  // first the start of each group, then its end
};

}  // namespace deepkern
