// Persistent tile scheduler: which tile of D a thread block computes next, for each GEMM variant.
// Group sizes are read on the device and clamped, so no tile is outside the matrices for any input.
#pragma once

#include "../fp8_gemm.h"
#include "choose.h"
#include "primitives.cuh"

namespace sm90 {

using deepkern::GemmVariant;
using deepkern::Real;

struct Scales {
  const float* data;     // [groups, rows / rows per scale, K blocks]
  int64_t group_stride;  // strides in floats
  int64_t row_stride;
  int64_t block_stride;
};

struct GemmArguments {
  Scales a_scale, b_scale;
  const void* c;         // shape of D, of c_type; added to D; or null
  void* out;             // D, contiguous: [M, N], or [groups, M, N] if masked or k_grouped
  int64_t c_row_stride;  // elements
  // contiguous: [2 * groups], the first row of each group, then the row after its last.
  // masked: [groups], valid rows. k_grouped: [groups + 1], where each group starts along K.
  const int* group_bounds;
  const int* group_index;  // contiguous: [M], the group of each row
  int M, N, K, groups;     // M: rows of A; of each group if masked
  int scale_blocks;        // columns of the scales
  int num_splits;          // of K
  int blocks_per_split;    // K blocks of 128
  int group_m;             // tile rows per L2 swizzle group
  Real c_type, out_type;
  bool rows_aligned;  // rows of D start at multiples of 16 bytes
  bool store_by_tma;  // there is a tensor map of D
  bool c_pairs;       // N is even and pairs of C are aligned to their size
};

struct TileWork {
  int group;
  int row, column;  // of the tile's first value of D; `row` in the group if masked or k_grouped
  int valid_end;    // rows below it are products
  int row_end;      // rows from valid_end to row_end are zeros
  int k, k_length;  // first value of K and number of values to sum
  int scale_block;  // K block of the first scale
};

SM90_DEVICE int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// Sets row and column of tile t, in tiles. Consecutive tiles go down `group_m` tile rows before the
// next tile column, so that blocks that run at the same time share rows of A and B in L2.
SM90_DEVICE void swizzle_tile(TileWork& w, int t, int tile_rows, int tile_columns, int group_m) {
  const int first_row = t / (group_m * tile_columns) * group_m;
  const int height = tile_rows - first_row < group_m ? tile_rows - first_row : group_m;
  const int in_group = t % (group_m * tile_columns);
  w.row = first_row + in_group % height;
  w.column = in_group / height;
}

// ROWS x COLUMNS: the size of a tile of D.
template <GemmVariant VARIANT, int ROWS, int COLUMNS>
struct Schedule {
  const GemmArguments& p;
  int next_tile, tile_step;      // this block's next tile, and the distance to the one after it
  int group = 0;                 // the current group
  int tiles_before = 0;          // tiles in earlier groups
  int k = 0, scale_block = 0;    // first value of K and first scale of the group or K split
  int k_length;                  // values of K in the group or K split

  SM90_DEVICE Schedule(const GemmArguments& arguments, int first_tile, int step)
      : p(arguments), next_tile(first_tile), tile_step(step), k_length(arguments.K) {}

  // Restricts all tiles to K split `split`, which may be empty.
  SM90_DEVICE void select_split(int split) {
    k = split * p.blocks_per_split * PLANT(split_starts_early, 64, 128);
    scale_block = PLANT(split_with_other_scales, 0, split * p.blocks_per_split);
    k_length = PLANT(split_ends_late, p.K - k, clamp(p.K - k, 0, p.blocks_per_split * 128));
  }

  // Sets `w` to the block's next tile; false if there is none.
  SM90_DEVICE bool next(TileWork& w) {
    const int tile_columns = (p.N + COLUMNS - 1) / COLUMNS;
    for (; group < p.groups; ++group) {
      int first = 0, end = p.M;
      if (VARIANT == GemmVariant::contiguous) {
        first = clamp(load_global(p.group_bounds + group), 0, p.M);
        end = clamp(load_global(p.group_bounds + p.groups + group), first, p.M);
      }
      const int tile_rows = (end - first + ROWS - 1) / ROWS, tiles = tile_rows * tile_columns;
      if (VARIANT == GemmVariant::k_grouped) {
        k = clamp(load_global(p.group_bounds + group), k, p.K);  // offsets do not decrease
        k_length = clamp(load_global(p.group_bounds + group + 1), k, p.K) - k;
      }
      if (next_tile - tiles_before < tiles) {
        swizzle_tile(w, next_tile - tiles_before, tile_rows, tile_columns, p.group_m);
        w.group = group;
        w.row = first + w.row * ROWS;
        w.column *= COLUMNS;
        w.row_end = w.valid_end = end;
        if (VARIANT == GemmVariant::masked) {
          w.valid_end = clamp(load_global(p.group_bounds + group), 0, p.M);
        }
        w.k = k;
        const int scaled = (p.scale_blocks - scale_block) * 128;  // values of K that have scales
        w.k_length = w.row < w.valid_end ? clamp(k_length, 0, scaled > 0 ? scaled : 0) : 0;
        w.scale_block = scale_block;
        next_tile += tile_step;
        return true;
      }
      tiles_before += tiles;
      if (VARIANT == GemmVariant::k_grouped) {
        UNLESS_PLANTED(scales_of_previous_group, scale_block += (k_length + 127) / 128);
      }
    }
    return false;
  }

  // The first row of the tile in the matrix of A, of B, and row `row` in the matrix of D.
  SM90_DEVICE int a_row(const TileWork& w) const {
    return VARIANT == GemmVariant::masked ? w.group * p.M + w.row : w.row;
  }
  SM90_DEVICE int b_row(const TileWork& w) const {
    const bool b_per_group =
        VARIANT == GemmVariant::contiguous || VARIANT == GemmVariant::masked;
    return PLANT(b_of_first_group, w.column,
                 b_per_group ? w.group * p.N + w.column : w.column);
  }
  SM90_DEVICE int64_t out_row(const TileWork& w, int row) const {
    const bool d_per_group = VARIANT == GemmVariant::masked || VARIANT == GemmVariant::k_grouped;
    const int64_t matrix = d_per_group ? w.group : 0;
    return matrix * p.M + row;
  }
  // Whether this tile stores row `row` of D. Ranges of contiguous groups may overlap in bad input.
  SM90_DEVICE bool owns(const TileWork& w, int row) const {
    if (PLANT(stores_past_last_row, row > w.row_end, row >= w.row_end)) return false;
    return VARIANT != GemmVariant::contiguous ||
           PLANT(stores_rows_of_other_groups, true,
                 load_global(p.group_index + row) == w.group);
  }
};

}  // namespace sm90
