// Encodes tensor maps with the CUDA driver.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace deepkern {

// The driver's cuTensorMapEncodeTiled, or null. Looked up at run time; the package does not link to
// the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static void* const address = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &result);
    return result == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(address);
}

// Encodes a matrix [rows, columns] for boxes [box_rows, 128 bytes] with the 128-byte swizzle; false
// if the driver rejects it.
inline bool encode(CUtensorMap* map, CUtensorMapDataType type, const void* base, int64_t rows,
                   int64_t columns, int64_t row_bytes, int element_bytes, int box_rows) {
  const cuuint64_t shape[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / element_bytes),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  return encoder()(map, type, 2, const_cast<void*>(base), shape, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace deepkern
