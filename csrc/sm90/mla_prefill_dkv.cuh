// The gradients of k and v of mla_prefill, on Hopper:
//
//     grad_v = Pᵀ · grad_out,  grad_k = softmax_scale · dSᵀ · q        (P and dS:
//     mla_prefill_dq.cuh)
//
// Parallelization: a persistent kernel. A work item is a tile of 64 keys of one head of k and v. A
// step is 128 queries; the steps go over the queries that attend to the keys, and over the heads
// of q that use them, in a fixed order. The rows of every product are keys, so Pᵀ and dSᵀ are left
// operands from registers. The two consumer warpgroups divide the products, not the rows:
//
//     warpgroup 0   K·Qᵀ, Pᵀ -> publish Pᵀ in fp16, sum grad_v        12 + 8 WGMMAs, 1280 clocks
//     warpgroup 1   V·grad_outᵀ, receive Pᵀ, dSᵀ, sum grad_k           8 + 8 WGMMAs, 1280 clocks
//
// so each has 64 or 96 sums of a gradient per thread, which fit in registers with the scores of
// 128 queries. A producer thread loads q and grad_out by TMA into two rings, and a producer warp
// loads lse and delta.
//
// Limit: the tensor cores; shared memory is almost as long. A step takes 2560 clocks of the tensor
// cores and reads or writes 312 KB of shared memory, 2440 clocks.
//
// Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.2.
#pragma once

#include "mla_prefill_dq.cuh"

namespace sm90 {

struct DkvTile {
  static constexpr int KEYS = 64;
  static constexpr int ROWS = QUERY_ROWS;  // queries of a step
  static constexpr int STAGES = 2;
  // Layout of smem, offsets in bytes: K, V, rings of Q and grad_out, Pᵀ (128 bytes per thread),
  // rings of lse and delta, barriers. Column blocks of 64 values: rows of 128 bytes.
  static constexpr uint32_t KEY_COLUMN_BYTES = KEYS * 128, ROW_COLUMN_BYTES = ROWS * 128;
  static constexpr uint32_t V_OFFSET = 3 * KEY_COLUMN_BYTES;
  static constexpr uint32_t Q_OFFSET = V_OFFSET + 2 * KEY_COLUMN_BYTES;
  static constexpr uint32_t GRAD_OUT_OFFSET = Q_OFFSET + STAGES * 3 * ROW_COLUMN_BYTES;
  static constexpr uint32_t P_OFFSET = GRAD_OUT_OFFSET + STAGES * 2 * ROW_COLUMN_BYTES;
  static constexpr uint32_t LSE_OFFSET = P_OFFSET + 128 * 128;
  static constexpr uint32_t DELTA_OFFSET = LSE_OFFSET + STAGES * ROWS * 4;
  static constexpr uint32_t BARRIERS_OFFSET = DELTA_OFFSET + STAGES * ROWS * 4;
  // 8 bytes per consumer thread that nothing reads: see keep_before_wait.
  static constexpr uint32_t ORDER_OFFSET =
      BARRIERS_OFFSET + Ring<1>::BYTES + 2 * Ring<STAGES>::BYTES;
  static constexpr uint32_t SMEM_BYTES = ORDER_OFFSET + 256 * 8;
  static_assert(SMEM_BYTES <= 232448, "the layout fits in the smem of a block");
};

// The buffers of keys and values of an item, and of q (with lse) and grad_out (with delta).
struct DkvRings {
  Ring<1> keys;
  Ring<DkvTile::STAGES> q, grad_out;
  char* smem;

  SM90_DEVICE explicit DkvRings(char* base)
      : keys(base + DkvTile::BARRIERS_OFFSET),
        q(base + DkvTile::BARRIERS_OFFSET + Ring<1>::BYTES),
        grad_out(base + DkvTile::BARRIERS_OFFSET + Ring<1>::BYTES + Ring<DkvTile::STAGES>::BYTES),
        smem(base) {}
  SM90_DEVICE void init() {
    keys.init(2, 8);    // k and v arrive; the consumer warps release
    q.init(1 + 32, 8);  // TMA, and the lanes that load lse
    grad_out.init(1 + 32, 8);
  }
  SM90_DEVICE char* q_tile(int stage) const {
    return smem + DkvTile::Q_OFFSET + stage * 3 * DkvTile::ROW_COLUMN_BYTES;
  }
  SM90_DEVICE char* grad_out_tile(int stage) const {
    return smem + DkvTile::GRAD_OUT_OFFSET + stage * 2 * DkvTile::ROW_COLUMN_BYTES;
  }
};

// A work item: a tile of keys of one head, and the queries that attend to them.
struct DkvWork {
  int head;                    // of k and v
  int first, end;              // first key of the tile, and the key after the sequence's last one
  int query_begin, query_end;  // queries of the sequence
  int first_step, steps;       // for one head of q: tiles of queries from first_step to steps - 1
  int shift;                   // causal: query i attends to the keys up to i + shift

