// Launches mla_prefill.cuh: encodes the tensor maps, writes the table of tiles, sets attributes.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "mla_prefill.cuh"
#include "mla_prefill_launch.h"

namespace deepkern {

using sm90::PrefillTile;

std::string launch_mla_prefill(const MlaPrefillArguments& p, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (encoder() == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled";
  CUtensorMap q, k, v;
  const int64_t Hk = p.H / p.heads_per_key;
  const bool encoded =
      encode_heads(&q, p.q, p.T, p.H, PrefillTile::QK_DIM, p.q_row_stride, p.q_head_stride, 128) &&
      encode_heads(&k, p.k, p.Tk, Hk, PrefillTile::QK_DIM, p.k_row_stride, p.k_head_stride, 128) &&
      encode_heads(&v, p.v, p.Tk, Hk, PrefillTile::V_DIM, p.v_row_stride, p.v_head_stride, 128);
  if (!encoded) return "cuTensorMapEncodeTiled refused q, k or v";
  static std::atomic<uint64_t> prepared{0};  // whether the smem limit is set: one bit per device
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((prepared.load() & bit) == 0) {
    error = cudaFuncSetAttribute(sm90::mla_prefill, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(PrefillTile::SMEM_BYTES));
    if (error != cudaSuccess) return cudaGetErrorString(error);
    prepared.fetch_or(bit);
  }
  error = launch_find_prefill_tiles<sm90::QUERY_ROWS>({p.cu_seqlens_q, p.num_boundaries, p.T},
                                                      {p.cu_seqlens_k, p.num_boundaries, p.Tk},
                                                      p.causal, p.tiles, p.num_tiles, cuda_stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchConfig_t config{};
  config.stream = cuda_stream;
  config.gridDim = dim3(static_cast<unsigned>(std::min(p.num_tiles * p.H, num_sms)));
  config.blockDim = dim3(PrefillTile::THREADS);
  config.dynamicSmemBytes = PrefillTile::SMEM_BYTES;
  error = cudaLaunchKernelEx(&config, sm90::mla_prefill, q, k, v, p);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace deepkern
