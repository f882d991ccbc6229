// Online softmax attention of blocks of rows over a tile of tokens in float32; see every_isa.h.
//
// The lanes of a vector are rows: a block has VECTORS * LANES rows. Its queries are [W][block], its
// scores [tokens][block] and its sums of values [R][block]. Both matrix products then multiply
// vectors of rows by values of the tile, which a load broadcasts, and the softmax needs no
// operation across lanes.
//
// Limit: the FMA units. A step of 2 vectors and 6 broadcast values is 12 multiply-adds for 8 loads.

namespace deepkern::DEEPKERN_ISA {
namespace {

constexpr int64_t BLOCK = 2 * LANES;  // rows of a block of 2 vectors
constexpr int64_t TILE = 48;          // tokens
constexpr int64_t WIDTH_BLOCK = 192;  // values of a key per pass; queries of a pass fit into L1

enum class Start { zero, sum, scaled_sum };  // initial value of a product's sums

// c[j] = (0, c[j] or alpha * c[j]) + sum over k < K of a[k] * b[j, k]
// for j < ROWS. a[k] and c[j] are VECTORS vectors; b[j, k] is b[j * stride + k], or
// b[k * stride + j] without ALONG_K.
template <int VECTORS, int ROWS, bool ALONG_K, Start start>
DEEPKERN_INLINE void multiply_rows(const float* a, const float* b, int64_t stride, int64_t K,
                                   const Floats* alpha, float* c) {
  Floats sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int j = 0; j < ROWS; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      const float* from = c + (j * VECTORS + v) * LANES;
      sum[j][v] = Floats{};
      if constexpr (start != Start::zero) sum[j][v] = load_vector<Floats>(from);
      if constexpr (start == Start::scaled_sum) sum[j][v] = sum[j][v] * alpha[v];
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    Floats x[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) x[v] = load_vector<Floats>(a + (k * VECTORS + v) * LANES);
#pragma GCC unroll 16
    for (int j = 0; j < ROWS; ++j) {
      const Floats y = broadcast(ALONG_K ? b[j * stride + k] : b[k * stride + j]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[j][v] = fma(x[v], y, sum[j][v]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < ROWS; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store_vector(c + (j * VECTORS + v) * LANES, sum[j][v]);
  }
}

// The same for j < N.
template <int VECTORS, bool ALONG_K, Start start>
void multiply(const float* a, const float* b, int64_t stride, int64_t K, int64_t N,
              const Floats* alpha, float* c) {
#if defined(DEEPKERN_AVX512)
  constexpr int ROWS = 8;
#else
  constexpr int ROWS = VECTORS == 2 ? 6 : 8;
#endif
  const int64_t step = ALONG_K ? stride : 1, width = VECTORS * LANES;
  int64_t j = 0;
  for (; j + ROWS <= N; j += ROWS) {
    multiply_rows<VECTORS, ROWS, ALONG_K, start>(a, b + j * step, stride, K, alpha, c + j * width);
  }
  for (; j + 2 <= N; j += 2) {
    multiply_rows<VECTORS, 2, ALONG_K, start>(a, b + j * step, stride, K, alpha, c + j * width);
  }
  if (j < N) {
    multiply_rows<VECTORS, 1, ALONG_K, start>(a, b + j * step, stride, K, alpha, c + j * width);
  }
}

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
  constexpr int64_t width = VECTORS * LANES;
  for (int64_t w = 0; w < W; w += WIDTH_BLOCK) {
    const int64_t K = W - w < WIDTH_BLOCK ? W - w : WIDTH_BLOCK;
    const auto product =
        w == 0 ? multiply<VECTORS, true, Start::zero> : multiply<VECTORS, true, Start::sum>;
    product(queries + w * width, tile.values + w, tile.pitch, K, tile.count, nullptr, scores);
  }
  Floats alpha[VECTORS];
  online_softmax<VECTORS>(tile, limit, softmax_scale, scores, state, alpha);
  const auto product =
      first ? multiply<VECTORS, false, Start::zero> : multiply<VECTORS, false, Start::scaled_sum>;
  product(scores, tile.values, tile.pitch, tile.count, state.R, alpha, state.sums());
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
