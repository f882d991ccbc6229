// d[m, n] = Σ_j a_scale[m, j] · b_scale[n or n / 128, j] · Σ_{k in block j} a[m, k] · b[n, k]
//           (+ c[m, n])
//
// Cut: threads share the strips of 32 columns of D. The rows of A (256 at a time) are widened once
// to a type that the CPU multiplies; a strip's rows of B as it comes by, 128 values of K at a time:
// for up to four rows of A in registers, for more into a panel in the L1 cache, which then meets
// all rows. Few rows are bound by reading B, one byte a weight; many by multiplication.
//
// A row's bits depend on neither M nor the threads: every tile of an instruction set adds the same
// lanes in the same order. The 128 products of a block go, as K runs, into 8 or 16 partial sums,
// these are added pairwise, and one fused multiply-add by a_scale · b_scale adds the block to the
// others. Portable and AVX2 code give the same bits (a product of two e4m3 values is exact in
// float32); AVX-512 takes the CPU's bfloat16 products, whose order is its own.
#include "fp8_gemm_nt.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace deepkern {
namespace {

constexpr int64_t kRoom = 16;  // floats that a kernel may read from the last scale on

// As few rows to a tile as hold all rows, so that it has the more columns; up to the kernel's most.
int64_t tile_rows(const Fp8GemmIsa& isa, int64_t rows) {
  int64_t height = 1;
  while (height < rows && height < isa.max_tile_rows) height *= 2;
  return height;
}

std::array<float, 256> all_codes() {
  std::array<float, 256> values;
  for (unsigned code = 0; code < 256; ++code) {
    const uint16_t bits = e4m3_magnitude_as_bf16(code) | (code & 0x80) << 8;
    values[code] = load<Real::bf16>(&bits, 0);
  }
  return values;
}

void widen_portable(const uint8_t* codes, void* operands) {
  static const std::array<float, 256> values = all_codes();
  auto* out = static_cast<float*>(operands);
  for (int64_t k = 0; k < kBlock; ++k) out[k] = values[codes[k]];
}

// The sum of 128 products in the order of the AVX2 kernel: eight partial sums, then pairwise.
float dot(const float* a, const float* b) {
  float lane[8] = {};
  for (int64_t k = 0; k < kBlock; k += 8) {
    for (int64_t i = 0; i < 8; ++i) lane[i] += a[k + i] * b[k + i];
  }
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

void multiply_portable(const Strip& s) {
  alignas(64) float panel[kStrip * kBlock];
  std::fill(s.sums, s.sums + s.rows * kStrip, 0.0f);
  for (int64_t j = 0; j < blocks_of_k(s.K); ++j) {
    widen_panel(s, j, kFp8GemmPortable, panel);
    const float* a = static_cast<const float*>(s.a) + j * s.rows * kBlock;
    const float* b_scale = s.b_scale + j * kStrip;
    for (int64_t m = 0; m < s.rows; ++m) {
      const float a_scale = s.a_scale[j * s.rows + m];
      for (int64_t n = 0; n < kStrip; ++n) {
        float& sum = s.sums[m * kStrip + n];
        sum = std::fma(dot(a + m * kBlock, panel + n * kBlock), a_scale * b_scale[n], sum);
      }
    }
  }
}

template <Real type>
void add_c(const void* c, int64_t from, float* row, int64_t count) {
  for (int64_t n = 0; n < count; ++n) row[n] += load<type>(c, from + n);
}

template <Real type>
void round_row(const float* row, void* out, int64_t to, int64_t count) {
  for (int64_t n = 0; n < count; ++n) store<type>(out, to + n, row[n]);
}

}  // namespace

const Fp8GemmIsa kFp8GemmPortable{1, 1, sizeof(float), widen_portable, multiply_portable};

const Fp8GemmIsa& fp8_gemm_isa(const char* isa) {
#if defined(__x86_64__)
  const bool avx512 = std::strcmp(isa, "avx512") == 0;
  if (avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16")) {
    return kFp8GemmAvx512;
  }
  const bool avx2 = avx512 || std::strcmp(isa, "avx2") == 0;
  unsigned eax, ebx, ecx = 0, edx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  if (avx2 && (ecx & bit_FMA) && (ecx & bit_F16C)) return kFp8GemmAvx2;
#else
  (void)isa;
#endif
  return kFp8GemmPortable;
}

void widen_panel(const Strip& s, int64_t j, const Fp8GemmIsa& isa, void* panel) {
  Tail tail;
  int64_t k = j * kBlock;
  const int64_t next = ahead(s, k, kStrip);
  const uint8_t* const* b = s.b;
  if (k + kBlock > s.K) {
    b = tail.copy(s.b, kStrip, k, s.K);
    k = 0;
  }
  for (int64_t n = 0; n < kStrip; ++n) {
    __builtin_prefetch(s.b[n] + j * kBlock + next, 0, 2);
    __builtin_prefetch(s.b[n] + j * kBlock + next + 64, 0, 2);
    isa.widen(b[n] + k, static_cast<char*>(panel) + n * kBlock * isa.operand_size);
  }
}

Fp8GemmRows::Fp8GemmRows(const Fp8Gemm& gemm, const Fp8GemmIsa& isa, int64_t first, int64_t last)
    : gemm_(gemm),
      isa_(isa),
      first_(first),
      last_(last),
      tile_rows_(tile_rows(isa, last - first)),
      rows_((last - first + tile_rows_ - 1) / tile_rows_ * tile_rows_),
      blocks_(blocks_of_k(gemm.K)),
      operands_(blocks_ * rows_ * kBlock * isa.operand_size),
      scales_((blocks_ * rows_ + kRoom) * sizeof(float)) {
  std::fill_n(scales_.as<float>() + blocks_ * rows_, kRoom, 0.0f);
}

void Fp8GemmRows::widen(int64_t first_block, int64_t last_block) {
  const Fp8Matrix& a = gemm_.a;
  for (int64_t j = first_block; j < last_block; ++j) {
    const int64_t count = std::min(kBlock, gemm_.K - j * kBlock);
    for (int64_t m = 0; m < rows_; ++m) {
      uint8_t codes[kBlock] = {};
      const bool inside = first_ + m < last_;
      if (inside) std::memcpy(codes, a.codes + (first_ + m) * a.row_stride + j * kBlock, count);
      isa_.widen(codes, operands_.as<char>() + (j * rows_ + m) * kBlock * isa_.operand_size);
      scales_.as<float>()[j * rows_ + m] =
          inside ? a.scale[(first_ + m) * a.scale_row_stride + j * a.scale_block_stride] : 0.0f;
    }
  }
}

void Fp8GemmRows::multiply(int64_t first_strip, int64_t last_strip) const {
  const Fp8Matrix& b = gemm_.b;
  const Scratch sums(rows_ * kStrip * sizeof(float));
  std::vector<float> b_scale(blocks_ * kStrip + kRoom);
  const uint8_t* rows[kStrip];
  const Strip strip{operands_.as<void>(), scales_.as<float>(), rows_,   tile_rows_,      rows,
                    b.row_stride,         b_scale.data(),      gemm_.K, sums.as<float>()};
  for (int64_t i = first_strip; i < last_strip; ++i) {
    for (int64_t n = 0; n < kStrip; ++n) {
      // Past the last column its row of B stands in; what comes of it is not stored.
      const int64_t row = std::min(i * kStrip + n, b.rows - 1);
      rows[n] = b.codes + row * b.row_stride;
    }
    spread_b_scale(i * kStrip, b_scale.data());
    isa_.multiply(strip);
    finish(sums.as<float>(), i * kStrip);
  }
}

// scale [blocks][kStrip] of the columns from first_column on.
void Fp8GemmRows::spread_b_scale(int64_t first_column, float* scale) const {
  const Fp8Matrix& b = gemm_.b;
  for (int64_t j = 0; j < blocks_; ++j, scale += kStrip) {
    const float* from = b.scale + j * b.scale_block_stride;
    if (b.rows_per_scale % kStrip == 0) {
      std::fill_n(scale, kStrip, from[first_column / b.rows_per_scale * b.scale_row_stride]);
      continue;
    }
    for (int64_t n = 0; n < kStrip; ++n) {
      const int64_t row = std::min(first_column + n, b.rows - 1);
      scale[n] = from[row / b.rows_per_scale * b.scale_row_stride];
    }
  }
}

// Adds C and rounds.
void Fp8GemmRows::finish(const float* sums, int64_t first_column) const {
  const int64_t N = gemm_.b.rows, tile_columns = isa_.sums / tile_rows_;
  const int64_t columns = std::min(kStrip, N - first_column);
  for (int64_t m = 0; m < last_ - first_; ++m) {
    const int64_t in_tile = m % tile_rows_;
    const float* tiles = sums + (m - in_tile) * kStrip + in_tile * tile_columns;
    float row[kStrip];
    for (int64_t n = 0; n < kStrip; n += tile_columns) {
      std::memcpy(row + n, tiles + n * tile_rows_, tile_columns * sizeof(float));
    }
    if (gemm_.c != nullptr) {
      const int64_t from = (first_ + m) * gemm_.c_row_stride + first_column;
      switch (gemm_.c_type) {
        case Real::bf16: add_c<Real::bf16>(gemm_.c, from, row, columns); break;
        case Real::fp16: add_c<Real::fp16>(gemm_.c, from, row, columns); break;
        case Real::fp32: add_c<Real::fp32>(gemm_.c, from, row, columns); break;
      }
    }
    const int64_t to = (first_ + m) * N + first_column;
    switch (gemm_.out_type) {
      case Real::bf16: round_row<Real::bf16>(row, gemm_.out, to, columns); break;
      case Real::fp16: round_row<Real::fp16>(row, gemm_.out, to, columns); break;
      case Real::fp32: round_row<Real::fp32>(row, gemm_.out, to, columns); break;
    }
  }
}

}  // namespace deepkern
