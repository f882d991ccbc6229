// Attention of a few new queries per sequence over the paged latent cache, on Hopper: the op
// mla_decode of kernels/deepkern/attention for 512 + 64 values per token, bf16 or FP8 cache.
//
//     score[r, n] = softmax_scale · q[r] · cache[n]               over 576 values
//     out[r]      = softmax over attended n of score · cache[n, :512]
//
// Parallelization: the Sq · H rows (query, head) of a sequence form tiles of 64 rows, and its
// tokens are divided into splits. A block computes one row tile over one split, 64 tokens at a
// time. A token tile is stored once in smem, as nine column blocks of 64x64, and serves as K and V.
// One producer warpgroup loads (mla_load.cuh). Two consumer warpgroups alternate ("seesaw"):
// warpgroup 0 computes the scores of even tiles and columns 0 to 255 of the output, warpgroup 1 the
// scores of odd tiles and columns 256 to 511. The softmax of one (mla_softmax.cuh) overlaps with
// the WGMMAs of the other:
//
//     warpgroup 0  Q·K0ᵀ, softmax P0 -> publish P0, P0·V0, release ..... receive P1, P1·V1, release
//     warpgroup 1  Q·K1ᵀ ..... receive P0, P0·V0 and softmax P1 -> publish P1, P1·V1, release
//
// Row maxima are published with P, so every tile is scaled by the maximum over all tiles up to and
// including it.
// The smem has two token tiles. Each has two pieces, column blocks 0 to 3 and 4 to 8, and each
// piece is released by the warpgroup that multiplies it by P. FP8 cache: scale = step · ratio, with
// step, the scale rounded up to 4 significant bits, so that code · step is exact in bf16; the ratio is applied in fp32 to
// the scores and to P, per block of 128 values.
//
// The splits depend on the sequence's own length and on Sq · H. `mla_combine` adds their results in order.
//
// Limit: for few rows reading the cache, for more than about a hundred rows the tensor cores.
//
// Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1. The seesaw, the two column halves of the
// output and the release of a tile in pieces are from FlashMLA.
#pragma once

#include "mla_softmax.cuh"

namespace sm90 {

// A consumer warpgroup. WARPGROUP is also the parity of the tiles that it scores and the half of
// the output's columns that it computes.
template <bool FP8, int WARPGROUP>
struct Consumer {
  const MlaArguments& p;
  const MlaWork& w;
  char* smem;
  const int row = thread_index() % 128 / 32 * 16 + lane_index() / 4;  // and row + 8
  SoftmaxState state{{minus_infinity(), minus_infinity()}, {}, {}};
  float sum[2][64];  // the output before normalization, by block of 128 columns
  PieceRing ring;
  uint32_t phase = 0;

  SM90_DEVICE Consumer(const MlaArguments& arguments, const MlaWork& work, char* smem_base)
      : p(arguments), w(work), smem(smem_base), ring(smem_base) {
#pragma unroll
    for (int i = 0; i < 128; ++i) sum[i / 64][i % 64] = 0.0f;
  }

