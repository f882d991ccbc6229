// Attention over ragged sequences with a key and a value per head, on Hopper: the op mla_prefill of
// kernels/deepkern/attention for bf16, keys of 192 and values of 128 values.
//
//     score[i, j] = softmax_scale · q[i] · k[j]                    over 192 values
//     out[i]      = softmax over the visible j of score[i, j] · v[j]
//
// Parallelization: a persistent kernel. A work item is a tile of 128 queries of one head; a table
// of the tiles is written by find_prefill_tiles (mla_prefill_schedule.cuh). A block has a producer
// warp and two consumer warpgroups of 64 queries each. The producer loads keys and values by TMA,
// 128 at a time, into two rings of two buffers, and runs ahead into the next work item. A consumer
// keeps scores, P and the output in registers, and overlaps twice:
//
//   - within a warpgroup: Q·Kᵀ of step j and P·V of step j + 1 are issued together; the softmax of
//     step j overlaps with P·V of step j + 1;
//   - between warpgroups: they issue their WGMMAs in turn, so the softmax of one overlaps with the
//     WGMMAs of the other.
//
// Keys are processed from the last tile to the first: only the first steps need a mask. A step is
// always 128 keys counted from the sequence's first key, so the bits of a query do not depend on
// the other sequences.
//
// Limit: the tensor cores. A step of a block takes 2560 clocks of them, and 1024 clocks of
// exponentials that overlap. Shared memory is read at 96 bytes a clock during Q·Kᵀ.
//
// Source: FlashAttention-3 (arXiv 2407.08608), sections 3.1 and 3.2, for both overlaps.
#pragma once

#include "mla_prefill_schedule.cuh"

namespace sm90 {

struct PrefillTile {
  static constexpr int ROWS = 128;                 // queries
  static constexpr int KEYS = 128;                 // keys of a step
  static constexpr int QK_DIM = 192, V_DIM = 128;  // values of a key and of a value
  static constexpr int THREADS = 384;              // two consumer warpgroups, one producer
  // Layout of smem, offsets in bytes: Q, two buffers of K, two of V, barriers. All are column
  // blocks of 64 values: 128 rows of 128 bytes.
  static constexpr uint32_t COLUMN_BYTES = 128 * 128;
  static constexpr uint32_t K_BYTES = QK_DIM / 64 * COLUMN_BYTES;  // also of Q
  static constexpr uint32_t V_BYTES = V_DIM / 64 * COLUMN_BYTES;
  static constexpr uint32_t K_OFFSET = K_BYTES;
  static constexpr uint32_t V_OFFSET = K_OFFSET + 2 * K_BYTES;
  static constexpr uint32_t BARRIERS_OFFSET = V_OFFSET + 2 * V_BYTES;
  // 8 bytes per consumer thread that nothing reads: see keep_before_wait.
  static constexpr uint32_t ORDER_OFFSET = BARRIERS_OFFSET + Ring<1>::BYTES + 2 * Ring<2>::BYTES;
  static constexpr uint32_t SMEM_BYTES = ORDER_OFFSET + 256 * 8;
  static_assert(SMEM_BYTES <= 232448, "the layout fits in the smem of a block");
};

// The buffers of Q, of keys and of values.
struct PrefillRings {
  Ring<1> queries;
  Ring<2> keys, values;
  char* smem;

