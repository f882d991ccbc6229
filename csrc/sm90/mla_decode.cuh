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
// split after the other (mla_items.cuh), 64 tokens at a time. A token tile is stored once in smem,
// as nine column blocks of 64x64, and serves as K and V.
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
// piece is released by the warpgroup that multiplies it by P. FP8 cache: the products take the
// codes and Q in fp16; the scales are applied in fp32 to the scores and in fp16 to P, per block of
// 128 values.
//
// Range of an FP8 cache: codes are exact in fp16. So are values of Q down to 2^-17 of the largest
// one of their row; smaller ones lose bits. So does a weight below 2^-21 of its row's largest, and
// a token whose scale is less than 2^-21 of the largest scale of an earlier tile or of its own, of
// masked tokens too. Weight times scale has all bits down to 2^-28 of the largest scale. A scale
// that is not finite makes the row NaN.
//
// The splits depend on the sequence's own length and on Sq · H. `mla_combine` adds their results in
// order (mla_store.cuh).
//
// Limit: for few rows reading the cache, for more than about a hundred rows the tensor cores;
// sparse attention with 64 rows or more: see docs/notes/hopper.md.
//
// Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1. The seesaw, the two column halves of the
// output, the release of a tile in pieces and the arrival by gathered copies are from FlashMLA.
#pragma once

#include "mla_store.cuh"

namespace sm90 {

// A consumer warpgroup. WARPGROUP is also the parity of the tiles that it scores and the half of
// the output's columns that it computes.
template <bool FP8, bool SPARSE, int WARPGROUP>
struct Consumer {
  static constexpr bool COPIED = SPARSE && !FP8;  // tokens are copied by cp.async
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
    const uint32_t phase = ring.phase(PieceRing::QUERIES);
    UNLESS_PLANTED(no_wait_for_queries, barrier_wait(ring.queries_full(), phase));
    const MlaWork w = item();
    // From one lane, so that the compiler may keep them in uniform registers.
    begin = shuffle_from(w.begin, 0), end = shuffle_from(w.end, 0);
    row_0_limit = shuffle_from(p.causal ? w.length - (p.Sq - 1 - w.row / p.H) : w.length, 0);
    state = {{-LARGEST_FLOAT, -LARGEST_FLOAT}, {}, {LEAST_UNIT, LEAST_UNIT}};
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
      score_tile<COPIED>(score, smem, t, ring.full(2 * tile), ring.phase(tile));
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
    float scale[2] = {p.softmax_scale_log2, p.softmax_scale_log2};
    if (FP8) scales_of_queries(scale, smem, p.softmax_scale_log2);
    if (FP8 || first + MlaTile::TOKENS > row_0_limit || !all_present(positions)) {
      const MlaWork w = item();
      const int limit[2] = {tile_limit(w, row, first), tile_limit(w, row + 8, first)};
      mask_scores(score, scale[0] > 0.0f ? minus_infinity() : -minus_infinity(), limit, positions);
    }
    float row_max[2];
    row_maxima(row_max, score, state.row_max, scale);
    update_row_max(state, alpha, row_max);
    exponentials<FP8>(score, state.row_sum, row_max, scale);
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
  // row maxima. The other warpgroup's threads had fenced copied tokens before they published P.
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

// Mainloop of a consumer warpgroup over the token tiles of an item.
template <bool FP8, bool SPARSE>
SM90_DEVICE void process_tiles(Consumer<FP8, SPARSE, 0>& consumer) {
  if (consumer.begin >= consumer.end) consumer.release_queries();
  for (int first = consumer.begin; first < consumer.end; first += 2 * MlaTile::TOKENS) {
    consumer.process_even_tile(first);
  }
}
template <bool FP8, bool SPARSE>
SM90_DEVICE void process_tiles(Consumer<FP8, SPARSE, 1>& consumer) {
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
  Consumer<FP8, SPARSE, WARPGROUP> consumer(p, smem);
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
    PieceRing(smem).init(SPARSE && !FP8);
    barrier_init_fence();
  }
  block_sync();
  if (warp >= 8) {
    // Producer warpgroup.
    constexpr int EXTRA_REGISTERS = PLANT(mla_producer_keeps_registers, 8, 0);
    registers_decrease<(FP8 ? 104 : 72) + EXTRA_REGISTERS>();
    PieceRing ring(smem);
    if (FP8) {
      load_items<SPARSE>(Fp8Loader<SPARSE>{p, smem, ring}, &q_map, p, smem, ring);
    } else {
      load_items<SPARSE>(Bf16Loader<SPARSE>{&map, p, smem, ring}, &q_map, p, smem, ring);
    }
  } else {
    // Consumer warpgroups.
    registers_increase<FP8 ? 200 : 216>();
    if (warp < 4) {
      attend<FP8, SPARSE, 0>(p, smem);
    } else {
      attend<FP8, SPARSE, 1>(p, smem);
    }
  }
}

}  // namespace sm90
