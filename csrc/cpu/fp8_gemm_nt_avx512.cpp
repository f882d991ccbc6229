// The kernel of fp8_gemm_nt for AVX-512 with VBMI and BF16.
//
// Widening: two look-ups in tables of 128 bytes turn a code into a bfloat16, which represents every
// e4m3 value exactly: five instructions for 64 codes, NaN and subnormals included. vdpbf16ps adds
// 32 products to the 16 lanes of a register, two per lane.
//
// Parallelization: within a thread; fp8_gemm_products.cpp has the threads. Up to 4 rows of A: the
// lanes are pairs of values of K, each code of B is widened in registers, and a block ends in
// horizontal sums. More rows: a block of a strip of B is widened and transposed into a panel in the
// L1 cache, and the lanes are columns.
//
// Limit: up to 4 rows, reading B; a few more, widening the panel as well; many, vdpbf16ps.
//
// Both kernels add in one order, so the bits of a row do not depend on the number of rows, except
// for the sign of a NaN. The pairs of a block are numbered as widen() stores them, 4 registers of
// 16. The pairs of lane i of these registers are added in turn. The sums of lanes 4 q to 4 q + 3
// are added in turn, then those of q = 0 to 3. One fused multiply-add by a_scale * b_scale adds the
// block to the earlier ones.
#include "fp8_gemm_nt.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// The intrinsics header of GCC 12 initializes its undefined vectors with themselves.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#define TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,fma")))
#define TARGET_INLINE TARGET inline __attribute__((always_inline))

namespace deepkern {
namespace {

struct alignas(64) Bf16Table {
  std::array<uint8_t, 128> low{}, high{};  // bytes of the bfloat16 of each magnitude
};

constexpr Bf16Table make_bf16_table() {
  Bf16Table t;
  for (unsigned code = 0; code < 128; ++code) {
    t.low[code] = e4m3_magnitude_as_bf16(code) & 0xFF;
    t.high[code] = static_cast<uint8_t>(e4m3_magnitude_as_bf16(code) >> 8);
  }
  return t;
}

constexpr Bf16Table BF16_TABLE = make_bf16_table();

constexpr int LANES = 16;
constexpr int VECTORS = STRIP_COLUMNS / LANES;  // registers for a row of a strip
constexpr int MAX_FEW_ROWS = 4;
constexpr int MAX_TILE_ROWS = 5;  // of a tile of a panel; more rows exceed the registers
constexpr int64_t BLOCK_PAIRS = kBlock / 2;

struct Tables {
  __m512i low[2], high[2];
};

TARGET_INLINE Tables load_tables() {
  const uint8_t *low = BF16_TABLE.low.data(), *high = BF16_TABLE.high.data();
  return {{_mm512_load_si512(low), _mm512_load_si512(low + 64)},
          {_mm512_load_si512(high), _mm512_load_si512(high + 64)}};
}

struct Pair {
  __m512bh first, second;
};

// 64 codes to bfloat16. Of each 16 codes, the first 8 go to `first` and the others to `second`.
TARGET_INLINE Pair widen64(const Tables& t, __m512i code) {
  const __m512i low = _mm512_permutex2var_epi8(t.low[0], code, t.low[1]);
  __m512i high = _mm512_permutex2var_epi8(t.high[0], code, t.high[1]);
  high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(-128), 0xF8);  // | code & 0x80
  return {(__m512bh)_mm512_unpacklo_epi8(low, high), (__m512bh)_mm512_unpackhi_epi8(low, high)};
}

TARGET_INLINE __m512bh load_bf16(const uint16_t* from) {
  return (__m512bh)_mm512_load_si512(from);
}

TARGET void widen(const uint8_t* codes, void* operands) {
  const Tables tables = load_tables();
  auto* out = static_cast<uint16_t*>(operands);
  for (int half = 0; half < 2; ++half) {
    const Pair p = widen64(tables, _mm512_loadu_si512(codes + 64 * half));
    _mm512_store_si512(out + 64 * half, (__m512i)p.first);
    _mm512_store_si512(out + 64 * half + 32, (__m512i)p.second);
  }
}

// Bytes from a block of a row of B to the address to prefetch: further along the row, or near its
// end the start of the row that is `columns` rows further, which is read next. The address may be
// outside B.
inline int64_t prefetch_distance(const Strip& s, int64_t k, int64_t columns, int64_t distance) {
  return k + distance < s.K ? distance : distance + columns * s.b_row_stride - s.K;
}

// Few rows.

// Lane 4 q + j of the result is the sum of the lanes 4 q to 4 q + 3 of x[j], in turn.
TARGET_INLINE __m512 sums_of_four_lanes(const __m512* x) {
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
  const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
  const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
  const __m512 lane0 = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
  const __m512 lane1 = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
  const __m512 lane2 = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
  const __m512 lane3 = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  return lane0 + lane1 + lane2 + lane3;
}

// Lane i of the result is the sum of the lanes of x[i].
TARGET_INLINE __m512 horizontal_sums(const __m512 (&x)[LANES]) {
  __m512 quarter[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) quarter[i] = sums_of_four_lanes(x + 4 * i);
  const __m512 low01 = _mm512_shuffle_f32x4(quarter[0], quarter[1], 0x44);
  const __m512 high01 = _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xEE);
  const __m512 low23 = _mm512_shuffle_f32x4(quarter[2], quarter[3], 0x44);
  const __m512 high23 = _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xEE);
  return _mm512_shuffle_f32x4(low01, low23, 0x88) + _mm512_shuffle_f32x4(low01, low23, 0xDD) +
         _mm512_shuffle_f32x4(high01, high23, 0x88) + _mm512_shuffle_f32x4(high01, high23, 0xDD);
}

