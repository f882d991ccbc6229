// The mainloop of the kernel in fp8_gemm_nt_avx512.cpp.
//
// That file defines the macro TARGET, the function attribute of its instruction set, and then
// includes this header. `Simd` is a struct of that file with
//   Vector, Element        a register of floats; a widened value of A or B
//   TILE_VALUES            floats in a Vector: one output tile fills one register
//   PANEL_COLUMNS          columns of a tile of 4 rows, TILE_VALUES / 4
//   Tables, tables()       registers that widening needs, loaded once for a strip
//   zero, load, store, fma
//   tile_of_codes<ROWS>    one block of K of a tile whose rows of B are FP8 codes
//   tile_of_panel          one block of K of a tile of 4 rows, B widened
//   tile_scale<ROWS>       a_scale * b_scale of each value of a tile
#pragma once

#include <algorithm>

#include "fp8_gemm_nt.h"

namespace deepkern {
namespace {

// Bytes from a block of a row of B to the address to prefetch: further along the row, or near its
// end the start of the row that is `columns` rows further, which is read next. The address may be
// outside B.
inline int64_t prefetch_distance(const Strip& s, int64_t k, int64_t columns) {
  constexpr int64_t DISTANCE = 1536;
  return k + DISTANCE < s.K ? DISTANCE : DISTANCE + columns * s.b_row_stride - s.K;
}

// Widens block j of a strip's rows of B to panel [STRIP_COLUMNS][128], zero past K.
inline void widen_panel(const Strip& s, int64_t j, const Fp8GemmIsa& isa, void* panel) {
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

// A has ROWS rows (1, 2 or 4): each code of B is widened in registers and used once.
template <class Simd, int ROWS>
TARGET void multiply_few_rows(const Strip& s) {
  constexpr int COLUMNS = Simd::TILE_VALUES / ROWS;
  const typename Simd::Tables tables = Simd::tables();
  const auto* a = static_cast<const typename Simd::Element*>(s.a);
  PaddedBlock padded;
  for (int64_t n = 0; n < STRIP_COLUMNS; n += COLUMNS) {
    typename Simd::Vector sum = Simd::zero();
    for (int64_t j = 0; j * kBlock < s.K; ++j) {
      const uint8_t* const* b = s.b + n;
      int64_t k = j * kBlock;
      const int64_t prefetch = prefetch_distance(s, k, COLUMNS);
      if (k + kBlock > s.K) {
        b = padded.copy(b, COLUMNS, k, s.K);
        k = 0;
      }
      const typename Simd::Vector block =
          Simd::template tile_of_codes<ROWS>(tables, a + j * ROWS * kBlock, b, k, prefetch);
      const typename Simd::Vector scale =
          Simd::template tile_scale<ROWS>(s.a_scale + j * ROWS, s.b_scale + j * STRIP_COLUMNS + n);
      sum = Simd::fma(block, scale, sum);
    }
    Simd::store(s.sums + n * ROWS, sum);
  }
}

// A has a multiple of 4 rows: a block of B is widened into a panel in L1 and used by all rows.
template <class Simd>
TARGET void multiply_many_rows(const Strip& s, const Fp8GemmIsa& isa) {
  alignas(64) typename Simd::Element panel[STRIP_COLUMNS * kBlock];
  std::fill(s.sums, s.sums + s.rows * STRIP_COLUMNS, 0.0f);
  for (int64_t j = 0; j * kBlock < s.K; ++j) {
    widen_panel(s, j, isa, panel);
    const auto* a = static_cast<const typename Simd::Element*>(s.a) + j * s.rows * kBlock;
    float* sums = s.sums;
    for (int64_t m = 0; m < s.rows; m += 4) {
      for (int64_t n = 0; n < STRIP_COLUMNS; n += Simd::PANEL_COLUMNS, sums += Simd::TILE_VALUES) {
        const typename Simd::Vector block = Simd::tile_of_panel(a + m * kBlock, panel + n * kBlock);
        const typename Simd::Vector scale = Simd::template tile_scale<4>(
            s.a_scale + j * s.rows + m, s.b_scale + j * STRIP_COLUMNS + n);
        Simd::store(sums, Simd::fma(block, scale, Simd::load(sums)));
      }
    }
  }
}

template <class Simd>
void multiply_strip(const Strip& s, const Fp8GemmIsa& isa) {
  if (s.rows > 4) return multiply_many_rows<Simd>(s, isa);
  if (s.rows == 4) return multiply_few_rows<Simd, 4>(s);
  return s.rows == 2 ? multiply_few_rows<Simd, 2>(s) : multiply_few_rows<Simd, 1>(s);
}

}  // namespace
}  // namespace deepkern
