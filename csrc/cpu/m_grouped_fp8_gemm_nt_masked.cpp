// d[g, m] = a[g, m] · b[g]ᵀ  with block scales for m < masked_m[g], and 0 for the other rows
//
// Parallelization: every group with rows is one product, and threads share the strips of all
// products (fp8_gemm_products.cpp).
//
// Limit: reading b[g] of each group that has rows.
#include <vector>

#include "fp8_gemm_arguments.h"

namespace deepkern {
namespace {

Tensor m_grouped_fp8_gemm_nt_masked(const Tensor& a_codes, const Tensor& a_scale,
                                    const Tensor& b_codes, const Tensor& b_scale,
                                    const Tensor& masked_m, ScalarType out_dtype,
                                    std::optional<int64_t> expected_m) {
  const Arguments arguments{"m_grouped_fp8_gemm_nt_masked"};
  arguments.check("a", a_codes, FP8, {-1, -1, -1}, false);
  const int64_t G = a_codes.size(0), M = a_codes.size(1), K = a_codes.size(2);
  arguments.check("a_scale", a_scale, ScalarType::Float, {G, M, blocks_of_k(K)}, false);
  arguments.check("b", b_codes, FP8, {G, -1, K}, false);
  const int64_t N = b_codes.size(1);
  const int64_t b_rows = check_b_scale(arguments, "b_scale", b_codes, b_scale);
  arguments.check("masked_m", masked_m, ScalarType::Int, {G}, false);
  arguments.require(expected_m.value_or(0) >= 0, "expected_m", "None or at least 0");
  Fp8Product product{};
  product.gemm.out_type = real_type(arguments.op, "out_dtype", out_dtype);

  const Tensor a = k_contiguous(a_codes), b = readable_b(b_codes);
  Tensor out = new_tensor({G, M, N}, out_dtype);
  if (G * M * N == 0) return out;
  product.gemm.a = fp8_rows(a, a_scale, 1);
  set_b(product, b, b_scale, b_rows);

  auto* out_data = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = N * size_of(product.gemm.out_type);
  std::vector<Fp8Product> products;
  for (int64_t g = 0; g < G; ++g) {
    const int64_t valid = data<int32_t>(masked_m)[g * masked_m.stride(0)];
    const int64_t rows = std::min(std::max<int64_t>(valid, 0), M);
    char* group_out = out_data + g * M * row_bytes;
    std::memset(group_out + rows * row_bytes, 0, (M - rows) * row_bytes);
    if (rows == 0) continue;
    products.push_back(group_product(product, b, b_scale, g));
    products.back().rows = rows;
    products.back().gemm.a.codes += g * a.stride(0);
    products.back().gemm.a.scale += g * a_scale.stride(0);
    products.back().gemm.out = group_out;
  }
  multiply_products(products);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("m_grouped_fp8_gemm_nt_masked", TORCH_BOX(&m_grouped_fp8_gemm_nt_masked));
}

}  // namespace
}  // namespace deepkern
