// mla_decode: smem layout, work of a block, and the producer warpgroup, which loads cached tokens.
//
// bf16 cache: TMA loads a tile of 64 tokens that is inside one page. All other tiles (the last
// tokens of a split, other page sizes, pages that do not exist) are gathered with 16 bytes per lane
// and eight lanes per token. Absent tokens load as zeros.
//
// FP8 cache: a token has 512 e4m3 codes, four float32 scales for 128 codes each, and 64 bf16 RoPE
// values: 656 bytes. Tokens are gathered with a prefetch distance of 32 tokens (21 KB), which
// starts before their buffer is free. code · scale is not exact in bf16, so the scale is split:
//
//     scale = step · ratio        step: scale rounded up to 4 significant bits; 8/9 < ratio <= 1
//
// A code has 4 significant bits, so code · step is exact in bf16. The tile in smem holds these
// products. (Below 2^-126 a ratio may be smaller. From 7e35 on the product of the largest code is
// infinite.) The consumers (mla_softmax.cuh) apply the ratios in fp32, as the quotients
// ratio 0 / ratio 1, ratio 1 / ratio 2, ratio 2 / ratio 3, and ratio 3.
#pragma once

#include "launch.h"
#include "ring.cuh"

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
  // maxima, in the epilogue row sums), row limits (tokens that a row attends to), barriers.
  static constexpr uint32_t COLUMN_BYTES = 64 * 128, TILE_BYTES = COLUMNS * COLUMN_BYTES;
  static constexpr uint32_t TOKENS_OFFSET = TILE_BYTES;
  static constexpr uint32_t P_OFFSET = TOKENS_OFFSET + 2 * TILE_BYTES;
  static constexpr uint32_t RATIOS_OFFSET = P_OFFSET + 128 * 64;  // 64 bytes of P per thread
  static constexpr uint32_t RATIOS_BYTES = SCALE_BLOCKS * TOKENS * 4;  // per token tile
  static constexpr uint32_t POSITIONS_OFFSET = RATIOS_OFFSET + 2 * RATIOS_BYTES;
  static constexpr uint32_t POSITIONS_BYTES = TOKENS;  // per token tile
  static constexpr uint32_t ROW_STATS_OFFSET = POSITIONS_OFFSET + 2 * POSITIONS_BYTES;
  static constexpr uint32_t ROW_LIMITS_OFFSET = ROW_STATS_OFFSET + 2 * ROWS * 4;
  static constexpr uint32_t BARRIERS_OFFSET = ROW_LIMITS_OFFSET + ROWS * 4;
  static constexpr uint32_t SMEM_BYTES = BARRIERS_OFFSET + Ring<4>::BYTES;
  static_assert(SMEM_BYTES <= 232448, "the layout fits in the smem of a block");
};

constexpr int ABSENT = 255;  // position of an absent token; no row attends to it

SM90_DEVICE float minus_infinity() { return -__builtin_huge_valf(); }
SM90_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

// The splits of a sequence. They depend on its length alone.
struct SequenceSplits {
  int length;  // tokens
  int tokens_per_split, num_splits;

  SM90_DEVICE SequenceSplits(const MlaArguments& p, int sequence) {
    length = load_global(p.cache_seqlens + sequence);
    length = length < 0 ? 0 : min_of(length, p.max_tokens);
    const int even = (length + p.max_splits - 1) / p.max_splits;
    tokens_per_split = (even + MlaTile::TOKENS - 1) / MlaTile::TOKENS * MlaTile::TOKENS;
    if (tokens_per_split < p.min_split_tokens) tokens_per_split = p.min_split_tokens;
    num_splits = length > 0 ? (length + tokens_per_split - 1) / tokens_per_split : 1;
  }
};

// The work of a block: one row tile of one sequence over one split.
struct MlaWork {
  int sequence, row, split;  // `row`: the first row of the tile
  int begin, end;            // tokens of the split
  int length, num_splits;    // of the sequence

  SM90_DEVICE explicit MlaWork(const MlaArguments& p) {
    const int sequence_split = block_index() / p.row_tiles;
    row = PLANT(all_blocks_take_row_tile_0, 0, block_index() % p.row_tiles * MlaTile::ROWS);
    sequence = sequence_split / p.num_splits;
    split = sequence_split % p.num_splits;
    const SequenceSplits splits(p, sequence);
    length = splits.length, num_splits = splits.num_splits;
    begin = split * splits.tokens_per_split;
    end = min_of(begin + splits.tokens_per_split, length);
  }
};

// Smem of token tile i: nine column blocks [64 tokens, 64 values] with the 128-byte swizzle, the
// position of each token in the tile or ABSENT, and the quotients [4, 64] of the ratios (FP8
// cache).
struct TokenTile {
  char *tokens, *positions, *ratios;

