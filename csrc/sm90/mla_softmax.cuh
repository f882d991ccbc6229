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

constexpr float LN_2 = deepkern::LN_2, LOG2_E = deepkern::LOG2_E;
constexpr float LARGEST_FLOAT = 0x1.fffffep127f;
// log2 of factors of P and of the scales over the unit, FP8 cache. fp16 has all bits of both from
// 2^-21 on, and of their product from 2^-28 on. The product is below 2^15.
constexpr int P_RANGE = PLANT(weights_without_range, 0, 7), SCALE_RANGE = 14 - P_RANGE;

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
  float row_max[2];  // finite: -LARGEST_FLOAT before the first token
  float row_sum[2];  // over the values of P that this thread computed
  int unit[2];       // FP8 cache: biased exponents of the units of the two blocks of 128 columns
};

// Raises the maxima to `row_max`, rescales the sums, and sets alpha[row], the factor for O.
SM90_DEVICE void update_row_max(SoftmaxState& state, float (&alpha)[2],
                                const float (&row_max)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    alpha[half] = exp2_of(state.row_max[half] - row_max[half]);
    UNLESS_PLANTED(row_sum_not_rescaled, state.row_sum[half] *= alpha[half]);
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
// that the thread's two rows attend to, at most TOKENS, so that ABSENT is masked. `positions`:
// uint8 [64] in smem.
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

// The extreme of each row's scores in this thread: the largest, the smallest if LARGEST is false.
template <bool LARGEST>
SM90_DEVICE void extremes_of(float (&extreme)[2], const float (&score)[32]) {
  const auto better = [](float a, float b) { return LARGEST ? max_of(a, b) : min_of(a, b); };
  float best[2][2] = {{score[0], score[1]}, {score[2], score[3]}};  // two chains for each row
#pragma unroll
  for (int i = 4; i < 32; ++i) best[i / 2 % 2][i % 2] = better(best[i / 2 % 2][i % 2], score[i]);
  extreme[0] = better(best[0][0], best[0][1]);
  extreme[1] = better(best[1][0], best[1][1]);
}

// The maxima m' of the rows over this tile and the tiles before it. NaN scores are left out, +inf
// counts as LARGEST_FLOAT. `scale`: softmax_scale_log2 of each row, not 0.
SM90_DEVICE void row_maxima(float (&row_max)[2], const float (&score)[32],
                            const float (&old_max)[2], const float (&scale)[2]) {
  float extreme[2];
  if (PLANT(largest_score_of_negative_scale, true, scale[0] > 0.0f)) {
    extremes_of<true>(extreme, score);
  } else {
    extremes_of<false>(extreme, score);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float largest = max_of(row_max_of(extreme[half] * scale[half]), old_max[half]);
    row_max[half] = min_of(largest, LARGEST_FLOAT);
  }
}

// Scores to P, in place: P = 2^(score · scale - m'), with one rounding in the exponent; FP8 cache:
// times 2^P_RANGE. Adds this thread's P to `sum`. NaN and +inf are the same in P.
template <bool FP8>
SM90_DEVICE void exponentials(float (&score)[32], float (&sum)[2], const float (&row_max)[2],
                              const float (&scale)[2]) {
  const float range = FP8 ? P_RANGE : 0.0f;
  const float offset[2] = {range - row_max[0], range - row_max[1]};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    score[i] = exp2_of(fused_multiply_add(score[i], scale[i / 2 % 2], offset[i / 2 % 2]));
    sum[i / 2 % 2] += score[i];
  }
}

// The first of this thread's two rows of a tile; the other one is 8 rows below.
SM90_DEVICE int tile_row() { return thread_index() % 128 / 32 * 16 + lane_index() / 4; }

// Issues WGMMAs over COUNT column blocks from `first` on: score (+)= q · keysᵀ. q and keys are
// tiles [64, 576] of bf16, or of fp16 if FP16, in smem. The first WGMMA overwrites the scores if
// `accumulate` is false.
template <int COUNT, bool FP16 = false>
SM90_DEVICE void multiply_qk(float (&score)[32], const char* q, const char* keys, int first,
                             bool accumulate) {
  const uint64_t q_descriptor = matrix_descriptor(q, 0, 1024);
  const uint64_t k_descriptor = matrix_descriptor(keys, 0, 1024);
#pragma unroll
  for (int step = 0; step < COUNT * 4; ++step) {
    const uint32_t at = (first + step / 4) * MlaTile::COLUMN_BYTES + step % 4 * 32;
    const uint64_t a = advance_descriptor(q_descriptor, at);
    const uint64_t b = advance_descriptor(k_descriptor, at);
    if (FP16) {
      wgmma_fp16<64>(score, a, b, accumulate || step > 0);
    } else {
      wgmma_bf16<64>(score, a, b, accumulate || step > 0);
    }
  }
}

