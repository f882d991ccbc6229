// The kernel of fp8_gemm_nt for AVX-512 with VBMI and BF16.
//
// Widening: two look-ups in tables of 128 bytes turn a code into a bfloat16, which represents every
// e4m3 value exactly: five instructions for 64 codes, NaN and subnormals included. vdpbf16ps
// multiplies 32 pairs. A block of 128 products takes four of them into the 16 lanes of a register.
// Sixteen such registers are added horizontally, so that one register holds a block's sums of a
// whole output tile of 16 values.
//
// Speed: 1, 2 or 4 rows of A are bound by reading B, more rows by vdpbf16ps.
#include "fp8_gemm_nt.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// The intrinsics header of GCC 12 initializes its undefined vectors with themselves.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <array>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")))
#define TARGET_INLINE TARGET inline __attribute__((always_inline))

#include "fp8_gemm_nt_mainloop.h"

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

struct Avx512 {
  using Vector = __m512;
  using Element = uint16_t;  // bfloat16
  static constexpr int TILE_VALUES = 16, PANEL_COLUMNS = 4;

  struct Tables {
    __m512i low[2], high[2];
  };
  static TARGET_INLINE Tables tables() {
    const uint8_t *low = BF16_TABLE.low.data(), *high = BF16_TABLE.high.data();
    return {{_mm512_load_si512(low), _mm512_load_si512(low + 64)},
            {_mm512_load_si512(high), _mm512_load_si512(high + 64)}};
  }

  static TARGET_INLINE Vector zero() { return _mm512_setzero_ps(); }
  static TARGET_INLINE Vector load(const float* from) { return _mm512_load_ps(from); }
  static TARGET_INLINE void store(float* to, Vector x) { _mm512_store_ps(to, x); }
  static TARGET_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

  struct Pair {
    __m512bh first, second;
  };

