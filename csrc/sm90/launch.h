// The host's side of csrc/sm90/*.cu, without CUDA's headers.
#pragma once

#include <string>

#include "../cpu/fp8_gemm_nt.h"

namespace deepkern {

// Launches gemm on the current device, which is a Hopper GPU; what went wrong, or "". The codes'
// rows start at multiples of 16 bytes, b has a scale per 128 rows, K > 0, and out is not empty.
std::string launch_fp8_gemm_nt(const Fp8Gemm& gemm, void* stream);

}  // namespace deepkern
