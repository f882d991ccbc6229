// out[cu_seqlens[b] + i] = out_dtype(token starts[b] + i of sequence b)
//
// Rows without a token are zero.
//
// Parallelization: threads take ranges of rows. A binary search gives the sequence of a row.
//
// Limit: memory bandwidth.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <cstring>
#include <vector>

#include "attention_cache.h"
#include "scratch.h"

namespace deepkern {
namespace {

struct MlaCacheGather {
  LatentCache cache;
  const int32_t* block_table;    // [B, P]
  int64_t block_table_stride;    // elements
  int64_t max_length;            // P * page_size tokens
  const int32_t* starts;         // [B]; null: 0
  const int32_t* cu_seqlens;     // [B + 1]
  std::vector<int64_t> offsets;  // cu_seqlens, sorted
  void* out;                     // [total_tokens, R + D], contiguous
  Real out_type;

  // The token of a row; null if there is none.
  const char* token(int64_t row) const {
    // The number of offsets that are at most `row`, also if cu_seqlens does not ascend.
    const auto begin = offsets.begin();
    const int64_t started = std::upper_bound(begin, offsets.end(), row) - begin;
    const int64_t sequence = started - 1;
    if (sequence < 0 || started == static_cast<int64_t>(offsets.size())) return nullptr;
    if (row < cu_seqlens[sequence] || row >= cu_seqlens[sequence + 1]) return nullptr;
    const int64_t start = starts != nullptr ? starts[sequence] : 0;
    const int64_t position = row - cu_seqlens[sequence] + start;
    if (position < 0 || position >= max_length) return nullptr;
    const int64_t page = block_table[sequence * block_table_stride + position / cache.page_size];
    if (page < 0 || page >= cache.num_pages) return nullptr;
    return cache.at(page, position % cache.page_size);
  }
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/mla_cache_gather.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

Tensor mla_cache_gather(const Tensor& cache, const Tensor& block_table, const Tensor& cu_seqlens,
                        int64_t total_tokens, int64_t v_head_dim,
                        const std::optional<Tensor>& starts, ScalarType out_dtype) {
  const Arguments arguments{"mla_cache_gather"};
  MlaCacheGather gather{};
  gather.out_type = real_type("mla_cache_gather", "out_dtype", out_dtype);
  gather.cache = latent_cache(arguments, cache, v_head_dim);
  arguments.check("block_table", block_table, ScalarType::Int, {-1, -1});
  const int64_t B = block_table.size(0), P = block_table.size(1);
  arguments.check("cu_seqlens", cu_seqlens, ScalarType::Int, {B + 1});
  if (starts.has_value()) arguments.check("starts", *starts, ScalarType::Int, {B});
  arguments.require(total_tokens >= 0, "total_tokens", "at least 0");
  const int64_t page_size = gather.cache.page_size;
  constexpr int64_t LONGEST = (int64_t{1} << 31) - 1;
  arguments.require(page_size == 0 || P <= LONGEST / page_size, "block_table",
                    "fewer than 2**31 tokens a sequence");
  const int64_t W = v_head_dim + gather.cache.D;
  Tensor out = new_tensor({total_tokens, W}, out_dtype);
  if (total_tokens * W == 0) return out;
  gather.block_table = data<int32_t>(block_table);
  gather.block_table_stride = block_table.stride(0);
  gather.max_length = P * page_size;
  gather.starts = data<int32_t>(starts);
  gather.cu_seqlens = data<int32_t>(cu_seqlens);
  gather.offsets.assign(gather.cu_seqlens, gather.cu_seqlens + B + 1);
  std::sort(gather.offsets.begin(), gather.offsets.end());
  gather.out = out.mutable_data_ptr();
  const auto gather_rows = DEEPKERN_DISPATCH(gather_rows);
  parallel_ranges(total_tokens, W,
                  [&](int64_t first, int64_t last) { gather_rows(gather, first, last); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("mla_cache_gather", TORCH_BOX(&mla_cache_gather));
}

}  // namespace
}  // namespace deepkern
#else
#include "attention_tokens.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

void gather_rows(const MlaCacheGather& g, int64_t first, int64_t last) {
  const int64_t W = g.cache.R + g.cache.D;
  const int64_t size = size_of(g.out_type);
  const bool copy = !g.cache.fp8 && g.cache.type == g.out_type;
  float* values = thread_scratch(W);
  for (int64_t row = first; row < last; ++row) {
    char* out = static_cast<char*>(g.out) + row * W * size;
    const char* token = g.token(row);
    if (token == nullptr) {
      std::memset(out, 0, W * size);
    } else if (copy) {
      std::memcpy(out, token, W * size);
    } else {
      widen_tokens(g.cache, &token, 1, values, W);
      DEEPKERN_FOR_REAL(g.out_type, store_values<type>(out, values, W));
    }
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
