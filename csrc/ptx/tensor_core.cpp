// The products of tensor cores: D += A B^T, with float32 sums or with those of the hardware.
//
// How: codes are decoded to numbers, B as [K, N], so that the lanes of a vector are columns of D.
// Float32 sums multiply and add separately on every CPU, so that all give the same bits.
//
// Source: MMA-Sim (Xie, Wang, Yang, Yang: arXiv 2511.10909) for the sums of the hardware; that a
// product of zero takes no part in the largest exponent is from mmaemu 0.1.0, measured on an RTX
// 4060 (its source: Khattak and Mikaitis, arXiv 2512.07004).
#include "tensor_core.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "numbers.h"
#include "program.h"

#if defined(__x86_64__)
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

namespace deepkern::ptx {
namespace {

typedef float Float8 __attribute__((vector_size(32)));
typedef uint16_t Unaligned16 __attribute__((aligned(1), may_alias));
typedef uint32_t Unaligned32 __attribute__((aligned(1), may_alias));
typedef float Unaligned8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Unaligned4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef int32_t UnalignedInt8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));

constexpr int ZERO_EXPONENT = -10000;  // below that of any number, in sums of two as well
constexpr int LEAST_EXPONENT = -126;   // of an accumulator, and so of the alignment
constexpr uint32_t NAN_BITS = 0x7fffffff;

struct ByteTable {
  float values[256];
  explicit ByteTable(float (*decode)(uint8_t)) {
    for (int i = 0; i < 256; ++i) values[i] = decode(static_cast<uint8_t>(i));
  }
};

const float* byte_table(Element element) {
  static const ByteTable e4m3(e4m3_to_float), e5m2(e5m2_to_float);
  return element == Element::E4M3 ? e4m3.values : e5m2.values;
}

// out[i * K + k] = value of codes[i, k], or out[k * rows + i] if `transposed`.
template <typename Value>
inline __attribute__((always_inline)) void decode_with(Value value, int rows, int K,
                                                       bool transposed, float* out) {
  if (transposed) {
    for (int k = 0; k < K; ++k) {
      for (int i = 0; i < rows; ++i) out[k * rows + i] = value(i * K + k);
    }
  } else {
    for (int i = 0; i < rows * K; ++i) out[i] = value(i);
  }
}

FOR_EACH_CPU void decode_matrix(Element element, int rows, int K, const uint8_t* codes,
                                bool transposed, float* out) {
  const auto* halves = reinterpret_cast<const Unaligned16*>(codes);
  const auto* words = reinterpret_cast<const Unaligned32*>(codes);
  if (element == Element::F16) {
    decode_with([&](int i) { return f16_to_float(halves[i]); }, rows, K, transposed, out);
  } else if (element == Element::BF16) {
    decode_with([&](int i) { return bf16_to_float(halves[i]); }, rows, K, transposed, out);
  } else if (element == Element::TF32) {
    const auto value = [&](int i) { return bits_float(words[i] & 0xffffe000); };
    decode_with(value, rows, K, transposed, out);
  } else {
    const float* table = byte_table(element);
    decode_with([&](int i) { return table[codes[i]]; }, rows, K, transposed, out);
  }
}

// A macro, because a function that returns a vector depends on the CPU.
#define AT(pointer) (*(Unaligned8*)(pointer))

// d[ROWS, 8 VECTORS] += a[ROWS, K] * b[K, 8 VECTORS]; b and d are parts of matrices with N columns.
template <int ROWS, int VECTORS>
inline __attribute__((always_inline)) void multiply_tile(int N, int K, const float* a,
                                                         const float* b, float* d) {
  Float8 sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS * VECTORS; ++i) {
    sums[i / VECTORS][i % VECTORS] = AT(d + i / VECTORS * N + i % VECTORS * 8);
  }
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS * VECTORS; ++i) {
      const float x = a[i / VECTORS * K + k];
      const Float8 left = {x, x, x, x, x, x, x, x};
      sums[i / VECTORS][i % VECTORS] += left * AT(b + k * N + i % VECTORS * 8);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS * VECTORS; ++i) {
    AT(d + i / VECTORS * N + i % VECTORS * 8) = sums[i / VECTORS][i % VECTORS];
  }
}

