// Operands of wgmma and tcgen05.mma in shared memory, which a 64-bit matrix descriptor gives.
//
// Source: PTX ISA 9.0, sections 9.7.16.5.1 (wgmma: shared memory matrix layout), 9.7.17.4.1
// (tcgen05: shared memory descriptor).
#pragma once

#include <cstdint>
#include <stdexcept>

namespace deepkern::ptx {

enum class Element { F16, BF16, TF32, E4M3, E5M2, S8, U8 };

constexpr int element_bytes(Element element) {
  return element == Element::TF32 ? 4 : element <= Element::BF16 ? 2 : 1;
}

// The shared memory of a block. `touch` is called for each range of bytes that is read, before the
// read; it may be null.
struct SharedReader {
  const uint8_t* bytes;  // address 0 of the block's shared window
  uint32_t size;
  void (*touch)(void* context, uint32_t address, uint32_t bytes) = nullptr;
  void* context = nullptr;
};

// A descriptor or an operand in shared memory that is not valid.
struct OperandError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct MatrixDescriptor {
  uint32_t start;  // bytes, as the two offsets
  uint32_t leading, stride;
  uint32_t row_bytes;  // of the swizzle: 16 (none), 32, 64 or 128
};

// Throw OperandError for a descriptor with a field that is not valid or not supported; `what` names
// the operand in its message.
MatrixDescriptor read_wgmma_descriptor(uint64_t descriptor, const char* what);
MatrixDescriptor read_tcgen05_descriptor(uint64_t descriptor, const char* what);

// Reads a matrix of rows x 32 bytes (K elements) into codes[rows, 32]. In an MN-major matrix the
// rows, not the K elements of a row, are contiguous in shared memory. Throws OperandError if a part
// of it is outside the shared memory.
void read_operand(const MatrixDescriptor& descriptor, int rows, Element element, bool mn_major,
                  const SharedReader& shared, const char* what, uint8_t* codes);

// Changes the sign of each element.
void negate(Element element, uint8_t* codes, int bytes);

}  // namespace deepkern::ptx
