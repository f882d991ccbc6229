// csrc/sm90/mla_decode.cuh in the emulator, as C functions for tests.
#include "../../sm90/mla_decode.cuh"

#include <algorithm>
#include <cstdio>

#include "../primitives.h"

// Chooses the splits as sm90/ops.cpp does, which gives the sizes of the scratch tensors.
extern "C" void emulate_cut_mla(deepkern::MlaArguments* p) { deepkern::plan_mla_splits(*p); }

// 0: success; 1: failure, and `message` has the error.
extern "C" int emulate_mla_decode(const deepkern::MlaArguments* p, int blocks, uint64_t seed,
                                  int order, char* message, int message_bytes) {
  using sm90::MlaTile;
  emulator::Launch launch;
  launch.seed = seed;
  launch.order = static_cast<emulator::Order>(order);
  launch.blocks = std::min(p->batch * p->row_tiles * p->num_splits, blocks);
  launch.threads = MlaTile::THREADS;
  launch.shared_bytes = MlaTile::SMEM_BYTES;
  const sm90::TensorMap map{static_cast<char*>(const_cast<void*>(p->cache)), MlaTile::WIDTH,
                            static_cast<uint64_t>(p->tma_rows()),
                            static_cast<uint64_t>(p->token_stride) * 2, 64, MlaTile::TOKENS, 2,
                            true};
  const sm90::TensorMap q_map{static_cast<char*>(const_cast<void*>(p->q)), MlaTile::WIDTH,
                              static_cast<uint64_t>(p->batch) * p->Sq * p->H,
                              static_cast<uint64_t>(p->q_row_stride) * 2, 64, MlaTile::ROWS, 2,
                              true};
  try {
    const auto kernel = p->sparse ? p->fp8 ? sm90::mla_decode<true, true>
                                           : sm90::mla_decode<false, true>
                        : p->fp8 ? sm90::mla_decode<true, false>
                                 : sm90::mla_decode<false, false>;
    emulator::Machine machine(launch, [&] { kernel(map, q_map, *p); });
    launch.blocks = p->batch * ((p->Sq * p->H + 3) / 4);
    launch.threads = 128;
    launch.shared_bytes = 0;
    if (p->num_splits > 1) machine.add_dependent_grid(launch, [&] { sm90::mla_combine(*p); });
    machine.run();
  } catch (const std::exception& error) {
    std::snprintf(message, message_bytes, "%s", error.what());
    return 1;
  }
  return 0;
}
