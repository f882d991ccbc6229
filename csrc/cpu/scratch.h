// Scratch memory that a thread keeps between calls, so that a small op does not allocate.
#pragma once

#include <cstdint>
#include <memory>

namespace deepkern {

// At least `count` uninitialized floats at a multiple of 64 bytes. The next call on this thread
// invalidates them.
inline float* thread_scratch(int64_t count) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t capacity = 0;
  constexpr int64_t ALIGNMENT = 64;
  if (capacity < count) {
    memory.reset();  // before the larger one is allocated
    capacity = 0;
    memory.reset(new float[count + ALIGNMENT / sizeof(float)]);
    capacity = count;
  }
  const auto address = reinterpret_cast<uintptr_t>(memory.get());
  return reinterpret_cast<float*>((address + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

}  // namespace deepkern