  // Tiles of queries from this one on need no mask, except a last one that is not full.
  SM90_DEVICE int first_full_step(const MlaPrefillArguments& p) const {
    const int not_full = p.causal ? first + DkvTile::KEYS - 1 - shift - query_begin : 0;
    return not_full > 0 ? (not_full + DkvTile::ROWS - 1) / DkvTile::ROWS : 0;
  }
};

// The next work item of a block.
struct DkvSchedule {
  const MlaPrefillBackwardArguments& args;
  ItemOrder order;

  SM90_DEVICE explicit DkvSchedule(const MlaPrefillBackwardArguments& arguments)
      : args(arguments),
        order{arguments.num_key_tiles, arguments.forward.H / arguments.forward.heads_per_key,
              arguments.key_heads_per_group} {}

  SM90_DEVICE bool next(DkvWork& w) {
    int tile;
    while (order.next(w.head, tile)) {
      const int* entry = args.key_tiles + int64_t{4} * tile;
      w.first = load_global(entry), w.end = load_global(entry + 1);
      if (w.first >= w.end) continue;  // no tile
      w.query_begin = load_global(entry + 2), w.query_end = load_global(entry + 3);
      w.shift = w.end - w.query_end;  // both sequences end together
      w.steps = (w.query_end - w.query_begin + DkvTile::ROWS - 1) / DkvTile::ROWS;
      const int unseen = args.forward.causal ? w.first - w.shift - w.query_begin : 0;
      w.first_step = unseen > 0 ? min_of(unseen / DkvTile::ROWS, w.steps) : 0;
      return true;
    }
    return false;
  }
};

// Producer thread: loads the tiles of all work items.
SM90_DEVICE void load_dkv_tiles(const TensorMap* grad_out, const TensorMap* q, const TensorMap* k,
                                const TensorMap* v, const MlaPrefillBackwardArguments& args,
                                char* smem) {
  const MlaPrefillArguments& p = args.forward;
  DkvRings rings(smem);
  DkvSchedule schedule(args);
  DkvWork w;
  while (schedule.next(w)) {
    if (w.first_step >= w.steps) continue;
    UNLESS_PLANTED(dkv_no_wait_for_empty_keys, rings.keys.wait_empty());
    load_rows<3, DkvTile::KEYS>(smem, k, rings.keys.full_barrier, w.head * p.k_head_stride,
                                w.first);
    load_rows<2, DkvTile::KEYS>(smem + DkvTile::V_OFFSET, v, rings.keys.full_barrier,
                                w.head * p.v_head_stride, w.first);
    rings.keys.advance();
    for (int i = 0; i < p.heads_per_key; ++i) {
      const int head = w.head * p.heads_per_key + i;
      for (int j = w.first_step; j < w.steps; ++j) {
        const int row = w.query_begin + j * DkvTile::ROWS;
        rings.q.wait_empty();
        load_rows<3, DkvTile::ROWS, 64>(rings.q_tile(rings.q.stage), q,
                                        &rings.q.full_barrier[rings.q.stage],
                                        head * p.q_head_stride, row);
        rings.q.advance();
        rings.grad_out.wait_empty();
        load_rows<2, DkvTile::ROWS, 64>(rings.grad_out_tile(rings.grad_out.stage), grad_out,
                                        &rings.grad_out.full_barrier[rings.grad_out.stage],
                                        head * args.grad_out_head_stride, row);
        rings.grad_out.advance();
      }
    }
  }
}

// Producer warp: loads lse, to base 2, and delta of all steps; of rows outside the sequence +inf
// and 0.
SM90_DEVICE void load_dkv_rows(const MlaPrefillBackwardArguments& args, char* smem) {
  const MlaPrefillArguments& p = args.forward;
  DkvRings rings(smem);
  DkvSchedule schedule(args);
  DkvWork w;
  while (schedule.next(w)) {
    for (int step = w.first_step * p.heads_per_key; step < w.steps * p.heads_per_key; ++step) {
      const int count = w.steps - w.first_step, index = step - w.first_step * p.heads_per_key;
      const int head = w.head * p.heads_per_key + index / count;
      const int row = w.query_begin + (w.first_step + index % count) * DkvTile::ROWS;
      const int64_t at = int64_t{head} * p.T + row;
      rings.q.wait_empty();
      for (int i = lane_index(); i < DkvTile::ROWS; i += 32) {
        store_shared(
            smem + DkvTile::LSE_OFFSET + (rings.q.stage * DkvTile::ROWS + i) * 4,
            row + i < w.query_end ? lse_to_base_2(load_global(p.lse + at + i)) : -minus_infinity());
      }
      barrier_arrive(&rings.q.full_barrier[rings.q.stage]);
      rings.q.advance();
      rings.grad_out.wait_empty();
      for (int i = lane_index(); i < DkvTile::ROWS; i += 32) {
        store_shared(smem + DkvTile::DELTA_OFFSET + (rings.grad_out.stage * DkvTile::ROWS + i) * 4,
                     row + i < w.query_end ? load_global(args.delta + at + i) : 0.0f);
      }
      barrier_arrive(&rings.grad_out.full_barrier[rings.grad_out.stage]);
      rings.grad_out.advance();
    }
  }
}

// What both consumer warpgroups do. A thread has the keys `row` and `row` + 8 of the tile.
struct DkvConsumer {
  static constexpr int ROWS = DkvTile::ROWS;
  const MlaPrefillBackwardArguments& args;
  const MlaPrefillArguments& p = args.forward;
  const int row = thread_index() % 128 / 32 * 16 + lane_index() / 4;
  DkvRings rings;
  Ring<DkvTile::STAGES> q_done, grad_out_done;  // the next tiles to release
  float score[ROWS / 2];                        // of one step; at its end Pᵀ or dSᵀ
  uint32_t packed[ROWS / 16][4];                // the same in bf16: the A operand of WGMMA

