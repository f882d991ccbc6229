// Matrix fragments: which element of a matrix each lane and register of a warp holds.
//
// How: in a fragment of A or B with elements of any size, register r of lane l holds 4 bytes: row
// l / 4 (+ 8 for odd r of A), bytes 4 * (l % 4) and up of the row's K elements (+ 16 for the upper
// half of K). An accumulator holds columns 2 * (l % 4) and the next one of row l / 4, then of row
// l / 4 + 8, then 8 columns further.
//
// Source: PTX ISA 9.0, sections 9.7.15.5 (fragments of mma.m16n8k*, ldmatrix, stmatrix) and
// 9.7.16.5.1 (register fragments of wgmma).
#include <cstring>
#include <vector>

#include "numbers.h"
#include "program.h"
#include "tensor_core.h"

namespace deepkern::ptx {
namespace {

constexpr int MAX_ROW_BYTES = 32;

void gather_a(const uint32_t* const* a, int row_bytes, uint8_t* codes) {
  for (int r = 0; r < row_bytes / 8; ++r) {
    for (int lane = 0; lane < LANES; ++lane) {
      const int row = lane / 4 + r % 2 * 8, byte = lane % 4 * 4 + r / 2 * 16;
      std::memcpy(codes + row * row_bytes + byte, &a[r][lane], 4);
    }
  }
}

void gather_b(const uint32_t* const* b, int row_bytes, uint8_t* codes) {
  for (int r = 0; r < row_bytes / 16; ++r) {
    for (int lane = 0; lane < LANES; ++lane) {
      std::memcpy(codes + lane / 4 * row_bytes + lane % 4 * 4 + r * 16, &b[r][lane], 4);
    }
  }
}

// The first of the two columns of pair `p` of a lane, and their row.
int pair_column(int lane, int p) { return p / 2 * 8 + lane % 4 * 2; }
int pair_row(int lane, int p) { return lane / 4 + p % 2 * 8; }

// D[16, N] of one warp; a register holds one float32 or a pair of f16.
void gather_accumulators(const uint32_t* const* c, int N, bool f16, float* D) {
  for (int p = 0; p < N / 4; ++p) {
    for (int lane = 0; lane < LANES; ++lane) {
      float* cell = D + pair_row(lane, p) * N + pair_column(lane, p);
      if (f16) {
        cell[0] = f16_to_float(static_cast<uint16_t>(c[p][lane]));
        cell[1] = f16_to_float(static_cast<uint16_t>(c[p][lane] >> 16));
      } else {
        cell[0] = bits_float(c[2 * p][lane]);
        cell[1] = bits_float(c[2 * p + 1][lane]);
      }
    }
  }
}

void scatter_accumulators(const float* D, int N, bool f16, uint32_t* const* d) {
  for (int p = 0; p < N / 4; ++p) {
    for (int lane = 0; lane < LANES; ++lane) {
      const float* cell = D + pair_row(lane, p) * N + pair_column(lane, p);
      if (f16) {
        d[p][lane] = float_to_f16_rn(cell[0]) | uint32_t{float_to_f16_rn(cell[1])} << 16;
      } else {
        d[2 * p][lane] = float_bits(cell[0]);
        d[2 * p + 1][lane] = float_bits(cell[1]);
      }
    }
  }
}

// Integer accumulators pass through the same gather and scatter as bits.
void multiply_integers(int M, int N, int K, Element a, Element b, const uint8_t* A,
                       const uint8_t* B, float* D) {
  std::vector<int32_t> sums(static_cast<size_t>(M) * N);
  std::memcpy(sums.data(), D, sums.size() * 4);
  multiply_add(M, N, K, a, b, A, B, sums.data());
  std::memcpy(D, sums.data(), sums.size() * 4);
}

void multiply(int M, int N, int K, Element a, Element b, Accumulators accumulators,
              const uint8_t* A, const uint8_t* B, float* D, Sums sums) {
  if (accumulators == Accumulators::S32) {
    multiply_integers(M, N, K, a, b, A, B, D);
    return;
  }
  sums.f16 = accumulators == Accumulators::F16;
  if (sums.f16) sums.result_bits = 23;
  multiply_add(M, N, K, a, b, A, B, D, sums);
}

}  // namespace

void mma_sync(const MmaShape& shape, const uint32_t* const* a, const uint32_t* const* b,
              const uint32_t* const* c, uint32_t* const* d, Sums sums) {
  constexpr int M = 16, N = 8;
  const int row_bytes = shape.K * element_bytes(shape.a);
  const bool f16 = shape.accumulators == Accumulators::F16;
  uint8_t left[M * MAX_ROW_BYTES], right[N * MAX_ROW_BYTES];
  float D[M * N];
  gather_a(a, row_bytes, left);
  gather_b(b, row_bytes, right);
  gather_accumulators(c, N, f16, D);
  multiply(M, N, shape.K, shape.a, shape.b, shape.accumulators, left, right, D, sums);
  scatter_accumulators(D, N, f16, d);
}

void wgmma(const WgmmaShape& shape, int warp, const uint32_t* const* a, uint64_t a_descriptor,
           uint64_t b_descriptor, uint32_t* const* d, bool accumulate, const SharedReader& shared,
           Sums sums) {
  constexpr int M = 64, rows = 16;
  const int N = shape.N;
  const bool f16 = shape.accumulators == Accumulators::F16;
  uint8_t left[M * MAX_ROW_BYTES], right[256 * MAX_ROW_BYTES];
  uint8_t* own = left + warp * rows * MAX_ROW_BYTES;
  if (a) {
    gather_a(a, MAX_ROW_BYTES, own);
  } else {
    read_operand(read_wgmma_descriptor(a_descriptor, "wgmma: A"), M, shape.a, shape.a_mn_major,
                 shared, "wgmma: A", left);
  }
  read_operand(read_wgmma_descriptor(b_descriptor, "wgmma: B"), N, shape.b, shape.b_mn_major,
               shared, "wgmma: B", right);
  if (shape.negate_a) negate(shape.a, own, rows * MAX_ROW_BYTES);
  if (shape.negate_b) negate(shape.b, right, N * MAX_ROW_BYTES);
  std::vector<float> D(static_cast<size_t>(rows) * N);
  if (accumulate) gather_accumulators(d, N, f16, D.data());
  multiply(rows, N, shape.K, shape.a, shape.b, shape.accumulators, own, right, D.data(), sums);
  scatter_accumulators(D.data(), N, f16, d);
}

void ldmatrix(int matrices, bool transposed, const uint8_t* const* rows, uint32_t* const* d) {
  for (int i = 0; i < matrices; ++i) {
    for (int lane = 0; lane < LANES; ++lane) {
      uint16_t pair[2];
      for (int j = 0; j < 2; ++j) {
        int row = lane / 4, column = lane % 4 * 2 + j;
        if (transposed) std::swap(row, column);
        std::memcpy(&pair[j], rows[8 * i + row] + 2 * column, 2);
      }
      d[i][lane] = pair[0] | uint32_t{pair[1]} << 16;
    }
  }
}

void stmatrix(int matrices, bool transposed, uint8_t* const* rows, const uint32_t* const* s) {
  for (int i = 0; i < matrices; ++i) {
    for (int lane = 0; lane < LANES; ++lane) {
      for (int j = 0; j < 2; ++j) {
        int row = lane / 4, column = lane % 4 * 2 + j;
        if (transposed) std::swap(row, column);
        const auto code = static_cast<uint16_t>(s[i][lane] >> (16 * j));
        std::memcpy(rows[8 * i + row] + 2 * column, &code, 2);
      }
    }
  }
}

}  // namespace deepkern::ptx
