// mla_decode: what a multiplying warpgroup does with a tile of 64 tokens.
#pragma once

#include "mla_load.cuh"

namespace sm90 {

// The value of this lane's row among the four lanes that share it.
SM90_DEVICE float largest_of_row(float x) {
  x = larger(x, shuffle_xor(x, 1));
  return larger(x, shuffle_xor(x, 2));
}
SM90_DEVICE float sum_of_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// What a thread keeps of its two rows, `row` and `row` + 8.
struct Rows {
  float top[2], total[2];  // largest score; sum of the weights that this thread made
  float excess[2][2];      // by block of its columns: what rounding added to the weights used
};

// A larger maximum: `shrink` is what sums over earlier tokens are worth beside it.
SM90_DEVICE void raise_top(Rows& rows, float (&shrink)[2], const float (&top)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Nothing seen yet: all weights are 0.
    shrink[half] = exp2_of(rows.top[half] - (top[half] == minus_infinity() ? 0.0f : top[half]));
    rows.total[half] *= shrink[half];
    rows.excess[0][half] *= shrink[half];
    rows.excess[1][half] *= shrink[half];
    rows.top[half] = top[half];
  }
}

// Scores become weights. `first`: the tile's first token; `limits`: how many the two rows see.
SM90_DEVICE void weigh(float (&score)[32], float (&shrink)[2], Rows& rows, float score_scale,
                       int first, const char* places, const char* limits) {
  float top[2] = {rows.top[0], rows.top[1]};
  const int room[2] = {smaller(load_shared<int>(limits) - first, MlaTile::TOKENS),
                       smaller(load_shared<int>(limits + 32) - first, MlaTile::TOKENS)};
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const int two = load_shared<uint16_t>(places + i * 2 + lane_index() % 4 * 2);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool seen = (j % 2 ? two >> 8 : two & 255) < room[j / 2];
      score[i + j] = seen ? score[i + j] * score_scale : minus_infinity();
      top[j / 2] = larger(score[i + j], top[j / 2]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) top[half] = largest_of_row(top[half]);
  raise_top(rows, shrink, top);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const float zero = top[i / 2 % 2] == minus_infinity() ? 0.0f : top[i / 2 % 2];
    score[i] = exp2_of(score[i] - zero);
    rows.total[i / 2 % 2] += score[i];
  }
}

// The products of COUNT columns of q, from `first` on, with the tile's tokens: added, or set if
// `add` is false.
template <int COUNT>
SM90_DEVICE void multiply_queries(float (&score)[32], const char* queries, const char* keys,
                                  int first, bool add) {
#pragma unroll
  for (int step = 0; step < COUNT * 4; ++step) {
    const int at = (first + step / 4) * MlaTile::COLUMN_BYTES + step % 4 * 32;
    wgmma_bf16<64>(score, matrix_descriptor(queries + at, 0, 1024),
                   matrix_descriptor(keys + at, 0, 1024), add || step > 0);
  }
}

// Q · Kᵀ of a tile, the left columns while the others still come.
SM90_DEVICE void score_tile(float (&score)[32], const char* queries, const TokenTile& tile,
                            Barrier* full, uint32_t round) {
  barrier_wait(full, round);
  wgmma_fence();
  multiply_queries<MlaTile::LEFT_COLUMNS>(score, queries, tile.tokens, 0, false);
  barrier_wait(full + 1, round);
  wgmma_fence();  // ptxas wants one behind the wait's loop
  multiply_queries<MlaTile::COLUMNS - MlaTile::LEFT_COLUMNS>(score, queries, tile.tokens,
                                                             MlaTile::LEFT_COLUMNS, true);
  wgmma_commit();
  wgmma_wait<0>();
}

// The same over an FP8 cache: block by block, and RoPE last. What has been summed is multiplied by
// quotients of ratios, so that in the end each block has been by its own.
SM90_DEVICE void score_fp8_tile(float (&score)[32], const char* queries, const TokenTile& tile,
                                Barrier* full, uint32_t round) {
  barrier_wait(full, round);
  barrier_wait(full + 1, round);
#pragma unroll
  for (int j = 0; j < MlaTile::BLOCKS; ++j) {
    wgmma_fence();
    multiply_queries<2>(score, queries, tile.tokens, 2 * j, j > 0);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const int column = i * 2 + lane_index() % 4 * 2;
      const auto factor =
          load_shared<FloatPair>(tile.factors + (j * MlaTile::TOKENS + column) * 4);
      score[i] *= factor.low, score[i + 1] *= factor.high;
      score[i + 2] *= factor.low, score[i + 3] *= factor.high;
    }
  }
  wgmma_fence();
  multiply_queries<1>(score, queries, tile.tokens, MlaTile::COLUMNS - 1, true);
  wgmma_commit();
  wgmma_wait<0>();
}

