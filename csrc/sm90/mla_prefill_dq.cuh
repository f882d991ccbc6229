// The gradient of q of mla_prefill, on Hopper, and delta of the op mla_prefill_backward:
//
//     P = exp(score - lse),  delta[i] = grad_out[i] · out[i] - grad_lse[i]
//     dS = P · (grad_out · vᵀ - delta),  grad_q = softmax_scale · dS · k
//
// Parallelization: as mla_prefill (mla_prefill.cuh), with steps of 64 keys and a ring of three
// buffers for keys and values. A consumer issues Q·Kᵀ and grad_out·Vᵀ of a step together with
// dS·K of the step before. dS goes to the tensor cores from registers.
//
// Limit: the tensor cores; shared memory is almost as long. A step of a block takes 2048 clocks of
// the tensor cores and reads or writes 248 KB of shared memory, 1984 clocks.
//
// Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.2, with a kernel of its own for grad_q,
// so that the order of every sum is fixed.
#pragma once

#include "mla_prefill_schedule.cuh"

namespace sm90 {

using deepkern::MlaPrefillBackwardArguments;

struct DqTile {
  static constexpr int KEYS = 64;  // of a step
  static constexpr int STAGES = 3;
  // Layout of smem, offsets in bytes: Q, grad_out, rings of K and V, barriers. Column blocks of 64
  // values: rows of 128 bytes.
  static constexpr uint32_t ROW_COLUMN_BYTES = QUERY_ROWS * 128, KEY_COLUMN_BYTES = KEYS * 128;
  static constexpr uint32_t GRAD_OUT_OFFSET = 3 * ROW_COLUMN_BYTES;
  static constexpr uint32_t K_OFFSET = GRAD_OUT_OFFSET + 2 * ROW_COLUMN_BYTES;
  static constexpr uint32_t V_OFFSET = K_OFFSET + STAGES * 3 * KEY_COLUMN_BYTES;
  static constexpr uint32_t BARRIERS_OFFSET = V_OFFSET + STAGES * 2 * KEY_COLUMN_BYTES;
  // 8 bytes per consumer thread that nothing reads: see keep_before_wait.
  static constexpr uint32_t ORDER_OFFSET = BARRIERS_OFFSET + Ring<1>::BYTES + Ring<STAGES>::BYTES;
  static constexpr uint32_t SMEM_BYTES = ORDER_OFFSET + 256 * 8;
  static_assert(SMEM_BYTES <= 232448, "the layout fits in the smem of a block");
};

// The buffers of a tile of queries (q and grad_out) and of keys with their values.
struct DqRings {
  Ring<1> queries;
  Ring<DqTile::STAGES> keys;
  char* smem;

