// Which tile of D a block computes next, for each form of the product. Everything that depends on
// group sizes is read here, on the device; whatever they are, no tile lies outside the matrices.
#pragma once

#include "primitives.cuh"

namespace sm90 {

enum class Form { dense, contiguous, masked, k_grouped };
enum class Type { bf16, fp16, fp32 };

struct Scales {
  const float* data;
  int64_t group, row, block;  // strides; a row is one row of the matrix, or 128
};

struct GemmArguments {
  Scales a_scale, b_scale;
  const void* c;  // added to D, or null: as D lies, but for the stride of its rows
  void* out;      // D, contiguous: [M, N], or [groups, M, N] if masked or k-grouped
  int64_t c_row;
  // contiguous: [2 * groups], each group's first row, then the row after its last.
  // masked: [groups], rows in use. k-grouped: [groups + 1], where the groups begin along K.
  const int* sizes;
  const int* group_index;  // contiguous: the group of each row
  int M, N, K, groups;     // M: rows of A, of each group if masked
  int scale_blocks;        // columns of the scales
  int splits, run;         // K is cut into so many runs, of so many blocks of 128 each
  int band;                // rows of tiles that neighbours in time share
  Type c_type, out_type;
  bool aligned;       // rows of D are multiples of 16 bytes
  bool store_by_tma;  // there is a tensor map of D
};

struct Work {
  int group, row, column;  // first row of A (or of its group's part) and column of D
  int valid, end;          // rows below `valid` are products, those up to `end` zeros
  int k, length;           // the part of K that is summed
  int scale_block;         // where its scales begin
};

SM90_DEVICE int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// Tile t of a matrix of rows x columns tiles, in bands of `band` rows: neighbours in time share
// rows of A and B in L2.
SM90_DEVICE void place(Work& w, int t, int rows, int columns, int band) {
  const int first = t / (band * columns) * band;
  const int height = rows - first < band ? rows - first : band;
  const int inside = t % (band * columns);
  w.row = first + inside % height;
  w.column = inside / height;
}

// ROWS x COLUMNS of D to a tile.
template <Form FORM, int ROWS, int COLUMNS>
struct Schedule {
  const GemmArguments& p;
  int at, step;                // this block's next tile, and how far from one to the next
  int group = 0, passed = 0;   // the group walked to, and the tiles of those before
  int k = 0, scale_block = 0;  // where the group's values of K and their scales begin
  int length;                  // so many of them

  SM90_DEVICE Schedule(const GemmArguments& arguments, int first, int stride)
      : p(arguments), at(first), step(stride), length(arguments.K) {}

  // Only run `r` of K from now on: nothing of it, maybe.
  SM90_DEVICE void take_run(int r) {
    k = r * p.run * 128, scale_block = r * p.run;
    length = clamp(p.K - k, 0, p.run * 128);
  }

  // The next tile, or false.
  SM90_DEVICE bool next(Work& w) {
    const int columns = (p.N + COLUMNS - 1) / COLUMNS;
    for (; group < p.groups; ++group) {
      int first = 0, end = p.M;
      if (FORM == Form::contiguous) {
        first = clamp(load_global(p.sizes + group), 0, p.M);
        end = clamp(load_global(p.sizes + p.groups + group), first, p.M);
      }
      const int rows = (end - first + ROWS - 1) / ROWS, tiles = rows * columns;
      if (FORM == Form::k_grouped) {
        k = clamp(load_global(p.sizes + group), k, p.K);  // offsets ascend
        length = clamp(load_global(p.sizes + group + 1), k, p.K) - k;
      }
      if (at - passed < tiles) {
        place(w, at - passed, rows, columns, p.band);
        w.group = group;
        w.row = first + w.row * ROWS;
        w.column *= COLUMNS;
        w.end = w.valid = end;
        if (FORM == Form::masked) w.valid = clamp(load_global(p.sizes + group), 0, p.M);
        w.k = k;
        const int scaled = (p.scale_blocks - scale_block) * 128;  // values that have scales
        w.length = w.row < w.valid ? clamp(length, 0, scaled > 0 ? scaled : 0) : 0;
        w.scale_block = scale_block;
        at += step;
        return true;
      }
      passed += tiles;
      if (FORM == Form::k_grouped) scale_block += (length + 127) / 128;
    }
    return false;
  }

  // Where the tile's rows of A begin in memory, those of B, and those of D.
  SM90_DEVICE int a_row(const Work& w) const {
    return FORM == Form::masked ? w.group * p.M + w.row : w.row;
  }
  SM90_DEVICE int b_row(const Work& w) const {
    return FORM == Form::contiguous || FORM == Form::masked ? w.group * p.N + w.column : w.column;
  }
  SM90_DEVICE int64_t out_row(const Work& w, int row) const {
    const int64_t group = FORM == Form::masked || FORM == Form::k_grouped ? w.group : 0;
    return group * p.M + row;
  }
  // Whether row `row` of A is stored with this tile.
  SM90_DEVICE bool owns(const Work& w, int row) const {
    if (row >= w.end) return false;
    return FORM != Form::contiguous || load_global(p.group_index + row) == w.group;
  }
};

}  // namespace sm90
