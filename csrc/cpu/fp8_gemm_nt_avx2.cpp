// The kernel of fp8_gemm_nt for AVX2 with FMA and F16C.
//
// A code's bits, moved to a float16's place, are the value times 2^-8, subnormals included; the
// CPU widens those to float32. A block of 128 is sixteen multiply-adds into 8 lanes. Eight such
// sums are added up together, so that one register comes to hold the block's result for a tile.
#include "fp8_gemm_nt.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE AVX2 inline __attribute__((always_inline))

namespace deepkern {
namespace {

constexpr int kSums = 8;

struct Pair {
  __m256 first, second;
};

// 16 codes, times 2^-8.
AVX2_INLINE Pair widen16(const uint8_t* codes) {
  const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  // The sign fills the upper byte; of its copies the shift leaves one where the exponent begins.
  __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(code), 7);
  half = _mm256_and_si256(half, _mm256_set1_epi16(static_cast<int16_t>(0xBFFF)));
  // One more in the last place carries into that bit for NaN alone, whose bits are all set; with
  // it the exponent is that of a NaN.
  const __m256i carry = _mm256_add_epi16(half, _mm256_set1_epi16(0x80));
  half = _mm256_or_si256(half, _mm256_and_si256(carry, _mm256_set1_epi16(0x4000)));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}

AVX2 void widen(const uint8_t* codes, void* operands) {
  auto* out = static_cast<float*>(operands);
  const __m256 unit = _mm256_set1_ps(256.0f);
  for (int64_t k = 0; k < kBlock; k += 16) {
    const Pair p = widen16(codes + k);
    _mm256_store_ps(out + k, _mm256_mul_ps(p.first, unit));
    _mm256_store_ps(out + k + 8, _mm256_mul_ps(p.second, unit));
  }
}

// Lane i of the result is the sum of the lanes of x[i]: neighbours, their neighbours, halves.
AVX2_INLINE __m256 add_up(const __m256 (&x)[kSums]) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                       _mm256_permute2f128_ps(low, high, 0x31));
}

// One block of K for kRows rows of A and 8 / kRows rows of B as they stand.
template <int kRows>
AVX2_INLINE __m256 tile_of_codes(const float* a, const uint8_t* const* b, int64_t k, int64_t next) {
  constexpr int kColumns = kSums / kRows;
  __m256 sum[kSums];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) sum[i] = _mm256_setzero_ps();
#pragma GCC unroll 8
  for (int n = 0; n < kColumns; ++n) {
    const uint8_t* codes = b[n] + k;
    _mm_prefetch(codes + next, _MM_HINT_T0);
    _mm_prefetch(codes + next + 64, _MM_HINT_T0);
    for (int64_t i = 0; i < kBlock; i += 16) {
      const Pair p = widen16(codes + i);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const float* row = a + m * kBlock + i;
        __m256& s = sum[m * kColumns + n];
        s = _mm256_fmadd_ps(_mm256_load_ps(row), p.first, s);
        s = _mm256_fmadd_ps(_mm256_load_ps(row + 8), p.second, s);
      }
    }
  }
  return _mm256_mul_ps(add_up(sum), _mm256_set1_ps(256.0f));
}

// One block of K for 4 rows of A and 2 widened rows of B.
AVX2_INLINE __m256 tile_of_panel(const float* a, const float* b) {
  __m256 sum[kSums];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) sum[i] = _mm256_setzero_ps();
  for (int64_t k = 0; k < kBlock; k += 8) {
    const __m256 b0 = _mm256_load_ps(b + k), b1 = _mm256_load_ps(b + kBlock + k);
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      const __m256 row = _mm256_load_ps(a + m * kBlock + k);
      sum[2 * m] = _mm256_fmadd_ps(row, b0, sum[2 * m]);
      sum[2 * m + 1] = _mm256_fmadd_ps(row, b1, sum[2 * m + 1]);
    }
  }
  return add_up(sum);
}

// a_scale · b_scale of every value of a tile.
template <int kRows>
AVX2_INLINE __m256 tile_scale(const float* a_scale, const float* b_scale) {
  constexpr int kColumns = kSums / kRows;
  const __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i m = _mm256_srli_epi32(i, __builtin_ctz(kColumns));
  const __m256i n = _mm256_and_si256(i, _mm256_set1_epi32(kColumns - 1));
  return _mm256_mul_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(a_scale), m),
                       _mm256_permutevar8x32_ps(_mm256_loadu_ps(b_scale), n));
}

// All rows of A, of which there are kRows: the codes of B are widened in registers.
template <int kRows>
AVX2 void multiply_few(const Strip& s) {
  constexpr int kColumns = kSums / kRows;
  const auto* a = static_cast<const float*>(s.a);
  Tail tail;
  for (int64_t n = 0; n < kStrip; n += kColumns) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t j = 0; j * kBlock < s.K; ++j) {
      const uint8_t* const* b = s.b + n;
      int64_t k = j * kBlock;
      const int64_t next = ahead(s, k, kColumns);
      if (k + kBlock > s.K) {
        b = tail.copy(b, kColumns, k, s.K);
        k = 0;
      }
      const __m256 block = tile_of_codes<kRows>(a + j * kRows * kBlock, b, k, next);
      const __m256 scale = tile_scale<kRows>(s.a_scale + j * kRows, s.b_scale + j * kStrip + n);
      sum = _mm256_fmadd_ps(block, scale, sum);
    }
    _mm256_store_ps(s.sums + n * kRows, sum);
  }
}

// Four rows of A at a time, against a block of B that was widened for all.
AVX2 void multiply_many(const Strip& s) {
  alignas(64) float panel[kStrip * kBlock];
  std::fill(s.sums, s.sums + s.rows * kStrip, 0.0f);
  for (int64_t j = 0; j * kBlock < s.K; ++j) {
    widen_panel(s, j, kFp8GemmAvx2, panel);
    const float* a = static_cast<const float*>(s.a) + j * s.rows * kBlock;
    float* sums = s.sums;
    for (int64_t m = 0; m < s.rows; m += 4) {
      for (int64_t n = 0; n < kStrip; n += 2, sums += kSums) {
        const __m256 block = tile_of_panel(a + m * kBlock, panel + n * kBlock);
        const __m256 scale = tile_scale<4>(s.a_scale + j * s.rows + m, s.b_scale + j * kStrip + n);
        _mm256_store_ps(sums, _mm256_fmadd_ps(block, scale, _mm256_load_ps(sums)));
      }
    }
  }
}

void multiply(const Strip& s) {
  if (s.rows > 4) return multiply_many(s);
  if (s.rows == 4) return multiply_few<4>(s);
  return s.rows == 2 ? multiply_few<2>(s) : multiply_few<1>(s);
}

}  // namespace

const Fp8GemmIsa kFp8GemmAvx2{kSums, 4, sizeof(float), widen, multiply};

}  // namespace deepkern
#endif