// One block of K of a tile of ROWS rows of A and 16 / ROWS rows of B.
template <int ROWS>
TARGET_INLINE __m512 multiply_codes(const Tables& tables,
                                    const uint16_t* a,  // [ROWS, 128]
                                    const uint8_t* const* b, int64_t k,
                                    int64_t prefetch) {  // bytes
  constexpr int COLUMNS = LANES / ROWS;
  __m512 sum[LANES];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512bh row[ROWS][2];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      row[m][0] = load_bf16(a + m * kBlock + 64 * half);
      row[m][1] = load_bf16(a + m * kBlock + 64 * half + 32);
    }
#pragma GCC unroll 8
    for (int n = 0; n < COLUMNS; ++n) {
      const uint8_t* codes = b[n] + k + 64 * half;
      _mm_prefetch(codes + prefetch, _MM_HINT_T0);
      const Pair p = widen64(tables, _mm512_loadu_si512(codes));
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) {
        __m512& s = sum[m * COLUMNS + n];
        s = _mm512_dpbf16_ps(half == 0 ? _mm512_setzero_ps() : s, row[m][0], p.first);
        s = _mm512_dpbf16_ps(s, row[m][1], p.second);
      }
    }
  }
  return horizontal_sums(sum);
}

// a_scale * b_scale of each value of a tile.
template <int ROWS>
TARGET_INLINE __m512 tile_scale(const float* a_scale, const float* b_scale) {
  constexpr int COLUMNS = LANES / ROWS;
  const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i m = _mm512_srli_epi32(i, __builtin_ctz(COLUMNS));
  const __m512i n = _mm512_and_si512(i, _mm512_set1_epi32(COLUMNS - 1));
  return _mm512_permutexvar_ps(m, _mm512_loadu_ps(a_scale)) *
         _mm512_permutexvar_ps(n, _mm512_loadu_ps(b_scale));
}

// 16 / ROWS columns are read side by side. With 16 columns, rows of a multiple of 4096 bytes would
// not all be in the L1 cache, so a tile has at least 2 rows.
template <int ROWS>
TARGET void multiply_few_rows(const Strip& s) {
  constexpr int COLUMNS = LANES / ROWS;
  constexpr int64_t DISTANCE = ROWS == 2 ? 1024 : 1536;  // bytes, the fastest of those measured
  const Tables tables = load_tables();
  const auto* a = static_cast<const uint16_t*>(s.a);
  PaddedBlock padded;
  for (int64_t n = 0; n < STRIP_COLUMNS; n += COLUMNS) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j * kBlock < s.K; ++j) {
      const uint8_t* const* b = s.b + n;
      int64_t k = j * kBlock;
      int64_t prefetch = prefetch_distance(s, k, COLUMNS, DISTANCE);
      if (k + kBlock > s.K) {
        b = padded.copy(b, COLUMNS, k, s.K);
        k = prefetch = 0;
      }
      const __m512 block = multiply_codes<ROWS>(tables, a + j * ROWS * kBlock, b, k, prefetch);
      const __m512 scale =
          tile_scale<ROWS>(s.a_scale + j * ROWS, s.b_scale + j * STRIP_COLUMNS + n);
      sum = _mm512_fmadd_ps(block, scale, sum);
    }
    _mm512_store_ps(s.sums + n * ROWS, sum);
  }
}

