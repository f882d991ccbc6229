// Launches fp8_gemm_nt.cuh: the tiles that are compiled, the choice among them, the tensor maps.
#include "fp8_gemm_nt.cuh"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "launch.h"

namespace deepkern {
namespace {

using sm90::GemmArguments;
using sm90::TensorMap;

constexpr int DEVICES = 64;  // whose properties are kept

// A compiled tile.
struct Form {
  void (*kernel)(TensorMap, TensorMap, TensorMap, GemmArguments);
  int rows, columns, cluster, threads, resident;  // resident: blocks that a multiprocessor holds
  uint32_t shared;
  float cost;  // of a tile's 128 values of K, those of 128 x 128 being 1: an estimate
  std::atomic<uint64_t>* prepared;  // a bit for each device
};

template <int GROUPS, int BLOCK_N, int STAGES, int CLUSTER>
Form form(int resident, float cost) {
  using Tile = sm90::GemmTile<GROUPS, BLOCK_N, STAGES, CLUSTER>;
  static std::atomic<uint64_t> prepared{0};
  return {&sm90::fp8_gemm_nt<GROUPS, BLOCK_N, STAGES, CLUSTER>, Tile::M, Tile::N, CLUSTER,
          Tile::THREADS, resident, Tile::SHARED_BYTES, cost, &prepared};
}

int multiprocessors(int device) {
  static std::atomic<int> known[DEVICES];
  int count = device < DEVICES ? known[device].load() : 0;
  if (count == 0) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (device < DEVICES) known[device] = count;
  }
  return count;
}

int64_t tiles_of(const Form& f, int64_t M, int64_t N) {
  const int64_t rows = f.rows * f.cluster;
  return (M + rows - 1) / rows * f.cluster * ((N + f.columns - 1) / f.columns);
}

// The form whose busiest multiprocessor is done first.
const Form& choose(int64_t M, int64_t N, int units) {
  static const Form forms[] = {form<2, 128, 4, 2>(1, 0.95f), form<2, 128, 4, 1>(1, 1.0f),
                               form<1, 64, 6, 1>(2, 0.35f)};
  const auto time = [&](const Form& f) {
    return static_cast<float>((tiles_of(f, M, N) + units - 1) / units) * f.cost;
  };
  return *std::min_element(std::begin(forms), std::end(forms),
                           [&](const Form& x, const Form& y) { return time(x) < time(y); });
}

// cuTensorMapEncodeTiled of whatever driver is there: the package links to none.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static void* const found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &result);
    return result == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
}

// Boxes of 128 bytes by `box_rows`, swizzled.
bool encode(TensorMap* map, CUtensorMapDataType type, const void* base, int64_t rows,
            int64_t columns, int64_t row_bytes, int element_bytes, int box_rows) {
  const cuuint64_t shape[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / element_bytes),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  return encoder()(map, type, 2, const_cast<void*>(base), shape, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool encode(TensorMap* map, const Fp8Matrix& x, int64_t K, int box_rows) {
  const int64_t row = x.rows > 1 ? x.row : (K + 15) / 16 * 16;
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, x.codes, x.rows, K, row, 1, box_rows);
}

sm90::Type type_of(Real type) {
  return type == Real::bf16 ? sm90::Type::bf16
         : type == Real::fp16 ? sm90::Type::fp16
                              : sm90::Type::fp32;
}

}  // namespace

std::string launch_fp8_gemm_nt(const Fp8Gemm& gemm, void* stream) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (encoder() == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled";
  const int units = multiprocessors(device);
  const Form& f = choose(gemm.a.rows, gemm.b.rows, units);
  const int64_t M = gemm.a.rows, N = gemm.b.rows;
  const int size = gemm.out_type == Real::fp32 ? 4 : 2;

  GemmArguments p{};
  p.a_scale = gemm.a.scale, p.a_scale_row = gemm.a.scale_row, p.a_scale_block = gemm.a.scale_block;
  p.b_scale = gemm.b.scale, p.b_scale_row = gemm.b.scale_row, p.b_scale_block = gemm.b.scale_block;
  p.c = gemm.c, p.c_row = gemm.c_row, p.c_type = type_of(gemm.c_type);
  p.out = gemm.out, p.out_row = N, p.out_type = type_of(gemm.out_type);
  p.M = static_cast<int>(M), p.N = static_cast<int>(N), p.K = static_cast<int>(gemm.K);
  p.band = 1024 / (f.rows * f.cluster);
  p.store_by_tma = N * size % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;

  // Made anew for each launch and passed by value: nothing of them can go stale.
  TensorMap a, b, out{};
  bool encoded = encode(&a, gemm.a, gemm.K, f.rows) &&
                 encode(&b, gemm.b, gemm.K, f.columns / f.cluster);
  if (p.store_by_tma) {
    const auto type = size == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    encoded = encoded && encode(&out, type, p.out, M, N, N * size, size, 64);
  }
  if (!encoded) return "cuTensorMapEncodeTiled refused a matrix";

  const uint64_t bit = device < DEVICES ? uint64_t{1} << device : 0;
  if ((f.prepared->load() & bit) == 0) {
    error = cudaFuncSetAttribute(f.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, f.shared);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    f.prepared->fetch_or(bit);
  }
  const int64_t most = units * f.resident / f.cluster * f.cluster;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(tiles_of(f, M, N), most)));
  config.blockDim = dim3(f.threads);
  config.dynamicSmemBytes = f.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = f.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* arguments[] = {&a, &b, &out, &p};
  error = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(f.kernel), arguments);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace deepkern