  SM90_DEVICE TokenTile(char* smem, int i)
      : tokens(smem + MlaTile::TOKENS_OFFSET + i * MlaTile::TILE_BYTES),
        positions(smem + MlaTile::POSITIONS_OFFSET + i * MlaTile::POSITIONS_BYTES),
        ratios(smem + MlaTile::RATIOS_OFFSET + i * MlaTile::RATIOS_BYTES) {}
};

// Each of the two token tiles is loaded and released in two pieces, column blocks 0 to 3 and 4 to
// 8: a ring of four.
struct PieceRing : Ring<4> {
  SM90_DEVICE explicit PieceRing(char* smem) : Ring<4>(smem + MlaTile::BARRIERS_OFFSET) {}

  // Producer: waits for consumer release of both pieces of the next tile.
  SM90_DEVICE void wait_empty_tile() {
    UNLESS_PLANTED(no_wait_for_empty_tile, wait_empty());
    advance();
    UNLESS_PLANTED(no_wait_for_empty_tile, wait_empty());
    advance();
  }
};

// Eight lanes load 576 values to row `row` of a tile [64, 576] in smem, or zeros if `from` is null.
SM90_DEVICE void gather_row(char* tile, int row, const bf16* from) {
  const int chunk = lane_index() % 8;
  Chunk values[MlaTile::COLUMNS];
#pragma unroll
  for (int j = 0; j < MlaTile::COLUMNS; ++j) {
    values[j] = from ? load_global(reinterpret_cast<const Chunk*>(from + j * 64 + chunk * 8))
                     : Chunk{};
  }
  char* to = tile + row * 128 + (chunk ^ (row % 8)) * 16;
#pragma unroll
  for (int j = 0; j < MlaTile::COLUMNS; ++j) {
    store_shared(to + j * MlaTile::COLUMN_BYTES, values[j]);
  }
}

// The consumer threads load the 64 rows of q and the number of tokens that each row attends to.
SM90_DEVICE void load_queries(const MlaArguments& p, const MlaWork& w, char* smem) {
  for (int i = thread_index() / 8; i < MlaTile::ROWS; i += 32) {
    const int row = w.row + i, query = row / p.H, head = row % p.H;
    const int64_t at =
        w.sequence * p.q_batch_stride + query * p.q_query_stride + head * p.q_head_stride;
    gather_row(smem, i, row < p.Sq * p.H ? static_cast<const bf16*>(p.q) + at : nullptr);
    if (lane_index() % 8 == 0) {
      store_shared(smem + MlaTile::ROW_LIMITS_OFFSET + 4 * i,
                   p.causal ? w.length - PLANT(no_causal_mask, 0, (p.Sq - 1 - query)) : w.length);
    }
  }
  fence_async_proxy();
  UNLESS_PLANTED(no_wait_for_queries, named_barrier_sync(1, 256));
}

// The page of a token, or -1 if there is none.
SM90_DEVICE int page_of(const MlaArguments& p, const MlaWork& w, int token) {
  if (token >= w.end) return -1;
  const int page =
      load_global(p.block_table + w.sequence * p.table_row_stride + token / p.page_size);
  return page < p.num_pages ? page : -1;
}

// Producer warpgroup for a bf16 cache.
struct Bf16Loader {
  const TensorMap* map;
  const MlaArguments& p;
  const MlaWork& w;
  PieceRing ring;
  const int thread = thread_index() % 128;

  // Loads the next piece by TMA: column blocks [column, column_end) of the 64 tokens from `token`
  // on.
  SM90_DEVICE void load_piece(const TokenTile& tile, int column, int column_end, int page,
                              int token) {
    Barrier* full = &ring.full_barrier[ring.stage];
    // Wait for consumer release.
    UNLESS_PLANTED(no_wait_for_empty_piece, ring.wait_empty());
    if (column == 0 && thread < MlaTile::TOKENS) {
      store_shared(tile.positions + thread, static_cast<uint8_t>(thread));
    }
    if (thread == 0) {
      uint32_t bytes = (column_end - column) * MlaTile::COLUMN_BYTES;
      WHEN_PLANTED(announces_too_few_piece_bytes, bytes -= 1024);
      barrier_arrive_expect(full, bytes);
      const int row = static_cast<int>(page * p.tma_page_rows) +
                      PLANT(loads_start_of_page, 0, token % p.page_size);
      for (int j = column; j < column_end; ++j) {
        tma_load(tile.tokens + j * MlaTile::COLUMN_BYTES, map, full, j * 64, row);
      }
    } else {
      barrier_arrive(full);
    }
    ring.advance();
  }