  // score = Q·Kᵀ of a tile, after a wait for the tile.
  SM90_DEVICE void compute_scores(float (&score)[32], int tile) {
    const TokenTile t(smem, tile);
    if (FP8) {
      score_fp8_tile(score, smem, t, ring.full_barrier + 2 * tile, phase);
    } else {
      score_tile(score, smem, t, ring.full_barrier + 2 * tile, phase);
    }
  }
  // Scores to packed P, published to the other warpgroup. Updates the state and sets alpha.
  SM90_DEVICE void compute_p(uint32_t (&packed)[4][4], float (&score)[32], float (&alpha)[2],
                             int tile, int first) {
    const char* positions = TokenTile(smem, tile).positions;
    const float scale = p.softmax_scale_log2;
    const char* row_limits = smem + MlaTile::ROW_LIMITS_OFFSET;
    // The first row has the lowest limit.
    if (FP8 || first + MlaTile::TOKENS > load_shared<int>(row_limits) || !all_present(positions)) {
      mask_scores(score, scale > 0.0f ? minus_infinity() : -minus_infinity(), first, positions,
                  row_limits + 4 * row);
    }
    float row_max[2], p_sum[2] = {};
    row_maxima(row_max, score, state.row_max, scale);
    if (FP8) {  // four more registers would spill
      update_row_max(state, alpha, row_max);
      exponentials(score, state.row_sum, row_max, scale);
      pack_p<FP8>(packed, score);
      publish_p(packed, row_max);
    } else {
      exponentials(score, p_sum, row_max, scale);
      pack_p<FP8>(packed, score);
      publish_p(packed, row_max);
      read_own_maxima(row_max);
      update_row_max(state, alpha, row_max);
      state.row_sum[0] += p_sum[0], state.row_sum[1] += p_sum[1];
    }
  }
  // Issues sum += P·V of a tile, with this warpgroup's P in registers.
  SM90_DEVICE void multiply_own_p(const uint32_t (&packed)[4][4], int tile) {
    if (!FP8) wgmma_fence(reinterpret_cast<float(&)[128]>(sum));
#pragma unroll
    for (int step = 0; step < 4; ++step) multiply_step(packed[step], TokenTile(smem, tile), step);
    if (!FP8) wgmma_commit();
  }
  // Issues sum += P·V of a tile, with the P that the other warpgroup published.
  SM90_DEVICE void multiply_received_p(int tile) {
    const TokenTile t(smem, tile);
    if (FP8) {
      // Not unrolled: with the scores in registers there is no room to prefetch the next step's P.
#pragma unroll 1
      for (int step = 0; step < 4; ++step) {
        uint32_t packed[4];
        read_p(packed, smem + MlaTile::P_OFFSET, step);
        multiply_step(packed, t, step);
      }
    } else {
      uint32_t packed[4][4];
#pragma unroll
      for (int step = 0; step < 4; ++step) read_p(packed[step], smem + MlaTile::P_OFFSET, step);
      multiply_own_p(packed, tile);
    }
  }
  SM90_DEVICE void multiply_step(const uint32_t (&packed)[4], const TokenTile& tile, int step) {
    if (FP8) {
      multiply_pv_fp8<WARPGROUP>(sum, state, packed, tile, step * 16);
      wgmma_wait<0>();  // the scaled P of only one step fits in registers
    } else {
      multiply_pv<WARPGROUP>(sum, packed, tile, step * 16);
    }
  }
  // Consumer release: this warpgroup's piece of a tile may be overwritten.
  SM90_DEVICE void release_tile(int tile) {
    UNLESS_PLANTED(releases_values_before_wgmma_wait, wgmma_wait<0>());
    const int piece = 2 * tile + PLANT(releases_other_piece, 1 - WARPGROUP, WARPGROUP);
    if (lane_index() == 0) barrier_arrive(&ring.empty_barrier[piece]);
    WHEN_PLANTED(releases_values_before_wgmma_wait, wgmma_wait<0>());
  }
  // Publishes P and the row maxima to the other warpgroup.
  SM90_DEVICE void publish_p(const uint32_t (&packed)[4][4], const float (&row_max)[2]) {
    write_p(packed, smem + MlaTile::P_OFFSET);
    char* maxima = smem + MlaTile::ROW_STATS_OFFSET + (WARPGROUP * MlaTile::ROWS + row) * 4;
    if (lane_index() % 4 == 0) {
      store_shared(maxima, row_max[0]);
      store_shared(maxima + 32, row_max[1]);
    }
    named_barrier_arrive(2 + WARPGROUP, 256);
  }
  // Reads back the maxima that this warp published. The other warpgroup waits for P, and ptxas
  // would move the 128 products of rescale_output before the arrival, whatever order the PTX has.
  // It does not move a load, on which alpha then depends.
  SM90_DEVICE void read_own_maxima(float (&row_max)[2]) {
    const char* maxima = smem + MlaTile::ROW_STATS_OFFSET + (WARPGROUP * MlaTile::ROWS + row) * 4;
    UNLESS_PLANTED(no_warp_sync_before_own_maxima, warp_sync());
    row_max[0] = load_shared<float>(maxima);
    row_max[1] = load_shared<float>(maxima + 32);
  }
  // Waits for the other warpgroup's P and for this warpgroup's piece of that tile, and updates the
  // row maxima.
  SM90_DEVICE void receive_p(float (&alpha)[2], int tile) {
    UNLESS_PLANTED(no_wait_for_p, named_barrier_sync(3 - WARPGROUP, 256));
    barrier_wait(&ring.full_barrier[2 * tile + WARPGROUP], phase);
    const int other = PLANT(reads_own_row_max, WARPGROUP, 1 - WARPGROUP);
    const char* from = smem + MlaTile::ROW_STATS_OFFSET + (other * MlaTile::ROWS + row) * 4;
    float row_max[2] = {load_shared<float>(from), load_shared<float>(from + 32)};
    WHEN_PLANTED(ignores_received_row_max, (row_max[0] = state.row_max[0]));
    WHEN_PLANTED(ignores_received_row_max, (row_max[1] = state.row_max[1]));
    update_row_max(state, alpha, row_max);
  }

