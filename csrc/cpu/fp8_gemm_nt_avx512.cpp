// The kernel of fp8_gemm_nt for AVX-512 with VBMI and BF16.
//
// A code is widened to bfloat16, which holds it exactly, by two look-ups in tables of 128 bytes:
// five instructions for 64 codes, NaN and subnormals included. vdpbf16ps multiplies 32 pairs; a
// block of 128 is four of them into 16 lanes. Sixteen such sums are added up together, so that one
// register comes to hold the block's result for a whole tile.
#include "fp8_gemm_nt.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header begins what it means to leave undefined with itself.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <array>

#define AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")))
#define AVX512_INLINE AVX512 inline __attribute__((always_inline))

namespace deepkern {
namespace {

constexpr int kSums = 16;

struct alignas(64) Table {
  std::array<uint8_t, 128> low{}, high{};  // bytes of the bfloat16
};

constexpr Table make_table() {
  Table t;
  for (unsigned code = 0; code < 128; ++code) {
    t.low[code] = e4m3_magnitude_as_bf16(code) & 0xFF;
    t.high[code] = static_cast<uint8_t>(e4m3_magnitude_as_bf16(code) >> 8);
  }
  return t;
}

constexpr Table kTable = make_table();

struct Widener {
  __m512i low[2], high[2];
};

AVX512_INLINE Widener widener() {
  return {{_mm512_load_si512(kTable.low.data()), _mm512_load_si512(kTable.low.data() + 64)},
          {_mm512_load_si512(kTable.high.data()), _mm512_load_si512(kTable.high.data() + 64)}};
}

struct Pair {
  __m512bh first, second;
};

// 64 codes. The order is not theirs but always the same: of every 16, 8 to each half.
AVX512_INLINE Pair widen64(const Widener& w, const uint8_t* codes) {
  const __m512i code = _mm512_loadu_si512(codes);
  const __m512i low = _mm512_permutex2var_epi8(w.low[0], code, w.low[1]);
  __m512i high = _mm512_permutex2var_epi8(w.high[0], code, w.high[1]);
  high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(-128), 0xF8);  // | code & 0x80
  return {(__m512bh)_mm512_unpacklo_epi8(low, high), (__m512bh)_mm512_unpackhi_epi8(low, high)};
}

AVX512_INLINE __m512bh operand(const uint16_t* from) {
  return (__m512bh)_mm512_load_si512(from);
}

AVX512 void widen(const uint8_t* codes, void* operands) {
  const Widener w = widener();
  auto* out = static_cast<uint16_t*>(operands);
  for (int half = 0; half < 2; ++half) {
    const Pair p = widen64(w, codes + 64 * half);
    _mm512_store_si512(out + 64 * half, (__m512i)p.first);
    _mm512_store_si512(out + 64 * half + 32, (__m512i)p.second);
  }
}

template <int kLow, int kHigh>
AVX512_INLINE __m512 fold(__m512 x, __m512 y) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, kLow), _mm512_shuffle_f32x4(x, y, kHigh));
}

// Lane i of the result is the sum of the lanes of x[i]: halves, quarters, ..., alike for every i.
AVX512_INLINE __m512 add_up(const __m512 (&x)[kSums]) {
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

// One block of K for kRows rows of A and 16 / kRows rows of B as they stand.
template <int kRows>
AVX512_INLINE __m512 tile_of_codes(const Widener& w, const uint16_t* a, const uint8_t* const* b,
                                   int64_t k, int64_t next) {
  constexpr int kColumns = kSums / kRows;
  __m512 sum[kSums];
#pragma GCC unroll 16
  for (int n = 0; n < kColumns; ++n) {
    const uint8_t* codes = b[n] + k;
    _mm_prefetch(codes + next, _MM_HINT_T0);
    _mm_prefetch(codes + next + 64, _MM_HINT_T0);
    const Pair p = widen64(w, codes), q = widen64(w, codes + 64);
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      const uint16_t* row = a + m * kBlock;
      __m512 s = _mm512_dpbf16_ps(_mm512_setzero_ps(), operand(row), p.first);
      s = _mm512_dpbf16_ps(s, operand(row + 32), p.second);
      s = _mm512_dpbf16_ps(s, operand(row + 64), q.first);
      sum[m * kColumns + n] = _mm512_dpbf16_ps(s, operand(row + 96), q.second);
    }
  }
  return add_up(sum);
}

// One block of K for 4 rows of A and 4 widened rows of B.
AVX512_INLINE __m512 tile_of_panel(const uint16_t* a, const uint16_t* b) {
  __m512 sum[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) sum[i] = _mm512_setzero_ps();
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
  return add_up(sum);
}

// a_scale · b_scale of every value of a tile.
template <int kRows>
AVX512_INLINE __m512 tile_scale(const float* a_scale, const float* b_scale) {
  constexpr int kColumns = kSums / kRows;
  const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i m = _mm512_srli_epi32(i, __builtin_ctz(kColumns));
  const __m512i n = _mm512_and_si512(i, _mm512_set1_epi32(kColumns - 1));
  return _mm512_mul_ps(_mm512_permutexvar_ps(m, _mm512_loadu_ps(a_scale)),
                       _mm512_permutexvar_ps(n, _mm512_loadu_ps(b_scale)));
}

// All rows of A, of which there are kRows: the codes of B are widened in registers.
template <int kRows>
AVX512 void multiply_few(const Strip& s) {
  constexpr int kColumns = kSums / kRows;
  const Widener w = widener();
  const auto* a = static_cast<const uint16_t*>(s.a);
  Tail tail;
  for (int64_t n = 0; n < kStrip; n += kColumns) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j * kBlock < s.K; ++j) {
      const uint8_t* const* b = s.b + n;
      int64_t k = j * kBlock;
      const int64_t next = ahead(s, k, kColumns);
      if (k + kBlock > s.K) {
        b = tail.copy(b, kColumns, k, s.K);
        k = 0;
      }
      const __m512 block = tile_of_codes<kRows>(w, a + j * kRows * kBlock, b, k, next);
      const __m512 scale = tile_scale<kRows>(s.a_scale + j * kRows, s.b_scale + j * kStrip + n);
      sum = _mm512_fmadd_ps(block, scale, sum);
    }
    _mm512_store_ps(s.sums + n * kRows, sum);
  }
}

// Four rows of A at a time, against a block of B that was widened for all.
AVX512 void multiply_many(const Strip& s) {
  alignas(64) uint16_t panel[kStrip * kBlock];
  std::fill(s.sums, s.sums + s.rows * kStrip, 0.0f);
  for (int64_t j = 0; j * kBlock < s.K; ++j) {
    widen_panel(s, j, kFp8GemmAvx512, panel);
    const uint16_t* a = static_cast<const uint16_t*>(s.a) + j * s.rows * kBlock;
    float* sums = s.sums;
    for (int64_t m = 0; m < s.rows; m += 4) {
      for (int64_t n = 0; n < kStrip; n += 4, sums += kSums) {
        const __m512 block = tile_of_panel(a + m * kBlock, panel + n * kBlock);
        const __m512 scale = tile_scale<4>(s.a_scale + j * s.rows + m, s.b_scale + j * kStrip + n);
        _mm512_store_ps(sums, _mm512_fmadd_ps(block, scale, _mm512_load_ps(sums)));
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

const Fp8GemmIsa kFp8GemmAvx512{kSums, 4, sizeof(uint16_t), widen, multiply};

}  // namespace deepkern
#endif
