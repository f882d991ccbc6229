// d[m, n] = Σ_j a_scale[m, j] · b_scale[n or n / 128, j] · Σ_{k in block j} a[m, k] · b[n, k]
//           (+ c[m, n])
//
// Parallelization: one task computes a strip of 32 columns of D; threads take ranges of strips.
// The rows of A, 256 at a time, are first widened to a type that the CPU multiplies. Rows of B are
// widened per strip, 128 values of K at a time: in registers for up to 4 rows of A, else into a
// panel in the L1 cache that all rows of A use.
//
// Limit: small M is bandwidth-bound on B, one byte per weight. Large M is bound by multiplication.
//
// The bits of a row of D depend neither on M nor on the number of threads: all tiles of an
// instruction set add the same lanes in the same order. The 128 products of a block are added into
// 8 or 16 partial sums, in the order of K. The partial sums are added pairwise. One fused
// multiply-add by a_scale * b_scale adds the block's sum to those of the earlier blocks. Portable
// code and AVX2 give the same bits, since a product of two e4m3 values is exact in float32.
// AVX-512 uses the CPU's bfloat16 dot product, which adds in another order.
#include "fp8_gemm_nt.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "tensors.h"

namespace deepkern {
namespace {

constexpr int64_t SCALE_PADDING = 16;  // a kernel reads up to 16 floats from the last scale on

// The smallest power of two that covers all rows, at most the kernel's maximum. Fewer tile rows
// leave more tile columns.
int64_t choose_tile_rows(const Fp8GemmIsa& isa, int64_t rows) {
  int64_t tile_rows = 1;
  while (tile_rows < rows && tile_rows < isa.max_tile_rows) tile_rows *= 2;
  return tile_rows;
}

// The value of each e4m3 code.
std::array<float, 256> e4m3_values() {
  std::array<float, 256> values;
  for (unsigned code = 0; code < 256; ++code) {
    const uint16_t bits = e4m3_magnitude_as_bf16(code) | (code & 0x80) << 8;
    values[code] = load<Real::bf16>(&bits, 0);
  }
  return values;
}

void widen_portable(const uint8_t* codes, void* operands) {
  static const std::array<float, 256> values = e4m3_values();
  auto* out = static_cast<float*>(operands);
  for (int64_t k = 0; k < kBlock; ++k) out[k] = values[codes[k]];
}

// The sum of 128 products in the order of the AVX2 kernel: 8 partial sums, then pairwise.
float dot(const float* a, const float* b) {
  float lane[8] = {};
  for (int64_t k = 0; k < kBlock; k += 8) {
    for (int64_t i = 0; i < 8; ++i) lane[i] += a[k + i] * b[k + i];
  }
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

void multiply_portable(const Strip& s) {
  alignas(64) float panel[STRIP_COLUMNS * kBlock];
  std::fill(s.sums, s.sums + s.rows * STRIP_COLUMNS, 0.0f);
  for (int64_t j = 0; j < blocks_of_k(s.K); ++j) {
    widen_panel(s, j, FP8_GEMM_PORTABLE, panel);
    const float* a = static_cast<const float*>(s.a) + j * s.rows * kBlock;
    const float* b_scale = s.b_scale + j * STRIP_COLUMNS;
    for (int64_t m = 0; m < s.rows; ++m) {
      const float a_scale = s.a_scale[j * s.rows + m];
      for (int64_t n = 0; n < STRIP_COLUMNS; ++n) {
        float& sum = s.sums[m * STRIP_COLUMNS + n];
        sum = std::fma(dot(a + m * kBlock, panel + n * kBlock), a_scale * b_scale[n], sum);
      }
    }
  }
}

template <Real type>
void add_c(const void* c, int64_t offset, float* row, int64_t count) {
  for (int64_t n = 0; n < count; ++n) row[n] += load<type>(c, offset + n);
}

template <Real type>
void round_row(const float* row, void* out, int64_t offset, int64_t count) {
  for (int64_t n = 0; n < count; ++n) store<type>(out, offset + n, row[n]);
}

}  // namespace

const Fp8GemmIsa FP8_GEMM_PORTABLE{1, 1, sizeof(float), widen_portable, multiply_portable};

const Fp8GemmIsa& fp8_gemm_isa(Isa isa) {
#if defined(__x86_64__)
  const bool dot_product =
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx512 && dot_product) return FP8_GEMM_AVX512;
  if (isa != Isa::portable) return FP8_GEMM_AVX2;
#else
  (void)isa;
#endif
  return FP8_GEMM_PORTABLE;
}

void widen_panel(const Strip& s, int64_t j, const Fp8GemmIsa& isa, void* panel) {
  PaddedBlock padded;
  int64_t k = j * kBlock;
  const int64_t prefetch = prefetch_distance(s, k, STRIP_COLUMNS);
  const uint8_t* const* b = s.b;
  if (k + kBlock > s.K) {
    b = padded.copy(s.b, STRIP_COLUMNS, k, s.K);
    k = 0;
  }
  for (int64_t n = 0; n < STRIP_COLUMNS; ++n) {
    __builtin_prefetch(s.b[n] + j * kBlock + prefetch, 0, 2);
    __builtin_prefetch(s.b[n] + j * kBlock + prefetch + 64, 0, 2);
    isa.widen(b[n] + k, static_cast<char*>(panel) + n * kBlock * isa.operand_size);
  }
}

Fp8GemmRows::Fp8GemmRows(const Fp8Gemm& gemm, const Fp8GemmIsa& isa, int64_t first, int64_t last)
    : gemm_(gemm),
      isa_(isa),
      first_(first),
      last_(last),
      tile_rows_(choose_tile_rows(isa, last - first)),
      rows_((last - first + tile_rows_ - 1) / tile_rows_ * tile_rows_),
      blocks_(blocks_of_k(gemm.K)),
      operands_(blocks_ * rows_ * kBlock * isa.operand_size),
      scales_((blocks_ * rows_ + SCALE_PADDING) * sizeof(float)) {
  std::fill_n(scales_.as<float>() + blocks_ * rows_, SCALE_PADDING, 0.0f);
}

void Fp8GemmRows::widen(int64_t first_block, int64_t last_block) {
  const Fp8Matrix& a = gemm_.a;
  for (int64_t j = first_block; j < last_block; ++j) {
    const int64_t count = std::min(kBlock, gemm_.K - j * kBlock);
    for (int64_t m = 0; m < rows_; ++m) {
      uint8_t codes[kBlock] = {};
      const bool valid = first_ + m < last_;  // else padding
      if (valid) std::memcpy(codes, a.codes + (first_ + m) * a.row_stride + j * kBlock, count);
      isa_.widen(codes, operands_.as<char>() + (j * rows_ + m) * kBlock * isa_.operand_size);
      scales_.as<float>()[j * rows_ + m] =
          valid ? a.scale[(first_ + m) * a.scale_row_stride + j * a.scale_block_stride] : 0.0f;
    }
  }
}

void Fp8GemmRows::multiply(int64_t first_strip, int64_t last_strip) const {
  const Fp8Matrix& b = gemm_.b;
  const AlignedBuffer sums(rows_ * STRIP_COLUMNS * sizeof(float));
  std::vector<float> b_scale(blocks_ * STRIP_COLUMNS + SCALE_PADDING);
  const uint8_t* rows[STRIP_COLUMNS];
  const Strip strip{operands_.as<void>(), scales_.as<float>(), rows_,   tile_rows_,      rows,
                    b.row_stride,         b_scale.data(),      gemm_.K, sums.as<float>()};
  for (int64_t i = first_strip; i < last_strip; ++i) {
    for (int64_t n = 0; n < STRIP_COLUMNS; ++n) {
      // Columns past the last one use the last row of B; store_strip() does not store them.
      const int64_t row = std::min(i * STRIP_COLUMNS + n, b.rows - 1);
      rows[n] = b.codes + row * b.row_stride;
    }
    expand_b_scale(i * STRIP_COLUMNS, b_scale.data());
    isa_.multiply(strip);
    store_strip(sums.as<float>(), i * STRIP_COLUMNS);
  }
}

// Writes scale [blocks][STRIP_COLUMNS], the scales of the columns from first_column on.
void Fp8GemmRows::expand_b_scale(int64_t first_column, float* scale) const {
  const Fp8Matrix& b = gemm_.b;
  for (int64_t j = 0; j < blocks_; ++j, scale += STRIP_COLUMNS) {
    const float* block_scale = b.scale + j * b.scale_block_stride;
    if (b.rows_per_scale % STRIP_COLUMNS == 0) {
      std::fill_n(scale, STRIP_COLUMNS, block_scale[first_column / b.rows_per_scale * b.scale_row_stride]);
      continue;
    }
    for (int64_t n = 0; n < STRIP_COLUMNS; ++n) {
      scale[n] = block_scale[std::min(first_column + n, b.rows - 1) / b.rows_per_scale * b.scale_row_stride];
    }
  }
}

// Epilogue: adds C, rounds and stores.
void Fp8GemmRows::store_strip(const float* sums, int64_t first_column) const {
  const int64_t N = gemm_.b.rows, tile_columns = isa_.tile_values / tile_rows_;
  const int64_t columns = std::min(STRIP_COLUMNS, N - first_column);
  for (int64_t m = 0; m < last_ - first_; ++m) {
    const int64_t in_tile = m % tile_rows_;
    const float* tiles = sums + (m - in_tile) * STRIP_COLUMNS + in_tile * tile_columns;
    float row[STRIP_COLUMNS];
    for (int64_t n = 0; n < STRIP_COLUMNS; n += tile_columns) {
      std::memcpy(row + n, tiles + n * tile_rows_, tile_columns * sizeof(float));
    }
    if (gemm_.c != nullptr) {
      const int64_t offset = (first_ + m) * gemm_.c_row_stride + first_column;
      switch (gemm_.c_type) {
        case Real::bf16: add_c<Real::bf16>(gemm_.c, offset, row, columns); break;
        case Real::fp16: add_c<Real::fp16>(gemm_.c, offset, row, columns); break;
        case Real::fp32: add_c<Real::fp32>(gemm_.c, offset, row, columns); break;
      }
    }
    const int64_t offset = (first_ + m) * N + first_column;
    switch (gemm_.out_type) {
      case Real::bf16: round_row<Real::bf16>(row, gemm_.out, offset, columns); break;
      case Real::fp16: round_row<Real::fp16>(row, gemm_.out, offset, columns); break;
      case Real::fp32: round_row<Real::fp32>(row, gemm_.out, offset, columns); break;
    }
  }
}

namespace {

// `x` with stride 1 along K: itself, or a copy. x: e4m3 [rows, K].
Tensor k_contiguous(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "fp8_gemm_nt: ", name, ": expected rank 2, got rank ", x.dim());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float8_e4m3fn, "fp8_gemm_nt: ", name,
                  ": expected dtype float8_e4m3fn, got ", x.scalar_type());
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

// Checks a scale tensor and returns the rows of `x` per scale: 1 or, if allowed, 128.
int64_t rows_per_scale(const char* name, const Tensor& x, const Tensor& scale, bool allow_blocks) {
  const int64_t rows = x.size(0), blocks = blocks_of_k(x.size(1));
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, "fp8_gemm_nt: ", name,
                  ": expected dtype float32, got ", scale.scalar_type());
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(1) == blocks, "fp8_gemm_nt: ", name,
                  ": expected ", blocks, " columns");
  if (scale.size(0) == rows) return 1;
  STD_TORCH_CHECK(allow_blocks && scale.size(0) == (rows + kBlock - 1) / kBlock, "fp8_gemm_nt: ",
                  name, ": expected ", rows, allow_blocks ? " rows or one per 128" : " rows",
                  ", got ", scale.size(0));
  return kBlock;
}

