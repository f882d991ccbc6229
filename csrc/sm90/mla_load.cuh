// mla_decode and sparse attention: the producer warpgroup, which loads queries and cached tokens.
//
// Queries are loaded by TMA, 64 rows of the matrix [batch · Sq · H, 576]. Rows that belong to the
// next sequence are computed and not stored.
//
// bf16 cache: TMA loads a tile of 64 tokens that is inside one page. All other tiles (the last
// tokens of a split, other page sizes, pages that do not exist, tokens named by indices) are
// gathered by asynchronous copies of 16 bytes, eight lanes per token: all 36 copies of a lane are
// in flight at once and need no registers; in sparse attention, those of the next tile too. Absent
// tokens load as zeros.
//
// FP8 cache: a token has 512 e4m3 codes, four float32 scales for 128 codes each, and 64 bf16 RoPE
// values: 656 bytes. Tokens are gathered with a prefetch distance of 32 tokens (21 KB), which
// starts before their buffer is free. The tile in smem holds the codes in fp16, which is exact and
// takes one instruction for two codes. The consumers (mla_softmax.cuh) apply the scales, as the
// quotients scale 0 / scale 1, scale 1 / scale 2, scale 2 / scale 3, and scale 3: to the scores in
// fp32, to P in fp16 over a unit. The unit of a block of 128 columns is a power of two, at most the
// largest scale of the block in the tokens so far and more than half of it.
// Limits: a scale below 2^-100 is 0; a scale that is less than 2^-26 times the largest one of its
// token counts as that. A unit is 2^-100 or more. The codes of a scale that is not finite become
// NaN.
#pragma once

#include "mla_items.cuh"

namespace sm90 {

// Smem of token tile i: nine column blocks [64 tokens, 64 values] with the 128-byte swizzle, the
// position of each token in the tile or ABSENT; with an FP8 cache also the quotients [4, 64] of the
// scales, and the exponents [4 warps, 4 blocks] of the largest scales.
struct TokenTile {
  char *tokens, *positions, *ratios, *units;

  SM90_DEVICE TokenTile(char* smem, int i)
      : tokens(smem + MlaTile::TOKENS_OFFSET + i * MlaTile::TILE_BYTES),
        positions(smem + MlaTile::POSITIONS_OFFSET + i * MlaTile::POSITIONS_BYTES),
        ratios(smem + MlaTile::RATIOS_OFFSET + i * MlaTile::RATIOS_BYTES),
        units(smem + MlaTile::UNITS_OFFSET + i * MlaTile::UNITS_BYTES) {}
};

// Each of the two token tiles is loaded and released in two pieces, column blocks 0 to 3 and 4 to
// 8. An item starts with tile 0, so the tiles have a phase each. Also the barriers of Q and of the
// item.
struct PieceRing {
  char* smem;
  static constexpr int QUERIES = 2;  // index of Q, after the two token tiles
  static constexpr int MARKING_THREADS = PLANT(positions_not_announced, 0, 16);
  uint32_t phases = 0;  // bit i: parity of the current pass through tile i, or Q

  SM90_DEVICE explicit PieceRing(char* smem_base) : smem(smem_base) {}

  // Barrier i of: four full pieces (2 · tile and 2 · tile + 1), four empty ones, Q full, Q empty.
  SM90_DEVICE Barrier* barrier(int i) const {
    return reinterpret_cast<Barrier*>(smem + MlaTile::BARRIERS_OFFSET) + i;
  }
  SM90_DEVICE Barrier* full(int piece) const { return barrier(piece); }
  SM90_DEVICE Barrier* empty(int piece) const { return barrier(4 + piece); }
  SM90_DEVICE Barrier* queries_full() const { return barrier(8); }
  SM90_DEVICE Barrier* queries_empty() const { return barrier(9); }

