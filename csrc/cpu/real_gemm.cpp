// d[m, n] = Σ_k a[m, k] · b[n, k]  in float32, for gemm_nt and m_grouped_gemm_nt_contiguous
//
// Every value of D has the same order of summation. Lane l of a vector adds the k of a block of
// 512 that are l modulo LANES, in ascending order; the lanes are added pairwise; the blocks are
// added in order. So its bits depend on K and on the instruction set, but not on the other rows, on
// the strides or on the number of threads.
//
// Parallelization: threads take tasks, each some columns of one group. Rows of A are widened once,
// at most MAX_ROWS at a time. A register tile runs along K and adds its lanes at the end of a
// block. B is read in one of three ways:
//
// - few rows, B contiguous along K: in place;
// - few rows, B contiguous along N: in place, the lanes being columns and LANES sums per column;
// - else 32 columns of a block are widened, transposed if need be, and used by all rows.
//
// Limit: few rows, the bandwidth of reading B. Many rows, the FMA units: a tile of 3 x 4 has 12
// multiply-adds for 7 loads.
#ifndef DEEPKERN_ISA
#include "real_gemm.h"

#include <algorithm>
#include <vector>

#include "matrices.h"
#include "scratch.h"

namespace deepkern {
namespace {

constexpr int64_t K_BLOCK = 512;          // values of K per sum
constexpr int64_t FEW_ROWS_ALONG_K = 12;  // with more rows, widening B once costs less
constexpr int64_t FEW_ROWS_ALONG_N = 3;
constexpr int64_t MAX_ROWS = 192;     // a block of as many rows of A has 400 KB
constexpr int64_t PACK_COLUMNS = 32;  // columns of B that are widened at once
constexpr int64_t TRANSPOSE_K = 32;   // values of K that are transposed at once
constexpr int64_t MOST_LANES = 16;
constexpr int64_t SHORT_ROW = 4096;  // bytes

// Columns [first, end) of D for the rows [first_row, end_row) of a batch.
struct RealTask {
  const RealGemm* gemm;
  const void* b;  // of the group
  Matrix a;       // row i of block j is row j * batch_rows + i; zero past K
  int64_t batch_rows, first_row, end_row, first, end;
  int64_t batch_start;  // index in gemm->rows of row 0 of the batch

  int64_t rows() const { return end_row - first_row; }
  int64_t columns() const { return end - first; }
  const float* a_block(int64_t j) const { return a.row(j * batch_rows + first_row); }
};

bool contiguous_along_k(const RealGemm& gemm) { return gemm.K <= 1 || gemm.b.k_stride == 1; }

bool contiguous_along_n(const RealGemm& gemm) {
  return !contiguous_along_k(gemm) && (gemm.N == 1 || gemm.b.row_stride == 1);
}

// Columns of a task. A row of a B that is contiguous along N is read in pieces of as many columns,
// so the pieces are as long as leaves work for every thread.
int64_t task_columns(const RealGemm& gemm, int64_t groups) {
  if (!contiguous_along_n(gemm)) return PACK_COLUMNS;
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t equal = ceil_div(gemm.N * groups, threads);
  return std::clamp<int64_t>(ceil_div(equal, 64) * 64, 64, 1024);
}

int64_t row_of(const RealGemm& gemm, int64_t i) { return gemm.rows == nullptr ? i : gemm.rows[i]; }

int64_t blocks_of(int64_t K) { return ceil_div(K, K_BLOCK); }

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/real_gemm.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

// Groups with at most MAX_ROWS rows in total, cut out of the groups of a product.
class Batch {
 public:
  explicit Batch(const RealGemm& gemm) : gemm_(&gemm) {}

  int64_t rows() const { return groups_.empty() ? 0 : groups_.back().end - groups_[0].first; }
  void add(const RealGroup& group) { groups_.push_back(group); }
  void clear() { groups_.clear(); }

