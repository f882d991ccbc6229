// The kernel of the FP8 matrix products for float32 vectors: portable code, AVX2 and AVX-512.
//
// Parallelization: within a thread. Few rows of A: each code of B is widened in registers and
// multiplied by up to 4 rows; the lanes are values of K, so a block ends in horizontal sums. Many
// rows: a block of a strip of B is widened and transposed into a panel in the L1 cache; the lanes
// are columns and a tile of 6 rows x 2 vectors stays in registers.
//
// Limit: few rows, reading B and widening it, about 0.6 instructions per code. Many rows, the FMA
// units.
//
// Both kernels add in one order, so the bits of a row do not depend on the number of rows. LANES
// consecutive words of four codes are a group of K, and lane i adds the products of word i of each
// group, in the order of K. The sums of the lanes are added pairwise. One fused multiply-add by
// a_scale * b_scale adds the block's sum to those of the earlier blocks.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <array>
#include <cmath>

#include "fp8_gemm_nt.h"

#define DEEPKERN_FILE "cpu/fp8_gemm_kernel.cpp"
#include "every_isa.h"

namespace deepkern {

const Fp8GemmIsa& fp8_gemm_isa(Isa isa) {
#if defined(__x86_64__)
  static const bool dot_product =
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx512) return dot_product ? FP8_GEMM_AVX512 : avx512::KERNEL;
  if (isa == Isa::avx2) return avx2::KERNEL;
#endif
  (void)isa;
  return portable::KERNEL;
}

}  // namespace deepkern
#else
namespace deepkern::DEEPKERN_ISA {
namespace {

constexpr int64_t MAX_FEW_ROWS = 12;  // from there on, widening into a panel is faster
constexpr int PANEL_COLUMNS = 2 * LANES;

// Codes are widened to multiples of their value that are cheap: powers of two, which no sum of
// products of two e4m3 values over a block overflows or rounds.
constexpr float A_FACTOR = 0x1p60f;        // a widened value of A / its value
constexpr float CODE_FACTOR = 0x1p-120f;   // a value of codes_as_floats() / the code's value
#if defined(DEEPKERN_AVX2) || defined(DEEPKERN_AVX512)
constexpr float PANEL_FACTOR = 0x1p-8f;  // a value of a panel / the code's value
#else
constexpr float PANEL_FACTOR = 1.0f;
#endif

// The codes of each word, the lowest byte first, as float32 values with the code's exponent. They
// are exactly the codes' values times CODE_FACTOR; a subnormal code is a subnormal float. NaN is
// 480.
DEEPKERN_INLINE void codes_as_floats(Ints codes, Floats (&value)[4]) {
  // The sign and the magnitude of a code are 4 bits apart in a float32, so its upper byte starts
  // with copies of the sign.
  typedef int16_t Words __attribute__((vector_size(4 * LANES)));
  constexpr auto MASK = static_cast<int32_t>(0x87F00000);
  const Ints odd = (Ints)((Words)codes >> 4), even = (Ints)((Words)codes << 8 >> 4);
  value[0] = floats_of(even << 16 & MASK);
  value[1] = floats_of(odd << 16 & MASK);
  value[2] = floats_of(even & MASK);
  value[3] = floats_of(odd & MASK);
}

// A value of codes_as_floats() with NaN as NaN.
DEEPKERN_INLINE Floats with_nan(Floats value) {
  const Ints bits = bits_of(value);
  return floats_of((bits & 0x07F00000) == 0x07F00000 ? bits | 0x7FC00000 : bits);
}

// 4 * LANES codes.
typedef uint8_t Codes __attribute__((vector_size(4 * LANES)));

DEEPKERN_INLINE bool any(Codes mask) {
#if defined(DEEPKERN_AVX512)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(DEEPKERN_AVX2)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  uint64_t words[2];
  store_vector(words, mask);
  return (words[0] | words[1]) != 0;
#endif
}

// 128 values of A in the order in which the kernels use them: of each group of K the first codes of
// all words, then the second ones, and so on.
void widen(const uint8_t* codes, void* operands) {
  auto* out = static_cast<float*>(operands);
  for (int k = 0; k < kBlock; k += 4 * LANES) {
    const Ints words = load_vector<Ints>(codes + k);
    for (int i = 0; i < 4; ++i) {
      store_vector(out + k + i * LANES, widen_e4m3((words >> 8 * i) & 0xFF) * A_FACTOR);
    }
  }
}

// Few rows.

// a_scale * b_scale of each value of a tile of ROWS rows.
template <int ROWS>
DEEPKERN_INLINE Floats tile_scale(const float* a_scale, const float* b_scale) {
  constexpr int COLUMNS = LANES / ROWS;
#if defined(DEEPKERN_AVX512)
  const Ints m = lane_index() / COLUMNS, n = lane_index() & (COLUMNS - 1);
  return (Floats)_mm512_permutexvar_ps((__m512i)m, _mm512_loadu_ps(a_scale)) *
         (Floats)_mm512_permutexvar_ps((__m512i)n, _mm512_loadu_ps(b_scale));
#elif defined(DEEPKERN_AVX2)
  const Ints m = lane_index() / COLUMNS, n = lane_index() & (COLUMNS - 1);
  return (Floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(a_scale), (__m256i)m) *
         (Floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(b_scale), (__m256i)n);
#else
  Floats scale;
  for (int i = 0; i < LANES; ++i) scale[i] = a_scale[i / COLUMNS] * b_scale[i % COLUMNS];
  return scale;
#endif
}

// Blocks to prefetch, 128 bytes each. The addresses may be outside B.
struct Prefetch {
  const uint8_t* block;
  int64_t stride;  // bytes
};

// One block of K of a tile of ROWS rows of A and LANES / ROWS rows of B, times A_FACTOR *
// CODE_FACTOR. NaN in B counts only if WITH_NAN; `largest` is the largest magnitude of a code of B.
template <int ROWS, bool WITH_NAN>
DEEPKERN_INLINE Floats multiply_codes(const float* a, const uint8_t* const* b, int64_t k,
                                      Prefetch prefetch, Codes& largest) {
  constexpr int COLUMNS = LANES / ROWS;
  Floats sum[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) sum[i] = Floats{};
#pragma GCC unroll 16
  for (int n = 0; n < COLUMNS; ++n) {
    __builtin_prefetch(prefetch.block + n * prefetch.stride);
    __builtin_prefetch(prefetch.block + n * prefetch.stride + 64);
  }
#pragma GCC unroll 1
  for (int group = 0; group < kBlock; group += 4 * LANES) {
#pragma GCC unroll 16
    for (int n = 0; n < COLUMNS; ++n) {
      const Ints codes = load_vector<Ints>(b[n] + k + group);
      const Codes magnitude = (Codes)(codes & 0x7F7F7F7F);
      largest = largest > magnitude ? largest : magnitude;
      const float* row = a + group;
      // For GCC these are other addresses. Otherwise it loads all rows before the first column,
      // for which there are too few registers.
      asm volatile("" : "+r"(row));
      Floats value[4];
      codes_as_floats(codes, value);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Floats x = WITH_NAN ? with_nan(value[i]) : value[i];
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; ++m) {
          Floats& s = sum[m * COLUMNS + n];
          s = fma(load_vector<Floats>(row + m * kBlock + i * LANES), x, s);
        }
      }
    }
  }
  return sums_of_lanes(sum);
}

