// Launches mla_decode.cuh: encodes the tensor maps, sets launch attributes, combines the splits.
#include "mla_decode.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "tensor_map.h"

namespace deepkern {

using sm90::MlaTile;

namespace {

// By format of the cache (1: FP8) and whether indices name the tokens (2).
constexpr decltype(&sm90::mla_decode<false, false>) KERNELS[] = {
    sm90::mla_decode<false, false>, sm90::mla_decode<true, false>, sm90::mla_decode<false, true>,
    sm90::mla_decode<true, true>};

}  // namespace

std::string launch_mla_decode(MlaArguments p, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  int num_sms = 0;
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (encoder() == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled";
  CUtensorMap map{}, q_map;
  if (!encode(&q_map, CU_TENSOR_MAP_DATA_TYPE_UINT16, p.q, int64_t{p.batch} * p.Sq * p.H,
              MlaTile::WIDTH, p.q_row_stride * 2, 2, MlaTile::ROWS)) {
    return "cuTensorMapEncodeTiled refused q";
  }
  if (p.by_tma) {
    if (!encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, p.cache, p.tma_rows(), MlaTile::WIDTH,
                p.token_stride * 2, 2, MlaTile::TOKENS)) {
      return "cuTensorMapEncodeTiled refused the cache";
    }
  }
  static std::atomic<uint64_t> prepared{0};  // whether the smem limit is set: one bit per device
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((prepared.load() & bit) == 0) {
    for (const auto kernel : KERNELS) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(MlaTile::SMEM_BYTES));
      if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    prepared.fetch_or(bit);
  }
  cudaLaunchConfig_t config{};
  // At most one block per SM.
  config.gridDim = dim3(static_cast<unsigned>(
      std::min<int64_t>(int64_t{p.batch} * p.row_tiles * p.num_splits, num_sms)));
  config.blockDim = dim3(MlaTile::THREADS);
  config.dynamicSmemBytes = MlaTile::SMEM_BYTES;
  config.stream = cuda_stream;
  const auto kernel = KERNELS[p.fp8 + 2 * p.sparse];
  error = cudaLaunchKernelEx(&config, kernel, map, q_map, p);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (p.num_splits == 1) return "";

  // mla_combine may start while the last blocks still run; it waits for their results.
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.batch * ((p.Sq * p.H + 3) / 4)));
  config.blockDim = dim3(128);
  config.stream = cuda_stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, sm90::mla_combine, p);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace deepkern