  void multiply() const {
    const int64_t K = gemm_->K, pitch = padded_width(std::min(K, K_BLOCK));
    Scratch memory(blocks_of(K) * rows() * pitch);
    const Matrix a{memory.take(blocks_of(K) * rows() * pitch), pitch};
    const auto widen_rows = DEEPKERN_DISPATCH(widen_rows);
    parallel_ranges(rows(), 4 * K, [&](int64_t first, int64_t end) {
      widen_rows(*gemm_, groups_[0].first, rows(), first, end, a);
    });
    const int64_t width = task_columns(*gemm_, groups_.size()), tasks = ceil_div(gemm_->N, width);
    const auto multiply_columns = DEEPKERN_DISPATCH(multiply_columns);
    parallel_tasks(
        tasks * static_cast<int64_t>(groups_.size()), double(rows() * gemm_->N) * double(K) / 4,
        [] { return 0; },
        [&](int64_t i, int) {
          const RealGroup& group = groups_[i / tasks];
          const int64_t start = groups_[0].first, column = i % tasks * width;
          multiply_columns({gemm_, group.b, a, rows(), group.first - start, group.end - start,
                            column, std::min(gemm_->N, column + width), start});
        });
  }

 private:
  const RealGemm* gemm_;
  std::vector<RealGroup> groups_;  // consecutive
};

}  // namespace

void multiply_groups(const RealGemm& gemm, const std::vector<RealGroup>& groups) {
  Batch batch(gemm);
  for (const RealGroup& group : groups) {
    // Parts of equal size, in whole tiles.
    const int64_t rows = group.end - group.first, parts = ceil_div(rows, MAX_ROWS);
    if (rows == 0) continue;
    const int64_t step = ceil_div(ceil_div(rows, parts), 12) * 12;
    for (int64_t first = group.first; first < group.end; first += step) {
      const RealGroup part{group.b, first, std::min(group.end, first + step)};
      if (batch.rows() + part.end - part.first > MAX_ROWS) {
        batch.multiply();
        batch.clear();
      }
      batch.add(part);
    }
  }
  if (batch.rows() > 0) batch.multiply();
}

}  // namespace deepkern
#else
#include "product.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

#if defined(DEEPKERN_AVX512)
constexpr int DOT_ROWS = 4;  // 16 of 32 registers are sums, which are added together
#else
constexpr int DOT_ROWS = 3;
#endif

int64_t whole_vectors(int64_t k) { return ceil_div(k, LANES) * LANES; }

// Writes rows [first, end) of the batch as floats, in blocks of K, zero up to whole vectors.
template <Real type>
void widen_rows_of(const RealGemm& g, int64_t batch_start, int64_t rows, int64_t first, int64_t end,
                   Matrix a) {
  for (int64_t i = first; i < end; ++i) {
    const int64_t row = row_of(g, batch_start + i) * g.a.row_stride;
    for (int64_t k = 0; k < g.K; k += K_BLOCK) {
      const int64_t count = std::min(K_BLOCK, g.K - k), padded = ceil_div(count, 16) * 16;
      float* out = a.row(k / K_BLOCK * rows + i);
      if (g.a.k_stride == 1 || g.K == 1) {
        load_row<type>(g.a.data, row + k, count, out);
        continue;
      }
      for (int64_t j = 0; j < padded; ++j) {
        out[j] = j < count ? deepkern::load<type>(g.a.data, row + (k + j) * g.a.k_stride) : 0.0f;
      }
    }
  }
}

void widen_rows(const RealGemm& g, int64_t batch_start, int64_t rows, int64_t first, int64_t end,
                Matrix a) {
  DEEPKERN_FOR_REAL(g.a.type, widen_rows_of<type>(g, batch_start, rows, first, end, a));
}

// Where the sums of a task's values of D are: sums[row * stride + column].
struct Sums {
  float* data;
  int64_t stride;
};

