// scale[i, k] = max(|x[128i : 128i+128, k]|, 1e-4) / 448        (rounded up to 2^n for ue8m0)
// q[m, k]     = e4m3(x[m, k] * (1 / scale[m // 128, k]))        or q[k, m], scale[k, i]
//
// With groups, the blocks restart at the first row of each group.
//
// Parallelization: threads take ranges of tiles of one block of rows and 128 columns. A tile is
// read twice; the second time it is in the cache. Transposed, its codes are transposed 8 x 8 at a
// time before they are written.
//
// Limit: memory bandwidth; 3 bytes per bf16 value (2 read, 1 written).
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "scales.h"

namespace deepkern {
namespace {

struct RowBlock {
  int64_t first, rows;
};

struct CastPerChannel {
  RealRows x;  // [M, K]
  int64_t M, K;
  uint8_t* q;  // e4m3 [M, K], or [K, M] with `transpose`
  bool transpose, ue8m0;
  float* scale;  // of block i and column k: scale[i * scale_block + k * scale_column]
  int64_t scale_block, scale_column;
  const RowBlock* blocks;

  int64_t column_tiles() const { return ceil_div(K, 128); }
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/cast_per_channel.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

// The blocks of all groups. Offsets are clamped to [0, M], then raised to the largest one before.
// Writes the rows that the groups cover to [*first, *end).
std::vector<RowBlock> find_blocks(const std::optional<Tensor>& group_offsets, int64_t M,
                                  int64_t* first, int64_t* end) {
  std::vector<RowBlock> blocks;
  *first = *end = 0;
  const int32_t* offsets = data<int32_t>(group_offsets);
  const int64_t G = offsets == nullptr ? 1 : group_offsets->size(0) - 1;
  if (offsets != nullptr) *first = *end = std::clamp<int64_t>(offsets[0], 0, M);
  for (int64_t g = 0; g < G; ++g) {
    const int64_t start = *end;
    *end = offsets == nullptr ? M : std::max(start, std::clamp<int64_t>(offsets[g + 1], 0, M));
    for (int64_t m = start; m < *end; m += 128) {
      blocks.push_back({m, std::min<int64_t>(128, *end - m)});
    }
  }
  return blocks;
}

// Zeros rows [first, end) of q.
void clear_rows(const CastPerChannel& c, int64_t first, int64_t end) {
  if (first == end) return;
  if (!c.transpose) {
    std::memset(c.q + first * c.K, 0, (end - first) * c.K);
    return;
  }
  for (int64_t k = 0; k < c.K; ++k) std::memset(c.q + k * c.M + first, 0, end - first);
}

std::tuple<Tensor, Tensor> cast_per_channel(const Tensor& x, const std::string& scale_format,
                                            const std::optional<Tensor>& group_offsets,
                                            bool transpose, const std::string& scale_layout) {
  const Arguments arguments{"cast_per_channel"};
  const Real type = arguments.check_real("x", x, {-1, -1});
  const int64_t M = x.size(0), K = x.size(1);
  int64_t num_blocks = ceil_div(M, 128);
  if (group_offsets.has_value()) {
    arguments.check("group_offsets", *group_offsets, ScalarType::Int, {-1});
    arguments.require(group_offsets->size(0) >= 1, "group_offsets", "at least 1 entry");
    num_blocks += group_offsets->size(0) - 1;
  }
  const bool ue8m0 = arguments.choose("scale_format", scale_format, "ue8m0", "fp32");
  const bool by_column = arguments.choose("scale_layout", scale_layout, "column", "row");
  Tensor q = transpose ? new_tensor({K, M}, FP8) : new_tensor({M, K}, FP8);
  const ScaleTensor scale = transpose ? new_scale(x, {K, num_blocks}, K, by_column)
                                      : new_scale(x, {num_blocks, K}, num_blocks, by_column);
  int64_t first_row, end_row;
  const std::vector<RowBlock> blocks = find_blocks(group_offsets, M, &first_row, &end_row);
  const CastPerChannel cast{{x.const_data_ptr(), type, x.stride(0)},
                            M,
                            K,
                            mutable_data<uint8_t>(q),
                            transpose,
                            ue8m0,
                            scale.data,
                            transpose ? scale.block : scale.row,
                            transpose ? scale.row : scale.block,
                            blocks.data()};
  clear_rows(cast, 0, first_row);
  clear_rows(cast, end_row, M);
  const auto used = static_cast<int64_t>(blocks.size());
  for (int64_t i = used; i < num_blocks; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      cast.scale[i * cast.scale_block + k * cast.scale_column] = 0.0f;
    }
  }
  const auto cast_tiles = DEEPKERN_DISPATCH(cast_tiles);
  parallel_ranges(used * cast.column_tiles(), 128 * 128,
                  [&](int64_t first, int64_t last) { cast_tiles(cast, first, last); });
  return {q, scale.tensor};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("cast_per_channel", TORCH_BOX(&cast_per_channel));
}

}  // namespace
}  // namespace deepkern
#else
#include "cast_block.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// block_scale() of each lane.
DEEPKERN_INLINE Floats block_scales(Ints amax, bool ue8m0) {
  const Floats smallest = broadcast(1e-4f);
  Floats scale = max(floats_of(amax), smallest) / broadcast(448.0f);
  if (ue8m0) scale = floats_of((bits_of(scale) + 0x7FFFFF) & INFINITY_BITS);
  return amax >= INFINITY_BITS ? floats_of(broadcast_int(0x7FC00000)) : scale;
}