// The weights of a tile that one warpgroup makes, the other one's thread of the same number needs
// in the same order: pairs go from one to the other, in 64 bytes that both take turns with.
template <bool FP8>
SM90_DEVICE void pack_weights(uint32_t (&pair)[4][4], const float (&weight)[32]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float low = weight[2 * i], high = weight[2 * i + 1];
    pair[i / 4][i % 4] = FP8 ? pack(to_fp16(low), to_fp16(high)) : pack(to_bf16(low), to_bf16(high));
  }
}
SM90_DEVICE void give_weights(const uint32_t (&pair)[4][4], char* weights) {
#pragma unroll
  for (int step = 0; step < MlaTile::TOKENS / 16; ++step) {
    const auto& of = pair[step];
    store_shared(weights + step * 2048 + thread_index() % 128 * 16,
                 Chunk{.word = {of[0], of[1], of[2], of[3]}});
  }
}
// Those of 16 tokens.
SM90_DEVICE void take_weights(uint32_t (&pair)[4], const char* weights, int step) {
  const auto taken = load_shared<Chunk>(weights + step * 2048 + thread_index() % 128 * 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) pair[i] = taken.word[i];
}

SM90_DEVICE void scale_sums(float (&sum)[2][64], const float (&shrink)[2]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) sum[i / 64][i % 64] *= shrink[i / 2 % 2];
}

// sum += P · V of 16 tokens, from `first` on, and this warpgroup's 256 columns: begun.
template <int GROUP>
SM90_DEVICE void add_values(float (&sum)[2][64], const uint32_t (&pair)[4], const TokenTile& tile,
                            int first) {
  auto& all = reinterpret_cast<float(&)[128]>(sum);
  const char* values = tile.tokens + GROUP * MlaTile::LEFT_COLUMNS * MlaTile::COLUMN_BYTES;
  wgmma_bf16<256, false>(all, pair,
                         matrix_descriptor(values + first * 128, MlaTile::COLUMN_BYTES, 1024),
                         true);
}

// The same of 16 tokens, from `first` on, of an FP8 cache: each of the two blocks of columns has
// weights of its own, times the ratios. What rounding makes of them is counted, as if the weight had
// been another: so it cancels where one token outweighs the others.
template <int GROUP>
SM90_DEVICE void add_fp8_values(float (&sum)[2][64], Rows& rows, const uint32_t (&pair)[4],
                                const TokenTile& tile, int first) {
  uint32_t scaled[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = i % 2, column = first + i / 2 * 8 + lane_index() % 4 * 2;
    const float low = to_float(low_fp16(pair[i])), high = to_float(high_fp16(pair[i]));
    FloatPair ratio{1.0f, 1.0f};
#pragma unroll
    for (int j = MlaTile::BLOCKS - 1; j >= 2 * GROUP; --j) {
      const auto factor =
          load_shared<FloatPair>(tile.factors + (j * MlaTile::TOKENS + column) * 4);
      ratio.low *= factor.low, ratio.high *= factor.high;
      if (j > 2 * GROUP + 1) continue;
      const int b = j - 2 * GROUP;
      const float left = low * ratio.low, right = high * ratio.high;
      scaled[b][i] = pack(to_bf16(left), to_bf16(right));
      // As if all ratios were 1, which is near enough for so little.
      rows.excess[b][half] += to_float(low_bf16(scaled[b][i])) - left;
      rows.excess[b][half] += to_float(high_bf16(scaled[b][i])) - right;
    }
  }
  const char* values = tile.tokens + GROUP * MlaTile::LEFT_COLUMNS * MlaTile::COLUMN_BYTES;
  wgmma_fence();
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const char* from = values + b * 2 * MlaTile::COLUMN_BYTES + first * 128;
    wgmma_bf16<128, false>(sum[b], scaled[b],
                           matrix_descriptor(from, MlaTile::COLUMN_BYTES, 1024), true);
  }
  wgmma_commit();
}

}  // namespace sm90