// Many rows.

// Widens 64 codes of each of 16 columns of B and transposes pairs of values: panel [32 pairs][32
// columns][2], of which 16 columns are written. The pairs are in the order of K.
TARGET_INLINE void widen_16_columns(const Tables& tables, const uint8_t* const* b, int64_t k,
                                    uint16_t* panel) {
  // Pairs 8 q + 2 j and 8 q + 2 j + 1 of columns 4 c to 4 c + 3 are in quarter q of four[c][j].
  __m512i four[4][4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i x0 = _mm512_loadu_si512(b[4 * c] + k), x1 = _mm512_loadu_si512(b[4 * c + 1] + k);
    const __m512i x2 = _mm512_loadu_si512(b[4 * c + 2] + k);
    const __m512i x3 = _mm512_loadu_si512(b[4 * c + 3] + k);
    const __m512i low01 = _mm512_unpacklo_epi16(x0, x1), high01 = _mm512_unpackhi_epi16(x0, x1);
    const __m512i low23 = _mm512_unpacklo_epi16(x2, x3), high23 = _mm512_unpackhi_epi16(x2, x3);
    four[c][0] = _mm512_unpacklo_epi32(low01, low23);
    four[c][1] = _mm512_unpackhi_epi32(low01, low23);
    four[c][2] = _mm512_unpacklo_epi32(high01, high23);
    four[c][3] = _mm512_unpackhi_epi32(high01, high23);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(four[0][j], four[1][j], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(four[0][j], four[1][j], 0xEE);
    const __m512i low23 = _mm512_shuffle_i32x4(four[2][j], four[3][j], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(four[2][j], four[3][j], 0xEE);
    const __m512i quarter[4] = {
        _mm512_shuffle_i32x4(low01, low23, 0x88), _mm512_shuffle_i32x4(low01, low23, 0xDD),
        _mm512_shuffle_i32x4(high01, high23, 0x88), _mm512_shuffle_i32x4(high01, high23, 0xDD)};
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const Pair p = widen64(tables, quarter[q]);
      uint16_t* out = panel + (8 * q + 2 * j) * 2 * STRIP_COLUMNS;
      _mm512_store_si512(out, (__m512i)p.first);
      _mm512_store_si512(out + 2 * STRIP_COLUMNS, (__m512i)p.second);
    }
  }
}

// Widens a block of K of a strip to panel [64 pairs][32 columns][2].
TARGET_INLINE void widen_panel(const Tables& tables, const uint8_t* const* b, int64_t k,
                               uint16_t* panel) {
  for (int n = 0; n < STRIP_COLUMNS; n += 16) {
    widen_16_columns(tables, b + n, k, panel + 2 * n);
    widen_16_columns(tables, b + n, k + 64, panel + BLOCK_PAIRS * STRIP_COLUMNS + 2 * n);
  }
}

// A tile of ROWS rows of a strip.
template <int ROWS>
struct Sums {
  __m512 at[ROWS][VECTORS];
};

template <int ROWS>
TARGET_INLINE void add(Sums<ROWS>& x, const Sums<ROWS>& y) {
#pragma GCC unroll 5
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) x.at[m][v] += y.at[m][v];
  }
}

// Adds the four pairs of one lane in turn: pairs 0, 4, 32 and 36 of `panel`. widen() stores one in
// each register of A.
template <int ROWS>
TARGET_INLINE Sums<ROWS> multiply_lane(const uint16_t* a, const uint16_t* panel) {
  Sums<ROWS> sum;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint16_t* from = panel + (i / 2 * 32 + i % 2 * 4) * 2 * STRIP_COLUMNS;
    __m512i column[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      column[v] = _mm512_load_si512(from + 2 * LANES * v);
      asm("" : "+v"(column[v]));  // otherwise GCC loads it again for every row
    }
#pragma GCC unroll 5
    for (int m = 0; m < ROWS; ++m) {
      int32_t pair;
      std::memcpy(&pair, a + m * kBlock + 2 * LANES * i, sizeof(pair));
      const auto row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        const __m512 s = i == 0 ? _mm512_setzero_ps() : sum.at[m][v];
        sum.at[m][v] = _mm512_dpbf16_ps(s, row, (__m512bh)column[v]);
      }
    }
  }
  return sum;
}

