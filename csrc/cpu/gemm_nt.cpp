// d[m, n] = Σ_k a[m, k] · b[n, k]  of real matrices, in float32
//
// Parallelization: threads take tasks of 32 columns of D (64 if b is contiguous along N); see
// real_gemm.cpp.
//
// Limit: small M is bandwidth-bound on b. Large M is bound by multiplication.
#include <optional>

#include "real_gemm.h"

namespace deepkern {
namespace {

Tensor gemm_nt(const Tensor& a, const Tensor& b, std::optional<ScalarType> out_dtype) {
  const Arguments arguments{"gemm_nt"};
  const Real type = arguments.check_real("a", a, {-1, -1}, false);
  const int64_t M = a.size(0), K = a.size(1);
  arguments.check("b", b, a.scalar_type(), {-1, K}, false);
  const int64_t N = b.size(0);
  const ScalarType result = out_dtype.value_or(a.scalar_type());
  const Real out_type = real_type("gemm_nt", "out_dtype", result);
  Tensor out = new_tensor({M, N}, result);
  if (M * N == 0) return out;
  const RealGemm gemm{{a.const_data_ptr(), type, a.stride(0), a.stride(1)},
                      {b.const_data_ptr(), type, b.stride(0), b.stride(1)},
                      N,
                      K,
                      nullptr,
                      out.mutable_data_ptr(),
                      out_type};
  multiply_groups(gemm, {{b.const_data_ptr(), 0, M}});
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) { m.impl("gemm_nt", TORCH_BOX(&gemm_nt)); }

}  // namespace
}  // namespace deepkern
