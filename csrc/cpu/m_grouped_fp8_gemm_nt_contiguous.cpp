// d[m] = a[m] · b[group_index[m]]ᵀ  with block scales, and 0 where group_index[m] is not a group
//
// Parallelization: the rows are sorted by group. Every group with rows is one product, and threads
// share the strips of all products (fp8_gemm_products.cpp).
//
// Limit: few rows per group, reading b[g] of each group that has rows. Many rows, multiplication.
#include <vector>

#include "fp8_gemm_arguments.h"

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

  const auto* index = data<int32_t>(group_index);
  const int64_t stride = group_index.stride(0);
  std::vector<int64_t> end(G + 1);  // of a group's rows in `sorted`; first its start
  const auto is_group = [&](int64_t g) { return g >= 0 && g < G; };
  for (int64_t m = 0; m < M; ++m) {
    if (is_group(index[m * stride])) ++end[index[m * stride] + 1];
  }
  for (int64_t g = 0; g < G; ++g) end[g + 1] += end[g];
  std::vector<int32_t> sorted(M);
  const int64_t row_bytes = N * size_of(product.gemm.out_type);
  for (int64_t m = 0; m < M; ++m) {
    if (is_group(index[m * stride])) {
      sorted[end[index[m * stride]]++] = static_cast<int32_t>(m);
    } else {
      std::memset(static_cast<char*>(product.gemm.out) + m * row_bytes, 0, row_bytes);
    }
  }
  std::vector<Fp8Product> products;
  for (int64_t g = 0, first = 0; g < G; first = end[g++]) {
    if (end[g] == first) continue;
    products.push_back(group_product(product, b, b_scale, g));
    products.back().rows = end[g] - first;
    products.back().a_rows = products.back().out_rows = sorted.data() + first;
  }
  multiply_products(products);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("m_grouped_fp8_gemm_nt_contiguous", TORCH_BOX(&m_grouped_fp8_gemm_nt_contiguous));
}

}  // namespace
}  // namespace deepkern
