// x[n, k] = out_dtype(float32(q[n, k]) * scale[n // rows, k // cols])        block = (rows, cols)
//
// Parallelization: threads take ranges of rows. A row is processed in segments that have one scale.
//
// Limit: memory bandwidth; 3 bytes per value for bf16 output (1 read, 2 written).
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <vector>

#include "tensors.h"

namespace deepkern {
namespace {

struct CastBack {
  const uint8_t* q;  // e4m3 [G, N, K]
  int64_t q_matrix, q_row;
  const float* scale;  // [G, ceil(N / rows), ceil(K / cols)]
  int64_t scale_matrix, scale_row, scale_column;
  void* out;  // [G, N, K], contiguous
  Real type;
  int64_t N, K, rows, cols;
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/cast_back.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

// x [..., A, B] as [G, A, B]; a view if the strides allow it.
Tensor as_matrices(const Tensor& x) {
  const int64_t rank = x.dim();
  if (rank == 3) return x;
  int64_t G = 1;
  for (int64_t i = 0; i + 2 < rank; ++i) G *= x.size(i);
  return torch::stable::reshape(x, {G, x.size(rank - 2), x.size(rank - 1)});
}

Tensor cast_back(const Tensor& q, const Tensor& scale, std::vector<int64_t> block,
                 ScalarType out_dtype) {
  const Arguments arguments{"cast_back"};
  const int64_t rank = q.dim();
  arguments.require(q.scalar_type() == FP8, "q", "dtype float8_e4m3fn");
  arguments.require(scale.scalar_type() == ScalarType::Float, "scale", "dtype float32");
  arguments.require(scale.is_cpu(), "scale", "a CPU tensor");
  arguments.require(rank >= 2, "q", "rank 2 or more");
  arguments.require(scale.dim() == rank, "scale", "the rank of q");
  for (int64_t i = 0; i + 2 < rank; ++i) {
    arguments.require(scale.size(i) == q.size(i), "scale", "the leading dimensions of q");
  }
  arguments.check_last_stride("q", q);
  const bool valid = block.size() == 2 && block[0] >= 1 && block[1] >= 1;
  arguments.require(valid, "block", "(rows, cols), both at least 1");
  const Real type = real_type("cast_back", "out_dtype", out_dtype);
  const int64_t N = q.size(rank - 2), K = q.size(rank - 1);
  // A longer block has the same effect.
  const int64_t rows = std::min(block[0], std::max<int64_t>(N, 1));
  const int64_t cols = std::min(block[1], std::max<int64_t>(K, 1));
  arguments.require(
      scale.size(rank - 2) == ceil_div(N, rows) && scale.size(rank - 1) == ceil_div(K, cols),
      "scale", "one per block as the last two dimensions");
  Tensor out = new_tensor(q.sizes().data(), q.dim(), out_dtype);
  if (out.numel() == 0) return out;

  CastBack c{data<uint8_t>(q),
             0,
             q.stride(rank - 2),
             data<float>(scale),
             0,
             scale.stride(rank - 2),
             scale.stride(rank - 1),
             out.mutable_data_ptr(),
             type,
             N,
             K,
             rows,
             cols};
  Tensor matrices = q, scales = scale;
  if (rank > 2) {
    matrices = as_matrices(q), scales = as_matrices(scale);
    c.q = data<uint8_t>(matrices), c.scale = data<float>(scales);
    c.q_matrix = matrices.stride(0), c.q_row = matrices.stride(1);
    c.scale_matrix = scales.stride(0), c.scale_row = scales.stride(1);
    c.scale_column = scales.stride(2);
  }
  const auto cast_rows = DEEPKERN_DISPATCH(cast_rows);
  parallel_ranges(out.numel() / K, K,
                  [&](int64_t first, int64_t last) { cast_rows(c, first, last); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) { m.impl("cast_back", TORCH_BOX(&cast_back)); }

}  // namespace
}  // namespace deepkern
#else

namespace deepkern::DEEPKERN_ISA {
namespace {

// out[i] = q[i] * scale for `count` values.
template <Real type>
DEEPKERN_INLINE void multiply_segment(const uint8_t* q, float scale, int64_t count, void* out,
                                      int64_t offset) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    store_floats<type>(out, offset + i, widen_e4m3(q + i) * scale);
  }
  if (i == count) return;
  uint8_t codes[LANES] = {};
  std::memcpy(codes, q + i, count - i);
  store_first_floats<type>(out, offset + i, widen_e4m3(codes) * scale, count - i);
}

template <Real type>
void cast_rows_of(const CastBack& c, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t matrix = row / c.N, n = row % c.N;
    const uint8_t* q = c.q + matrix * c.q_matrix + n * c.q_row;
    const float* scale = c.scale + matrix * c.scale_matrix + n / c.rows * c.scale_row;
    for (int64_t k = 0; k < c.K; k += c.cols, scale += c.scale_column) {
      const int64_t count = std::min(c.cols, c.K - k);
      multiply_segment<type>(q + k, *scale, count, c.out, row * c.K + k);
    }
  }
}

void cast_rows(const CastBack& c, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(c.type, cast_rows_of<type>(c, first, last));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