  SM90_DEVICE DkvConsumer(const MlaPrefillBackwardArguments& arguments, char* smem)
      : args(arguments), rings(smem), q_done(rings.q), grad_out_done(rings.grad_out) {}

  // Issues score = keys · rowsᵀ over COLUMNS column blocks.
  template <int COLUMNS>
  SM90_DEVICE void multiply_scores(const char* keys, const char* rows) {
    const uint64_t a = matrix_descriptor(keys, 0, 1024), b = matrix_descriptor(rows, 0, 1024);
    wgmma_fence(score);
#pragma unroll
    for (int step = 0; step < COLUMNS * 4; ++step) {
      wgmma_bf16<ROWS>(
          score, advance_descriptor(a, step / 4 * DkvTile::KEY_COLUMN_BYTES + step % 4 * 32),
          advance_descriptor(b, step / 4 * DkvTile::ROW_COLUMN_BYTES + step % 4 * 32), step > 0);
    }
    wgmma_commit();
  }
  // Issues sum += packed · rows, with `rows` [ROWS, N].
  template <int N>
  SM90_DEVICE void multiply_rows(float (&sum)[N / 2], const char* rows) {
    const uint64_t b = matrix_descriptor(rows, DkvTile::ROW_COLUMN_BYTES, 1024);
    wgmma_fence(sum);
#pragma unroll
    for (int step = 0; step < ROWS / 16; ++step) {
      const uint32_t at = PLANT(dkv_multiplies_first_rows, 0, step) * 16 * 128;
      wgmma_bf16<N, false>(sum, packed[step], advance_descriptor(b, at), true);
    }
    wgmma_commit();
  }
  SM90_DEVICE void pack_scores() {
#pragma unroll
    for (int i = 0; i < ROWS / 4; ++i) {
      packed[i / 4][i % 4] = pack_bf16(score[2 * i], score[2 * i + 1]);
    }
  }
  // Zeros the queries of the last step that belong to the next sequence, in both tiles.
  SM90_DEVICE void clear_tail(const DkvWork& w, int j) {
    const int rows = w.query_end - w.query_begin - j * ROWS;
    if (rows >= ROWS) return;
    rings.q.wait_full();
    rings.grad_out.wait_full();
    UNLESS_PLANTED(dkv_no_clearing_of_tail,
                   (clear_rows<3, ROWS>(rings.q_tile(rings.q.stage), rows)));
    UNLESS_PLANTED(dkv_no_clearing_of_tail,
                   (clear_rows<2, ROWS>(rings.grad_out_tile(rings.grad_out.stage), rows)));
    UNLESS_PLANTED(dkv_no_fence_after_tail, fence_async_proxy());
    named_barrier_sync(1, 256);
  }
  // Writes N sums times `scale` to the rows of `out` [Tk, Hk, N] that are keys of the item.
  template <int N>
  SM90_DEVICE void store(const DkvWork& w, const float (&sum)[N / 2], void* out, float scale) {
    const int key_heads = p.H / p.heads_per_key;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = w.first + row + 8 * half, column = lane_index() % 4 * 2;
      if (key >= w.end) continue;
      auto* to = static_cast<bf16*>(out) + (int64_t{key} * key_heads + w.head) * N + column;
#pragma unroll
      for (int i = 2 * half; i < N / 2; i += 4) {
        store_global(reinterpret_cast<uint32_t*>(to + i / 4 * 8),
                     pack_bf16(sum[i] * scale, sum[i + 1] * scale));
      }
    }
  }
};

