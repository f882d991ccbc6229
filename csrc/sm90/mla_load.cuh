// mla_decode and sparse attention: the producer warpgroup, which loads queries and cached tokens.
//
// Queries are loaded by TMA, 64 rows of the matrix [batch · Sq · H, 576]. Rows that belong to the
// next sequence are computed and not stored.
//
// bf16 cache: TMA loads a tile of 64 tokens that is inside one page. All other tiles (the last
// tokens of a split, other page sizes, pages that do not exist, tokens named by indices) are
// gathered by asynchronous copies of 16 bytes, eight lanes per token: all 36 copies of a lane are
// in flight at once and need no registers. Absent tokens load as zeros.
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

#include "mla_items.cuh"

namespace sm90 {

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
// 8. An item starts with tile 0, so the tiles have a phase each. Also the barriers of Q and the item.
struct PieceRing {
  char* smem;
  static constexpr int QUERIES = 2;  // index of Q, after the two token tiles
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
  // one consumer warpgroup release it. One thread loads Q, 8 warps release it.
  SM90_DEVICE void init() {
    for (int i = 0; i < 4; ++i) {
      barrier_init(full(i), 128);
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

// Where a token is: its page, or if SPARSE the slot that its index names. Negative: it is absent.
template <bool SPARSE>
SM90_DEVICE int place_of(const MlaArguments& p, const MlaWork& w, int token) {
  if (token >= w.end) return -1;
  const int place = load_global(w.table_row + (SPARSE ? token : token / p.page_size));
  const int places = SPARSE ? p.num_pages * p.page_size : p.num_pages;
  return PLANT(index_not_clamped, false, place >= places) ? -1 : place;
}

// The elements of the cache before a token that is not absent.
template <bool SPARSE>
SM90_DEVICE int64_t token_offset(const MlaArguments& p, int place, int token) {
  if (!SPARSE) return place * p.page_stride + token % p.page_size * p.token_stride;
  if (p.page_size == 1) return place * p.page_stride;  // without a division
  const int page = place / p.page_size;
  return page * p.page_stride + (place - page * p.page_size) * p.token_stride;
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
                      PLANT(loads_start_of_page, 0, token % p.page_size);
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
  // The place of the token that this lane looks up for its warp, in the tile from `first` on.
  SM90_DEVICE int lane_place(const MlaWork& w, int first) const {
    const int lane = lane_index() % 16;  // twice
    return place_of<SPARSE>(p, w, first + thread / 32 * 4 + lane % 4 + lane / 4 * 16);
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
    copy_async_commit();
  }
  // This lane's copies of a piece have arrived, except those of `LATER` later pieces.
  template <int LATER>
  SM90_DEVICE void finish_piece(int piece) {
    UNLESS_PLANTED(no_wait_for_gather, copy_async_wait<LATER>());
    UNLESS_PLANTED(no_fence_after_gather, fence_async_proxy());
    barrier_arrive(ring.full(piece));
  }

  // Gathers the 64 tokens from `first` on. `place`: of lane_place.
  SM90_DEVICE void gather_tile(const MlaWork& w, int tile_index, int first, int place) {
    const TokenTile tile(smem, tile_index);
    const bf16* from[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int lane = lane_index() / 8 + PLANT(place_of_other_token, 0, 4 * i);
      const int at = shuffle_from(place, lane), token = first + first_row + i * 16;
      from[i] = static_cast<const bf16*>(p.cache) + token_offset<SPARSE>(p, at, token);
      if (at < 0) from[i] = nullptr;
    }
    // Wait for consumer release of each piece. The marks are read before piece 0 is released.
    UNLESS_PLANTED(no_wait_for_empty_tile, ring.wait_empty(2 * tile_index));
    copy_columns<0, MlaTile::PIECE_0_COLUMNS>(tile.tokens, from);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int row = first_row + i * 16;
      const int position = PLANT(absent_tokens_not_marked, row, from[i] ? row : ABSENT);
      if (thread % 8 == 0) store_shared(tile.positions + row, static_cast<uint8_t>(position));
    }
    UNLESS_PLANTED(no_wait_for_empty_tile, ring.wait_empty(2 * tile_index + 1));
    copy_columns<MlaTile::PIECE_0_COLUMNS, MlaTile::COLUMNS - MlaTile::PIECE_0_COLUMNS>(
        tile.tokens, from);
    finish_piece<1>(2 * tile_index);
    finish_piece<0>(2 * tile_index + 1);
  }

  // Loads the tokens of an item.
  SM90_DEVICE void load(const MlaWork& w) {
    int page = -1, place = -1;  // of the next tile, loaded a tile ahead
    if (SPARSE) {
      place = lane_place(w, w.begin);
    } else {
      page = place_of<false>(p, w, w.begin);
    }
    for (int first = w.begin; first < w.end; first += MlaTile::TOKENS) {
      const int i = first / MlaTile::TOKENS % 2;  // w.begin is an even number of tiles
      const int next = first + MlaTile::TOKENS;
      if (SPARSE) {
        const int next_place = lane_place(w, next);
        gather_tile(w, i, first, place);
        place = next_place;
      } else {
        const int next_page = place_of<false>(p, w, next);
        if (p.by_tma && page >= 0 && PLANT(loads_tokens_past_the_end, true, next <= w.end)) {
          load_piece(2 * i, 0, MlaTile::PIECE_0_COLUMNS, page, first);
          load_piece(2 * i + 1, MlaTile::PIECE_0_COLUMNS, MlaTile::COLUMNS, page, first);
        } else {
          gather_tile(w, i, first, lane_place(w, first));
        }
        page = next_page;
      }
      ring.advance(i);
    }
  }
};

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
  int place;                           // negative: absent, all values are 0
};

// Loads 16 tokens at a time, eight lanes per token.
template <bool SPARSE>
struct Fp8Loader {
  const MlaArguments& p;
  char* smem;
  PieceRing& ring;
  const int row = thread_index() % 128 / 8, chunk = lane_index() % 8;
  int place = -1;  // of this lane's token in the next fetch