// The same for the values of A and B; NaN in B makes it slower.
template <int ROWS>
DEEPKERN_INLINE Floats multiply_block(const float* a, const uint8_t* const* b, int64_t k,
                                      Prefetch prefetch) {
  Codes largest{};
  Floats sum = multiply_codes<ROWS, false>(a, b, k, prefetch, largest);
  if (any((Codes)(largest == 0x7F))) sum = multiply_codes<ROWS, true>(a, b, k, prefetch, largest);
  return sum * (1 / (A_FACTOR * CODE_FACTOR));
}

// A block of K of COLUMNS columns of B, in a chunk of K. The blocks of a chunk of all columns of a
// tile are multiplied before the next tile.
struct Position {
  int64_t n, k, chunk, end;
};

// What a block prefetches. The CPU recognizes long rows that are read side by side, so the distance
// is short. Several short rows are on one page of memory; reading them side by side follows no
// pattern that the CPU recognizes, so the next tile is prefetched in the order of memory. For a tile
// of 4 rows multiplications are the limit, and the distance is short, too.
template <int COLUMNS, int64_t CHUNK>
DEEPKERN_INLINE Prefetch choose_prefetch(const Strip& s, Position at) {
  constexpr int64_t SHORT_ROW = 2048, AHEAD = 512;
  // Bytes from the chunk of this tile to that of the next one, in the next strip at last.
  int64_t next = COLUMNS * s.b_row_stride;
  if (at.n + COLUMNS == STRIP_COLUMNS) {
    next += at.chunk + CHUNK < s.K ? CHUNK - STRIP_COLUMNS * s.b_row_stride : -at.chunk;
  }
  if (COLUMNS < LANES / 2 || s.b_row_stride > SHORT_ROW) {
    const int64_t ahead = at.k + AHEAD < at.end ? 0 : next - (at.end - at.chunk);
    return {s.b[at.n] + at.k + AHEAD + ahead, s.b_row_stride};
  }
  const int64_t blocks = blocks_of_k(at.end - at.chunk);
  const int64_t i = (at.k - at.chunk) / kBlock * COLUMNS;  // in the next tile
  return {s.b[at.n + i / blocks] + at.chunk + next + i % blocks * kBlock, kBlock};
}

