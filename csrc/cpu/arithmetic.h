// The arithmetic of deepkern/arithmetic.py, with the same bits; see every_isa.h.
//
// Each operation is rounded to float32 and none is fused, so every instruction set gives the bits
// of the reference and of the Triton kernels. simd.h has faster functions for results that are
// compared within a tolerance.

namespace deepkern::DEEPKERN_ISA {
namespace {

// e^x for x <= 0: x = n ln 2 + r with |r| <= ln 2 / 2; polynomial of Cephes in r, times 2^n.
DEEPKERN_INLINE Floats exact_exp(Floats x) {
  x = x < -104.0f ? broadcast(-104.0f) : x;  // e^-104 rounds to 0; NaN is kept
  const Floats shifted = x * 1.44269502f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194442e-4f;
  Floats p = r * 1.98756912e-4f + 1.39819994e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 0.166666657f;
  p = p * r + 0.5f;
  const Floats value = (p * (r * r) + r) + 1.0f;
  // Multiply by 2^n in two steps, so that only the second step rounds a subnormal result.
  const Ints exponent = bits_of(shifted) - 0x4B400000, half = exponent >> 1;
  return value * floats_of((half + 127) << 23) * floats_of((exponent - half + 127) << 23);
}

// 1 / (1 + e^-x) for any x.
DEEPKERN_INLINE Floats exact_sigmoid(Floats x) {
  const Floats e = exact_exp(-abs(x));
  return (x >= 0.0f ? broadcast(1.0f) : e) / (e + 1.0f);
}

// The sums of neighbouring lanes: those of a, then those of b.
DEEPKERN_INLINE Floats pair_sums(Floats a, Floats b) {
#if defined(__clang__)
#define DEEPKERN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DEEPKERN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif
#if defined(DEEPKERN_AVX512)
  return DEEPKERN_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         DEEPKERN_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(DEEPKERN_AVX2)
  return (Floats)_mm256_castpd_ps(
      _mm256_permute4x64_pd(_mm256_castps_pd(_mm256_hadd_ps((__m256)a, (__m256)b)), 0xD8));
#else
  return DEEPKERN_SHUFFLE(a, b, 0, 2, 4, 6) + DEEPKERN_SHUFFLE(a, b, 1, 3, 5, 7);
#endif
#undef DEEPKERN_SHUFFLE
}

// Σ x[i]² of 128 values: adds neighbours, then neighbouring sums, and so on.
DEEPKERN_INLINE float sum_squares_pairwise(const float* x) {
  constexpr int VECTORS = 128 / LANES;
  Floats sums[VECTORS];
  for (int i = 0; i < VECTORS; ++i) {
    const Floats v = load_vector<Floats>(x + i * LANES);
    sums[i] = v * v;
  }
  for (int width = VECTORS / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] = pair_sums(sums[2 * i], sums[2 * i + 1]);
  }
  return sum_of_lanes(sums[0]);
}

// Σ x[i] in the same order; overwrites x. A count that is no power of two is padded with zeros.
DEEPKERN_INLINE float sum_pairwise(float* x, int64_t count) {
  while (count > 1) {
    const int64_t half = count / 2;
    for (int64_t i = 0; i < half; ++i) x[i] = x[2 * i] + x[2 * i + 1];
    if (count % 2 != 0) x[half] = x[count - 1] + 0.0f;
    count = half + count % 2;
  }
  return count == 1 ? x[0] : 0.0f;
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