  SM90_DEVICE explicit DqRings(char* base)
      : queries(base + DqTile::BARRIERS_OFFSET),
        keys(base + DqTile::BARRIERS_OFFSET + Ring<1>::BYTES),
        smem(base) {}
  SM90_DEVICE void init() {
    queries.init(2, 8);  // q and grad_out arrive; the consumer warps release
    keys.init(2, 8);
  }
  SM90_DEVICE char* key_tile(int stage) const {
    return smem + DqTile::K_OFFSET + stage * 3 * DqTile::KEY_COLUMN_BYTES;
  }
  SM90_DEVICE char* value_tile(int stage) const {
    return smem + DqTile::V_OFFSET + stage * 2 * DqTile::KEY_COLUMN_BYTES;
  }
};

// lse of a query to base 2. An lse of -inf becomes +inf, so that all weights are 0.
SM90_DEVICE float lse_to_base_2(float lse) {
  return lse == minus_infinity() ? -minus_infinity() : lse * (1.0f / LN_2);
}

// Producer thread: loads the tiles of all work items.
SM90_DEVICE void load_dq_tiles(const TensorMap* grad_out, const TensorMap* q, const TensorMap* k,
                               const TensorMap* v, const MlaPrefillBackwardArguments& args,
                               char* smem) {
  const MlaPrefillArguments& p = args.forward;
  DqRings rings(smem);
  PrefillSchedule<DqTile::KEYS> schedule(p);
  PrefillWork w;
  while (schedule.next(w)) {
    const int key_head = w.head / p.heads_per_key;
    for (int j = w.key_tiles - 1; j >= 0; --j) {
      if (j == w.key_tiles - 1) {
        UNLESS_PLANTED(dq_no_wait_for_empty_queries, rings.queries.wait_empty());
        Barrier* full = rings.queries.full_barrier;
        load_rows<3, QUERY_ROWS, 64>(smem, q, full, w.head * p.q_head_stride, w.first);
        load_rows<2, QUERY_ROWS, 64>(smem + DqTile::GRAD_OUT_OFFSET, grad_out, full,
                                     w.head * args.grad_out_head_stride, w.first);
        rings.queries.advance();
      }
      const int row = w.key_begin + j * DqTile::KEYS;
      rings.keys.wait_empty();
      Barrier* full = &rings.keys.full_barrier[rings.keys.stage];
      load_rows<3, DqTile::KEYS>(rings.key_tile(rings.keys.stage), k, full,
                                 key_head * p.k_head_stride, row);
      load_rows<2, DqTile::KEYS>(rings.value_tile(rings.keys.stage), v, full,
                                 key_head * p.v_head_stride, row);
      rings.keys.advance();
    }
  }
}

// A consumer warpgroup, 0 or 1. A thread has the queries `row` and `row` + 8 of the tile.
struct DqConsumer {
  static constexpr int KEYS = DqTile::KEYS;
  const MlaPrefillBackwardArguments& args;
  const MlaPrefillArguments& p = args.forward;
  const int warpgroup = warp_index() / 4;
  const int row = thread_index() / 32 * 16 + lane_index() / 4;
  DqRings rings;
  Ring<DqTile::STAGES> multiplied;          // the step whose dS·K comes next
  float score[KEYS / 2], grad_p[KEYS / 2];  // of one step; dS at its end, in grad_p
  uint32_t packed[KEYS / 16][4];            // dS in bf16: the A operand of WGMMA
  float sum[96];                            // grad_q without softmax_scale
  float lse[2], delta[2];
  int limit[2];  // keys of the sequence that the query attends to

  SM90_DEVICE DqConsumer(const MlaPrefillBackwardArguments& arguments, char* smem)
      : args(arguments), rings(smem), multiplied(rings.keys) {}

