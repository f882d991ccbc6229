// Epilogue of fp8_gemm.cuh: reduces the partial sums of split-K, adds C and stores a tile of D.
#pragma once

#include "fp8_gemm_tile.cuh"

namespace sm90 {

// Element i of `p`, an array of `type`.
SM90_DEVICE float load_real(const void* p, int64_t i, Real type) {
  if (type == Real::fp32) return load_global(static_cast<const float*>(p) + i);
  if (type == Real::bf16) return to_float(load_global(static_cast<const bf16*>(p) + i));
  return to_float(load_global(static_cast<const fp16*>(p) + i));
}

SM90_DEVICE void store_real(void* p, int64_t i, float x, Real type) {
  if (type == Real::fp32) {
    store_global(static_cast<float*>(p) + i, x);
  } else if (type == Real::bf16) {
    store_global(static_cast<bf16*>(p) + i, to_bf16(x));
  } else {
    store_global(static_cast<fp16*>(p) + i, to_fp16(x));
  }
}

// Synchronizes the 128 threads of consumer warpgroup `warpgroup`.
SM90_DEVICE void warpgroup_sync(int warpgroup) {
  named_barrier_sync(PLANT(warpgroups_share_a_barrier, 1, 1 + warpgroup),
                     PLANT(barrier_expects_two_warpgroups, 256, 128));
}

// Writes a warpgroup's 64 rows to its staging buffer, as boxes [64, 128 bytes] with the 128-byte
// swizzle that TMA expects. The chunks that a warp writes at once are in different banks.
template <int N>
SM90_DEVICE void stage_tile(const float (&sum)[N / 2], char* staging, Real type) {
  const int row = thread_index() % 128 / 32 * 16 + lane_index() / 4, pair = lane_index() % 4;
  for (int i = 0; i < N / 2; i += 2) {
    const int m = row + i / 2 % 2 * 8, size = type == Real::fp32 ? 4 : 2;
    const int byte = (i / 4 * 8 + pair * 2) * size;  // in the row
    char* box_row = staging + byte / 128 * (64 * 128) + m * 128;
    char* to = box_row + ((byte % 128 / 16) ^ (m % 8)) * 16 + byte % 16;
    if (type == Real::fp32) {
      store_shared(to, uint64_t{float_bits(sum[i])} | uint64_t{float_bits(sum[i + 1])} << 32);
    } else if (type == Real::bf16) {
      store_shared(to, pack(to_bf16(sum[i]), to_bf16(sum[i + 1])));
    } else {
      store_shared(to, pack(to_fp16(sum[i]), to_fp16(sum[i + 1])));
    }
  }
}

// Stores a warp's 16 staged rows to D, 16 bytes per lane. `first_row`: the warpgroup's first row.
template <class Tile>
SM90_DEVICE void store_staged_rows(const char* staging, const GemmArguments& p, const TileWork& w,
                                   const typename Tile::Tiles& tiles, int first_row) {
  const int size = p.out_type == Real::fp32 ? 4 : 2, chunks = Tile::N * size / 16;
  const int warp_row = thread_index() % 128 / 32 * 16;
  for (int i = lane_index(); i < 16 * chunks; i += 32) {
    const int m = warp_row + i / chunks, chunk = i % chunks;
    const int column = w.column + chunk * 16 / size;
    if (column >= p.N || !tiles.owns(w, first_row + m)) continue;
    const char* from = staging + chunk / 8 * (64 * 128) + m * 128 + ((chunk % 8) ^ (m % 8)) * 16;
    const auto values = load_shared<Chunk>(from);
    char* to = static_cast<char*>(p.out) +
               (tiles.out_row(w, first_row + m) * p.N + column) * static_cast<int64_t>(size);
    if (p.rows_aligned) {
      store_global(reinterpret_cast<Chunk*>(to), values);
      continue;
    }
    const int bytes_left = (p.N - column) * size;
    // Unrolled to keep `values` in registers.
#pragma unroll
    for (int byte = 0; byte < 16; byte += 2) {
      if (byte < bytes_left) {
        store_global(reinterpret_cast<uint16_t*>(to) + byte / 2, values.half[byte / 2]);
      }
    }
  }
}

// The address of a partial sum [row m of A][column n of D] in smem. The rotation puts the values
// that a warp writes at once in different banks.
template <class Tile>
SM90_DEVICE char* partial_address(char* partials, int m, int n) {
  return partials + (m * Tile::M + (n ^ m / 2 % 4 * 8)) * 4;
}

// Four values of the tile: the partial sums at `address` in each block of the cluster, added in the
// order of the splits.
SM90_DEVICE Floats reduce_split_k(const char* address, int num_splits) {
  Floats partial[MAX_SPLITS];
  for (int s = 0; s < MAX_SPLITS; ++s) {  // all loads are in flight before the first addition
    int rank = s;
    WHEN_PLANTED(adds_splits_in_reverse, rank = num_splits - 1 - s);
    WHEN_PLANTED(reads_a_missing_rank, rank = s + 1);
    WHEN_PLANTED(adds_one_split_only, rank = cluster_rank());
    if (s < num_splits) partial[s] = load_shared_at(address, rank);
  }
  for (int s = 1; s < MAX_SPLITS; ++s) {
    for (int i = 0; i < 4 && s < num_splits; ++i) partial[0].value[i] += partial[s].value[i];
  }
  return partial[0];
}

// Adds C to four values of row `row` of D from column n on, and stores those inside D.
SM90_DEVICE void store_four(const GemmArguments& p, int64_t row, int n, Floats x) {
  const int left = p.N - n < 4 ? p.N - n : 4;
  for (int i = 0; p.c != nullptr && i < left; ++i) {
    x.value[i] += load_real(p.c, row * p.c_row_stride + n + i, p.c_type);
  }
  const int64_t at = row * p.N + n;
  if (!p.rows_aligned) {
    for (int i = 0; i < left; ++i) store_real(p.out, at + i, x.value[i], p.out_type);
  } else if (left < 4) {
    return;  // aligned rows of D are multiples of 4 values
  } else if (p.out_type == Real::fp32) {
    store_global(reinterpret_cast<Floats*>(static_cast<float*>(p.out) + at), x);
  } else {
    const bool is_bf16 = p.out_type == Real::bf16;
    uint32_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const float low = x.value[2 * i], high = x.value[2 * i + 1];
      pair[i] = is_bf16 ? pack(to_bf16(low), to_bf16(high)) : pack(to_fp16(low), to_fp16(high));
    }
    store_global(reinterpret_cast<uint64_t*>(static_cast<uint16_t*>(p.out) + at),
                 uint64_t{pair[0]} | uint64_t{pair[1]} << 32);
  }
}

