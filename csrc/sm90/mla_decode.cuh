// Attention of a few new queries per sequence over the paged latent cache, on Hopper: the ops
// mla_decode, mla_sparse_decode and mla_sparse_prefill of kernels/deepkern/attention for 512 + 64
// values per token, bf16 or FP8 cache.
//
//     score[r, n] = softmax_scale · q[r] · cache[n]               over 576 values
//     out[r]      = softmax over attended n of score · cache[n, :512]
//
// Sparse attention: each query attends to the tokens that its own indices name. So each query is a
// sequence of its own, its heads are the rows, and its tokens are the indices in their order. Only
// the producer differs, which looks up a slot in place of a page and gathers every token.
//
// Parallelization: the Sq · H rows (query, head) of a sequence form tiles of 64 rows, and its
// tokens are divided into splits. The grid is persistent: a block computes one row tile over one
// split after the other (mla_items.cuh), 64 tokens at a time. A token tile is stored once in smem, as
// nine column blocks of 64x64, and serves as K and V.
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
// piece is released by the warpgroup that multiplies it by P. FP8 cache: the products take the codes
// and Q in fp16; the scales are applied in fp32 to the scores and in fp16 to P, per block of 128
// values.
//
// Range of an FP8 cache: codes are exact in fp16. So are values of Q down to 2^-17 of the largest
// one of their row; smaller ones lose bits. A token whose scale is less than 2^-28 of the largest
// scale of an earlier tile or of its own, of masked tokens too, loses bits of its values, and has no
// weight from 2^-38 on.
//
// The splits depend on the sequence's own length and on Sq · H. `mla_combine` adds their results in
// order.
//
// Limit: for few rows reading the cache, for more than about a hundred rows the tensor cores;
// sparse attention with 64 rows or more: see docs/notes/hopper.md.
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
  char* smem;
  PieceRing ring;
  const int row = tile_row();  // and row + 8
  int begin, end;   // of the item
  int row_0_limit;  // tokens that the first row attends to, the fewest of the tile
  SoftmaxState state;
  float sum[2][64];  // the output before normalization, by block of 128 columns

  SM90_DEVICE Consumer(const MlaArguments& arguments, char* smem_base)
      : p(arguments), smem(smem_base), ring(smem_base) {}

  SM90_DEVICE MlaWork item() const { return load_item(smem, ring.phase(PieceRing::QUERIES)); }
  // Waits for the item and its queries. False: there is none.
  SM90_DEVICE bool start() {
    UNLESS_PLANTED(no_wait_for_queries, barrier_wait(ring.queries_full(), ring.phase(PieceRing::QUERIES)));
    const MlaWork w = item();
    // From one lane, so that the compiler may keep them in uniform registers.
    begin = shuffle_from(w.begin, 0), end = shuffle_from(w.end, 0);
    row_0_limit = shuffle_from(p.causal ? w.length - (p.Sq - 1 - w.row / p.H) : w.length, 0);
    state = {{minus_infinity(), minus_infinity()}, {}, {LEAST_UNIT, LEAST_UNIT}};
#pragma unroll
    for (int i = 0; i < 128; ++i) sum[i / 64][i % 64] = 0.0f;
    if (shuffle_from(w.sequence, 0) < 0) return false;
    if (FP8) convert_queries(smem);
    return true;
  }
  // Consumer release of the queries, after this warpgroup's last scores of the item.
  SM90_DEVICE void release_queries() {
    warp_sync();  // orders the other lanes' loads of the item before
    if (lane_index() == 0) barrier_arrive(ring.queries_empty());
  }

  // score = Q·Kᵀ of a tile, after a wait for the tile.
  SM90_DEVICE void compute_scores(float (&score)[32], int tile) {
    const TokenTile t(smem, tile);
    if (FP8) {
      score_fp8_tile(score, smem, t, ring.full(2 * tile), ring.phase(tile));
    } else {
      score_tile(score, smem, t, ring.full(2 * tile), ring.phase(tile));
    }
  }
  // How many of the tile's tokens a row attends to.
  SM90_DEVICE int tile_limit(const MlaWork& w, int row_in_tile, int first) {
    const int query = (w.row + row_in_tile) / p.H;
    const int length = w.length - first;
    const int limit = p.causal ? length - PLANT(no_causal_mask, 0, (p.Sq - 1 - query)) : length;
    return PLANT(limit_above_absent, limit, min_of(limit, MlaTile::TOKENS));
  }
  // Scores to packed P, published to the other warpgroup. Updates the state and sets alpha.
  SM90_DEVICE void compute_p(uint32_t (&packed)[4][4], float (&score)[32], float (&alpha)[2],
                             int tile, int first) {
    const char* positions = TokenTile(smem, tile).positions;
    const float scale = p.softmax_scale_log2;
    if (FP8 || first + MlaTile::TOKENS > row_0_limit || !all_present(positions)) {
      const MlaWork w = item();
      const int limit[2] = {tile_limit(w, row, first), tile_limit(w, row + 8, first)};
      mask_scores(score, scale > 0.0f ? minus_infinity() : -minus_infinity(), limit, positions);
    }
    float row_max[2];
    row_maxima(row_max, score, state.row_max, scale);
    update_row_max(state, alpha, row_max);
    exponentials(score, state.row_sum, row_max, scale);
    pack_p<FP8>(packed, score);
    publish_p(packed);
    if (!FP8) depend_on_arrival(alpha);  // FP8: would spill
  }
  // Rescales the output to the maxima, and the units, of all tiles up to `tile`.
  SM90_DEVICE void rescale(const float (&alpha)[2], int tile) {
    if (FP8) {
      rescale_output<WARPGROUP>(sum, alpha, state, TokenTile(smem, tile));
    } else {
      rescale_output(sum, alpha);
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
  // Consumer release: this warpgroup's piece of a tile may be overwritten. Every tile is released
  // once, after its last use.
  SM90_DEVICE void release_tile(int tile) {
    UNLESS_PLANTED(releases_values_before_wgmma_wait, wgmma_wait<0>());
    const int piece = 2 * tile + PLANT(releases_other_piece, 1 - WARPGROUP, WARPGROUP);
    if (lane_index() == 0) barrier_arrive(ring.empty(piece));
    UNLESS_PLANTED(phase_not_advanced, ring.advance(tile));
    WHEN_PLANTED(releases_values_before_wgmma_wait, wgmma_wait<0>());
  }
  // Publishes P and the row maxima to the other warpgroup.
  SM90_DEVICE void publish_p(const uint32_t (&packed)[4][4]) {
    write_p(packed, smem + MlaTile::P_OFFSET);
    char* maxima = smem + MlaTile::ROW_STATS_OFFSET + (WARPGROUP * MlaTile::ROWS + row) * 4;
    if (lane_index() % 4 == 0) {
      store_shared(maxima, state.row_max[0]);
      store_shared(maxima + 32, state.row_max[1]);
    }
    named_barrier_arrive(2 + WARPGROUP, 256);
  }
  // Keeps the products of rescale_output after publish_p. The other warpgroup waits for P, and
  // ptxas would move all 128 before the arrival, whatever order the PTX has. It does not move a
  // load: alpha depends on the published maxima, which are equal to those in registers.
  SM90_DEVICE void depend_on_arrival(float (&alpha)[2]) {
    const char* maxima = smem + MlaTile::ROW_STATS_OFFSET + (WARPGROUP * MlaTile::ROWS + row) * 4;
    UNLESS_PLANTED(no_warp_sync_before_own_maxima, warp_sync());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool same = load_shared<float>(maxima + 32 * half) == state.row_max[half];
      alpha[half] = same ? alpha[half] : 0.0f;
    }
  }
  // Waits for the other warpgroup's P and for this warpgroup's piece of that tile, and updates the
  // row maxima.
  SM90_DEVICE void receive_p(float (&alpha)[2], int tile) {
    UNLESS_PLANTED(no_wait_for_p, named_barrier_sync(3 - WARPGROUP, 256));
    barrier_wait(ring.full(2 * tile + WARPGROUP), ring.phase(tile));
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
    if (first + 2 * MlaTile::TOKENS >= end) release_queries();
    compute_p(packed, score, alpha, 0, first);
    rescale(alpha, 0);
    multiply_own_p(packed, 0);
    release_tile(0);
    if (first + MlaTile::TOKENS >= end) return;
    receive_p(alpha, 1);
    rescale(alpha, 1);
    multiply_received_p(1);
    release_tile(1);
  }
  // Warpgroup 1: P·V of the even tile, and the odd tile from token `first` on. Its softmax overlaps
  // with P·V of the even tile.
  SM90_DEVICE void process_odd_tile(int first) {
    float score[32], alpha[2];
    uint32_t packed[4][4];
    compute_scores(score, 1);
    if (first + 2 * MlaTile::TOKENS >= end) release_queries();
    receive_p(alpha, 0);
    rescale(alpha, 0);
    multiply_received_p(0);
    compute_p(packed, score, alpha, 1, first);
    UNLESS_PLANTED(rescales_before_wgmma_wait, release_tile(0));
    rescale(alpha, 1);
    multiply_own_p(packed, 1);
    WHEN_PLANTED(rescales_before_wgmma_wait, release_tile(0));
    release_tile(1);
  }
  // Warpgroup 1: P·V of a last even tile that no odd tile follows.
  SM90_DEVICE void finish_last_even_tile() {
    float alpha[2];
    receive_p(alpha, 0);
    rescale(alpha, 0);
    multiply_received_p(0);
    release_tile(0);
  }
};

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
  const int lane = lane_index() % 4;
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
  const int lane = lane_index() % 4;
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

