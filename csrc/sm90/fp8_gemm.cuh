// FP8 matrix products with block scales on Hopper, in all variants of kernels/deepkern/matmul:
//
//     d[m, n] = Σ_j a_scale[m, j] · b_scale[n / 128 or n, j] · Σ_{k in block j} a[m, k] · b[n, k]
//
// Parallelization: a persistent kernel. Each resident block loops over tiles of D (schedule.cuh). A
// block has one producer warpgroup and WARPGROUPS consumer warpgroups. One thread of the producer
// loads 64·WARPGROUPS rows of the left MMA operand (lhs) and N rows of the right one (rhs) by TMA,
// 128 values of K per stage of a ring with STAGES buffers. Each consumer warpgroup multiplies 64
// lhs rows. A full and an empty barrier per stage s synchronize them:
//
//     producer     wait empty[s] -> announce bytes, issue TMA -> full[s]
//     consumer     wait full[s] -> 4 WGMMA -> arrive empty[s] -> sum = fma(product, scales, sum)
//
// WGMMA keeps about 14 bits of an FP8 sum, so each K block's product is promoted to a float32 sum.
// While one consumer promotes, the other one's WGMMAs run. The lhs is A. For small M it is B
// (SWAPPED), because the rhs may be narrow. If each rhs row has its own scale, a second producer
// warp loads these scales. With CLUSTER = 2, two blocks with neighbouring tile rows share a tile of
// B: each loads half of it and multicasts it to both, which halves the reads from L2.
//
// Split-K: where N gives few tiles, K is split in `num_splits` ranges (choose.h), whose partial
// sums are added in a fixed order. For small M a cluster of `num_splits` blocks computes a tile,
// one split per block. The blocks exchange partial sums through smem (fp8_gemm_store.cuh). For
// large M a block computes one split after the other.
//
// Limit: large products are limited by the tensor cores, products with small M by reading B.
//
// Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; DeepGEMM.
#pragma once

#include "fp8_gemm_store.cuh"

