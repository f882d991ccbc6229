// Online softmax attention of blocks of rows over a tile of tokens in float32; see every_isa.h.
//
// As in attention_products.h, the lanes of a vector are rows. The scores of a block are
// [tokens][block] and its sums of values [R][block], so the softmax needs no operation across
// lanes.

namespace deepkern::DEEPKERN_ISA {
namespace {

// Turns scores [count][VECTORS * LANES] into weights and updates the maxima and sums of `state`.
// alpha: the factor of the earlier sums. limit: the positions that each row attends to.
template <int VECTORS>
void online_softmax(const TokenTile& tile, const int32_t* limit, float softmax_scale, float* scores,
                    const RowState& state, Floats* alpha) {
  const Floats scale = broadcast(softmax_scale), none = broadcast(NO_SCORE);
  for (int v = 0; v < VECTORS; ++v) {
    const Ints row_limit = load_vector<Ints>(limit + v * LANES);
    const Floats earlier_max = load_vector<Floats>(state.row_max() + v * LANES);
    Floats row_max = earlier_max;
    for (int64_t n = 0; n < tile.count; ++n) {
      float* at = scores + (n * VECTORS + v) * LANES;
      Floats score = load_vector<Floats>(at) * scale;
      if (tile.masked) score = broadcast_int(tile.position[n]) < row_limit ? score : none;
      store_vector(at, score);
      row_max = max(row_max, score);
    }
    const Floats finite_max = row_max == none ? Floats{} : row_max;
    alpha[v] = exp(earlier_max - finite_max);
    Floats row_sum = load_vector<Floats>(state.row_sum() + v * LANES) * alpha[v];
    for (int64_t n = 0; n < tile.count; ++n) {
      float* at = scores + (n * VECTORS + v) * LANES;
      const Floats weight = exp(load_vector<Floats>(at) - finite_max);
      store_vector(at, weight);
      row_sum = row_sum + weight;
    }
    store_vector(state.row_max() + v * LANES, row_max);
    store_vector(state.row_sum() + v * LANES, row_sum);
  }
}

// One tile of tokens for one block of rows. queries: [W][VECTORS * LANES]. scores: scratch of
// TILE * VECTORS * LANES floats. first: whether `state` has no earlier tokens.
template <int VECTORS>
void attend_block(const float* queries, int64_t W, const TokenTile& tile, const int32_t* limit,
                  float softmax_scale, bool first, float* scores, const RowState& state) {
  score_block<VECTORS>(queries, W, tile.values, tile.pitch, tile.count, scores);
  Floats alpha[VECTORS];
  online_softmax<VECTORS>(tile, limit, softmax_scale, scores, state, alpha);
  const auto product =
      first ? multiply<VECTORS, false, Start::zero> : multiply<VECTORS, false, Start::scaled_sum>;
  product(scores, tile.values, tile.pitch, tile.count, state.R, alpha, state.sums());
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
