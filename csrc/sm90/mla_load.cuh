// mla_decode: what brings queries and tokens to shared memory.
//
// Tokens of a bf16 cache come by TMA where 64 of them lie in one page; what it cannot fetch (the
// last tokens, pages of other sizes, pages that do not exist) is gathered 16 bytes a lane, eight
// lanes a token, zeros for what is absent.
//
// An FP8 cache has of a token 512 e4m3 codes, four float32 scales of 128 codes each and 64 bf16
// values, 656 bytes. They are gathered too, and asked for 21 KB ahead, before the buffer is free.
// A scale is not multiplied in, as bf16 would not hold the product; it is taken apart:
//
//     scale = step · ratio        step: scale rounded up to 4 significant bits; 8/9 < ratio <= 1
//
// A code has 4 significant bits, so code · step is a bf16 exactly: that goes to the tile. (Below
// 2^-126 a ratio may be smaller; from 7e35 on the largest code's product is infinite.) The ratios
// are for the products (mla_multiply.cuh), which want them as factors: ratio 0 / ratio 1,
// ratio 1 / ratio 2, ratio 2 / ratio 3, and ratio 3.
#pragma once

#include "mla_tile.cuh"

namespace sm90 {

// Eight lanes bring a row of 576 values to row `row` of a tile, or zeros if there is none.
SM90_DEVICE void gather_row(char* tile, int row, const bf16* from) {
  const int chunk = lane_index() % 8;
  Chunk values[MlaTile::COLUMNS];
#pragma unroll
  for (int j = 0; j < MlaTile::COLUMNS; ++j) {
    values[j] = from ? load_global(reinterpret_cast<const Chunk*>(from + j * 64 + chunk * 8))
                     : Chunk{};
  }
  char* place = tile + row * 128 + (chunk ^ (row % 8)) * 16;
#pragma unroll
  for (int j = 0; j < MlaTile::COLUMNS; ++j) {
    store_shared(place + j * MlaTile::COLUMN_BYTES, values[j]);
  }
}

// The multiplying warpgroups' threads bring the 64 rows of q, and how many tokens each sees.
SM90_DEVICE void load_queries(const MlaArguments& p, const MlaWork& w, char* memory) {
  for (int i = thread_index() / 8; i < MlaTile::ROWS; i += 32) {
    const int row = w.row + i, query = row / p.H, head = row % p.H;
    const int64_t at = w.sequence * p.q_batch + query * p.q_query + head * p.q_head;
    gather_row(memory, i, row < p.Sq * p.H ? static_cast<const bf16*>(p.q) + at : nullptr);
    if (lane_index() % 8 == 0) {
      store_shared(memory + MlaTile::LIMITS + 4 * i,
                   p.causal ? w.length - (p.Sq - 1 - query) : w.length);
    }
  }
  fence_async_proxy();
  named_barrier_sync(1, 256);
}

// The page that holds a token; -1: none does.
SM90_DEVICE int page_of(const MlaArguments& p, const MlaWork& w, int token) {
  if (token >= w.end) return -1;
  const int page = load_global(p.table + w.sequence * p.table_row + token / p.page);
  return page < p.blocks ? page : -1;
}

// The loading warpgroup, from a bf16 cache.
struct Bf16Loader {
  const TensorMap* map;
  const MlaArguments& p;
  const MlaWork& w;
  Pieces pieces;
  const int thread = thread_index() % 128;

  // Fills the next piece, columns `from` to `to` of the whole tile that begins with `token`.
  SM90_DEVICE void fill(const TokenTile& tile, int from, int to, int page, int token) {
    Barrier* full = &pieces.full[pieces.stage];
    pieces.wait_empty();
    if (from == 0 && thread < MlaTile::TOKENS) {
      store_shared(tile.places + thread, static_cast<uint8_t>(thread));
    }
    if (thread == 0) {
      barrier_arrive_expect(full, (to - from) * MlaTile::COLUMN_BYTES);
      const int row = static_cast<int>(page * p.page_rows) + token % p.page;
      for (int j = from; j < to; ++j) {
        tma_load(tile.tokens + j * MlaTile::COLUMN_BYTES, map, full, j * 64, row);
      }
    } else {
      barrier_arrive(full);
    }
    pieces.next();
  }

