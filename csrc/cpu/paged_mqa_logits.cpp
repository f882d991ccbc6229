// paged_mqa_logits: mqa_logits for the new queries of each sequence over the indexer's paged cache.
// Kernel, parallelization and limit: indexer_logits.cpp.
#include <algorithm>

#include "indexer_logits.h"

namespace deepkern {
namespace {

// The first tokens of each sequence that each of its queries sees, from context_lens [B] or
// [B, next_n].
void set_ranges(const Tensor& context_lens, int64_t capacity, IndexerLogits& logits) {
  const int64_t B = logits.units, next_n = logits.queries;
  const auto* lengths = data<int32_t>(context_lens);
  const bool each = context_lens.dim() == 2;
  const int64_t stride = context_lens.stride(0);
  logits.ranges.resize(B * next_n);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t j = 0; j < next_n; ++j) {
      int64_t length = std::clamp<int64_t>(lengths[b * stride + (each ? j : 0)], 0, capacity);
      if (!each) length += 1 + j - next_n;
      logits.ranges[b * next_n + j] = {0, std::clamp<int64_t>(length, 0, logits.N)};
    }
  }
}

Tensor paged_mqa_logits(const Tensor& q, const Tensor& cache, const Tensor& weights,
                        const Tensor& context_lens, const Tensor& block_table,
                        int64_t max_context_len) {
  const Arguments arguments{"paged_mqa_logits"};
  arguments.check("q", q, FP8, {-1, -1, -1, -1});
  const int64_t B = q.size(0), next_n = q.size(1), H = q.size(2), D = q.size(3);
  IndexerLogits logits{};
  logits.paged = true;
  logits.cache = indexer_cache(arguments, cache, D);
  arguments.check("weights", weights, ScalarType::Float, {B * next_n, H});
  if (context_lens.dim() == 1) {
    arguments.check("context_lens", context_lens, ScalarType::Int, {B});
  } else {
    arguments.check("context_lens", context_lens, ScalarType::Int, {B, next_n});
  }
  arguments.check("block_table", block_table, ScalarType::Int, {B, -1});
  check_indexer_queries(arguments, q, logits);
  constexpr int64_t LONGEST = (int64_t{1} << 31) - 1;
  const int64_t P = block_table.size(1), page_size = logits.cache.page_size;
  arguments.require(page_size == 0 || P <= LONGEST / page_size, "block_table",
                    "fewer than 2**31 tokens a sequence");
  arguments.require(max_context_len >= 0 && max_context_len <= LONGEST + 1 - 1024,
                    "max_context_len", "a number from 0 to 2**31 - 1024");
  Tensor out = new_tensor({B * next_n, max_context_len}, ScalarType::Float);
  if (B * next_n * max_context_len == 0) return out;
  logits.weights = data<float>(weights);
  logits.weights_stride = weights.stride(0);
  logits.block_table = data<int32_t>(block_table);
  logits.block_table_stride = block_table.stride(0);
  logits.out = mutable_data<float>(out);
  logits.N = max_context_len;
  set_ranges(context_lens, P * page_size, logits);
  run_indexer_logits(logits);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("paged_mqa_logits", TORCH_BOX(&paged_mqa_logits));
}

}  // namespace
}  // namespace deepkern
