// mla_decode and sparse attention: smem layout, and the items of work of a block.
//
// A block computes items: one row tile of one sequence over one split. The grid has one block per
// SM; block b takes items b, b + blocks, ... of the list of all items, which each warp derives from
// the lengths on the device. The producer walks this list and runs ahead of the consumers, so the
// next item's queries and first tokens load during the epilogue. It writes the item to smem
// together with its queries.
#pragma once

#include "launch.h"
#include "primitives.cuh"

namespace sm90 {

using deepkern::MlaArguments;

struct MlaTile {
  static constexpr int ROWS = 64;                 // (query, head) pairs
  static constexpr int TOKENS = 64;
  static constexpr int WIDTH = 576, V_DIM = 512;  // values of a key and of a value
  static constexpr int COLUMNS = WIDTH / 64;      // column blocks of 64 values: 128-byte smem rows
  static constexpr int PIECE_0_COLUMNS = 4;       // column blocks in piece 0; piece 1 has the rest
  static constexpr int SCALE_BLOCKS = V_DIM / 128;  // scales of an FP8 token
  static constexpr int THREADS = 384;               // two consumer warpgroups, one producer
  // Layout of smem, offsets in bytes: Q, two token tiles, P, ratios, positions, row statistics (row
  // maxima, in the epilogue row sums), two items, positions in the work list, units of the tiles
  // and of the queries, barriers.
  static constexpr uint32_t COLUMN_BYTES = 64 * 128, TILE_BYTES = COLUMNS * COLUMN_BYTES;
  static constexpr uint32_t TOKENS_OFFSET = TILE_BYTES;
  static constexpr uint32_t P_OFFSET = TOKENS_OFFSET + 2 * TILE_BYTES;
  static constexpr uint32_t RATIOS_OFFSET = P_OFFSET + 128 * 64;  // 64 bytes of P per thread
  static constexpr uint32_t RATIOS_BYTES = SCALE_BLOCKS * TOKENS * 4;  // per token tile
  static constexpr uint32_t POSITIONS_OFFSET = RATIOS_OFFSET + 2 * RATIOS_BYTES;
  static constexpr uint32_t POSITIONS_BYTES = TOKENS;  // per token tile
  static constexpr uint32_t ROW_STATS_OFFSET = POSITIONS_OFFSET + 2 * POSITIONS_BYTES;
  static constexpr uint32_t ITEM_OFFSET = ROW_STATS_OFFSET + 2 * ROWS * 4;
  static constexpr uint32_t WORK_LIST_OFFSET = ITEM_OFFSET + 2 * 32;
  static constexpr uint32_t UNITS_OFFSET = WORK_LIST_OFFSET + 4 * 12;
  static constexpr uint32_t UNITS_BYTES = 4 * SCALE_BLOCKS;  // per token tile: by warp and block
  static constexpr uint32_t Q_UNITS_OFFSET = UNITS_OFFSET + 2 * UNITS_BYTES;  // a byte per row
  static constexpr uint32_t BARRIERS_OFFSET = Q_UNITS_OFFSET + ROWS;
  static constexpr uint32_t SMEM_BYTES = BARRIERS_OFFSET + 10 * sizeof(Barrier);
  static_assert(SMEM_BYTES <= 232448, "the layout fits in the smem of a block");
  static_assert(UNITS_OFFSET % 16 == 0 && ITEM_OFFSET % 16 == 0, "loads of 16 bytes");
};

constexpr int ABSENT = 255;  // position of an absent token; no row attends to it

SM90_DEVICE float minus_infinity() { return -__builtin_huge_valf(); }
SM90_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
SM90_DEVICE int max_of(int a, int b) { return a > b ? a : b; }

// The splits of a sequence, of equal length except the last one. They depend on its own length and
// on Sq · H, so the batch does not change a result's bits.
struct SequenceSplits {
  int length;  // tokens
  int tokens_per_split, num_splits;