  // Gathers the 64 tokens from `first` on, as far as they are there.
  SM90_DEVICE void gather(const TokenTile& tile, int first) {
    Barrier* full = &pieces.full[pieces.stage];
    int pages[MlaTile::TOKENS / 16];  // all asked for before the wait
#pragma unroll
    for (int i = 0; i < MlaTile::TOKENS / 16; ++i) {
      pages[i] = page_of(p, w, first + thread / 8 + i * 16);
    }
    pieces.wait_empty();
    pieces.next();
    pieces.wait_empty();
    pieces.next();
#pragma unroll
    for (int i = 0; i < MlaTile::TOKENS / 16; ++i) {
      const int row = thread / 8 + i * 16, token = first + row, page = pages[i];
      const bf16* from = nullptr;
      if (page >= 0) {
        from = static_cast<const bf16*>(p.cache) + page * p.block + token % p.page * p.slot;
      }
      gather_row(tile.tokens, row, from);
      if (thread % 8 == 0) {
        store_shared(tile.places + row, static_cast<uint8_t>(from ? row : ABSENT));
      }
    }
    fence_async_proxy();
    barrier_arrive(full);
    barrier_arrive(full + 1);
  }
};

SM90_DEVICE void load_tokens(const TensorMap* map, const MlaArguments& p, const MlaWork& w,
                             char* memory) {
  Bf16Loader loader{map, p, w, Pieces(memory + MlaTile::BARRIERS)};
  int page = page_of(p, w, w.begin);
  for (int first = w.begin; first < w.end; first += MlaTile::TOKENS) {
    const TokenTile tile(memory, loader.pieces.stage / 2);
    const int next = page_of(p, w, first + MlaTile::TOKENS);  // while this tile is waited for
    if (p.by_tma && page >= 0 && first + MlaTile::TOKENS <= w.end) {
      loader.fill(tile, 0, MlaTile::LEFT_COLUMNS, page, first);
      loader.fill(tile, MlaTile::LEFT_COLUMNS, MlaTile::COLUMNS, page, first);
    } else {
      loader.gather(tile, first);
    }
    page = next;
  }
}

constexpr uint32_t INFINITE = 0x7f800000, MAGNITUDE = 0x7fffffff;  // of a float32's bits

// A scale rounded up to 4 significant bits, in bits; NaN remains one.
SM90_DEVICE uint32_t step_of(uint32_t scale) {
  return (scale & MAGNITUDE) > INFINITE ? INFINITE + 0x400000 : (scale + 0xfffff) & 0xfff00000;
}
// scale / step; 1 where that is no number, and what the scale is stands in the tile.
SM90_DEVICE float ratio_of(uint32_t scale) {
  const uint32_t step = step_of(scale), size = step & MAGNITUDE;
  const bool divides = size > 0 && size < INFINITE;
  return divides ? divide(float_of(scale), float_of(step)) : 1.0f;
}

// One of eight lanes' part of a token of an FP8 cache, in registers.
struct Fp8Token {
  Chunk codes[MlaTile::BLOCKS], scales, rope;  // 16 codes of each block; all four scales
  bool there;
};

// Brings 16 tokens at a time.
struct Fp8Loader {
  const MlaArguments& p;
  const MlaWork& w;
  const int row = thread_index() % 128 / 8, chunk = lane_index() % 8;
  int page;  // of this lane's token among those that are fetched next

  SM90_DEVICE Fp8Loader(const MlaArguments& arguments, const MlaWork& work)
      : p(arguments), w(work), page(page_of(p, w, w.begin + row)) {}

