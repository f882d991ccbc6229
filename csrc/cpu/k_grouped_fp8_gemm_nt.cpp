// d[g] = a[:, group g] · b[:, group g]ᵀ  with block scales (+ c[g])
//
// A group is a range of columns; its blocks of 128 columns restart at its first one.
//
// Parallelization: every group is one product, and threads share the strips of all products
// (fp8_gemm_products.cpp).
//
// Limit: multiplication; for short groups, the writes of d.
#include <vector>

#include "fp8_gemm_arguments.h"

namespace deepkern {
namespace {

Tensor k_grouped_fp8_gemm_nt(const Tensor& a_codes, const Tensor& a_scale, const Tensor& b_codes,
                             const Tensor& b_scale, const Tensor& group_offsets,
                             const std::optional<Tensor>& c) {
  const Arguments arguments{"k_grouped_fp8_gemm_nt"};
  arguments.check("a", a_codes, FP8, {-1, -1}, false);
  const int64_t M = a_codes.size(0), K = a_codes.size(1);
  arguments.check("a_scale", a_scale, ScalarType::Float, {M, -1}, false);
  const int64_t scale_blocks = a_scale.size(1);
  arguments.check("b", b_codes, FP8, {-1, K}, false);
  const int64_t N = b_codes.size(0);
  arguments.check("b_scale", b_scale, ScalarType::Float, {N, scale_blocks}, false);
  arguments.check("group_offsets", group_offsets, ScalarType::Int, {-1});
  const int64_t G = group_offsets.size(0) - 1;
  arguments.require(G >= 0, "group_offsets", "at least 1 offset");
  if (c.has_value()) arguments.check("c", *c, ScalarType::Float, {G, M, N});

  const Tensor a = k_contiguous(a_codes), b = readable_b(b_codes);
  Tensor out = new_tensor({G, M, N}, ScalarType::Float);
  if (G * M * N == 0) return out;
  Fp8Product product{};
  product.rows = M;
  product.gemm.a = fp8_rows(a, a_scale, 1);
  set_b(product, b, b_scale, 1);
  product.gemm.out_type = product.gemm.c_type = Real::fp32;
  product.gemm.c_row_stride = c.has_value() ? c->stride(1) : 0;

  const auto* offsets = data<int32_t>(group_offsets);
  const auto clamp = [&](int64_t g, int64_t before) {
    return std::max(before, std::min<int64_t>(offsets[g], K));
  };
  std::vector<Fp8Product> products;
  int64_t block = 0;  // of the scales
  for (int64_t g = 0, first = clamp(0, 0), end; g < G; ++g, first = end) {
    end = clamp(g + 1, first);
    Fp8Product group = product;
    const int64_t scaled_columns = std::max<int64_t>(scale_blocks - block, 0) * kBlock;
    group.gemm.K = std::min(end - first, scaled_columns);
    if (group.gemm.K > 0) {
      group.gemm.a.codes += first;
      group.gemm.b.codes += first * b.stride(1);
      group.gemm.a.scale += block * a_scale.stride(1);
      group.gemm.b.scale += block * b_scale.stride(1);
    }
    block += blocks_of_k(end - first);
    if (c.has_value()) group.gemm.c = data<float>(c) + g * c->stride(0);
    group.gemm.out = static_cast<float*>(out.mutable_data_ptr()) + g * M * N;
    products.push_back(group);
  }
  multiply_products(products);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("k_grouped_fp8_gemm_nt", TORCH_BOX(&k_grouped_fp8_gemm_nt));
}

}  // namespace
}  // namespace deepkern
