// mla_decode: one online-softmax step of a consumer warpgroup over a tile of 64 tokens:
//
//     S = Q·Kᵀ,  m' = max(m, rows of S),  alpha = 2^(m - m'),  P = 2^(S - m'),
//     row_sum = alpha · row_sum + rows of P,  O = alpha · O + P·V
//
// S and m are in base 2: softmax_scale_log2 = softmax_scale · log2(e). A warpgroup has 64 rows and
// 256 of the 512 columns of O. A thread has rows `row` and `row` + 8.
#pragma once

#include "mla_load.cuh"

namespace sm90 {

constexpr float LN_2 = 0.6931471805599453f;

// Reductions over the four lanes that share a row.
SM90_DEVICE float row_max_of(float x) {
  x = max_of(x, shuffle_xor(x, 1));
  return max_of(x, shuffle_xor(x, 2));
}
SM90_DEVICE float row_sum_of(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// State of a thread's two rows, indexed by row.
struct SoftmaxState {
  float row_max[2];
  float row_sum[2];  // over the values of P that this thread computed
  // FP8 cache, by block of 128 columns: the sum of the errors that rounding P to bf16 adds.
  float rounding_excess[2][2];
};

// Raises the maxima to `row_max`, rescales the sums, and sets alpha[row], the factor for O.
SM90_DEVICE void update_row_max(SoftmaxState& state, float (&alpha)[2],
                                const float (&row_max)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Before a row's first token the maximum is -inf; use 0 to avoid -inf - -inf.
    alpha[half] =
        exp2_of(state.row_max[half] - (row_max[half] == minus_infinity() ? 0.0f : row_max[half]));
    UNLESS_PLANTED(row_sum_not_rescaled, state.row_sum[half] *= alpha[half]);
    state.rounding_excess[0][half] *=
        PLANT(rounding_excess_not_rescaled, 100 * alpha[half], alpha[half]);
    state.rounding_excess[1][half] *= alpha[half];
    state.row_max[half] = row_max[half];
  }
}

// Whether all tokens of a tile are present: ABSENT has the high bit of its byte.
SM90_DEVICE bool all_present(const char* positions) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < MlaTile::TOKENS; i += 16) {
    const auto four = load_shared<Chunk>(positions + i);
    bits |= four.word[0] | four.word[1] | four.word[2] | four.word[3];
  }
  return (bits & 0x80808080) == 0;
}

// Sets the scores of tokens that a row does not attend to. `limit`: the number of the tile's tokens
// that the thread's two rows attend to, at most TOKENS, so that ABSENT is masked. `positions`: uint8
// [64] in smem.
SM90_DEVICE void mask_scores(float (&score)[32], float masked, const int (&limit)[2],
                             const char* positions) {
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const int two_positions = load_shared<uint16_t>(positions + i * 2 + lane_index() % 4 * 2);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool attends = (j % 2 ? two_positions >> 8 : two_positions & 255) < limit[j / 2];
      if (!attends) score[i + j] = masked;
    }
  }
}

// The extreme of each row's scores in this thread: the largest, or the smallest if LARGEST is false.
template <bool LARGEST>
SM90_DEVICE void extremes_of(float (&extreme)[2], const float (&score)[32]) {
  const auto better = [](float a, float b) { return LARGEST ? max_of(a, b) : min_of(a, b); };
  float best[2][2] = {{score[0], score[1]}, {score[2], score[3]}};  // two chains for each row
#pragma unroll
  for (int i = 4; i < 32; ++i) best[i / 2 % 2][i % 2] = better(best[i / 2 % 2][i % 2], score[i]);
  extreme[0] = better(best[0][0], best[0][1]);
  extreme[1] = better(best[1][0], best[1][1]);
}

// The maxima m' of the rows over this tile and the tiles before it. NaN scores are left out. `scale`:
// softmax_scale_log2, not 0.
SM90_DEVICE void row_maxima(float (&row_max)[2], const float (&score)[32],
                            const float (&old_max)[2], float scale) {
  float extreme[2];
  if (PLANT(largest_score_of_negative_scale, true, scale > 0.0f)) {
    extremes_of<true>(extreme, score);
  } else {
    extremes_of<false>(extreme, score);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    row_max[half] = max_of(row_max_of(extreme[half] * scale), old_max[half]);
  }
}

