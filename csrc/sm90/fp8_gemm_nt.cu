// The tiles of fp8_gemm_nt that are compiled for sm_90a.
#include "fp8_gemm_nt.cuh"

#define COMPILE(GROUPS, BLOCK_N, STAGES, CLUSTER)                                              \
  template SM90_KERNEL(128 * (GROUPS + 1), 1) void                                             \
      sm90::fp8_gemm_nt<GROUPS, BLOCK_N, STAGES, CLUSTER>(                                     \
          SM90_PARAMETER TensorMap, SM90_PARAMETER TensorMap, SM90_PARAMETER TensorMap,        \
          SM90_PARAMETER GemmArguments);

COMPILE(2, 128, 4, 1)
COMPILE(2, 128, 4, 2)
COMPILE(1, 64, 6, 1)
