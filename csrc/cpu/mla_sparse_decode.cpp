// mla_sparse_decode: attention of a few new queries over the cached tokens that indices select,
// with a sink. Kernel, parallelization and limit: attention_decode.cpp.
#include <algorithm>
#include <tuple>

#include "attention_decode.h"

namespace deepkern {
namespace {

std::tuple<Tensor, Tensor> mla_sparse_decode(const Tensor& q, const Tensor& cache,
                                             const Tensor& indices, double softmax_scale,
                                             const std::optional<Tensor>& topk_length,
                                             const std::optional<Tensor>& attn_sink,
                                             int64_t v_head_dim) {
  const Arguments arguments{"mla_sparse_decode"};
  Decode decode = check_decode(arguments, q, cache, softmax_scale, v_head_dim);
  const int64_t B = decode.B, Sq = decode.Sq, H = decode.H;
  arguments.check("indices", indices, ScalarType::Int, {B, Sq, -1});
  if (topk_length.has_value()) {
    arguments.check("topk_length", *topk_length, ScalarType::Int, {B});
  }
  if (attn_sink.has_value()) arguments.check("attn_sink", *attn_sink, ScalarType::Float, {H});
  Tensor out = new_tensor({B, Sq, H, v_head_dim}, q.scalar_type());
  Tensor lse = new_tensor({B, H, Sq}, ScalarType::Float);
  decode.sparse = true;
  decode.indices = data<int32_t>(indices);
  decode.index_sequence_stride = indices.stride(0);
  decode.index_query_stride = indices.stride(1);
  decode.attn_sink = data<float>(attn_sink);
  decode.out = out.mutable_data_ptr();
  decode.lse = mutable_data<float>(lse);
  decode.units = B * Sq;
  decode.rows = H;
  const int64_t topk = indices.size(2);
  const auto* length = data<int32_t>(topk_length);
  std::vector<int64_t> lengths(decode.units, topk);
  for (int64_t i = 0; length != nullptr && i < decode.units; ++i) {
    lengths[i] = std::clamp<int64_t>(length[i / Sq], 0, topk);
  }
  run_decode(decode, lengths);
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("mla_sparse_decode", TORCH_BOX(&mla_sparse_decode));
}

}  // namespace
}  // namespace deepkern
