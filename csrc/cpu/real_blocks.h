// Blocks of up to 128 elements of any real dtype as floats, for every op that computes a block at a
// time; needs cast_block.h. See every_isa.h.

namespace deepkern::DEEPKERN_ISA {
namespace {

// x[i] as a float.
DEEPKERN_INLINE float load_real(const void* x, Real real, int64_t i) {
  DEEPKERN_FOR_REAL(real, return deepkern::load<type>(x, i));
}

// Loads x[offset], ..., x[offset + count - 1] for count <= 128; zero up to 128.
DEEPKERN_INLINE void load_real_block(const void* x, Real real, int64_t offset, int64_t count,
                                     float* out) {
  DEEPKERN_FOR_REAL(real, load_block<type>(x, offset, count, out));
}

// Rounds count <= 128 floats to `type` and stores them at x[offset].
template <Real type>
DEEPKERN_INLINE void store_block(void* x, int64_t offset, int64_t count, const float* in) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    store_floats<type>(x, offset + i, load_vector<Floats>(in + i));
  }
  for (; i < count; ++i) deepkern::store<type>(x, offset + i, in[i]);
}

DEEPKERN_INLINE void store_real_block(void* x, Real real, int64_t offset, int64_t count,
                                      const float* in) {
  DEEPKERN_FOR_REAL(real, store_block<type>(x, offset, count, in));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