// A chunk of A, 8 KB, stays in the L1 cache. A column of B is read a chunk at a time:
// reading all columns of a block would map to few sets of the cache if K is a multiple of 1024.
template <int ROWS>
void multiply_few_rows(const Strip& s) {
  constexpr int COLUMNS = LANES / ROWS;
  constexpr int64_t CHUNK = 16 / ROWS * kBlock;
  const auto* a = static_cast<const float*>(s.a);
  PaddedBlock padded;
  std::fill(s.sums, s.sums + s.rows * STRIP_COLUMNS, 0.0f);
  for (int64_t chunk = 0; chunk < s.K; chunk += CHUNK) {
    const int64_t end = std::min(chunk + CHUNK, s.K);
    for (int64_t n = 0; n < STRIP_COLUMNS; n += COLUMNS) {
      for (int64_t k = chunk; k < end; k += kBlock) {
        const int64_t j = k / kBlock;
        const bool partial = k + kBlock > s.K;
        const uint8_t* const* b = partial ? padded.copy(s.b + n, COLUMNS, k, s.K) : s.b + n;
        const Prefetch prefetch = choose_prefetch<COLUMNS, CHUNK>(s, {n, k, chunk, end});
        for (int64_t m = 0; m < s.rows; m += ROWS) {
          const Floats block = multiply_block<ROWS>(a + (j * s.rows + m) * kBlock, b,
                                                    partial ? 0 : k, prefetch);
          const Floats scale =
              tile_scale<ROWS>(s.a_scale + j * s.rows + m, s.b_scale + j * STRIP_COLUMNS + n);
          float* sums = s.sums + m * STRIP_COLUMNS + n * ROWS;
          store_vector(sums, fma(block, scale, load_vector<Floats>(sums)));
        }
      }
    }
  }
}

// Many rows.

// Where column n of row k of a panel is.
DEEPKERN_INLINE float* panel_at(float* panel, int64_t k, int64_t n) {
  return panel + (n / PANEL_COLUMNS * kBlock + k) * PANEL_COLUMNS + n % PANEL_COLUMNS;
}

