// Checks and converts the arguments of the ops that multiply FP8 matrices.
#pragma once

#include "fp8_gemm_nt.h"
#include "tensors.h"

namespace deepkern {

// Checks the scales of b [..., N, K] and returns the rows of b per scale: 1 or 128.
inline int64_t check_b_scale(const Arguments& arguments, const char* argument, const Tensor& b,
                             const Tensor& scale) {
  const int64_t rank = b.dim(), N = b.size(rank - 2), K = b.size(rank - 1);
  if (rank == 2) {
    arguments.check(argument, scale, ScalarType::Float, {-1, blocks_of_k(K)}, false);
  } else {
    arguments.check(argument, scale, ScalarType::Float, {b.size(0), -1, blocks_of_k(K)}, false);
  }
  if (scale.size(rank - 2) == N) return 1;
  const int64_t blocks = ceil_div(N, kBlock);
  STD_TORCH_CHECK(scale.size(rank - 2) == blocks, arguments.op, ": ", argument, ": expected ", N,
                  " rows or one per 128, got ", scale.size(rank - 2));
  return kBlock;
}

// `x` [..., rows, K] with stride 1 along K: itself, or a copy.
inline Tensor k_contiguous(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// The same for B, whose columns may be contiguous instead.
inline Tensor readable_b(const Tensor& b) {
  return b.stride(b.dim() - 2) == 1 ? b : k_contiguous(b);
}

// The codes and scales of x [rows, K], or of the first matrix of x [groups, rows, K].
inline Fp8Matrix fp8_rows(const Tensor& x, const Tensor& scale, int64_t rows_per_scale) {
  const int64_t rank = x.dim();
  return {data<uint8_t>(x), x.size(rank - 2),       x.stride(rank - 2),    data<float>(scale),
          rows_per_scale,   scale.stride(rank - 2), scale.stride(rank - 1)};
}

// Sets B, of which readable_b() has been called, and K.
inline void set_b(Fp8Product& product, const Tensor& b, const Tensor& scale,
                  int64_t rows_per_scale) {
  product.gemm.b = fp8_rows(b, scale, rows_per_scale);
  product.gemm.K = b.size(b.dim() - 1);
  const int64_t stride = b.stride(b.dim() - 1);
  product.b_k_stride = product.gemm.K <= 1 ? 1 : stride;
}

// `product` with matrix g of b [groups, N, K].
inline Fp8Product group_product(const Fp8Product& product, const Tensor& b, const Tensor& scale,
                                int64_t g) {
  Fp8Product group = product;
  group.gemm.b.codes += g * b.stride(0);
  group.gemm.b.scale += g * scale.stride(0);
  return group;
}

}  // namespace deepkern