Fp8Matrix fp8_matrix(const Tensor& x, const Tensor& scale, int64_t scale_rows) {
  return {static_cast<const uint8_t*>(x.const_data_ptr()),
          x.size(0),
          x.stride(0),
          static_cast<const float*>(scale.const_data_ptr()),
          scale_rows,
          scale.stride(0),
          scale.stride(1)};
}

// The arguments of the kernel without `out`, checked as far as memory safety needs.
Fp8Gemm fp8_gemm(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                 ScalarType out_dtype, const std::optional<Tensor>& c) {
  const int64_t M = a.size(0), N = b.size(0), K = a.size(1);
  STD_TORCH_CHECK(b.size(1) == K, "fp8_gemm_nt: b: expected ", K, " columns, got ", b.size(1));
  Fp8Gemm gemm{};
  gemm.a = fp8_matrix(a, a_scale, rows_per_scale("a_scale", a, a_scale, false));
  gemm.b = fp8_matrix(b, b_scale, rows_per_scale("b_scale", b, b_scale, true));
  gemm.K = K;
  gemm.out_type = real_type("fp8_gemm_nt", "out_dtype", out_dtype);
  if (!c.has_value()) return gemm;
  STD_TORCH_CHECK(c->dim() == 2 && c->size(0) == M && c->size(1) == N,
                  "fp8_gemm_nt: c: expected shape (", M, ", ", N, ")");
  STD_TORCH_CHECK(N <= 1 || c->stride(1) == 1,
                  "fp8_gemm_nt: c: expected stride 1 in the last dimension, got ", c->stride(1));
  gemm.c = c->const_data_ptr();
  gemm.c_row_stride = c->stride(0);
  gemm.c_type = real_type("fp8_gemm_nt", "c", c->scalar_type());
  return gemm;
}

