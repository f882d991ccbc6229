// mla_prefill and its gradients (csrc/sm90) in the emulator, as C functions for tests.
#include "../../sm90/mla_prefill.cuh"
#include "../../sm90/mla_prefill_dkv.cuh"

#include "harness.h"

// Sets the sizes of the scratch tensor as sm90/ops.cpp does.
extern "C" void emulate_plan_mla_prefill(deepkern::MlaPrefillArguments* p) {
  deepkern::plan_mla_prefill(*p);
}

// A tensor map of x [rows, heads, dim] as mla_prefill.cu encodes it.
static TensorMap map_of(const void* x, int rows, int heads, int dim, int64_t row_stride,
                        int head_stride, uint32_t box_rows = 128) {
  return {static_cast<char*>(const_cast<void*>(x)),
          static_cast<uint64_t>((heads - 1) * head_stride + dim),
          static_cast<uint64_t>(rows),
          static_cast<uint64_t>(row_stride) * 2,
          64,
          box_rows,
          2,
          true};
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
    Machine(find, [&] {
      find_prefill_tiles<QUERY_ROWS>({p->cu_seqlens_q, p->num_boundaries, p->T},
                                     {p->cu_seqlens_k, p->num_boundaries, p->Tk}, p->causal,
                                     p->tiles, p->num_tiles);
    }).run();
    const auto attend = make_launch(options, blocks, PrefillTile::THREADS, PrefillTile::SMEM_BYTES);
    Machine(attend, [&] { mla_prefill(q, k, v, *p); }).run();
  });
}

extern "C" void emulate_plan_mla_prefill_backward(deepkern::MlaPrefillBackwardArguments* p) {
  deepkern::plan_mla_prefill_backward(*p);
}

extern "C" int emulate_mla_prefill_backward(const deepkern::MlaPrefillBackwardArguments* args,
                                            int blocks, RunOptions options) {
  const MlaPrefillArguments& p = args->forward;
  const int Hk = p.H / p.heads_per_key, find_blocks = (p.num_boundaries + 1 + 3) / 4;
  const auto grad_out = map_of(args->grad_out, p.T, p.H, 128, args->grad_out_row_stride,
                               args->grad_out_head_stride, 64);
  const auto q = map_of(p.q, p.T, p.H, 192, p.q_row_stride, p.q_head_stride, 64);
  const auto k = map_of(p.k, p.Tk, Hk, 192, p.k_row_stride, p.k_head_stride, 64);
  const auto v = map_of(p.v, p.Tk, Hk, 128, p.v_row_stride, p.v_head_stride, 64);
  const Boundaries queries{p.cu_seqlens_q, p.num_boundaries, p.T};
  const Boundaries keys{p.cu_seqlens_k, p.num_boundaries, p.Tk};
  const auto run = [&](int grid, int threads, uint32_t smem, const std::function<void()>& kernel) {
    Machine(make_launch(options, grid, threads, smem), kernel).run();
  };
  return run_checked(options, [&] {
    run((p.T * p.H + 3) / 4, 128, 0, [&] { mla_prefill_delta(*args); });
    run(find_blocks, 128, 0, [&] {
      find_prefill_tiles<QUERY_ROWS>(queries, keys, p.causal, p.tiles, p.num_tiles);
    });
    run(find_blocks, 128, 0, [&] {
      find_prefill_tiles<DkvTile::KEYS>(keys, queries, false, args->key_tiles,
                                        args->num_key_tiles);
    });
    run(blocks, 384, DqTile::SMEM_BYTES, [&] { mla_prefill_dq(grad_out, q, k, v, *args); });
    run(blocks, 384, DkvTile::SMEM_BYTES, [&] { mla_prefill_dkv(grad_out, q, k, v, *args); });
  });
}