// A warp's arrival at a barrier of the partial sums in the first `blocks` blocks of the cluster.
// One block exchanges nothing and needs no release in the scope of the cluster.
template <class Tile>
SM90_DEVICE void arrive_partials(Barrier* barrier, int blocks, int num_splits) {
  if (!Tile::CLUSTER_SPLIT_K || num_splits == 1) {
    if (lane_index() < blocks) barrier_arrive(barrier);
  } else if (lane_index() < blocks) {
    barrier_arrive_release_cluster(barrier, lane_index());
  }
}

// Epilogue of a swapped tile. A thread's sums are those of `column` and `column` + 8 of the tile.
// Each block writes its partial sums to its smem, where all blocks of the cluster read them. Each
// warp of the cluster then reduces and stores whole rows of D.
template <class Tile>
SM90_DEVICE void store_swapped(const float (&sum)[Tile::N / 2],
                               typename Tile::PartialsRing& partials_ring, char* partials,
                               const GemmArguments& p, const TileWork& w,
                               const typename Tile::Tiles& tiles, int column) {
  const int num_splits = Tile::CLUSTER_SPLIT_K ? p.num_splits : 1;
  const int rank = Tile::CLUSTER_SPLIT_K ? cluster_rank() : 0;
  // Wait until all blocks have read the previous tile's partial sums.
  UNLESS_PLANTED(no_wait_before_partials, partials_ring.wait_empty());
  for (int i = 0; i < Tile::N / 2; ++i) {
    const int m = i / 4 * 8 + lane_index() % 4 * 2 + i % 2, n = column + i / 2 % 2 * 8;
    store_shared(partial_address<Tile>(partials, m, n), sum[i]);
  }
  UNLESS_PLANTED(no_warp_sync_after_partials, warp_sync());
  const int notified = PLANT(one_block_not_notified, num_splits - 1, num_splits);
  arrive_partials<Tile>(partials_ring.full_barrier, notified, num_splits);
  UNLESS_PLANTED(no_wait_for_partials, partials_ring.wait_full());
  const int first_m = PLANT(all_ranks_store_same_rows, 0, rank) + num_splits * warp_index();
  for (int m = first_m; m < Tile::N; m += num_splits * 4 * Tile::WARPGROUPS) {
    if (!tiles.owns(w, w.row + m)) continue;
    const int64_t row = tiles.out_row(w, w.row + m);
    for (int n = 4 * lane_index(); n < Tile::M && w.column + n < p.N; n += 128) {
      Floats x{};
      if (w.row + m < w.valid_end) {
        const char* address = partial_address<Tile>(partials, m, n);
        x = Tile::CLUSTER_SPLIT_K ? reduce_split_k(address, num_splits)
                                  : load_shared<Floats>(address);
      }
      store_four(p, row, w.column + n, x);
    }
  }
  UNLESS_PLANTED(no_warp_sync_after_reduction, warp_sync());
  arrive_partials<Tile>(partials_ring.empty_barrier, num_splits, num_splits);
  partials_ring.advance();
}