  // One thread calls this, then barrier_init_fence. 128 producer threads fill a piece, 4 warps of
  // one consumer warpgroup release it. One thread loads Q, 8 warps release it. `copies_arrive`: the
  // threads arrive by their copies, and those that mark positions once more at piece 1.
  SM90_DEVICE void init(bool copies_arrive) {
    for (int i = 0; i < 4; ++i) {
      barrier_init(full(i), 128 + (copies_arrive && i % 2 ? MARKING_THREADS : 0));
      barrier_init(empty(i), PLANT(three_warps_release_a_piece, 3, 4));
    }
    barrier_init(queries_full(), 1);
    barrier_init(queries_empty(), PLANT(one_warpgroup_releases_queries, 4, 8));
  }
  // Of a tile or of Q.
  SM90_DEVICE uint32_t phase(int tile) const { return phases >> tile & 1; }
  SM90_DEVICE void advance(int tile) { phases ^= 1u << tile; }
  // Producer: waits for consumer release. In the first pass the pieces are free.
  SM90_DEVICE void wait_empty(int piece) {
    const uint32_t free = phase(piece / 2) ^ 1;
    barrier_wait(empty(piece), PLANT(wait_piece_wrong_parity, free ^ 1, free));
  }
  SM90_DEVICE void wait_empty_tile(int tile) {
    UNLESS_PLANTED(no_wait_for_empty_tile, wait_empty(2 * tile));
    UNLESS_PLANTED(no_wait_for_empty_tile, wait_empty(2 * tile + 1));
  }
};

// Producer: hands the next item and its queries to the consumers, once they have read the previous
// ones.
SM90_DEVICE void load_item_and_queries(const TensorMap* q_map, const MlaArguments& p,
                                       const MlaWork& w, char* smem, const PieceRing& ring) {
  if (thread_index() % 128 > 0) return;
  const uint32_t phase = ring.phase(PieceRing::QUERIES);
  UNLESS_PLANTED(no_wait_for_empty_queries, barrier_wait(ring.queries_empty(), phase ^ 1));
  store_item(smem, phase, w);
  if (w.sequence < 0) return barrier_arrive(ring.queries_full());
  barrier_arrive_expect(ring.queries_full(), MlaTile::TILE_BYTES);
  const int row = w.sequence * p.Sq * p.H + w.row;
#pragma unroll 1
  for (int j = 0; j < MlaTile::COLUMNS; ++j) {
    tma_load(smem + j * MlaTile::COLUMN_BYTES, q_map, ring.queries_full(), j * 64, row);
  }
}

// The page of a token of a sequence, or of a slot of the cache, and the place in it.
struct PagePlace {
  int page, place;

  SM90_DEVICE PagePlace(const MlaArguments& p, int i)
      : page(static_cast<int>(uint64_t{static_cast<uint32_t>(i)} * p.page_reciprocal >>
                              p.page_shift)),
        place(i - page * p.page_size) {}
};

// The entry of a token in the table: its page, or if SPARSE the slot that its index names.
// Negative: the token is absent.
template <bool SPARSE>
SM90_DEVICE int table_entry(const MlaArguments& p, const MlaWork& w, int token) {
  if (token >= w.end) return -1;
  const int entry = load_global(w.table_row + (SPARSE ? token : PagePlace(p, token).page));
  const int entries = SPARSE ? p.num_pages * p.page_size : p.num_pages;
  return PLANT(index_not_clamped, false, entry >= entries) ? -1 : entry;
}

// The elements of the cache before a token that is not absent.
template <bool SPARSE>
SM90_DEVICE int64_t token_offset(const MlaArguments& p, int entry, int token) {
  const PagePlace at(p, SPARSE ? entry : token);
  return (SPARSE ? at.page : entry) * p.page_stride + at.place * p.token_stride;
}

// Producer warpgroup for a bf16 cache.
template <bool SPARSE>
struct Bf16Loader {
  const TensorMap* map;
  const MlaArguments& p;
  char* smem;
  PieceRing& ring;
  const int thread = thread_index() % 128;