namespace sm90 {

// The scales [K blocks] of one row of an operand.
SM90_DEVICE const float* scales_of_row(const Scales& s, int group, int row, int rows_per_scale) {
  return s.data + group * s.group_stride +
         static_cast<int64_t>(row / rows_per_scale) * s.row_stride;
}

// Producer thread: loads both operands of all tiles.
template <class Tile>
SM90_DEVICE void load_operands(const TensorMap* a, const TensorMap* b, char* smem,
                               typename Tile::Tiles tiles) {
  OperandRing<Tile> ring(smem);
  const int rank = Tile::CLUSTER > 1 ? cluster_rank() : 0;
  const int half = Tile::N / Tile::CLUSTER;  // rows of B that this block loads
  TileWork w;
  while (tiles.next(w)) {
    const int a_row = tiles.a_row(w) + rank * Tile::M, b_row = tiles.b_row(w);
    for (int k = 0; k < w.k_length; k += Tile::K) {
      // Wait for consumer release.
      ring.wait_empty();
      Barrier* full = &ring.full_barrier[ring.stage];
      uint32_t bytes = Tile::STAGE_BYTES;
      WHEN_PLANTED(announces_too_few_bytes, bytes = Tile::LHS_BYTES);
      WHEN_PLANTED(announces_too_many_bytes, bytes += 16);
      barrier_arrive_expect(full, bytes);
      // Issue TMA.
      if (Tile::SWAPPED) {
        tma_load(ring.lhs(), b, full, w.k + k, b_row);
        tma_load(ring.rhs(), a, full, w.k + k, a_row);
      } else if (Tile::CLUSTER == 1) {
        tma_load(ring.lhs(), a, full, w.k + k, a_row);
        tma_load(ring.rhs(), b, full, w.k + k, b_row);
      } else {
        tma_load(ring.lhs(), a, full, w.k + k, a_row);
        const int first = PLANT(multicasts_to_the_same_half, 0, rank * half);
        tma_load_multicast(ring.rhs() + first * Tile::K, b, full, w.k + k, b_row + rank * half,
                           (1 << Tile::CLUSTER) - 1);
      }
      ring.advance();
    }
  }
}

// Producer warp for scales: loads one scale per rhs row and stage.
template <class Tile>
SM90_DEVICE void load_rhs_scales(const GemmArguments& p, char* smem, typename Tile::Tiles tiles) {
  OperandRing<Tile> ring(smem);
  const Scales& scales =
      PLANT(scales_of_wrong_operand, p.b_scale, Tile::SWAPPED ? p.a_scale : p.b_scale);
  TileWork w;
  while (tiles.next(w)) {
    const int first = Tile::SWAPPED ? w.row : w.column, end = Tile::SWAPPED ? p.M : p.N;
    for (int j = 0; j * Tile::K < w.k_length; ++j) {
      ring.wait_empty();
      for (int i = lane_index(); i < Tile::N; i += 32) {
        const int row = first + i;
        const float* from = scales_of_row(scales, w.group, row < end ? row : 0, 1);
        store_shared(ring.rhs_scales() + 4 * i,
                     load_global(from + (w.scale_block + j) * scales.block_stride));
      }
      barrier_arrive(&ring.full_barrier[ring.stage]);
      ring.advance();
    }
  }
}

// Clears both operands of a stage from value `length` of K on, where the next group starts. Both,
// because 0 times NaN is NaN.
template <class Tile>
SM90_DEVICE void clear_k_tail(char* stage, int length) {
  const int threads = 128 * Tile::WARPGROUPS;
  for (int i = thread_index(); i < (Tile::M + Tile::N) * 8; i += threads) {
    const int row = i / 8, chunk = i % 8;
    char* to = stage + row * 128 + (chunk ^ (row % 8)) * 16;  // 128-byte swizzle
    for (int byte = 0; byte < 16; ++byte) {
      if (chunk * 16 + byte >= length) store_shared(to + byte, uint8_t{0});
    }
  }
  UNLESS_PLANTED(no_fence_after_k_tail, fence_async_proxy());
  named_barrier_sync(1 + Tile::WARPGROUPS, threads);
}

// Consumer release: each warp arrives on the stage's empty barrier, in all blocks of the cluster.
template <class Tile>
SM90_DEVICE void release_stage(OperandRing<Tile>& ring) {
  Barrier* empty = &ring.empty_barrier[ring.stage];
  if (Tile::RHS_ROWS_PER_SCALE == 1) {
    UNLESS_PLANTED(no_warp_sync_after_scales, warp_sync());  // all lanes have read their scales
  }
  if (Tile::CLUSTER == 1) {
    if (lane_index() == 0) barrier_arrive(empty);
  } else if (lane_index() < PLANT(neighbour_not_released, 1, Tile::CLUSTER)) {
    barrier_arrive_remote(empty, lane_index());
  }
}

// Mainloop: sum = the scaled products of one tile over `k_length` values of K, whose first scale is
// that of K block `scale_block`. A thread's sums are those of lhs rows `row` and `row` + 8.
template <class Tile>
SM90_DEVICE void multiply(float (&sum)[Tile::N / 2], OperandRing<Tile>& ring,
                          const GemmArguments& p, const TileWork& w, int row, int scale_block,
                          int k_length) {
  constexpr bool RHS_SCALE_PER_ROW = Tile::RHS_ROWS_PER_SCALE == 1;
  const int warpgroup = thread_index() / 128, end = Tile::SWAPPED ? p.N : p.M;
  const Scales& lhs = Tile::SWAPPED ? p.b_scale : p.a_scale;
  const Scales& rhs = Tile::SWAPPED ? p.a_scale : p.b_scale;
  const float* scales_0 =
      scales_of_row(lhs, w.group, row < end ? row : 0, Tile::LHS_ROWS_PER_SCALE);
  const int row_8 = PLANT(reads_scales_past_last_row, row + 8, row + 8 < end ? row + 8 : 0);
  const float* scales_8 = scales_of_row(lhs, w.group, row_8, Tile::LHS_ROWS_PER_SCALE);
  const float* scales_rhs = scales_of_row(rhs, w.group, w.column, Tile::RHS_ROWS_PER_SCALE);
  scales_0 += scale_block * lhs.block_stride, scales_8 += scale_block * lhs.block_stride;
  scales_rhs += scale_block * rhs.block_stride;
  for (int i = 0; i < Tile::N / 2; ++i) sum[i] = 0.0f;
  for (int j = 0; j * Tile::K < k_length; ++j) {
    // Issued before the wait, to hide the latency. nvcc 13 moves these loads behind the wait: see
    // docs/performance.md.
    float scale_row_0 = load_global(scales_0), scale_row_8 = load_global(scales_8);
    scales_0 += lhs.block_stride, scales_8 += lhs.block_stride;
    if (!RHS_SCALE_PER_ROW) {
      const float scale_rhs = load_global(scales_rhs);
      scales_rhs += rhs.block_stride;
      scale_row_0 *= scale_rhs, scale_row_8 *= scale_rhs;
    }
    // Wait for the operands.
    float product[Tile::N / 2];
    ring.wait_full();
    if (Tile::VARIANT == GemmVariant::k_grouped && k_length - j * Tile::K < Tile::K) {
      UNLESS_PLANTED(no_clearing_of_k_tail,
                     clear_k_tail<Tile>(ring.lhs(), k_length - j * Tile::K));
    }
    // Issue four WGMMAs of 32 values of K each.
    UNLESS_PLANTED(no_wgmma_fence, wgmma_fence());
    for (int step = 0; step < 4; ++step) {
      const char* lhs_rows = ring.lhs() + warpgroup * 64 * Tile::K;
      WHEN_PLANTED(reads_past_smem, lhs_rows = ring.smem + Tile::SMEM_BYTES / 16 * 16);
      const uint32_t lhs_stride = PLANT(wrong_descriptor_stride, 512, 1024);
      wgmma_e4m3<Tile::N>(product, matrix_descriptor(lhs_rows + step * 32, 0, lhs_stride),
                          matrix_descriptor(ring.rhs() + step * 32, 0, 1024),
                          PLANT(accumulates_in_first_wgmma, true, step > 0));
    }
    UNLESS_PLANTED(no_wgmma_commit, wgmma_commit());
    float rhs_scales[RHS_SCALE_PER_ROW ? Tile::N / 4 : 1];
    if (RHS_SCALE_PER_ROW) {
      for (int i = 0; i < Tile::N / 4; ++i) {
        const int column = i / 2 * 8 + lane_index() % 4 * 2 + i % 2;
        rhs_scales[i] = load_shared<float>(ring.rhs_scales() + 4 * column);
      }
    }
    WHEN_PLANTED(releases_before_wgmma_wait, release_stage<Tile>(ring));
    UNLESS_PLANTED(no_wgmma_wait, wgmma_wait<PLANT(wgmma_wait_leaves_one, 1, 0)>());
    UNLESS_PLANTED(releases_before_wgmma_wait, release_stage<Tile>(ring));
    // Promote the product of this K block to the float32 sum.
    for (int i = 0; i < Tile::N / 2; ++i) {
      float scale = i / 2 % 2 ? scale_row_8 : scale_row_0;
      if (RHS_SCALE_PER_ROW) scale *= rhs_scales[i / 4 * 2 + i % 2];
      sum[i] = fused_multiply_add(product[i], scale, sum[i]);
    }
    ring.advance();
  }
}

// Consumer warpgroup: mainloop and epilogue of all tiles.
template <class Tile>
SM90_DEVICE void multiply_tiles(const TensorMap* out, const GemmArguments& p, char* smem,
                                typename Tile::Tiles tiles) {
  OperandRing<Tile> ring(smem);
  typename Tile::PartialsRing partials_ring(smem + Tile::PARTIALS_BARRIERS);
  const int warpgroup = thread_index() / 128, rank = Tile::CLUSTER > 1 ? cluster_rank() : 0;
  const int thread_row = warpgroup * 64 + thread_index() % 128 / 32 * 16 + lane_index() / 4;
  char* staging = smem + Tile::STAGING + (Tile::SWAPPED ? 0 : warpgroup * 64 * Tile::N * 4);
  const int serial_splits = Tile::SERIAL_SPLIT_K ? p.num_splits : 1;
  TileWork w;
  while (tiles.next(w)) {
    float sum[Tile::N / 2];
    const int first_row = (Tile::SWAPPED ? w.column : w.row) + rank * Tile::M;
    for (int s = 0; s < serial_splits; ++s) {
      const int block = Tile::SERIAL_SPLIT_K ? s * p.blocks_per_split : 0;
      const int k_left = w.k_length - block * Tile::K;
      const int k_length =
          Tile::SERIAL_SPLIT_K
              ? PLANT(serial_splits_overlap, k_left,
                      clamp(k_left, 0, p.blocks_per_split * Tile::K))
              : w.k_length;
      const int scale_block = w.scale_block + PLANT(serial_split_with_first_scales, 0, block);
      multiply<Tile>(sum, ring, p, w, first_row + thread_row, scale_block, k_length);
      if (serial_splits > 1) {
        accumulate_split<Tile::N>(sum, staging, s == 0, s == serial_splits - 1);
      }
    }
    if (Tile::SWAPPED) {
      store_swapped<Tile>(sum, partials_ring, staging, p, w, tiles, thread_row);
    } else {
      store_tile<Tile>(sum, out, p, w, tiles, staging, first_row + warpgroup * 64);
    }
  }
  // The block's smem must stay valid until other blocks and TMA have read it.
  if (Tile::SWAPPED) {
    UNLESS_PLANTED(exits_before_partials_are_read, partials_ring.wait_empty());
  } else if (thread_index() % 128 == 0) {
    UNLESS_PLANTED(exits_before_tma_has_read, tma_store_wait_read<0>());
  }
  warp_sync();  // the cluster barrier expects converged warps
}

template <class Tile>
SM90_KERNEL(Tile::THREADS, Tile::RESIDENT_BLOCKS)
void fp8_gemm(SM90_PARAMETER TensorMap a,    // e4m3 [rows of A, K], boxes of 128 bytes
              SM90_PARAMETER TensorMap b,    // e4m3 [rows of B, K], boxes of 128 bytes
              SM90_PARAMETER TensorMap out,  // D, boxes [64, 128 bytes], if p.store_by_tma
              SM90_PARAMETER GemmArguments p) {
  char* smem = shared_memory();
  OperandRing<Tile> ring(smem);
  const int warp = warp_index(), producer_warp = 4 * Tile::WARPGROUPS;
  const int cluster = Tile::CLUSTER_SPLIT_K ? p.num_splits : Tile::CLUSTER;
  // Prologue: prefetch tensor maps, initialize barriers.
  if (warp == producer_warp && elect_one()) {
    prefetch(&a);
    prefetch(&b);
    int empty_arrivals = 4 * Tile::WARPGROUPS * Tile::CLUSTER;  // one per consumer warp
    WHEN_PLANTED(expects_one_release_less, empty_arrivals -= 1);
    WHEN_PLANTED(no_wait_for_neighbour, empty_arrivals = 4 * Tile::WARPGROUPS);
    ring.init(Tile::FULL_ARRIVALS, empty_arrivals);
    const int partials_arrivals =
        4 * Tile::WARPGROUPS * PLANT(partials_expect_one_block, 1, cluster);
    if (Tile::SWAPPED) {
      typename Tile::PartialsRing(smem + Tile::PARTIALS_BARRIERS)
          .init(partials_arrivals, partials_arrivals);
    }
    UNLESS_PLANTED(no_barrier_init_fence, barrier_init_fence());
  }
  if (Tile::CLUSTER > 1) {
    cluster_sync();
  } else {
    block_sync();
  }
  // Blocks access each other's smem after the matching cluster_wait. TMA loads fill
  // only this block's smem, so the producer starts at once.
  if (Tile::CLUSTER_SPLIT_K) UNLESS_PLANTED(no_cluster_arrive, cluster_arrive());

  typename Tile::Tiles tiles(p, block_index() / cluster, block_count() / cluster);
  if (Tile::CLUSTER_SPLIT_K) tiles.select_split(cluster_rank());
  // Threads start with up to 168 registers. One consumer warpgroup needs no more than that; two do:
  // 128 · 40 + 256 · 232 = 64,512 = 384 · 168.
  if (warp >= producer_warp) {
    // Producer warpgroup.
    if (Tile::WARPGROUPS > 1) registers_decrease<PLANT(producer_keeps_registers, 96, 40)>();
    if (warp == producer_warp && elect_one()) load_operands<Tile>(&a, &b, smem, tiles);
    if (warp == producer_warp + 1 && Tile::RHS_ROWS_PER_SCALE == 1) {
      load_rhs_scales<Tile>(p, smem, tiles);
    }
    warp_sync();
    if (Tile::CLUSTER_SPLIT_K) UNLESS_PLANTED(no_cluster_wait, cluster_wait());
  } else {
    // Consumer warpgroups.
    if (Tile::WARPGROUPS > 1) registers_increase<PLANT(requests_too_many_registers, 264, 232)>();
    if (Tile::CLUSTER_SPLIT_K) UNLESS_PLANTED(no_cluster_wait, cluster_wait());
    multiply_tiles<Tile>(&out, p, smem, tiles);
  }
  // The smem of a block must stay valid until its neighbour has sent its last data.
  if (Tile::CLUSTER > 1) UNLESS_PLANTED(exits_before_neighbour, cluster_sync());
}

// Pre-pass of contiguous products: finds the row range of each group and clears rows that belong to
// no group. Parallelization: one warp per row.
SM90_KERNEL(128, 1)
void find_group_bounds(const int* group_index,  // [M]
                       int* group_bounds,       // [2 * groups]: first rows (initially > M), ends
                       char* out,               // D: [M, row_bytes]
                       int M, int groups, int64_t row_bytes) {
  const int warps = block_count() * 4;
  for (int m = block_index() * 4 + warp_index(); m < M; m += warps) {
    const int g = load_global(group_index + m);
    if (g >= 0 && g < groups) {
      if (lane_index() == 0) {
        atomic_min(group_bounds + g, m);
        atomic_max(group_bounds + groups + g, m + 1);
      }
      continue;
    }
    for (int64_t i = 2 * lane_index(); i < row_bytes; i += 64) {
      store_global(reinterpret_cast<uint16_t*>(out + m * row_bytes + i), uint16_t{0});
    }
  }
}

}  // namespace sm90
