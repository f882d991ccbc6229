// A ring of smem buffers (pipeline stages) between producer and consumer warps.
#pragma once

#include "primitives.cuh"

namespace sm90 {

// The barriers of STAGES buffers and this warp's position in the ring. Producers signal
// full_barrier[stage], consumers release a buffer through empty_barrier[stage]. CLUSTER_DATA: other
// blocks of the cluster read the buffers, so the waits acquire in the scope of the cluster.
template <int STAGES, bool CLUSTER_DATA = false>
struct Ring {
  static constexpr uint32_t BYTES = 2 * STAGES * sizeof(Barrier);
  Barrier *full_barrier, *empty_barrier;  // [STAGES] each, in smem
  int stage = 0;
  uint32_t phase = 0;  // parity of the current pass through the ring

  SM90_DEVICE explicit Ring(char* barriers)
      : full_barrier(reinterpret_cast<Barrier*>(barriers)), empty_barrier(full_barrier + STAGES) {}
  // One thread calls this, then barrier_init_fence. The arguments are the arrivals per phase.
  SM90_DEVICE void init(int full_arrivals, int empty_arrivals) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(&full_barrier[s], full_arrivals);
      barrier_init(&empty_barrier[s], empty_arrivals);
    }
  }
  SM90_DEVICE void wait_full() {
    const uint32_t parity = PLANT(wait_full_wrong_parity, phase ^ 1, phase);
    UNLESS_PLANTED(no_wait_full, wait(&full_barrier[stage], parity));
  }
  // In the first pass the buffers are free and this returns at once.
  SM90_DEVICE void wait_empty() {
    const uint32_t parity = PLANT(wait_empty_wrong_parity, phase, phase ^ 1);
    UNLESS_PLANTED(no_wait_empty, wait(&empty_barrier[stage], parity));
  }
  SM90_DEVICE void advance() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }

 private:
  static SM90_DEVICE void wait(Barrier* barrier, uint32_t parity) {
    if (CLUSTER_DATA) {
      barrier_wait_acquire_cluster(barrier, parity);
    } else {
      barrier_wait(barrier, parity);
    }
  }
};

}  // namespace sm90
