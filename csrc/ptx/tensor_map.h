// The content of a CUtensorMap (128 bytes, opaque to kernels) as this machine's libcuda encodes it.
#pragma once

#include <cstdint>

namespace deepkern::ptx {

struct alignas(64) TensorMap {
  static constexpr uint64_t MAGIC = 0x70616d726f736e74;  // tells a tensor map from other bytes
  uint64_t magic;
  uint64_t address;
  uint64_t stride[4];        // bytes, of dimensions 1 and up; dimension 0 is contiguous
  uint32_t size_minus_1[5];  // elements; dimension 0 is the innermost
  uint16_t box[5];           // elements
  uint8_t element_stride[5];
  uint8_t rank;
  uint8_t type;        // CUtensorMapDataType
  uint8_t interleave;  // CUtensorMapInterleave
  uint8_t swizzle;     // CUtensorMapSwizzle
  uint8_t fill_nan;    // outside the tensor: zero or, for floats, NaN
  uint8_t element_bytes;
};
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap has 128 bytes");

}  // namespace deepkern::ptx
