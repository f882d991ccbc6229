// What csrc/sm90/ops.cpp needs to run on CPU tensors over the PTX machine.
//
// Launches go to the library that a test has loaded, so a library with a planted bug needs no second
// registration of the ops. Memory that an op allocates is memory that its kernels may touch.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "sm90/launch.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

extern "C" uint64_t deepkern_ptx_register(uint64_t address, uint64_t bytes, const char* name);
extern "C" int deepkern_ptx_unregister(uint64_t number);

namespace {

std::string (*launch_gemm)(const deepkern::Fp8GemmProblem&, void*) = nullptr;
std::string (*launch_mla)(deepkern::MlaArguments, void*) = nullptr;
std::string (*launch_prefill)(const deepkern::MlaPrefillArguments&, void*) = nullptr;
std::string (*launch_prefill_backward)(const deepkern::MlaPrefillBackwardArguments&,
                                       void*) = nullptr;

struct Block {
  void* memory;
  uint64_t number;  // of the registration
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  deepkern_ptx_unregister(block->number);
  std::free(block->memory);
  delete block;
}

// Registers what it allocates. The alignment is CUDA's; every byte is 0xff, so floats are NaN.
struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const size_t whole = (bytes + 255) / 256 * 256 + 256;
    auto* block = new Block{std::aligned_alloc(256, whole), 0};
    if (block->memory == nullptr) throw std::bad_alloc();
    std::memset(block->memory, 0xff, whole);
    const std::string name = "memory that the op allocated, " + std::to_string(bytes) + " bytes";
    block->number =
        deepkern_ptx_register(reinterpret_cast<uint64_t>(block->memory), bytes, name.c_str());
    return {block->memory, block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
} allocator;

c10::Allocator* allocator_before = nullptr;

}  // namespace

namespace deepkern {

std::string launch_fp8_gemm(const Fp8GemmProblem& problem, void* stream) {
  return launch_gemm(problem, stream);
}

std::string launch_mla_decode(MlaArguments arguments, void* stream) {
  return launch_mla(arguments, stream);
}

std::string launch_mla_prefill(const MlaPrefillArguments& arguments, void* stream) {
  return launch_prefill(arguments, stream);
}

std::string launch_mla_prefill_backward(const MlaPrefillBackwardArguments& arguments,
                                        void* stream) {
  return launch_prefill_backward(arguments, stream);
}

// Replaces sm90/stream.cpp: the machine has the default stream alone.
bool current_stream(int, void** stream) {
  *stream = nullptr;
  return true;
}

}  // namespace deepkern

// Sets the launchers of later calls of the ops.
EXPORTED void machine_use(void* gemm, void* mla, void* prefill, void* prefill_backward) {
  launch_gemm = reinterpret_cast<decltype(launch_gemm)>(gemm);
  launch_mla = reinterpret_cast<decltype(launch_mla)>(mla);
  launch_prefill = reinterpret_cast<decltype(launch_prefill)>(prefill);
  launch_prefill_backward = reinterpret_cast<decltype(launch_prefill_backward)>(prefill_backward);
}

// Until machine_end_op, CPU tensors come from the allocator above.
EXPORTED void machine_begin_op() {
  allocator_before = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&allocator, 0);
}

EXPORTED void machine_end_op() { c10::SetCPUAllocator(allocator_before, 0); }