  // 64 codes to bfloat16. Their order changes, the same way on every call: of each 16 codes, 8 go
  // to `first` and 8 to `second`.
  static TARGET_INLINE Pair widen64(const Tables& t, const uint8_t* codes) {
    const __m512i code = _mm512_loadu_si512(codes);
    const __m512i low = _mm512_permutex2var_epi8(t.low[0], code, t.low[1]);
    __m512i high = _mm512_permutex2var_epi8(t.high[0], code, t.high[1]);
    high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(-128), 0xF8);  // | code & 0x80
    return {(__m512bh)_mm512_unpacklo_epi8(low, high), (__m512bh)_mm512_unpackhi_epi8(low, high)};
  }

  static TARGET_INLINE __m512bh operand(const uint16_t* from) {
    return (__m512bh)_mm512_load_si512(from);
  }

  template <int LOW, int HIGH>
  static TARGET_INLINE __m512 fold(__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, LOW), _mm512_shuffle_f32x4(x, y, HIGH));
  }

  // Lane i of the result is the sum of the lanes of x[i]: halves, then quarters, then eighths, then
  // pairs, in the same order for every i.
  static TARGET_INLINE __m512 horizontal_sums(const __m512 (&x)[TILE_VALUES]) {
    __m512 h[8], q[4], e[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      h[i] = fold<0x44, 0xEE>(x[i % 4 + i / 4 * 8], x[i % 4 + i / 4 * 8 + 4]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) q[i] = fold<0x88, 0xDD>(h[i], h[i + 4]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512 x0 = q[2 * i], x1 = q[2 * i + 1];
      e[i] = _mm512_add_ps(_mm512_unpacklo_ps(x0, x1), _mm512_unpackhi_ps(x0, x1));
    }
    const __m512d x0 = _mm512_castps_pd(e[0]), x1 = _mm512_castps_pd(e[1]);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x0, x1)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x0, x1)));
  }

  // One block of K of a tile of ROWS rows of A and 16 / ROWS rows of B, which are FP8 codes.
  template <int ROWS>
  static TARGET_INLINE __m512 tile_of_codes(const Tables& tables,
                                            const uint16_t* a,  // [ROWS, 128]
                                            const uint8_t* const* b, int64_t k,
                                            int64_t prefetch) {  // bytes
    constexpr int COLUMNS = TILE_VALUES / ROWS;
    __m512 sum[TILE_VALUES];
#pragma GCC unroll 16
    for (int n = 0; n < COLUMNS; ++n) {
      const uint8_t* codes = b[n] + k;
      _mm_prefetch(codes + prefetch, _MM_HINT_T0);
      _mm_prefetch(codes + prefetch + 64, _MM_HINT_T0);
      const Pair p = widen64(tables, codes), q = widen64(tables, codes + 64);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) {
        const uint16_t* row = a + m * kBlock;
        __m512 s = _mm512_dpbf16_ps(_mm512_setzero_ps(), operand(row), p.first);
        s = _mm512_dpbf16_ps(s, operand(row + 32), p.second);
        s = _mm512_dpbf16_ps(s, operand(row + 64), q.first);
        sum[m * COLUMNS + n] = _mm512_dpbf16_ps(s, operand(row + 96), q.second);
      }
    }
    return horizontal_sums(sum);
  }

  // One block of K of a tile of 4 rows of A and 4 widened rows of B.
  static TARGET_INLINE __m512 tile_of_panel(const uint16_t* a, const uint16_t* b) {
    __m512 sum[TILE_VALUES];
#pragma GCC unroll 16
    for (int i = 0; i < TILE_VALUES; ++i) sum[i] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int k = 0; k < kBlock; k += 32) {
      const __m512bh a0 = operand(a + k), a1 = operand(a + kBlock + k);
      const __m512bh a2 = operand(a + 2 * kBlock + k), a3 = operand(a + 3 * kBlock + k);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        const __m512bh column = operand(b + n * kBlock + k);
        sum[n] = _mm512_dpbf16_ps(sum[n], a0, column);
        sum[4 + n] = _mm512_dpbf16_ps(sum[4 + n], a1, column);
        sum[8 + n] = _mm512_dpbf16_ps(sum[8 + n], a2, column);
        sum[12 + n] = _mm512_dpbf16_ps(sum[12 + n], a3, column);
      }
    }
    return horizontal_sums(sum);
  }

  // a_scale * b_scale of each value of a tile.
  template <int ROWS>
  static TARGET_INLINE __m512 tile_scale(const float* a_scale, const float* b_scale) {
    constexpr int COLUMNS = TILE_VALUES / ROWS;
    const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i m = _mm512_srli_epi32(i, __builtin_ctz(COLUMNS));
    const __m512i n = _mm512_and_si512(i, _mm512_set1_epi32(COLUMNS - 1));
    return _mm512_mul_ps(_mm512_permutexvar_ps(m, _mm512_loadu_ps(a_scale)),
                         _mm512_permutexvar_ps(n, _mm512_loadu_ps(b_scale)));
  }
};

TARGET void widen(const uint8_t* codes, void* operands) {
  const Avx512::Tables tables = Avx512::tables();
  auto* out = static_cast<uint16_t*>(operands);
  for (int half = 0; half < 2; ++half) {
    const Avx512::Pair p = Avx512::widen64(tables, codes + 64 * half);
    _mm512_store_si512(out + 64 * half, (__m512i)p.first);
    _mm512_store_si512(out + 64 * half + 32, (__m512i)p.second);
  }
}

void multiply(const Strip& s) { multiply_strip<Avx512>(s, FP8_GEMM_AVX512); }

// The smallest power of two that covers all rows, at most 4. Fewer rows leave more columns.
Tile choose_tile(int64_t rows) {
  const int64_t tile_rows = rows > 2 ? 4 : rows;
  return {tile_rows, Avx512::TILE_VALUES / tile_rows};
}

}  // namespace

const Fp8GemmIsa FP8_GEMM_AVX512{choose_tile, sizeof(Avx512::Element), widen, multiply};

}  // namespace deepkern
#endif