  // Loads a piece by TMA: column blocks [column, column_end) of the 64 tokens from `token` on.
  SM90_DEVICE void load_piece(int piece, int column, int column_end, int page, int token) {
    const TokenTile tile(smem, piece / 2);
    Barrier* full = ring.full(piece);
    // Wait for consumer release.
    UNLESS_PLANTED(no_wait_for_empty_piece, ring.wait_empty(piece));
    if (column == 0 && thread < MlaTile::TOKENS) {
      store_shared(tile.positions + thread, static_cast<uint8_t>(thread));
    }
    if (thread == 0) {
      uint32_t bytes = (column_end - column) * MlaTile::COLUMN_BYTES;
      WHEN_PLANTED(announces_too_few_piece_bytes, bytes -= 1024);
      barrier_arrive_expect(full, bytes);
      const int row = static_cast<int>(page * p.tma_page_rows) +
                      PLANT(loads_start_of_page, 0, PagePlace(p, token).place);
      for (int j = column; j < column_end; ++j) {
        tma_load(tile.tokens + j * MlaTile::COLUMN_BYTES, map, full, j * 64, row);
      }
    } else {
      barrier_arrive(full);
    }
  }

  // A warp gathers 16 tokens: rows `first_row` + 0, 16, 32 and 48 of a tile by each eight lanes.
  static constexpr int STEPS = MlaTile::TOKENS / 16;
  const int first_row = thread / 8;
  // The table entry of the token that this lane looks up for its warp, in the tile from `first` on.
  SM90_DEVICE int lane_entry(const MlaWork& w, int first) const {
    const int lane = lane_index() % 16;  // twice
    return table_entry<SPARSE>(p, w, first + thread / 32 * 4 + lane % 4 + lane / 4 * 16);
  }

  // Starts to copy column blocks [FIRST, FIRST + COUNT) of this lane's rows to smem.
  template <int FIRST, int COUNT>
  SM90_DEVICE void copy_columns(char* tile, const bf16* const (&from)[STEPS]) const {
    const int chunk = lane_index() % 8;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int row = first_row + i * 16;
      const int swizzled = PLANT(gather_not_swizzled, chunk, chunk ^ row % 8);
      char* to = tile + FIRST * MlaTile::COLUMN_BYTES + row * 128 + swizzled * 16;
      const bf16* part = (from[i] ? from[i] : static_cast<const bf16*>(p.cache)) + FIRST * 64;
#pragma unroll
      for (int j = 0; j < COUNT; ++j) {
        copy_async(to + j * MlaTile::COLUMN_BYTES, part + j * 64 + chunk * 8,
                   PLANT(absent_tokens_not_zeroed, true, from[i] != nullptr));
      }
    }
    if (!SPARSE) copy_async_commit();
  }
  // One lane of the eight of a token.
  SM90_DEVICE bool marks_positions() const { return thread % 8 == 0; }
  // Marks this lane's rows for the consumers: their positions, or ABSENT.
  SM90_DEVICE void mark_positions(char* positions, const bf16* const (&from)[STEPS]) const {
    if (!marks_positions()) return;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int row = first_row + i * 16;
      const int position = PLANT(absent_tokens_not_marked, row, from[i] ? row : ABSENT);
      store_shared(positions + row, static_cast<uint8_t>(position));
    }
  }
  // SPARSE: announces a piece when this lane's copies are done, without a wait. So the next copies
  // start as soon as their buffer is free, and the consumers need a fence.
  SM90_DEVICE void announce_piece(int piece) const {
    PLANT(announces_before_copies, barrier_arrive(ring.full(piece)),
          barrier_arrive_after_copies(ring.full(piece)));
  }
  // Announces a piece after a wait for this lane's copies, except those of `LATER` later pieces.
  template <int LATER>
  SM90_DEVICE void finish_piece(int piece) const {
    UNLESS_PLANTED(no_wait_for_gather, copy_async_wait<LATER>());
    UNLESS_PLANTED(no_fence_after_gather, fence_async_proxy());
    barrier_arrive(ring.full(piece));
  }

  // Gathers the 64 tokens from `first` on. `entry`: of lane_entry.
  SM90_DEVICE void gather_tile(const MlaWork& w, int tile_index, int first, int entry) {
    const TokenTile tile(smem, tile_index);
    const bf16* from[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int lane = lane_index() / 8 + PLANT(place_of_other_token, 0, 4 * i);
      const int at = shuffle_from(entry, lane), token = first + first_row + i * 16;
      from[i] = static_cast<const bf16*>(p.cache) + token_offset<SPARSE>(p, at, token);
      if (at < 0) from[i] = nullptr;
    }
    // Wait for consumer release of each piece. The marks are read before piece 0 is released.
    UNLESS_PLANTED(no_wait_for_empty_tile, ring.wait_empty(2 * tile_index));
    constexpr int COLUMNS_0 = MlaTile::PIECE_0_COLUMNS;
    copy_columns<0, COLUMNS_0>(tile.tokens, from);
    if (SPARSE) announce_piece(2 * tile_index);
    mark_positions(tile.positions, from);
    UNLESS_PLANTED(no_wait_for_empty_tile, ring.wait_empty(2 * tile_index + 1));
    copy_columns<COLUMNS_0, MlaTile::COLUMNS - COLUMNS_0>(tile.tokens, from);
    if (SPARSE) {
      announce_piece(2 * tile_index + 1);
      UNLESS_PLANTED(positions_not_announced,
                     if (marks_positions()) barrier_arrive(ring.full(2 * tile_index + 1)));
    } else {
      finish_piece<1>(2 * tile_index);
      finish_piece<0>(2 * tile_index + 1);
    }
  }

  // Loads the tokens of an item.
  SM90_DEVICE void load(const MlaWork& w) {
    int page = -1, entry = -1;  // of the next tile, loaded a tile ahead
    if (SPARSE) {
      entry = lane_entry(w, w.begin);
    } else {
      page = table_entry<false>(p, w, w.begin);
    }
    for (int first = w.begin; first < w.end; first += MlaTile::TOKENS) {
      const int i = first / MlaTile::TOKENS % 2;  // w.begin is an even number of tiles
      const int next = first + MlaTile::TOKENS;
      if (SPARSE) {
        const int next_entry = lane_entry(w, next);
        gather_tile(w, i, first, entry);
        entry = next_entry;
      } else {
        const int next_page = table_entry<false>(p, w, next);
        if (p.by_tma && page >= 0 && PLANT(loads_tokens_past_the_end, true, next <= w.end)) {
          load_piece(2 * i, 0, MlaTile::PIECE_0_COLUMNS, page, first);
          load_piece(2 * i + 1, MlaTile::PIECE_0_COLUMNS, MlaTile::COLUMNS, page, first);
        } else {
          gather_tile(w, i, first, lane_entry(w, first));
        }
        page = next_page;
      }
      ring.advance(i);
    }
  }
};