  // Gathers the 64 tokens from `first` on.
  SM90_DEVICE void gather_tile(const TokenTile& tile, int first) {
    Barrier* full = &ring.full_barrier[ring.stage];
    int pages[MlaTile::TOKENS / 16];  // loaded before the wait
#pragma unroll
    for (int i = 0; i < MlaTile::TOKENS / 16; ++i) {
      pages[i] = page_of(p, w, first + thread / 8 + PLANT(page_of_other_token, 0, i * 16));
    }
    // Wait for consumer release.
    ring.wait_empty_tile();
#pragma unroll
    for (int i = 0; i < MlaTile::TOKENS / 16; ++i) {
      const int row = thread / 8 + i * 16, token = first + row, page = pages[i];
      const bf16* from = nullptr;
      if (page >= 0) {
        from = static_cast<const bf16*>(p.cache) + page * p.page_stride +
               token % p.page_size * p.token_stride;
      }
      gather_row(tile.tokens, row, from);
      if (thread % 8 == 0) {
        const int position = PLANT(absent_tokens_not_marked, row, from ? row : ABSENT);
        store_shared(tile.positions + row, static_cast<uint8_t>(position));
      }
    }
    UNLESS_PLANTED(no_fence_after_gather, fence_async_proxy());
    barrier_arrive(full);
    barrier_arrive(full + 1);
  }
};

// Producer warpgroup, bf16 cache.
SM90_DEVICE void load_tokens(const TensorMap* map, const MlaArguments& p, const MlaWork& w,
                             char* smem) {
  Bf16Loader loader{map, p, w, PieceRing(smem)};
  int page = page_of(p, w, w.begin);
  for (int first = w.begin; first < w.end; first += MlaTile::TOKENS) {
    const TokenTile tile(smem, loader.ring.stage / 2);
    const int next_page = page_of(p, w, first + MlaTile::TOKENS);  // prefetch
    if (p.by_tma && page >= 0 &&
        PLANT(loads_tokens_past_the_end, true, first + MlaTile::TOKENS <= w.end)) {
      loader.load_piece(tile, 0, MlaTile::PIECE_0_COLUMNS, page, first);
      loader.load_piece(tile, MlaTile::PIECE_0_COLUMNS, MlaTile::COLUMNS, page, first);
    } else {
      loader.gather_tile(tile, first);
    }
    page = next_page;
  }
}

constexpr uint32_t INFINITY_BITS = 0x7f800000, MAGNITUDE_MASK = 0x7fffffff;  // of a float32

// The bits of a scale, rounded up to 4 significant bits. NaN stays NaN.
SM90_DEVICE uint32_t step_of(uint32_t scale) {
  return (scale & MAGNITUDE_MASK) > INFINITY_BITS ? INFINITY_BITS + 0x400000
                                                  : (scale + 0xfffff) & 0xfff00000;
}
// scale / step, or 1 if the step is 0, infinite or NaN: then the tile holds that value.
SM90_DEVICE float ratio_of(uint32_t scale) {
  const uint32_t step = step_of(scale), magnitude = step & MAGNITUDE_MASK;
  const bool nonzero = PLANT(divides_by_scale_0, true, magnitude > 0);
  const bool finite = nonzero && magnitude < INFINITY_BITS;
  return finite ? divide(float_of(scale), float_of(step)) : 1.0f;
}

// One lane's eighth of a token of an FP8 cache, in registers.
struct Fp8Token {
  Chunk codes[MlaTile::SCALE_BLOCKS];  // 16 codes of each block of 128
  Chunk scales;                        // all four
  Chunk rope;                          // 8 bf16 values
  bool valid;                          // false: absent, all values are 0
};

// Loads 16 tokens at a time, eight lanes per token.
struct Fp8Loader {
  const MlaArguments& p;
  const MlaWork& w;
  const int row = thread_index() % 128 / 8, chunk = lane_index() % 8;
  int page;  // of this lane's token in the next fetch

  SM90_DEVICE Fp8Loader(const MlaArguments& arguments, const MlaWork& work)
      : p(arguments), w(work), page(page_of(p, w, w.begin + row)) {}

  // Starts to load the 16 tokens from `first` on, and the page of the next fetch.
  SM90_DEVICE void fetch(Fp8Token& to, int first) {
    const int token = first + row;
    to.valid = page >= 0;
    const auto* from = reinterpret_cast<const Chunk*>(static_cast<const char*>(p.cache) +
                                                      page * p.page_stride +
                                                      token % p.page_size * p.token_stride);
#pragma unroll
    for (int j = 0; j < MlaTile::SCALE_BLOCKS; ++j) {
      to.codes[j] = load_streamed(from + j * 8 + chunk, to.valid);
    }
    to.scales = load_streamed(from + 32, to.valid);
    to.rope = load_streamed(from + PLANT(rope_one_chunk_early, 32, 33) + chunk, to.valid);
    page = page_of(p, w, token + PLANT(page_of_previous_tokens, 0, 16));
  }