  // Warpgroup 0: the even tile from token `first` on, then P·V of the odd tile after it.
  SM90_DEVICE void process_even_tile(int first) {
    float score[32], alpha[2];
    uint32_t packed[4][4];
    compute_scores(score, 0);
    compute_p(packed, score, alpha, 0, first);
    rescale_output(sum, alpha);
    multiply_own_p(packed, 0);
    release_tile(0);
    if (first + MlaTile::TOKENS >= w.end) return;
    receive_p(alpha, 1);
    rescale_output(sum, alpha);
    multiply_received_p(1);
    release_tile(1);
  }
  // Warpgroup 1: P·V of the even tile, and the odd tile from token `first` on. Its softmax overlaps
  // with P·V of the even tile.
  SM90_DEVICE void process_odd_tile(int first) {
    float score[32], alpha[2];
    uint32_t packed[4][4];
    compute_scores(score, 1);
    receive_p(alpha, 0);
    rescale_output(sum, alpha);
    multiply_received_p(0);
    compute_p(packed, score, alpha, 1, first);
    UNLESS_PLANTED(rescales_before_wgmma_wait, release_tile(0));
    rescale_output(sum, alpha);
    multiply_own_p(packed, 1);
    WHEN_PLANTED(rescales_before_wgmma_wait, release_tile(0));
    release_tile(1);
  }
  // Warpgroup 1: P·V of a last even tile that no odd tile follows.
  SM90_DEVICE void finish_last_even_tile() {
    float alpha[2];
    receive_p(alpha, 0);
    rescale_output(sum, alpha);
    multiply_received_p(0);
    release_tile(0);
  }
};

// Epilogue: the staging of a warp's 16 rows. Writes 16 columns from `column` on, times scale[row],
// to the staging buffer: as float32 (the FloatPair overload), or as bf16.
SM90_DEVICE void stage_columns(const float* sum, const float (&scale)[2], char* staging, int column,
                               FloatPair) {
  const int lane = lane_index(), row = lane / 4;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const int half = i / 2 % 2, byte = (column + i / 4 * 8 + lane % 4 * 2) * 4;
    store_shared(staging + (row + 8 * half) * 1024 + ((byte / 16) ^ (row * 2)) * 16 + byte % 16,
                 FloatPair{sum[i] * scale[half], sum[i + 1] * scale[half]});
  }
}
SM90_DEVICE void stage_columns(const float* sum, const float (&scale)[2], char* staging, int column,
                               uint32_t) {
  const int row = lane_index() % 16, chunk = column / 8 + lane_index() / 16;
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pair[i] = pack_bf16(sum[2 * i] * scale[i % 2], sum[2 * i + 1] * scale[i % 2]);
  }
  store_matrix_x4(staging + row * 512 + (chunk ^ (row % 8)) * 16, pair[0], pair[1], pair[2],
                  pair[3]);
}