constexpr uint32_t MAGNITUDE_MASK = 0x7fffffff;  // of a float32
constexpr int INFINITY_BITS = 0x7f800000, LEAST_SCALE = 27 << 23;  // 2^-100, as bits of a float32
constexpr float LEAST_QUOTIENT = 0x1p-26f;
// Biased exponents of units; the largest one is of Q alone.
constexpr int LEAST_UNIT = 27, LARGEST_UNIT = 247;

SM90_DEVICE float magnitude(float x) { return float_of(float_bits(x) & MAGNITUDE_MASK); }
// The power of two with this biased exponent, which is a normal one.
SM90_DEVICE float power_of_two(int exponent) {
  return float_of(static_cast<uint32_t>(exponent) << 23);
}

// One lane's eighth of a token of an FP8 cache, in registers.
struct Fp8Token {
  int entry;                          // in the table; negative: absent, all values are 0
  Words codes[MlaTile::COLUMNS - 1];  // 8 codes of each column block
  Chunk rope;
  float scale;  // of the block of 128 values lane % 4
};

// Loads 16 tokens at a time, eight lanes per token.
template <bool SPARSE>
struct Fp8Loader {
  static constexpr int SCALES_OFFSET = MlaTile::V_DIM;  // of a token, in bytes
  static constexpr int ROPE_OFFSET = SCALES_OFFSET + MlaTile::SCALE_BLOCKS * 4;
  const MlaArguments& p;
  char* smem;
  PieceRing& ring;
  const int row = thread_index() % 128 / 8, chunk = lane_index() % 8;
  int entry = -1;          // of this lane's token in the next fetch
  float block_max = 0.0f;  // of the scales of this lane's block in its tokens of the tile

