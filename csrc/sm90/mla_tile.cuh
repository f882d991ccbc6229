// mla_decode: how a block's shared memory is used, and which rows and tokens are its own.
#pragma once

#include "mla_arguments.h"
#include "ring.cuh"

namespace sm90 {

struct MlaTile {
  static constexpr int ROWS = 64, TOKENS = 64, WIDTH = 576, VALUES = 512;
  static constexpr int COLUMNS = WIDTH / 64;   // of 64 values: 128-byte rows, swizzled
  static constexpr int LEFT_COLUMNS = 4;       // of the 8 that are values
  static constexpr int BLOCKS = VALUES / 128;  // of an FP8 token's latents, with a scale each
  static constexpr int THREADS = 384;
  static constexpr uint32_t COLUMN_BYTES = 64 * 128, TILE_BYTES = COLUMNS * COLUMN_BYTES;
  static constexpr uint32_t TOKENS_AT = TILE_BYTES;  // two tiles, behind Q
  static constexpr uint32_t WEIGHTS = TOKENS_AT + 2 * TILE_BYTES;
  static constexpr uint32_t FACTORS = WEIGHTS + 128 * 64;  // 64 bytes of each thread
  static constexpr uint32_t FACTOR_BYTES = BLOCKS * TOKENS * 4;  // of a tile
  static constexpr uint32_t PLACES = FACTORS + 2 * FACTOR_BYTES;
  static constexpr uint32_t PLACE_BYTES = TOKENS;  // of a tile
  static constexpr uint32_t EXCHANGED = PLACES + 2 * PLACE_BYTES;  // maxima, at the end sums
  static constexpr uint32_t LIMITS = EXCHANGED + 2 * ROWS * 4;  // tokens that a row sees
  static constexpr uint32_t BARRIERS = LIMITS + ROWS * 4;
  static constexpr uint32_t SHARED_BYTES = BARRIERS + Ring<4>::BYTES;
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

// A token tile: nine columns of 64 tokens by 64 values; each token's place in it, or ABSENT; and of
// an FP8 cache the factors [4, 64] of mla_load.cuh.
struct TokenTile {
  char *tokens, *places, *factors;

  SM90_DEVICE TokenTile(char* memory, int i)
      : tokens(memory + MlaTile::TOKENS_AT + i * MlaTile::TILE_BYTES),
        places(memory + MlaTile::PLACES + i * MlaTile::PLACE_BYTES),
        factors(memory + MlaTile::FACTORS + i * MlaTile::FACTOR_BYTES) {}
};

// Both tiles are loaded and freed in two pieces each, columns 0 to 3 and 4 to 8: a ring of four.
using Pieces = Ring<4>;

}  // namespace sm90