// sums[r, c] += Σ_k a[r, k] · b[c, k] for ROWS x COLUMNS values and one block of K. With one row,
// reading B is the limit: as many bytes as it reads are prefetched at `next`, unless that is null.
template <int ROWS, int COLUMNS, Real type>
void dot_tile(const float* a, int64_t pitch, const void* const* b, int64_t k_first, int64_t count,
              const char* next, Sums sums) {
  constexpr int VALUES = ROWS * COLUMNS, PADDED = (VALUES + LANES - 1) / LANES * LANES;
  Floats sum[PADDED];
#pragma GCC unroll 32
  for (int i = 0; i < PADDED; ++i) sum[i] = Floats{};
  const auto step = [&](int64_t k, const auto& load_b) {
    Floats x[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) x[r] = load_vector<Floats>(a + r * pitch + k);
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) {
      const Floats y = load_b(b[c]);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[r * COLUMNS + c] = fma(x[r], y, sum[r * COLUMNS + c]);
    }
  };
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) {
    if (ROWS == 1 && next != nullptr) {
      constexpr int64_t BYTES = LANES * COLUMNS * size_of(type);
#pragma GCC unroll 16
      for (int64_t i = 0; i < BYTES; i += 64) __builtin_prefetch(next + k / LANES * BYTES + i);
    }
    step(k, [&](const void* row) { return load_floats<type>(row, k_first + k); });
  }
  if (k < count) {
    step(k, [&](const void* row) { return load_first_floats<type>(row, k_first + k, count - k); });
  }
  float total[PADDED];
  for (int i = 0; i < PADDED; i += LANES) {
    store_vector(total + i, sums_of_lanes(*reinterpret_cast<const Floats(*)[LANES]>(sum + i)));
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < COLUMNS; ++c) sums.data[r * sums.stride + c] += total[r * COLUMNS + c];
  }
}

// The same for any number of rows and 8 columns.
template <Real type>
void dot_strip(const float* a, int64_t pitch, int64_t rows, const void* const* b, int64_t k_first,
               int64_t count, const char* next, Sums sums) {
  int64_t row = 0;
  const auto tile = [&](auto height) {
    constexpr int ROWS = height.value, COLUMNS = ROWS == 1 ? 8 : 4;
    for (int c = 0; c < 8; c += COLUMNS) {
      dot_tile<ROWS, COLUMNS, type>(a + row * pitch, pitch, b + c, k_first, count, next,
                                    {sums.data + row * sums.stride + c, sums.stride});
    }
    row += ROWS;
  };
  while (rows - row >= DOT_ROWS + 2 || rows - row == DOT_ROWS) tile(Rows<DOT_ROWS>());
  while (rows - row >= 2) tile(Rows<2>());
  if (row < rows) tile(Rows<1>());
}

// Few rows, B contiguous along K: 8 columns at a time, so that a thread reads 8 streams.
template <Real type>
void multiply_along_k(const RealTask& t, Sums sums) {
  const RealGemm& g = *t.gemm;
  for (int64_t column = 0; column < t.columns(); column += 8) {
    const void* b[8];
    for (int64_t c = 0; c < 8; ++c) {  // columns past the last one are not stored
      const int64_t n = std::min(t.first + column + c, g.N - 1);
      b[c] = element(t.b, type, n * g.b.row_stride);
    }
    // The CPU recognizes no pattern where several short rows of B are on one page, so the next 8
    // columns are prefetched in the order of memory.
    const int64_t row_bytes = g.b.row_stride * size_of(type);
    const char* next = static_cast<const char*>(b[0]) + 8 * row_bytes;
    for (int64_t k = 0; k < g.K; k += K_BLOCK) {
      dot_strip<type>(t.a_block(k / K_BLOCK), t.a.stride, t.rows(), b, k,
                      std::min(K_BLOCK, g.K - k), row_bytes <= SHORT_ROW ? next : nullptr,
                      {sums.data + column, sums.stride});
      next += 8 * K_BLOCK * size_of(type);
    }
  }
}

// phases[n / LANES][p][n % LANES] += a[p] * b[p, n] for p < LANES. Rows of b from `count` on are
// zero.
template <Real type>
void add_to_columns(const float* a, const void* b, int64_t k_stride, int64_t count, int64_t columns,
                    float* phases) {
  const auto add = [&](float* sums, const auto& load_b) {
#pragma GCC unroll 16
    for (int p = 0; p < LANES; ++p) {
      const Floats sum = load_vector<Floats>(sums + p * LANES);
      store_vector(sums + p * LANES, fma(broadcast(a[p]), load_b(p), sum));
    }
  };
  int64_t n = 0;
  if (count >= LANES) {
    for (; n + LANES <= columns; n += LANES) {
      add(phases + n * LANES, [&](int p) { return load_floats<type>(b, p * k_stride + n); });
    }
  }
  for (; n < columns; n += LANES) {
    add(phases + n * LANES, [&](int p) {
      const int64_t width = p < count ? std::min<int64_t>(LANES, columns - n) : 0;
      return load_first_floats<type>(b, p * k_stride + n, width);
    });
  }
}

