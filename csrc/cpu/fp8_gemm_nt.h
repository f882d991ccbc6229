// FP8 matrix product with block scales, D = A·Bᵀ (+ C): see fp8_gemm_nt.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "../fp8_gemm.h"
#include "real.h"

namespace deepkern {

constexpr int64_t kBlock = BLOCK;
constexpr int64_t kStrip = 32;   // columns of D that are computed together; divides kBlock

inline int64_t blocks_of_k(int64_t K) { return (K + kBlock - 1) / kBlock; }

// Uninitialised memory at a multiple of 64 bytes.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
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

// One strip of D before C and rounding: what an instruction set's kernel is given. The strip is cut
// into tiles of tile_rows x tile_columns values, as many as the kernel has sums to add up at once.
struct Strip {
  const void* a;         // [blocks][rows][128], widened, zero past K
  const float* a_scale;  // [blocks][rows], and room to read 16 floats from the last
  int64_t rows;          // a multiple of tile_rows
  int64_t tile_rows;
  const uint8_t* const* b;  // the codes of kStrip rows of B
  int64_t b_row;            // bytes from a row to the next
  const float* b_scale;     // [blocks][kStrip], and room as above
  int64_t K;
  float* sums;  // out: [rows / tile_rows][kStrip / tile_columns][tile_rows][tile_columns]
};

struct Fp8GemmIsa {
  int64_t sums;           // tile_rows * tile_columns
  int64_t max_tile_rows;  // a power of two
  int64_t operand_size;   // bytes of a widened value
  void (*widen)(const uint8_t* codes, void* operands);  // 128 of them
  void (*multiply)(const Strip&);
};

extern const Fp8GemmIsa kFp8GemmPortable, kFp8GemmAvx2, kFp8GemmAvx512;

// How far past a block of a row of B lies what to ask memory for: further along in the row, or near
// its end the start of the row `columns` below, whose turn is next. (May lie outside B.)
inline int64_t ahead(const Strip& s, int64_t k, int64_t columns) {
  constexpr int64_t kAhead = 1536;
  return k + kAhead < s.K ? kAhead : kAhead + columns * s.b_row - s.K;
}

// A block of some rows of B that K cuts off, with zeros after it.
class Tail {
 public:
  const uint8_t* const* copy(const uint8_t* const* b, int64_t columns, int64_t k, int64_t K) {
    for (int64_t n = 0; n < columns; ++n) {
      std::memset(codes_[n], 0, kBlock);
      rows_[n] = static_cast<uint8_t*>(std::memcpy(codes_[n], b[n] + k, K - k));
    }
    return rows_;
  }

 private:
  uint8_t codes_[kStrip][kBlock];
  const uint8_t* rows_[kStrip];
};

// Widens block j of a strip's rows of B to [kStrip][128], zero past K.
void widen_panel(const Strip& strip, int64_t j, const Fp8GemmIsa& isa, void* panel);

// The kernels for what cpu_isa() says. Without AVX512_BF16 and AVX512_VBMI, "avx512" is served by
// those of AVX2.
const Fp8GemmIsa& fp8_gemm_isa(const char* isa);

// Some rows of A, widened once for all strips. widen() and multiply() may each be called by several
// threads, on ranges of blocks of K and of strips.
class Fp8GemmRows {
 public:
  Fp8GemmRows(const Fp8Gemm& gemm, const Fp8GemmIsa& isa, int64_t first, int64_t last);
  void widen(int64_t first_block, int64_t last_block);
  void multiply(int64_t first_strip, int64_t last_strip) const;

  static constexpr int64_t kMost = 256;  // rows: what is widened stays in the L2 or L3 cache

 private:
  void spread_b_scale(int64_t first_column, float* scale) const;
  void finish(const float* sums, int64_t first_column) const;

  const Fp8Gemm& gemm_;
  const Fp8GemmIsa& isa_;
  const int64_t first_, last_, tile_rows_, rows_, blocks_;  // rows_: padded to whole tiles
  const Scratch operands_, scales_;
};

// The bits of code's magnitude (sign left out) in bfloat16, which holds every e4m3 value.
constexpr uint16_t e4m3_magnitude_as_bf16(unsigned code) {
  const unsigned exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 0x7F) == 0x7F) return 0x7FC0;
  if (exponent != 0) return static_cast<uint16_t>((exponent + 120) << 7 | mantissa << 4);
  if (mantissa == 0) return 0;
  const unsigned top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;  // 2^-9 counts as one
  return static_cast<uint16_t>((118 + top) << 7 | (mantissa << (7 - top) & 0x7F));
}

}  // namespace deepkern
