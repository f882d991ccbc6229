// Epilogue of fp8_gemm.cuh: reduces the partial sums of split-K, adds C and stores a tile of D.
#pragma once

#include <type_traits>

#include "fp8_gemm_tile.cuh"

namespace sm90 {

// Calls function(T*) with a null pointer to the type that `type` names.
template <class Function>
SM90_DEVICE void with_type(Real type, const Function& function) {
  if (type == Real::fp32) {
    function(static_cast<float*>(nullptr));
  } else if (type == Real::bf16) {
    function(static_cast<bf16*>(nullptr));
  } else {
    function(static_cast<fp16*>(nullptr));
  }
}

SM90_DEVICE float widen(float x) { return x; }
SM90_DEVICE float widen(bf16 x) { return to_float(x); }
SM90_DEVICE float widen(fp16 x) { return to_float(x); }
SM90_DEVICE void narrow(float& to, float x) { to = x; }
SM90_DEVICE void narrow(bf16& to, float x) { to = to_bf16(x); }
SM90_DEVICE void narrow(fp16& to, float x) { to = to_fp16(x); }
SM90_DEVICE uint32_t pack_as(bf16, float low, float high) { return pack_bf16(low, high); }
SM90_DEVICE uint32_t pack_as(fp16, float low, float high) { return pack_fp16(low, high); }

// Two neighbouring elements, loaded as one access.
SM90_DEVICE FloatPair load_pair(const float* p) {
  const uint64_t bits = load_global(reinterpret_cast<const uint64_t*>(p));
  return {float_of(static_cast<uint32_t>(bits)), float_of(static_cast<uint32_t>(bits >> 32))};
}
SM90_DEVICE FloatPair load_pair(const bf16* p) {
  const uint32_t bits = load_global(reinterpret_cast<const uint32_t*>(p));
  return {to_float(low_bf16(bits)), to_float(high_bf16(bits))};
}
SM90_DEVICE FloatPair load_pair(const fp16* p) {
  const uint32_t bits = load_global(reinterpret_cast<const uint32_t*>(p));
  return {to_float(low_fp16(bits)), to_float(high_fp16(bits))};
}

// Synchronizes the 128 threads of consumer warpgroup `warpgroup`.
SM90_DEVICE void warpgroup_sync(int warpgroup) {
  named_barrier_sync(PLANT(warpgroups_share_a_barrier, 1, 1 + warpgroup),
                     PLANT(barrier_expects_two_warpgroups, 256, 128));
}

// Writes a warpgroup's 64 rows to its staging buffer, as boxes [64, 128 bytes] with the 128-byte
// swizzle that TMA expects. `thread`: number in the warpgroup. The chunks that a warp writes at
// once are in different banks.
template <int N>
SM90_DEVICE void stage_floats(const float (&sum)[N / 2], char* staging, int thread) {
  const int row = thread / 32 * 16 + thread % 32 / 4, pair = thread % 4;
#pragma unroll
  for (int i = 0; i < N / 2; i += 2) {
    const int m = row + i / 2 % 2 * 8, byte = (i / 4 * 8 + pair * 2) * 4;  // in the row
    char* box_row = staging + byte / 128 * (64 * 128) + m * 128;
    store_shared(box_row + ((byte % 128 / 16) ^ (m % 8)) * 16 + byte % 16,
                 FloatPair{sum[i], sum[i + 1]});
  }
}

// The same for T of 16 bits.
template <int N, class T>
SM90_DEVICE void stage_halves(const float (&sum)[N / 2], char* staging, int thread) {
  const int m = thread / 32 * 16 + thread % 16;
#pragma unroll
  for (int i = 0; i < N / 2; i += 8) {  // 16 columns: four matrices of 8x8
    const int chunk = i / 4 + thread % 32 / 16;
    char* box_row = staging + chunk / 8 * (64 * 128) + m * 128;
    store_matrix_x4(box_row + ((chunk % 8) ^ (m % 8)) * 16, pack_as(T{}, sum[i], sum[i + 1]),
                    pack_as(T{}, sum[i + 2], sum[i + 3]), pack_as(T{}, sum[i + 4], sum[i + 5]),
                    pack_as(T{}, sum[i + 6], sum[i + 7]));
  }
}

// Stores a warp's 16 staged rows to D, 16 bytes per lane. `first_row`: the warpgroup's first row.
template <class Tile>
SM90_DEVICE void store_staged_rows(const char* staging, const GemmArguments& p, const TileWork& w,
                                   const typename Tile::Tiles& tiles, int first_row, int thread) {
  const int size = p.out_type == Real::fp32 ? 4 : 2, chunks = Tile::N * size / 16;
  const int warp_row = thread / 32 * 16;
  for (int i = thread % 32; i < 16 * chunks; i += 32) {
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

// Stores four values with one access.
SM90_DEVICE void store_aligned(float* out, Floats x) {
  store_global(reinterpret_cast<Floats*>(out), x);
}
template <class T>
SM90_DEVICE void store_aligned(T* out, Floats x) {
  const uint64_t low = pack_as(T{}, x.value[0], x.value[1]);
  const uint64_t high = pack_as(T{}, x.value[2], x.value[3]);
  store_global(reinterpret_cast<uint64_t*>(out), low | high << 32);
}

// Adds C to four values of row `row` of D from column n on, and stores those inside D.
SM90_DEVICE void store_four(const GemmArguments& p, int64_t row, int n, Floats x) {
  const int left = p.N - n < 4 ? p.N - n : 4;
  if (p.c != nullptr) {
    with_type(p.c_type, [&](auto* null) {
      const auto* c = static_cast<decltype(null)>(const_cast<void*>(p.c)) + row * p.c_row_stride;
      for (int i = 0; i < 4; ++i) x.value[i] += i < left ? widen(load_global(c + n + i)) : 0.0f;
    });
  }
  const int64_t at = row * p.N + n;
  if (p.rows_aligned && left < 4) return;  // aligned rows of D are multiples of 4 values
  with_type(p.out_type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    T* out = static_cast<T*>(p.out) + at;
    if (!p.rows_aligned) {
      for (int i = 0; i < left; ++i) {
        T value;
        narrow(value, x.value[i]);
        store_global(out + i, value);
      }
    } else {
      store_aligned(out, x);
    }
  });
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

// Adds C to a warpgroup's 64 rows of D. A thread's rows are `row` and `row` + 8. The loads of 64
// columns are in flight before the first addition, and no branch depends on an element. PAIRS: rows
// of C start at pairs, and N is even.
template <bool PAIRS, class Tile, class T>
SM90_DEVICE void add_c(float (&sum)[Tile::N / 2], const GemmArguments& p, const TileWork& w,
                       const typename Tile::Tiles& tiles, const T* c, int row, int thread) {
  const int column = w.column + thread % 4 * 2, left = p.N - column;
#pragma unroll
  for (int first = 0; first < Tile::N / 2; first += 32) {
    FloatPair value[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int m = row + i % 2 * 8, n = first / 32 * 64 + i / 2 * 8;
      const T* from = c + tiles.out_row(w, m) * p.c_row_stride + column + n;
      const bool low = m < w.row_end && n < left, high = m < w.row_end && n + 1 < left;
      value[i] = {0.0f, 0.0f};
      if (PAIRS) {
        if (low) value[i] = load_pair(from);
      } else {
        if (low) value[i].low = widen(load_global(from));
        if (high) value[i].high = widen(load_global(from + 1));
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      sum[first + 2 * i] += value[i].low;
      sum[first + 2 * i + 1] += value[i].high;
    }
  }
}

// Epilogue of a tile that is not swapped: 64 rows of D from `first_row` on, of one wave of a
// warpgroup. `staging_is_free`: TMA has read the buffer.
template <class Tile>
SM90_DEVICE void store_wave(float (&sum)[Tile::N / 2], const TensorMap* out, const GemmArguments& p,
                            const TileWork& w, const typename Tile::Tiles& tiles, char* staging,
                            int first_row, bool staging_is_free) {
  // Keeps addresses of the epilogue out of the registers of the mainloop.
  const int warpgroup = thread_index() / 128, thread = not_before(thread_index() % 128);
  const int row = first_row + thread / 32 * 16 + thread % 32 / 4;
  if (Tile::VARIANT == GemmVariant::masked) {
    const bool valid[2] = {row < w.valid_end, row + 8 < w.valid_end};
#pragma unroll
    for (int i = 0; i < Tile::N / 2; ++i) {
      if (!valid[i / 2 % 2]) UNLESS_PLANTED(stores_invalid_rows, sum[i] = 0.0f);
    }
  }
  constexpr bool ADDS_C =
      Tile::VARIANT == GemmVariant::dense || Tile::VARIANT == GemmVariant::k_grouped;
  if (ADDS_C && p.c != nullptr) {
    with_type(p.c_type, [&](auto* null) {
      const auto* c = static_cast<decltype(null)>(const_cast<void*>(p.c));
      if (p.c_pairs) {
        add_c<true, Tile>(sum, p, w, tiles, c, row, thread);
      } else {
        add_c<false, Tile>(sum, p, w, tiles, c, row, thread);
      }
    });
  }
  // TMA drops what is outside D, but it does not know where groups end.
  const bool whole = Tile::VARIANT == GemmVariant::dense || first_row + 64 <= w.row_end;
  const bool by_tma = p.store_by_tma && whole && Tile::VARIANT != GemmVariant::contiguous;
  const bool issues_tma = thread_index() % 128 == 0;
  if (!staging_is_free) {
    if (issues_tma) UNLESS_PLANTED(no_tma_wait_before_staging, tma_store_wait_read<0>());
    warpgroup_sync(warpgroup);
  }
  with_type(p.out_type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if constexpr (sizeof(T) == 4) {
      stage_floats<Tile::N>(sum, staging, thread);
    } else {
      stage_halves<Tile::N, T>(sum, staging, thread);
    }
  });
  if (!by_tma) {
    warp_sync();
    store_staged_rows<Tile>(staging, p, w, tiles, first_row, thread);
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

// Epilogue of all waves. The staging buffer holds one wave in float32 and two in 16 bits.
template <class Tile>
SM90_DEVICE void store_tile(float (&sum)[Tile::WAVES][Tile::N / 2], const TensorMap* out,
                            const GemmArguments& p, const TileWork& w,
                            const typename Tile::Tiles& tiles, char* staging, int first_row) {
  const bool both_fit = PLANT(waves_share_the_staging, true, p.out_type != Real::fp32);
#pragma unroll
  for (int wave = 0; wave < Tile::WAVES; ++wave) {
    store_wave<Tile>(sum[wave], out, p, w, tiles,
                     staging + (p.out_type != Real::fp32 ? wave * 64 * Tile::N * 2 : 0),
                     first_row + wave * 64 * Tile::WARPGROUPS, wave > 0 && both_fit);
  }
}

}  // namespace sm90
