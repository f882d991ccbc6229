// csrc/sm90/mla_prefill.cuh in the emulator, as C functions for tests.
#include "../../sm90/mla_prefill.cuh"

#include "harness.h"

// Sets the sizes of the scratch tensor as sm90/ops.cpp does.
extern "C" void emulate_plan_mla_prefill(deepkern::MlaPrefillArguments* p) {
  deepkern::plan_mla_prefill(*p);
}

// A tensor map of x [rows, heads, dim] as mla_prefill.cu encodes it.
static TensorMap map_of(const void* x, int rows, int heads, int dim, int64_t row_stride,
                        int head_stride) {
  return {static_cast<char*>(const_cast<void*>(x)),
          static_cast<uint64_t>((heads - 1) * head_stride + dim), static_cast<uint64_t>(rows),
          static_cast<uint64_t>(row_stride) * 2, 64, 128, 2, true};
}

// 0: success; 1: failure, and `message` has the error.
extern "C" int emulate_mla_prefill(const deepkern::MlaPrefillArguments* p, int blocks,
                                   RunOptions options) {
  const int Hk = p->H / p->heads_per_key;
  const auto q = map_of(p->q, p->T, p->H, PrefillTile::QK_DIM, p->q_row_stride, p->q_head_stride);
  const auto k = map_of(p->k, p->Tk, Hk, PrefillTile::QK_DIM, p->k_row_stride, p->k_head_stride);
  const auto v = map_of(p->v, p->Tk, Hk, PrefillTile::V_DIM, p->v_row_stride, p->v_head_stride);
  const int find_blocks = (p->num_boundaries + 1 + 3) / 4;
  return run_checked(options, [&] {
    const auto find = make_launch(options, find_blocks, 128, 0);
    Machine(find, [&] { find_prefill_tiles(*p); }).run();
    const auto attend =
        make_launch(options, blocks, PrefillTile::THREADS, PrefillTile::SMEM_BYTES);
    Machine(attend, [&] { mla_prefill(q, k, v, *p); }).run();
  });
}
