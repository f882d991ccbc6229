// FP8 matrix product with block scales, D = A·Bᵀ (+ C): see fp8_gemm_nt.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "../fp8_gemm.h"
#include "isa.h"
#include "real.h"

namespace deepkern {

constexpr int64_t kBlock = BLOCK;
constexpr int64_t STRIP_COLUMNS = 32;  // columns of D that one task computes; divides kBlock

inline int64_t blocks_of_k(int64_t K) { return (K + kBlock - 1) / kBlock; }

// An uninitialized buffer, aligned to 64 bytes.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t bytes)
      : memory_(static_cast<char*>(::operator new(bytes, std::align_val_t(64)))) {}
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> memory_;
};

// One strip of D before the epilogue: the argument of an instruction set's kernel. The kernel
// computes it in tiles of tile_rows x tile_columns = Fp8GemmIsa::tile_values values.
struct Strip {
  const void* a;         // [blocks][rows][128] widened values, zero past K
  const float* a_scale;  // [blocks][rows]; 16 floats can be read from the last scale on
  int64_t rows;          // a multiple of tile_rows
  int64_t tile_rows;
  const uint8_t* const* b;  // [STRIP_COLUMNS] pointers to the codes of a row of B
  int64_t b_row_stride;     // bytes
  const float* b_scale;     // [blocks][STRIP_COLUMNS]; readable past the end as a_scale is
  int64_t K;
  float* sums;  // out: [rows / tile_rows][STRIP_COLUMNS / tile_columns][tile_rows][tile_columns]
};

// A kernel and the properties of its tiles.
struct Fp8GemmIsa {
  int64_t tile_values;    // tile_rows * tile_columns
  int64_t max_tile_rows;  // a power of two
  int64_t operand_size;   // bytes of a widened value
  void (*widen)(const uint8_t* codes, void* operands);  // 128 values
  void (*multiply)(const Strip&);
};

extern const Fp8GemmIsa FP8_GEMM_PORTABLE, FP8_GEMM_AVX2, FP8_GEMM_AVX512;

// Bytes from a block of a row of B to the address to prefetch: further along the row, or near its
// end the start of the row that is `columns` rows further, which is read next. The address may be
// outside B.
inline int64_t prefetch_distance(const Strip& s, int64_t k, int64_t columns) {
  constexpr int64_t DISTANCE = 1536;
  return k + DISTANCE < s.K ? DISTANCE : DISTANCE + columns * s.b_row_stride - s.K;
}

// A copy of the last block of up to STRIP_COLUMNS rows of B, zero past K, for a K that is not a
// multiple of 128.
class PaddedBlock {
 public:
  const uint8_t* const* copy(const uint8_t* const* b, int64_t columns, int64_t k, int64_t K) {
    for (int64_t n = 0; n < columns; ++n) {
      std::memset(codes_[n], 0, kBlock);
      rows_[n] = static_cast<uint8_t*>(std::memcpy(codes_[n], b[n] + k, K - k));
    }
    return rows_;
  }

 private:
  uint8_t codes_[STRIP_COLUMNS][kBlock];
  const uint8_t* rows_[STRIP_COLUMNS];
};

// Widens block j of a strip's rows of B to panel [STRIP_COLUMNS][128], zero past K.
void widen_panel(const Strip& strip, int64_t j, const Fp8GemmIsa& isa, void* panel);

// The kernel for an instruction set that cpu_isa() returns. "avx512" without AVX512_BF16 and
// AVX512_VBMI gets the AVX2 kernel.
const Fp8GemmIsa& fp8_gemm_isa(Isa isa);

// The product of rows [first, last) of A with all of B. The rows of A are widened once and used by
// all strips. Several threads may call widen(), each for its own range of blocks of K; after that
// several threads may call multiply(), each for its own range of strips.
class Fp8GemmRows {
 public:
  Fp8GemmRows(const Fp8Gemm& gemm, const Fp8GemmIsa& isa, int64_t first, int64_t last);
  void widen(int64_t first_block, int64_t last_block);
  void multiply(int64_t first_strip, int64_t last_strip) const;

  static constexpr int64_t MAX_ROWS = 256;  // the widened rows stay in the L2 or L3 cache

 private:
  void expand_b_scale(int64_t first_column, float* scale) const;
  void store_strip(const float* sums, int64_t first_column) const;

  const Fp8Gemm& gemm_;
  const Fp8GemmIsa& isa_;
  const int64_t first_, last_, tile_rows_, rows_, blocks_;  // rows_: padded to whole tiles
  const AlignedBuffer operands_, scales_;
};

// The bits of the magnitude of an e4m3 code as bfloat16, which represents it exactly.
constexpr uint16_t e4m3_magnitude_as_bf16(unsigned code) {
  const unsigned exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 0x7F) == 0x7F) return 0x7FC0;
  if (exponent != 0) return static_cast<uint16_t>((exponent + 120) << 7 | mantissa << 4);
  if (mantissa == 0) return 0;
  // Subnormal: mantissa * 2^-9. The leading one is bit `shift` of the mantissa.
  const unsigned shift = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;
  return static_cast<uint16_t>((118 + shift) << 7 | (mantissa << (7 - shift) & 0x7F));
}

}  // namespace deepkern
