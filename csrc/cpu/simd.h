// A vector of LANES floats for the instruction set that is being compiled; see every_isa.h.
//
// Arithmetic and comparisons are the compiler's vector operators: `a * b`, `a > b ? a : b`. They
// round as scalar code does. What has no operator is a function here. Every function is inlined.
// This header has no include guard: every_isa.h includes it once for each instruction set.

namespace deepkern::DEEPKERN_ISA {
namespace {

#if defined(DEEPKERN_AVX512)
constexpr int LANES = 16;
#elif defined(DEEPKERN_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Uints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int16_t SignedHalves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef int8_t SignedBytes __attribute__((vector_size(LANES)));

// Subtracting zero changes no value, also not -0, and costs no instruction.
DEEPKERN_INLINE Floats broadcast(float x) { return x - Floats{}; }
DEEPKERN_INLINE Ints broadcast_int(int32_t x) { return Ints{} + x; }
DEEPKERN_INLINE Ints bits_of(Floats x) { return (Ints)x; }
DEEPKERN_INLINE Floats floats_of(Ints bits) { return (Floats)bits; }

// Lane i is i.
DEEPKERN_INLINE Ints lane_index() {
  Ints lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  return lane;
}

template <class Vector>
DEEPKERN_INLINE Vector load_vector(const void* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class Vector>
DEEPKERN_INLINE void store_vector(void* to, Vector x) {
  std::memcpy(to, &x, sizeof x);
}

// a * b + c, rounded once; twice in portable code, whose CPU may have no such instruction.
DEEPKERN_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(DEEPKERN_AVX512)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(DEEPKERN_AVX2)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// NaN in b is kept, NaN in a is not.
DEEPKERN_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
DEEPKERN_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }

DEEPKERN_INLINE Floats abs(Floats x) { return floats_of(bits_of(x) & 0x7FFFFFFF); }

// Rounds to the nearest integer, ties to even; |x| < 2^22.
DEEPKERN_INLINE Floats round_to_integer(Floats x) {
  const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23
  return (x + magic) - magic;
}

// The sum of all lanes, added pairwise: (0 + 1) + (2 + 3) ...
DEEPKERN_INLINE float sum_of_lanes(Floats x) {
  float lane[LANES];
  store_vector(lane, x);
  for (int width = LANES / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[2 * i] + lane[2 * i + 1];
  }
  return lane[0];
}

// Lane i is sum_of_lanes(x[i]).
DEEPKERN_INLINE Floats sums_of_lanes(const Floats (&x)[LANES]) {
#if defined(DEEPKERN_AVX512)
  const __m512i even = (__m512i)(lane_index() * 2), odd = (__m512i)(lane_index() * 2 + 1);
  __m512 sums[LANES];
  for (int i = 0; i < LANES; ++i) sums[i] = (__m512)x[i];
  for (int width = LANES / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      const __m512 a = sums[2 * i], b = sums[2 * i + 1];
      sums[i] =
          _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
    }
  }
  return (Floats)sums[0];
#elif defined(DEEPKERN_AVX2)
  __m256 quarter[2];  // lane 4 h + i: the sum of half h of x[i] or x[i + 4]
  for (int i = 0; i < 2; ++i) {
    const __m256 low = _mm256_hadd_ps((__m256)x[4 * i], (__m256)x[4 * i + 1]);
    const __m256 high = _mm256_hadd_ps((__m256)x[4 * i + 2], (__m256)x[4 * i + 3]);
    quarter[i] = _mm256_hadd_ps(low, high);
  }
  return (Floats)_mm256_add_ps(_mm256_permute2f128_ps(quarter[0], quarter[1], 0x20),
                               _mm256_permute2f128_ps(quarter[0], quarter[1], 0x31));
#else
  Floats sums;
  for (int i = 0; i < LANES; ++i) sums[i] = sum_of_lanes(x[i]);
  return sums;
#endif
}

DEEPKERN_INLINE float max_of_lanes(Floats x) {
  float lane[LANES];
  store_vector(lane, x);
  for (int width = LANES / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  }
  return lane[0];
}

// The low 16 bits of each lane. The compiler's conversion moves lane by lane through registers.
DEEPKERN_INLINE Halves low_halves(Uints x) {
#if defined(DEEPKERN_AVX512)
  return (Halves)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(DEEPKERN_AVX2)
  const __m256i low = (__m256i)(x & 0xFFFF);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return (Halves)_mm256_castsi256_si128(packed);
#else
  return __builtin_convertvector(x, Halves);
#endif
}

// Stores 4 * LANES integers in [0, 255] as bytes.
DEEPKERN_INLINE void store_bytes(uint8_t* to, Ints a, Ints b, Ints c, Ints d) {
#if defined(DEEPKERN_AVX2)
  const __m256i ab = _mm256_packs_epi32((__m256i)a, (__m256i)b);
  const __m256i cd = _mm256_packs_epi32((__m256i)c, (__m256i)d);
  // The packs work on 128-bit halves, so the order is a0 b0 c0 d0 a1 b1 c1 d1, 4 bytes each.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  store_vector(to, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), order));
#else
  const Ints all[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
#if defined(DEEPKERN_AVX512)
    store_vector(to + i * LANES, _mm512_cvtepi32_epi8((__m512i)all[i]));
#else
    store_vector(to + i * LANES, __builtin_convertvector(all[i], Bytes));
#endif
  }
#endif
}

// Elements of a tensor as floats.

DEEPKERN_INLINE Floats halves_to_floats(Halves bits) {  // fp16
#if defined(DEEPKERN_AVX512)
  return (Floats)_mm512_cvtph_ps((__m256i)bits);
#elif defined(DEEPKERN_AVX2)
  return (Floats)_mm256_cvtph_ps((__m128i)bits);
#else
  float lane[LANES];
  uint16_t half[LANES];
  store_vector(half, bits);
  for (int i = 0; i < LANES; ++i) lane[i] = deepkern::load<Real::fp16>(half, i);
  return load_vector<Floats>(lane);
#endif
}

// x[i], x[i + 1], ...: LANES elements of `type`.
template <Real type>
DEEPKERN_INLINE Floats load_floats(const void* x, int64_t i) {
  if constexpr (type == Real::fp32) return load_vector<Floats>(static_cast<const float*>(x) + i);
  const Halves bits = load_vector<Halves>(static_cast<const uint16_t*>(x) + i);
  if constexpr (type == Real::fp16) return halves_to_floats(bits);
#if defined(DEEPKERN_AVX2)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
  return (Floats)(__builtin_convertvector(bits, Uints) << 16);
#endif
}

// The first `count` < LANES of them; the other lanes are 0 and are not read.
template <Real type>
DEEPKERN_INLINE Floats load_first_floats(const void* x, int64_t i, int64_t count) {
  float lane[LANES] = {};
  for (int64_t j = 0; j < count; ++j) lane[j] = deepkern::load<type>(x, i + j);
  return load_vector<Floats>(lane);
}

// Writes LANES elements of `type`, rounded to nearest even.
template <Real type>
DEEPKERN_INLINE void store_floats(void* x, int64_t i, Floats value) {
  if constexpr (type == Real::fp32) {
    store_vector(static_cast<float*>(x) + i, value);
    return;
  }
  if constexpr (type == Real::bf16) {
    const Uints bits = (Uints)value, magnitude = bits & 0x7FFFFFFF;
    const Uints rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const Uints quiet = (bits >> 16 & 0x8000) | 0x7FC0;
    const Uints result = magnitude > 0x7F800000 ? quiet : rounded;
    store_vector(static_cast<uint16_t*>(x) + i, low_halves(result));
    return;
  }
#if defined(DEEPKERN_AVX512)
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  store_vector(static_cast<uint16_t*>(x) + i, (Halves)_mm512_cvtps_ph((__m512)value, NEAREST));
#elif defined(DEEPKERN_AVX2)
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  store_vector(static_cast<uint16_t*>(x) + i, (Halves)_mm256_cvtps_ph((__m256)value, NEAREST));
#else
  for (int j = 0; j < LANES; ++j) deepkern::store<type>(x, i + j, value[j]);
#endif
}

template <Real type>
DEEPKERN_INLINE void store_first_floats(void* x, int64_t i, Floats value, int64_t count) {
  for (int64_t j = 0; j < count; ++j) deepkern::store<type>(x, i + j, value[j]);
}

// e4m3 codes as floats, exactly: all 256 codes, with subnormals and NaN.

// Each lane has a code in [0, 255].
DEEPKERN_INLINE Floats widen_e4m3(Ints code) {
  // The bits of a magnitude at the place of a float32, plus 120 in the exponent. A subnormal has no
  // leading one: add the smallest normal, 2^-6, as the leading one and subtract it again.
  const Ints magnitude = (code & 0x7F) << 20;
  const Floats normal = floats_of(magnitude + (120 << 23));
  const Floats subnormal = floats_of(magnitude + (121 << 23)) - 0x1p-6f;
  Ints bits = bits_of((code & 0x78) == 0 ? subnormal : normal);
  bits = (code & 0x7F) == 0x7F ? Ints{} + 0x7FC00000 : bits;
  return floats_of(bits | (code & 0x80) << 24);
}

DEEPKERN_INLINE Floats widen_e4m3(const uint8_t* codes) {
#if defined(DEEPKERN_AVX512) || defined(DEEPKERN_AVX2)
  // The bits of a code at the place of a float16 are the value times 2^-8. Sign extension fills the
  // upper byte with the sign; the mask clears the topmost exponent bit. Adding one unit in the last
  // place carries into that bit for NaN alone, and with it the exponent is that of a NaN.
  const SignedBytes code = load_vector<SignedBytes>(codes);
  SignedHalves half = __builtin_convertvector(code, SignedHalves) << 7;
  half &= (int16_t)0xBFFF;
  half |= (half + (int16_t)0x80) & (int16_t)0x4000;
  return halves_to_floats((Halves)half) * 256.0f;
#else
  return widen_e4m3(__builtin_convertvector(load_vector<Bytes>(codes), Ints));
#endif
}

// e4m3 codes of LANES floats: rounds to nearest even, saturates at 448; NaN becomes 0x7F.
DEEPKERN_INLINE Ints e4m3_codes(Floats x) {
  const Ints bits = bits_of(x), magnitude = bits & 0x7FFFFFFF;
  const Ints largest = Ints{} + 0x43E00000;  // 448
  const Ints clamped = magnitude < largest ? magnitude : largest;
  // Keep 3 mantissa bits, ties to even, and change the exponent's bias from 127 to 7.
  const Ints normal = ((clamped + 0x7FFFF + (clamped >> 20 & 1)) >> 20) - (120 << 3);
  // Below 2^-6 the code counts units of 2^-9: adding 1.5 * 2^23 rounds to integers.
  const Ints small = bits_of(floats_of(clamped) * 512.0f + 12582912.0f) & 0xFF;
  Ints code = (clamped < 0x3C800000 ? small : normal) | (bits >> 24 & 0x80);
  return magnitude > INFINITY_BITS ? Ints{} + 0x7F : code;
}

DEEPKERN_INLINE void store_e4m3(uint8_t* codes, Floats x) {
  store_vector(codes, __builtin_convertvector(e4m3_codes(x), Bytes));
}

// e^x within 1.5 units in the last place; 0 below -87.3, inf above 88.7, NaN for NaN.
DEEPKERN_INLINE Floats exp(Floats x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2. ln 2 is subtracted in two parts, the first exact.
  const Floats bounded = max(broadcast(-87.3f), min(broadcast(88.8f), x));
  const Floats n = round_to_integer(bounded * 1.44269504f);
  Floats r = fma(n, broadcast(-0x1.62e4p-1f), bounded);
  r = fma(n, broadcast(-1.42860682e-6f), r);
  // Minimax polynomial of (e^r - 1 - r) / r² on [-ln 2 / 2, ln 2 / 2].
  Floats p = broadcast(0.00138144672f);
  p = fma(p, r, broadcast(0.00836878084f));
  p = fma(p, r, broadcast(0.0416683927f));
  p = fma(p, r, broadcast(0.166665196f));
  p = fma(p, r, broadcast(0.49999994f));
  p = fma(p, r * r, r) + 1.0f;
  // Times 2^n in two steps, since n may be 128.
  const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
  const Floats result = p * floats_of((half + 127) << 23) * floats_of((whole - half + 127) << 23);
  const Floats tiny = x < -87.3f ? Floats{} : result;
  return x == x ? tiny : x;
}

// 2^x within 2 units in the last place for x <= 0 (and small positive x); 0 below -125, NaN for NaN.
DEEPKERN_INLINE Floats exp2_of_negative(Floats x) {
  // x = n + r with |r| <= 1/2. The low bits of n + magic are n.
  const Floats bounded = max(broadcast(-125.0f), x);
  const Floats shifted = bounded + 12582912.0f;  // 1.5 * 2^23
  const Floats r = bounded - (shifted - 12582912.0f);
  // Minimax polynomial of 2^r on [-1/2, 1/2].
  Floats p = broadcast(0.00132647273f);
  p = fma(p, r, broadcast(0.00967151299f));
  p = fma(p, r, broadcast(0.0555073358f));
  p = fma(p, r, broadcast(0.240222424f));
  p = fma(p, r, broadcast(0.693147004f));
  p = fma(p, r, broadcast(1.0f));
  const Floats power = floats_of((bits_of(shifted) << 23) + 0x3F800000);
  return x < -125.0f ? Floats{} : p * power;
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
