// Boxes of tensor maps, shared by copies and their tests.
#pragma once

#include <vector>

#include "machine.h"
#include "tensor_map.h"

namespace deepkern::ptx {

// One row of a box: contiguous in global memory; in shared memory its chunks of 16 bytes are
// permuted by the swizzle.
struct Row {
  uint64_t address;  // of the first byte inside the tensor
  uint32_t shared;   // offset of the row's first byte, before swizzling
  uint32_t skip;     // bytes of the row before the tensor begins
  uint32_t bytes;    // bytes inside the tensor
};

// 16-byte chunks of each 128-byte line of shared memory are permuted by the line's number.
// swizzle: CUtensorMapSwizzle, 0 to 3 for none, 32, 64 and 128 bytes.
uint32_t swizzled(uint32_t offset, int swizzle);
std::vector<Row> rows_of_box(const TensorMap& map, const int32_t* coordinates, uint32_t offset);
uint32_t box_bytes(const TensorMap& map);
void bind_bulk(Binder& binder);      // bulk_copy.cpp
bool bind_mbarrier(Binder& binder);  // mbarrier.cpp
// cp.async.mbarrier.arrive.noinc, in mbarrier.cpp.
Status arrive_after_copies(Warp& warp, const Instruction& i, uint32_t mask);

}  // namespace deepkern::ptx