// Serial split-K: adds a warpgroup's sums over one split to those over the earlier splits, which
// are in the staging buffer.
template <int N>
SM90_DEVICE void accumulate_split(float (&sum)[N / 2], char* staging, bool is_first, bool is_last) {
  const int thread = thread_index() % 128;
  if (is_first) {  // wait until TMA has read the previous tile
    if (thread == 0) UNLESS_PLANTED(no_tma_wait_before_totals, tma_store_wait_read<0>());
    UNLESS_PLANTED(no_barrier_before_totals, warpgroup_sync(thread_index() / 128));
  }
  for (int i = 0; i < N / 2; i += 4) {
    char* address = staging + (i / 4 * 128 + thread) * 16;
    Floats total;
    if (PLANT(adds_totals_of_previous_tile, true, !is_first)) total = load_shared<Floats>(address);
    for (int j = 0; j < 4; ++j) {
      // 0 + the first split would change the sign of -0.
      if (PLANT(adds_totals_of_previous_tile, true, !is_first)) sum[i + j] += total.value[j];
      total.value[j] = sum[i + j];
    }
    if (!is_last) UNLESS_PLANTED(forgets_a_split, store_shared(address, total));
  }
}

// Epilogue of a tile that is not swapped: a warpgroup's 64 rows of D from `first_row` on.
template <class Tile>
SM90_DEVICE void store_tile(float (&sum)[Tile::N / 2], const TensorMap* out,
                            const GemmArguments& p, const TileWork& w,
                            const typename Tile::Tiles& tiles, char* staging, int first_row) {
  const int warpgroup = thread_index() / 128;
  const int row = first_row + thread_index() % 128 / 32 * 16 + lane_index() / 4;
  for (int i = 0; i < Tile::N / 2; ++i) {
    const int m = row + i / 2 % 2 * 8, n = w.column + i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
    if (m >= w.valid_end) UNLESS_PLANTED(stores_invalid_rows, sum[i] = 0.0f);
    if (p.c != nullptr && m < w.row_end && n < p.N) {
      sum[i] += load_real(p.c, tiles.out_row(w, m) * p.c_row_stride + n, p.c_type);
    }
  }
  // TMA drops what is outside D, but it does not know where groups end.
  const bool whole = Tile::VARIANT == GemmVariant::dense || first_row + 64 <= w.row_end;
  const bool by_tma = p.store_by_tma && whole && Tile::VARIANT != GemmVariant::contiguous;
  const bool issues_tma = thread_index() % 128 == 0;
  // Wait until TMA has read the previous tile from the staging buffer.
  if (issues_tma) UNLESS_PLANTED(no_tma_wait_before_staging, tma_store_wait_read<0>());
  warpgroup_sync(warpgroup);
  stage_tile<Tile::N>(sum, staging, p.out_type);
  if (!by_tma) {
    warp_sync();
    store_staged_rows<Tile>(staging, p, w, tiles, first_row);
    warp_sync();
    return;
  }
  UNLESS_PLANTED(no_fence_before_tma_store, fence_async_proxy());
  UNLESS_PLANTED(no_barrier_before_tma_store, warpgroup_sync(warpgroup));
  if (issues_tma) {
    const int box_columns = p.out_type == Real::fp32 ? 32 : 64;
    for (int n = 0; n < Tile::N && w.column + n < p.N; n += box_columns) {
      if (first_row < w.row_end) {
        tma_store(out, staging + n / box_columns * (64 * 128), w.column + n,
                  static_cast<int>(tiles.out_row(w, first_row)));
      }
    }
    tma_store_commit();
  }
}

}  // namespace sm90