// Stores a warp's rows of 256 sums, times scale[block of columns][row], to `out`, whose rows are
// 512 values apart. Goes through smem so that whole cache lines are written. Pair: two values of
// `out`, FloatPair or uint32_t (bf16). `rows_left`: rows of the sequence from the warp's first one
// on.
template <class Pair>
SM90_DEVICE void store_rows(const float (&sum)[2][64], const float (&scale)[2][2], char* staging,
                            char* out, int rows_left) {
  const int rows = PLANT(stores_rows_past_the_last, 16, min_of(rows_left, 16));
  // Chunks are permuted within eight rows to avoid bank conflicts.
  constexpr int ROW_BYTES = 128 * sizeof(Pair), SWIZZLE = sizeof(Pair) / 4;
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < 128; i += 8) {
    stage_columns(&sum[i / 64][i % 64], scale[i / 64], staging, i * 2, Pair{});
  }
  UNLESS_PLANTED(no_warp_sync_after_staging, warp_sync());
  for (int row = 0; row < rows; ++row) {
#pragma unroll
    for (int chunk = lane; chunk < ROW_BYTES / 16; chunk += 32) {
      const int staged = PLANT(rows_not_unswizzled, chunk, (chunk ^ (row % 8 * SWIZZLE)));
      const char* from = staging + row * ROW_BYTES + staged * 16;
      store_global(reinterpret_cast<Chunk*>(out + row * 2 * ROW_BYTES) + chunk,
                   load_shared<Chunk>(from));
    }
  }
}

// Epilogue of a consumer warpgroup: normalizes its half of the columns and stores it with the lse,
// to out and lse if the sequence has one split, else to partial_out and partial_lse.
SM90_DEVICE void store_output(const float (&sum)[2][64], SoftmaxState& state,
                              const MlaArguments& p, const MlaWork& w, char* smem, int warpgroup) {
  const int lane = lane_index();
  const int warp_row = thread_index() % 128 / 32 * 16, row = warp_row + lane / 4;
  // Exchange the row sums between the warpgroups.
  warp_sync();  // orders this warp's reads of maxima before the sums that replace them
  char* row_sums = smem + MlaTile::ROW_STATS_OFFSET;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.row_sum[half] = row_sum_of(state.row_sum[half]);
    // In place of the maxima that this warpgroup has read and the other one does not read.
    const int to = PLANT(row_sums_over_unread_maxima, warpgroup, (1 - warpgroup)) * MlaTile::ROWS +
                   row + 8 * half;
    if (lane % 4 == 0) store_shared(row_sums + 4 * to, state.row_sum[half]);
  }
  UNLESS_PLANTED(no_wait_for_row_sums, named_barrier_sync(1, 256));
  const int all_rows = p.Sq * p.H;
  const int rows_left = all_rows - w.row - warp_row;  // from this warp's first row on
  const bool single_split = w.num_splits == 1;
  const int64_t out_row = int64_t{w.sequence} * all_rows + w.row + warp_row;
  const int split = PLANT(all_splits_in_one_place, 0, w.split);
  const int64_t split_row =
      (int64_t{w.sequence} * p.num_splits + split) * all_rows + w.row + warp_row;
  float scale[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Both warpgroups add in the same order.
    const float row_sum = load_shared<float>(row_sums + 4 * (row + 8 * half)) +
                          load_shared<float>(row_sums + 4 * (MlaTile::ROWS + row + 8 * half));
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const float divisor = PLANT(ignores_rounding_excess, row_sum,
                                  row_sum + row_sum_of(state.rounding_excess[b][half]));
      scale[b][half] = row_sum == 0.0f ? 0.0f : 1.0f / divisor;
    }
    const int m = row + 8 * half - warp_row;
    if (warpgroup == 0 && lane % 4 == 0 && m < rows_left) {
      const float lse =
          row_sum == 0.0f ? minus_infinity() : state.row_max[half] + log2_of(row_sum);
      const int query_head = w.row + warp_row + m;
      const int64_t at =
          (int64_t{w.sequence} * p.H + query_head % p.H) * p.Sq + query_head / p.H;
      if (single_split) store_global(p.lse + at, lse * LN_2);
      if (!single_split) store_global(p.partial_lse + split_row + m, lse);
    }
  }
  // Q and the token tiles are no longer read: reuse their smem for staging.
  char* staging = smem + warp_index() * 16 * 256 * 4;
  if (single_split) {
    auto* out = static_cast<bf16*>(p.out) + out_row * MlaTile::V_DIM + warpgroup * 256;
    store_rows<uint32_t>(sum, scale, staging, reinterpret_cast<char*>(out), rows_left);
  } else {
    float* out = p.partial_out + split_row * MlaTile::V_DIM + warpgroup * 256;
    store_rows<FloatPair>(sum, scale, staging, reinterpret_cast<char*>(out), rows_left);
  }
}

