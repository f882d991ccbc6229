// Launches the kernels of mla_prefill_backward: delta, tables of tiles, grad_q, grad_k and grad_v.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "mla_prefill_dkv.cuh"
#include "mla_prefill_launch.h"

namespace deepkern {
namespace {

// Allows the kernels their smem, once per device.
cudaError_t allow_smem(int device) {
  static std::atomic<uint64_t> prepared{0};  // one bit per device
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((prepared.load() & bit) != 0) return cudaSuccess;
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  cudaError_t error = cudaFuncSetAttribute(sm90::mla_prefill_dq, attribute,
                                           static_cast<int>(sm90::DqTile::SMEM_BYTES));
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(sm90::mla_prefill_dkv, attribute,
                               static_cast<int>(sm90::DkvTile::SMEM_BYTES));
  if (error == cudaSuccess) prepared.fetch_or(bit);
  return error;
}

cudaError_t launch_delta(const MlaPrefillBackwardArguments& p, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((int64_t{p.forward.T} * p.forward.H + 3) / 4));
  config.blockDim = dim3(128);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, sm90::mla_prefill_delta, p);
}

}  // namespace

std::string launch_mla_prefill_backward(const MlaPrefillBackwardArguments& args, void* stream) {
  const MlaPrefillArguments& p = args.forward;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (encoder() == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled";
  const int64_t Hk = p.H / p.heads_per_key;
  CUtensorMap grad_out, q, k, v;
  const bool encoded = encode_heads(&grad_out, args.grad_out, p.T, p.H, 128,
                                    args.grad_out_row_stride, args.grad_out_head_stride, 64) &&
                       encode_heads(&q, p.q, p.T, p.H, 192, p.q_row_stride, p.q_head_stride, 64) &&
                       encode_heads(&k, p.k, p.Tk, Hk, 192, p.k_row_stride, p.k_head_stride, 64) &&
                       encode_heads(&v, p.v, p.Tk, Hk, 128, p.v_row_stride, p.v_head_stride, 64);
  if (!encoded) return "cuTensorMapEncodeTiled refused grad_out, q, k or v";
  error = allow_smem(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const sm90::Boundaries queries{p.cu_seqlens_q, p.num_boundaries, p.T};
  const sm90::Boundaries keys{p.cu_seqlens_k, p.num_boundaries, p.Tk};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(384);
  config.stream = cuda_stream;
  if (p.T > 0) {
    error = launch_delta(args, cuda_stream);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    error = launch_find_prefill_tiles<sm90::QUERY_ROWS>(queries, keys, p.causal, p.tiles,
                                                        p.num_tiles, cuda_stream);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    config.gridDim = dim3(static_cast<unsigned>(std::min(p.num_tiles * p.H, num_sms)));
    config.dynamicSmemBytes = sm90::DqTile::SMEM_BYTES;
    error = cudaLaunchKernelEx(&config, sm90::mla_prefill_dq, grad_out, q, k, v, args);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  if (p.Tk > 0) {
    error = launch_find_prefill_tiles<sm90::DkvTile::KEYS>(keys, queries, false, args.key_tiles,
                                                           args.num_key_tiles, cuda_stream);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const int items = args.num_key_tiles * static_cast<int>(Hk);
    config.gridDim = dim3(static_cast<unsigned>(std::min(items, num_sms)));
    config.dynamicSmemBytes = sm90::DkvTile::SMEM_BYTES;
    error = cudaLaunchKernelEx(&config, sm90::mla_prefill_dkv, grad_out, q, k, v, args);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return "";
}

}  // namespace deepkern