  SM90_DEVICE explicit PrefillRings(char* base)
      : queries(base + PrefillTile::BARRIERS_OFFSET),
        keys(base + PrefillTile::BARRIERS_OFFSET + Ring<1>::BYTES),
        values(base + PrefillTile::BARRIERS_OFFSET + Ring<1>::BYTES + Ring<2>::BYTES),
        smem(base) {}
  SM90_DEVICE void init() {
    queries.init(1, PLANT(one_warp_releases_queries, 1, 8));
    keys.init(1, 8);  // the consumer warps release a buffer
    values.init(1, 8);
  }
  SM90_DEVICE char* key_tile() const {
    return smem + PrefillTile::K_OFFSET + keys.stage * PrefillTile::K_BYTES;
  }
  SM90_DEVICE char* value_tile() const {
    return smem + PrefillTile::V_OFFSET + values.stage * PrefillTile::V_BYTES;
  }
};

// Producer thread: loads the tiles of all work items.
SM90_DEVICE void load_prefill_tiles(const TensorMap* q, const TensorMap* k, const TensorMap* v,
                                    const MlaPrefillArguments& p, char* smem) {
  PrefillRings rings(smem);
  PrefillSchedule<PrefillTile::KEYS> schedule(p);
  PrefillWork w;
  while (schedule.next(w)) {
    const int key_head = PLANT(keys_of_head_0, 0, w.head / p.heads_per_key);
    for (int j = w.key_tiles - 1; j >= 0; --j) {
      const int row = w.key_begin + j * PrefillTile::KEYS;
      rings.keys.wait_empty();
      load_rows<3, 128>(rings.key_tile(), k, &rings.keys.full_barrier[rings.keys.stage],
                        key_head * p.k_head_stride, row);
      rings.keys.advance();
      if (j == w.key_tiles - 1) {
        UNLESS_PLANTED(no_wait_for_empty_queries, rings.queries.wait_empty());
        load_rows<3, 128>(smem, q, rings.queries.full_barrier, w.head * p.q_head_stride, w.first);
        rings.queries.advance();
      }
      rings.values.wait_empty();
      load_rows<2, 128>(rings.value_tile(), v, &rings.values.full_barrier[rings.values.stage],
                        key_head * p.v_head_stride, row);
      rings.values.advance();
    }
  }
}

// A consumer warpgroup, 0 or 1. A thread has the queries `row` and `row` + 8 of the tile.
struct PrefillConsumer {
  static constexpr int KEYS = PrefillTile::KEYS;
  const MlaPrefillArguments& p;
  const int warpgroup = warp_index() / 4;
  const int row = thread_index() / 32 * 16 + lane_index() / 4;
  PrefillRings rings;
  float score[KEYS / 2];          // of one step; P after the softmax
  uint32_t packed[KEYS / 16][4];  // P in bf16: the A operand of WGMMA, four registers per 16 keys
  float sum[PrefillTile::V_DIM / 2];  // the output before normalization
  float row_max[2], row_sum[2];       // row_sum: over the values of P that this thread computed
  int limit[2];                       // keys of the sequence that the query attends to

  SM90_DEVICE PrefillConsumer(const MlaPrefillArguments& arguments, char* smem)
      : p(arguments), rings(smem) {}

  // Issues score = Q·Kᵀ of the next tile of keys.
  SM90_DEVICE void multiply_qk() {
    rings.keys.wait_full();
    wgmma_fence(score);
    const uint64_t q = matrix_descriptor(rings.smem + warpgroup * 64 * 128, 0, 1024);
    const uint64_t k = matrix_descriptor(rings.key_tile(), 0, 1024);
#pragma unroll
    for (int step = 0; step < PrefillTile::QK_DIM / 16; ++step) {
      const uint32_t at = step / 4 * PrefillTile::COLUMN_BYTES + step % 4 * 32;
      wgmma_bf16<KEYS>(score, advance_descriptor(q, at), advance_descriptor(k, at), step > 0);
    }
    wgmma_commit();
  }
  // Issues sum += P·V of the next tile of values.
  SM90_DEVICE void multiply_pv() {
    UNLESS_PLANTED(no_wait_for_values, rings.values.wait_full());
    wgmma_fence(sum);
    const uint64_t v = matrix_descriptor(rings.value_tile(), PrefillTile::COLUMN_BYTES, 1024);
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      const uint32_t at = PLANT(values_of_first_keys, 0, step) * 16 * 128;
      wgmma_bf16<PrefillTile::V_DIM, false>(sum, packed[step], advance_descriptor(v, at), true);
    }
    wgmma_commit();
  }