// sums[n] += the LANES sums of column n, in the order of sum_of_lanes(); clears them.
void add_phases(float* phases, int64_t columns, float* sums) {
  for (int64_t n = 0; n < columns; n += LANES) {
    Floats sum[LANES];
    for (int p = 0; p < LANES; ++p) {
      sum[p] = load_vector<Floats>(phases + n * LANES + p * LANES);
      store_vector(phases + n * LANES + p * LANES, Floats{});
    }
    for (int width = LANES / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) sum[i] = sum[2 * i] + sum[2 * i + 1];
    }
    store_vector(sums + n, load_vector<Floats>(sums + n) + sum[0]);
  }
}

// Few rows, B contiguous along N. phases: [rows][columns / LANES][LANES][LANES], zero.
template <Real type>
void multiply_along_n(const RealTask& t, Sums sums, float* phases) {
  const RealGemm& g = *t.gemm;
  const int64_t size = whole_vectors(t.columns()) * LANES;
  for (int64_t first = 0; first < g.K; first += K_BLOCK) {
    const int64_t count = std::min(K_BLOCK, g.K - first);
    for (int64_t k = 0; k < count; k += LANES) {  // LANES rows of B stay in the L1 cache
      const void* b = element(t.b, type, (first + k) * g.b.k_stride + t.first);
      for (int64_t r = 0; r < t.rows(); ++r) {
        add_to_columns<type>(t.a_block(first / K_BLOCK) + r * t.a.stride + k, b, g.b.k_stride,
                             count - k, t.columns(), phases + r * size);
      }
    }
    for (int64_t r = 0; r < t.rows(); ++r) {
      add_phases(phases + r * size, t.columns(), sums.data + r * sums.stride);
    }
  }
}

// Widens rows of B that are contiguous along K, 8 at a time, so that a thread reads 8 streams.
template <Real type>
void pack_along_k(const void* b, int64_t stride, int64_t columns, int64_t count, Matrix out) {
  const int64_t whole = count / LANES * LANES;
  int64_t column = 0;
  for (; column + 8 <= columns; column += 8) {
    for (int64_t k = 0; k < whole; k += LANES) {
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) {
        store_vector(out.row(column + c) + k, load_floats<type>(b, (column + c) * stride + k));
      }
    }
    for (int64_t c = column; c < column + 8; ++c) {
      load_row<type>(b, c * stride + whole, count - whole, out.row(c) + whole);
    }
  }
  for (; column < columns; ++column) load_row<type>(b, column * stride, count, out.row(column));
}

// Transposes rows of B that are contiguous along N. `rows`: room for TRANSPOSE_K of them.
template <Real type>
void pack_along_n(const void* b, int64_t stride, int64_t columns, int64_t count, Matrix out,
                  Matrix rows) {
  for (int64_t k = 0; k < count; k += TRANSPOSE_K) {
    const int64_t step = std::min(TRANSPOSE_K, count - k);
    for (int64_t i = 0; i < step; ++i) load_row<type>(b, (k + i) * stride, columns, rows.row(i));
    transpose(step, columns, rows, out.from(0, k));
  }
  for (int64_t c = 0; c < columns; ++c) {
    std::fill(out.row(c) + count, out.row(c) + whole_vectors(count), 0.0f);
  }
}

template <Real type>
void pack_strided(const void* b, const RealMatrix& layout, int64_t columns, int64_t count,
                  Matrix out) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t k = 0; k < whole_vectors(count); ++k) {
      const int64_t offset = c * layout.row_stride + k * layout.k_stride;
      out.row(c)[k] = k < count ? deepkern::load<type>(b, offset) : 0.0f;
    }
  }
}