#if defined(DEEPKERN_AVX2) || defined(DEEPKERN_AVX512)
// 16 codes as 16 fp16 values, times PANEL_FACTOR. See widen_e4m3() in simd.h.
DEEPKERN_INLINE __m256i halves_of_codes(__m128i codes) {
  __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
  half = _mm256_and_si256(half, _mm256_set1_epi16(static_cast<int16_t>(0xBFFF)));
  const __m256i carry = _mm256_add_epi16(half, _mm256_set1_epi16(0x80));
  return _mm256_or_si256(half, _mm256_and_si256(carry, _mm256_set1_epi16(0x4000)));
}

// Interleaves the low or the high halves of x[i] and x[i + 8], in each 128-bit lane.
DEEPKERN_INLINE void interleave_bytes(const __m256i (&x)[16], __m256i (&y)[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    y[2 * i] = _mm256_unpacklo_epi8(x[i], x[i + 8]);
    y[2 * i + 1] = _mm256_unpackhi_epi8(x[i], x[i + 8]);
  }
}

// 16 values of K of all columns: the codes are transposed as bytes, 16 columns in each half of a
// register. Four rounds of interleaving rotate the bits of the byte's index by four.
DEEPKERN_INLINE void widen_16(const uint8_t* const* b, int64_t k, int64_t row, float* panel) {
  __m256i x[16], y[16];
#pragma GCC unroll 16
  for (int n = 0; n < 16; ++n) {
    const auto* low = reinterpret_cast<const __m128i*>(b[n] + k);
    const auto* high = reinterpret_cast<const __m128i*>(b[n + 16] + k);
    x[n] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                   _mm_loadu_si128(high), 1);
  }
  interleave_bytes(x, y);
  interleave_bytes(y, x);
  interleave_bytes(x, y);
  interleave_bytes(y, x);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i h = halves_of_codes(half == 0 ? _mm256_castsi256_si128(x[i])
                                                  : _mm256_extracti128_si256(x[i], 1));
      float* out = panel_at(panel, row + i, 16 * half);
      _mm256_store_ps(out, _mm256_cvtph_ps(_mm256_castsi256_si128(h)));
      _mm256_store_ps(out + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)));
    }
  }
}
#endif

// Widens a block of K of a strip to panel [STRIP_COLUMNS / PANEL_COLUMNS][128][PANEL_COLUMNS],
// times PANEL_FACTOR.
void widen_panel(const uint8_t* const* b, int64_t k, float* panel) {
#if defined(DEEPKERN_AVX2) || defined(DEEPKERN_AVX512)
  for (int64_t i = 0; i < kBlock; i += 16) widen_16(b, k + i, i, panel);
#else
  float values[kBlock];
  for (int64_t n = 0; n < STRIP_COLUMNS; ++n) {
    for (int64_t i = 0; i < kBlock; i += LANES) {
      store_vector(values + i, widen_e4m3(b[n] + k + i));
    }
    for (int64_t i = 0; i < kBlock; ++i) *panel_at(panel, i, n) = values[i];
  }
#endif
}