// Scores to P, in place: P = 2^(score · scale - m'), with one rounding in the exponent. Adds this
// thread's P to `sum`. A NaN score becomes a NaN in P.
SM90_DEVICE void exponentials(float (&score)[32], float (&sum)[2], const float (&row_max)[2],
                              float scale) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const float finite_max = row_max[i / 2 % 2] == minus_infinity() ? 0.0f : row_max[i / 2 % 2];
    score[i] = exp2_of(fused_multiply_add(score[i], scale, -finite_max));
    sum[i / 2 % 2] += score[i];
  }
}

// Issues WGMMAs over COUNT column blocks from `first` on: score (+)= q · keysᵀ. q and keys are
// tiles [64, 576] in smem. The first WGMMA overwrites the scores if `accumulate` is false.
template <int COUNT>
SM90_DEVICE void multiply_qk(float (&score)[32], const char* q, const char* keys, int first,
                             bool accumulate) {
  const uint64_t q_descriptor = matrix_descriptor(q, 0, 1024);
  const uint64_t k_descriptor = matrix_descriptor(keys, 0, 1024);
#pragma unroll
  for (int step = 0; step < COUNT * 4; ++step) {
    const uint32_t at = (first + step / 4) * MlaTile::COLUMN_BYTES + step % 4 * 32;
    wgmma_bf16<64>(score, advance_descriptor(q_descriptor, at),
                   advance_descriptor(k_descriptor, at), accumulate || step > 0);
  }
}

// score = Q·Kᵀ, bf16 cache. Multiplies piece 0 while piece 1 is still loading. `full`: the barriers
// of the tile's two pieces.
SM90_DEVICE void score_tile(float (&score)[32], const char* q, const TokenTile& tile, Barrier* full,
                            uint32_t phase) {
  UNLESS_PLANTED(no_wait_for_piece_0, barrier_wait(full, phase));
  wgmma_fence();
  multiply_qk<MlaTile::PIECE_0_COLUMNS>(score, q, tile.tokens, 0, false);
  UNLESS_PLANTED(no_wait_for_piece_1, barrier_wait(full + 1, phase));
  wgmma_fence();  // ptxas requires a fence after the loop of the wait
  multiply_qk<MlaTile::COLUMNS - MlaTile::PIECE_0_COLUMNS>(score, q, tile.tokens,
                                                           MlaTile::PIECE_0_COLUMNS, true);
  wgmma_commit();
  UNLESS_PLANTED(no_wait_for_scores, wgmma_wait<0>());
}

// score = Q·Kᵀ, FP8 cache: one block of 128 values after the other, RoPE last. After block j the
// sum is multiplied by ratio j / ratio j + 1, so each block is multiplied by its own ratio in the
// end.
SM90_DEVICE void score_fp8_tile(float (&score)[32], const char* q, const TokenTile& tile,
                                Barrier* full, uint32_t phase) {
  UNLESS_PLANTED(no_wait_for_fp8_tile, barrier_wait(full, phase));
  UNLESS_PLANTED(no_wait_for_fp8_tile, barrier_wait(full + 1, phase));
#pragma unroll
  for (int j = 0; j < MlaTile::SCALE_BLOCKS; ++j) {
    wgmma_fence(score);
    multiply_qk<2>(score, q, tile.tokens, 2 * j, PLANT(scores_of_last_block_only, false, j > 0));
    wgmma_commit();
    UNLESS_PLANTED(no_wait_for_block_scores, wgmma_wait<0>());
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const int column = i * 2 + lane_index() % 4 * 2;
      const int block = PLANT(scores_with_last_ratio, 3, j);
      const auto ratio =
          load_shared<FloatPair>(tile.ratios + (block * MlaTile::TOKENS + column) * 4);
      score[i] *= ratio.low, score[i + 1] *= ratio.high;
      score[i + 2] *= ratio.low, score[i + 3] *= ratio.high;
    }
  }
  wgmma_fence(score);
  const int rope_column = MlaTile::COLUMNS - PLANT(no_rope_in_scores, 2, 1);
  multiply_qk<1>(score, q, tile.tokens, rope_column, true);
  wgmma_commit();
  wgmma_wait<0>();
}

