// FP8 matrix products with block scales on Hopper, in all variants of kernels/deepkern/matmul:
//
//     d[m, n] = Σ_j a_scale[m, j] · b_scale[n / 128 or n, j] · Σ_{k in block j} a[m, k] · b[n, k]
//
// Parallelization: a persistent kernel. Each resident block loops over tiles of D (schedule.cuh). A
// block has one producer warpgroup and WARPGROUPS consumer warpgroups. One thread of the producer
// loads M rows of the left MMA operand (lhs) and N rows of the right one (rhs) by TMA, 128 values
// of K per stage of a ring with STAGES buffers. SCALE_WARPS warps of it load the scales of the
// stage. Each consumer warpgroup multiplies 64 lhs rows, or twice 64 (WAVES = 2) with one set of
// registers for the products. A full and an empty barrier per stage s synchronize them:
//
//     producer     wait empty[s] -> announce bytes, issue TMA -> full[s]
//     scale warp   load scales of several stages -> wait empty[s] -> store to smem -> full[s]
//     consumer     wait full[s] -> 4 WGMMA -> arrive empty[s] -> sum = fma(product, scales, sum)
//
// WGMMA keeps about 14 bits of an FP8 sum, so each K block's product is promoted to a float32 sum.
// While one consumer promotes, the other one's WGMMAs run. The lhs is A. For small M it is B
// (SWAPPED), because the rhs may be narrow. In a cluster of two, blocks with neighbouring tile rows
// share a tile of B, or blocks with neighbouring tile columns share a tile of A: each loads half of
// it and multicasts it to both, which halves the reads from L2.
//
// Split-K: where N gives few tiles, K is split in `num_splits` ranges (choose.h), whose partial
// sums are added in a fixed order. For small M a cluster of `num_splits` blocks computes a tile,
// one split per block. The blocks exchange partial sums through smem (fp8_gemm_store.cuh). For
// large M a block computes one split after the other.
//
// Limit: large products are limited by smem and the tensor cores, products with small M by reading
// B. step_limits in choose.h counts the clocks of each unit.
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
  constexpr uint16_t ALL_BLOCKS = (1 << Tile::CLUSTER) - 1;
  // Of a shared operand, each block of the cluster loads its part and multicasts it.
  constexpr int LHS_PART = Tile::M / Tile::CLUSTER_N, RHS_PART = Tile::N / Tile::CLUSTER_M;
  const int rank = Tile::CLUSTER > 1 ? cluster_rank() : 0;
  const int part = PLANT(multicasts_to_the_same_half, 0, rank);
  TileWork w;
  while (tiles.next(w)) {
    const int a_row = tiles.a_row(w) + (Tile::CLUSTER_M > 1 ? rank * Tile::M : 0);
    const int b_row = tiles.b_row(w) + (Tile::CLUSTER_N > 1 ? rank * Tile::N : 0);
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
      } else {
        if (Tile::CLUSTER_N == 1) {
          tma_load(ring.lhs(), a, full, w.k + k, a_row);
        } else {
          tma_load_multicast(ring.lhs() + part * LHS_PART * Tile::K, a, full, w.k + k,
                             a_row + rank * LHS_PART, ALL_BLOCKS);
        }
        if (Tile::CLUSTER_M == 1) {
          tma_load(ring.rhs(), b, full, w.k + k, b_row);
        } else {
          tma_load_multicast(ring.rhs() + part * RHS_PART * Tile::K, b, full, w.k + k,
                             b_row + rank * RHS_PART, ALL_BLOCKS);
        }
      }
      ring.advance();
    }
  }
}

// The address of scale `i` of a stage, for the first K block of a tile, and the distance to that
// of the next block. Rows outside the matrix have the scale of row 0.
template <class Tile>
SM90_DEVICE const float* find_scale(const GemmArguments& p, const TileWork& w, int i,
                                    int& block_stride) {
  const int rank = Tile::CLUSTER > 1 ? cluster_rank() : 0;
  const int row = w.row + (Tile::CLUSTER_M > 1 ? rank * Tile::M : 0);
  const int column = w.column + (Tile::CLUSTER_N > 1 ? rank * Tile::N : 0);
  const bool is_lhs = i < Tile::LHS_SCALES, is_a = is_lhs != Tile::SWAPPED;
  const Scales& scales =
      is_a || PLANT(scales_of_wrong_operand, true, false) ? p.a_scale : p.b_scale;
  const int at = (is_a ? row : column) + i - (is_lhs ? 0 : Tile::RHS_SCALES_START);
  const bool valid = PLANT(reads_scales_past_last_row, true, at < (is_a ? p.M : p.N)) && at > 0 &&
                     i < Tile::SCALES;
  const int rows_per_scale = is_lhs ? Tile::LHS_ROWS_PER_SCALE : Tile::RHS_ROWS_PER_SCALE;
  block_stride = static_cast<int>(scales.block_stride);
  return scales_of_row(scales, w.group, valid ? at : 0, rows_per_scale) +
         w.scale_block * scales.block_stride;
}