// Many rows, or a B with other strides: 32 columns of a block of K are widened and used by all
// rows.
template <Real type>
void multiply_packed(const RealTask& t, int64_t first, int64_t columns, Sums sums, Matrix packed,
                     Matrix rows) {
  const RealGemm& g = *t.gemm;
  for (int64_t k = 0; k < g.K; k += K_BLOCK) {
    const int64_t count = std::min(K_BLOCK, g.K - k);
    const void* b = element(t.b, type, first * g.b.row_stride + k * g.b.k_stride);
    if (contiguous_along_k(g)) {
      pack_along_k<type>(b, g.b.row_stride, columns, count, packed);
    } else if (contiguous_along_n(g)) {
      pack_along_n<type>(b, g.b.k_stride, columns, count, packed, rows);
    } else {
      pack_strided<type>(b, g.b, columns, count, packed);
    }
    for (int64_t column = 0; column < columns; column += 8) {
      const void* strip[8];
      for (int64_t c = 0; c < 8; ++c) strip[c] = packed.row(std::min(column + c, columns - 1));
      dot_strip<Real::fp32>(t.a_block(k / K_BLOCK), t.a.stride, t.rows(), strip, 0,
                            whole_vectors(count), nullptr, {sums.data + column, sums.stride});
    }
  }
}

// Rounds the sums of columns [first, first + columns) and writes them to D.
template <Real type>
void store_sums_as(const RealTask& t, int64_t first, int64_t columns, Sums sums) {
  const RealGemm& g = *t.gemm;
  for (int64_t r = 0; r < t.rows(); ++r) {
    const int64_t row = row_of(g, t.batch_start + t.first_row + r);
    store_row<type>(g.out, row * g.N + first, columns, sums.data + r * sums.stride, 1.0f);
  }
}

void store_sums(const RealTask& t, int64_t first, int64_t columns, Sums sums) {
  DEEPKERN_FOR_REAL(t.gemm->out_type, store_sums_as<type>(t, first, columns, sums));
}

// Few rows of a B that is contiguous in one direction.
template <Real type>
void multiply_in_place(const RealTask& t) {
  const int64_t width = ceil_div(t.columns(), MOST_LANES) * MOST_LANES;
  const bool along_n = contiguous_along_n(*t.gemm);
  const int64_t floats = t.rows() * width * (along_n ? LANES + 1 : 1);
  const Sums sums{thread_scratch(floats), width};
  std::fill_n(sums.data, floats, 0.0f);
  if (along_n) {
    multiply_along_n<type>(t, sums, sums.data + t.rows() * width);
  } else {
    multiply_along_k<type>(t, sums);
  }
  store_sums(t, t.first, t.columns(), sums);
}

template <Real type>
void multiply_columns_of(const RealTask& t) {
  const int64_t few = contiguous_along_k(*t.gemm)   ? FEW_ROWS_ALONG_K
                      : contiguous_along_n(*t.gemm) ? FEW_ROWS_ALONG_N
                                                    : 0;
  if (t.rows() <= few) return multiply_in_place<type>(t);
  constexpr int64_t pitch = padded_width(K_BLOCK), row_pitch = padded_width(PACK_COLUMNS);
  const int64_t size = t.rows() * PACK_COLUMNS;
  float* memory = thread_scratch(size + PACK_COLUMNS * pitch + TRANSPOSE_K * row_pitch);
  const Matrix packed{memory + size, pitch}, rows{packed.row(PACK_COLUMNS), row_pitch};
  for (int64_t first = t.first; first < t.end; first += PACK_COLUMNS) {
    const int64_t columns = std::min(PACK_COLUMNS, t.end - first);
    const Sums sums{memory, PACK_COLUMNS};
    std::fill_n(memory, size, 0.0f);
    multiply_packed<type>(t, first, columns, sums, packed, rows);
    store_sums(t, first, columns, sums);
  }
}

void multiply_columns(const RealTask& t) {
  DEEPKERN_FOR_REAL(t.gemm->a.type, multiply_columns_of<type>(t));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
