// What cuLaunchKernelEx refuses before a kernel runs.
//
// Source: CUDA C++ programming guide, compute capabilities and thread block clusters; PTX ISA 9.0,
// performance-tuning and cluster dimension directives. The documentation names no error code for a
// cluster on a device without clusters; CUDA_ERROR_NOT_SUPPORTED is this machine's choice.
#include <algorithm>

#include "driver.h"

namespace deepkern::ptx {
namespace {

constexpr uint32_t MAX_GRID[3] = {2147483647u, 65535, 65535};
constexpr uint32_t MAX_BLOCK[3] = {1024, 1024, 64};
constexpr uint32_t PORTABLE_CLUSTER = 8;

std::string text(const uint32_t* v) {
  return "(" + std::to_string(v[0]) + ", " + std::to_string(v[1]) + ", " + std::to_string(v[2]) +
         ")";
}

std::string check_sizes(const char* what, const uint32_t* size, const uint32_t* limit) {
  for (int i = 0; i < 3; ++i) {
    if (size[i] == 0) return std::string(what) + " " + text(size) + ": no dimension may be 0";
    if (size[i] > limit[i]) {
      return std::string(what) + " " + text(size) + ": at most " + text(limit);
    }
  }
  return "";
}

std::string check_block(const Function& function, const uint32_t* block) {
  std::string problem = check_sizes("block", block, MAX_BLOCK);
  if (!problem.empty()) return problem;
  uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
  const int* required = function.kernel->required_threads;
  if (required[0] > 0) {
    for (int i = 0; i < 3; ++i) {
      if (block[i] != static_cast<uint32_t>(std::max(required[i], 1))) {
        uint32_t expected[3];
        for (int j = 0; j < 3; ++j) expected[j] = static_cast<uint32_t>(std::max(required[j], 1));
        return "block " + text(block) + ": the kernel requires " + text(expected) + " (.reqntid)";
      }
    }
  }
  uint64_t limit = static_cast<uint64_t>(function.max_threads());
  if (threads <= limit) return "";
  return "block " + text(block) + ": " + std::to_string(threads) + " threads, at most " +
         std::to_string(limit) + (limit < 1024 ? " (.maxntid)" : "");
}

std::string check_shared(const Device& device, const Function& function, uint32_t dynamic) {
  if (dynamic <= static_cast<uint32_t>(std::max(function.max_dynamic_shared, 0))) return "";
  int limit = device.shared_per_block - function.kernel->static_shared_bytes;
  std::string problem = std::to_string(dynamic) + " bytes of dynamic shared memory: ";
  if (dynamic > static_cast<uint32_t>(std::max(limit, 0))) {
    return problem + "a block of this kernel has at most " + std::to_string(limit) + " on sm_" +
           std::to_string(device.capability);
  }
  return problem + "the kernel's CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES is " +
         std::to_string(function.max_dynamic_shared);
}

// A kernel that declares a cluster runs with that one; a launch may not request another.
CUresult settle_cluster(const char* api, const Function& function, LaunchConfig& config) {
  const int* declared = function.kernel->cluster;
  if (declared[0] == 0) return CUDA_SUCCESS;
  uint32_t wanted[3];
  for (int i = 0; i < 3; ++i) wanted[i] = static_cast<uint32_t>(std::max(declared[i], 1));
  bool asked = config.cluster[0] * config.cluster[1] * config.cluster[2] != 1;
  for (int i = 0; i < 3; ++i) {
    if (asked && config.cluster[i] != wanted[i]) {
      return refuse(CUDA_ERROR_INVALID_CLUSTER_SIZE, api,
                    "cluster " + text(config.cluster) + ": the kernel requires " + text(wanted) +
                        " (.reqnctapercluster)");
    }
  }
  std::copy(wanted, wanted + 3, config.cluster);
  return CUDA_SUCCESS;
}

CUresult check_cluster(const char* api, const Device& device, const Function& function,
                       const LaunchConfig& config) {
  const uint32_t* c = config.cluster;
  uint64_t size = uint64_t(c[0]) * c[1] * c[2];
  if (size == 1) return CUDA_SUCCESS;
  std::string name = "cluster " + text(c);
  if (device.max_cluster == 1) {
    return refuse(CUDA_ERROR_NOT_SUPPORTED, api,
                  name + ": sm_" + std::to_string(device.capability) +
                      " has no clusters, sm_90 and newer have");
  }
  std::string problem;
  if (size == 0) {
    problem = ": no dimension may be 0";
  } else if (size > static_cast<uint64_t>(device.max_cluster)) {
    problem = ": at most " + std::to_string(device.max_cluster) + " blocks on sm_" +
              std::to_string(device.capability);
  } else if (size > PORTABLE_CLUSTER && !function.allows_non_portable_cluster) {
    problem = ": more than 8 blocks need CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED";
  } else {
    for (int i = 0; i < 3; ++i) {
      if (config.grid[i] % c[i] != 0) problem = " does not divide grid " + text(config.grid);
    }
  }
  if (problem.empty()) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_CLUSTER_SIZE, api, name + problem);
}

}  // namespace

int resident_clusters(const Device& device, int blocks, int threads, int64_t shared_bytes) {
  int64_t per_sm = std::min<int64_t>(device.blocks_per_sm, device.threads_per_sm / threads);
  per_sm = std::min(per_sm, device.shared_per_sm / (shared_bytes + RESERVED_SHARED));
  return static_cast<int>(per_sm * device.num_sms / blocks);
}

CUresult check_launch(const char* api, Function& function, LaunchRequest& request) {
  const Device& device = Driver::get().device();
  LaunchConfig& config = request.config;
  if (function.owner->capability != device.capability) {
    return refuse(CUDA_ERROR_INVALID_CONTEXT, api,
                  "the kernel was loaded for sm_" + std::to_string(function.owner->capability) +
                      ", the device is sm_" + std::to_string(device.capability));
  }
  std::string problem = check_sizes("grid", config.grid, MAX_GRID);
  if (problem.empty()) problem = check_block(function, config.block);
  if (problem.empty()) problem = check_shared(device, function, config.dynamic_shared_bytes);
  if (!problem.empty()) return refuse(CUDA_ERROR_INVALID_VALUE, api, problem);
  CUresult settled = settle_cluster(api, function, config);
  if (settled != CUDA_SUCCESS) return settled;
  CUresult checked = check_cluster(api, device, function, config);
  if (checked != CUDA_SUCCESS || !request.cooperative) return checked;

  int blocks = static_cast<int>(config.cluster[0] * config.cluster[1] * config.cluster[2]);
  int threads = static_cast<int>(config.block[0] * config.block[1] * config.block[2]);
  int64_t shared = int64_t(config.dynamic_shared_bytes) + function.kernel->static_shared_bytes;
  int64_t resident = int64_t(resident_clusters(device, blocks, threads, shared)) * blocks;
  uint64_t total = uint64_t(config.grid[0]) * config.grid[1] * config.grid[2];
  if (total <= static_cast<uint64_t>(resident)) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, api,
                std::to_string(total) + " blocks, but sm_" + std::to_string(device.capability) +
                    " holds at most " + std::to_string(resident) + " of this kernel at once");
}

}  // namespace deepkern::ptx
