// FP8 matrix products with block scales on Hopper, in all forms of kernels/deepkern/matmul:
//
//     d[m, n] = Σ_j a_scale[m, j] · b_scale[n / 128 or n, j] · Σ_{k in block j} a[m, k] · b[n, k]
//
// Cut: as many blocks as fit on the GPU each go through tiles of D (schedule.cuh). One warp of a
// block only loads: 64·GROUPS rows of the left operand and N of the right one by TMA, 128 of K at a
// time, through a ring of STAGES buffers. GROUPS warpgroups multiply, 64 rows each. A buffer goes
// round between two barriers:
//
//     loader       wait empty[s] -> announce bytes, TMA -> full[s]
//     warpgroup    wait full[s] -> 4 WGMMA -> empty[s] -> sum = fma(product, scales, sum)
//
// WGMMA keeps some 14 bits of an FP8 sum, hence the float32 sum beside it ("promotion"). While one
// warpgroup promotes, the other's WGMMAs run. A is the left operand, but few rows of it are the
// right one (SWAPPED), which may be narrow. Where a row of the right operand has a scale of its own
// a second warp brings those along. With CLUSTER = 2, two blocks one below the other share a tile
// of B: each loads half of it and sends it to both, which halves what L2 has to give.
//
// Where N makes few tiles, the sum over K is cut into `splits` runs (choose.h), which are summed for
// themselves and then added in order. For few rows a cluster of `splits` blocks shares a tile, a run
// to a block: each leaves its sums in its shared memory, and after a barrier each adds up some rows
// of all of them (fp8_gemm_store.cuh). For many rows a block sums one run after the other.
//
// Large products are bound by the tensor cores, those of few rows by reading B.
//
// Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; DeepGEMM.
#pragma once

#include "fp8_gemm_store.cuh"

