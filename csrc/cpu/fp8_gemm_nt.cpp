// d[m, n] = Σ_j a_scale[m, j] · b_scale[n or n / 128, j] · Σ_{k in block j} a[m, k] · b[n, k]
//           (+ c[m, n])
//
// Parallelization: one task computes a strip of 32 columns of D; threads take ranges of strips of
// all groups. The rows of A, 256 at a time, are first widened to a type that the CPU multiplies.
// Rows of B are widened per strip, 128 values of K at a time (fp8_gemm_kernel.cpp). A strip of a B
// whose columns are contiguous is transposed first.
//
// Limit: small M is bandwidth-bound on B, one byte per weight. Large M is bound by multiplication.
//
// The bits of a row of D depend neither on M, on the other rows, nor on the number of threads,
// except for the sign of a NaN. They depend on the instruction set, which adds in its own order.
#include "fp8_gemm_nt.h"

#include <vector>

#include "fp8_gemm_arguments.h"

namespace deepkern {
namespace {

Tensor fp8_gemm_nt(const Tensor& a_codes, const Tensor& a_scale, const Tensor& b_codes,
                   const Tensor& b_scale, ScalarType out_dtype, const std::optional<Tensor>& c) {
  const Arguments arguments{"fp8_gemm_nt"};
  arguments.check("a", a_codes, FP8, {-1, -1}, false);
  const int64_t M = a_codes.size(0), K = a_codes.size(1);
  arguments.check("a_scale", a_scale, ScalarType::Float, {M, blocks_of_k(K)}, false);
  arguments.check("b", b_codes, FP8, {-1, K}, false);
  const int64_t N = b_codes.size(0);
  const int64_t b_rows = check_b_scale(arguments, "b_scale", b_codes, b_scale);
  Fp8Product product{};
  if (c.has_value()) {
    product.gemm.c_type = arguments.check_real("c", *c, {M, N});
    product.gemm.c = c->const_data_ptr();
    product.gemm.c_row_stride = c->stride(0);
  }
  product.gemm.out_type = real_type("fp8_gemm_nt", "out_dtype", out_dtype);

  const Tensor a = k_contiguous(a_codes), b = readable_b(b_codes);
  Tensor out = new_tensor({M, N}, out_dtype);
  if (M * N == 0) return out;
  product.gemm.a = fp8_rows(a, a_scale, 1);
  set_b(product, b, b_scale, b_rows);
  product.gemm.out = out.mutable_data_ptr();
  product.rows = M;
  multiply_products({product});
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("fp8_gemm_nt", TORCH_BOX(&fp8_gemm_nt));
}

}  // namespace
}  // namespace deepkern