Tensor fp8_gemm_nt(const Tensor& a_codes, const Tensor& a_scale, const Tensor& b_codes,
                   const Tensor& b_scale, ScalarType out_dtype, const std::optional<Tensor>& c) {
  const Tensor a = k_contiguous("a", a_codes), b = k_contiguous("b", b_codes);
  Fp8Gemm gemm = fp8_gemm(a, a_scale, b, b_scale, out_dtype, c);
  const Fp8GemmIsa& isa = fp8_gemm_isa(cpu_isa());
  const int64_t M = gemm.a.rows, N = gemm.b.rows;
  Tensor out = torch::stable::new_empty(a, {M, N}, out_dtype);
  if (M * N == 0) return out;
  gemm.out = out.mutable_data_ptr();

  const int64_t blocks = blocks_of_k(gemm.K), strips = (N + STRIP_COLUMNS - 1) / STRIP_COLUMNS;
  for (int64_t first = 0; first < M; first += Fp8GemmRows::MAX_ROWS) {
    const int64_t count = std::min(M - first, Fp8GemmRows::MAX_ROWS);
    Fp8GemmRows rows(gemm, isa, first, first + count);
    // The least work of a task: 2^16 values to widen, 2^18 multiplications.
    const int64_t min_blocks = (1 << 16) / (kBlock * count);
    const int64_t min_strips = (1 << 18) / (STRIP_COLUMNS * (gemm.K + 1) * count);
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, min_blocks),
                                [&](int64_t from, int64_t to) { rows.widen(from, to); });
    torch::stable::parallel_for(0, strips, std::max<int64_t>(1, min_strips),
                                [&](int64_t from, int64_t to) { rows.multiply(from, to); });
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("fp8_gemm_nt", TORCH_BOX(&fp8_gemm_nt));
}

}  // namespace
}  // namespace deepkern