  SM90_DEVICE const char* address_of(int entry, int token) const {
    return static_cast<const char*>(p.cache) + token_offset<SPARSE>(p, entry, token);
  }

  // Starts to load the 16 tokens from `first` on, and the table entry of the next fetch.
  SM90_DEVICE void fetch(Fp8Token& to, const MlaWork& w, int first) {
    const int chunk = not_before(this->chunk), row = not_before(this->row);
    const int token = first + row;
    const bool valid = entry >= 0;
    const char* from = address_of(entry, token);
    to.entry = entry;
#pragma unroll
    for (int j = 0; j < MlaTile::COLUMNS - 1; ++j) {
      to.codes[j] = load_streamed(reinterpret_cast<const Words*>(from) + j * 8 + chunk, valid);
    }
    const char* scales = from + SCALES_OFFSET;
    to.scale = load_streamed(
        reinterpret_cast<const float*>(scales) + PLANT(scale_of_block_0, 0, chunk % 4), valid);
    const char* rope = from + PLANT(rope_one_chunk_early, ROPE_OFFSET - 16, ROPE_OFFSET);
    to.rope = load_streamed(reinterpret_cast<const Chunk*>(rope) + chunk, valid);
    entry = table_entry<SPARSE>(p, w, token + PLANT(place_of_previous_tokens, 0, 16));
  }

  // Stores the 16 tokens from `first` on to rows [at, at + 16) of a tile: codes in fp16, RoPE
  // values, quotients of the scales, positions.
  SM90_DEVICE void store(Fp8Token& token, int first, int at, const TokenTile& tile) {
    const int chunk = not_before(this->chunk), row = not_before(this->row);
    const int position = at + row;
    store_quotient(token, first, position, tile);
    const int swizzled = chunk ^ position % 8;
    char* to = tile.tokens + position * 128;
#pragma unroll
    for (int j = 0; j < MlaTile::COLUMNS - 1; ++j) {
      store_shared(to + j * MlaTile::COLUMN_BYTES +
                       PLANT(codes_not_swizzled, chunk, swizzled) * 16,
                   to_fp16(token.codes[PLANT(columns_in_wrong_order, j ^ 1, j)]));
    }
    store_shared(to + (MlaTile::COLUMNS - 1) * MlaTile::COLUMN_BYTES + swizzled * 16, token.rope);
    if (chunk == 0) {
      const int marked = PLANT(absent_fp8_tokens_not_marked, position,
                               token.entry >= 0 ? position : ABSENT);
      store_shared(tile.positions + position, static_cast<uint8_t>(marked));
    }
  }