template <int ROWS>
inline __attribute__((always_inline)) void multiply_rows(int N, int K, const float* a,
                                                         const float* b, float* d) {
  int n = 0;
  for (; n + 16 <= N; n += 16) multiply_tile<ROWS, 2>(N, K, a, b + n, d + n);
  if (n < N) multiply_tile<ROWS, 1>(N, K, a, b + n, d + n);
}

FOR_EACH_CPU void multiply_float32(int M, int N, int K, const float* a, const float* b, float* d) {
  int m = 0;
  for (; m + 4 <= M; m += 4) multiply_rows<4>(N, K, a + m * K, b, d + m * N);
  for (; m < M; ++m) multiply_rows<1>(N, K, a + m * K, b, d + m * N);
}

// A decoded operand of the sums of the hardware. Infinities and NaN are zeros in it.
struct Parts {
  std::vector<float> values;
  std::vector<int32_t> exponents;
  std::vector<uint8_t> special;  // of a row of A or a column of B: it has an infinity or NaN
};

int least_exponent(Element element) {
  switch (element) {
    case Element::E4M3:
      return -6;
    case Element::F16:
    case Element::E5M2:
      return -14;
    default:
      return -126;
  }
}

// Subnormal numbers have the exponent of the smallest normal one.
inline int exponent_of(float x, int least) {
  const uint32_t magnitude = float_bits(x) & 0x7fffffff;
  const int exponent = std::max(static_cast<int>(magnitude >> 23) - 127, least);
  return magnitude == 0 ? ZERO_EXPONENT : exponent;
}

// `x` is [rows, K] if `row` is K and `column` 1, else [K, rows].
Parts split(const std::vector<float>& x, Element element, int rows, int K, int row, int column) {
  Parts p{std::vector<float>(x.size()), std::vector<int32_t>(x.size()),
          std::vector<uint8_t>(rows)};
  const int least = least_exponent(element);
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < K; ++k) {
      const int at = i * row + k * column;
      const bool finite = std::isfinite(x[at]);
      p.values[at] = finite ? x[at] : 0;
      p.exponents[at] = finite ? exponent_of(x[at], least) : ZERO_EXPONENT;
      if (!finite) p.special[i] = 1;
    }
  }
  return p;
}

// 2^e of a normal double.
inline double power_of_two(int e) { return bits_double(static_cast<uint64_t>(e + 1023) << 52); }

// Rounded to `bits` fraction bits towards zero; a zero is +0.
inline __attribute__((always_inline)) float truncate(double x, int bits) {
  const int exponent =
      std::max(static_cast<int>(double_bits(x) >> 52 & 2047) - 1023, LEAST_EXPONENT);
  const double kept = __builtin_trunc(x * power_of_two(bits - exponent));
  return static_cast<float>(kept * power_of_two(exponent - bits) + 0.0);
}

constexpr int COLUMNS = 8;

// Products of FP8 values scaled to at most 13 fraction bits, truncated and added, exactly in float32
// and int32.
inline __attribute__((always_inline)) void add_narrow(const float* a, const float* b, int N, int k0,
                                                      int k1, const double* scale, double* totals) {
  // A scale that float32 does not hold is that of a block whose products are all 0.
  constexpr double LARGEST_SCALE = 0x1p113;
  Float8 factor;
  Int8 sums = {};
  for (int j = 0; j < COLUMNS; ++j) {
    factor[j] = static_cast<float>(std::min(scale[j], LARGEST_SCALE));
  }
  for (int k = k0; k < k1; ++k) {
    const float x = a[k];
    const Float8 left = {x, x, x, x, x, x, x, x};
    sums += __builtin_convertvector(left * AT(b + k * N) * factor, Int8);
  }
  for (int j = 0; j < COLUMNS; ++j) totals[j] += sums[j];
}

// Likewise for any products and up to 25 fraction bits, in float64: a product has at most 22 bits,
// a scaled one is below 2^28, and a sum of 32 has at most 33 bits.
inline __attribute__((always_inline)) void add_wide(const float* a, const float* b, int N, int k0,
                                                    int k1, const double* scale, double* totals) {
  Double4 factor[2], sums[2] = {};
  for (int j = 0; j < COLUMNS; ++j) factor[j / 4][j % 4] = scale[j];
  for (int k = k0; k < k1; ++k) {
    const double x = a[k];
    const Double4 left = {x, x, x, x};
    for (int half = 0; half < 2; ++half) {
      const Double4 right =
          __builtin_convertvector(*(Unaligned4*)(b + k * N + 4 * half), Double4);
      const Int4 kept = __builtin_convertvector(left * right * factor[half], Int4);
      sums[half] += __builtin_convertvector(kept, Double4);
    }
  }
  for (int j = 0; j < COLUMNS; ++j) totals[j] += sums[j / 4][j % 4];
}