  // Asks for this lane's part of the 16 tokens from `first` on, and for the next one's page.
  SM90_DEVICE void fetch(Fp8Token& to, int first) {
    const int token = first + row;
    to.there = page >= 0;
    const auto* from = reinterpret_cast<const Chunk*>(
        static_cast<const char*>(p.cache) + page * p.block + token % p.page * p.slot);
#pragma unroll
    for (int j = 0; j < MlaTile::BLOCKS; ++j) {
      to.codes[j] = load_streamed(from + j * 8 + chunk, to.there);
    }
    to.scales = load_streamed(from + 32, to.there);
    to.rope = load_streamed(from + 33 + chunk, to.there);
    page = page_of(p, w, token + 16);
  }

  // Puts it to its place in the tile, where the 16 begin at row `first`.
  SM90_DEVICE void put(const Fp8Token& token, int first, const TokenTile& tile) {
    const int at = first + row;
    char* place = tile.tokens + at * 128;
    const uint32_t* scales = token.scales.word;
#pragma unroll
    for (int j = 0; j < MlaTile::BLOCKS; ++j) {
      const uint32_t step = step_of(scales[j]);
      put_codes(token.codes[j], step | step >> 16,
                place + (j * 2 + chunk / 4) * MlaTile::COLUMN_BYTES, at % 8);
    }
    store_shared(place + (MlaTile::COLUMNS - 1) * MlaTile::COLUMN_BYTES + (chunk ^ (at % 8)) * 16,
                 token.rope);
    const uint32_t low = chunk % 2 ? scales[1] : scales[0], high = chunk % 2 ? scales[3] : scales[2];
    const uint32_t bits = chunk % 4 < 2 ? low : high;  // of block `chunk`, if there is one
    const float ratio = ratio_of(bits);
    const float next = float_of(static_cast<uint32_t>(
        shuffle_from(static_cast<int>(float_bits(ratio)), (lane_index() + 1) % 32)));
    if (chunk < MlaTile::BLOCKS) {
      store_shared(tile.factors + (chunk * MlaTile::TOKENS + at) * 4,
                   chunk < MlaTile::BLOCKS - 1 ? divide(ratio, next) : ratio);
    }
    if (chunk == 0) {
      store_shared(tile.places + at, static_cast<uint8_t>(token.there ? at : ABSENT));
    }
  }

  // 16 codes times `step` (twice the bf16) as two chunks of a 128-byte row of the tile. Of the two
  // columns that eight lanes store to, one gets its chunks in the other order: else they would meet
  // in the same banks.
  SM90_DEVICE void put_codes(const Chunk& codes, uint32_t step, char* row_of_column, int swizzle) {
    const bool turned = chunk >= 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Chunk values;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t four = turned ? codes.word[2 - 2 * half + i] : codes.word[2 * half + i];
        values.word[2 * i] = multiply_bf16(e4m3_to_bf16(static_cast<uint16_t>(four)), step);
        values.word[2 * i + 1] =
            multiply_bf16(e4m3_to_bf16(static_cast<uint16_t>(four >> 16)), step);
      }
      const int to = chunk % 4 * 2 + (turned ? 1 - half : half);
      store_shared(row_of_column + (to ^ swizzle) * 16, values);
    }
  }
};

// The loading warpgroup, from an FP8 cache: 32 tokens are in flight while others are unpacked.
SM90_DEVICE void load_fp8_tokens(const MlaArguments& p, const MlaWork& w, char* memory) {
  Pieces pieces(memory + MlaTile::BARRIERS);
  Fp8Loader loader(p, w);
  Fp8Token even, odd;
  loader.fetch(even, w.begin);
  loader.fetch(odd, w.begin + 16);
  for (int first = w.begin; first < w.end; first += MlaTile::TOKENS) {
    const TokenTile tile(memory, pieces.stage / 2);
    Barrier* full = &pieces.full[pieces.stage];
    pieces.wait_empty();
    pieces.next();
    pieces.wait_empty();
    pieces.next();
    for (int at = 0; at < MlaTile::TOKENS; at += 32) {
      loader.put(even, at, tile);
      loader.fetch(even, first + at + 32);
      loader.put(odd, at + 16, tile);
      loader.fetch(odd, first + at + 48);
    }
    fence_async_proxy();
    barrier_arrive(full);
    barrier_arrive(full + 1);
  }
}

}  // namespace sm90
