// mla_prefill and its gradients: the work items of a persistent block, and the tables of tiles.
#pragma once

#include "launch.h"
#include "mla_softmax.cuh"
#include "ring.cuh"

namespace sm90 {

using deepkern::MlaPrefillArguments;

constexpr int QUERY_ROWS = 128;  // queries of a tile

// A work item: a tile of queries of one head, and the keys that its queries attend to.
struct PrefillWork {
  int head;
  int first, end;          // first query of the tile, and the query after the sequence's last one
  int key_begin, key_end;  // keys of the sequence
  int key_tiles;           // steps: tiles of KEYS keys that a query of the tile attends to
  int shift;               // causal: query i attends to the keys up to i + shift

  // Keys of the sequence that the queries up to `query` attend to.
  SM90_DEVICE int visible_keys(const MlaPrefillArguments& p, int query) const {
    const int end = p.causal ? min_of(query + shift + 1, key_end) : key_end;
    return end > key_begin ? end - key_begin : 0;
  }
};

// The work items of a block: pairs of a head and an entry of the table of tiles. Heads are
// processed in groups whose operands fit in the L2 cache. Within a group the tiles follow the order
// of the table, the most work first, or the opposite order, in turns; the last group starts with
// the most. The blocks take one item each per round, also in both orders in turns. So the work of
// consecutive items changes slowly, and two rounds together give each block nearly the same work.
struct ItemOrder {
  int num_tiles, heads, heads_per_group;
  int round = 0;

  // Sets `head` and `tile` to the next pair; false if there is none.
  SM90_DEVICE bool next(int& head, int& tile) {
    const int blocks = block_count(), items = num_tiles * heads;
    const int rounds = (items + blocks - 1) / blocks;
    while (round < rounds) {
      const bool reversed = (rounds - round) % 2 == 1;
      const int place = reversed ? blocks - 1 - block_index() : block_index();
      const int item = round++ * blocks + place;
      if (item >= items) continue;
      const int group_items = heads_per_group * num_tiles, group = item / group_items;
      const int in_group = item % group_items, first_head = group * heads_per_group;
      const int group_heads = min_of(heads_per_group, heads - first_head);
      const int groups_left = (heads - 1) / heads_per_group - group;
      head = first_head + in_group % group_heads;
      tile = in_group / group_heads;
      if (groups_left % 2 == 1) tile = num_tiles - 1 - tile;
      return true;
    }
    return false;
  }
};

// The next work item of a block in mla_prefill and in its gradient of q. KEYS: keys of a step.
template <int KEYS>
struct PrefillSchedule {
  const MlaPrefillArguments& p;
  ItemOrder order;

  SM90_DEVICE explicit PrefillSchedule(const MlaPrefillArguments& arguments)
      : p(arguments), order{arguments.num_tiles, arguments.H, arguments.heads_per_group} {}

  SM90_DEVICE bool next(PrefillWork& w) {
    int tile;
    while (order.next(w.head, tile)) {
      const int* entry = p.tiles + int64_t{4} * tile;
      w.first = load_global(entry), w.end = load_global(entry + 1);
      if (w.first >= w.end) continue;  // no tile
      w.key_begin = load_global(entry + 2), w.key_end = load_global(entry + 3);
      w.shift = w.key_end - w.end;  // both sequences end together
      w.key_tiles = (w.visible_keys(p, w.first + QUERY_ROWS - 1) + KEYS - 1) / KEYS;
      return true;
    }
    return false;
  }
};

// Issues the copies of a tile of ROWS rows and COLUMNS column blocks of 64 values. BOX_ROWS: rows
// of the boxes of the tensor map.
template <int COLUMNS, int ROWS, int BOX_ROWS = ROWS>
SM90_DEVICE void load_rows(char* to, const TensorMap* map, Barrier* full, int column, int row) {
  uint32_t bytes = COLUMNS * ROWS * 128;
  WHEN_PLANTED(announces_too_few_rows, bytes -= 128);
  barrier_arrive_expect(full, bytes);
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
    for (int r = 0; r < ROWS; r += BOX_ROWS) {
      tma_load(to + (c * ROWS + r) * 128, map, full, column + c * 64, row + r);
    }
  }
}

// Consumer warpgroups 0 and 1 issue their WGMMAs in turn. Warpgroup 1 ends the first turn at the
// start, and warpgroup 0 waits once more at the end, which completes the last phase of the barrier.
SM90_DEVICE void wait_turn(int warpgroup) { named_barrier_sync(2 + warpgroup, 256); }
SM90_DEVICE void end_turn(int warpgroup) { named_barrier_arrive(3 - warpgroup, 256); }

// Consumer release of a ring's current buffer.
template <int STAGES>
SM90_DEVICE void release(Ring<STAGES>& ring) {
  if (lane_index() == 0) barrier_arrive(&ring.empty_barrier[ring.stage]);
  ring.advance();
}

