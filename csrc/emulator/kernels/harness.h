// How tests of the primitives run their small kernels.
#pragma once

#include <cstdio>
#include <functional>

#include "../primitives.h"

using namespace sm90;
using emulator::Launch;
using emulator::Machine;

// How a test runs a kernel.
struct How {
  uint64_t seed;
  int order;
  char* message;
  int room;
};

inline Launch launch_of(const How& how, int blocks, int threads, uint32_t shared_bytes) {
  Launch launch;
  launch.blocks = blocks, launch.threads = threads, launch.shared_bytes = shared_bytes;
  launch.seed = how.seed;
  launch.order = static_cast<emulator::Order>(how.order);
  return launch;
}

inline int guarded(const How& how, const std::function<void()>& run) {
  try {
    run();
  } catch (const std::exception& error) {
    std::snprintf(how.message, how.room, "%s", error.what());
    return 1;
  }
  return 0;
}

inline int guarded(const How& how, const Launch& launch, const std::function<void()>& kernel) {
  return guarded(how, [&] { Machine(launch, kernel).run(); });
}

inline Barrier* new_barrier(char* at, int count) {
  auto* barrier = reinterpret_cast<Barrier*>(at);
  if (thread_index() == 0) {
    barrier_init(barrier, count);
    barrier_init_fence();
  }
  block_sync();
  return barrier;
}
