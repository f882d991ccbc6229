// The emulator's TMA tensor map: a matrix in global memory, and the box that one copy moves.
#pragma once

#include <cstdint>

namespace emulator {

struct TensorMap {
  char* base;
  uint64_t columns, rows;  // of the matrix, in elements
  uint64_t row_bytes;      // row stride
  uint32_t box_columns, box_rows;
  uint32_t element_bytes;
  bool swizzle;  // 128-byte swizzle

  uint32_t box_bytes() const { return box_columns * box_rows * element_bytes; }
};

}  // namespace emulator
