// The CUDA runtime that csrc/sm90 compiled by nvcc links to, over the PTX machine's libcuda.
//
// nvcc's host code registers each fatbin and the kernel behind each host function. A launch looks
// the kernel up, and the machine runs the PTX of the fatbin. The fatbin must contain PTX for one
// target, not compressed.
// Sources: CUDA runtime API documentation, version 13.0; crt/host_runtime.h of the toolkit.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "sm90/launch.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Of the machine.
extern "C" const char* deepkern_ptx_message();
extern "C" void deepkern_ptx_profile(uint32_t every);

namespace {

struct Fatbin {
  std::string text;  // PTX
  CUmodule module = nullptr;
};

struct Kernel {
  Fatbin* fatbin;
  std::string name;
  CUfunction function = nullptr;
};

// What __cudaRegisterFatBinary is passed: __fatBinC_Wrapper_t of the toolkit's fatbinary_section.h.
struct Wrapper {
  int magic, version;
  const char* data;
  void* file;
};

// The start of the data.
struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;  // after the header
};
constexpr uint32_t FATBIN_MAGIC = 0xba55ed50;

int multiprocessors = 132;
int run_every = 0;  // see machine_run_every
std::string failure;   // message of the last error
std::string launched;  // a line per launch: grid, cluster, kernel

// Built on first use: fatbins are registered by static constructors.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

cudaError_t reject(const std::string& message) {
  failure = message;
  return cudaErrorUnknown;
}

cudaError_t result_of(CUresult result) {
  return result == CUDA_SUCCESS ? cudaSuccess : reject(deepkern_ptx_message());
}

// The function of the machine behind a host function; its module is loaded at the first use.
cudaError_t find(const void* host_function, Kernel** found) {
  const auto at = kernels().find(host_function);
  if (at == kernels().end()) return reject("no kernel is registered for this host function");
  Kernel& kernel = at->second;
  Fatbin& fatbin = *kernel.fatbin;
  CUresult result = CUDA_SUCCESS;
  if (!fatbin.module) {
    if (fatbin.text.empty()) return reject("a fatbin without PTX text");
    result = cuModuleLoadData(&fatbin.module, fatbin.text.c_str());
  }
  if (result == CUDA_SUCCESS && !kernel.function) {
    result = cuModuleGetFunction(&kernel.function, fatbin.module, kernel.name.c_str());
  }
  *found = &kernel;
  return result_of(result);
}

}  // namespace

// What nvcc's host code calls.

EXPORTED void** __cudaRegisterFatBinary(void* wrapper) {
  const char* data = static_cast<Wrapper*>(wrapper)->data;
  Header header;
  std::memcpy(&header, data, sizeof(header));
  auto* fatbin = new Fatbin;  // lives as long as the library
  if (header.magic == FATBIN_MAGIC) {
    const std::string all(data + header.header_bytes, header.bytes);
    const size_t begin = all.find(".version ");
    if (begin != std::string::npos) fatbin->text = all.c_str() + begin;  // up to a zero byte
  }
  return reinterpret_cast<void**>(fatbin);
}

EXPORTED void __cudaRegisterFatBinaryEnd(void**) {}
EXPORTED void __cudaUnregisterFatBinary(void**) {}

EXPORTED void __cudaRegisterFunction(void** fatbin, const char* host_function, char*,
                                     const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host_function] = {reinterpret_cast<Fatbin*>(fatbin), name};
}

// Host functions of kernels call these. csrc/sm90 calls no kernel with <<<>>>.
EXPORTED cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return reject("a launch by <<<>>>");
}
EXPORTED cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) {
  return reject("a launch by <<<>>>");
}
EXPORTED cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return reject("a launch by <<<>>>");
}

// The runtime API.

EXPORTED const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : failure.c_str();
}

// Each number of multiprocessors is a device of its own, because launchers cache properties by
// device.
EXPORTED cudaError_t cudaGetDevice(int* device) {
  *device = multiprocessors;
  return cudaSuccess;
}

EXPORTED cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute != cudaDevAttrMultiProcessorCount) {
    return reject("cudaDeviceGetAttribute: attribute " + std::to_string(attribute));
  }
  *value = device;
  return cudaSuccess;
}

EXPORTED cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

EXPORTED cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                      unsigned long long,
                                                      cudaDriverEntryPointQueryResult* result) {
  const bool found = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = found ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

EXPORTED cudaError_t cudaFuncSetAttribute(const void* host_function, cudaFuncAttribute attribute,
                                          int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return reject("cudaFuncSetAttribute: attribute " + std::to_string(attribute));
  }
  Kernel* kernel;
  const cudaError_t error = find(host_function, &kernel);
  if (error != cudaSuccess) return error;
  return result_of(cuFuncSetAttribute(kernel->function,
                                      CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, value));
}

EXPORTED cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config,
                                         const void* host_function, void** arguments) {
  Kernel* kernel;
  const cudaError_t error = find(host_function, &kernel);
  if (error != cudaSuccess) return error;
  // cudaLaunchAttribute is CUlaunchAttribute under another name.
  static_assert(sizeof(cudaLaunchAttribute) == sizeof(CUlaunchAttribute));
  auto* attributes = reinterpret_cast<CUlaunchAttribute*>(config->attrs);
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (attributes[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      cluster = attributes[i].value.clusterDim.x;
    }
  }
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  launched += std::to_string(grid.x) + " " + std::to_string(cluster) + " " + kernel->name + "\n";
  CUlaunchConfig request{};
  request.gridDimX = grid.x, request.gridDimY = grid.y, request.gridDimZ = grid.z;
  request.blockDimX = block.x, request.blockDimY = block.y, request.blockDimZ = block.z;
  request.sharedMemBytes = static_cast<unsigned>(config->dynamicSmemBytes);
  request.hStream = config->stream;
  request.attrs = attributes, request.numAttrs = config->numAttrs;
  if (run_every > 0) deepkern_ptx_profile(block.x > 128 ? run_every : 1);
  return result_of(cuLaunchKernelEx(&request, kernel->function, arguments, nullptr));
}

// What bench/hopper.py calls.

// 0, or: in a profile, kernels of more than 128 threads run every n-th cluster of their grid. Kernels
// that prepare or combine their work have 128 threads and run as a whole.
EXPORTED void machine_run_every(int every) { run_every = every; }

EXPORTED void machine_set_multiprocessors(int count) { multiprocessors = count; }

EXPORTED void* machine_fp8_gemm_launcher() {
  return reinterpret_cast<void*>(&deepkern::launch_fp8_gemm);
}

EXPORTED void* machine_mla_launcher() {
  return reinterpret_cast<void*>(&deepkern::launch_mla_decode);
}

EXPORTED void* machine_mla_prefill_launcher() {
  return reinterpret_cast<void*>(&deepkern::launch_mla_prefill);
}

EXPORTED void* machine_mla_prefill_backward_launcher() {
  return reinterpret_cast<void*>(&deepkern::launch_mla_prefill_backward);
}

// The launches since the last call, a line for each: blocks, blocks of a cluster, kernel.
EXPORTED const char* machine_launches() {
  static std::string taken;
  taken.swap(launched);
  launched.clear();
  return taken.c_str();
}
