// The state behind libcuda.cpp: the device, loaded modules, allocations, and refusals.
//
// All of it belongs to the process, except the message of the last refusal, which belongs to a
// thread.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "api.h"
#include "libcuda.h"

namespace deepkern::ptx {

// Limits and sizes of a target.
struct Device {
  int capability;  // 90
  const char* part;
  int num_sms;
  int shared_per_block;  // the most that a block can ask for ("opt-in")
  int shared_per_sm;
  int threads_per_sm;
  int blocks_per_sm;
  int clock_khz;
  int memory_clock_khz;
  int bus_bits;
  int l2_bytes;
  int max_cluster;  // with the non-portable attribute; 1: no clusters
};

constexpr int SHARED_WITHOUT_ATTRIBUTE = 48 << 10;
constexpr int RESERVED_SHARED = 1 << 10;  // of each block, by the system

struct LoadedModule;

struct Function {
  LoadedModule* owner;
  std::shared_ptr<Module> module;
  std::shared_ptr<Kernel> kernel;
  int max_dynamic_shared;
  bool allows_non_portable_cluster = false;

  int max_threads() const;
};

struct LoadedModule {
  std::shared_ptr<Module> module;
  int capability;  // of the device that it was loaded for
  std::vector<std::unique_ptr<Function>> functions;
};

class Driver {
 public:
  static Driver& get();

  bool set_target(int capability);
  const Device& device();
  Options options();
  void set_options(const Options& options);

  uint64_t add_allocation(uint64_t address, uint64_t bytes, const char* name);
  bool remove_allocation(uint64_t id);
  // The allocation that holds `address`; false if there is none.
  bool find_allocation(uint64_t address, Allocation& found);
  // Sorted by address, without duplicates and without empty ones. They overlap where tensors do.
  std::vector<Allocation> allocations();

  CUresult load(const char* image, CUmodule* module);
  CUresult unload(CUmodule module);
  CUresult find_function(CUmodule module, const char* name, CUfunction* function);
  // The function behind a handle, or null. It stays valid until its module is unloaded.
  Function* function(CUfunction handle);

 private:
  struct Registered {
    uint64_t id;
    Allocation allocation;
  };
  std::mutex mutex_;
  const Device* device_ = nullptr;
  Options options_;
  uint64_t next_id_ = 1;
  std::vector<Registered> registered_;
  std::vector<std::unique_ptr<LoadedModule>> modules_;
};

// Keeps "cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE: <reason>" as this thread's message.
CUresult refuse(CUresult code, const char* function, const std::string& reason);
// Keeps a message as it is.
CUresult fail(CUresult code, const std::string& message);
const char* error_name(CUresult code);
const std::string& last_message();
void clear_message();

// launch_checks.cpp: what cuLaunchKernelEx refuses, and how many clusters the device holds.
struct LaunchRequest {
  LaunchConfig config;
  bool cooperative = false;
};
CUresult check_launch(const char* api, Function& function, LaunchRequest& request);
int resident_clusters(const Device& device, int blocks, int threads, int64_t shared_bytes);

}  // namespace deepkern::ptx