constexpr float LOG2_E = 1.4426950408889634f;

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
  const bool is_nan = row_sum != row_sum && row_max != -minus_infinity();
  return is_nan ? row_sum : row_max * p.max_logits_scale;
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

// Epilogue of a consumer warpgroup: normalizes its half of the columns and stores it with the lse,
// to out and lse if the sequence has one split, else to partial_out and partial_lse. From registers
// to global memory: the next item's queries and tokens load meanwhile.
template <bool FP8, bool SPARSE>
SM90_DEVICE void store_output(const float (&sum)[2][64], SoftmaxState& state,
                              const MlaArguments& p, const MlaWork& w, char* smem, int warpgroup) {
  const int row = tile_row();
  float row_sum[2] = {row_sum_of(state.row_sum[0]), row_sum_of(state.row_sum[1])};
  exchange_row_sums(row_sum, smem, warpgroup, row);
  const int all_rows = p.Sq * p.H;
  const bool single_split = w.num_splits == 1;
  const int split = PLANT(all_splits_in_one_place, 0, w.split);
  float scale[2][2], row_lse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = w.row + row + 8 * half;
    row_lse[half] = row_sum[half] == 0.0f ? minus_infinity()
                                          : state.row_max[half] + log2_of(row_sum[half]);
    float factor = 1.0f;
    if (SPARSE && single_split && row_sum[half] != 0.0f && m < all_rows) {
      factor = PLANT(no_sink_in_single_split, 1.0f, sink_factor(p, m, row_lse[half]));
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      scale[b][half] = row_sum[half] == 0.0f ? 0.0f : divide(factor, row_sum[half]);
      if (FP8) scale[b][half] *= power_of_two(state.unit[b] - WEIGHT_RANGE);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = w.row + row + 8 * half;  // of the sequence
    const bool valid = PLANT(stores_rows_past_the_last, true, m < all_rows);
    const int64_t out_row = int64_t{w.sequence} * all_rows + m;
    const int64_t split_row = (int64_t{w.sequence} * p.num_splits + split) * all_rows + m;
    const int column = warpgroup * 256;
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

// Mainloop of a consumer warpgroup over the token tiles of an item.
template <bool FP8>
SM90_DEVICE void process_tiles(Consumer<FP8, 0>& consumer) {
  if (consumer.begin >= consumer.end) consumer.release_queries();
  for (int first = consumer.begin; first < consumer.end; first += 2 * MlaTile::TOKENS) {
    consumer.process_even_tile(first);
  }
}
template <bool FP8>
SM90_DEVICE void process_tiles(Consumer<FP8, 1>& consumer) {
  int first = consumer.begin;
  if (first + MlaTile::TOKENS >= consumer.end) consumer.release_queries();
  for (; first + MlaTile::TOKENS < consumer.end; first += 2 * MlaTile::TOKENS) {
    consumer.process_odd_tile(first + MlaTile::TOKENS);
  }
  if (first < consumer.end) {
    UNLESS_PLANTED(last_even_tile_not_finished, consumer.finish_last_even_tile());
  }
}

// Consumer warpgroup: the block's items one after the other.
template <bool FP8, bool SPARSE, int WARPGROUP>
SM90_DEVICE void attend(const MlaArguments& p, char* smem) {
  Consumer<FP8, WARPGROUP> consumer(p, smem);
  while (consumer.start()) {
    process_tiles(consumer);
    store_output<FP8, SPARSE>(consumer.sum, consumer.state, p, consumer.item(), smem, WARPGROUP);
    consumer.ring.advance(PieceRing::QUERIES);
  }
}

// FP8: the format of the cache. SPARSE: tokens are named by indices.
template <bool FP8, bool SPARSE>
SM90_KERNEL(MlaTile::THREADS, 1)
void mla_decode(SM90_PARAMETER TensorMap map,  // if p.by_tma: cache [tma_rows, 576], boxes [64, 64]
                SM90_PARAMETER TensorMap q_map,  // q [batch · Sq · H, 576], boxes [64, 64]
                SM90_PARAMETER MlaArguments p) {
  grid_dependency_launch();  // mla_combine may start now; it waits for the end of this grid
  char* smem = shared_memory();
  const int warp = warp_index();
  // Prologue: prefetch the tensor maps, initialize barriers.
  if (warp == 8 && elect_one()) {
    if (p.by_tma) prefetch(&map);
    prefetch(&q_map);
    PieceRing(smem).init();
    barrier_init_fence();
  }
  block_sync();
  if (warp >= 8) {
    // Producer warpgroup.
    constexpr int EXTRA_REGISTERS = PLANT(mla_producer_keeps_registers, 8, 0);
    registers_decrease<(FP8 ? SPARSE ? 88 : 104 : 72) + EXTRA_REGISTERS>();
    PieceRing ring(smem);
    if (FP8) {
      load_items<SPARSE>(Fp8Loader<SPARSE>{p, smem, ring}, &q_map, p, smem, ring);
    } else {
      load_items<SPARSE>(Bf16Loader<SPARSE>{&map, p, smem, ring}, &q_map, p, smem, ring);
    }
  } else {
    // Consumer warpgroups.
    registers_increase<FP8 ? SPARSE ? 208 : 200 : 216>();
    if (warp < 4) {
      attend<FP8, SPARSE, 0>(p, smem);
    } else {
      attend<FP8, SPARSE, 1>(p, smem);
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
