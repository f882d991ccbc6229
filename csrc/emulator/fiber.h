// Fibers: functions with stacks of their own that switch to each other within one OS thread.
//
// How: on x86-64 a switch saves the callee-saved registers and the stack pointer; elsewhere it is
// swapcontext, which makes two system calls.
#pragma once

#include <cstddef>
#include <functional>

namespace emulator {

// enter() runs the fiber until it calls leave() or `body` returns.
class Fiber {
 public:
  Fiber(std::function<void()> body, size_t stack_bytes);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void enter();
  void leave();
  bool finished() const { return finished_; }
  const char* stack_end() const { return static_cast<const char*>(stack_) + bytes_; }

  void run_body();  // the first call on the new stack

 private:
  std::function<void()> body_;
  void* stack_;
  size_t bytes_;
  void* own_ = nullptr;     // saved stack pointers (or contexts)
  void* caller_ = nullptr;
  bool finished_ = false;
};

}  // namespace emulator
