// load[e] = #{(t, j): topk_idx[t, j] = e}
//
// Parallelization: none; one thread counts.
//
// Limit: one increment per assignment.
#include "expert_rows.h"

namespace deepkern {
namespace {

Tensor expert_load(const Tensor& topk_idx, int64_t num_experts) {
  const Arguments arguments{"expert_load"};
  const bool is_int64 = check_topk_idx(arguments, topk_idx, -1);
  arguments.require(num_experts >= 1, "num_experts", "at least 1");
  Tensor load = new_tensor({num_experts}, ScalarType::Int);
  count_assignments(topk_idx.const_data_ptr(), is_int64, topk_idx.stride(0), topk_idx.size(0),
                    topk_idx.size(1), num_experts, mutable_data<int32_t>(load));
  return load;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("expert_load", TORCH_BOX(&expert_load));
}

}  // namespace
}  // namespace deepkern