namespace sm90 {

// The scales of one row of an operand, from the tile's first block on.
SM90_DEVICE const float* scale_row(const Scales& s, int group, int row, int rows) {
  return s.data + group * s.group + static_cast<int64_t>(row / rows) * s.row;
}

// The loading thread.
template <class Tile>
SM90_DEVICE void load_tiles(const TensorMap* a, const TensorMap* b, char* memory,
                            typename Tile::Tiles tiles) {
  Buffers<Tile> ring(memory);
  const int rank = Tile::CLUSTER > 1 ? cluster_rank() : 0;
  const int half = Tile::N / Tile::CLUSTER;
  Work w;
  while (tiles.next(w)) {
    const int a_row = tiles.a_row(w) + rank * Tile::M, b_row = tiles.b_row(w);
    for (int k = 0; k < w.length; k += Tile::K) {
      ring.wait_empty();
      Barrier* full = &ring.full[ring.stage];
      barrier_arrive_expect(full, Tile::STAGE_BYTES);
      if (Tile::SWAPPED) {
        tma_load(ring.left(), b, full, w.k + k, b_row);
        tma_load(ring.right(), a, full, w.k + k, a_row);
      } else if (Tile::CLUSTER == 1) {
        tma_load(ring.left(), a, full, w.k + k, a_row);
        tma_load(ring.right(), b, full, w.k + k, b_row);
      } else {
        tma_load(ring.left(), a, full, w.k + k, a_row);
        tma_load_multicast(ring.right() + rank * half * Tile::K, b, full, w.k + k,
                           b_row + rank * half, (1 << Tile::CLUSTER) - 1);
      }
      ring.next();
    }
  }
}

// The warp that brings the scales of the right operand's rows.
template <class Tile>
SM90_DEVICE void load_scales(const GemmArguments& p, char* memory, typename Tile::Tiles tiles) {
  Buffers<Tile> ring(memory);
  const Scales& scales = Tile::SWAPPED ? p.a_scale : p.b_scale;
  Work w;
  while (tiles.next(w)) {
    const int first = Tile::SWAPPED ? w.row : w.column, last = Tile::SWAPPED ? p.M : p.N;
    for (int j = 0; j * Tile::K < w.length; ++j) {
      ring.wait_empty();
      for (int i = lane_index(); i < Tile::N; i += 32) {
        const int row = first + i;
        const float* at = scale_row(scales, w.group, row < last ? row : 0, 1);
        store_shared(ring.scales() + 4 * i, load_global(at + (w.scale_block + j) * scales.block));
      }
      barrier_arrive(&ring.full[ring.stage]);
      ring.next();
    }
  }
}

// Zeros where a buffer's rows reach beyond `length` values of K, into another group. Both operands:
// 0 times another group's NaN would be NaN.
template <class Tile>
SM90_DEVICE void clear_tail(char* memory, int length) {
  const int threads = 128 * Tile::GROUPS;
  for (int i = thread_index(); i < (Tile::M + Tile::N) * 8; i += threads) {
    const int row = i / 8, chunk = i % 8;
    char* place = memory + row * 128 + (chunk ^ (row % 8)) * 16;
    for (int byte = 0; byte < 16; ++byte) {
      if (chunk * 16 + byte >= length) store_shared(place + byte, uint8_t{0});
    }
  }
  fence_async_proxy();
  named_barrier_sync(1 + Tile::GROUPS, threads);
}

// The products of one tile, promoted: over `length` values of K, whose scales begin at `first`.
// Thread t's rows are `row` and `row` + 8 of the left operand.
template <class Tile>
SM90_DEVICE void multiply(float (&sum)[Tile::N / 2], Buffers<Tile>& ring, const GemmArguments& p,
                          const Work& w, int row, int first, int length) {
  const int group = thread_index() / 128, last = Tile::SWAPPED ? p.N : p.M;
  const Scales& left = Tile::SWAPPED ? p.b_scale : p.a_scale;
  const Scales& right = Tile::SWAPPED ? p.a_scale : p.b_scale;
  const float* above = scale_row(left, w.group, row < last ? row : 0, Tile::LEFT_ROWS);
  const float* below = scale_row(left, w.group, row + 8 < last ? row + 8 : 0, Tile::LEFT_ROWS);
  const float* beside = scale_row(right, w.group, w.column, Tile::RIGHT_ROWS);
  above += first * left.block, below += first * left.block, beside += first * right.block;
  for (int i = 0; i < Tile::N / 2; ++i) sum[i] = 0.0f;
  for (int j = 0; j * Tile::K < length; ++j) {
    // Asked for before the wait, so that they come while it lasts.
    float upper = load_global(above), lower = load_global(below);
    above += left.block, below += left.block;
    if (Tile::RIGHT_ROWS == 128) {
      const float scale = load_global(beside);
      beside += right.block;
      upper *= scale, lower *= scale;
    }
    float product[Tile::N / 2];
    ring.wait_full();
    if (Tile::FORM == Form::k_grouped && length - j * Tile::K < Tile::K) {
      clear_tail<Tile>(ring.left(), length - j * Tile::K);
    }
    wgmma_fence();
    for (int step = 0; step < 4; ++step) {
      const char* rows = ring.left() + group * 64 * Tile::K;
      wgmma_e4m3<Tile::N>(product, matrix_descriptor(rows + step * 32, 0, 1024),
                          matrix_descriptor(ring.right() + step * 32, 0, 1024), step > 0);
    }
    wgmma_commit();
    float scales[Tile::RIGHT_ROWS == 1 ? Tile::N / 4 : 1];
    if (Tile::RIGHT_ROWS == 1) {
      for (int i = 0; i < Tile::N / 4; ++i) {
        const int column = i / 2 * 8 + lane_index() % 4 * 2 + i % 2;
        scales[i] = load_shared<float>(ring.scales() + 4 * column);
      }
    }
    wgmma_wait<0>();
    Barrier* empty = &ring.empty[ring.stage];
    if (Tile::RIGHT_ROWS == 1) warp_sync();  // all lanes have their scales
    if (Tile::CLUSTER == 1) {
      if (lane_index() == 0) barrier_arrive(empty);
    } else if (lane_index() < Tile::CLUSTER) {
      barrier_arrive_at(empty, lane_index());
    }
    for (int i = 0; i < Tile::N / 2; ++i) {
      float scale = i / 2 % 2 ? lower : upper;
      if (Tile::RIGHT_ROWS == 1) scale *= scales[i / 4 * 2 + i % 2];
      sum[i] = fused_multiply_add(product[i], scale, sum[i]);
    }
    ring.next();
  }
}

// A warpgroup's part of all tiles.
template <class Tile>
SM90_DEVICE void multiply_tiles(const TensorMap* out, const GemmArguments& p, char* memory,
                                typename Tile::Tiles tiles) {
  Buffers<Tile> ring(memory);
  Ring<1> shared(memory + Tile::SHARE_BARRIERS);
  const int group = thread_index() / 128, rank = Tile::CLUSTER > 1 ? cluster_rank() : 0;
  const int inside = group * 64 + thread_index() % 128 / 32 * 16 + lane_index() / 4;
  char* ordered = memory + Tile::ORDERED + (Tile::SWAPPED ? 0 : group * 64 * Tile::N * 4);
  const int runs = Tile::IN_TURN ? p.splits : 1;
  Work w;
  while (tiles.next(w)) {
    float sum[Tile::N / 2];
    const int first = (Tile::SWAPPED ? w.column : w.row) + rank * Tile::M;
    for (int r = 0; r < runs; ++r) {
      const int block = Tile::IN_TURN ? r * p.run : 0;
      const int length = Tile::IN_TURN ? clamp(w.length - block * Tile::K, 0, p.run * Tile::K)
                                       : w.length;
      multiply<Tile>(sum, ring, p, w, first + inside, w.scale_block + block, length);
      if (runs > 1) add_run<Tile::N>(sum, ordered, r == 0, r == runs - 1);
    }
    if (Tile::SWAPPED) {
      store_swapped<Tile>(sum, shared, ordered, p, w, tiles, inside);
    } else {
      store<Tile>(sum, out, p, w, tiles, ordered, first + group * 64);
    }
  }
  if (Tile::SWAPPED) {
    shared.wait_empty();  // the others may still read this block's shares
  } else if (thread_index() % 128 == 0) {
    tma_store_wait_read<0>();
  }
  warp_sync();  // whole warps come to the cluster's barrier
}

template <class Tile>
SM90_KERNEL(Tile::THREADS, Tile::RESIDENT)
void fp8_gemm(SM90_PARAMETER TensorMap a, SM90_PARAMETER TensorMap b,
              SM90_PARAMETER TensorMap out, SM90_PARAMETER GemmArguments p) {
  char* memory = shared_memory();
  Buffers<Tile> ring(memory);
  const int warp = warp_index(), loader = 4 * Tile::GROUPS;
  const int cluster = Tile::SPREAD ? p.splits : Tile::CLUSTER;
  if (warp == loader && elect_one()) {
    prefetch(&a);
    prefetch(&b);
    ring.init(Tile::LOADS, 4 * Tile::GROUPS * Tile::CLUSTER);  // each warp that reads
    const int sharing = 4 * Tile::GROUPS * cluster;
    if (Tile::SWAPPED) Ring<1>(memory + Tile::SHARE_BARRIERS).init(sharing, sharing);
    barrier_init_fence();
  }
  if (Tile::CLUSTER > 1) {
    cluster_sync();
  } else {
    block_sync();
  }
  if (Tile::SPREAD) cluster_arrive();  // is waited for before blocks talk; loading needs no other

  typename Tile::Tiles tiles(p, block_index() / cluster, block_count() / cluster);
  if (Tile::SPREAD) tiles.take_run(cluster_rank());
  // A thread may have 168 of the registers at first; one warpgroup alone has enough of them.
  if (warp >= loader) {
    if (Tile::GROUPS > 1) registers_decrease<40>();
    if (warp == loader && elect_one()) load_tiles<Tile>(&a, &b, memory, tiles);
    if (warp == loader + 1 && Tile::RIGHT_ROWS == 1) load_scales<Tile>(p, memory, tiles);
    warp_sync();
    if (Tile::SPREAD) cluster_wait();
  } else {
    if (Tile::GROUPS > 1) registers_increase<232>();
    if (Tile::SPREAD) cluster_wait();
    multiply_tiles<Tile>(&out, p, memory, tiles);
  }
  // A block's barriers and buffers must be there until the other has sent its last.
  if (Tile::CLUSTER > 1) cluster_sync();
}

// Where the rows of each group lie: sizes[g] their first, sizes[groups + g] the one after the last,
// set to more than all rows and to 0 before. Rows of no group are cleared. A warp takes a row.
SM90_KERNEL(128, 1)
void find_groups(const int* group_index, int* sizes, char* out, int M, int groups,
                        int64_t row_bytes) {
  const int warps = block_count() * 4;
  for (int m = block_index() * 4 + warp_index(); m < M; m += warps) {
    const int g = load_global(group_index + m);
    if (g >= 0 && g < groups) {
      if (lane_index() == 0) {
        atomic_min(sizes + g, m);
        atomic_max(sizes + groups + g, m + 1);
      }
      continue;
    }
    for (int64_t i = 2 * lane_index(); i < row_bytes; i += 64) {
      store_global(reinterpret_cast<uint16_t*>(out + m * row_bytes + i), uint16_t{0});
    }
  }
}

}  // namespace sm90
