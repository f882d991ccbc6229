// Functions with which the tests of the primitives run small kernels.
#pragma once

#include <cstdio>
#include <functional>

#include "../primitives.h"

using namespace sm90;
using emulator::Launch;
using emulator::Machine;

// How to run a kernel, and the buffer for its error message.
struct RunOptions {
  uint64_t seed;
  int order;  // emulator::Order
  char* message;
  int message_bytes;
};

inline Launch make_launch(const RunOptions& options, int blocks, int threads,
                          uint32_t shared_bytes) {
  Launch launch;
  launch.blocks = blocks, launch.threads = threads, launch.shared_bytes = shared_bytes;
  launch.seed = options.seed;
  launch.order = static_cast<emulator::Order>(options.order);
  return launch;
}

// Runs a function. 1: it failed, and options.message has the error.
inline int run_checked(const RunOptions& options, const std::function<void()>& run) {
  try {
    run();
  } catch (const std::exception& error) {
    std::snprintf(options.message, options.message_bytes, "%s", error.what());
    return 1;
  }
  return 0;
}

inline int run_checked(const RunOptions& options, const Launch& launch,
                       const std::function<void()>& kernel) {
  return run_checked(options, [&] { Machine(launch, kernel).run(); });
}

// Initializes an mbarrier; all threads of the block call it.
inline Barrier* new_barrier(char* address, int count) {
  auto* barrier = reinterpret_cast<Barrier*>(address);
  if (thread_index() == 0) {
    barrier_init(barrier, count);
    barrier_init_fence();
  }
  block_sync();
  return barrier;
}