  SM90_DEVICE const Chunk* address(int place, int token) const {
    return reinterpret_cast<const Chunk*>(static_cast<const char*>(p.cache) +
                                          token_offset<SPARSE>(p, place, token));
  }
  // Starts to load the 16 tokens from `first` on, and the place of the next fetch.
  SM90_DEVICE void fetch(Fp8Token& to, const MlaWork& w, int first) {
    const int chunk = not_before(this->chunk), row = not_before(this->row);
    const int token = first + row;
    const bool valid = place >= 0;
    const Chunk* from = address(place, token);
    to.place = place;
#pragma unroll
    for (int j = 0; j < MlaTile::SCALE_BLOCKS; ++j) {
      to.codes[j] = load_streamed(from + j * 8 + chunk, valid);
    }
    to.scales = load_streamed(from + 32, valid);
    place = place_of<SPARSE>(p, w, token + PLANT(place_of_previous_tokens, 0, 16));
  }

  // Stores 16 tokens to rows [at, at + 16) of the tile that starts with token `first`: dequantized
  // values, ratios, positions. The RoPE values are loaded here, from L2 in most cases: the load of
  // the scales before them fetches 128 bytes.
  SM90_DEVICE void store(const Fp8Token& token, int first, int at, const TokenTile& tile) {
    const int chunk = not_before(this->chunk), row = not_before(this->row);
    const int position = at + row;
    const bool valid = token.place >= 0;
    const Chunk rope = load_streamed(address(token.place, first + position) +
                                         PLANT(rope_one_chunk_early, 32, 33) + chunk, valid);
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
        rope);
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
                               valid ? position : ABSENT);
      store_shared(tile.positions + position, static_cast<uint8_t>(marked));
    }
  }

  // Stores 16 codes times `step` (a bf16 in both halves) as two chunks of a 128-byte tile row.
  // Four of eight lanes store their chunks in the opposite order, to avoid bank conflicts.
  SM90_DEVICE void store_codes(const Chunk& codes, uint32_t step, char* tile_row, int swizzle) {
    const int chunk = not_before(this->chunk);
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

  // Loads the tokens of an item: prefetches 32 while it unpacks the 32 before.
  SM90_DEVICE void load(const MlaWork& w) {
    Fp8Token tokens_0, tokens_16;
    place = place_of<SPARSE>(p, w, w.begin + row);
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
