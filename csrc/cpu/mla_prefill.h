// What mla_prefill and mla_prefill_backward have in common: checks and tiles.
#pragma once

#include "ragged.h"

namespace deepkern {

constexpr int64_t ROW_BLOCK = 96, KEY_BLOCK = 96;  // a tile; multiples of every register tile

inline Real check_prefill(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                          double softmax_scale) {
  const Arguments arguments{op};
  const Real type = arguments.check_real("q", q, {-1, -1, -1});
  const int64_t H = q.size(1);
  arguments.check("k", k, q.scalar_type(), {-1, -1, q.size(2)});
  const int64_t Hk = k.size(1);
  arguments.check("v", v, q.scalar_type(), {k.size(0), Hk, -1});
  arguments.check("cu_seqlens_q", cu_seqlens_q, ScalarType::Int, {-1});
  arguments.check("cu_seqlens_k", cu_seqlens_k, ScalarType::Int, {cu_seqlens_q.size(0)});
  arguments.require(Hk == 0 ? H == 0 : H % Hk == 0, "k",
                    "a number of heads that divides that of q");
  arguments.require(cu_seqlens_q.size(0) > 0, "cu_seqlens_q", "at least one boundary");
  arguments.require(softmax_scale >= 0, "softmax_scale", "a number >= 0");
  arguments.require(q.size(0) < 1 << 30, "q", "fewer than 2^30 rows");
  arguments.require(k.size(0) < 1 << 30, "k", "fewer than 2^30 rows");
  return type;
}

// Up to ROW_BLOCK of the rows of a span. A row is a query and one of `group` heads: row r of the
// span is head r % group of query r / group.
struct RaggedTile {
  Span span;
  int64_t first, count;
};

struct RaggedTiles {
  std::vector<RaggedTile> tiles;  // of a span the last first: with a causal mask it has most keys
  int64_t max_rows = 1, max_others = 1;  // of a span
  int64_t pairs = 0;                     // of a row and a row on the other side
  RaggedTiles(const std::vector<Span>& spans, int64_t group, int64_t block) {
    for (const Span& span : spans) {
      const int64_t rows = span.size() * group;
      max_rows = std::max(max_rows, rows);
      max_others = std::max(max_others, span.other_size());
      pairs += rows * span.other_size();
      for (int64_t first = (rows - 1) / block * block; first >= 0; first -= block) {
        tiles.push_back({span, first, std::min(block, rows - first)});
      }
    }
  }
};

}  // namespace deepkern
