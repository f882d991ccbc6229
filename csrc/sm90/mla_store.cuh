// mla_decode and sparse attention: the epilogue, and the second kernel that adds the splits.
//
//     out[r] = O[r] / row_sum[r],  lse[r] = m[r] + log2(row_sum[r]),  in natural logarithms
//
// A sink multiplies out by exp(lse) / (exp(lse) + exp(sink)). A row without tokens is 0, its lse
// -inf.
#pragma once

#include "mla_softmax.cuh"

namespace sm90 {

// Transposes 4x4 words among the four lanes of a row: word i of lane j to word j of lane i.
SM90_DEVICE void transpose_in_row(uint32_t (&word)[4]) {
  const auto exchange = [](uint32_t x, int lanes) {
    return float_bits(shuffle_xor(float_of(x), lanes));
  };
  const bool odd = lane_index() % 2, high = lane_index() / 2 % 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {  // 2x2 blocks
    const uint32_t other = exchange(odd ? word[i] : word[i + 1], 1);
    (odd ? word[i] : word[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // the two blocks off the diagonal
    const uint32_t other = exchange(high ? word[i] : word[i + 2], 2);
    (high ? word[i] : word[i + 2]) = other;
  }
}

// Stores a thread's sums of row `half`, times scale[block of columns][half], to a row of 512 values
// of `out`, from `column` on. The lanes of a row exchange values, so that each stores 16 bytes.
SM90_DEVICE void store_row(const float (&sum)[2][64], const float (&scale)[2][2], int half,
                           bf16* out, bool valid) {
  const int lane = not_before(lane_index()) % 4;
#pragma unroll
  for (int group = 0; group < 32; group += 4) {  // groups of 8 columns
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* from = &sum[group / 16][(group + i) % 16 * 4 + half * 2];
      const float factor = scale[group / 16][half];
      word[i] = pack_bf16(from[0] * factor, from[1] * factor);
    }
    UNLESS_PLANTED(columns_not_exchanged, transpose_in_row(word));
    const Chunk chunk{.word = {word[0], word[1], word[2], word[3]}};
    if (valid) store_global(reinterpret_cast<Chunk*>(out + (group + lane) * 8), chunk);
  }
}
SM90_DEVICE void store_row(const float (&sum)[2][64], const float (&scale)[2][2], int half,
                           float* out, bool valid) {
  const int lane = not_before(lane_index()) % 4;
  const bool odd = lane % 2;
#pragma unroll
  for (int group = 0; group < 32; group += 2) {
    float value[2][2];  // by group; even lanes store the first one, odd lanes the second one
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i / 2][i % 2] = sum[group / 16][(group + i / 2) % 16 * 4 + half * 2 + i % 2] *
                            scale[group / 16][half];
    }
    Floats four;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float own = odd ? value[1][i] : value[0][i];
      const float other = shuffle_xor(odd ? value[0][i] : value[1][i], 1);
      four.value[i] = odd ? other : own;
      four.value[2 + i] = odd ? own : other;
    }
    float* to = out + (group + odd) * 8 + lane / 2 * 4;
    if (valid) store_global(reinterpret_cast<Floats*>(to), four);
  }
}

// exp(lse) / (exp(lse) + exp(sink)), which multiplies the output of row m. `lse` is in base 2; the
// row has a token.
SM90_DEVICE float sink_factor(const MlaArguments& p, int m, float lse) {
  if (!p.attn_sink) return 1.0f;
  const float sink = load_global(p.attn_sink + PLANT(sink_of_head_0, 0, m % p.H)) * LOG2_E;
  return divide(1.0f, 1.0f + exp2_of(sink - lse));
}

// The largest score of a row, softmax_scale included; NaN if one is NaN.
SM90_DEVICE float max_logit(const MlaArguments& p, float row_max, float row_sum) {
  if (row_sum == 0.0f) return minus_infinity();
  const bool finite = magnitude(row_sum) <= LARGEST_FLOAT;  // else a score was +inf or NaN
  return finite ? row_max * p.max_logits_scale : row_sum;
}

// The lse of a row in base 2. NaN if a score was +inf, as inf - inf is in the weights.
template <bool FP8>
SM90_DEVICE float row_lse_of(float row_max, float row_sum) {
  if (row_sum == 0.0f) return minus_infinity();
  // Scaled before the logarithm: subtracting P_RANGE after it would lose bits.
  const float sum = FP8 ? row_sum * (1.0f / (1 << P_RANGE)) : row_sum;
  const float lse = row_max + log2_of(sum);
  return lse + (row_sum - row_sum);
}

// Adds the row sums of the two warpgroups, in the same order in both.
SM90_DEVICE void exchange_row_sums(float (&row_sum)[2], char* smem, int warpgroup, int row) {
  // In place of the maxima that the other warpgroup published last and may still read back. No
  // planted bug: it would read them at once, and no order of the emulator delays it that long.
  named_barrier_sync(1, 256);
  char* sums = smem + MlaTile::ROW_STATS_OFFSET + 4 * row;
  char* to = sums + (1 - warpgroup) * MlaTile::ROWS * 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (lane_index() % 4 == 0) store_shared(to + 32 * half, row_sum[half]);
  }
  UNLESS_PLANTED(no_wait_for_row_sums, named_barrier_sync(1, 256));
  // This warpgroup alone writes where it reads, so the next item cannot overwrite these.
  const char* from = sums + warpgroup * MlaTile::ROWS * 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float other = load_shared<float>(from + 32 * half);
    row_sum[half] = warpgroup == 0 ? row_sum[half] + other : other + row_sum[half];
  }
  warp_sync();  // the next item's maxima replace the sums
}

