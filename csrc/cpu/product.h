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

DEEPKERN_INLINE void transpose_8x8(Matrix x, Matrix out) {
#if defined(DEEPKERN_AVX512) || defined(DEEPKERN_AVX2)
  __m256 row[8], pair[8], quad[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(x.data + i * x.stride);
  for (int i = 0; i < 8; i += 2) {  // columns 0, 1, 4, 5 and 2, 3, 6, 7 of two rows
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
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
    _mm256_storeu_ps(out.data + i * out.stride, low);
    _mm256_storeu_ps(out.data + (i + 4) * out.stride, high);
  }
#else
  for (int c = 0; c < 8; ++c) {
    for (int r = 0; r < 8; ++r) out.data[c * out.stride + r] = x.data[r * x.stride + c];
  }
#endif
}

// out[c, r] = x[r, c] for [rows, columns] of x. Writes zeros up to a multiple of TILE_COLUMNS rows.
inline void transpose(int64_t rows, int64_t columns, Matrix x, Matrix out) {
  constexpr int BLOCK = 8;
  const int64_t padded = (rows + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
  for (int64_t r = 0; r < padded; r += BLOCK) {
    int64_t c = 0;
    if (r + BLOCK <= rows) {
      for (; c + BLOCK <= columns; c += BLOCK) transpose_8x8(x.from(r, c), out.from(c, r));
    }
    for (; c < columns; ++c) {
      for (int64_t i = r; i < r + BLOCK; ++i) {
        out.from(c, i).data[0] = i < rows ? x.from(i, c).data[0] : 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