  // Stores 16 tokens to rows [first, first + 16) of the tile: dequantized values, ratios,
  // positions.
  SM90_DEVICE void store(const Fp8Token& token, int first, const TokenTile& tile) {
    const int position = first + row;
    char* to = tile.tokens + position * 128;
    const uint32_t* scales = token.scales.word;
#pragma unroll
    for (int j = 0; j < MlaTile::SCALE_BLOCKS; ++j) {
      const uint32_t step = step_of(scales[PLANT(scale_of_block_0, 0, j)]);
      store_codes(token.codes[j], step | step >> 16,
                  to + (j * 2 + chunk / 4) * MlaTile::COLUMN_BYTES, position % 8);
    }
    store_shared(
        to + (MlaTile::COLUMNS - 1) * MlaTile::COLUMN_BYTES + (chunk ^ (position % 8)) * 16,
        token.rope);
    // Lanes 0 to 3 of the eight store the quotient of their block's ratio and the next one.
    const uint32_t low = chunk % 2 ? scales[1] : scales[0];
    const uint32_t high = chunk % 2 ? scales[3] : scales[2];
    const uint32_t scale = chunk % 4 < 2 ? low : high;
    const float ratio = ratio_of(scale);
    const float next_ratio = float_of(static_cast<uint32_t>(
        shuffle_from(static_cast<int>(float_bits(ratio)), (lane_index() + 1) % 32)));
    if (chunk < MlaTile::SCALE_BLOCKS) {
      const int column = PLANT(ratio_of_other_token, position ^ 1, position);
      const bool last = chunk == MlaTile::SCALE_BLOCKS - 1;
      store_shared(tile.ratios + (chunk * MlaTile::TOKENS + column) * 4,
                   PLANT(ratios_not_divided, ratio, last ? ratio : divide(ratio, next_ratio)));
    }
    if (chunk == 0) {
      const int marked = PLANT(absent_fp8_tokens_not_marked, position,
                               token.valid ? position : ABSENT);
      store_shared(tile.positions + position, static_cast<uint8_t>(marked));
    }
  }

  // Stores 16 codes times `step` (a bf16 in both halves) as two chunks of a 128-byte tile row.
  // Four of eight lanes store their chunks in the opposite order, to avoid bank conflicts.
  SM90_DEVICE void store_codes(const Chunk& codes, uint32_t step, char* tile_row, int swizzle) {
    const bool swapped = chunk >= 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Chunk values;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t four = swapped ? codes.word[2 - 2 * half + i] : codes.word[2 * half + i];
        values.word[2 * i] = multiply_bf16(e4m3_to_bf16(static_cast<uint16_t>(four)), step);
        values.word[2 * i + 1] =
            multiply_bf16(e4m3_to_bf16(static_cast<uint16_t>(four >> 16)), step);
      }
      const int to =
          chunk % 4 * 2 + PLANT(chunks_in_wrong_order, half, (swapped ? 1 - half : half));
      WHEN_PLANTED(no_zeros_for_absent_tokens, if (!step) continue);
      store_shared(tile_row + PLANT(codes_not_swizzled, to, (to ^ swizzle)) * 16, values);
    }
  }
};

// Producer warpgroup, FP8 cache: prefetches 32 tokens while it unpacks the 32 before.
SM90_DEVICE void load_fp8_tokens(const MlaArguments& p, const MlaWork& w, char* smem) {
  PieceRing ring(smem);
  Fp8Loader loader(p, w);
  Fp8Token tokens_0, tokens_16;
  loader.fetch(tokens_0, w.begin);
  loader.fetch(tokens_16, w.begin + 16);
  for (int first = w.begin; first < w.end; first += MlaTile::TOKENS) {
    const TokenTile tile(smem, ring.stage / 2);
    Barrier* full = &ring.full_barrier[ring.stage];
    // Wait for consumer release.
    ring.wait_empty_tile();
    const int tokens = PLANT(announces_half_filled_tile, MlaTile::TOKENS - 32, MlaTile::TOKENS);
#pragma unroll 1
    for (int at = 0; at < tokens; at += 32) {
      loader.store(tokens_0, at, tile);
      loader.fetch(tokens_0, first + at + 32);
      loader.store(tokens_16, at + 16, tile);
      loader.fetch(tokens_16, first + at + 48);
    }
    UNLESS_PLANTED(no_fence_after_unpacking, fence_async_proxy());
    barrier_arrive(full);
    barrier_arrive(full + 1);
  }
}

}  // namespace sm90
