// The functions of CUDA's driver API that Triton's NVIDIA launcher calls, over the PTX machine.
//
// A function refuses what NVIDIA's driver refuses, with the same CUresult where the documentation
// names one, and keeps the reason for deepkern_ptx_message. Kernels run to their end inside
// cuLaunchKernel, so streams and contexts carry no state.
// Source: CUDA driver API documentation, version 13.1.
#include "libcuda.h"

#include <algorithm>
#include <cstring>

#include "driver.h"
#include "profile.h"

using namespace deepkern::ptx;

namespace {

// Above 13010: for older drivers Triton clears a bit of NVIDIA's encoding of a tensor map, which is
// a bit of the address in ours.
constexpr int DRIVER_VERSION = 13020;

int context_object;
thread_local CUcontext current_context = nullptr;
size_t limits[] = {1024, 1 << 20, 8 << 20};  // by CUlimit; the defaults of NVIDIA's driver

CUcontext the_context() { return reinterpret_cast<CUcontext>(&context_object); }

CUresult check_device(const char* api, CUdevice device) {
  if (device == 0) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_DEVICE, api,
                "device " + std::to_string(device) + ": there is device 0 alone");
}

bool attribute_of(const Device& d, int attribute, int& value) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
      value = 1024;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
      value = 64;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
      value = 2147483647;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
      value = 65535;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
      value = SHARED_WITHOUT_ATTRIBUTE;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      value = LANES;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
      value = 65536;
      break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
      value = d.clock_khz;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      value = d.num_sms;
      break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
      value = d.memory_clock_khz;
      break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      value = d.bus_bits;
      break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
      value = d.l2_bytes;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
      value = d.threads_per_sm;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      value = d.capability / 10;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      value = d.capability % 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      value = d.shared_per_sm;
      break;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
      value = 1;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      value = d.shared_per_block;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR:
      value = d.blocks_per_sm;
      break;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK:
      value = RESERVED_SHARED;
      break;
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED:
      value = d.capability >= 90;
      break;
    default:
      return false;
  }
  return true;
}

CUresult read_attributes(const char* api, const CUlaunchConfig& source, LaunchRequest& request) {
  for (unsigned i = 0; i < source.numAttrs; ++i) {
    const CUlaunchAttribute& attribute = source.attrs[i];
    switch (attribute.id) {
      case CU_LAUNCH_ATTRIBUTE_IGNORE:
      case CU_LAUNCH_ATTRIBUTE_PRIORITY:
      case CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
        break;
      case CU_LAUNCH_ATTRIBUTE_COOPERATIVE:
        request.cooperative = attribute.value.cooperative != 0;
        break;
      case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
        request.config.cluster[0] = attribute.value.clusterDim.x;
        request.config.cluster[1] = attribute.value.clusterDim.y;
        request.config.cluster[2] = attribute.value.clusterDim.z;
        break;
      case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
        request.config.programmatic = attribute.value.programmaticStreamSerializationAllowed != 0;
        break;
      default:
        return refuse(CUDA_ERROR_NOT_SUPPORTED, api,
                      "launch attribute " + std::to_string(attribute.id));
    }
  }
  return CUDA_SUCCESS;
}

LaunchRequest request_of(const CUlaunchConfig& c) {
  LaunchRequest request;
  const uint32_t grid[3] = {c.gridDimX, c.gridDimY, c.gridDimZ};
  const uint32_t block[3] = {c.blockDimX, c.blockDimY, c.blockDimZ};
  std::copy(grid, grid + 3, request.config.grid);
  std::copy(block, block + 3, request.config.block);
  request.config.dynamic_shared_bytes = c.sharedMemBytes;
  return request;
}