// Packs P as the A operand of WGMMA: four registers per 16 tokens. fp16 if FP8, else bf16.
template <bool FP8>
SM90_DEVICE void pack_p(uint32_t (&packed)[4][4], const float (&p)[32]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float low = p[2 * i], high = p[2 * i + 1];
    packed[i / 4][i % 4] = FP8 ? pack_fp16(low, high) : pack_bf16(low, high);
  }
}
// Exchanges P between the two consumer warpgroups through smem. Thread t of one needs the values of
// thread t of the other in the same order.
SM90_DEVICE void write_p(const uint32_t (&packed)[4][4], char* p_smem) {
#pragma unroll
  for (int step = 0; step < MlaTile::TOKENS / 16; ++step) {
    const auto& values = packed[step];
    store_shared(p_smem + step * 2048 + thread_index() % 128 * 16,
                 Chunk{.word = {values[0], values[1], values[2], values[3]}});
  }
}
// P of the 16 tokens of `step`.
SM90_DEVICE void read_p(uint32_t (&packed)[4], const char* p_smem, int step) {
  const auto values =
      load_shared<Chunk>(p_smem + PLANT(p_of_other_tokens, (3 - step), step) * 2048 +
                         thread_index() % 128 * 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) packed[i] = values.word[i];
}

// O *= alpha.
SM90_DEVICE void rescale_output(float (&sum)[2][64], const float (&alpha)[2]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) {
    sum[i / 64][i % 64] *= alpha[PLANT(output_rescaled_by_row_0, 0, i / 2 % 2)];
  }
}

// Issues sum += P·V over the 16 tokens from `first` on and column half HALF of V.
template <int HALF>
SM90_DEVICE void multiply_pv(float (&sum)[2][64], const uint32_t (&packed)[4],
                             const TokenTile& tile, int first) {
  auto& sums = reinterpret_cast<float(&)[128]>(sum);
  const char* v = tile.tokens + HALF * MlaTile::PIECE_0_COLUMNS * MlaTile::COLUMN_BYTES;
  const uint32_t column_bytes = PLANT(wrong_distance_of_columns, 4096, MlaTile::COLUMN_BYTES);
  const uint64_t rows = advance_descriptor(matrix_descriptor(v, column_bytes, 1024),
                                           PLANT(values_of_first_tokens, 0, first) * 128);
  wgmma_bf16<256, false>(sums, packed, rows, true);
}

// The same for an FP8 cache. Each of the two blocks of 128 columns has its own P: P times the ratio
// of each token, rounded to bf16. The rounding errors accumulate in rounding_excess and are added
// to the divisor, so that they cancel if one token has most of the weight.
template <int HALF>
SM90_DEVICE void multiply_pv_fp8(float (&sum)[2][64], SoftmaxState& state,
                                 const uint32_t (&packed)[4], const TokenTile& tile, int first) {
  uint32_t scaled_p[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = i % 2, column = first + i / 2 * 8 + lane_index() % 4 * 2;
    const float low = to_float(low_fp16(packed[i])), high = to_float(high_fp16(packed[i]));
    // Multiply the quotients from the last block on: their product is the ratio of block j.
    FloatPair ratio{1.0f, 1.0f};
#pragma unroll
    for (int j = MlaTile::SCALE_BLOCKS - 1; j >= 2 * HALF; --j) {
      const auto quotient =
          load_shared<FloatPair>(tile.ratios + (j * MlaTile::TOKENS + column) * 4);
      ratio.low *= quotient.low, ratio.high *= quotient.high;
      if (j > 2 * HALF + 1) continue;
      const int b = PLANT(values_with_other_ratio, 1 - (j - 2 * HALF), j - 2 * HALF);
      const float scaled_low = low * ratio.low, scaled_high = high * ratio.high;
      scaled_p[b][i] = pack_bf16(scaled_low, scaled_high);
      // The excess is not divided by the ratio, which is at least 8/9.
      state.rounding_excess[b][half] += to_float(low_bf16(scaled_p[b][i])) - scaled_low;
      state.rounding_excess[b][half] += to_float(high_bf16(scaled_p[b][i])) - scaled_high;
    }
  }
  const char* v = tile.tokens + HALF * MlaTile::PIECE_0_COLUMNS * MlaTile::COLUMN_BYTES;
  wgmma_fence(reinterpret_cast<float(&)[128]>(sum));
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const char* rows = v + b * 2 * MlaTile::COLUMN_BYTES + first * 128;
    wgmma_bf16<128, false>(sum[b], scaled_p[b],
                           matrix_descriptor(rows, MlaTile::COLUMN_BYTES, 1024), true);
  }
  wgmma_commit();
}

}  // namespace sm90
