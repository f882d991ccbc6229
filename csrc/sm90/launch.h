// The host's side of csrc/sm90/*.cu, without CUDA's headers.
#pragma once

#include <string>

#include "../cpu/fp8_gemm_nt.h"
#include "choose.h"
#include "mla_arguments.h"

namespace deepkern {

// A product in any of its forms. `gemm` has the matrices of all groups one under another, K > 0,
// and no empty `out`; codes' rows start at multiples of 16 bytes.
struct Fp8Product {
  GemmForm form;
  Fp8Gemm gemm;
  int64_t M, N, groups;                    // M: rows of A, of each group if masked
  int64_t a_scale_group, b_scale_group;    // strides
  int64_t scale_blocks;                    // columns of the scales
  const int* sizes;                        // by form: group_index, masked_m or group_offsets
  int* lie;                                // contiguous: room for 2 * groups
};

// Launches it on the current device, which is a Hopper GPU; what went wrong, or "".
std::string launch_fp8_product(const Fp8Product& product, void* stream);
std::string launch_mla_decode(MlaArguments arguments, void* stream);

// Of the device's work as torch has it now; false if this torch has no CUDA.
bool current_stream(int device, void** stream);

}  // namespace deepkern
