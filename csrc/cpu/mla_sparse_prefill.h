// What mla_sparse_prefill and mla_sparse_prefill_backward have in common: checks and indices.
#pragma once

#include "ragged.h"

namespace deepkern {

constexpr int64_t SPARSE_KEY_BLOCK = 96;  // selected rows of kv per tile; a multiple of TILE_ROWS

// The indices of all queries, and which of them count.
struct SelectedRows {
  const int32_t* indices;      // [S, topk]
  int64_t stride, topk;        // from a query to the next, in elements
  const int32_t* topk_length;  // [S], or null: topk
  int64_t length_stride, Skv;
  // Writes the rows of kv that query s selects to `rows` [topk] and returns how many they are.
  int64_t select(int64_t s, int32_t* rows) const {
    int64_t length = topk, count = 0;
    if (topk_length != nullptr) {
      length = std::clamp<int64_t>(topk_length[s * length_stride], 0, topk);
    }
    for (int64_t i = 0; i < length; ++i) {
      const int32_t row = indices[s * stride + i];
      rows[count] = row;
      count += row >= 0 && row < Skv;
    }
    return count;
  }
};

// Checks what the forward and the backward pass require of these arguments.
inline SelectedRows check_sparse_prefill(const Arguments& arguments, const Tensor& q,
                                         const Tensor& kv, const Tensor& indices,
                                         int64_t v_head_dim, const std::optional<Tensor>& attn_sink,
                                         const std::optional<Tensor>& topk_length) {
  arguments.check_real("q", q, {-1, -1, -1});
  const int64_t S = q.size(0);
  arguments.check("kv", kv, q.scalar_type(), {-1, 1, q.size(2)});
  arguments.check("indices", indices, ScalarType::Int, {S, 1, -1});
  if (attn_sink) arguments.check("attn_sink", *attn_sink, ScalarType::Float, {q.size(1)});
  if (topk_length) arguments.check("topk_length", *topk_length, ScalarType::Int, {S});
  arguments.require(v_head_dim >= 0 && v_head_dim <= q.size(2), "v_head_dim",
                    "a part of q's last dimension");
  return {data<int32_t>(indices),
          indices.stride(0),
          indices.size(2),
          data<int32_t>(topk_length),
          topk_length ? topk_length->stride(0) : 0,
          kv.size(0)};
}

}  // namespace deepkern