// score = Q·Kᵀ, bf16 cache. Multiplies piece 0 while piece 1 is still loading. `full`: the barriers
// of the tile's two pieces. COPIED: by cp.async, which only a fence after the wait shows to WGMMA.
template <bool COPIED>
SM90_DEVICE void score_tile(float (&score)[32], const char* q, const TokenTile& tile, Barrier* full,
                            uint32_t phase) {
  UNLESS_PLANTED(no_wait_for_piece_0, barrier_wait(full, phase));
  UNLESS_PLANTED(no_fence_for_piece_0, if (COPIED) fence_async_proxy());
  wgmma_fence();
  multiply_qk<MlaTile::PIECE_0_COLUMNS>(score, q, tile.tokens, 0, false);
  UNLESS_PLANTED(no_wait_for_piece_1, barrier_wait(full + 1, phase));
  UNLESS_PLANTED(no_fence_for_piece_1, if (COPIED) fence_async_proxy());
  wgmma_fence();  // ptxas requires a fence after the loop of the wait
  multiply_qk<MlaTile::COLUMNS - MlaTile::PIECE_0_COLUMNS>(score, q, tile.tokens,
                                                           MlaTile::PIECE_0_COLUMNS, true);
  wgmma_commit();
  UNLESS_PLANTED(no_wait_for_scores, wgmma_wait<0>());
}

// score = Q·Kᵀ, FP8 cache: one block of 128 values in fp16 after the other, RoPE in bf16 last.
// After block j the sum is multiplied by scale j / scale j + 1, so each block is multiplied by its
// own scale in the end. Q, and so the score, is over the unit of its row. `q`: the smem of the
// block, which Q starts.
SM90_DEVICE void score_fp8_tile(float (&score)[32], const char* q, const TokenTile& tile,
                                Barrier* full, uint32_t phase) {
  UNLESS_PLANTED(no_wait_for_fp8_tile, barrier_wait(full, phase));
  UNLESS_PLANTED(no_wait_for_fp8_tile, barrier_wait(full + 1, phase));
#pragma unroll
  for (int j = 0; j < MlaTile::SCALE_BLOCKS; ++j) {
    wgmma_fence(score);
    multiply_qk<2, true>(score, q, tile.tokens, 2 * j,
                         PLANT(scores_of_last_block_only, false, j > 0));
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

// FP8 cache: raises the units to those of a tile, for column half HALF, and O *= alpha, in the new
// units. A unit that does not change multiplies by 1.
template <int HALF>
SM90_DEVICE void rescale_output(float (&sum)[2][64], const float (&alpha)[2], SoftmaxState& state,
                                const TokenTile& tile) {
  const auto warps = load_shared<Chunk>(tile.units);  // a word of four blocks per producer warp
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    int unit = state.unit[b];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int of_warp = static_cast<int>(warps.word[w] >> (2 * HALF + b) * 8 & 255);
      unit = max_of(unit, of_warp);
    }
    const int change = state.unit[b] - unit + 127;
    const float factor = PLANT(output_in_old_units, 1.0f,
                               change > 0 ? power_of_two(change) : 0.0f);
    state.unit[b] = unit;
    const float factors[2] = {alpha[0] * factor, alpha[1] * factor};
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      sum[b][i] *= factors[PLANT(output_rescaled_by_row_0, 0, i / 2 % 2)];
    }
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

// The same for an FP8 cache. Each of the two blocks of 128 columns has its own P: P times the scale
// of each token over the unit, times 2^SCALE_RANGE.
template <int HALF>
SM90_DEVICE void multiply_pv_fp8(float (&sum)[2][64], const SoftmaxState& state,
                                 const uint32_t (&packed)[4], const TokenTile& tile, int first) {
  uint32_t scaled_p[2][4];
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const int column = first + pair * 8 + lane_index() % 4 * 2;
    // Multiply the quotients from the last block on: their product is the scale of block j.
    FloatPair scale{1.0f, 1.0f};
#pragma unroll
    for (int j = MlaTile::SCALE_BLOCKS - 1; j >= 2 * HALF; --j) {
      const auto quotient =
          load_shared<FloatPair>(tile.ratios + (j * MlaTile::TOKENS + column) * 4);
      scale.low *= quotient.low, scale.high *= quotient.high;
      if (j > 2 * HALF + 1) continue;
      const int b = PLANT(values_with_other_ratio, 1 - (j - 2 * HALF), j - 2 * HALF);
      const float inverse = power_of_two(254 + SCALE_RANGE - state.unit[b]);
      const uint32_t over_unit = pack_fp16(scale.low * inverse, scale.high * inverse);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scaled_p[b][2 * pair + half] = multiply_fp16(packed[2 * pair + half], over_unit);
      }
    }
  }
  const char* v = tile.tokens + HALF * MlaTile::PIECE_0_COLUMNS * MlaTile::COLUMN_BYTES;
  wgmma_fence(reinterpret_cast<float(&)[128]>(sum));
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const char* rows = v + b * 2 * MlaTile::COLUMN_BYTES + first * 128;
    wgmma_fp16<128, false>(sum[b], scaled_p[b],
                           matrix_descriptor(rows, MlaTile::COLUMN_BYTES, 1024), true);
  }
  wgmma_commit();
}

