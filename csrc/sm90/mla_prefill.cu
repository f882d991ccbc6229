// Launches mla_prefill.cuh: encodes the tensor maps, writes the table of tiles, sets attributes.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "mla_prefill.cuh"
#include "tensor_map.h"

namespace deepkern {

using sm90::PrefillTile;

namespace {

// The map of x [rows, heads, dim], whose heads are `head_stride` values apart within a row.
bool encode_heads(CUtensorMap* map, const void* x, int64_t rows, int64_t heads, int64_t dim,
                  int64_t row_stride, int64_t head_stride) {
  const int64_t columns = (heads - 1) * head_stride + dim;
  const int64_t row_bytes = (rows > 1 ? row_stride : columns) * 2;
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, x, rows, columns, row_bytes, 2, 128);
}

}  // namespace

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
  const int64_t key_rows = std::max(p.Tk, 1);  // a map needs a row, of which nothing is loaded
  const bool encoded =
      encode_heads(&q, p.q, p.T, p.H, PrefillTile::QK_DIM, p.q_row_stride, p.q_head_stride) &&
      encode_heads(&k, p.k, key_rows, Hk, PrefillTile::QK_DIM, p.k_row_stride, p.k_head_stride) &&
      encode_heads(&v, p.v, key_rows, Hk, PrefillTile::V_DIM, p.v_row_stride, p.v_head_stride);
  if (!encoded) return "cuTensorMapEncodeTiled refused q, k or v";
  static std::atomic<uint64_t> prepared{0};  // whether the smem limit is set: one bit per device
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((prepared.load() & bit) == 0) {
    error = cudaFuncSetAttribute(sm90::mla_prefill, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(PrefillTile::SMEM_BYTES));
    if (error != cudaSuccess) return cudaGetErrorString(error);
    prepared.fetch_or(bit);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((p.num_boundaries + 1 + 3) / 4));
  config.blockDim = dim3(128);
  config.stream = cuda_stream;
  error = cudaLaunchKernelEx(&config, sm90::find_prefill_tiles, p);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  config.gridDim = dim3(static_cast<unsigned>(std::min(p.num_tiles * p.H, num_sms)));
  config.blockDim = dim3(PrefillTile::THREADS);
  config.dynamicSmemBytes = PrefillTile::SMEM_BYTES;
  error = cudaLaunchKernelEx(&config, sm90::mla_prefill, q, k, v, p);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace deepkern
