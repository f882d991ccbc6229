// Router scores, with the bits of experts/score.py; needs arithmetic.h. See every_isa.h.
//
//     sigmoid(x),  softmax(x) over the experts,  sqrtsoftplus(x) = sqrt(ln(1 + e^x))
//
// Rows are float arrays whose length is a multiple of LANES; the elements past the last expert
// must be -inf.

namespace deepkern::DEEPKERN_ISA {
namespace {

DEEPKERN_INLINE Floats sqrt_of_lanes(Floats x) {
#if defined(DEEPKERN_AVX512)
  return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(DEEPKERN_AVX2)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// ln(1 + u) for 0 <= u <= 1, as 2 artanh(t) with t = u / (2 + u): no cancellation.
DEEPKERN_INLINE Floats exact_log1p(Floats u) {
  Floats t = u / (u + 2.0f);
  const Floats z = t * t;
  Floats p = z * 0.116121642f + 0.108532876f;
  p = p * z + 0.142961785f;
  p = p * z + 0.199998528f;
  p = p * z + 0.333333343f;
  t = t + t;
  return p * z * t + t;
}

DEEPKERN_INLINE Floats sqrtsoftplus(Floats x) {
  const Floats positive = x > 0.0f ? x : Floats{};
  return sqrt_of_lanes(positive + exact_log1p(exact_exp(-abs(x))));
}

// The largest of x[0 : count], NaN if one is NaN.
DEEPKERN_INLINE float row_max(const float* x, int64_t count) {
  Floats largest = broadcast(-INFINITY), nan = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats v = load_vector<Floats>(x + i);
    largest = max(v, largest);
    nan = v == v ? nan : v;
  }
  const float found_nan = sum_of_lanes(nan);  // 0, or NaN
  return found_nan == found_nan ? max_of_lanes(largest) : found_nan;
}

// The denominator is exact, in units of 2^-40, so it does not depend on the order.
inline void softmax_row(const float* x, int64_t count, float* s) {
  const Floats largest = broadcast(row_max(x, count));
  Floats nan = {};
  int64_t units = 0;
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats e = exact_exp(load_vector<Floats>(x + i) - largest);
    nan = e == e ? nan : e;
    store_vector(s + i, e);
    const Floats scaled = (e == e ? e : Floats{}) * 0x1p40f;
    for (int lane = 0; lane < LANES; ++lane) units += static_cast<int64_t>(scaled[lane]);
  }
  const float found_nan = sum_of_lanes(nan);
  const float sum = found_nan == found_nan ? static_cast<float>(units) * 0x1p-40f : found_nan;
  for (int64_t i = 0; i < count; i += LANES) {
    store_vector(s + i, load_vector<Floats>(s + i) / broadcast(sum));
  }
}

// s[i] = score(x[i]).
inline void score_row(Score score, const float* x, int64_t count, float* s) {
  if (score == Score::softmax) return softmax_row(x, count, s);
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats v = load_vector<Floats>(x + i);
    store_vector(s + i, score == Score::sigmoid ? exact_sigmoid(v) : sqrtsoftplus(v));
  }
}

// Loads E logits, -inf from E on up to `padded`.
inline void load_logits(const void* logits, Real real, int64_t offset, int64_t E, int64_t padded,
                        float* x) {
  const int64_t whole = E / 128 * 128;
  for (int64_t e = 0; e < whole; e += 128) load_real_block(logits, real, offset + e, 128, x + e);
  for (int64_t e = whole; e < E; ++e) x[e] = load_real(logits, real, offset + e);
  for (int64_t e = E; e < padded; ++e) x[e] = -INFINITY;
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
