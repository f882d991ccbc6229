// Cached tokens as float32, and transposition; see every_isa.h.

namespace deepkern::DEEPKERN_ISA {
namespace {

// `count` elements at `from`, of any alignment, as floats.
template <Real type>
DEEPKERN_INLINE void widen_values(const char* from, int64_t count, float* out) {
  constexpr int64_t size = type == Real::fp32 ? 4 : 2;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_vector(out + i, load_floats<type>(from, i));
  for (; i < count; ++i) {
    float value[1];
    std::memcpy(value, from + i * size, size);
    out[i] = deepkern::load<type>(value, 0);
  }
}

// `count` floats as `type` at an address of any alignment.
template <Real type>
DEEPKERN_INLINE void store_values(char* out, const float* x, int64_t count) {
  constexpr int64_t size = type == Real::fp32 ? 4 : 2;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_floats<type>(out, i, load_vector<Floats>(x + i));
  for (; i < count; ++i) {
    float value[1];
    deepkern::store<type>(value, 0, x[i]);
    std::memcpy(out + i * size, value, size);
  }
}

#if defined(DEEPKERN_AVX2)
// 128 e4m3 codes times 2^-8 * scale.
DEEPKERN_INLINE void widen_block_scaled(const uint8_t* codes, float scale, float* out) {
  const __m256 unit = _mm256_set1_ps(scale);
  const __m256i mask = _mm256_set1_epi16(static_cast<int16_t>(0xBFFF));
  const __m256i ulp = _mm256_set1_epi16(0x80), top = _mm256_set1_epi16(0x4000);
  for (int i = 0; i < 128; i += 16) {
    const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(code), 7), mask);
    half = _mm256_or_si256(half, _mm256_and_si256(_mm256_add_epi16(half, ulp), top));
    const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(low, unit));
    _mm256_storeu_ps(out + i + 8, _mm256_mul_ps(high, unit));
  }
}
#endif

// 128 e4m3 codes times `scale`, each product rounded once.
DEEPKERN_INLINE void widen_block(const uint8_t* codes, float scale, float* out) {
#if defined(DEEPKERN_AVX2)
  // As widen_e4m3 in simd.h, 16 codes at a time. The factor 2^8 is part of the scale, which is
  // exact unless that overflows.
  if (std::fabs(scale) < 0x1p119f) return widen_block_scaled(codes, scale * 256.0f, out);
#endif
  const Floats factor = broadcast(scale);
  for (int i = 0; i < 128; i += LANES) store_vector(out + i, widen_e4m3(codes + i) * factor);
}

// `count` e4m3 codes times the scale of each 128; scales: 4 bytes each, or null for a scale of 1.
DEEPKERN_INLINE void widen_codes(const uint8_t* codes, const char* scales, int64_t count,
                                 float* out) {
  for (int64_t i = 0, j = 0; i < count; i += 128, ++j) {
    float scale = 1.0f;
    if (scales != nullptr) std::memcpy(&scale, scales + 4 * j, sizeof scale);
    if (count - i >= 128) {
      widen_block(codes + i, scale, out + i);
      continue;
    }
    uint8_t last[128] = {};
    float values[128];
    std::memcpy(last, codes + i, count - i);
    widen_block(last, scale, values);
    std::memcpy(out + i, values, (count - i) * sizeof(float));
  }
}

// The R + D values of `count` tokens; a row of out has `pitch` floats.
inline void widen_tokens(const LatentCache& cache, const char* const* tokens, int64_t count,
                         float* out, int64_t pitch) {
  const int64_t R = cache.R, D = cache.D;
  if (cache.fp8) {
    const int64_t rope = cache.rope_offset();
    for (int64_t n = 0; n < count; ++n) {
      const auto* codes = reinterpret_cast<const uint8_t*>(tokens[n]);
      widen_codes(codes, tokens[n] + R, R, out + n * pitch);
      widen_values<Real::bf16>(tokens[n] + rope, D, out + n * pitch + R);
    }
    return;
  }
  DEEPKERN_FOR_REAL(
      cache.type, for (int64_t n = 0; n < count;
                       ++n) { widen_values<type>(tokens[n], R + D, out + n * pitch); });
}

#if defined(DEEPKERN_AVX2) || defined(DEEPKERN_AVX512)
DEEPKERN_INLINE void transpose_8x8(const float* in, int64_t in_stride, float* out,
                                   int64_t out_stride) {
  __m256 x[8], y[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = _mm256_loadu_ps(in + i * in_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xEE);
    x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(x[i], x[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
  }
}
#endif

// out[j * out_stride + i] = in[i * in_stride + j] for i < rows, j < columns.
inline void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out,
                      int64_t out_stride) {
  int64_t blocked_rows = 0, blocked_columns = 0;
#if defined(DEEPKERN_AVX2) || defined(DEEPKERN_AVX512)
  blocked_rows = rows / 8 * 8, blocked_columns = columns / 8 * 8;
  for (int64_t i = 0; i < blocked_rows; i += 8) {
    for (int64_t j = 0; j < blocked_columns; j += 8) {
      transpose_8x8(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    }
  }
#endif
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t first = i < blocked_rows ? blocked_columns : 0;
    for (int64_t j = first; j < columns; ++j) out[j * out_stride + i] = in[i * in_stride + j];
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
