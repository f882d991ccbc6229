// The Walsh-Hadamard transform of one row of floats; see every_isa.h.
//
// Rounds of butterflies (a, b) -> (a + b, a - b), one per bit of the index, lowest bit first, each
// result rounded to float32: the bits do not depend on the instruction set.

namespace deepkern::DEEPKERN_ISA {
namespace {

// Lane i becomes lane i ^ distance.
template <int distance>
DEEPKERN_INLINE Floats swap_lanes(Floats x) {
  const Ints partner = lane_index() ^ distance;
#if defined(__clang__)
  Floats swapped;
  for (int i = 0; i < LANES; ++i) swapped[i] = x[partner[i]];
  return swapped;
#else
  return __builtin_shuffle(x, partner);
#endif
}

// One round within a vector, for indices that differ by `distance`.
template <int distance>
DEEPKERN_INLINE Floats butterfly(Floats x) {
  const Ints sign = (lane_index() & distance) == 0 ? Ints{} : broadcast_int(INT32_MIN);
  return swap_lanes<distance>(x) + floats_of(bits_of(x) ^ sign);  // a + b, and a - b
}

// All rounds within a vector.
DEEPKERN_INLINE Floats transform_lanes(Floats x) {
  x = butterfly<1>(x);
  x = butterfly<2>(x);
  if constexpr (LANES > 4) x = butterfly<4>(x);
  if constexpr (LANES > 8) x = butterfly<8>(x);
  return x;
}

// Transforms x[0 : N] in place; N: a power of two.
inline void transform_row(float* x, int64_t N) {
  int64_t half = 1;
  if (N >= LANES) {
    for (int64_t i = 0; i < N; i += LANES) {
      store_vector(x + i, transform_lanes(load_vector<Floats>(x + i)));
    }
    half = LANES;
  }
  for (; half < N; half *= 2) {
    for (int64_t start = 0; start < N; start += 2 * half) {
      if (half < LANES) {
        for (int64_t i = start; i < start + half; ++i) {
          const float a = x[i], b = x[i + half];
          x[i] = a + b;
          x[i + half] = a - b;
        }
        continue;
      }
      for (int64_t i = start; i < start + half; i += LANES) {
        const Floats a = load_vector<Floats>(x + i), b = load_vector<Floats>(x + i + half);
        store_vector(x + i, a + b);
        store_vector(x + i + half, a - b);
      }
    }
  }
}

// y = scale · H x for one row x[offset : offset + N] of a tensor.
template <Real type>
DEEPKERN_INLINE void hadamard_row(const void* x, int64_t offset, int64_t N, float scale, float* y) {
  int64_t i = 0;
  for (; i + LANES <= N; i += LANES) store_vector(y + i, load_floats<type>(x, offset + i));
  for (; i < N; ++i) y[i] = deepkern::load<type>(x, offset + i);
  transform_row(y, N);
  for (i = 0; i < N; ++i) y[i] *= scale;
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