  // Scores of step j to P, in place. Returns alpha, by which the output so far is multiplied.
  template <bool MASKED>
  SM90_DEVICE FloatPair softmax(int j) {
    const int first_column = j * KEYS + lane_index() % 4 * 2;
    float new_max[2] = {minus_infinity(), minus_infinity()}, alpha[2], finite_max[2];
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) {
      const int column = first_column + i / 4 * 8 + i % 2;
      if (MASKED && column >= limit[i / 2 % 2]) score[i] = minus_infinity();
      new_max[i / 2 % 2] = max_of(score[i], new_max[i / 2 % 2]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // softmax_scale is at least 0, so it can multiply the maximum instead of every score.
      const float maximum = row_max_of(new_max[half]);
      const float scaled = maximum == minus_infinity() ? maximum : maximum * p.softmax_scale_log2;
      const float larger = max_of(scaled, row_max[half]);
      // Before a row's first key the maximum is -inf; use 0 to avoid -inf - -inf.
      finite_max[half] = larger == minus_infinity() ? 0.0f : larger;
      alpha[half] = exp2_of(row_max[half] - finite_max[half]);
      row_max[half] = larger;
      row_sum[half] *= PLANT(prefill_sum_not_rescaled, 1.0f, alpha[half]);
    }
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) {
      const int half = i / 2 % 2, column = first_column + i / 4 * 8 + i % 2;
      const float x = fused_multiply_add(score[i], p.softmax_scale_log2, -finite_max[half]);
      score[i] = MASKED && column >= limit[half] ? 0.0f : exp2_of(x);
      row_sum[half] += score[i];
    }
    return {alpha[0], alpha[1]};
  }
  SM90_DEVICE void pack_p() {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) {
      packed[i / 4][i % 4] = pack_bf16(score[2 * i], score[2 * i + 1]);
    }
  }
  SM90_DEVICE void rescale(FloatPair alpha) {
#pragma unroll
    for (int i = 0; i < PrefillTile::V_DIM / 2; ++i) sum[i] *= i / 2 % 2 ? alpha.high : alpha.low;
  }

  // Zeros the values of the last tile that belong to the next sequence.
  SM90_DEVICE void clear_value_tail(int keys) {
    UNLESS_PLANTED(no_wait_for_values, rings.values.wait_full());
    clear_rows<2, KEYS>(rings.value_tile(), keys);
    UNLESS_PLANTED(no_fence_after_value_tail, fence_async_proxy());
    UNLESS_PLANTED(no_wait_after_value_tail, named_barrier_sync(1, 256));
  }

  // The first step, the last tile of keys.
  SM90_DEVICE void start(const PrefillWork& w) {
    const int j = w.key_tiles - 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_max[half] = minus_infinity(), row_sum[half] = 0.0f;
      limit[half] = PLANT(no_prefill_mask, w.key_end - w.key_begin,
                          w.visible_keys(p, w.first + row + 8 * half));
    }
