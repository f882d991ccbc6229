// mla_decode: attention of a few new queries per sequence over the paged latent cache. Kernel,
// parallelization and limit: attention_decode.cpp.
#include <algorithm>
#include <tuple>

#include "attention_decode.h"

namespace deepkern {
namespace {

std::tuple<Tensor, Tensor> mla_decode(const Tensor& q, const Tensor& cache,
                                      const Tensor& block_table, const Tensor& cache_seqlens,
                                      double softmax_scale, bool causal, int64_t v_head_dim) {
  const Arguments arguments{"mla_decode"};
  Decode decode = check_decode(arguments, q, cache, softmax_scale, v_head_dim);
  arguments.check("block_table", block_table, ScalarType::Int, {decode.B, -1});
  arguments.check("cache_seqlens", cache_seqlens, ScalarType::Int, {decode.B});
  const int64_t P = block_table.size(1), page_size = decode.cache.page_size;
  constexpr int64_t LONGEST = int64_t{1} << 30;
  arguments.require(page_size == 0 || P <= LONGEST / page_size, "block_table",
                    "at most 2**30 tokens a sequence");
  Tensor out = new_tensor({decode.B, decode.Sq, decode.H, v_head_dim}, q.scalar_type());
  Tensor lse = new_tensor({decode.B, decode.H, decode.Sq}, ScalarType::Float);
  decode.causal = causal;
  decode.block_table = data<int32_t>(block_table);
  decode.block_table_stride = block_table.stride(0);
  decode.out = out.mutable_data_ptr();
  decode.lse = mutable_data<float>(lse);
  decode.units = decode.B;
  decode.rows = decode.Sq * decode.H;
  const auto* length = data<int32_t>(cache_seqlens);
  std::vector<int64_t> lengths(decode.B);
  for (int64_t b = 0; b < decode.B; ++b) {
    lengths[b] = std::clamp<int64_t>(length[b], 0, P * page_size);
  }
  run_decode(decode, lengths);
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) { m.impl("mla_decode", TORCH_BOX(&mla_decode)); }

}  // namespace
}  // namespace deepkern
