// Launches fp8_gemm.cuh: chooses a compiled tile, encodes tensor maps, sets launch attributes.
#include "fp8_gemm.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "launch.h"
#include "tensor_map.h"

namespace deepkern {
namespace {

using sm90::GemmArguments;
using sm90::TensorMap;

constexpr int MAX_DEVICES = 64;  // whose properties are cached

// The kernel of a compiled tile.
struct Kernel {
  void (*function)(TensorMap a, TensorMap b, TensorMap out, GemmArguments);
  int threads;
  uint32_t smem_bytes;
};

template <class Tile>
Kernel kernel_of() {
  return {&sm90::fp8_gemm<Tile>, Tile::THREADS, Tile::SMEM_BYTES};
}

// In the order of SM90_TILES.
const Kernel KERNELS[] = {
#define TILE(VARIANT, ...) kernel_of<sm90::GemmTile<GemmVariant::VARIANT, __VA_ARGS__>>(),
#include "fp8_gemm_tiles.h"
#undef TILE
};
// Whether a kernel's smem limit is set: one bit per device.
std::atomic<uint64_t> prepared[std::size(KERNELS)];

int count_sms(int device) {
  static std::atomic<int> cache[MAX_DEVICES];
  int count = device < MAX_DEVICES ? cache[device].load() : 0;
  if (count == 0) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (device < MAX_DEVICES) cache[device] = count;
  }
  return count;
}

bool encode_codes(TensorMap* map, const Fp8Matrix& x, int64_t K, int box_rows) {
  const int64_t row_bytes = x.rows > 1 ? x.row_stride : (K + 15) / 16 * 16;
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, x.codes, x.rows, K, row_bytes, 1, box_rows);
}

int64_t rows_of_out(const Fp8GemmProblem& x) {
  const bool d_per_group =
      x.variant == GemmVariant::masked || x.variant == GemmVariant::k_grouped;
  return x.M * (d_per_group ? x.groups : 1);
}

// The tile rows that resident tiles cover when they form a square of D, which reads the fewest bytes
// of A and B.
int tile_rows_of_square(const Sm90Tile& tile, int cluster, int num_sms) {
  const double tiles = static_cast<double>(num_sms) * tile.resident_blocks() / cluster;
  return std::max(static_cast<int>(std::sqrt(tiles * tile.d_columns() / tile.d_rows())), 1);
}

GemmArguments arguments(const Fp8GemmProblem& x, const Sm90Tile& tile, int splits, int num_sms) {
  const Fp8Gemm& gemm = x.gemm;
  const int size = gemm.out_type == Real::fp32 ? 4 : 2;
  const bool contiguous = x.variant == GemmVariant::contiguous;
  GemmArguments p{};
  p.a_scale = {gemm.a.scale, x.a_scale_group_stride, gemm.a.scale_row_stride,
               gemm.a.scale_block_stride};
  p.b_scale = {gemm.b.scale, x.b_scale_group_stride, gemm.b.scale_row_stride,
               gemm.b.scale_block_stride};
  p.c = gemm.c, p.c_row_stride = gemm.c_row_stride, p.c_type = gemm.c_type;
  p.out = gemm.out, p.out_type = gemm.out_type;
  p.group_bounds = contiguous ? x.group_bounds : x.group_sizes;
  p.group_index = x.group_sizes;
  p.M = static_cast<int>(x.M), p.N = static_cast<int>(x.N), p.K = static_cast<int>(gemm.K);
  p.groups = static_cast<int>(x.groups);
  p.scale_blocks = static_cast<int>(x.scale_blocks);
  p.num_splits = splits;
  p.blocks_per_split = static_cast<int>(((gemm.K + 127) / 128 + splits - 1) / splits);
  p.group_m = tile_rows_of_square(tile, cluster_size(tile, splits), num_sms);
  p.rows_aligned = x.N * size % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  p.store_by_tma = p.rows_aligned && !tile.swapped && !contiguous;
  const int c_size = gemm.c_type == Real::fp32 ? 4 : 2;
  p.c_pairs = x.N % 2 == 0 && gemm.c_row_stride % 2 == 0 &&
              reinterpret_cast<uintptr_t>(gemm.c) % (2 * c_size) == 0;
  return p;
}

// Finds the row range of each group of a contiguous product, and clears rows of no group.
cudaError_t launch_find_group_bounds(const Fp8GemmProblem& x, int num_sms, cudaStream_t stream) {
  const int size = x.gemm.out_type == Real::fp32 ? 4 : 2;
  cudaError_t error = cudaMemsetAsync(x.group_bounds, 0x7f, x.groups * sizeof(int), stream);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(x.group_bounds + x.groups, 0, x.groups * sizeof(int), stream);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>((x.M + 3) / 4, 8 * num_sms)));
  config.blockDim = dim3(128);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, sm90::find_group_bounds, x.group_sizes, x.group_bounds,
                            static_cast<char*>(x.gemm.out), static_cast<int>(x.M),
                            static_cast<int>(x.groups), x.N * size);
}

}  // namespace

std::string launch_fp8_gemm(const Fp8GemmProblem& x, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (encoder() == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled";
  const int num_sms = count_sms(device);
  const int64_t K = x.gemm.K;
  const int index = choose_tile(x.variant, x.M, x.N, K, x.groups, x.gemm.b.rows_per_scale, num_sms);
  if (index < 0) return "no tile is compiled for this product";
  const Sm90Tile& tile = SM90_TILES[index];
  const Kernel& kernel = KERNELS[index];
  if (x.variant == GemmVariant::contiguous) {
    error = launch_find_group_bounds(x, num_sms, cuda_stream);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }

  // Tensor maps are encoded for each launch and passed by value, so they cannot be stale.
  const int splits = choose_num_splits(x.variant, x.N, K);
  const int cluster = cluster_size(tile, splits);
  GemmArguments p = arguments(x, tile, splits, num_sms);
  TensorMap a, b, out{};
  // Rows of a box: a block loads its part of an operand that its cluster shares.
  const int lhs_rows = tile.lhs_rows / tile.cluster_n, rhs_rows = tile.columns / tile.cluster_m;
  bool encoded = encode_codes(&a, x.gemm.a, K, tile.swapped ? rhs_rows : lhs_rows) &&
                 encode_codes(&b, x.gemm.b, K, tile.swapped ? lhs_rows : rhs_rows);
  if (p.store_by_tma) {
    const int size = x.gemm.out_type == Real::fp32 ? 4 : 2;
    const auto type = size == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    encoded = encoded && encode(&out, type, p.out, rows_of_out(x), x.N, x.N * size, size, 64);
  }
  if (!encoded) return "cuTensorMapEncodeTiled refused a matrix";

  const uint64_t bit = device < MAX_DEVICES ? uint64_t{1} << device : 0;
  if ((prepared[index].load() & bit) == 0) {
    error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(kernel.smem_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
    prepared[index].fetch_or(bit);
  }
  // Each contiguous group may add a partial tile, which count_blocks does not include.
  int64_t blocks = count_blocks(tile, x.M, x.N, x.groups, splits);
  if (x.variant == GemmVariant::contiguous) blocks += x.groups * cluster;
  const int64_t max_blocks =
      std::max<int64_t>(int64_t{num_sms} * tile.resident_blocks() / cluster, 1) * cluster;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(blocks, max_blocks)));
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = kernel.smem_bytes;
  config.stream = cuda_stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel.function, a, b, out, p);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace deepkern
