// Tensor-core arithmetic of PTX: mma.sync, wgmma, and the product that tcgen05 shares with them.
//
// Source: PTX ISA 9.0, sections 9.7.15 (mma), 9.7.16 (wgmma). The sums of the hardware are those of
// MMA-Sim (Xie, Wang, Yang, Yang: arXiv 2511.10909): a block of products and the accumulator are
// aligned to the largest exponent, truncated to `fraction_bits` and added.
#pragma once

#include <cstdint>

#include "matrix_descriptor.h"

namespace deepkern::ptx {

// How an accumulator and its products are added.
struct Sums {
  int fraction_bits = 0;  // kept below the largest exponent; 0: float32 sums in the order of k
  int block = 0;          // products that are added at once; 0: all of them
  int result_bits = 23;   // fraction bits of the result
  bool f16 = false;       // the accumulators are f16, which a result is rounded to
};

constexpr Sums FLOAT32 = {};

enum class Unit { MMA, WGMMA, TCGEN05 };

// The sums of the hardware of sm_`target`. Throws InvalidProgram where they are not published:
// mma.sync of FP8 on sm_90 and sm_100, which ptxas translates into several f16 instructions.
Sums hardware_sums(int target, Unit unit, Element a);

// D[M, N] += A[M, K] * B[N, K]^T. A and B are codes in rows without gaps. N is a multiple of 8.
// tf32 is truncated to its 19 bits. NaN results are 0x7fffffff.
void multiply_add(int M, int N, int K, Element a, Element b, const uint8_t* A, const uint8_t* B,
                  float* D, const Sums& sums);

// Likewise for s8 and u8; the sums wrap around.
void multiply_add(int M, int N, int K, Element a, Element b, const uint8_t* A, const uint8_t* B,
                  int32_t* D);

enum class Accumulators { F32, F16, S32 };

// mma.sync.m16n8kK.row.col: K elements are 16 or 32 bytes.
struct MmaShape {
  int K;
  Element a, b;
  Accumulators accumulators = Accumulators::F32;
};

// Each pointer holds one register of the fragment in 32 lanes. A has 2 or 4 registers, B half as
// many, C and D 4, or 2 for f16. d may be c.
void mma_sync(const MmaShape& shape, const uint32_t* const* a, const uint32_t* const* b,
              const uint32_t* const* c, uint32_t* const* d, Sums sums);

// wgmma.mma_async.m64nNkK: K elements are 32 bytes.
struct WgmmaShape {
  int N, K;
  Element a, b;
  Accumulators accumulators = Accumulators::F32;
  bool negate_a = false, negate_b = false;      // imm-scale-a, imm-scale-b are -1
  bool a_mn_major = false, b_mn_major = false;  // imm-trans-a, imm-trans-b
};

// The part of one warp of the four: rows 16 * warp to 16 * warp + 15. d has N / 2 registers, or N /
// 4 for f16. A is in 4 registers if `a` is not null, else in shared memory at a_descriptor. The
// accumulators are not read unless `accumulate` (scale-d).
void wgmma(const WgmmaShape& shape, int warp, const uint32_t* const* a, uint64_t a_descriptor,
           uint64_t b_descriptor, uint32_t* const* d, bool accumulate, const SharedReader& shared,
           Sums sums);

// ldmatrix and stmatrix .m8n8.b16: rows[8 i + r] is row r (16 bytes) of matrix i, and d[i] or s[i]
// its register in 32 lanes.
void ldmatrix(int matrices, bool transposed, const uint8_t* const* rows, uint32_t* const* d);
void stmatrix(int matrices, bool transposed, uint8_t* const* rows, const uint32_t* const* s);

}  // namespace deepkern::ptx
