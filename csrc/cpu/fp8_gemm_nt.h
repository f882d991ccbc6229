// FP8 matrix products with block scales, D = A·Bᵀ (+ C): see fp8_gemm_nt.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

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

// The values of D that a kernel computes at a time.
struct Tile {
  int64_t rows, columns;
};

// One strip of D before the epilogue: the argument of an instruction set's kernel.
struct Strip {
  const void* a;         // [blocks][rows][128] widened values, zero past K
  const float* a_scale;  // [blocks][rows]; 16 floats can be read from the last scale on
  int64_t rows;          // a multiple of tile.rows
  Tile tile;
  const uint8_t* const* b;  // [STRIP_COLUMNS] pointers to the codes of a row of B
  int64_t b_row_stride;     // bytes
  const float* b_scale;     // [blocks][STRIP_COLUMNS]; readable past the end as a_scale is
  int64_t K;
  float* sums;  // out: [rows / tile.rows][STRIP_COLUMNS / tile.columns][tile.rows][tile.columns]
};

// A kernel for an instruction set.
struct Fp8GemmIsa {
  Tile (*choose_tile)(int64_t rows);                    // rows: of A, without padding
  int64_t operand_size;                                 // bytes of a widened value of A
  void (*widen)(const uint8_t* codes, void* operands);  // 128 values of A
  void (*multiply)(const Strip&);
};

// The kernel for an instruction set that cpu_isa() returns: fp8_gemm_kernel.cpp, or
// fp8_gemm_nt_avx512.cpp where the CPU has AVX512_BF16 and AVX512_VBMI.
const Fp8GemmIsa& fp8_gemm_isa(Isa isa);
extern const Fp8GemmIsa FP8_GEMM_AVX512;

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

// One product. Row i of the product multiplies row a_rows[i] of A, gives row out_rows[i] of D and
// adds that row of C; the indices are 0, 1, ... where they are null.
struct Fp8Product {
  Fp8Gemm gemm;        // A's codes have stride 1 along K
  int64_t b_k_stride;  // bytes between values of a row of B: 1, or else b.row_stride is 1
  int64_t rows;
  const int32_t* a_rows;
  const int32_t* out_rows;
};

// Computes all products, in parallel over their strips.
void multiply_products(const std::vector<Fp8Product>& products);

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
