// Launches fp8_gemm.cuh: the tensor maps, the attributes, the choice among the compiled tiles.
#include "fp8_gemm.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "launch.h"
#include "tensor_map.h"

namespace deepkern {
namespace {

using sm90::GemmArguments;
using sm90::TensorMap;

constexpr int DEVICES = 64;  // whose properties are kept

// A compiled tile.
struct Kernel {
  void (*run)(TensorMap, TensorMap, TensorMap, GemmArguments);
  int threads;
  uint32_t shared;
};

template <class Tile>
Kernel kernel_of() {
  return {&sm90::fp8_gemm<Tile>, Tile::THREADS, Tile::SHARED_BYTES};
}

// As SM90_TILES.
const Kernel KERNELS[] = {
#define TILE(FORM, GROUPS, COLUMNS, STAGES, CLUSTER, SWAPPED, B_ROWS)                            \
  kernel_of<sm90::GemmTile<sm90::Form::FORM, GROUPS, COLUMNS, STAGES, CLUSTER, SWAPPED, B_ROWS>>(),
#include "fp8_gemm_tiles.h"
#undef TILE
};
std::atomic<uint64_t> prepared[std::size(KERNELS)];  // a bit for each device

int multiprocessors(int device) {
  static std::atomic<int> known[DEVICES];
  int count = device < DEVICES ? known[device].load() : 0;
  if (count == 0) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (device < DEVICES) known[device] = count;
  }
  return count;
}

bool encode_codes(TensorMap* map, const Fp8Matrix& x, int64_t K, int box_rows) {
  const int64_t row = x.rows > 1 ? x.row : (K + 15) / 16 * 16;
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, x.codes, x.rows, K, row, 1, box_rows);
}

sm90::Type type_of(Real type) {
  return type == Real::bf16   ? sm90::Type::bf16
         : type == Real::fp16 ? sm90::Type::fp16
                              : sm90::Type::fp32;
}

int64_t rows_of_out(const Fp8Product& x) {
  const bool each = x.form == GemmForm::masked || x.form == GemmForm::k_grouped;
  return x.M * (each ? x.groups : 1);
}

static_assert(sm90::MOST_SPLITS == MOST_SPLITS);

GemmArguments arguments(const Fp8Product& x, const Sm90Tile& tile, int splits) {
  const Fp8Gemm& gemm = x.gemm;
  const int size = gemm.out_type == Real::fp32 ? 4 : 2;
  GemmArguments p{};
  p.a_scale = {gemm.a.scale, x.a_scale_group, gemm.a.scale_row, gemm.a.scale_block};
  p.b_scale = {gemm.b.scale, x.b_scale_group, gemm.b.scale_row, gemm.b.scale_block};
  p.c = gemm.c, p.c_row = gemm.c_row, p.c_type = type_of(gemm.c_type);
  p.out = gemm.out, p.out_type = type_of(gemm.out_type);
  p.sizes = x.form == GemmForm::contiguous ? x.lie : x.sizes;
  p.group_index = x.sizes;
  p.M = static_cast<int>(x.M), p.N = static_cast<int>(x.N), p.K = static_cast<int>(gemm.K);
  p.groups = static_cast<int>(x.groups);
  p.scale_blocks = static_cast<int>(x.scale_blocks);
  p.splits = splits;
  p.run = static_cast<int>(((gemm.K + 127) / 128 + splits - 1) / splits);
  p.band = std::max(1024 / tile.tokens(), 1);
  p.aligned = x.N * size % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  p.store_by_tma = p.aligned && !tile.swapped && x.form != GemmForm::contiguous;
  return p;
}

// Finds where the groups of a contiguous product lie, and clears the rows of none.
cudaError_t launch_find_groups(const Fp8Product& x, int units, cudaStream_t stream) {
  const int size = x.gemm.out_type == Real::fp32 ? 4 : 2;
  cudaError_t error = cudaMemsetAsync(x.lie, 0x7f, x.groups * sizeof(int), stream);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(x.lie + x.groups, 0, x.groups * sizeof(int), stream);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>((x.M + 3) / 4, 8 * units)));
  config.blockDim = dim3(128);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, sm90::find_groups, x.sizes, x.lie,
                            static_cast<char*>(x.gemm.out), static_cast<int>(x.M),
                            static_cast<int>(x.groups), x.N * size);
}

}  // namespace

std::string launch_fp8_product(const Fp8Product& x, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (encoder() == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled";
  const int units = multiprocessors(device);
  const int64_t K = x.gemm.K;
  const int number = choose_tile(x.form, x.M, x.N, K, x.groups, x.gemm.b.scale_rows, units);
  if (number < 0) return "no tile is compiled for this product";
  const Sm90Tile& tile = SM90_TILES[number];
  const Kernel& kernel = KERNELS[number];
  if (x.form == GemmForm::contiguous) {
    error = launch_find_groups(x, units, queue);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }

  // Made anew for each launch and passed by value: nothing of them can go stale.
  const int splits = k_splits(x.form, x.N, K), cluster_size = cluster_of(tile, splits);
  GemmArguments p = arguments(x, tile, splits);
  TensorMap a, b, out{};
  const int left = tile.left(), right = tile.columns / tile.cluster;
  bool encoded = encode_codes(&a, x.gemm.a, K, tile.swapped ? right : left) &&
                 encode_codes(&b, x.gemm.b, K, tile.swapped ? left : right);
  if (p.store_by_tma) {
    const int size = x.gemm.out_type == Real::fp32 ? 4 : 2;
    const auto type = size == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    encoded = encoded && encode(&out, type, p.out, rows_of_out(x), x.N, x.N * size, size, 64);
  }
  if (!encoded) return "cuTensorMapEncodeTiled refused a matrix";

  const uint64_t bit = device < DEVICES ? uint64_t{1} << device : 0;
  if ((prepared[number].load() & bit) == 0) {
    error = cudaFuncSetAttribute(kernel.run, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(kernel.shared));
    if (error != cudaSuccess) return cudaGetErrorString(error);
    prepared[number].fetch_or(bit);
  }
  // Contiguous groups may have more tiles than the estimate counts: a group of few rows has one.
  int64_t blocks = blocks_of(tile, x.M, x.N, x.groups, splits);
  if (x.form == GemmForm::contiguous) blocks += x.groups;
  const int64_t most =
      std::max<int64_t>(int64_t{units} * tile.resident() / cluster_size, 1) * cluster_size;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(blocks, most)));
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = kernel.shared;
  config.stream = queue;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster_size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel.run, a, b, out, p);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace deepkern
