// The steps of expert dispatch and combine on raw pointers, for their ops and moe_forward.
//
// place_rows() finds the row of each assignment, copy_to_rows() writes the rows, combine_rows()
// sums them. Indices from tensors are checked: one outside its range is ignored.
#pragma once

#include <limits>

#include "tensors.h"

namespace deepkern {

constexpr int64_t MAX_ASSIGNMENTS = std::numeric_limits<int32_t>::max();  // rows are int32

// Whether topk_idx [T, topk] is int64; an error if it is neither int32 nor int64.
inline bool check_topk_idx(const Arguments& arguments, const Tensor& topk_idx, int64_t T) {
  const bool is_int64 = topk_idx.scalar_type() == ScalarType::Long;
  arguments.check("topk_idx", topk_idx, is_int64 ? ScalarType::Long : ScalarType::Int, {T, -1});
  const bool fits = topk_idx.numel() <= MAX_ASSIGNMENTS;
  arguments.require(fits, "topk_idx", "fewer than 2^31 assignments");
  return is_int64;
}

// Where the rows of x go: sorted by expert, then token, then slot.
struct ExpertPlacement {
  const void* topk_idx;  // [T, topk], contiguous within a row
  bool is_int64;         // otherwise int32
  int64_t idx_stride;    // elements from a token to the next
  int64_t T, topk;
  int64_t E;          // experts
  int64_t alignment;  // the first row of each expert is a multiple of it
  int64_t rows;       // of the result; assignments to later rows get none
  // Written:
  int32_t* group_index;        // [rows], the expert of each row, -1 for none
  int32_t* tokens_per_expert;  // [E], also those without a row
  int32_t* handle;             // [T, topk], contiguous: the row of each assignment, -1 for none
};

// The most rows that N assignments need; INT64_MAX if that does not fit.
int64_t max_expert_rows(int64_t N, int64_t E, int64_t alignment);

void place_rows(const ExpertPlacement& placement);

// Writes the number of valid indices per expert.
void count_assignments(const void* topk_idx, bool is_int64, int64_t idx_stride, int64_t T,
                       int64_t topk, int64_t E, int32_t* tokens_per_expert);

struct RowCopy {
  static constexpr int64_t COLUMNS = 2048;  // of a piece

  const void* x;     // [T, K]: rows of real values with `cast`, otherwise of any elements
  int64_t x_stride;  // elements
  int64_t element_size;
  bool cast;             // to FP8; the scales are new, and x_scale is not used
  Real type;             // of x, with `cast`
  bool ue8m0;            // with `cast`
  const float* x_scale;  // of token t and block j: x_scale[t * x_scale_row + j * x_scale_block]
  int64_t x_scale_row, x_scale_block;
  int64_t T, topk, rows, K;
  const int32_t* handle;       // [T, topk], contiguous, from place_rows()
  const int32_t* group_index;  // [rows]
  void* out;                   // [rows, K], contiguous, written
  float* scale;                // [rows, ceil(K / 128)], contiguous, written; null without scales

  int64_t pieces() const { return ceil_div(K, COLUMNS); }  // per row
};

// Copies pieces of COLUMNS columns of x to all rows of their token: piece i is piece i % pieces()
// of token i / pieces().
void copy_to_rows(const RowCopy& copy, int64_t first, int64_t last);

// Zeros the rows in [first, last) that have no token.
void clear_rows(const RowCopy& copy, int64_t first, int64_t last);

struct RowSum {
  static constexpr int64_t COLUMNS = 1024;  // of a piece

  RealRows y;  // [rows, K]
  int64_t rows, K;
  RealRows weights;       // [T, topk]; all weights are 1 if data is null
  const int32_t* handle;  // [T, topk]: the row of y of each slot; ignored outside [0, rows)
  int64_t handle_stride;
  int64_t T, topk;
  RealRows shared;  // [T, K], added last; none if data is null
  void* out;        // [T, K], contiguous, written
  Real out_type;

  int64_t pieces() const { return ceil_div(K, COLUMNS); }  // per row
};

// out[t] = Σ_j weights[t, j] · y[handle[t, j]] + shared[t] in float32, in the order of the slots.
// Piece i is piece i % pieces() of token i / pieces().
void combine_rows(const RowSum& sum, int64_t first, int64_t last);

}  // namespace deepkern