  // `row`: of the sequence in cache_seqlens.
  SM90_DEVICE SequenceSplits(const MlaArguments& p, int row) {
    length = p.cache_seqlens ? load_global(p.cache_seqlens + row) : p.max_tokens;
    length = length < 0 ? 0 : min_of(length, p.max_tokens);
    const int splits = min_of(length >> p.min_split_log2, p.max_splits);
    const int even = splits > 1 ? (length + splits - 1) / splits : length;
    constexpr int TWO_TILES = 2 * MlaTile::TOKENS;  // so a split starts with an even tile
    tokens_per_split = (even + TWO_TILES - 1) / TWO_TILES * TWO_TILES;
    num_splits = length > 0 ? (length + tokens_per_split - 1) / tokens_per_split : 1;
  }
};

// The row of a sequence in cache_seqlens.
template <bool SPARSE>
SM90_DEVICE int length_row(const MlaArguments& p, int sequence) {
  return SPARSE ? PLANT(length_of_other_query, sequence, sequence / p.queries) : sequence;
}

// The place in lse of row m of a sequence.
SM90_DEVICE int64_t lse_index(const MlaArguments& p, int sequence, int m) {
  const int query = PLANT(lse_of_first_query, 0, sequence % p.queries) + m / p.H;
  return (int64_t{sequence / p.queries} * p.H + m % p.H) * (p.Sq * p.queries) + query;
}

// An item of work: one row tile of one sequence over one split.
struct MlaWork {
  int sequence;          // -1: no more items
  int row, split;        // `row`: the first row of the tile
  int begin, end;        // tokens of the split
  int length;            // of the sequence
  int num_splits;        // of the sequence
  const int* table_row;  // the sequence's part of `table`, for the producer
};

// Item <-> smem, 32 bytes: all but table_row. Two places in turn, by the phase of Q: an item can be
// read until the next one's scores are done.
SM90_DEVICE void store_item(char* smem, uint32_t phase, const MlaWork& w) {
  const auto word = [](int x) { return static_cast<uint32_t>(x); };
  char* to = smem + MlaTile::ITEM_OFFSET + PLANT(items_in_one_place, 0, phase) * 32;
  store_shared(to, Chunk{.word = {word(w.sequence), word(w.row), word(w.split), word(w.begin)}});
  store_shared(to + 16, Chunk{.word = {word(w.end), word(w.length), word(w.num_splits), 0}});
}
SM90_DEVICE MlaWork load_item(const char* smem, uint32_t phase) {
  const char* from = smem + MlaTile::ITEM_OFFSET + PLANT(items_in_one_place, 0, phase) * 32;
  const auto a = load_shared<Chunk>(from), b = load_shared<Chunk>(from + 16);
  const auto value = [](uint32_t x) { return static_cast<int>(x); };
  return {value(a.word[0]), value(a.word[1]), value(a.word[2]), value(a.word[3]),
          value(b.word[0]), value(b.word[1]), value(b.word[2]), nullptr};
}

// The block's items, in order. A warp walks over the sequences 32 at a time, one per lane.
template <bool SPARSE>
struct MlaWorkList {
  const MlaArguments& p;
  char* smem;
  // Kept in smem for each producer warp, as the loads of tokens need the registers.
  int chunk = 0;              // the first of the 32 sequences
  int before = 0;             // items of the sequences before `chunk`
  int next = block_index();  // the next item

  SM90_DEVICE MlaWorkList(const MlaArguments& arguments, char* smem_base)
      : p(arguments), smem(smem_base) {
    save();
  }
  SM90_DEVICE char* saved() const {
    return smem + MlaTile::WORK_LIST_OFFSET + warp_index() % 4 * 12;
  }
  SM90_DEVICE void save() const {
    char* to = saved();  // by all lanes
    if (lane_index() == 0) {
      store_shared(to, chunk), store_shared(to + 4, before), store_shared(to + 8, next);
    }
    warp_sync();
  }
  SM90_DEVICE void load() {
    const char* from = saved();
    chunk = load_shared<int>(from), before = load_shared<int>(from + 4);
    next = load_shared<int>(from + 8);
    warp_sync();
  }

  // Items of the chunk's sequences up to and including this lane's. Not kept, to save registers.
  SM90_DEVICE int count_items() const {
    const int lane = lane_index(), sequence = chunk + lane;
    int count = 0;
    if (sequence < p.batch) {
      count = SequenceSplits(p, length_row<SPARSE>(p, sequence)).num_splits * p.row_tiles;
    }
#pragma unroll 1
    for (int step = 1; step < 32; step *= 2) {
      const int other = shuffle_from(count, lane >= step ? lane - step : lane);
      if (lane >= step) count += other;
    }
    return count;
  }

  SM90_DEVICE MlaWork take() {
    load();
    int items_end;
    for (;;) {
      items_end = count_items();
      const int chunk_items = shuffle_from(items_end, 31);
      if (next < before + chunk_items) break;
      if (chunk + 32 >= p.batch) return {-1, 0, 0, 0, 0, 0, 0, nullptr};
      before += chunk_items, chunk += 32;
    }
    // The sequence of the item: the number of lanes whose items end at or before it.
    const int item = next - before;
    next += PLANT(leaves_out_items, 2 * block_count(), block_count());
    save();
    int lane = 0;
#pragma unroll 1
    for (int step = 16; step > 0; step /= 2) {
      if (shuffle_from(items_end, lane + step - 1) <= item) lane += step;
    }
    const int first = shuffle_from(items_end, lane > 0 ? lane - 1 : 0);
    int tile = item - (lane > 0 ? first : 0), split = 0;  // row tile of the split
#pragma unroll 1
    for (; tile >= p.row_tiles; ++split) tile -= p.row_tiles;  // a division would need registers
    MlaWork w;
    w.sequence = chunk + lane;
    const int row = length_row<SPARSE>(p, w.sequence);
    const SequenceSplits splits(p, row);
    w.table_row = p.table + row * p.table_row_stride;
    if (SPARSE) {
      const int query = w.sequence - row * p.queries;
      w.table_row += PLANT(indices_of_first_query, 0, query * p.table_query_stride);
    }
    w.row = PLANT(all_blocks_take_row_tile_0, 0, tile * MlaTile::ROWS);
    w.split = split;
    w.length = splits.length, w.num_splits = splits.num_splits;
    w.begin = w.split * splits.tokens_per_split;
    w.end = min_of(w.begin + splits.tokens_per_split, w.length);
    return w;
  }
};

}  // namespace sm90
