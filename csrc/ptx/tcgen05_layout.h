// tcgen05: tensor memory, instruction descriptors, and the product of tcgen05.mma.
//
// Source: PTX ISA 9.0, section 9.7.17 (tcgen05): 9.7.17.2.3 (shapes of ld and st), 9.7.17.4.2
// (instruction descriptor), 9.7.17.10.5 (data path layouts D and F).
#pragma once

#include <cstdint>

#include "tensor_core.h"

namespace deepkern::ptx {

constexpr int TENSOR_LANES = 128, TENSOR_COLUMNS = 512;

// The tensor memory of a multiprocessor. `touch` is called for each block of cells that is read or
// written, before that; it may be null. A read-modify-write is a read and a write.
struct TensorMemory {
  uint32_t* cells;  // [TENSOR_LANES][TENSOR_COLUMNS]
  void (*touch)(void* context, int lane, int lanes, int column, int columns, bool write) = nullptr;
  void* context = nullptr;

  uint32_t* row(int lane) const { return cells + lane * TENSOR_COLUMNS; }
};

// An address has the lane in its upper half, the column in its lower half.
constexpr int lane_of(uint32_t address) { return static_cast<int>(address >> 16); }
constexpr int column_of(uint32_t address) { return static_cast<int>(address & 0xffff); }

enum class TensorShape { T32x32b, T16x64b, T16x128b, T16x256b, T16x32bx2 };

struct TensorCell {
  int lane, column;  // relative to the instruction's address, the lane of which is 32 * warp + ...
};

// Registers that tcgen05.ld and st move for each thread with .x`number`.
int tensor_registers(TensorShape shape, int number);

// The cell of register `reg` of lane `lane`. `half_offset` is immHalfSplitoff of .16x32bx2: the
// columns between what lanes 0 to 15 and what lanes 16 to 31 access in the same 16 rows.
TensorCell tensor_cell(TensorShape shape, int lane, int reg, int half_offset = 0);

// kind::f16, kind::tf32, kind::f8f6f4.
enum class TensorKind { F16, TF32, F8F6F4 };

struct TensorInstruction {
  Element a, b;
  int M, N, K;
  bool negate_a, negate_b, a_mn_major, b_mn_major;
};

// Throws OperandError for what is not valid or not supported (with cta_group::1): sparse matrices,
// saturation, elements of 4 and 6 bits, f16 accumulators.
TensorInstruction read_instruction_descriptor(uint32_t descriptor, TensorKind kind);

// D[M, N] (+)= A B^T in tensor memory at address d, with float32 accumulators. A is in tensor
// memory at the address `a` if `a_in_tensor_memory`, else in shared memory at the descriptor `a`.
// D is not read unless `accumulate`.
void tcgen05_mma(const TensorInstruction& instruction, uint32_t d, bool a_in_tensor_memory,
                 uint64_t a, uint64_t b, bool accumulate, const SharedReader& shared,
                 const TensorMemory& tensor, const Sums& sums);

// Touches what that reads and writes, without the product.
void touch_tcgen05_mma(const TensorInstruction& instruction, uint32_t d, bool a_in_tensor_memory,
                       uint64_t a, uint64_t b, bool accumulate, const SharedReader& shared,
                       const TensorMemory& tensor);

}  // namespace deepkern::ptx