// Adds one block of K to sums [ROWS][STRIP_COLUMNS], of which PANEL_COLUMNS columns are computed.
template <int ROWS>
void multiply_panel(const float* a, const float* panel, const float* a_scale, const float* b_scale,
                    float* sums) {
  Floats pending[5][ROWS][2];  // the sums of 1, 2, 4, 8 partial sums that wait for their neighbour
  Floats sum[ROWS][2];
  for (int i = 0; i < LANES; ++i) {
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m) sum[m][0] = sum[m][1] = Floats{};
#pragma GCC unroll 16
    for (int j = 0; j < kBlock / LANES; ++j) {
      const int k = j / 4 * (4 * LANES) + 4 * i + j % 4;  // code j % 4 of word i of a group
      const Floats b0 = load_vector<Floats>(panel + k * PANEL_COLUMNS);
      const Floats b1 = load_vector<Floats>(panel + k * PANEL_COLUMNS + LANES);
#pragma GCC unroll 6
      for (int m = 0; m < ROWS; ++m) {
        const Floats row = broadcast(a[m * kBlock + j * LANES + i]);
        sum[m][0] = fma(row, b0, sum[m][0]);
        sum[m][1] = fma(row, b1, sum[m][1]);
      }
    }
    int level = 0;
    for (; i >> level & 1; ++level) {
#pragma GCC unroll 6
      for (int m = 0; m < ROWS; ++m) {
        sum[m][0] = pending[level][m][0] + sum[m][0];
        sum[m][1] = pending[level][m][1] + sum[m][1];
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m) {
      pending[level][m][0] = sum[m][0];
      pending[level][m][1] = sum[m][1];
    }
    // The next tile of A.
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m) {
      __builtin_prefetch(a + ROWS * kBlock + (i * ROWS + m) * (kBlock / LANES));
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* out = sums + m * STRIP_COLUMNS + v * LANES;
      const Floats scale = broadcast(a_scale[m]) * load_vector<Floats>(b_scale + v * LANES);
      const Floats block = sum[m][v] * (1 / (A_FACTOR * PANEL_FACTOR));
      store_vector(out, fma(block, scale, load_vector<Floats>(out)));
    }
  }
}

void multiply_many_rows(const Strip& s) {
  alignas(64) float panel[STRIP_COLUMNS * kBlock];
  PaddedBlock padded;
  std::fill(s.sums, s.sums + s.rows * STRIP_COLUMNS, 0.0f);
  const int64_t tiles = (s.rows + 5) / 6;
  for (int64_t j = 0; j * kBlock < s.K; ++j) {
    const int64_t k = j * kBlock;
    const int64_t prefetch = k + kBlock < s.K ? kBlock : STRIP_COLUMNS * s.b_row_stride - k;
    for (int64_t n = 0; n < STRIP_COLUMNS; ++n) {
      __builtin_prefetch(s.b[n] + k + prefetch);
      __builtin_prefetch(s.b[n] + k + prefetch + 64);
    }
    if (k + kBlock > s.K) {
      widen_panel(padded.copy(s.b, STRIP_COLUMNS, k, s.K), 0, panel);
    } else {
      widen_panel(s.b, k, panel);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = s.rows * t / tiles, rows = s.rows * (t + 1) / tiles - m;
      const float* a = static_cast<const float*>(s.a) + (j * s.rows + m) * kBlock;
      for (int64_t n = 0; n < STRIP_COLUMNS; n += PANEL_COLUMNS) {
        const float* b = panel + n * kBlock;
        const float* a_scale = s.a_scale + j * s.rows + m;
        const float* b_scale = s.b_scale + j * STRIP_COLUMNS + n;
        float* sums = s.sums + m * STRIP_COLUMNS + n;
        switch (rows) {
          case 6:
            multiply_panel<6>(a, b, a_scale, b_scale, sums);
            break;
          case 5:
            multiply_panel<5>(a, b, a_scale, b_scale, sums);
            break;
          default:
            multiply_panel<4>(a, b, a_scale, b_scale, sums);
            break;
        }
      }
    }
  }
}

Tile choose_tile(int64_t rows) {
  if (rows > MAX_FEW_ROWS) return {1, STRIP_COLUMNS};
  const int64_t tile_rows = rows > 2 ? 4 : rows;
  return {tile_rows, LANES / tile_rows};
}

void multiply(const Strip& s) {
  if (s.tile.columns == STRIP_COLUMNS) return multiply_many_rows(s);
  if (s.tile.rows == 4) return multiply_few_rows<4>(s);
  return s.tile.rows == 2 ? multiply_few_rows<2>(s) : multiply_few_rows<1>(s);
}

const Fp8GemmIsa KERNEL{choose_tile, sizeof(float), widen, multiply};

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