// The factors of a thread's sums, by block of columns and row, and the lse in base 2 of its rows.
template <bool FP8, bool SPARSE>
SM90_DEVICE void normalize(float (&scale)[2][2], float (&lse)[2], const float (&row_sum)[2],
                           const SoftmaxState& state, const MlaArguments& p, const MlaWork& w) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = w.row + tile_row() + 8 * half;
    lse[half] = row_lse_of<FP8>(state.row_max[half], row_sum[half]);
    float factor = 1.0f;
    if (SPARSE && w.num_splits == 1 && row_sum[half] != 0.0f && m < p.Sq * p.H) {
      factor = PLANT(no_sink_in_single_split, 1.0f, sink_factor(p, m, lse[half]));
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      scale[b][half] = row_sum[half] == 0.0f ? 0.0f : divide(factor, row_sum[half]);
      if (FP8) scale[b][half] *= power_of_two(state.unit[b] - SCALE_RANGE);
    }
  }
}

// Epilogue of a consumer warpgroup: normalizes its half of the columns and stores it with the lse,
// to out and lse if the sequence has one split, else to partial_out and partial_lse. From registers
// to global memory: the next item's queries and tokens load meanwhile.
template <bool FP8, bool SPARSE>
SM90_DEVICE void store_output(const float (&sum)[2][64], SoftmaxState& state,
                              const MlaArguments& p, const MlaWork& w, char* smem, int warpgroup) {
  const int row = tile_row();
  float row_sum[2] = {row_sum_of(state.row_sum[0]), row_sum_of(state.row_sum[1])};
  exchange_row_sums(row_sum, smem, warpgroup, row);
  float scale[2][2], row_lse[2];
  normalize<FP8, SPARSE>(scale, row_lse, row_sum, state, p, w);
  const int all_rows = p.Sq * p.H, column = warpgroup * 256;
  const bool single_split = w.num_splits == 1;
  const int split = PLANT(all_splits_in_one_place, 0, w.split);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = w.row + row + 8 * half;  // of the sequence
    const bool valid = PLANT(stores_rows_past_the_last, true, m < all_rows);
    const int64_t out_row = int64_t{w.sequence} * all_rows + m;
    const int64_t split_row = (int64_t{w.sequence} * p.num_splits + split) * all_rows + m;
    if (single_split) {
      store_row(sum, scale, half, static_cast<bf16*>(p.out) + out_row * MlaTile::V_DIM + column,
                valid);
    } else {
      store_row(sum, scale, half, p.partial_out + split_row * MlaTile::V_DIM + column, valid);
    }
    if (warpgroup == 0 && lane_index() % 4 == 0 && m < all_rows) {
      const int64_t at = lse_index(p, w.sequence, m);
      if (single_split) store_global(p.lse + at, row_lse[half] * LN_2);
      if (!single_split) store_global(p.partial_lse + split_row, row_lse[half]);
      if (SPARSE && p.max_logits) {
        store_global(p.max_logits + at, max_logit(p, state.row_max[half], row_sum[half]));
      }
    }
  }
}

// Combines the splits of each row, weighted by their sums of exponentials. Parallelization: one
// warp per row, four rows per block. Limit: reading partial_out.
SM90_KERNEL(128, 1)
void mla_combine(SM90_PARAMETER MlaArguments p) {
  UNLESS_PLANTED(no_grid_dependency_wait, grid_dependency_wait());
  const int all_rows = p.Sq * p.H, blocks = (all_rows + 3) / 4;  // per sequence
  const int sequence = block_index() / blocks, m = block_index() % blocks * 4 + warp_index();
  const SequenceSplits sequence_splits(p, length_row<true>(p, sequence));
  if (sequence_splits.num_splits == 1 || m >= all_rows) return;
  const int num_splits =
      PLANT(last_split_left_out, sequence_splits.num_splits - 1, sequence_splits.num_splits);
  const int64_t split_0 = int64_t{sequence} * p.num_splits * all_rows + m;
  float lse_max = minus_infinity();
  for (int s = 0; s < num_splits; ++s) {
    lse_max = max_of(load_written(p.partial_lse + split_0 + int64_t{s} * all_rows), lse_max);
  }
  const float finite_max = lse_max == minus_infinity() ? 0.0f : lse_max;
  float weight_sum = 0.0f, sum[16] = {};
  for (int s = 0; s < num_splits; ++s) {
    const int64_t at = split_0 + int64_t{s} * all_rows;
    const float lse =
        PLANT(lse_from_stale_cache, load_global(p.partial_lse + at),
              load_written(p.partial_lse + at));
    const float weight = PLANT(splits_not_weighted, 1.0f, exp2_of(lse - finite_max));
    weight_sum += weight;
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      const float* from = p.partial_out + at * MlaTile::V_DIM + j / 2 * 64 + lane_index() * 2;
      const auto x = load_written(reinterpret_cast<const FloatPair*>(from));
      sum[j] = fused_multiply_add(weight, x.low, sum[j]);
      sum[j + 1] = fused_multiply_add(weight, x.high, sum[j + 1]);
    }
  }
  const float lse = weight_sum == 0.0f ? minus_infinity() : lse_max + log2_of(weight_sum);
  float scale = 0.0f;
  if (weight_sum != 0.0f) {
    scale = PLANT(no_sink_in_combine, 1.0f, sink_factor(p, m, lse)) / weight_sum;
  }
  bf16* out = static_cast<bf16*>(p.out) + (int64_t{sequence} * all_rows + m) * MlaTile::V_DIM;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {
    store_global(reinterpret_cast<uint32_t*>(out + j / 2 * 64 + lane_index() * 2),
                 pack_bf16(sum[j] * scale, sum[j + 1] * scale));
  }
  if (lane_index() == 0) {
    store_global(p.lse + lse_index(p, sequence, m), lse * LN_2);
  }
}

}  // namespace sm90
