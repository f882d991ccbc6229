// mla_decode: how a block's shared memory is used, and which rows and tokens are its own.
#pragma once

#include "mla_arguments.h"
#include "ring.cuh"

namespace sm90 {

struct MlaTile {
  static constexpr int ROWS = 64, TOKENS = 64, WIDTH = 576, VALUES = 512, STAGES = 2;
  static constexpr int COLUMNS = WIDTH / 64;  // of 64 values: 128-byte rows, swizzled
  static constexpr int BLOCKS = VALUES / 128;  // of an FP8 token's latents, with a scale each
  static constexpr int THREADS = 384;
  static constexpr uint32_t COLUMN_BYTES = 64 * 128, TILE_BYTES = COLUMNS * COLUMN_BYTES;
  static constexpr uint32_t TOKENS_AT = TILE_BYTES;  // the ring, behind Q
  static constexpr uint32_t WEIGHTS = TOKENS_AT + STAGES * TILE_BYTES;
  static constexpr uint32_t RATIOS = WEIGHTS + COLUMN_BYTES;
  static constexpr uint32_t RATIO_BYTES = BLOCKS * TOKENS * 4;  // of a stage
  static constexpr uint32_t PLACES = RATIOS + STAGES * RATIO_BYTES;
  static constexpr uint32_t PLACE_BYTES = TOKENS;  // of a stage
  static constexpr uint32_t EXCHANGED = PLACES + STAGES * PLACE_BYTES;  // maxima, at the end sums
  static constexpr uint32_t BARRIERS = EXCHANGED + 2 * ROWS * 4;
  static constexpr uint32_t SHARED_BYTES = BARRIERS + Ring<STAGES>::BYTES;
  static_assert(SHARED_BYTES <= 232448);
};

constexpr int ABSENT = 255;  // the place of a token that is not there

SM90_DEVICE float minus_infinity() { return -__builtin_huge_valf(); }
SM90_DEVICE float larger(float a, float b) { return a > b ? a : b; }
SM90_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// A sequence's tokens, and how they are split: a function of its length alone.
struct Splits {
  int length, each, count;

  SM90_DEVICE Splits(const MlaArguments& p, int sequence) {
    length = load_global(p.lengths + sequence);
    length = length < 0 ? 0 : smaller(length, p.capacity);
    const int even = (length + p.max_splits - 1) / p.max_splits;
    each = (even + MlaTile::TOKENS - 1) / MlaTile::TOKENS * MlaTile::TOKENS;
    if (each < p.min_split) each = p.min_split;
    count = length > 0 ? (length + each - 1) / each : 1;
  }
};

// What a block does.
struct MlaWork {
  int sequence, row, split;  // `row`: the first of its 64
  int begin, end;            // tokens
  int length, splits;        // of the sequence

  SM90_DEVICE explicit MlaWork(const MlaArguments& p) {
    const int group = block_index() / p.tiles;
    row = block_index() % p.tiles * MlaTile::ROWS;
    sequence = group / p.splits;
    split = group % p.splits;
    const Splits cut(p, sequence);
    length = cut.length, splits = cut.count;
    begin = split * cut.each;
    end = smaller(begin + cut.each, length);
  }

};

// The ring of token tiles. A tile is nine columns of 64 tokens by 64 values; each token's place in
// the tile, or ABSENT; and of an FP8 cache the ratios [4, 64] of mla_load.cuh.
struct TokenRing : Ring<MlaTile::STAGES> {
  char* memory;

  SM90_DEVICE explicit TokenRing(char* shared) : Ring(shared + MlaTile::BARRIERS), memory(shared) {}
  SM90_DEVICE char* tokens() { return memory + MlaTile::TOKENS_AT + stage * MlaTile::TILE_BYTES; }
  SM90_DEVICE char* places() { return memory + MlaTile::PLACES + stage * MlaTile::PLACE_BYTES; }
  SM90_DEVICE char* ratios() { return memory + MlaTile::RATIOS + stage * MlaTile::RATIO_BYTES; }
};

}  // namespace sm90
