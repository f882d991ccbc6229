// An emulated CUDA runtime. The emulator runs the kernels that are launched.
#include "cuda_runtime.h"

#include <cstring>
#include <map>
#include <string>

#include "../machine.h"
#include "cudaTypedefs.h"

namespace {

constexpr size_t DEFAULT_SHARED_BYTES = 48 << 10;  // without cudaFuncSetAttribute

// How launches run; tests set it.
struct LaunchSettings {
  uint64_t seed = 0;
  emulator::Order order = emulator::Order::random;
  int multiprocessors = 132;
  bool launches_run = true;
} settings;
bool reject_launches = false;
std::map<const void*, size_t> max_shared_bytes;  // dynamic shared memory of each kernel
std::string failure;  // message of the last error

cudaError_t reject(const std::string& message) {
  failure = message;
  return 1;
}

// cuTensorMapEncodeTiled for 2 dimensions, with the requirements of the CUDA driver API.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* shape, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const uint32_t size = type == CU_TENSOR_MAP_DATA_TYPE_UINT8    ? 1
                        : type == CU_TENSOR_MAP_DATA_TYPE_UINT16 ? 2
                                                                 : 4;
  constexpr uint64_t MAX_SIZE = uint64_t{1} << 32, MAX_STRIDE = uint64_t{1} << 40;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  const bool valid =
      rank == 2 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && shape[0] >= 1 &&
      shape[0] <= MAX_SIZE && shape[1] >= 1 && shape[1] <= MAX_SIZE && strides[0] % 16 == 0 &&
      strides[0] < MAX_STRIDE && strides[0] >= shape[0] * size && box[0] >= 1 && box[0] <= 256 &&
      box[1] >= 1 && box[1] <= 256 && box[0] * size % 16 == 0 &&
      (!swizzled || box[0] * size <= 128) && steps[0] == 1 && steps[1] == 1;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<char*>(base), shape[0], shape[1], strides[0], box[0], box[1], size, swizzled};
  return CUDA_SUCCESS;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : failure.c_str();
}

// Each number of multiprocessors is a device of its own, because launchers cache properties by
// device.
cudaError_t cudaGetDevice(int* device) {
  *device = settings.multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = device;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (settings.launches_run) std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool supported = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = supported ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  *result = supported ? cudaDriverEntryPointSuccess : cudaDriverEntryPointNotFound;
  return cudaSuccess;
}

namespace emulator {

bool launches_run() { return settings.launches_run; }

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > static_cast<int>(MAX_SHARED_BYTES)) {
    return reject("cudaFuncSetAttribute: expected at most " + std::to_string(MAX_SHARED_BYTES) +
                  " bytes of shared memory, got " + std::to_string(bytes));
  }
  max_shared_bytes[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   std::function<void()> run) {
  if (reject_launches) return reject("refused");
  const auto found = max_shared_bytes.find(kernel);
  const size_t limit = found == max_shared_bytes.end() ? DEFAULT_SHARED_BYTES : found->second;
  if (config.dynamicSmemBytes > limit) {
    return reject("launch: expected at most " + std::to_string(limit) +
                  " bytes of dynamic shared memory, got " +
                  std::to_string(config.dynamicSmemBytes));
  }
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (grid.y * grid.z * block.y * block.z != 1) {
    return reject("launch: only one-dimensional grids and blocks are emulated");
  }
  if (grid.x < 1 || grid.x > INT32_MAX) return reject("launch: invalid grid size");
  if (block.x < 1 || block.x > 1024) return reject("launch: invalid block size");
  Launch launch;
  launch.blocks = static_cast<int>(grid.x);
  launch.threads = static_cast<int>(block.x);
  launch.shared_bytes = static_cast<uint32_t>(config.dynamicSmemBytes);
  launch.seed = settings.seed;
  launch.order = settings.order;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& attribute = config.attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    const auto& size = attribute.val.clusterDim;
    if (size.x < 1 || size.x > 8 || size.y != 1 || size.z != 1) {
      return reject("launch: expected a cluster of 1 to 8 blocks in x");
    }
    launch.cluster = static_cast<int>(size.x);
  }
  try {
    Machine(launch, std::move(run)).run();
  } catch (const std::exception& error) {
    return reject(error.what());
  }
  return cudaSuccess;
}

}  // namespace emulator

namespace deepkern {

// Replaces sm90/stream.cpp: the emulated runtime has only the default stream.
bool current_stream(int, void** stream) {
  *stream = nullptr;
  return true;
}

}  // namespace deepkern

// Sets how later launches run.
extern "C" void emulate_how(uint64_t seed, int order, int multiprocessors, int launches_run) {
  settings = {seed, static_cast<emulator::Order>(order), multiprocessors, launches_run != 0};
}

// Makes later launches fail (1) or run (0).
extern "C" void emulate_refusal(int on) { reject_launches = on != 0; }