  // Issues score = Q·Kᵀ and grad_p = grad_out·Vᵀ of the next step.
  SM90_DEVICE void multiply_scores() {
    UNLESS_PLANTED(dq_no_wait_for_keys, rings.keys.wait_full());
    const uint64_t q = matrix_descriptor(rings.smem + warpgroup * 64 * 128, 0, 1024);
    const uint64_t grad_out = advance_descriptor(q, DqTile::GRAD_OUT_OFFSET);
    const uint64_t k = matrix_descriptor(rings.key_tile(rings.keys.stage), 0, 1024);
    const uint64_t v = matrix_descriptor(rings.value_tile(rings.keys.stage), 0, 1024);
    wgmma_fence(score);
#pragma unroll
    for (int step = 0; step < 12; ++step) {
      const uint32_t a = step / 4 * DqTile::ROW_COLUMN_BYTES + step % 4 * 32;
      const uint32_t b = step / 4 * DqTile::KEY_COLUMN_BYTES + step % 4 * 32;
      wgmma_bf16<KEYS>(score, advance_descriptor(q, a), advance_descriptor(k, b), step > 0);
    }
    wgmma_commit();
    wgmma_fence(grad_p);
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      const uint32_t a = step / 4 * DqTile::ROW_COLUMN_BYTES + step % 4 * 32;
      const uint32_t b = step / 4 * DqTile::KEY_COLUMN_BYTES + step % 4 * 32;
      wgmma_bf16<KEYS>(grad_p, advance_descriptor(grad_out, a), advance_descriptor(v, b), step > 0);
    }
    wgmma_commit();
    rings.keys.advance();
  }
  // Issues sum += dS·K of the step before.
  SM90_DEVICE void multiply_ds() {
    wgmma_fence(sum);
    const uint64_t k =
        matrix_descriptor(rings.key_tile(multiplied.stage), DqTile::KEY_COLUMN_BYTES, 1024);
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      const uint32_t at = PLANT(dq_multiplies_first_keys, 0, step) * 16 * 128;
      wgmma_bf16<192, false>(sum, packed[step], advance_descriptor(k, at), true);
    }
    wgmma_commit();
  }
  // score to P, in place.
  template <bool MASKED>
  SM90_DEVICE void weigh(int j) {
    const int first_column = j * KEYS + lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) {
      const int half = i / 2 % 2, column = first_column + i / 4 * 8 + i % 2;
      score[i] = exp2_of(fused_multiply_add(score[i], p.softmax_scale_log2, -lse[half]));
      if (MASKED && column >= limit[half]) score[i] = 0.0f;
    }
  }
  template <bool MASKED>
  SM90_DEVICE void compute_ds(int j) {
    const int first_column = j * KEYS + lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) {
      const int half = i / 2 % 2, column = first_column + i / 4 * 8 + i % 2;
      grad_p[i] = score[i] * (grad_p[i] - PLANT(dq_without_delta, 0.0f, delta[half]));
      if (MASKED && column >= limit[half]) grad_p[i] = 0.0f;  // values may be NaN there
    }
  }
  SM90_DEVICE void pack_ds() {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) {
      packed[i / 4][i % 4] = pack_bf16(grad_p[2 * i], grad_p[2 * i + 1]);
    }
  }

  // Zeros the keys of the last tile that belong to the next sequence.
  SM90_DEVICE void clear_key_tail(int keys) {
    rings.keys.wait_full();
    clear_rows<3, KEYS>(rings.key_tile(rings.keys.stage), keys);
    UNLESS_PLANTED(dq_no_fence_after_tail, fence_async_proxy());
    named_barrier_sync(1, 256);
  }

  SM90_DEVICE void start(const PrefillWork& w) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = w.first + row + 8 * half;
      const int64_t at = int64_t{w.head} * p.T + query;
      limit[half] = w.visible_keys(p, query);
      lse[half] = query < w.end ? lse_to_base_2(load_global(p.lse + at)) : -minus_infinity();
      delta[half] = query < w.end ? load_global(args.delta + at) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 96; ++i) sum[i] = 0.0f;
    if (w.key_tiles == 0) return;
    rings.queries.wait_full();
    const int keys = w.key_end - w.key_begin - (w.key_tiles - 1) * KEYS;
    if (keys < KEYS) UNLESS_PLANTED(dq_no_clearing_of_tail, clear_key_tail(keys));
  }
  // Scores and dS of step j, and dS·K of step j + 1 unless this is the first step.
  template <bool MASKED>
  SM90_DEVICE void step(int j, bool first) {
    wait_turn(warpgroup);
    multiply_scores();
    if (first) {
      end_turn(warpgroup);
      wgmma_wait<1>();
      weigh<MASKED>(j);
      wgmma_wait<0>();
      compute_ds<MASKED>(j);
    } else {
      multiply_ds();
      end_turn(warpgroup);
      wgmma_wait<2>();
      weigh<MASKED>(j);
      keep_before_wait(rings.smem + DqTile::ORDER_OFFSET, score);
      wgmma_wait<1>();
      compute_ds<MASKED>(j);
      keep_before_wait(rings.smem + DqTile::ORDER_OFFSET, grad_p);
      UNLESS_PLANTED(dq_releases_keys_early, wgmma_wait<0>());
      release(multiplied);
      WHEN_PLANTED(dq_releases_keys_early, wgmma_wait<0>());
    }
    pack_ds();
  }
  SM90_DEVICE void finish() {
    release(rings.queries);
    wait_turn(warpgroup);
    multiply_ds();
    end_turn(warpgroup);
    wgmma_wait<0>();
    release(multiplied);
  }
  SM90_DEVICE void store(const PrefillWork& w) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = w.first + row + 8 * half, column = lane_index() % 4 * 2;
      if (query >= w.end) continue;
      auto* out = static_cast<bf16*>(args.grad_q) + (int64_t{query} * p.H + w.head) * 192 + column;
