// row      = start[e] + number of earlier assignments to e              for e = topk_idx[t, j]
// start[e] = Σ_{i<e} tokens_per_expert[i], each rounded up to a multiple of `alignment`
//
// Parallelization: placement is a counting sort on one thread. Copies and sums work on pieces of a
// token's columns, which threads take in ranges. A piece of x is read once, cast if that is
// wanted, and written to all rows of its token. A piece of a sum keeps 4 registers of sums over all
// slots of the token.
//
// Limit: memory bandwidth of the rows.
#ifndef DEEPKERN_ISA
#include "expert_rows.h"

#include <algorithm>
#include <limits>
#include <vector>

#define DEEPKERN_FILE "cpu/expert_rows.cpp"
#include "every_isa.h"

namespace deepkern {

int64_t max_expert_rows(int64_t N, int64_t E, int64_t alignment) {
  int64_t padding, rows;
  const bool overflow = __builtin_mul_overflow(std::min(E, N), alignment - 1, &padding) ||
                        __builtin_add_overflow(N, padding, &rows);
  return overflow ? std::numeric_limits<int64_t>::max() : rows / alignment * alignment;
}

namespace {

template <class Index>
void count(const Index* idx, int64_t idx_stride, int64_t T, int64_t topk, int64_t E,
           int32_t* tokens_per_expert) {
  std::fill_n(tokens_per_expert, E, 0);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t j = 0; j < topk; ++j) {
      const int64_t expert = idx[t * idx_stride + j];
      if (expert >= 0 && expert < E) ++tokens_per_expert[expert];
    }
  }
}

template <class Index>
void place(const ExpertPlacement& p) {
  const Index* idx = static_cast<const Index*>(p.topk_idx);
  count(idx, p.idx_stride, p.T, p.topk, p.E, p.tokens_per_expert);
  std::vector<int64_t> next(p.E);  // the next row of each expert
  int64_t start = 0;
  for (int64_t e = 0; e < p.E; ++e) {
    next[e] = start;
    start += ceil_div(p.tokens_per_expert[e], p.alignment) * p.alignment;
  }
  std::fill_n(p.group_index, p.rows, -1);
  for (int64_t t = 0; t < p.T; ++t) {
    for (int64_t j = 0; j < p.topk; ++j) {
      const int64_t expert = idx[t * p.idx_stride + j];
      int32_t& handle = p.handle[t * p.topk + j];
      handle = -1;
      if (expert < 0 || expert >= p.E) continue;
      const int64_t row = next[expert]++;
      if (row >= p.rows) continue;
      handle = static_cast<int32_t>(row);
      p.group_index[row] = static_cast<int32_t>(expert);
    }
  }
}

}  // namespace

void place_rows(const ExpertPlacement& placement) {
  placement.is_int64 ? place<int64_t>(placement) : place<int32_t>(placement);
}

void count_assignments(const void* topk_idx, bool is_int64, int64_t idx_stride, int64_t T,
                       int64_t topk, int64_t E, int32_t* tokens_per_expert) {
  if (is_int64) {
    count(static_cast<const int64_t*>(topk_idx), idx_stride, T, topk, E, tokens_per_expert);
  } else {
    count(static_cast<const int32_t*>(topk_idx), idx_stride, T, topk, E, tokens_per_expert);
  }
}

void copy_to_rows(const RowCopy& copy, int64_t first, int64_t last) {
  DEEPKERN_DISPATCH(copy_pieces)(copy, first, last);
}

void clear_rows(const RowCopy& copy, int64_t first, int64_t last) {
  const int64_t row_size = copy.K * copy.element_size, blocks = ceil_div(copy.K, 128);
  for (int64_t row = first; row < last; ++row) {
    if (copy.group_index[row] >= 0) continue;
    std::memset(static_cast<char*>(copy.out) + row * row_size, 0, row_size);
    if (copy.scale != nullptr) std::fill_n(copy.scale + row * blocks, blocks, 0.0f);
  }
}

void combine_rows(const RowSum& sum, int64_t first, int64_t last) {
  DEEPKERN_DISPATCH(sum_pieces)(sum, first, last);
}

}  // namespace deepkern
#else
#include "cast_block.h"
#include "real_blocks.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// The first row of a token, -1 if it has none; writes the slot of that row.
DEEPKERN_INLINE int64_t first_row(const int32_t* handle, int64_t topk, int64_t* slot) {
  for (int64_t j = 0; j < topk; ++j) {
    if (handle[j] < 0) continue;
    *slot = j;
    return handle[j];
  }
  return -1;
}

// Writes columns [start, end) of token t to one row.
void write_row(const RowCopy& c, int64_t t, int64_t row, int64_t start, int64_t end) {
  if (!c.cast) {
    const char* x = static_cast<const char*>(c.x) + (t * c.x_stride + start) * c.element_size;
    char* out = static_cast<char*>(c.out) + (row * c.K + start) * c.element_size;
    std::memcpy(out, x, (end - start) * c.element_size);
  }
  if (c.scale == nullptr) return;
  float* scale = c.scale + row * ceil_div(c.K, 128);
  if (!c.cast) {
    for (int64_t j = start / 128; j < ceil_div(end, 128); ++j) {
      scale[j] = c.x_scale[t * c.x_scale_row + j * c.x_scale_block];
    }
    return;
  }
  auto* q = static_cast<uint8_t*>(c.out) + row * c.K;
  for (int64_t k = start; k < end; k += CAST_VALUES) {
    const int64_t count = std::min(CAST_VALUES, end - k);
    DEEPKERN_FOR_REAL(c.type, cast_values<type>(c.x, t * c.x_stride + k, count, q + k,
                                                scale + k / 128, 1, c.ue8m0));
  }
}

