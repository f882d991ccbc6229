// Buffers that go round between warps that fill them and warps that read them.
#pragma once

#include "primitives.cuh"

namespace sm90 {

// The barriers of STAGES buffers, and where this warp stands among them.
template <int STAGES>
struct Ring {
  static constexpr uint32_t BYTES = 2 * STAGES * sizeof(Barrier);
  Barrier *full, *empty;
  int stage = 0;
  uint32_t round = 0;

  SM90_DEVICE explicit Ring(char* barriers)
      : full(reinterpret_cast<Barrier*>(barriers)), empty(full + STAGES) {}
  // By one thread, which then calls barrier_init_fence: how many arrivals fill and free a buffer.
  SM90_DEVICE void init(int fills, int frees) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(&full[s], fills);
      barrier_init(&empty[s], frees);
    }
  }
  SM90_DEVICE void wait_full() { barrier_wait(&full[stage], round); }
  SM90_DEVICE void wait_empty() { barrier_wait(&empty[stage], round ^ 1); }  // the first at once
  SM90_DEVICE void next() {
    if (++stage == STAGES) stage = 0, round ^= 1;
  }
};

}  // namespace sm90
