// Online softmax attention of 1, 2 or 4 rows over a small tile of tokens; see every_isa.h.
//
// The lanes of a vector are values of a token, so that every lane is used. Queries are
// [ROWS][pitch], zero past W, as are the tokens. The sums of values are [ROWS][R], with R a
// multiple of 16.
//
// Limit: memory bandwidth and the conversion of tokens to float32.

namespace deepkern::DEEPKERN_ISA {
namespace {

constexpr int64_t FEW_ROWS = 4;
constexpr int64_t FEW_TILE = 8;  // tokens; their values fit into L1
constexpr int64_t FEW_SCORES = FEW_TILE > LANES ? FEW_TILE : LANES;

// scores[row][n] = queries[row] . token n
template <int ROWS>
DEEPKERN_INLINE void few_scores(const float* queries, const TokenTile& tile, int64_t W,
                                float (*scores)[FEW_SCORES]) {
  constexpr int VECTORS = 8 / ROWS;
  for (int64_t n = 0; n < tile.count; ++n) {
    const float* token = tile.values + n * tile.pitch;
    Floats sum[ROWS][VECTORS] = {};
    int64_t w = 0;
    for (; w + VECTORS * LANES <= W; w += VECTORS * LANES) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        const Floats x = load_vector<Floats>(token + w + v * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
          const Floats q = load_vector<Floats>(queries + i * tile.pitch + w + v * LANES);
          sum[i][v] = fma(q, x, sum[i][v]);
        }
      }
    }
    for (; w < W; w += LANES) {
      const Floats x = load_vector<Floats>(token + w);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
        sum[i][0] = fma(load_vector<Floats>(queries + i * tile.pitch + w), x, sum[i][0]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
      for (int v = 1; v < VECTORS; ++v) sum[i][0] = sum[i][0] + sum[i][v];
      scores[i][n] = sum_of_lanes(sum[i][0]);
    }
  }
}

// Turns the scores of one row into weights, updates its maximum and sum, returns alpha.
DEEPKERN_INLINE float few_softmax(const TokenTile& tile, int32_t limit, float softmax_scale,
                                  float* scores, float* row_max, float* row_sum) {
  for (int64_t n = 0; n < FEW_SCORES; ++n) {
    const bool attended = n < tile.count && tile.position[n] < limit;
    scores[n] = attended ? scores[n] * softmax_scale : NO_SCORE;
  }
  Floats largest = broadcast(*row_max);
  for (int64_t n = 0; n < FEW_SCORES; n += LANES) {
    largest = max(largest, load_vector<Floats>(scores + n));
  }
  const float new_max = max_of_lanes(largest);
  const float finite_max = new_max == NO_SCORE ? 0.0f : new_max;
  const float alpha = exp(broadcast(*row_max - finite_max))[0];
  Floats sum = {};
  for (int64_t n = 0; n < FEW_SCORES; n += LANES) {
    const Floats weight = exp(load_vector<Floats>(scores + n) - finite_max);
    store_vector(scores + n, weight);
    sum = sum + weight;
  }
  *row_max = new_max;
  *row_sum = *row_sum * alpha + sum_of_lanes(sum);
  return alpha;
}

// sums[row][r] = (0 or alpha[row] * sums[row][r]) + sum over n of weights[row][n] * token n [r]
// for VECTORS vectors of r.
template <int ROWS, int VECTORS>
DEEPKERN_INLINE void few_values(const float (*weights)[FEW_SCORES], const TokenTile& tile,
                                const float* alpha, bool first, int64_t R, int64_t r, float* sums) {
  Floats sum[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const Floats earlier = load_vector<Floats>(sums + i * R + r + v * LANES);
      sum[i][v] = first ? Floats{} : earlier * broadcast(alpha[i]);
    }
  }
  for (int64_t n = 0; n < tile.count; ++n) {
    const float* token = tile.values + n * tile.pitch + r;
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const Floats x = load_vector<Floats>(token + v * LANES);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) sum[i][v] = fma(broadcast(weights[i][n]), x, sum[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store_vector(sums + i * R + r + v * LANES, sum[i][v]);
  }
}

// One tile of up to FEW_TILE tokens. limit: the positions that each row attends to. first: whether
// `state` has no earlier tokens.
template <int ROWS>
void attend_few_rows(const float* queries, int64_t W, const TokenTile& tile, const int32_t* limit,
                     float softmax_scale, bool first, const RowState& state) {
  constexpr int VECTORS = 8 / ROWS;
  float scores[ROWS][FEW_SCORES], alpha[ROWS];
  few_scores<ROWS>(queries, tile, W, scores);
  for (int i = 0; i < ROWS; ++i) {
    alpha[i] = few_softmax(tile, limit[i], softmax_scale, scores[i], state.row_max() + i,
                           state.row_sum() + i);
  }
  int64_t r = 0;
  for (; r + VECTORS * LANES <= state.R; r += VECTORS * LANES) {
    few_values<ROWS, VECTORS>(scores, tile, alpha, first, state.R, r, state.sums());
  }
  for (; r < state.R; r += LANES) {
    few_values<ROWS, 1>(scores, tile, alpha, first, state.R, r, state.sums());
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
