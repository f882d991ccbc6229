// Products of a block of rows and a tile of tokens in float32; see every_isa.h.
//
// The lanes of a vector are rows: a block has VECTORS * LANES rows. A product multiplies vectors of
// rows by values of the tile, which a load broadcasts, so it needs no operation across lanes.
//
// Limit: the FMA units. A step of 2 vectors and 6 broadcast values is 12 multiply-adds for 8 loads.

namespace deepkern::DEEPKERN_ISA {
namespace {

constexpr int64_t BLOCK = 2 * LANES;  // rows of a block of 2 vectors
constexpr int64_t TILE = 48;          // tokens
constexpr int64_t WIDTH_BLOCK = 192;  // values of a key per pass; queries of a pass fit into L1

// Rows of the block that starts at row i of `rows` rows: 2 vectors, or 1 if that is enough.
inline int64_t block_rows(int64_t rows, int64_t i) { return rows - i > LANES ? BLOCK : LANES; }

// Floats between the tokens of a tile with W values: an odd number of cache lines, so that the same
// value of all tokens is in different sets.
inline int64_t tile_pitch(int64_t W) {
  const int64_t lines = (W + 15) / 16;
  return (lines % 2 == 0 ? lines + 1 : lines) * 16;
}

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

// scores[n] = sum over w of queries[w] * tile[n, w]: [count][VECTORS * LANES]. queries:
// [W][VECTORS * LANES]; tile: [count][pitch].
template <int VECTORS>
void score_block(const float* queries, int64_t W, const float* tile, int64_t pitch, int64_t count,
                 float* scores) {
  if (W == 0) std::memset(scores, 0, count * VECTORS * LANES * sizeof(float));
  for (int64_t w = 0; w < W; w += WIDTH_BLOCK) {
    const int64_t K = W - w < WIDTH_BLOCK ? W - w : WIDTH_BLOCK;
    const auto product =
        w == 0 ? multiply<VECTORS, true, Start::zero> : multiply<VECTORS, true, Start::sum>;
    product(queries + w * VECTORS * LANES, tile + w, pitch, K, count, nullptr, scores);
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
