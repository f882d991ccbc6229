// Output scales, one per row and block of 128 columns, in row or column layout.
#pragma once

#include "tensors.h"

namespace deepkern {

// An uninitialized scale tensor of an input x [..., rows, K]. Its scale of row m of group g (one
// matrix [rows, K] of x) and block j is data[g * group + m * row + j * block]. The column layout is
// a view of a buffer with `row` = 1 and a pitch of a multiple of 4 floats, whose padding is zero.
struct ScaleTensor {
  Tensor tensor;
  float* data;
  int64_t rows;               // of a group
  int64_t group, row, block;  // strides in floats
  float* at(int64_t m, int64_t j) const {
    return data + m / rows * group + m % rows * row + j * block;
  }
};

// `shape`: that of x with K replaced by the number of blocks; M: rows of all groups.
inline ScaleTensor new_scale(const Tensor& x, std::vector<int64_t> shape, int64_t M,
                             bool by_column) {
  const int64_t blocks = shape.back();
  if (!by_column || shape.size() == 1) {
    Tensor scale = new_tensor(shape.data(), shape.size(), ScalarType::Float);
    float* data = static_cast<float*>(scale.mutable_data_ptr());
    return {scale, data, std::max<int64_t>(M, 1), 0, blocks, 1};
  }
  const auto rank = static_cast<int64_t>(shape.size());
  const int64_t rows = shape[rank - 2];
  const int64_t pitch = ceil_div(rows, 4) * 4;
  shape[rank - 2] = blocks;
  shape[rank - 1] = pitch;
  Tensor padded = pitch == rows ? new_tensor(shape.data(), shape.size(), ScalarType::Float)
                                : torch::stable::new_zeros(x, shape, ScalarType::Float);
  const Tensor columns = torch::stable::narrow(padded, rank - 1, 0, rows);
  float* data = static_cast<float*>(padded.mutable_data_ptr());
  return {torch::stable::transpose(columns, rank - 2, rank - 1),
          data,
          std::max<int64_t>(rows, 1),
          blocks * pitch,
          1,
          pitch};
}

}  // namespace deepkern
