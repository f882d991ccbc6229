// Fibers: functions that run on stacks of their own and hand the processor to each other.
#pragma once

#include <cstddef>
#include <functional>

namespace emulator {

// Switched to with `enter`; runs until it calls `leave`, or to the end of `body`.
class Fiber {
 public:
  Fiber(std::function<void()> body, size_t stack_bytes);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void enter();
  void leave();
  bool finished() const { return finished_; }

  void run_body();  // what the new stack starts with

 private:
  std::function<void()> body_;
  void* stack_;
  size_t bytes_;
  void* own_ = nullptr;     // saved stack pointers (or contexts)
  void* caller_ = nullptr;
  bool finished_ = false;
};

}  // namespace emulator
