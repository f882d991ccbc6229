// SwiGLU and the FP8 cast of its result on raw pointers, for swiglu_cast and moe_forward.
#pragma once

#include "tensors.h"

namespace deepkern {

struct SwigluCast {
  RealRows gate_up;      // [M, 2I]: I columns of gate, then I columns of up
  int64_t I;             // columns of y
  const float* weights;  // [M], a factor per row, or null
  std::optional<float> limit;
  bool ue8m0;    // round scales up to powers of two
  uint8_t* q;    // e4m3 [M, I], contiguous, written
  float* scale;  // of row m and block j: scale[m * scale_row + j * scale_block], written
  int64_t scale_row, scale_block;

  int64_t blocks() const { return ceil_div(I, 128); }  // per row
};

// Casts blocks of 128 columns, numbered row by row: block i is block i % blocks() of row
// i / blocks(). There are M * blocks().
void swiglu_cast_blocks(const SwigluCast& cast, int64_t first, int64_t last);

struct SwigluBackward {
  RealRows grad;     // [M, I], of y
  RealRows gate_up;  // [M, 2I]; e4m3, without a type, if there is a scale
  const float*
      scale;  // of row m and columns 128j on: scale[m * scale_row + j * scale_block]; or null
  int64_t scale_row, scale_block;
  const float* weights;  // [M], or null
  std::optional<float> limit;
  const int32_t* group_index;  // [M], or null; rows with a negative index are not written
  int64_t I;
  void* grad_gate_up;   // [M, 2I] in the dtype of grad, contiguous, written
  void* y;              // [M, I] in the dtype of grad, contiguous, written; or null
  float* grad_weights;  // [M], written if there are weights
};

// Rows [first, last).
void swiglu_backward_rows(const SwigluBackward& backward, int64_t first, int64_t last);

}  // namespace deepkern
