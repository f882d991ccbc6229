// The online softmax of LANES rows in the lanes of a vector; see every_isa.h.

namespace deepkern::DEEPKERN_ISA {
namespace {

inline void start_softmax(const OnlineSoftmax& s, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    s.row_max[i] = -std::numeric_limits<float>::infinity();
    s.row_sum[i] = 0.0f;
  }
}

// Rows [row, row + LANES) of a tile of `keys` keys: scores become weights. The scores are
// multiplied by `scale`. With `masked` a row attends to the first `limit` keys of the tile. With
// `keep_nan` the maximum of a row with NaN is NaN.
template <bool masked, bool keep_nan>
DEEPKERN_INLINE void softmax_lanes(const OnlineSoftmax& s, int64_t row, int64_t keys, float scale,
                                   Ints limit = Ints{}) {
  const Floats minus_infinity = broadcast(-std::numeric_limits<float>::infinity());
  const Floats old_max = load_vector<Floats>(s.row_max + row), factor = broadcast(scale);
  float* const scores = s.scores.data + row;
  Floats new_max = old_max;
  for (int64_t i = 0; i < keys; ++i) {
    Floats score = load_vector<Floats>(scores + i * s.scores.stride) * factor;
    if (masked) score = broadcast_int(i) < limit ? score : minus_infinity;
    const Floats larger = max(new_max, score);
    new_max = keep_nan ? (new_max == new_max ? larger : new_max) : larger;
  }
  const Floats finite_max = new_max == minus_infinity ? Floats{} : new_max;  // no key yet
  const Floats alpha = exp2_of_negative(old_max - finite_max);
  Floats sum = load_vector<Floats>(s.row_sum + row) * alpha;
  for (int64_t i = 0; i < keys; ++i) {
    const Floats score = load_vector<Floats>(scores + i * s.scores.stride);
    Floats weight = exp2_of_negative(fma(score, factor, -finite_max));
    if (masked) weight = broadcast_int(i) < limit ? weight : Floats{};
    store_vector(scores + i * s.scores.stride, weight);
    sum += weight;
  }
  store_vector(s.row_max + row, new_max);
  store_vector(s.row_sum + row, sum);
  store_vector(s.alpha + row, alpha);
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