CUresult run(const Function& function, const LaunchRequest& request, void** parameters) {
  // Copies: another thread may unload the module meanwhile.
  std::shared_ptr<Module> module = function.module;
  std::shared_ptr<Kernel> kernel = function.kernel;
  Options options = Driver::get().options();
  const uint32_t* grid = request.config.grid;
  if (request.cooperative) {  // all blocks are resident at once
    uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    options.resident_blocks = std::max(options.resident_blocks, static_cast<int>(blocks));
  }
  std::unique_ptr<Profile> profile = ProfileLog::get().start(*kernel, request.config);
  try {
    launch(*kernel, *module, request.config, parameters, Driver::get().allocations(), options,
           profile.get());
    if (profile) ProfileLog::get().keep(kernel, request.config, *profile);
  } catch (const Failure& failure) {
    return fail(CUDA_ERROR_LAUNCH_FAILED, failure.what());
  } catch (const InvalidProgram& error) {
    return refuse(CUDA_ERROR_INVALID_PTX, "cuLaunchKernelEx", error.what());
  } catch (const std::exception& error) {
    return refuse(CUDA_ERROR_UNKNOWN, "cuLaunchKernelEx", error.what());
  }
  return CUDA_SUCCESS;
}

const char* description(CUresult code) {
  switch (code) {
    case CUDA_SUCCESS:
      return "no error";
    case CUDA_ERROR_INVALID_VALUE:
      return "invalid argument";
    case CUDA_ERROR_INVALID_DEVICE:
      return "invalid device ordinal";
    case CUDA_ERROR_INVALID_IMAGE:
      return "device kernel image is invalid";
    case CUDA_ERROR_INVALID_CONTEXT:
      return "invalid device context";
    case CUDA_ERROR_UNSUPPORTED_LIMIT:
      return "limit is not supported on this architecture";
    case CUDA_ERROR_INVALID_PTX:
      return "a PTX JIT compilation failed";
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
      return "the provided PTX was compiled with an unsupported toolchain.";
    case CUDA_ERROR_INVALID_HANDLE:
      return "invalid resource handle";
    case CUDA_ERROR_NOT_FOUND:
      return "named symbol not found";
    case CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES:
      return "too many resources requested for launch";
    case CUDA_ERROR_LAUNCH_FAILED:
      return "unspecified launch failure";
    case CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE:
      return "too many blocks in cooperative launch";
    case CUDA_ERROR_NOT_SUPPORTED:
      return "operation not supported";
    case CUDA_ERROR_INVALID_CLUSTER_SIZE:
      return "cluster misconfiguration";
    case CUDA_ERROR_UNKNOWN:
      return "unknown error";
  }
  return nullptr;
}

}  // namespace

// The device and its context.

DEEPKERN_API CUresult cuInit(unsigned int) { return CUDA_SUCCESS; }

DEEPKERN_API CUresult cuDriverGetVersion(int* version) {
  *version = DRIVER_VERSION;
  return CUDA_SUCCESS;
}

DEEPKERN_API CUresult cuGetErrorString(CUresult code, const char** text) {
  *text = description(code);
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

DEEPKERN_API CUresult cuGetErrorName(CUresult code, const char** text) {
  *text = description(code) ? error_name(code) : nullptr;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

DEEPKERN_API CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}

DEEPKERN_API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  CUresult checked = check_device("cuDeviceGet", ordinal);
  if (checked == CUDA_SUCCESS) *device = ordinal;
  return checked;
}

DEEPKERN_API CUresult cuDeviceGetName(char* name, int bytes, CUdevice device) {
  CUresult checked = check_device("cuDeviceGetName", device);
  if (checked != CUDA_SUCCESS) return checked;
  std::strncpy(name, Driver::get().device().part, static_cast<size_t>(bytes));
  if (bytes > 0) name[bytes - 1] = 0;
  return CUDA_SUCCESS;
}

DEEPKERN_API CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  CUresult checked = check_device("cuDeviceGetAttribute", device);
  if (checked != CUDA_SUCCESS) return checked;
  if (attribute_of(Driver::get().device(), attribute, *value)) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_VALUE, "cuDeviceGetAttribute",
                "attribute " + std::to_string(attribute) + " is not known to this machine");
}

DEEPKERN_API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  CUresult checked = check_device("cuDevicePrimaryCtxRetain", device);
  if (checked == CUDA_SUCCESS) *context = the_context();
  return checked;
}

