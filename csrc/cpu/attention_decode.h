// Attention of a few queries over cached tokens: what mla_decode and mla_sparse_decode share.
//
// A unit is a set of rows that attend to the same tokens. A row is one head of one query. In
// mla_decode a unit is a sequence with its Sq * H rows, and its tokens are named by the block
// table. In mla_sparse_decode a unit is a query with its H rows, and its tokens are named by
// indices.
#pragma once

#include <cmath>
#include <vector>

#include "attention_cache.h"

namespace deepkern {

struct Decode {
  const void* q;                                             // [B, Sq, H, R + D]
  Real type;                                                 // of q and out
  int64_t q_sequence_stride, q_query_stride, q_head_stride;  // elements
  LatentCache cache;
  int64_t B, Sq, H;
  float softmax_scale;
  bool causal;
  bool sparse;                 // whether tokens are named by `indices`, as in mla_sparse_decode
  const int32_t* block_table;  // [B, P]; of mla_decode
  int64_t block_table_stride;  // elements
  const int32_t* indices;      // [B, Sq, topk]; of mla_sparse_decode
  int64_t index_sequence_stride, index_query_stride;  // elements
  const float* attn_sink;                             // [H]; null: none
  void* out;                                          // [B, Sq, H, R], contiguous
  float* lse;                                         // [B, H, Sq], contiguous

  int64_t units, rows;  // rows: of a unit

  int64_t width() const { return cache.R + cache.D; }
  // Batch index, query and head of a row.
  struct Place {
    int64_t sequence, query, head;
  };
  Place place(int64_t unit, int64_t row) const {
    if (sparse) return {unit / Sq, unit % Sq, row};
    return {unit, row / H, row % H};
  }
};

// Rows that are computed together and read each token once.
constexpr int64_t ROW_GROUP = 64;

// A range of a unit's tokens for a group of its rows.
struct DecodeTask {
  int64_t unit, first_row;
  int64_t length;      // tokens of the unit
  int64_t begin, end;  // positions in the order of the block table or of the indices
  float* partial;      // receives the results of the range; null: the range is all, write `out`
};

// The merge of the results of a unit's ranges, for a group of its rows and a range of values.
struct MergeTask {
  int64_t unit, first_row;
  int64_t num_splits;
  const float* partial;             // of the first range
  int64_t split_stride;             // floats from range to range
  int64_t first_value, last_value;  // in [0, R]
};

// Tokens as float32: `count` rows of `pitch` floats.
struct TokenTile {
  const float* values;
  int64_t pitch, count;
  const int32_t* position;  // [count]
  bool masked;              // whether some row does not attend to some token
};

// Running results of a block of rows, at `data`: sums of values, then the maxima, then the sums.
struct RowState {
  float* data;
  int64_t rows, R;
  float* sums() const { return data; }
  float* row_max() const { return data + rows * R; }
  float* row_sum() const { return data + rows * (R + 1); }
};

constexpr float NO_SCORE = -INFINITY;

// Checks q, the cache and v_head_dim, and allocates out and lse. `units` and `rows` are not set.
Decode check_decode(const Arguments& arguments, const Tensor& q, const Tensor& cache,
                    double softmax_scale, int64_t v_head_dim);

// Computes out and lse. lengths[unit] tokens, each at least 0.
void run_decode(const Decode& decode, const std::vector<int64_t>& lengths);

}  // namespace deepkern