#pragma unroll
      for (int i = 2 * half; i < 96; i += 4) {
        store_global(reinterpret_cast<uint32_t*>(out + i / 4 * 8),
                     pack_bf16(sum[i] * args.softmax_scale, sum[i + 1] * args.softmax_scale));
      }
    }
  }

  SM90_DEVICE void run() {
    PrefillSchedule<KEYS> schedule(p);
    PrefillWork w;
    if (warpgroup == 1) end_turn(warpgroup);
    while (schedule.next(w)) {
      start(w);
      if (w.key_tiles > 0) {
        // Tiles of keys that all queries of the warpgroup attend to need no mask.
        const int full_tiles = w.visible_keys(p, w.first + warpgroup * 64) / KEYS;
        int j = w.key_tiles - 1;
        step<true>(j--, true);
        for (; j >= full_tiles; --j) step<true>(j, false);
        for (; j >= 0; --j) step<false>(j, false);
        finish();
      }
      store(w);
    }
    if (warpgroup == 0) wait_turn(warpgroup);  // completes the last phase of the barrier
  }
};

SM90_KERNEL(384, 1)
void mla_prefill_dq(SM90_PARAMETER TensorMap grad_out,  // bf16 [T, H · stride], boxes [64, 64]
                    SM90_PARAMETER TensorMap q,         // bf16 [T, H · stride], boxes [64, 64]
                    SM90_PARAMETER TensorMap k,         // bf16 [Tk, Hk · stride], boxes [64, 64]
                    SM90_PARAMETER TensorMap v,         // bf16 [Tk, Hk · stride], boxes [64, 64]
                    SM90_PARAMETER MlaPrefillBackwardArguments p) {
  char* smem = shared_memory();
  const int warp = warp_index();
  if (warp == 8 && elect_one()) {
    prefetch(&grad_out), prefetch(&q);
    if (p.forward.Tk > 0) prefetch(&k), prefetch(&v);  // without rows the maps are empty
    DqRings(smem).init();
    barrier_init_fence();
  }
  block_sync();
  // 128 · 40 + 256 · 232 = 384 · 168 registers.
  if (warp >= 8) {
    registers_decrease<40>();
    if (warp == 8 && elect_one()) load_dq_tiles(&grad_out, &q, &k, &v, p, smem);
  } else {
    registers_increase<232>();
    DqConsumer(p, smem).run();
  }
}

// delta of all queries and heads; 0 for queries without visible keys. Parallelization: one warp per
// query and head.
SM90_KERNEL(128, 1)
void mla_prefill_delta(SM90_PARAMETER MlaPrefillBackwardArguments args) {
  const MlaPrefillArguments& p = args.forward;
  const int64_t item = int64_t{block_index()} * 4 + warp_index();
  const int query = static_cast<int>(item / p.H), head = static_cast<int>(item % p.H);
  if (query >= p.T) return;
  const auto pairs = [&](const void* x, int64_t row_stride, int head_stride) {
    const auto* row = static_cast<const bf16*>(x) + query * row_stride + head * head_stride;
    return load_global(reinterpret_cast<const uint64_t*>(row) + lane_index());
  };
  const uint64_t out = pairs(p.out, args.out_row_stride, args.out_head_stride);
  const uint64_t grad = pairs(args.grad_out, args.grad_out_row_stride, args.grad_out_head_stride);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const auto x = static_cast<uint32_t>(out >> 32 * i), y = static_cast<uint32_t>(grad >> 32 * i);
    sum += to_float(low_bf16(x)) * to_float(low_bf16(y));
    sum += to_float(high_bf16(x)) * to_float(high_bf16(y));
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  if (lane_index() != 0) return;
  const int64_t at = int64_t{head} * p.T + query;
  if (args.grad_lse != nullptr) sum -= load_global(args.grad_lse + at);
  store_global(args.delta + at, load_global(p.lse + at) == minus_infinity() ? 0.0f : sum);
}

}  // namespace sm90