// sums[j] = c[j] + the products k0 <= k < k1 of one row of A and COLUMNS columns of B, as one sum
// without rounding: every term is aligned to the largest exponent and truncated.
inline __attribute__((always_inline)) void fused_sums(const float* a, const int32_t* a_exponents,
                                                      const float* b, const int32_t* b_exponents,
                                                      int N, int k0, int k1, int fraction_bits,
                                                      int least, bool narrow, const float* c,
                                                      double* sums) {
  Int8 largest;
  for (int j = 0; j < COLUMNS; ++j) {
    largest[j] = std::max(exponent_of(c[j], least), LEAST_EXPONENT);
  }
  for (int k = k0; k < k1; ++k) {
    const Int8 exponents = a_exponents[k] + *(UnalignedInt8*)(b_exponents + k * N);
    largest = exponents > largest ? exponents : largest;
  }
  double scale[COLUMNS], totals[COLUMNS];
  for (int j = 0; j < COLUMNS; ++j) {
    scale[j] = power_of_two(fraction_bits - largest[j]);
    totals[j] = __builtin_trunc(c[j] * scale[j]);
  }
  if (narrow) {
    add_narrow(a, b, N, k0, k1, scale, totals);
  } else {
    add_wide(a, b, N, k0, k1, scale, totals);
  }
  for (int j = 0; j < COLUMNS; ++j) sums[j] = totals[j] * power_of_two(largest[j] - fraction_bits);
}

// The sum by the rules of IEEE; the result is wanted only where it is infinite or NaN.
float special_sum(const float* a, const float* b, int N, int k0, int k1, float c) {
  double sum = c;
  for (int k = k0; k < k1; ++k) sum += double{a[k]} * double{b[k * N]};
  if (std::isnan(sum)) return bits_float(NAN_BITS);
  return std::isinf(sum) ? static_cast<float>(sum) : 0.0f;
}

inline __attribute__((always_inline)) void round_results(const double* exact, const Sums& sums,
                                                         float* d) {
  if (sums.f16) {
    for (int j = 0; j < COLUMNS; ++j) {
      const auto code = static_cast<uint16_t>(encode(exact[j] + 0.0, F16, Rounding::RN));
      d[j] = f16_to_float(code);
    }
    return;
  }
  // Truncation clears bits of a double whose exponent is one of float32, or which is 0.
  const uint64_t mask = ~uint64_t{0} << (52 - sums.result_bits);
  constexpr uint64_t LEAST = static_cast<uint64_t>(LEAST_EXPONENT + 1023) << 52;
  int subnormal = 0;
  for (int j = 0; j < COLUMNS; ++j) {
    const uint64_t bits = double_bits(exact[j]), magnitude = bits & ~uint64_t{0} >> 1;
    subnormal |= magnitude < LEAST && magnitude != 0;
    d[j] = static_cast<float>(bits_double(bits & mask) + 0.0);
  }
  if (!subnormal) return;
  for (int j = 0; j < COLUMNS; ++j) d[j] = truncate(exact[j], sums.result_bits);
}

// Replaces results by those of special_sum where an operand is infinite or NaN.
void correct_special(const float* a, const float* b, int N, int k0, int k1, const float* c,
                     bool special_row, const uint8_t* special_columns, float* d) {
  for (int j = 0; j < COLUMNS; ++j) {
    if (!special_row && !special_columns[j] && std::isfinite(c[j])) continue;
    const float special = special_sum(a, b + j, N, k0, k1, c[j]);
    if (special != 0) d[j] = special;
  }
}