  static SM90_DEVICE Chunk to_fp16(const Words& codes) {
    Chunk values;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      values.word[2 * i] = e4m3_to_fp16(static_cast<uint16_t>(codes.word[i]));
      values.word[2 * i + 1] = e4m3_to_fp16(static_cast<uint16_t>(codes.word[i] >> 16));
    }
    return values;
  }

  // Lanes 0 to 3 of the eight of a token store the quotient of their block's scale and the next
  // one, in the range of the kernel. If one of the scales is not finite, its codes become NaN.
  SM90_DEVICE void store_quotient(Fp8Token& token, int first, int position,
                                  const TokenTile& tile) {
    const int lane = lane_index(), block = lane % 4;
    float scale = token.scale;
    const int bits = static_cast<int>(float_bits(magnitude(scale)));
    int largest = max_of(bits, shuffle_from(bits, lane ^ 1));
    largest = max_of(largest, shuffle_from(largest, lane ^ 2));
    const bool not_finite = largest >= INFINITY_BITS;
    if (PLANT(nan_scales_ignored, false, not_finite)) set_codes_to_nan(token, first + position);
    const bool in_range = bits >= LEAST_SCALE && bits < INFINITY_BITS;
    if (!in_range) scale = 0.0f;
    const bool all_finite = largest >= LEAST_SCALE && largest < INFINITY_BITS;
    const float least = all_finite ? float_of(static_cast<uint32_t>(largest)) * LEAST_QUOTIENT
                                   : 0.0f;
    if (PLANT(no_least_quotient, false, magnitude(scale) < least)) scale = least;
    block_max = max_of(block_max, magnitude(scale));
    const float next = float_of(static_cast<uint32_t>(
        shuffle_from(static_cast<int>(float_bits(scale)), (lane + 1) % 32)));
    float quotient = scale;  // of the last block
    if (block < MlaTile::SCALE_BLOCKS - 1) {
      quotient = PLANT(divides_by_scale_0, false, next == 0.0f) ? 1.0f : divide(scale, next);
    }
    if (lane % 8 < MlaTile::SCALE_BLOCKS) {
      const int column = PLANT(quotient_of_other_token, position ^ 1, position);
      store_shared(tile.ratios + (block * MlaTile::TOKENS + column) * 4, quotient);
    }
  }

  // Makes the codes of each block whose scale is not finite NaN. Rare: loads the scales again.
  SM90_DEVICE void set_codes_to_nan(Fp8Token& to, int token) {
    const char* from = address_of(to.entry, token) + SCALES_OFFSET;
    const auto scales = load_streamed(reinterpret_cast<const Chunk*>(from), to.entry >= 0);
#pragma unroll
    for (int j = 0; j < MlaTile::COLUMNS - 1; ++j) {
      const uint32_t bits = scales.word[j / 2] & MAGNITUDE_MASK;
      const uint32_t nan = bits >= static_cast<uint32_t>(INFINITY_BITS) ? 0x7f7f7f7f : 0;
      to.codes[j].word[0] |= nan, to.codes[j].word[1] |= nan;
    }
  }

  // Stores the exponents of the largest scales of this warp's 16 tokens of a tile.
  SM90_DEVICE void store_units(const TokenTile& tile) {
    block_max = max_of(block_max, shuffle_xor(block_max, 8));
    block_max = max_of(block_max, shuffle_xor(block_max, 16));
    const uint32_t unit = float_bits(block_max) >> 23;  // at most 254: the scale is finite
    if (lane_index() < MlaTile::SCALE_BLOCKS) {
      store_shared(tile.units + thread_index() % 128 / 32 * MlaTile::SCALE_BLOCKS + lane_index(),
                   static_cast<uint8_t>(unit));
    }
    block_max = 0.0f;
  }

  // Loads the tokens of an item: prefetches 32 while it unpacks the 32 before.
  SM90_DEVICE void load(const MlaWork& w) {
    Fp8Token tokens_0, tokens_16;
    entry = table_entry<SPARSE>(p, w, w.begin + row);
    fetch(tokens_0, w, w.begin);
    fetch(tokens_16, w, w.begin + 16);
    for (int first = w.begin; first < w.end; first += MlaTile::TOKENS) {
      const int i = first / MlaTile::TOKENS % 2;  // w.begin is an even number of tiles
      const TokenTile tile(smem, i);
      // Wait for consumer release.
      ring.wait_empty_tile(i);
      const int tokens = PLANT(announces_half_filled_tile, MlaTile::TOKENS - 32, MlaTile::TOKENS);
#pragma unroll 1
      for (int at = 0; at < tokens; at += 32) {
        store(tokens_0, first, at, tile);
        fetch(tokens_0, w, first + at + 32);
        store(tokens_16, first, at + 16, tile);
        fetch(tokens_16, w, first + at + 48);
      }
      store_units(tile);
      UNLESS_PLANTED(no_fence_after_unpacking, fence_async_proxy());
      barrier_arrive(ring.full(2 * i));
      barrier_arrive(ring.full(2 * i + 1));
      ring.advance(i);
    }
  }
};

// Producer warpgroup: loads the block's items one after the other.
template <bool SPARSE, class Loader>
SM90_DEVICE void load_items(Loader loader, const TensorMap* q_map, const MlaArguments& p,
                            char* smem, PieceRing& ring) {
  MlaWorkList<SPARSE> list(p, smem);
  for (;;) {
    const MlaWork w = list.take();
    load_item_and_queries(q_map, p, w, smem, ring);
    ring.advance(PieceRing::QUERIES);
    if (w.sequence < 0) return;
    loader.load(w);
  }
}

}  // namespace sm90
