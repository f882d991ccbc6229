// d[m] = a[m] · b[group_index[m]]ᵀ  of real matrices, and 0 where group_index[m] is not a group
//
// Parallelization: the rows are sorted by group, and threads take column ranges of all groups
// (real_gemm.cpp). A row has the bits that gemm_nt gives it.
//
// Limit: few rows per group, reading b[g] of each group that has rows. Many rows, multiplication.
#include <optional>
#include <vector>

#include "group_rows.h"
#include "real_gemm.h"

namespace deepkern {
namespace {

Tensor m_grouped_gemm_nt_contiguous(const Tensor& a, const Tensor& b, const Tensor& group_index,
                                    std::optional<ScalarType> out_dtype) {
  const Arguments arguments{"m_grouped_gemm_nt_contiguous"};
  const Real type = arguments.check_real("a", a, {-1, -1}, false);
  const int64_t M = a.size(0), K = a.size(1);
  arguments.check("b", b, a.scalar_type(), {-1, -1, K}, false);
  const int64_t G = b.size(0), N = b.size(1);
  arguments.check("group_index", group_index, ScalarType::Int, {M}, false);
  const ScalarType result = out_dtype.value_or(a.scalar_type());
  const Real out_type = real_type(arguments.op, "out_dtype", result);
  Tensor out = new_tensor({M, N}, result);
  if (M * N == 0) return out;

  const GroupRows sorted(group_index, G);
  sorted.zero_other_rows(out.mutable_data_ptr(), N * size_of(out_type));
  const RealGemm gemm{{a.const_data_ptr(), type, a.stride(0), a.stride(1)},
                      {b.const_data_ptr(), type, b.stride(1), b.stride(2)},
                      N,
                      K,
                      sorted.rows.data(),
                      out.mutable_data_ptr(),
                      out_type};
  std::vector<RealGroup> groups;
  for (int64_t g = 0; g < G; ++g) {
    if (sorted.end(g) == sorted.first(g)) continue;
    groups.push_back({element(gemm.b.data, type, g * b.stride(0)), sorted.first(g), sorted.end(g)});
  }
  multiply_groups(gemm, groups);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("m_grouped_gemm_nt_contiguous", TORCH_BOX(&m_grouped_gemm_nt_contiguous));
}

}  // namespace
}  // namespace deepkern