// d[0] to d[COLUMNS - 1] of row m, columns n and up.
inline __attribute__((always_inline)) void multiply_cells(int m, int n, int N, int K,
                                                          const Parts& A, const Parts& B,
                                                          const float* left, const float* right,
                                                          const Sums& sums, float* d) {
  const int block = sums.block ? sums.block : K, least = sums.f16 ? -14 : LEAST_EXPONENT;
  const bool narrow = sums.fraction_bits <= 13;
  double exact[COLUMNS];
  float c[COLUMNS], finite[COLUMNS];
  for (int k = 0; k < K; k += block) {
    const int end = std::min(k + block, K);
    uint32_t special = A.special[m];
    for (int j = 0; j < COLUMNS; ++j) {
      const uint32_t infinite = (float_bits(d[j]) & 0x7f800000) == 0x7f800000;
      c[j] = d[j];
      finite[j] = bits_float(float_bits(d[j]) & (infinite - 1));
      special |= B.special[n + j] | infinite;
    }
    fused_sums(&A.values[m * K], &A.exponents[m * K], &B.values[n], &B.exponents[n], N, k, end,
               sums.fraction_bits, least, narrow, finite, exact);
    round_results(exact, sums, d);
    if (special) {
      correct_special(left + m * K, right + n, N, k, end, c, A.special[m], &B.special[n], d);
    }
  }
}

FOR_EACH_CPU void multiply_hardware(int M, int N, int K, const Parts& A, const Parts& B,
                                    const float* left, const float* right, const Sums& sums,
                                    float* D) {
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; n += COLUMNS) {
      multiply_cells(m, n, N, K, A, B, left, right, sums, D + m * N + n);
    }
  }
}

void finish_float32(int count, float* D, const Sums& sums) {
  for (int i = 0; i < count; ++i) {
    if (sums.f16) D[i] = f16_to_float(float_to_f16_rn(D[i]));
    if (std::isnan(D[i])) D[i] = bits_float(NAN_BITS);
  }
}

}  // namespace

Sums hardware_sums(int target, Unit unit, Element a) {
  const bool fp8 = a == Element::E4M3 || a == Element::E5M2;
  const int blackwell = 100, hopper = 90, ada = 89;
  Sums sums;
  sums.fraction_bits = target < hopper ? 24 : 25;
  sums.block = fp8 ? 32 : a == Element::TF32 ? 8 : 16;  // 32 bytes
  if (unit == Unit::MMA) {
    const bool known = target == ada || target >= 120 || !fp8;
    if (target < 80 || !known) {
      throw InvalidProgram("mma.sync on sm_" + std::to_string(target) +
                           ": the sums of its hardware are not known");
    }
    if (target < hopper) sums.block /= 2;  // up to Ada
    if (target == ada && fp8) sums.fraction_bits = sums.result_bits = 13;
  } else if (unit == Unit::WGMMA && target >= hopper && target < blackwell) {
    if (fp8) sums.fraction_bits = sums.result_bits = 13;
  } else if (unit != Unit::TCGEN05 || target < blackwell || target >= 120) {
    throw InvalidProgram("sm_" + std::to_string(target) + " does not have this matrix instruction");
  }
  return sums;
}

void multiply_add(int M, int N, int K, Element a, Element b, const uint8_t* A, const uint8_t* B,
                  float* D, const Sums& sums) {
  thread_local std::vector<float> left, right;
  left.resize(static_cast<size_t>(M) * K);
  right.resize(static_cast<size_t>(N) * K);
  decode_matrix(a, M, K, A, false, left.data());
  decode_matrix(b, N, K, B, true, right.data());
  if (sums.fraction_bits) {
    const Parts x = split(left, a, M, K, K, 1), y = split(right, b, N, K, 1, N);
    multiply_hardware(M, N, K, x, y, left.data(), right.data(), sums, D);
  } else {
    multiply_float32(M, N, K, left.data(), right.data(), D);
    finish_float32(M * N, D, sums);
  }
}

void multiply_add(int M, int N, int K, Element a, Element b, const uint8_t* A, const uint8_t* B,
                  int32_t* D) {
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      auto sum = static_cast<uint32_t>(D[m * N + n]);  // unsigned sums wrap around
      for (int k = 0; k < K; ++k) {
        const uint8_t x = A[m * K + k], y = B[n * K + k];
        const int left = a == Element::S8 ? static_cast<int8_t>(x) : x;
        const int right = b == Element::S8 ? static_cast<int8_t>(y) : y;
        sum += static_cast<uint32_t>(left * right);
      }
      D[m * N + n] = static_cast<int32_t>(sum);
    }
  }
}

}  // namespace deepkern::ptx