DEEPKERN_API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  return check_device("cuDevicePrimaryCtxRelease", device);
}

DEEPKERN_API CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current_context;
  return CUDA_SUCCESS;
}

DEEPKERN_API CUresult cuCtxSetCurrent(CUcontext context) {
  if (context != nullptr && context != the_context()) {
    return refuse(CUDA_ERROR_INVALID_CONTEXT, "cuCtxSetCurrent", "not a context of this machine");
  }
  current_context = context;
  return CUDA_SUCCESS;
}

DEEPKERN_API CUresult cuCtxGetDevice(CUdevice* device) {
  if (!current_context) {
    return refuse(CUDA_ERROR_INVALID_CONTEXT, "cuCtxGetDevice", "no context is current");
  }
  *device = 0;
  return CUDA_SUCCESS;
}

DEEPKERN_API CUresult cuCtxSynchronize() { return CUDA_SUCCESS; }

DEEPKERN_API CUresult cuCtxGetLimit(size_t* value, int limit) {
  if (limit < 0 || limit > 2) {
    return refuse(CUDA_ERROR_UNSUPPORTED_LIMIT, "cuCtxGetLimit", "limit " + std::to_string(limit));
  }
  *value = limits[limit];
  return CUDA_SUCCESS;
}

DEEPKERN_API CUresult cuCtxSetLimit(int limit, size_t value) {
  if (limit < 0 || limit > 2) {
    return refuse(CUDA_ERROR_UNSUPPORTED_LIMIT, "cuCtxSetLimit", "limit " + std::to_string(limit));
  }
  limits[limit] = value;
  return CUDA_SUCCESS;
}

DEEPKERN_API CUresult cuStreamSynchronize(CUstream) { return CUDA_SUCCESS; }

DEEPKERN_API CUresult cuStreamIsCapturing(CUstream, int* status) {
  *status = 0;  // CU_STREAM_CAPTURE_STATUS_NONE
  return CUDA_SUCCESS;
}

DEEPKERN_API CUresult cuPointerGetAttribute(void* data, int attribute, CUdeviceptr pointer) {
  const char* api = "cuPointerGetAttribute";
  Allocation found;
  if (!Driver::get().find_allocation(pointer, found)) {
    char address[32];
    std::snprintf(address, sizeof(address), "%#llx", pointer);
    return refuse(CUDA_ERROR_INVALID_VALUE, api,
                  std::string(address) + " is in no tensor of this launch");
  }
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      *static_cast<CUcontext*>(data) = the_context();
      break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<unsigned*>(data) = 2;
      break;  // device
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      *static_cast<CUdeviceptr*>(data) = pointer;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *static_cast<int*>(data) = 0;
      break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      *static_cast<CUdeviceptr*>(data) = found.address;
      break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      *static_cast<size_t*>(data) = found.bytes;
      break;
    default:
      return refuse(CUDA_ERROR_NOT_SUPPORTED, api, "attribute " + std::to_string(attribute));
  }
  return CUDA_SUCCESS;
}

// Modules and kernels.

DEEPKERN_API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return Driver::get().load(static_cast<const char*>(image), module);
}

DEEPKERN_API CUresult cuModuleUnload(CUmodule module) { return Driver::get().unload(module); }

DEEPKERN_API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return Driver::get().find_function(module, name, function);
}

DEEPKERN_API CUresult cuFuncGetAttribute(int* value, int attribute, CUfunction handle) {
  const char* api = "cuFuncGetAttribute";
  Function* function = Driver::get().function(handle);
  if (!function) return refuse(CUDA_ERROR_INVALID_HANDLE, api, "no such kernel");
  const Kernel& kernel = *function->kernel;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = function->max_threads();
      break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = kernel.static_shared_bytes;
      break;
    case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
      *value = 0;
      break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      *value = kernel.local_bytes;
      break;
    // PTX has no registers of a thread yet: the limit that it states, or 0.
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = kernel.max_registers;
      break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *value = function->max_dynamic_shared;
      break;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      *value = function->allows_non_portable_cluster;
      break;
    default:
      return refuse(CUDA_ERROR_INVALID_VALUE, api, "attribute " + std::to_string(attribute));
  }
  return CUDA_SUCCESS;
}

