// What Python calls through ctypes, apart from the CUDA functions; see runtime/ptx_library.py.
//
// A function that can fail returns a CUresult, or a null pointer; deepkern_ptx_message then has the
// reason.
#include "../python_module.h"
#include "driver.h"
#include "profile.h"

using namespace deepkern::ptx;

DEEPKERN_API CUresult cuLaunchKernelEx(const CUlaunchConfig*, CUfunction, void**, void**);

// The message of this thread's last refusal or failure; empty if there is none.
DEEPKERN_API const char* deepkern_ptx_message() { return last_message().c_str(); }

DEEPKERN_API void deepkern_ptx_clear_message() { clear_message(); }

DEEPKERN_API CUresult deepkern_ptx_set_target(int capability) {
  if (Driver::get().set_target(capability)) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_DEVICE, "deepkern_ptx_set_target",
                "sm_" + std::to_string(capability) + ": there are 80, 89, 90, 100 and 120");
}

DEEPKERN_API CUresult deepkern_ptx_set_options(uint64_t seed, int order, int check_races,
                                               int check_initialized, int hardware_sums,
                                               int resident_blocks, uint64_t max_instructions) {
  if (order < 0 || order > Options::LATEST || resident_blocks < 1) {
    return refuse(
        CUDA_ERROR_INVALID_VALUE, "deepkern_ptx_set_options",
        "order " + std::to_string(order) + ", resident_blocks " + std::to_string(resident_blocks));
  }
  Options options;
  options.seed = seed;
  options.order = static_cast<Options::Order>(order);
  options.check_races = check_races != 0;
  options.check_initialized = check_initialized != 0;
  options.hardware_sums = hardware_sums != 0;
  options.resident_blocks = resident_blocks;
  options.max_instructions = max_instructions;
  Driver::get().set_options(options);
  return CUDA_SUCCESS;
}

// A kernel may touch these bytes until deepkern_ptx_unregister. Returns a number for that call.
DEEPKERN_API uint64_t deepkern_ptx_register(uint64_t address, uint64_t bytes, const char* name) {
  return Driver::get().add_allocation(address, bytes, name);
}

DEEPKERN_API CUresult deepkern_ptx_unregister(uint64_t id) {
  if (Driver::get().remove_allocation(id)) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_VALUE, "deepkern_ptx_unregister", "no such allocation");
}

// A module of PTX text, for the target that is set; null if it is refused.
DEEPKERN_API CUmodule deepkern_ptx_load(const char* text) {
  CUmodule module = nullptr;
  return Driver::get().load(text, &module) == CUDA_SUCCESS ? module : nullptr;
}

DEEPKERN_API CUresult deepkern_ptx_unload(CUmodule module) { return Driver::get().unload(module); }

// Runs a kernel. `sizes` has the grid, the block and the cluster, three numbers each. The
// attributes for more than 48 KiB of shared memory and for clusters of 16 are set as needed.
DEEPKERN_API CUresult deepkern_ptx_launch(CUmodule module, const char* name, const uint32_t* sizes,
                                          uint32_t dynamic_shared_bytes, int programmatic,
                                          void** parameters) {
  CUfunction handle;
  CUresult found = Driver::get().find_function(module, name, &handle);
  if (found != CUDA_SUCCESS) return found;
  Function* function = Driver::get().function(handle);
  int limit = Driver::get().device().shared_per_block - function->kernel->static_shared_bytes;
  function->max_dynamic_shared = limit;
  function->allows_non_portable_cluster = true;
  CUlaunchAttribute attributes[2] = {};
  attributes[0].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  attributes[0].value.clusterDim = {sizes[6], sizes[7], sizes[8]};
  attributes[1].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attributes[1].value.programmaticStreamSerializationAllowed = programmatic;
  CUlaunchConfig config = {
      sizes[0], sizes[1],   sizes[2], sizes[3], sizes[4], sizes[5], dynamic_shared_bytes,
      nullptr,  attributes, 2};
  return cuLaunchKernelEx(&config, handle, parameters, nullptr);
}

// Counts the launches from now on, with every `every`-th cluster of a grid alone; 0 ends that.
DEEPKERN_API void deepkern_ptx_profile(uint32_t every) { ProfileLog::get().turn_on(every); }

// The profiles of the launches since the last call, as JSON; valid until this thread's next call.
DEEPKERN_API const char* deepkern_ptx_take_profile() {
  thread_local std::string text;
  text = ProfileLog::get().take();
  return text.c_str();
}

DEEPKERN_EMPTY_PYTHON_MODULE(_ptx)