// Consumer warpgroup: mainloop over the token tiles of the split, then the epilogue.
template <bool FP8, int WARPGROUP>
SM90_DEVICE void attend(const MlaArguments& p, const MlaWork& w, char* smem) {
  load_queries(p, w, smem);
  Consumer<FP8, WARPGROUP> consumer(p, w, smem);
  int first = w.begin;
  if (WARPGROUP == 0) {
    for (; first < w.end; first += 2 * MlaTile::TOKENS) {
      consumer.process_even_tile(first);
      UNLESS_PLANTED(phase_not_advanced, consumer.phase ^= 1);
    }
  } else {
    for (; first + MlaTile::TOKENS < w.end; first += 2 * MlaTile::TOKENS) {
      consumer.process_odd_tile(first + MlaTile::TOKENS);
      consumer.phase ^= 1;
    }
    if (first < w.end) {
      UNLESS_PLANTED(last_even_tile_not_finished, consumer.finish_last_even_tile());
    }
  }
  store_output(consumer.sum, consumer.state, p, w, smem, WARPGROUP);
}

// FP8: the format of the cache.
template <bool FP8>
SM90_KERNEL(MlaTile::THREADS, 1)
void mla_decode(SM90_PARAMETER TensorMap map,  // if p.by_tma: cache [tma_rows, 576], boxes [64, 64]
                SM90_PARAMETER MlaArguments p) {
  grid_dependency_launch();  // mla_combine may start now; it waits for the end of this grid
  const MlaWork w(p);
  if (w.split >= w.num_splits) return;
  char* smem = shared_memory();
  const int warp = warp_index();
  // Prologue: prefetch the tensor map, initialize barriers.
  if (warp == 8 && elect_one()) {
    if (p.by_tma) prefetch(&map);
    // Filled by 128 producer threads, released by the 4 warps of one consumer warpgroup.
    PieceRing(smem).init(128, PLANT(three_warps_release_a_piece, 3, 4));
    barrier_init_fence();
  }
  block_sync();
  if (warp >= 8) {
    // Producer warpgroup.
    constexpr int EXTRA_REGISTERS = PLANT(mla_producer_keeps_registers, 8, 0);
    registers_decrease<(FP8 ? 88 : 56) + EXTRA_REGISTERS>();
    if (FP8) {
      load_fp8_tokens(p, w, smem);
    } else {
      load_tokens(&map, p, w, smem);
    }
  } else {
    // Consumer warpgroups.
    registers_increase<FP8 ? 208 : 224>();
    if (warp < 4) {
      attend<FP8, 0>(p, w, smem);
    } else {
      attend<FP8, 1>(p, w, smem);
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
  const SequenceSplits sequence_splits(p, sequence);
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
  const float scale = weight_sum == 0.0f ? 0.0f : 1.0f / weight_sum;
  bf16* out = static_cast<bf16*>(p.out) + (int64_t{sequence} * all_rows + m) * MlaTile::V_DIM;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {
    store_global(reinterpret_cast<uint32_t*>(out + j / 2 * 64 + lane_index() * 2),
                 pack_bf16(sum[j] * scale, sum[j + 1] * scale));
  }
  if (lane_index() == 0) {
    const float lse = weight_sum == 0.0f ? minus_infinity() : lse_max + log2_of(weight_sum);
    const int64_t at = (int64_t{sequence} * p.H + m % p.H) * p.Sq + m / p.H;
    store_global(p.lse + at, lse * LN_2);
  }
}

}  // namespace sm90
