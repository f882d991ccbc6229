// mqa_logits: how every query of the lightning indexer scores every key. Kernel, parallelization
// and limit: indexer_logits.cpp.
#include <algorithm>

#include "indexer_logits.h"

namespace deepkern {
namespace {

Tensor mqa_logits(const Tensor& q, const Tensor& kv, const Tensor& kv_scale, const Tensor& weights,
                  const Tensor& starts, const Tensor& ends) {
  const Arguments arguments{"mqa_logits"};
  arguments.check("q", q, FP8, {-1, -1, -1});
  const int64_t S = q.size(0), H = q.size(1), D = q.size(2);
  arguments.check("kv", kv, FP8, {-1, D});
  const int64_t Skv = kv.size(0);
  arguments.check("kv_scale", kv_scale, ScalarType::Float, {Skv});
  arguments.check("weights", weights, ScalarType::Float, {S, H});
  arguments.check("starts", starts, ScalarType::Int, {S});
  arguments.check("ends", ends, ScalarType::Int, {S});
  arguments.require(Skv <= (int64_t{1} << 31) - 4096, "kv", "at most 2**31 - 4096 keys");
  IndexerLogits logits{};
  check_indexer_queries(arguments, q, logits);
  Tensor out = new_tensor({S, Skv}, ScalarType::Float);
  if (S * Skv == 0) return out;
  logits.weights = data<float>(weights);
  logits.weights_stride = weights.stride(0);
  logits.kv = data<uint8_t>(kv);
  logits.kv_stride = kv.stride(0);
  logits.kv_scale = data<float>(kv_scale);
  logits.out = mutable_data<float>(out);
  logits.N = Skv;
  const auto *start = data<int32_t>(starts), *end = data<int32_t>(ends);
  logits.ranges.resize(S);
  for (int64_t s = 0; s < S; ++s) {
    logits.ranges[s] = {std::clamp<int64_t>(start[s], 0, Skv), std::clamp<int64_t>(end[s], 0, Skv)};
  }
  run_indexer_logits(logits);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) { m.impl("mqa_logits", TORCH_BOX(&mqa_logits)); }

}  // namespace
}  // namespace deepkern
