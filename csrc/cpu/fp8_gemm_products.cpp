// Computes FP8 matrix products in parallel; see fp8_gemm_nt.cpp for the formula and the threads.
#include <torch/csrc/stable/ops.h>

#include "fp8_gemm_nt.h"
#include "subnormals.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace deepkern {
namespace {

constexpr int64_t MAX_ROWS = 256;      // widened at once: they stay in the L2 or L3 cache
constexpr int64_t SCALE_PADDING = 16;  // a kernel reads up to 16 floats from the last scale on

template <Real type>
void add_c(const void* c, int64_t offset, float* row, int64_t count) {
  for (int64_t n = 0; n < count; ++n) row[n] += load<type>(c, offset + n);
}

template <Real type>
void round_row(const float* row, void* out, int64_t offset, int64_t count) {
  for (int64_t n = 0; n < count; ++n) store<type>(out, offset + n, row[n]);
}

// Copies 16 x 16 bytes and transposes them.
void transpose_16x16(const uint8_t* from, int64_t stride, uint8_t* to, int64_t pitch) {
#if defined(__x86_64__)
  __m128i x[16], y[16];
  for (int i = 0; i < 16; ++i) {
    x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride));
  }
  // Each round rotates the bits of a byte's index (row, column) by one.
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
      y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
    }
    std::copy(y, y + 16, x);
  }
  for (int i = 0; i < 16; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * pitch), x[i]);
  }
#else
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to[j * pitch + i] = from[i * stride + j];
  }
#endif
}

// to[n][k] = from[k][n] for `columns` values of n and K of k.
void transpose_codes(const uint8_t* from, int64_t stride, int64_t columns, int64_t K, uint8_t* to,
                     int64_t pitch) {
  for (int64_t k = 0; k < K; k += 16) {
    for (int64_t n = 0; n < columns; n += 16) {
      if (k + 16 <= K && n + 16 <= columns) {
        transpose_16x16(from + k * stride + n, stride, to + n * pitch + k, pitch);
        continue;
      }
      for (int64_t i = k; i < std::min(k + 16, K); ++i) {
        for (int64_t j = n; j < std::min(n + 16, columns); ++j) {
          to[j * pitch + i] = from[i * stride + j];
        }
      }
    }
  }
}

// Rows [first, last) of a product. They are widened once and used by all strips. Several threads
// may call widen(), each for its own range of blocks of K; after that several threads may call
// multiply(), each for its own range of strips.
class ProductRows {
 public:
  ProductRows(const Fp8Product& product, const Fp8GemmIsa& isa, int64_t first, int64_t last)
      : product_(&product),
        isa_(&isa),
        first_(first),
        last_(last),
        tile_(isa.choose_tile(last - first)),
        rows_((last - first + tile_.rows - 1) / tile_.rows * tile_.rows) {}

  int64_t rows() const { return rows_; }  // padded to whole tiles
  int64_t blocks() const { return blocks_of_k(product_->gemm.K); }
  int64_t strips() const { return (product_->gemm.b.rows + STRIP_COLUMNS - 1) / STRIP_COLUMNS; }
  int64_t operand_bytes() const { return blocks() * rows_ * kBlock * isa_->operand_size; }
  int64_t scale_count() const { return blocks() * rows_ + SCALE_PADDING; }

  // Where the widened values and the scales are stored.
  void place(char* operands, float* scales) {
    operands_ = operands;
    scales_ = scales;
    std::fill_n(scales + blocks() * rows_, SCALE_PADDING, 0.0f);
  }

  void widen(int64_t first_block, int64_t last_block) const {
    const Fp8Matrix& a = product_->gemm.a;
    for (int64_t j = first_block; j < last_block; ++j) {
      const int64_t count = std::min(kBlock, product_->gemm.K - j * kBlock);
      for (int64_t m = 0; m < rows_; ++m) {
        const bool valid = first_ + m < last_;  // else padding
        const int64_t row = valid ? source_row(m) : 0;
        const uint8_t* from = a.codes + row * a.row_stride + j * kBlock;
        uint8_t codes[kBlock];
        if (!valid || count < kBlock) {
          std::memset(codes, 0, kBlock);
          if (valid) std::memcpy(codes, from, count);
          from = codes;
        }
        isa_->widen(from, operands_ + (j * rows_ + m) * kBlock * isa_->operand_size);
        scales_[j * rows_ + m] =
            valid ? a.scale[row * a.scale_row_stride + j * a.scale_block_stride] : 0.0f;
      }
    }
  }