// Copies columns [start, end) from one row to another.
void copy_row(const RowCopy& c, int64_t from, int64_t to, int64_t start, int64_t end) {
  char* out = static_cast<char*>(c.out);
  const int64_t size = c.cast ? 1 : c.element_size;
  std::memcpy(out + (to * c.K + start) * size, out + (from * c.K + start) * size,
              (end - start) * size);
  if (c.scale == nullptr) return;
  const int64_t blocks = ceil_div(c.K, 128), first = start / 128;
  std::memcpy(c.scale + to * blocks + first, c.scale + from * blocks + first,
              (ceil_div(end, 128) - first) * sizeof(float));
}

void copy_pieces(const RowCopy& c, int64_t first, int64_t last) {
  const int64_t pieces = c.pieces();
  for (int64_t i = first; i < last; ++i) {
    const int64_t t = i / pieces, start = i % pieces * RowCopy::COLUMNS;
    const int64_t end = std::min(c.K, start + RowCopy::COLUMNS);
    const int32_t* handle = c.handle + t * c.topk;
    int64_t slot = 0;
    const int64_t from = first_row(handle, c.topk, &slot);
    if (from < 0) continue;
    write_row(c, t, from, start, end);
    for (int64_t j = slot + 1; j < c.topk; ++j) {
      if (handle[j] >= 0) copy_row(c, from, handle[j], start, end);
    }
  }
}

struct WeightedRow {
  int64_t offset;  // elements of y
  float weight;
};

// The rows of token t; returns their number.
int64_t find_rows(const RowSum& s, int64_t t, WeightedRow* found) {
  const int32_t* handle = s.handle + t * s.handle_stride;
  int64_t count = 0;
  for (int64_t j = 0; j < s.topk; ++j) {
    const int64_t row = handle[j];
    if (row < 0 || row >= s.rows) continue;
    float weight = 1.0f;
    if (s.weights.data != nullptr) {
      weight = load_real(s.weights.data, s.weights.type, t * s.weights.stride + j);
    }
    found[count++] = {row * s.y.stride, weight};
  }
  return count;
}

constexpr int UNROLL = 4;  // sums in registers

// Writes the sums of UNROLL * LANES columns from k on, of which `left` exist.
template <Real type>
DEEPKERN_INLINE void sum_columns(const RowSum& s, const WeightedRow* rows, int64_t count, int64_t k,
                                 int64_t left, float* values) {
  Floats sums[UNROLL] = {};
  if (left >= UNROLL * LANES) {
    for (int64_t j = 0; j < count; ++j) {
      const Floats weight = broadcast(rows[j].weight);
      for (int i = 0; i < UNROLL; ++i) {
        sums[i] = fma(weight, load_floats<type>(s.y.data, rows[j].offset + k + i * LANES), sums[i]);
      }
    }
  } else {
    for (int64_t j = 0; j < count; ++j) {
      float row[UNROLL * LANES] = {};
      for (int64_t i = 0; i < left; ++i) row[i] = load_real(s.y.data, type, rows[j].offset + k + i);
      const Floats weight = broadcast(rows[j].weight);
      for (int i = 0; i < UNROLL; ++i) {
        sums[i] = fma(weight, load_vector<Floats>(row + i * LANES), sums[i]);
      }
    }
  }
  for (int i = 0; i < UNROLL; ++i) store_vector(values + i * LANES, sums[i]);
}

// Stores the sum of columns [start, end) of token t.
template <Real type>
void sum_piece(const RowSum& s, int64_t t, const WeightedRow* rows, int64_t count, int64_t start,
               int64_t end) {
  float values[UNROLL * LANES], shared[128];
  for (int64_t k = start; k < end; k += UNROLL * LANES) {
    const int64_t columns = std::min<int64_t>(UNROLL * LANES, end - k);
    sum_columns<type>(s, rows, count, k, columns, values);
    if (s.shared.data != nullptr) {
      load_real_block(s.shared.data, s.shared.type, t * s.shared.stride + k, columns, shared);
      for (int i = 0; i < UNROLL * LANES; ++i) values[i] += shared[i];
    }
    store_real_block(s.out, s.out_type, t * s.K + k, columns, values);
  }
}

template <Real type>
void sum_pieces_of(const RowSum& s, int64_t first, int64_t last) {
  const int64_t pieces = s.pieces();
  constexpr int64_t FEW = 64;
  WeightedRow few[FEW];
  std::vector<WeightedRow> many(s.topk > FEW ? s.topk : 0);
  WeightedRow* rows = s.topk > FEW ? many.data() : few;
  int64_t count = 0;
  for (int64_t i = first; i < last; ++i) {
    const int64_t t = i / pieces, start = i % pieces * RowSum::COLUMNS;
    if (i == first || start == 0) count = find_rows(s, t, rows);
    sum_piece<type>(s, t, rows, count, start, std::min(s.K, start + RowSum::COLUMNS));
  }
}

void sum_pieces(const RowSum& s, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(s.y.type, sum_pieces_of<type>(s, first, last));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
