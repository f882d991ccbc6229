// The stand-in for CUDA's runtime: one device, on which the emulator runs what is launched.
#include "cuda_runtime.h"

#include <cstring>
#include <map>
#include <string>

#include "../machine.h"
#include "cudaTypedefs.h"

namespace {

constexpr size_t SHARED_WITHOUT_ASKING = 48 << 10;

// How launches are run: set by tests.
struct How {
  uint64_t seed = 0;
  emulator::Order order = emulator::Order::random;
  int multiprocessors = 132;
  bool launches = true;
} how;
bool refuses = false;
std::map<const void*, size_t> allowed;  // dynamic shared memory, by kernel
std::string failure;

cudaError_t refuse(const std::string& what) {
  failure = what;
  return 1;
}

// What the driver asks of a tensor map of 2 dimensions (CUDA driver API, cuTensorMapEncodeTiled).
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* shape, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const uint32_t size = type == CU_TENSOR_MAP_DATA_TYPE_UINT8    ? 1
                        : type == CU_TENSOR_MAP_DATA_TYPE_UINT16 ? 2
                                                                 : 4;
  constexpr uint64_t MOST = uint64_t{1} << 32, MOST_BYTES = uint64_t{1} << 40;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  const bool right =
      rank == 2 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && shape[0] >= 1 &&
      shape[0] <= MOST && shape[1] >= 1 && shape[1] <= MOST && strides[0] % 16 == 0 &&
      strides[0] < MOST_BYTES && strides[0] >= shape[0] * size && box[0] >= 1 && box[0] <= 256 &&
      box[1] >= 1 && box[1] <= 256 && box[0] * size % 16 == 0 &&
      (!swizzled || box[0] * size <= 128) && steps[0] == 1 && steps[1] == 1;
  if (!right) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<char*>(base), shape[0], shape[1], strides[0], box[0], box[1], size, swizzled};
  return CUDA_SUCCESS;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : failure.c_str();
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = how.multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (how.launches) std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointNotFound;
  return cudaSuccess;
}

namespace emulator {

bool launches() { return how.launches; }

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > static_cast<int>(SHARED_LIMIT)) return refuse("too much shared memory");
  allowed[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   std::function<void()> run) {
  if (refuses) return refuse("refused");
  const auto found = allowed.find(kernel);
  const size_t most = found == allowed.end() ? SHARED_WITHOUT_ASKING : found->second;
  if (config.dynamicSmemBytes > most) return refuse("more shared memory than was asked for");
  const bool flat = config.gridDim.y * config.gridDim.z * config.blockDim.y * config.blockDim.z == 1;
  if (!flat) return refuse("grids and blocks of one dimension are emulated");
  if (config.gridDim.x < 1 || config.gridDim.x > INT32_MAX) return refuse("no such grid");
  if (config.blockDim.x < 1 || config.blockDim.x > 1024) return refuse("no such block");
  Launch machine;
  machine.blocks = static_cast<int>(config.gridDim.x);
  machine.threads = static_cast<int>(config.blockDim.x);
  machine.shared_bytes = static_cast<uint32_t>(config.dynamicSmemBytes);
  machine.seed = how.seed;
  machine.order = how.order;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& attribute = config.attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    const auto& size = attribute.val.clusterDim;
    if (size.x < 1 || size.x > 8 || size.y != 1 || size.z != 1) return refuse("no such cluster");
    machine.cluster = static_cast<int>(size.x);
  }
  try {
    Machine(machine, std::move(run)).run();
  } catch (const std::exception& error) {
    return refuse(error.what());
  }
  return cudaSuccess;
}

}  // namespace emulator

namespace deepkern {

// As of sm90/stream.cpp; here there is the one stream.
bool current_stream(int, void** stream) {
  *stream = nullptr;
  return true;
}

}  // namespace deepkern

extern "C" void emulate_how(uint64_t seed, int order, int multiprocessors, int launches) {
  how = {seed, static_cast<emulator::Order>(order), multiprocessors, launches != 0};
}

// Makes launches fail, or not any more.
extern "C" void emulate_refusal(int on) { refuses = on != 0; }
