// The kernel of fp8_gemm_nt for AVX2 with FMA and F16C.
//
// Widening: the bits of an e4m3 code, shifted to the place of a float16, are the value times 2^-8,
// subnormals included. vcvtph2ps converts those to float32, 8 at a time. A block of 128 products
// takes sixteen fused multiply-adds into the 8 lanes of a register. Eight such registers are added
// horizontally, so that one register holds a block's sums of a whole output tile of 8 values.
//
// Speed: 1, 2 or 4 rows of A are bound by reading and widening B, more rows by the FMA units.
#include "fp8_gemm_nt.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define TARGET_INLINE TARGET inline __attribute__((always_inline))

#include "fp8_gemm_nt_mainloop.h"

namespace deepkern {
namespace {

struct Avx2 {
  using Vector = __m256;
  using Element = float;
  static constexpr int TILE_VALUES = 8, PANEL_COLUMNS = 2;

  struct Tables {};
  static TARGET_INLINE Tables tables() { return {}; }

  static TARGET_INLINE Vector zero() { return _mm256_setzero_ps(); }
  static TARGET_INLINE Vector load(const float* from) { return _mm256_load_ps(from); }
  static TARGET_INLINE void store(float* to, Vector x) { _mm256_store_ps(to, x); }
  static TARGET_INLINE Vector fma(Vector a, Vector b, Vector c) {
    return _mm256_fmadd_ps(a, b, c);
  }

  struct Pair {
    __m256 first, second;
  };

  // 16 codes to float32, times 2^-8.
  static TARGET_INLINE Pair widen16(const uint8_t* codes) {
    const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    // Sign extension fills the upper byte with the sign. The shift and the mask leave the sign bit
    // and clear the topmost exponent bit of the float16.
    __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(code), 7);
    half = _mm256_and_si256(half, _mm256_set1_epi16(static_cast<int16_t>(0xBFFF)));
    // Adding one unit in the last place carries into that bit for NaN alone, whose magnitude bits
    // are all ones. With that bit set the exponent is the one of a float16 NaN.
    const __m256i carry = _mm256_add_epi16(half, _mm256_set1_epi16(0x80));
    half = _mm256_or_si256(half, _mm256_and_si256(carry, _mm256_set1_epi16(0x4000)));
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
  }

  // Lane i of the result is the sum of the lanes of x[i], added pairwise.
  static TARGET_INLINE __m256 horizontal_sums(const __m256 (&x)[TILE_VALUES]) {
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                         _mm256_permute2f128_ps(low, high, 0x31));
  }

  // One block of K of a tile of ROWS rows of A and 8 / ROWS rows of B, which are FP8 codes.
  template <int ROWS>
  static TARGET_INLINE __m256 tile_of_codes(Tables, const float* a,  // [ROWS, 128]
                                            const uint8_t* const* b, int64_t k,
                                            int64_t prefetch) {  // bytes
    constexpr int COLUMNS = TILE_VALUES / ROWS;
    __m256 sum[TILE_VALUES];
#pragma GCC unroll 8
    for (int i = 0; i < TILE_VALUES; ++i) sum[i] = _mm256_setzero_ps();
#pragma GCC unroll 8
    for (int n = 0; n < COLUMNS; ++n) {
      const uint8_t* codes = b[n] + k;
      _mm_prefetch(codes + prefetch, _MM_HINT_T0);
      _mm_prefetch(codes + prefetch + 64, _MM_HINT_T0);
      for (int64_t i = 0; i < kBlock; i += 16) {
        const Pair p = widen16(codes + i);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; ++m) {
          const float* row = a + m * kBlock + i;
          __m256& s = sum[m * COLUMNS + n];
          s = _mm256_fmadd_ps(_mm256_load_ps(row), p.first, s);
          s = _mm256_fmadd_ps(_mm256_load_ps(row + 8), p.second, s);
        }
      }
    }
    return _mm256_mul_ps(horizontal_sums(sum), _mm256_set1_ps(256.0f));
  }

  // One block of K of a tile of 4 rows of A and 2 widened rows of B.
  static TARGET_INLINE __m256 tile_of_panel(const float* a, const float* b) {
    __m256 sum[TILE_VALUES];
#pragma GCC unroll 8
    for (int i = 0; i < TILE_VALUES; ++i) sum[i] = _mm256_setzero_ps();
    for (int64_t k = 0; k < kBlock; k += 8) {
      const __m256 b0 = _mm256_load_ps(b + k), b1 = _mm256_load_ps(b + kBlock + k);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        const __m256 row = _mm256_load_ps(a + m * kBlock + k);
        sum[2 * m] = _mm256_fmadd_ps(row, b0, sum[2 * m]);
        sum[2 * m + 1] = _mm256_fmadd_ps(row, b1, sum[2 * m + 1]);
      }
    }
    return horizontal_sums(sum);
  }

  // a_scale * b_scale of each value of a tile.
  template <int ROWS>
  static TARGET_INLINE __m256 tile_scale(const float* a_scale, const float* b_scale) {
    constexpr int COLUMNS = TILE_VALUES / ROWS;
    const __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i m = _mm256_srli_epi32(i, __builtin_ctz(COLUMNS));
    const __m256i n = _mm256_and_si256(i, _mm256_set1_epi32(COLUMNS - 1));
    return _mm256_mul_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(a_scale), m),
                         _mm256_permutevar8x32_ps(_mm256_loadu_ps(b_scale), n));
  }
};

TARGET void widen(const uint8_t* codes, void* operands) {
  auto* out = static_cast<float*>(operands);
  const __m256 unit = _mm256_set1_ps(256.0f);
  for (int64_t k = 0; k < kBlock; k += 16) {
    const Avx2::Pair p = Avx2::widen16(codes + k);
    _mm256_store_ps(out + k, _mm256_mul_ps(p.first, unit));
    _mm256_store_ps(out + k + 8, _mm256_mul_ps(p.second, unit));
  }
}

void multiply(const Strip& s) { multiply_strip<Avx2>(s, FP8_GEMM_AVX2); }

}  // namespace

const Fp8GemmIsa FP8_GEMM_AVX2{Avx2::TILE_VALUES, 4, sizeof(Avx2::Element), widen, multiply};

}  // namespace deepkern
#endif