// Warpgroup 0: Pᵀ, published in fp16 for warpgroup 1, and grad_v.
struct DvConsumer : DkvConsumer {
  float sum[64];

  using DkvConsumer::DkvConsumer;

  // score to Pᵀ, in place.
  template <bool MASKED>
  SM90_DEVICE void weigh(const DkvWork& w, int j) {
    const char* lse = rings.smem + DkvTile::LSE_OFFSET + q_done.stage * ROWS * 4;
    const int queries = w.query_end - w.query_begin - j * ROWS;  // of the tile
    int first_query[2];  // of the tile that attends to the key
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      first_query[half] =
          p.causal ? w.first + row + 8 * half - w.shift - w.query_begin - j * ROWS : 0;
    }
#pragma unroll
    for (int i = 0; i < ROWS / 2; i += 4) {
      const int column = i * 2 + lane_index() % 4 * 2;
      const auto two_lse = load_shared<FloatPair>(lse + column * 4);
#pragma unroll
      for (int k = i; k < i + 4; ++k) {
        const float x = fused_multiply_add(score[k], p.softmax_scale_log2,
                                           -(k % 2 ? two_lse.high : two_lse.low));
        const int query = column + k % 2;
        const bool masked = MASKED && (query < first_query[k / 2 % 2] || query >= queries);
        score[k] = masked ? 0.0f : exp2_of(x);
      }
    }
  }
  SM90_DEVICE void publish() {
    UNLESS_PLANTED(dkv_no_wait_for_free_p, named_barrier_sync(3, 256));
#pragma unroll
    for (int i = 0; i < ROWS / 4; i += 4) {
      Chunk chunk;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        chunk.word[k] = pack_fp16(score[2 * (i + k)], score[2 * (i + k) + 1]);
      }
      store_shared(rings.smem + DkvTile::P_OFFSET + i / 4 * 2048 + thread_index() * 16, chunk);
    }
    named_barrier_arrive(2, 256);
  }
  template <bool MASKED>
  SM90_DEVICE void step(const DkvWork& w, int j, bool first) {
    UNLESS_PLANTED(dkv_no_wait_for_queries, rings.q.wait_full());
    multiply_scores<3>(rings.smem, rings.q_tile(rings.q.stage));
    rings.q.advance();
    if (!first) {
      multiply_rows<128>(sum, rings.grad_out_tile(grad_out_done.stage));
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    weigh<MASKED>(w, j);
    warp_sync();  // all lanes have read their lse
    release(q_done);
    publish();
    if (!first) {
      UNLESS_PLANTED(dkv_releases_rows_early, wgmma_wait<0>());
      release(grad_out_done);
      WHEN_PLANTED(dkv_releases_rows_early, wgmma_wait<0>());
    }
    pack_scores();
    rings.grad_out.wait_full();  // for the next step
    rings.grad_out.advance();
  }
  SM90_DEVICE void finish() {
    multiply_rows<128>(sum, rings.grad_out_tile(grad_out_done.stage));
    wgmma_wait<0>();
    release(grad_out_done);
    release(rings.keys);
  }
  SM90_DEVICE void run() {
    DkvSchedule schedule(args);
    DkvWork w;
    while (schedule.next(w)) {
#pragma unroll
      for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
      if (w.first_step < w.steps) {
        rings.keys.wait_full();
        const int full = w.first_full_step(p);
        bool first = true;
        for (int i = 0; i < p.heads_per_key; ++i) {
          for (int j = w.first_step; j < w.steps; ++j) {
            clear_tail(w, j);
            const bool whole = w.query_end - w.query_begin >= (j + 1) * ROWS;
            if (j >= PLANT(dkv_no_mask, 0, full) && whole) {
              step<false>(w, j, first);
            } else {
              step<true>(w, j, first);
            }
            first = false;
          }
        }
        finish();
      }
      store<128>(w, sum, args.grad_v, 1.0f);
    }
    named_barrier_sync(3, 256);  // completes the last phase of the barrier
  }
};