DEEPKERN_API CUresult cuFuncSetAttribute(CUfunction handle, int attribute, int value) {
  const char* api = "cuFuncSetAttribute";
  Function* function = Driver::get().function(handle);
  if (!function) return refuse(CUDA_ERROR_INVALID_HANDLE, api, "no such kernel");
  const Device& device = Driver::get().device();
  int limit = device.shared_per_block - function->kernel->static_shared_bytes;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      if (value < 0 || value > limit) {
        return refuse(CUDA_ERROR_INVALID_VALUE, api,
                      std::to_string(value) + " bytes of dynamic shared memory: a block of " +
                          function->kernel->name + " has at most " + std::to_string(limit) +
                          " on sm_" + std::to_string(device.capability));
      }
      function->max_dynamic_shared = value;
      break;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      function->allows_non_portable_cluster = value != 0;
      break;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
    case CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
      break;
    default:
      return refuse(CUDA_ERROR_INVALID_VALUE, api, "attribute " + std::to_string(attribute));
  }
  return CUDA_SUCCESS;
}

DEEPKERN_API CUresult cuFuncSetCacheConfig(CUfunction handle, int) {
  if (Driver::get().function(handle)) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_HANDLE, "cuFuncSetCacheConfig", "no such kernel");
}

DEEPKERN_API CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction handle,
                                                   const CUlaunchConfig* config) {
  const char* api = "cuOccupancyMaxActiveClusters";
  Function* function = Driver::get().function(handle);
  if (!function) return refuse(CUDA_ERROR_INVALID_HANDLE, api, "no such kernel");
  LaunchRequest request = request_of(*config);
  CUresult checked = read_attributes(api, *config, request);
  if (checked == CUDA_SUCCESS) {
    // Triton's request has a block of 128 threads for any kernel.
    int threads = function->max_threads();
    request.config.block[0] = static_cast<uint32_t>(threads);
    const int* required = function->kernel->required_threads;
    for (int i = 0; i < 3; ++i) {
      if (required[i] > 0) request.config.block[i] = static_cast<uint32_t>(required[i]);
    }
    checked = check_launch(api, *function, request);
    const uint32_t* c = request.config.cluster;
    int64_t shared = int64_t(config->sharedMemBytes) + function->kernel->static_shared_bytes;
    if (checked == CUDA_SUCCESS) {
      *clusters = resident_clusters(Driver::get().device(), static_cast<int>(c[0] * c[1] * c[2]),
                                    threads, shared);
    }
  }
  return checked;
}

DEEPKERN_API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle,
                                       void** parameters, void** extra) {
  const char* api = "cuLaunchKernelEx";
  Function* function = Driver::get().function(handle);
  if (!function) return refuse(CUDA_ERROR_INVALID_HANDLE, api, "no such kernel");
  if (extra) return refuse(CUDA_ERROR_NOT_SUPPORTED, api, "parameters through `extra`");
  if (!parameters && !function->kernel->parameters.empty()) {
    return refuse(CUDA_ERROR_INVALID_VALUE, api, "no parameters");
  }
  LaunchRequest request = request_of(*config);
  CUresult checked = read_attributes(api, *config, request);
  if (checked == CUDA_SUCCESS) checked = check_launch(api, *function, request);
  if (checked != CUDA_SUCCESS) return checked;
  return run(*function, request, parameters);
}

DEEPKERN_API CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                                     unsigned int grid_z, unsigned int block_x,
                                     unsigned int block_y, unsigned int block_z,
                                     unsigned int shared_bytes, CUstream stream, void** parameters,
                                     void** extra) {
  CUlaunchConfig config = {grid_x,  grid_y,       grid_z, block_x, block_y,
                           block_z, shared_bytes, stream, nullptr, 0};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}
