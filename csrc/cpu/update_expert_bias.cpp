// out[e] = bias[e] + rate · sign(Σ_i load[i] / E - load[e])
//
// The comparison is in integers, E · load[e] with the sum: an expert with exactly the mean load
// keeps its bias.
//
// Parallelization: none.
//
// Limit: two passes over the experts.
//
// Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2, after Wang et al. (arXiv
// 2408.15664).
#include "tensors.h"

namespace deepkern {
namespace {

// Sums wrap around, as in torch.
template <class Load>
void update(const float* bias, const Load* load, float rate, uint64_t E, float* out) {
  uint64_t sum = 0;
  for (uint64_t e = 0; e < E; ++e) sum += static_cast<uint64_t>(load[e]);
  for (uint64_t e = 0; e < E; ++e) {
    const auto deficit = static_cast<int64_t>(sum - static_cast<uint64_t>(load[e]) * E);
    const float sign = static_cast<float>((deficit > 0) - (deficit < 0));
    out[e] = bias[e] + sign * rate;
  }
}

Tensor update_expert_bias(const Tensor& bias, const Tensor& load, double rate) {
  const Arguments arguments{"update_expert_bias"};
  arguments.check("bias", bias, ScalarType::Float, {-1});
  const int64_t E = bias.size(0);
  const bool is_int64 = load.scalar_type() == ScalarType::Long;
  arguments.check("load", load, is_int64 ? ScalarType::Long : ScalarType::Int, {E});
  Tensor out = new_tensor({E}, ScalarType::Float);
  const auto step = static_cast<float>(rate);
  if (is_int64) {
    update(data<float>(bias), data<int64_t>(load), step, E, mutable_data<float>(out));
  } else {
    update(data<float>(bias), data<int32_t>(load), step, E, mutable_data<float>(out));
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("update_expert_bias", TORCH_BOX(&update_expert_bias));
}

}  // namespace
}  // namespace deepkern
