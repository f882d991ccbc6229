// scale[i, j] = max(|x[128i : 128i+128, 128j : 128j+128]|, 1e-4) / 448     (2^n for ue8m0)
// q[n, k]     = e4m3(x[n, k] * (1 / scale[n // 128, k // 128]))
//
// Parallelization: threads take ranges of blocks. A block is read twice; the second time it is in
// the cache.
//
// Limit: memory bandwidth; 3 bytes per bf16 value (2 read, 1 written).
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace deepkern {
namespace {

struct CastPerBlock {
  const void* x;  // [G, N, K]
  Real type;
  int64_t matrix_stride, row_stride;  // elements
  uint8_t* q;                         // e4m3 [G, N, K], contiguous
  float* scale;                       // [G, ceil(N / 128), ceil(K / 128)], contiguous
  int64_t N, K;
  bool ue8m0;
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/cast_per_block.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

std::tuple<Tensor, Tensor> cast_per_block(const Tensor& x, const std::string& scale_format) {
  const Arguments arguments{"cast_per_block"};
  const Real type = real_type("cast_per_block", "x", x.scalar_type());
  const int64_t rank = x.dim();
  arguments.require(rank == 2 || rank == 3, "x", "rank 2 or 3");
  arguments.check_last_stride("x", x);
  const bool ue8m0 = arguments.choose("scale_format", scale_format, "ue8m0", "fp32");
  const int64_t G = rank == 3 ? x.size(0) : 1, N = x.size(rank - 2), K = x.size(rank - 1);
  Tensor q = new_tensor(x.sizes().data(), x.dim(), FP8);
  std::vector<int64_t> scale_shape(x.sizes().begin(), x.sizes().end());
  scale_shape[rank - 2] = ceil_div(N, 128);
  scale_shape[rank - 1] = ceil_div(K, 128);
  Tensor scale = new_tensor(scale_shape.data(), scale_shape.size(), ScalarType::Float);
  if (G * N * K == 0) return {q, scale};

  const CastPerBlock cast{x.const_data_ptr(),
                          type,
                          rank == 3 ? x.stride(0) : 0,
                          x.stride(rank - 2),
                          mutable_data<uint8_t>(q),
                          mutable_data<float>(scale),
                          N,
                          K,
                          ue8m0};
  const auto cast_blocks = DEEPKERN_DISPATCH(cast_blocks);
  parallel_ranges(scale.numel(), std::min<int64_t>(N, 128) * std::min<int64_t>(K, 128),
                  [&](int64_t first, int64_t last) { cast_blocks(cast, first, last); });
  return {q, scale};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("cast_per_block", TORCH_BOX(&cast_per_block));
}

}  // namespace
}  // namespace deepkern
#else
#include "cast_block.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// Casts the block of `rows` x `columns` values that starts at x[offset].
template <Real type>
float cast_one_block(const CastPerBlock& c, int64_t offset, int64_t rows, int64_t columns,
                     uint8_t* q) {
  float values[128];
  uint8_t codes[128];
  Ints amax{};
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = offset + i * c.row_stride;
    if (columns == 128) {
      amax = largest_magnitudes<type>(c.x, row, amax);
    } else {
      load_block<type>(c.x, row, columns, values);
      amax = largest_magnitudes<Real::fp32>(values, 0, amax);
    }
  }
  const float scale = block_scale(largest_lane(amax), c.ue8m0);
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = offset + i * c.row_stride;
    if (columns == 128) {
      encode_block<type>(c.x, row, inverse, q + i * c.K);
    } else {
      load_block<type>(c.x, row, columns, values);
      encode_block<Real::fp32>(values, 0, inverse, codes);
      std::memcpy(q + i * c.K, codes, columns);
    }
  }
  return scale;
}

template <Real type>
void cast_blocks_of(const CastPerBlock& c, int64_t first, int64_t last) {
  const int64_t row_blocks = ceil_div(c.N, 128), column_blocks = ceil_div(c.K, 128);
  for (int64_t i = first; i < last; ++i) {
    const int64_t k = i % column_blocks * 128, row_block = i / column_blocks;
    const int64_t matrix = row_block / row_blocks, n = row_block % row_blocks * 128;
    const int64_t rows = std::min<int64_t>(128, c.N - n);
    const int64_t columns = std::min<int64_t>(128, c.K - k);
    c.scale[i] = cast_one_block<type>(c, matrix * c.matrix_stride + n * c.row_stride + k, rows,
                                      columns, c.q + (matrix * c.N + n) * c.K + k);
  }
}

void cast_blocks(const CastPerBlock& c, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(c.type, cast_blocks_of<type>(c, first, last));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
