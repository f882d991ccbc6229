// C = A·B or C = diag(scale)·C + A·B in float32, for small matrices in the cache; see every_isa.h.
//
// A register tile of TILE_ROWS x TILE_COLUMNS values of C is summed over k in ascending order, one
// FMA per product. So a value of C does not depend on its position or on the size of C.
//
// Columns are computed TILE_COLUMNS at a time: B and C are readable, C writable, up to a multiple
// of TILE_COLUMNS columns. A stride of an odd number of cache lines (`padded_width`) keeps the rows
// of a panel of B in different sets of the L1 cache.

namespace deepkern::DEEPKERN_ISA {
namespace {

#if defined(DEEPKERN_AVX512)
constexpr int TILE_ROWS = 12;
#else
constexpr int TILE_ROWS = 6;
#endif
constexpr int TILE_COLUMNS = 2 * LANES;

enum class Left { rows, transposed };  // a(m, k) is a[m * stride + k] or a[k * stride + m]
enum class Into { overwrite, add };

// `scale`: [ROWS] factors of C, or null.
template <int ROWS, Left left>
void product_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                  int64_t ldc, Into into, const float* scale) {
  Floats sum[ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    sum[r][0] = sum[r][1] = Floats{};
    if (into == Into::add) {
      sum[r][0] = load_vector<Floats>(c + r * ldc);
      sum[r][1] = load_vector<Floats>(c + r * ldc + LANES);
    }
    if (scale != nullptr) {
      sum[r][0] *= scale[r];
      sum[r][1] *= scale[r];
    }
  }
  for (int64_t i = 0; i < k; ++i) {
    const Floats b0 = load_vector<Floats>(b), b1 = load_vector<Floats>(b + LANES);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const Floats x = broadcast(left == Left::rows ? a[r * lda] : a[r]);
      sum[r][0] = fma(x, b0, sum[r][0]);
      sum[r][1] = fma(x, b1, sum[r][1]);
    }
    a += left == Left::rows ? 1 : lda;
    b += ldb;
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    store_vector(c + r * ldc, sum[r][0]);
    store_vector(c + r * ldc + LANES, sum[r][1]);
  }
}

// C[m, n] (+)= A[m, k]·B[k, n]. With `scale` [m] and Into::add, rows of C are multiplied before.
// A panel of TILE_COLUMNS columns of B stays in the L1 cache for all rows of A.
template <Left left>
void product(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix c, Into into,
             const float* scale = nullptr) {
  const int64_t row_step = left == Left::rows ? a.stride : 1;
  for (int64_t column = 0; column < n; column += TILE_COLUMNS) {
    int64_t row = 0;
    const auto tiles = [&](auto rows) {
      for (; row + rows.value <= m; row += rows.value) {
        product_tile<rows.value, left>(k, a.data + row * row_step, a.stride, b.data + column,
                                       b.stride, c.from(row, column).data, c.stride, into,
                                       scale == nullptr ? nullptr : scale + row);
      }
    };
    tiles(Rows<TILE_ROWS>());
    tiles(Rows<4>());
    tiles(Rows<2>());
    tiles(Rows<1>());
  }
}

// Rows of tensors as floats.

// Reads `width` elements from x[offset]; writes zeros up to a multiple of LANES.
template <Real type>
DEEPKERN_INLINE void load_row(const void* x, int64_t offset, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) store_vector(out + i, load_floats<type>(x, offset + i));
  if (i < width) store_vector(out + i, load_first_floats<type>(x, offset + i, width - i));
}

// Writes factor * x[0 : width] to out[offset].
template <Real type>
DEEPKERN_INLINE void store_row(void* out, int64_t offset, int64_t width, const float* x,
                               float factor) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    store_floats<type>(out, offset + i, load_vector<Floats>(x + i) * factor);
  }
  for (; i < width; ++i) deepkern::store<type>(out, offset + i, x[i] * factor);
}

// `row`: 8 pointers to 8 floats.
DEEPKERN_INLINE void transpose_8x8(const float* const* row, int64_t column, Matrix out) {
#if defined(DEEPKERN_AVX512) || defined(DEEPKERN_AVX2)
  __m256 pair[8], quad[8];
  for (int i = 0; i < 8; i += 2) {  // columns 0, 1, 4, 5 and 2, 3, 6, 7 of two rows
    const __m256 even = _mm256_loadu_ps(row[i] + column);
    const __m256 odd = _mm256_loadu_ps(row[i + 1] + column);
    pair[i] = _mm256_unpacklo_ps(even, odd);
    pair[i + 1] = _mm256_unpackhi_ps(even, odd);
  }
  for (int i = 0; i < 8; i += 4) {  // columns i and i + 4 of four rows
    for (int j = 0; j < 2; ++j) {
      quad[i + 2 * j] = _mm256_shuffle_ps(pair[i + j], pair[i + 2 + j], 0x44);
      quad[i + 2 * j + 1] = _mm256_shuffle_ps(pair[i + j], pair[i + 2 + j], 0xEE);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const __m256 low = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    const __m256 high = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
    _mm256_storeu_ps(out.row(i), low);
    _mm256_storeu_ps(out.row(i + 4), high);
  }
#else
  for (int c = 0; c < 8; ++c) {
    for (int r = 0; r < 8; ++r) out.row(c)[r] = row[r][column + c];
  }
#endif
}

// out[c, r] = x[r, c] for [rows, columns] of x, rows > 0. Columns of out up to a multiple of
// TILE_COLUMNS repeat the last row.
inline void transpose(int64_t rows, int64_t columns, Matrix x, Matrix out) {
  const int64_t padded = ceil_div(rows, TILE_COLUMNS) * TILE_COLUMNS;
  for (int64_t r = 0; r < padded; r += 8) {
    const float* row[8];
    for (int64_t i = 0; i < 8; ++i) row[i] = x.row(std::min(r + i, rows - 1));
    int64_t c = 0;
    for (; c + 8 <= columns; c += 8) transpose_8x8(row, c, out.from(c, r));
    for (; c < columns; ++c) {
      for (int i = 0; i < 8; ++i) out.row(c)[r + i] = row[i][c];
    }
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