// Writes the scales of a tile's columns and their inverses [128].
template <Real type>
void scale_columns(const CastPerChannel& c, const RowBlock& rows, int64_t k, int64_t columns,
                   float* scale, float* inverse) {
  float values[128];
  Ints amax[128 / LANES] = {};
  for (int64_t i = 0; i < rows.rows; ++i) {
    load_block<type>(c.x.data, (rows.first + i) * c.x.stride + k, columns, values);
    for (int j = 0; j < 128 / LANES; ++j) {
      const Ints magnitude = bits_of(load_vector<Floats>(values + j * LANES)) & 0x7FFFFFFF;
      amax[j] = magnitude > amax[j] ? magnitude : amax[j];
    }
  }
  float scales[128];
  for (int j = 0; j < 128 / LANES; ++j) {
    const Floats s = block_scales(amax[j], c.ue8m0);
    store_vector(scales + j * LANES, s);
    store_vector(inverse + j * LANES, broadcast(1.0f) / s);
  }
  for (int64_t j = 0; j < columns; ++j) scale[j * c.scale_column] = scales[j];
}

// q[j] = e4m3(x[j] * inverse[j]) for 128 columns.
DEEPKERN_INLINE void encode_columns(const float* x, const float* inverse, uint8_t* q) {
  for (int j = 0; j < 128; j += 4 * LANES) {
    Ints codes[4];
    for (int i = 0; i < 4; ++i) {
      const int column = j + i * LANES;
      codes[i] =
          e4m3_codes(load_vector<Floats>(x + column) * load_vector<Floats>(inverse + column));
    }
    store_bytes(q + j, codes[0], codes[1], codes[2], codes[3]);
  }
}

// Transposes 8 x 8 bytes: from[i * 128 + j] to to[j * 128 + i].
DEEPKERN_INLINE void transpose_bytes(const uint8_t* from, uint8_t* to) {
  uint64_t row[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&row[i], from + i * 128, 8);
  // Swaps the off-diagonal quarters of blocks of 2, 4 and 8 bytes.
  const uint64_t masks[] = {0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF};
  for (int level = 0; level < 3; ++level) {
    const int distance = 1 << level, shift = 8 << level;
    for (int i = 0; i < 8; ++i) {
      if (i & distance) continue;
      const uint64_t swapped = ((row[i] >> shift) ^ row[i + distance]) & masks[level];
      row[i] ^= swapped << shift;
      row[i + distance] ^= swapped;
    }
  }
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * 128, &row[i], 8);
}

// Writes the columns of a tile of codes [128, 128] as rows of q.
void store_transposed(const CastPerChannel& c, const uint8_t* codes, const RowBlock& rows,
                      int64_t k, int64_t columns) {
  alignas(64) uint8_t transposed[128 * 128];
  for (int64_t i = 0; i < rows.rows; i += 8) {
    for (int64_t j = 0; j < columns; j += 8) {
      transpose_bytes(codes + i * 128 + j, transposed + j * 128 + i);
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    std::memcpy(c.q + (k + j) * c.M + rows.first, transposed + j * 128, rows.rows);
  }
}

template <Real type>
void cast_tile(const CastPerChannel& c, const RowBlock& rows, int64_t k, float* scale) {
  const int64_t columns = std::min<int64_t>(128, c.K - k);
  float inverse[128], values[128];
  alignas(64) uint8_t codes[128 * 128];
  scale_columns<type>(c, rows, k, columns, scale, inverse);
  for (int64_t i = 0; i < rows.rows; ++i) {
    load_block<type>(c.x.data, (rows.first + i) * c.x.stride + k, columns, values);
    uint8_t* q = c.q + (rows.first + i) * c.K + k;
    const bool direct = !c.transpose && columns == 128;
    encode_columns(values, inverse, direct ? q : codes + i * 128);
    if (!c.transpose && !direct) std::memcpy(q, codes + i * 128, columns);
  }
  if (c.transpose) store_transposed(c, codes, rows, k, columns);
}

void cast_tiles(const CastPerChannel& c, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t block = i / c.column_tiles(), k = i % c.column_tiles() * 128;
    float* scale = c.scale + block * c.scale_block + k * c.scale_column;
    DEEPKERN_FOR_REAL(c.x.type, cast_tile<type>(c, c.blocks[block], k, scale));
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