// FP8 cache: softmax_scale_log2 times the unit of each of a thread's two rows. Not 0, as -inf · 0
// is NaN.
SM90_DEVICE void scales_of_queries(float (&scale)[2], const char* smem, float softmax_scale_log2) {
  constexpr float LEAST = 0x1p-126f;
  const char* units = smem + MlaTile::Q_UNITS_OFFSET + tile_row();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float unit = power_of_two(load_shared<uint8_t>(units + 8 * half));
    scale[half] = softmax_scale_log2 * PLANT(scores_in_units, 1.0f, unit);
    if (magnitude(scale[half]) < LEAST) scale[half] = softmax_scale_log2 > 0.0f ? LEAST : -LEAST;
  }
}

// FP8 cache: a thread's chunks of Q while it is converted, by both consumer warpgroups with four
// threads per row.
struct QueryChunks {
  static constexpr int COUNT = 2 * MlaTile::COLUMNS, LATENTS = COUNT - 2;  // the RoPE values last
  static constexpr int BATCH = 6;  // loads in flight
  char* q;
  const int row = thread_index() / 4;

  SM90_DEVICE explicit QueryChunks(char* q_smem) : q(q_smem) {}
  // Of two rows, one starts with the other half of the columns: no bank conflicts.
  SM90_DEVICE char* at(int i) const {
    const int chunk = thread_index() % 4 + (i + row) % 2 * 4;
    return q + i / 2 * MlaTile::COLUMN_BYTES + row * 128 + (chunk ^ row % 8) * 16;
  }
  SM90_DEVICE void load(Chunk (&values)[BATCH], int first) const {
#pragma unroll
    for (int k = 0; k < BATCH; ++k) values[k] = load_shared<Chunk>(at(first + k));
  }
  // The unit of the row, a biased exponent: the largest value of the row is at least 1 over it.
  SM90_DEVICE int unit() const {
    float largest = 0.0f;
#pragma unroll 1
    for (int i = 0; i < COUNT; i += BATCH) {
      Chunk values[BATCH];
      load(values, i);
#pragma unroll
      for (int j = 0; j < 4 * BATCH; ++j) {
        const uint32_t pair = values[j / 4].word[j % 4];
        largest = max_of(largest, magnitude(to_float(low_bf16(pair))));
        largest = max_of(largest, magnitude(to_float(high_bf16(pair))));
      }
    }
    const int exponent = static_cast<int>(float_bits(row_max_of(largest)) >> 23);
    return max_of(LEAST_UNIT, min_of(exponent, LARGEST_UNIT));
  }
};

// FP8 cache: Q in smem over the units of its rows. The latents become fp16, the RoPE values stay
// bf16.
SM90_DEVICE void convert_queries(char* smem) {
  const QueryChunks chunks(smem);
  const int unit = chunks.unit();
  const float inverse = power_of_two(254 - unit);
#pragma unroll 1
  for (int i = 0; i < QueryChunks::COUNT; i += QueryChunks::BATCH) {
    Chunk values[QueryChunks::BATCH];
    chunks.load(values, i);
#pragma unroll
    for (int k = 0; k < QueryChunks::BATCH; ++k) {
      const bool latent = PLANT(rope_of_queries_in_fp16, true, i + k < QueryChunks::LATENTS);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float low = to_float(low_bf16(values[k].word[j])) * inverse;
        const float high = to_float(high_bf16(values[k].word[j])) * inverse;
        values[k].word[j] = latent ? pack_fp16(low, high) : pack_bf16(low, high);
      }
      store_shared(chunks.at(i + k), values[k]);
    }
  }
  if (thread_index() % 4 == 0) {
    store_shared(smem + MlaTile::Q_UNITS_OFFSET + chunks.row, static_cast<uint8_t>(unit));
  }
  UNLESS_PLANTED(no_fence_after_conversion, fence_async_proxy());
  UNLESS_PLANTED(no_wait_for_conversion, named_barrier_sync(1, 256));
}

}  // namespace sm90
