// d[m] = a[m] · b[group_index[m]]ᵀ  with block scales, and 0 where group_index[m] is not a group
//
// Parallelization: the rows are sorted by group. Every group with rows is one product, and threads
// share the strips of all products (fp8_gemm_products.cpp).
//
// Limit: few rows per group, reading b[g] of each group that has rows. Many rows, multiplication.
#include <vector>

#include "fp8_gemm_arguments.h"
#include "group_rows.h"

namespace deepkern {
namespace {

Tensor m_grouped_fp8_gemm_nt_contiguous(const Tensor& a_codes, const Tensor& a_scale,
                                        const Tensor& b_codes, const Tensor& b_scale,
                                        const Tensor& group_index, ScalarType out_dtype) {
  const Arguments arguments{"m_grouped_fp8_gemm_nt_contiguous"};
  arguments.check("a", a_codes, FP8, {-1, -1}, false);
  const int64_t M = a_codes.size(0), K = a_codes.size(1);
  arguments.check("a_scale", a_scale, ScalarType::Float, {M, blocks_of_k(K)}, false);
  arguments.check("b", b_codes, FP8, {-1, -1, K}, false);
  const int64_t G = b_codes.size(0), N = b_codes.size(1);
  const int64_t b_rows = check_b_scale(arguments, "b_scale", b_codes, b_scale);
  arguments.check("group_index", group_index, ScalarType::Int, {M}, false);
  Fp8Product product{};
  product.gemm.out_type = real_type(arguments.op, "out_dtype", out_dtype);

  const Tensor a = k_contiguous(a_codes), b = readable_b(b_codes);
  Tensor out = new_tensor({M, N}, out_dtype);
  if (M * N == 0) return out;
  product.gemm.a = fp8_rows(a, a_scale, 1);
  set_b(product, b, b_scale, b_rows);
  product.gemm.out = out.mutable_data_ptr();

  const GroupRows sorted(group_index, G);
  sorted.zero_other_rows(product.gemm.out, N * size_of(product.gemm.out_type));
  std::vector<Fp8Product> products;
  for (int64_t g = 0; g < G; ++g) {
    if (sorted.end(g) == sorted.first(g)) continue;
    products.push_back(group_product(product, b, b_scale, g));
    products.back().rows = sorted.end(g) - sorted.first(g);
    products.back().a_rows = products.back().out_rows = sorted.rows.data() + sorted.first(g);
  }
  multiply_products(products);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("m_grouped_fp8_gemm_nt_contiguous", TORCH_BOX(&m_grouped_fp8_gemm_nt_contiguous));
}

}  // namespace
}  // namespace deepkern