#pragma unroll
    for (int i = 0; i < PrefillTile::V_DIM / 2; ++i) sum[i] = 0.0f;
    if (j < 0) return;
    UNLESS_PLANTED(no_wait_for_query_tile, rings.queries.wait_full());
    wait_turn(warpgroup);
    multiply_qk();
    end_turn(warpgroup);
    wgmma_wait<0>();
    release(rings.keys);
    softmax<true>(j);
    pack_p();
    const int keys = w.key_end - w.key_begin - j * KEYS;
    if (keys < KEYS) UNLESS_PLANTED(no_clearing_of_value_tail, clear_value_tail(keys));
  }
  // Step j, and P·V of step j + 1.
  template <bool MASKED>
  SM90_DEVICE void step(int j) {
    wait_turn(warpgroup);
    multiply_qk();
    multiply_pv();
    end_turn(warpgroup);
    UNLESS_PLANTED(no_wait_for_prefill_scores, wgmma_wait<1>());
    release(rings.keys);
    keep_order(score);  // the release comes before the softmax
    const FloatPair alpha = softmax<MASKED>(j);
    keep_before_wait(rings.smem + PrefillTile::ORDER_OFFSET, FloatPair{row_sum[0], row_sum[1]});
    WHEN_PLANTED(releases_values_early, release(rings.values));
    UNLESS_PLANTED(rescales_before_pv_ends, wgmma_wait<0>());
    UNLESS_PLANTED(releases_values_early, release(rings.values));
    rescale(alpha);
    pack_p();
    WHEN_PLANTED(rescales_before_pv_ends, wgmma_wait<0>());
  }
  SM90_DEVICE void finish() {
    UNLESS_PLANTED(queries_not_released, release(rings.queries));
    wait_turn(warpgroup);
    multiply_pv();
    end_turn(warpgroup);
    wgmma_wait<0>();
    release(rings.values);
  }

  // Epilogue: normalizes and stores the tile's output and lse.
  SM90_DEVICE void store(const PrefillWork& w) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = w.first + row + 8 * half, column = lane_index() % 4 * 2;
      const float total = row_sum_of(row_sum[half]), scale = total == 0.0f ? 0.0f : 1.0f / total;
      if (query >= PLANT(stores_queries_of_next_sequence, w.first + PrefillTile::ROWS, w.end)) {
        continue;
      }
      auto* out =
          static_cast<bf16*>(p.out) + (int64_t{query} * p.H + w.head) * PrefillTile::V_DIM + column;
#pragma unroll
      for (int i = 2 * half; i < PrefillTile::V_DIM / 2; i += 4) {
        store_global(reinterpret_cast<uint32_t*>(out + i / 4 * 8),
                     pack_bf16(sum[i] * scale, sum[i + 1] * scale));
      }
      if (lane_index() % 4 == 0) {
        const float lse = total == 0.0f ? minus_infinity() : row_max[half] + log2_of(total);
        store_global(p.lse + int64_t{w.head} * p.T + query, lse * LN_2);
      }
    }
  }

  SM90_DEVICE void attend() {
    PrefillSchedule<PrefillTile::KEYS> schedule(p);
    PrefillWork w;
    if (warpgroup == 1) end_turn(warpgroup);
    while (schedule.next(w)) {
      start(w);
      if (w.key_tiles > 0) {
        // Tiles of keys that all queries of the warpgroup attend to need no mask.
        const int full_tiles = w.visible_keys(p, w.first + warpgroup * 64) / KEYS;
        int j = w.key_tiles - 2;
        for (; j >= PLANT(no_mask_after_first_step, w.key_tiles, full_tiles); --j) step<true>(j);
        for (; j >= 0; --j) step<false>(j);
        finish();
      }
      store(w);
    }
    if (warpgroup == 0) wait_turn(warpgroup);  // completes the last phase of the barrier
  }
};

SM90_KERNEL(PrefillTile::THREADS, 1)
void mla_prefill(SM90_PARAMETER TensorMap q,  // bf16 [T, H · stride], boxes [128, 64]
                 SM90_PARAMETER TensorMap k,  // bf16 [Tk, Hk · stride], boxes [128, 64]
                 SM90_PARAMETER TensorMap v,  // bf16 [Tk, Hk · stride], boxes [128, 64]
                 SM90_PARAMETER MlaPrefillArguments p) {
  char* smem = shared_memory();
  const int warp = warp_index();
  if (warp == 8 && elect_one()) {
    prefetch(&q);
    if (p.Tk > 0) prefetch(&k), prefetch(&v);  // without rows the maps are empty
    PrefillRings(smem).init();
    barrier_init_fence();
  }
  block_sync();
  // 128 · 40 + 256 · 232 = 384 · 168 registers.
  if (warp >= 8) {
    registers_decrease<PLANT(prefill_producer_keeps_registers, 96, 40)>();
    if (warp == 8 && elect_one()) load_prefill_tiles(&q, &k, &v, p, smem);
  } else {
    registers_increase<232>();
    PrefillConsumer(p, smem).attend();
  }
}

}  // namespace sm90