// Producer warps for scales: load the scales of each stage. A lane loads those of four K blocks at
// once (two, if it loads three scales per stage), so that the latency is paid once for as many
// stages.
template <class Tile>
SM90_DEVICE void load_scales(const GemmArguments& p, char* smem, typename Tile::Tiles tiles,
                             int first_thread) {
  constexpr int THREADS = 32 * Tile::SCALE_WARPS;
  constexpr int PER_LANE = (Tile::SCALES + THREADS - 1) / THREADS, BLOCKS = PER_LANE < 3 ? 4 : 2;
  OperandRing<Tile> ring(smem);
  TileWork w;
  while (tiles.next(w)) {
    const float* from[PER_LANE];
    int stride[PER_LANE];
    for (int i = 0; i < PER_LANE; ++i) {
      from[i] = find_scale<Tile>(p, w, first_thread + i * THREADS, stride[i]);
    }
    const int blocks = (w.k_length + Tile::K - 1) / Tile::K;
    for (int j = 0; j < blocks; j += BLOCKS) {
      float value[PER_LANE][BLOCKS];
      for (int block = 0; block < BLOCKS; ++block) {
        for (int i = 0; i < PER_LANE; ++i) {
          value[i][block] = load_global(from[i]);
          if (j + block + 1 < blocks) from[i] += stride[i];
        }
      }
      for (int block = 0; block < BLOCKS && j + block < blocks; ++block) {
        ring.wait_empty();
        for (int i = 0; i < PER_LANE; ++i) {
          const int scale = first_thread + i * THREADS;
          if (scale < Tile::SCALES) store_shared(ring.scales() + 4 * scale, value[i][block]);
        }
        UNLESS_PLANTED(no_warp_sync_after_scale_stores, warp_sync());
        if (lane_index() == 0) barrier_arrive(&ring.full_barrier[ring.stage]);
        ring.advance();
      }
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
  // All lanes have read their scales. wgmma_wait has made the lanes meet before, so a missing
  // warp_sync shows nowhere; it orders the reads of other lanes by the letter of the memory model.
  warp_sync();
  if (Tile::CLUSTER == 1) {
    if (lane_index() == 0) barrier_arrive(empty);
  } else if (lane_index() < PLANT(neighbour_not_released, 1, Tile::CLUSTER)) {
    barrier_arrive_remote(empty, lane_index());
  }
}

// Promotion: adds the products of one K block, times their scales, to the float32 sums. A thread's
// products are those of lhs rows with the scales `lhs_scale` and of the rhs rows of its columns.
template <class Tile>
SM90_DEVICE void promote(float (&sum)[Tile::N / 2], const float (&product)[Tile::N / 2],
                         const float (&lhs_scale)[2],
                         const FloatPair (&rhs_scales)[Tile::RHS_PAIRS]) {
  constexpr bool PER_ROW = Tile::RHS_ROWS_PER_SCALE == 1;
  const float scale[2] = {lhs_scale[0] * rhs_scales[0].low, lhs_scale[1] * rhs_scales[0].low};
#pragma unroll
  for (int i = 0; i < Tile::N / 2; ++i) {
    float factor = scale[i / 2 % 2];
    if (PER_ROW) {
      const FloatPair& pair = rhs_scales[PER_ROW ? i / 4 : 0];
      factor = lhs_scale[i / 2 % 2] * (i % 2 ? pair.high : pair.low);
    }
    sum[i] = fused_multiply_add(product[i], factor, sum[i]);
  }
}

// Issues four WGMMAs of 32 values of K each: product = 64 lhs rows from `first_row` on, times the
// rhs.
template <class Tile>
SM90_DEVICE void issue_wgmmas(float (&product)[Tile::N / 2], OperandRing<Tile>& ring,
                              int first_row) {
  UNLESS_PLANTED(no_wgmma_fence, wgmma_fence());
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const char* lhs_rows = ring.lhs() + first_row * Tile::K;
    WHEN_PLANTED(reads_past_smem, lhs_rows = ring.smem + Tile::SMEM_BYTES / 16 * 16);
    const uint32_t lhs_stride = PLANT(wrong_descriptor_stride, 512, 1024);
    wgmma_e4m3<Tile::N>(product, matrix_descriptor(lhs_rows + step * 32, 0, lhs_stride),
                        matrix_descriptor(ring.rhs() + step * 32, 0, 1024),
                        PLANT(accumulates_in_first_wgmma, true, step > 0));
  }
  UNLESS_PLANTED(no_wgmma_commit, wgmma_commit());
}

// Reads the scales of lhs rows `row` and `row` + 8 and those of this thread's rhs rows.
template <class Tile>
SM90_DEVICE void read_scales(float (&lhs)[2], FloatPair (&rhs)[Tile::RHS_PAIRS], const char* scales,
                             int row) {
  for (int half = 0; half < 2; ++half) {
    lhs[half] = load_shared<float>(scales + (Tile::LHS_SCALES == 1 ? 0 : 4 * (row + 8 * half)));
  }
  const char* first_rhs = scales + 4 * Tile::RHS_SCALES_START;
  if constexpr (Tile::RHS_ROWS_PER_SCALE == 1) {
#pragma unroll
    for (int i = 0; i < Tile::RHS_PAIRS; ++i) {
      rhs[i] = load_shared<FloatPair>(first_rhs + 32 * i + lane_index() % 4 * 8);
    }
  } else {
    rhs[0].low = load_shared<float>(first_rhs);
  }
}

// Mainloop: sum = the scaled products of one tile over `k_length` values of K. A thread's sums are
// those of lhs rows `thread_row` and `thread_row` + 8 of each wave.
template <class Tile>
SM90_DEVICE void multiply(float (&sum)[Tile::WAVES][Tile::N / 2], OperandRing<Tile>& ring,
                          int thread_row, int k_length) {
  const int warpgroup = thread_index() / 128;
#pragma unroll
  for (int i = 0; i < Tile::WAVES * Tile::N / 2; ++i) sum[i / (Tile::N / 2)][i % (Tile::N / 2)] = 0;
  for (int j = 0; j * Tile::K < k_length; ++j) {
    // Wait for the operands and their scales.
    ring.wait_full();
    if (Tile::VARIANT == GemmVariant::k_grouped && k_length - j * Tile::K < Tile::K) {
      UNLESS_PLANTED(no_clearing_of_k_tail, clear_k_tail<Tile>(ring.lhs(), k_length - j * Tile::K));
    }
#pragma unroll
    for (int wave = 0; wave < Tile::WAVES; ++wave) {
      float product[Tile::N / 2];
      float lhs_scale[2];
      FloatPair rhs_scales[Tile::RHS_PAIRS];
      issue_wgmmas<Tile>(product, ring, (wave * Tile::WARPGROUPS + warpgroup) * 64);
      // While the WGMMAs run:
      read_scales<Tile>(lhs_scale, rhs_scales, ring.scales(),
                        wave * Tile::WARPGROUPS * 64 + thread_row);
      const bool last = wave == Tile::WAVES - 1;
      if (last) WHEN_PLANTED(releases_before_wgmma_wait, release_stage<Tile>(ring));
      UNLESS_PLANTED(no_wgmma_wait, wgmma_wait<PLANT(wgmma_wait_leaves_one, 1, 0)>());
      if (PLANT(releases_after_first_wave, wave == 0, last)) {
        UNLESS_PLANTED(releases_before_wgmma_wait, release_stage<Tile>(ring));
      }
      promote<Tile>(sum[wave], product, lhs_scale, rhs_scales);
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
    float sum[Tile::WAVES][Tile::N / 2];
    if (Tile::CLUSTER_N > 1) w.column += rank * Tile::N;
    for (int s = 0; s < serial_splits; ++s) {
      const int block = Tile::SERIAL_SPLIT_K ? s * p.blocks_per_split : 0;
      const int k_left = w.k_length - block * Tile::K;
      const int k_length =
          Tile::SERIAL_SPLIT_K
              ? PLANT(serial_splits_overlap, k_left, clamp(k_left, 0, p.blocks_per_split * Tile::K))
              : w.k_length;
      multiply<Tile>(sum, ring, thread_row, k_length);
      if (serial_splits > 1) {
        accumulate_split<Tile::N>(sum[0], staging, s == 0, s == serial_splits - 1);
      }
    }
    if (Tile::SWAPPED) {
      store_swapped<Tile>(sum[0], partials_ring, staging, p, w, tiles, thread_row);
    } else {
      const int first_row = w.row + (Tile::CLUSTER_M > 1 ? rank * Tile::M : 0) + warpgroup * 64;
      store_tile<Tile>(sum, out, p, w, tiles, staging, first_row);
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
  // 128 · 56 + 256 · 224 = 64,512 = 384 · 168.
  if (warp >= producer_warp) {
    // Producer warpgroup.
    if (Tile::WARPGROUPS > 1) registers_decrease<PLANT(producer_keeps_registers, 96, 56)>();
    if (warp == producer_warp && elect_one()) load_operands<Tile>(&a, &b, smem, tiles);
    if (warp > producer_warp && warp <= producer_warp + Tile::SCALE_WARPS) {
      load_scales<Tile>(p, smem, tiles, thread_index() - 32 * (producer_warp + 1));
    }
    warp_sync();
    if (Tile::CLUSTER_SPLIT_K) UNLESS_PLANTED(no_cluster_wait, cluster_wait());
  } else {
    // Consumer warpgroups.
    if (Tile::WARPGROUPS > 1) registers_increase<PLANT(requests_too_many_registers, 264, 224)>();
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