// Warpgroup 1: dSᵀ and grad_k.
struct DkConsumer : DkvConsumer {
  float sum[96];

  using DkvConsumer::DkvConsumer;

  // score, the gradient of Pᵀ, to dSᵀ, in place.
  SM90_DEVICE void compute_ds() {
    const char* delta = rings.smem + DkvTile::DELTA_OFFSET + grad_out_done.stage * ROWS * 4;
    UNLESS_PLANTED(dkv_no_wait_for_p, named_barrier_sync(2, 256));
#pragma unroll
    for (int i = 0; i < ROWS / 2; i += 8) {
      const auto p_pairs = load_shared<Chunk>(rings.smem + DkvTile::P_OFFSET + i / 8 * 2048 +
                                              thread_index() % 128 * 16);
#pragma unroll
      for (int k = i; k < i + 8; k += 4) {
        const auto two = load_shared<FloatPair>(delta + (k * 2 + lane_index() % 4 * 2) * 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t pair = p_pairs.word[(k - i) / 2 + half];
          const int at = k + 2 * half;
          score[at] = to_float(low_fp16(pair)) * (score[at] - two.low);
          score[at + 1] = to_float(high_fp16(pair)) * (score[at + 1] - two.high);
        }
      }
    }
  }
  SM90_DEVICE void step(bool first) {
    rings.grad_out.wait_full();
    multiply_scores<2>(rings.smem + DkvTile::V_OFFSET, rings.grad_out_tile(rings.grad_out.stage));
    rings.grad_out.advance();
    if (!first) {
      multiply_rows<192>(sum, rings.q_tile(q_done.stage));
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    compute_ds();
    keep_before_wait(rings.smem + DkvTile::ORDER_OFFSET, score);
    named_barrier_arrive(3, 256);  // Pᵀ is read
    warp_sync();                   // all lanes have read their delta
    release(grad_out_done);
    if (!first) {
      wgmma_wait<0>();
      release(q_done);
    }
    pack_scores();
    rings.q.wait_full();  // for the next step
    rings.q.advance();
  }
  SM90_DEVICE void finish() {
    multiply_rows<192>(sum, rings.q_tile(q_done.stage));
    wgmma_wait<0>();
    release(q_done);
    release(rings.keys);
  }
  SM90_DEVICE void run() {
    DkvSchedule schedule(args);
    DkvWork w;
    named_barrier_arrive(3, 256);  // the buffer of Pᵀ is free
    while (schedule.next(w)) {
#pragma unroll
      for (int i = 0; i < 96; ++i) sum[i] = 0.0f;
      if (w.first_step < w.steps) {
        rings.keys.wait_full();
        bool first = true;
        for (int i = 0; i < p.heads_per_key; ++i) {
          for (int j = w.first_step; j < w.steps; ++j) {
            clear_tail(w, j);
            step(first);
            first = false;
          }
        }
        finish();
      }
      store<192>(w, sum, args.grad_k, args.softmax_scale);
    }
  }
};

SM90_KERNEL(384, 1)
void mla_prefill_dkv(SM90_PARAMETER TensorMap grad_out,  // bf16 [T, H · stride], boxes [64, 64]
                     SM90_PARAMETER TensorMap q,         // bf16 [T, H · stride], boxes [64, 64]
                     SM90_PARAMETER TensorMap k,         // bf16 [Tk, Hk · stride], boxes [64, 64]
                     SM90_PARAMETER TensorMap v,         // bf16 [Tk, Hk · stride], boxes [64, 64]
                     SM90_PARAMETER MlaPrefillBackwardArguments p) {
  char* smem = shared_memory();
  const int warp = warp_index();
  if (warp == 8 && elect_one()) {
    prefetch(&k), prefetch(&v);
    if (p.forward.T > 0) prefetch(&grad_out), prefetch(&q);  // without rows the maps are empty
    DkvRings(smem).init();
    barrier_init_fence();
  }
  block_sync();
  // 128 · (40 + 224 + 240) = 384 · 168 registers.
  if (warp >= 8) {
    registers_decrease<40>();
    if (warp == 8 && elect_one()) load_dkv_tiles(&grad_out, &q, &k, &v, p, smem);
    if (warp == 9) load_dkv_rows(p, smem);
  } else if (warp < 4) {
    registers_increase<224>();
    DvConsumer(p, smem).run();
  } else {
    registers_increase<240>();
    DkConsumer(p, smem).run();
  }
}

}  // namespace sm90