// Keeps arithmetic before a wait for WGMMAs that follows. ptxas moves such a wait over arithmetic,
// but not over a memory access that depends on the arithmetic. `slots`: smem, 8 bytes for each of
// 256 threads, that nothing reads.
SM90_DEVICE void keep_before_wait(char* slots, FloatPair result) {
  store_shared(slots + thread_index() * 8, result);
}
template <int N>
SM90_DEVICE void keep_before_wait(char* slots, const float (&results)[N]) {
  float sum[2] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i % 2] += results[i];
  keep_before_wait(slots, FloatPair{sum[0], sum[1]});
}

// Zeros the rows of a tile in smem from row `first` on: COLUMNS column blocks of ROWS rows. Called
// by 256 threads. They belong to the next sequence, and 0 · NaN is NaN.
template <int COLUMNS, int ROWS>
SM90_DEVICE void clear_rows(char* tile, int first) {
  for (int i = thread_index(); i < (ROWS - first) * COLUMNS * 8; i += 256) {
    const int chunk = i % (COLUMNS * 8), row = first + i / (COLUMNS * 8);
    store_shared(tile + chunk / 8 * (ROWS * 128) + row * 128 + chunk % 8 * 16, Chunk{});
  }
}

// A span of rows between two boundaries: the rows before the first sequence, a sequence, or the
// rows after the last one. Boundaries are clamped to the tensor and do not decrease.
struct Boundaries {
  const int* boundaries;  // int32 [count]
  int count, rows;

  // Boundary `i`, or the end of the tensor, without regard to the preceding ones.
  SM90_DEVICE int clamped(int i) const {
    if (i < 0) return 0;
    if (i >= count) return rows;
    const int x = load_global(boundaries + i);
    return x < 0 ? 0 : min_of(x, rows);
  }
};

// The largest value among the lanes up to this one, and the sum of these values.
SM90_DEVICE int max_of_preceding(int x) {
  for (int d = 1; d < 32; d *= 2) {
    const int lane = lane_index(), other = shuffle_from(x, lane < d ? lane : lane - d);
    x = other > x ? other : x;
  }
  return x;
}
SM90_DEVICE int sum_of_preceding(int x) {
  for (int d = 1; d < 32; d *= 2) {
    const int lane = lane_index(), other = shuffle_from(x, lane < d ? lane : lane - d);
    if (lane >= d) x += other;
  }
  return x;
}

// Pre-pass: writes a table of tiles of ROWS rows, four int32 per tile: first row, row after the
// sequence's last one, and the same of the sequence on the other side (keys for queries). Entries
// without a tile are zeros. The rows outside all sequences have tiles with nothing on the other
// side. `last_first`: the last tile of a sequence comes first; it has the most keys if causal.
// Parallelization: one warp per span. It scans the preceding spans, 32 at a time.
template <int ROWS>
SM90_KERNEL(128, 1)
void find_prefill_tiles(Boundaries tiled, Boundaries others, bool last_first,
                        int* tiles,  // [num_tiles, 4]
                        int num_tiles) {
  const int num_spans = tiled.count + 1, mine = block_index() * 4 + warp_index();
  if (mine >= num_spans) return;
  int last_end = 0, last_other_end = 0, preceding = 0;
  int first = 0, end = 0, other_begin = 0, other_end = 0, tile = 0;
  for (int start = 0; start <= mine; start += 32) {
    const int span = start + lane_index();
    const int ends = max_of_preceding(tiled.clamped(span));
    const int span_end = ends > last_end ? ends : last_end;
    const int other_ends = max_of_preceding(others.clamped(span));
    const int span_other_end = other_ends > last_other_end ? other_ends : last_other_end;
    const int previous = shuffle_from(span_end, lane_index() > 0 ? lane_index() - 1 : 0);
    const int previous_other =
        shuffle_from(span_other_end, lane_index() > 0 ? lane_index() - 1 : 0);
    const int span_first = lane_index() > 0 ? previous : last_end;
    const int span_other_begin = lane_index() > 0 ? previous_other : last_other_end;
    const int count = (span_end - span_first + ROWS - 1) / ROWS;
    const int up_to = sum_of_preceding(count);
    const int lane = mine - start < 31 ? mine - start : 31;
    first = shuffle_from(span_first, lane), end = shuffle_from(span_end, lane);
    other_begin = shuffle_from(span_other_begin, lane),
    other_end = shuffle_from(span_other_end, lane);
    tile = preceding + shuffle_from(up_to - count, lane);
    preceding += shuffle_from(up_to, 31);
    last_end = shuffle_from(span_end, 31), last_other_end = shuffle_from(span_other_end, 31);
  }
  const bool is_sequence = mine > 0 && mine < num_spans - 1;
  const int count = (end - first + ROWS - 1) / ROWS;
  const int entries = mine == num_spans - 1 ? num_tiles - tile : count;
  for (int i = lane_index(); i < entries; i += 32) {
    int* entry = tiles + int64_t{4} * (tile + i);
    const bool empty = i >= count;
    store_global(entry, empty ? 0 : first + (last_first ? count - 1 - i : i) * ROWS);
    store_global(entry + 1, empty ? 0 : end);
    store_global(entry + 2, is_sequence ? other_begin : 0);
    store_global(entry + 3, is_sequence ? other_end : 0);
  }
}

}  // namespace sm90
