// Logits of the lightning indexer: what mqa_logits and paged_mqa_logits share.
//
// A unit is a set of queries that see the same keys: all queries of mqa_logits, or the new queries
// of a sequence in paged_mqa_logits.
#pragma once

#include <vector>

#include "attention_cache.h"

namespace deepkern {

struct IndexerLogits {
  const uint8_t* q;                                      // e4m3 [units, queries, H, D]
  int64_t q_unit_stride, q_query_stride, q_head_stride;  // bytes
  int64_t units, queries, H, D;
  const float* weights;    // [units * queries, H]
  int64_t weights_stride;  // floats
  const uint8_t* kv;       // e4m3 [N, D]; of mqa_logits
  int64_t kv_stride;       // bytes
  const float* kv_scale;   // [N]
  bool paged;              // whether the keys are in `cache`, as in paged_mqa_logits
  IndexerCache cache;
  const int32_t* block_table;  // [units, P]; of paged_mqa_logits
  int64_t block_table_stride;  // elements
  float* out;                  // [units * queries, N], contiguous
  int64_t N;

  // The keys [begin, end) that a query sees, within [0, N).
  struct Range {
    int64_t begin, end;
  };
  std::vector<Range> ranges;  // [units * queries]
};

// Sets q, its strides and sizes.
void check_indexer_queries(const Arguments& arguments, const Tensor& q, IndexerLogits& logits);

// Computes out.
void run_indexer_logits(const IndexerLogits& logits);

}  // namespace deepkern
