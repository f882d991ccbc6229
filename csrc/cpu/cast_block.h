// The FP8 cast of blocks of 128 values, for every op that ends in a cast; see every_isa.h.
//
//     scale = max(max |x|, 1e-4) / 448        (rounded up to 2^n for ue8m0)
//     q     = e4m3(x * (1 / scale))
//
// All operations are IEEE and exact or rounded once, so every instruction set gives the same bits.

namespace deepkern::DEEPKERN_ISA {
namespace {

// The scale for values whose largest magnitude has these bits; bits of magnitudes order as the
// values do, inf and NaN last. Inf or NaN makes the block NaN.
DEEPKERN_INLINE float block_scale(int32_t amax_bits, bool ue8m0) {
  if (amax_bits >= INFINITY_BITS) return as_float(0x7FC00000);
  const float scale = std::max(as_float(amax_bits), 1e-4f) / 448.0f;
  return ue8m0 ? as_float((as_bits(scale) + 0x7FFFFF) & INFINITY_BITS) : scale;
}

DEEPKERN_INLINE int32_t largest_lane(Ints x) {
#if defined(DEEPKERN_AVX512)
  return _mm512_reduce_max_epi32((__m512i)x);
#elif defined(DEEPKERN_AVX2)
  const __m256i all = (__m256i)x;
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xB1)));
#else
  int32_t lane[LANES], largest = 0;
  store_vector(lane, x);
  for (int i = 0; i < LANES; ++i) largest = std::max(largest, lane[i]);
  return largest;
#endif
}

// Per lane, the larger of `amax` and the bits of the magnitudes of 128 elements at x[offset].
template <Real type>
DEEPKERN_INLINE Ints largest_magnitudes(const void* x, int64_t offset, Ints amax) {
  for (int i = 0; i < 128; i += LANES) {
    const Ints magnitude = bits_of(load_floats<type>(x, offset + i)) & 0x7FFFFFFF;
    amax = magnitude > amax ? magnitude : amax;
  }
  return amax;
}

// e4m3 codes of floats that round to at most 448; no NaN. Adding 1.5 * 2^20 times the largest power
// of two in a value rounds it to 3 mantissa bits, ties to even, and puts them into
// the low bits. Below 2^-6 the power is 2^-6, which gives the subnormal codes.
DEEPKERN_INLINE Ints e4m3_codes_in_range(Floats x) {
  const Ints bits = bits_of(x), magnitude = bits & 0x7FFFFFFF;
  const Ints smallest = Ints{} + 0x3C800000;  // 2^-6
  const Ints power = (magnitude > smallest ? magnitude : smallest) & INFINITY_BITS;
  const Ints magic = power + ((20 << 23) + 0x400000);
  const Ints units = bits_of(floats_of(magnitude) + floats_of(magic)) - magic;
  return (units + (power >> 20) - (121 << 3)) | (bits >> 24 & 0x80);
}

// q[i] = e4m3(x[offset + i] * inverse) for 128 elements; |x| * inverse is at most 448, or inverse
// is NaN.
template <Real type>
DEEPKERN_INLINE void encode_block(const void* x, int64_t offset, float inverse, uint8_t* q) {
  if (inverse != inverse) {
    std::memset(q, 0x7F, 128);
    return;
  }
  for (int i = 0; i < 128; i += 4 * LANES) {
    Ints codes[4];
    for (int j = 0; j < 4; ++j) {
      codes[j] = e4m3_codes_in_range(load_floats<type>(x, offset + i + j * LANES) * inverse);
    }
    store_bytes(q + i, codes[0], codes[1], codes[2], codes[3]);
  }
}

// Loads count <= 128 elements as floats; zero up to 128.
template <Real type>
DEEPKERN_INLINE void load_block(const void* x, int64_t offset, int64_t count, float* out) {
  if (count == 128) {
    for (int i = 0; i < 128; i += LANES) store_vector(out + i, load_floats<type>(x, offset + i));
    return;
  }
  for (int64_t i = 0; i < 128; ++i) out[i] = i < count ? deepkern::load<type>(x, offset + i) : 0.0f;
}

// Elements that cast_values() takes at a time. Encoding a block waits for its scale, and the scale
// for all values and two divisions; 8 independent blocks hide that latency.
constexpr int64_t CAST_VALUES = 8 * 128;

// Casts count <= CAST_VALUES elements at x[offset]; writes q[count] and the scale of block i to
// scale[i * scale_stride]. x is not read past count.
template <Real type>
DEEPKERN_INLINE void cast_values(const void* x, int64_t offset, int64_t count, uint8_t* q,
                                 float* scale, int64_t scale_stride, bool ue8m0) {
  const int64_t full = count / 128, rest = count % 128;
  int32_t amax[CAST_VALUES / 128];
  float inverse[CAST_VALUES / 128], last[128];
  for (int64_t i = 0; i < full; ++i) {
    amax[i] = largest_lane(largest_magnitudes<type>(x, offset + i * 128, Ints{}));
  }
  if (rest > 0) {
    load_block<type>(x, offset + full * 128, rest, last);
    amax[full] = largest_lane(largest_magnitudes<Real::fp32>(last, 0, Ints{}));
  }
  for (int64_t i = 0; i < full + (rest > 0); ++i) {
    const float s = block_scale(amax[i], ue8m0);
    scale[i * scale_stride] = s;
    inverse[i] = 1.0f / s;
  }
  for (int64_t i = 0; i < full; ++i) {
    encode_block<type>(x, offset + i * 128, inverse[i], q + i * 128);
  }
  if (rest == 0) return;
  uint8_t codes[128];
  encode_block<Real::fp32>(last, 0, inverse[full], codes);
  std::memcpy(q + full * 128, codes, rest);
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