  void multiply(int64_t first_strip, int64_t last_strip) const {
    const KeepSubnormals keep;  // the kernel widens subnormal codes to subnormal floats
    const Fp8Matrix& b = product_->gemm.b;
    const int64_t K = product_->gemm.K, pitch = blocks() * kBlock;
    const bool transposed = product_->b_k_stride != 1;
    const AlignedBuffer sums(rows_ * STRIP_COLUMNS * sizeof(float));
    const AlignedBuffer codes(transposed ? STRIP_COLUMNS * pitch : 0);
    std::vector<float> b_scale(blocks() * STRIP_COLUMNS + SCALE_PADDING);
    const uint8_t* rows[STRIP_COLUMNS];
    const Strip strip{operands_,      scales_, rows_,
                      tile_,          rows,    transposed ? pitch : b.row_stride,
                      b_scale.data(), K,       sums.as<float>()};
    for (int64_t i = first_strip; i < last_strip; ++i) {
      const int64_t first_column = i * STRIP_COLUMNS;
      const int64_t columns = std::min(STRIP_COLUMNS, b.rows - first_column);
      if (transposed) {
        transpose_codes(b.codes + first_column, product_->b_k_stride, columns, K,
                        codes.as<uint8_t>(), pitch);
      }
      const uint8_t* first_row =
          transposed ? codes.as<uint8_t>() : b.codes + first_column * b.row_stride;
      for (int64_t n = 0; n < STRIP_COLUMNS; ++n) {
        // Columns past the last one use the last row of B; store_strip() does not store them.
        rows[n] = first_row + std::min(n, columns - 1) * strip.b_row_stride;
      }
      if (i == first_strip || starts_scale(first_column)) {
        expand_b_scale(first_column, b_scale.data());
      }
      isa_->multiply(strip);
      store_strip(sums.as<float>(), first_column, columns);
    }
  }

 private:
  int64_t source_row(int64_t m) const {
    return product_->a_rows != nullptr ? product_->a_rows[first_ + m] : first_ + m;
  }

  // Writes scale [blocks][STRIP_COLUMNS], the scales of the columns from first_column on.
  void expand_b_scale(int64_t first_column, float* scale) const {
    const Fp8Matrix& b = product_->gemm.b;
    for (int64_t j = 0; j < blocks(); ++j, scale += STRIP_COLUMNS) {
      const float* block_scale = b.scale + j * b.scale_block_stride;
      if (one_scale_per_strip()) {
        const int64_t row = first_column / b.rows_per_scale;
        std::fill_n(scale, STRIP_COLUMNS, block_scale[row * b.scale_row_stride]);
        continue;
      }
      for (int64_t n = 0; n < STRIP_COLUMNS; ++n) {
        const int64_t row = std::min(first_column + n, b.rows - 1) / b.rows_per_scale;
        scale[n] = block_scale[row * b.scale_row_stride];
      }
    }
  }

  bool one_scale_per_strip() const {
    return product_->gemm.b.rows_per_scale % STRIP_COLUMNS == 0;
  }

  // Whether the strip from first_column on has other scales than the strip before it.
  bool starts_scale(int64_t first_column) const {
    return !one_scale_per_strip() || first_column % product_->gemm.b.rows_per_scale == 0;
  }