// Adds one block of K to sums [ROWS][STRIP_COLUMNS].
template <int ROWS>
TARGET void multiply_panel(const uint16_t* a,      // [ROWS, 128]
                           const uint16_t* panel,  // [64 pairs][32 columns][2]
                           const float* a_scale, const float* b_scale, float* sums) {
  Sums<ROWS> total;
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const uint16_t* pairs = panel + 8 * q * 2 * STRIP_COLUMNS;
    Sums<ROWS> sum = multiply_lane<ROWS>(a + 8 * q, pairs);
#pragma GCC unroll 1
    for (int i = 1; i < 4; ++i) {
      add(sum, multiply_lane<ROWS>(a + 8 * q + 2 * i, pairs + i * 2 * STRIP_COLUMNS));
    }
    if (q == 0) {
      total = sum;
    } else {
      add(total, sum);
    }
#pragma GCC unroll 5
    for (int m = 0; m < ROWS; ++m) {  // the next tile of A
      _mm_prefetch(a + (ROWS + m) * kBlock + 2 * LANES * q, _MM_HINT_T0);
    }
  }
#pragma GCC unroll 5
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      float* out = sums + m * STRIP_COLUMNS + LANES * v;
      const __m512 scale = _mm512_set1_ps(a_scale[m]) * _mm512_loadu_ps(b_scale + LANES * v);
      _mm512_store_ps(out, _mm512_fmadd_ps(total.at[m][v], scale, _mm512_load_ps(out)));
    }
  }
}

TARGET void multiply_many_rows(const Strip& s) {
  constexpr int64_t DISTANCE = 256;  // bytes, the fastest of those measured
  constexpr int64_t LINES = STRIP_COLUMNS * kBlock / 64;
  alignas(64) uint16_t panel[STRIP_COLUMNS * kBlock];
  const Tables tables = load_tables();
  PaddedBlock padded;
  std::fill(s.sums, s.sums + s.rows * STRIP_COLUMNS, 0.0f);
  const int64_t tiles = (s.rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
  for (int64_t j = 0; j * kBlock < s.K; ++j) {
    const int64_t k = j * kBlock;
    const int64_t prefetch = k + prefetch_distance(s, k, STRIP_COLUMNS, DISTANCE);
    if (k + kBlock > s.K) {
      widen_panel(tables, padded.copy(s.b, STRIP_COLUMNS, k, s.K), 0, panel);
    } else {
      widen_panel(tables, s.b, k, panel);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      // A share of the lines per tile, so that few loads wait for memory at a time.
      for (int64_t i = LINES * t / tiles; i < LINES * (t + 1) / tiles; ++i) {
        _mm_prefetch(s.b[i / 2] + prefetch + i % 2 * 64, _MM_HINT_T1);
      }
      const int64_t m = s.rows * t / tiles, rows = s.rows * (t + 1) / tiles - m;
      const auto* a = static_cast<const uint16_t*>(s.a) + (j * s.rows + m) * kBlock;
      const float *a_scale = s.a_scale + j * s.rows + m, *b_scale = s.b_scale + j * STRIP_COLUMNS;
      float* sums = s.sums + m * STRIP_COLUMNS;
      switch (rows) {
        case 5:
          multiply_panel<5>(a, panel, a_scale, b_scale, sums);
          break;
        case 4:
          multiply_panel<4>(a, panel, a_scale, b_scale, sums);
          break;
        default:
          multiply_panel<3>(a, panel, a_scale, b_scale, sums);
          break;
      }
    }
  }
}

Tile choose_tile(int64_t rows) {
  if (rows > MAX_FEW_ROWS) return {1, STRIP_COLUMNS};
  return rows > 2 ? Tile{4, 4} : Tile{2, 8};
}

void multiply(const Strip& s) {
  if (s.tile.columns == STRIP_COLUMNS) return multiply_many_rows(s);
  return s.tile.rows == 4 ? multiply_few_rows<4>(s) : multiply_few_rows<2>(s);
}

}  // namespace

const Fp8GemmIsa FP8_GEMM_AVX512{choose_tile, sizeof(uint16_t), widen, multiply};

}  // namespace deepkern
#endif
