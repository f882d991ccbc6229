#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {
namespace {

// The fiber that first_call() runs: a new stack has no arguments.
Fiber* starting = nullptr;

// Unused stacks and their size. Mapping a new stack costs more than running a fiber.
std::vector<std::pair<void*, size_t>> spare_stacks;

void* new_stack(size_t bytes) {
  if (!spare_stacks.empty() && spare_stacks.back().second == bytes) {
    void* stack = spare_stacks.back().first;
    spare_stacks.pop_back();
    return stack;
  }
  void* stack = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  // A guard page: a stack overflow faults instead of overwriting other memory.
  mprotect(stack, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
  return stack;
}

void free_spare_stacks() {
  for (const auto& [stack, bytes] : spare_stacks) munmap(stack, bytes);
  spare_stacks.clear();
}

void first_call() {
  starting->run_body();
  std::abort();  // a finished fiber is never entered again
}

}  // namespace

#if defined(__x86_64__)
// Saves the callee-saved registers and stores the stack pointer in *from; continues where `to` was
// saved. swapcontext would make two system calls, and a GEMM tile takes 100,000 switches.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
.section .note.GNU-stack,"",@progbits
.text
)");
#endif

Fiber::Fiber(std::function<void()> body, size_t stack_bytes)
    : body_(std::move(body)), bytes_(stack_bytes) {
  stack_ = new_stack(bytes_);
#if defined(__x86_64__)
  auto** sp = reinterpret_cast<void**>(static_cast<char*>(stack_) + bytes_);
  *--sp = nullptr;  // the ABI of a call: 16-byte alignment minus 8 at the first instruction
  *--sp = reinterpret_cast<void*>(&first_call);
  for (int saved = 0; saved < 6; ++saved) *--sp = nullptr;
  own_ = sp;
#else
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = bytes_;
  context->uc_link = nullptr;
  makecontext(context, first_call, 0);
  own_ = context;
  caller_ = new ucontext_t;
#endif
}

Fiber::~Fiber() {
  spare_stacks.emplace_back(stack_, bytes_);
#if !defined(__x86_64__)
  delete static_cast<ucontext_t*>(own_);
  delete static_cast<ucontext_t*>(caller_);
#endif
}

void Fiber::enter() {
  starting = this;
#if defined(__x86_64__)
  emulator_switch(&caller_, own_);
#else
  swapcontext(static_cast<ucontext_t*>(caller_), static_cast<ucontext_t*>(own_));
#endif
}

void Fiber::leave() {
#if defined(__x86_64__)
  emulator_switch(&own_, caller_);
#else
  swapcontext(static_cast<ucontext_t*>(own_), static_cast<ucontext_t*>(caller_));
#endif
}

void Fiber::run_body() {
  body_();
  finished_ = true;
  leave();
}

}  // namespace emulator

// For a process that loads many libraries of emulated kernels: Linux allows 65,530 mappings.
extern "C" void emulate_free_stacks() { emulator::free_spare_stacks(); }
