// An FP8 matrix product with block scales as the cpu and cuda backends receive it:
// D = A·Bᵀ (+ C), with a scale for each 128 values of K.
#pragma once

#include <cstdint>

namespace deepkern {

// The types of unquantized tensors.
enum class Real { bf16, fp16, fp32 };

constexpr int64_t BLOCK = 128;  // values of K per scale

// e4m3 codes [rows, K]. The scale of row r and K block j is
// scale[r / rows_per_scale * scale_row_stride + j * scale_block_stride].
struct Fp8Matrix {
  const uint8_t* codes;
  int64_t rows;
  int64_t row_stride;  // bytes
  const float* scale;
  int64_t rows_per_scale;                        // 1 or 128
  int64_t scale_row_stride, scale_block_stride;  // floats
};

struct Fp8Gemm {
  Fp8Matrix a, b;
  int64_t K;
  const void* c;         // [a.rows, b.rows] of c_type, or null
  int64_t c_row_stride;  // elements
  Real c_type, out_type;
  void* out;  // [a.rows, b.rows] of out_type, contiguous
};

}  // namespace deepkern