  // Epilogue: adds C, rounds and stores.
  void store_strip(const float* sums, int64_t first_column, int64_t columns) const {
    const Fp8Gemm& gemm = product_->gemm;
    for (int64_t m = 0; m < last_ - first_; ++m) {
      const int64_t in_tile = m % tile_.rows;
      const float* tiles = sums + (m - in_tile) * STRIP_COLUMNS + in_tile * tile_.columns;
      float row[STRIP_COLUMNS];
      for (int64_t n = 0; n < STRIP_COLUMNS; n += tile_.columns) {
        std::memcpy(row + n, tiles + n * tile_.rows, tile_.columns * sizeof(float));
      }
      const int64_t out_row =
          product_->out_rows != nullptr ? product_->out_rows[first_ + m] : first_ + m;
      if (gemm.c != nullptr) {
        const int64_t offset = out_row * gemm.c_row_stride + first_column;
        switch (gemm.c_type) {
          case Real::bf16:
            add_c<Real::bf16>(gemm.c, offset, row, columns);
            break;
          case Real::fp16:
            add_c<Real::fp16>(gemm.c, offset, row, columns);
            break;
          case Real::fp32:
            add_c<Real::fp32>(gemm.c, offset, row, columns);
            break;
        }
      }
      const int64_t offset = out_row * gemm.b.rows + first_column;
      switch (gemm.out_type) {
        case Real::bf16:
          round_row<Real::bf16>(row, gemm.out, offset, columns);
          break;
        case Real::fp16:
          round_row<Real::fp16>(row, gemm.out, offset, columns);
          break;
        case Real::fp32:
          round_row<Real::fp32>(row, gemm.out, offset, columns);
          break;
      }
    }
  }

  const Fp8Product* product_;
  const Fp8GemmIsa* isa_;
  int64_t first_, last_;
  Tile tile_;
  int64_t rows_;
  char* operands_ = nullptr;
  float* scales_ = nullptr;
};

// The items of one entry of a list of work, and the cost of each.
struct Work {
  int64_t items, cost;
};

// Calls function(entry, first, last) for ranges of items of all entries, in parallel. Threads get
// equal costs. A task costs at least about `grain`.
template <class Function>
void parallel_work(const std::vector<Work>& work, int64_t grain, const Function& function) {
  int64_t total = 0;
  for (const Work& w : work) total += w.items * w.cost;
  torch::stable::parallel_for(0, total, grain, [&](int64_t from, int64_t to) {
    int64_t start = 0;  // of an entry; an item belongs to the task in which it starts
    for (size_t i = 0; i < work.size() && start < to; ++i) {
      const auto [items, cost] = work[i];
      const int64_t first = std::max<int64_t>(0, (from - start + cost - 1) / cost);
      const int64_t last = std::min(items, (to - start + cost - 1) / cost);
      if (start + items * cost > from && first < last) function(i, first, last);
      start += items * cost;
    }
  });
}

// Widens and multiplies `batch`. The costs are about those of a multiplication: widening and
// reading a code of B costs as much as 6.
void multiply_batch(std::vector<ProductRows>& batch) {
  int64_t operand_bytes = 0, scales = 0;
  for (const ProductRows& rows : batch) {
    operand_bytes += rows.operand_bytes();
    scales += rows.scale_count();
  }
  const AlignedBuffer operands(operand_bytes), scale(scales * sizeof(float));
  std::vector<Work> widening, multiplying;
  operand_bytes = scales = 0;
  for (ProductRows& rows : batch) {
    rows.place(operands.as<char>() + operand_bytes, scale.as<float>() + scales);
    operand_bytes += rows.operand_bytes();
    scales += rows.scale_count();
    widening.push_back({rows.blocks(), kBlock * rows.rows()});
    multiplying.push_back(
        {rows.strips(), STRIP_COLUMNS * kBlock * (rows.blocks() + 1) * (rows.rows() + 6)});
  }
  parallel_work(widening, 1 << 16,
                [&](size_t i, int64_t first, int64_t last) { batch[i].widen(first, last); });
  parallel_work(multiplying, 1 << 19,
                [&](size_t i, int64_t first, int64_t last) { batch[i].multiply(first, last); });
}

}  // namespace

void multiply_products(const std::vector<Fp8Product>& products) {
  const Fp8GemmIsa& isa = fp8_gemm_isa(cpu_isa());
  std::vector<ProductRows> batch;
  int64_t rows_in_batch = 0;
  for (const Fp8Product& product : products) {
    if (product.gemm.b.rows == 0) continue;
    for (int64_t first = 0; first < product.rows; first += MAX_ROWS) {
      const int64_t last = std::min(product.rows, first + MAX_ROWS);
      if (rows_in_batch + last - first > MAX_ROWS) {
        multiply_batch(batch);
        batch.clear();
        rows_in_batch = 0;
      }
      batch.emplace_back(product, isa, first, last);
      rows_in_batch += last - first;
    }
  }
  if (!batch.empty()) multiply_batch(batch);
}

}  // namespace deepkern
