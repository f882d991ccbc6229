// How a finished tile of fp8_gemm.cuh comes from registers to D.
#pragma once

#include "fp8_gemm_tile.cuh"

namespace sm90 {

SM90_DEVICE float load_real(const void* p, int64_t i, Type type) {
  if (type == Type::fp32) return load_global(static_cast<const float*>(p) + i);
  if (type == Type::bf16) return to_float(load_global(static_cast<const bf16*>(p) + i));
  return to_float(load_global(static_cast<const fp16*>(p) + i));
}

SM90_DEVICE void store_real(void* p, int64_t i, float x, Type type) {
  if (type == Type::fp32) {
    store_global(static_cast<float*>(p) + i, x);
  } else if (type == Type::bf16) {
    store_global(static_cast<bf16*>(p) + i, to_bf16(x));
  } else {
    store_global(static_cast<fp16*>(p) + i, to_fp16(x));
  }
}

// A warpgroup's 64 rows into boxes of 128-byte rows, swizzled as TMA expects them: with eight rows
// to a multiple of 1024 bytes, the chunks that a warp writes at once lie in different banks.
template <int N>
SM90_DEVICE void arrange(const float (&sum)[N / 2], char* to, Type type) {
  const int row = thread_index() % 128 / 32 * 16 + lane_index() / 4, pair = lane_index() % 4;
  for (int i = 0; i < N / 2; i += 2) {
    const int m = row + i / 2 % 2 * 8, size = type == Type::fp32 ? 4 : 2;
    const int at = (i / 4 * 8 + pair * 2) * size;  // bytes from the start of the tile's row
    char* box = to + at / 128 * (64 * 128) + m * 128;
    char* place = box + ((at % 128 / 16) ^ (m % 8)) * 16 + at % 16;
    if (type == Type::fp32) {
      store_shared(place, uint64_t{float_bits(sum[i])} | uint64_t{float_bits(sum[i + 1])} << 32);
    } else if (type == Type::bf16) {
      store_shared(place, pack(to_bf16(sum[i]), to_bf16(sum[i + 1])));
    } else {
      store_shared(place, pack(to_fp16(sum[i]), to_fp16(sum[i + 1])));
    }
  }
}

// A warp's 16 arranged rows to D, 16 bytes a lane.
template <class Tile>
SM90_DEVICE void store_rows(const char* from, const GemmArguments& p, const Work& w,
                            const typename Tile::Tiles& tiles, int top) {
  const int size = p.out_type == Type::fp32 ? 4 : 2, chunks = Tile::N * size / 16;
  const int first = thread_index() % 128 / 32 * 16;
  for (int i = lane_index(); i < 16 * chunks; i += 32) {
    const int m = first + i / chunks, chunk = i % chunks, column = w.column + chunk * 16 / size;
    if (column >= p.N || !tiles.owns(w, top + m)) continue;
    const char* place = from + chunk / 8 * (64 * 128) + m * 128 + ((chunk % 8) ^ (m % 8)) * 16;
    const auto values = load_shared<Chunk>(place);
    char* to = static_cast<char*>(p.out) +
               (tiles.out_row(w, top + m) * p.N + column) * static_cast<int64_t>(size);
    if (p.aligned) {
      store_global(reinterpret_cast<Chunk*>(to), values);
      continue;
    }
    const int left = (p.N - column) * size;
    // Unrolled, so that `values` stay in registers.
#pragma unroll
    for (int at = 0; at < 16; at += 2) {
      if (at < left) store_global(reinterpret_cast<uint16_t*>(to) + at / 2, values.half[at / 2]);
    }
  }
}

// Few rows of A: sums [row of A][column of D], shifted so that what a warp writes at once lies in
// different banks.
template <class Tile>
SM90_DEVICE char* share_place(char* shares, int m, int n) {
  return shares + (m * Tile::M + (n ^ m / 2 % 4 * 8)) * 4;
}

// Four sums of the tile: those that each block of the cluster has there, added in their order.
SM90_DEVICE Floats add_shares(const char* place, int splits) {
  Floats share[MOST_SPLITS];
  for (int r = 0; r < MOST_SPLITS; ++r) {  // all asked for, then added
    if (r < splits) share[r] = load_shared_at(place, r);
  }
  for (int r = 1; r < MOST_SPLITS; ++r) {
    for (int i = 0; i < 4 && r < splits; ++i) share[0].value[i] += share[r].value[i];
  }
  return share[0];
}

// Four values of row `row` of D from column n on, or as many as there are.
SM90_DEVICE void store_four(const GemmArguments& p, int64_t row, int n, Floats x) {
  const int left = p.N - n < 4 ? p.N - n : 4;
  for (int i = 0; p.c != nullptr && i < left; ++i) {
    x.value[i] += load_real(p.c, row * p.c_row + n + i, p.c_type);
  }
  const int64_t at = row * p.N + n;
  if (!p.aligned) {
    for (int i = 0; i < left; ++i) store_real(p.out, at + i, x.value[i], p.out_type);
  } else if (left < 4) {
    return;  // rows of D are multiples of 4
  } else if (p.out_type == Type::fp32) {
    store_global(reinterpret_cast<Floats*>(static_cast<float*>(p.out) + at), x);
  } else {
    const bool is_bf16 = p.out_type == Type::bf16;
    uint32_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const float first = x.value[2 * i], second = x.value[2 * i + 1];
      pair[i] = is_bf16 ? pack(to_bf16(first), to_bf16(second)) : pack(to_fp16(first), to_fp16(second));
    }
    store_global(reinterpret_cast<uint64_t*>(static_cast<uint16_t*>(p.out) + at),
                 uint64_t{pair[0]} | uint64_t{pair[1]} << 32);
  }
}

// A tile of few rows of A. Thread t's sums are those of `column` and `column` + 8 of D. Each block
// leaves them in its shared memory, where all blocks of the cluster find them; a warp of one of
// these stores a row.
template <class Tile>
SM90_DEVICE void store_swapped(const float (&sum)[Tile::N / 2], Ring<1>& shared, char* shares,
                               const GemmArguments& p, const Work& w,
                               const typename Tile::Tiles& tiles, int column) {
  const int splits = Tile::SPREAD ? p.splits : 1, rank = Tile::SPREAD ? cluster_rank() : 0;
  shared.wait_empty();  // all blocks have read the tile before
  for (int i = 0; i < Tile::N / 2; ++i) {
    const int m = i / 4 * 8 + lane_index() % 4 * 2 + i % 2, n = column + i / 2 % 2 * 8;
    store_shared(share_place<Tile>(shares, m, n), sum[i]);
  }
  warp_sync();
  if (lane_index() < splits) barrier_arrive_at(shared.full, lane_index());
  shared.wait_full();
  for (int m = rank + splits * warp_index(); m < Tile::N; m += splits * 4 * Tile::GROUPS) {
    if (!tiles.owns(w, w.row + m)) continue;
    const int64_t row = tiles.out_row(w, w.row + m);
    for (int n = 4 * lane_index(); n < Tile::M && w.column + n < p.N; n += 128) {
      Floats x{};
      if (w.row + m < w.valid) {
        const char* place = share_place<Tile>(shares, m, n);
        x = Tile::SPREAD ? add_shares(place, splits) : load_shared<Floats>(place);
      }
      store_four(p, row, w.column + n, x);
    }
  }
  warp_sync();
  if (lane_index() < splits) barrier_arrive_at(shared.empty, lane_index());
  shared.next();
}

// Adds a warpgroup's sums over one run of K to those over the runs before, which wait where the
// tile will be put in order.
template <int N>
SM90_DEVICE void add_run(float (&sum)[N / 2], char* ordered, bool is_first, bool is_last) {
  const int thread = thread_index() % 128;
  if (is_first) {  // The last tile must have been read.
    if (thread == 0) tma_store_wait_read<0>();
    named_barrier_sync(1 + thread_index() / 128, 128);
  }
  for (int i = 0; i < N / 2; i += 4) {
    char* place = ordered + (i / 4 * 128 + thread) * 16;
    Floats total;
    if (!is_first) total = load_shared<Floats>(place);
    for (int j = 0; j < 4; ++j) {
      // Not 0 + the first run: that would have another sign where the run is -0.
      if (!is_first) sum[i + j] += total.value[j];
      total.value[j] = sum[i + j];
    }
    if (!is_last) store_shared(place, total);
  }
}

// A warpgroup's rows of a finished tile, A being the left operand.
template <class Tile>
SM90_DEVICE void store(float (&sum)[Tile::N / 2], const TensorMap* out, const GemmArguments& p,
                       const Work& w, const typename Tile::Tiles& tiles, char* ordered, int top) {
  const int group = thread_index() / 128;
  const int row = top + thread_index() % 128 / 32 * 16 + lane_index() / 4;
  for (int i = 0; i < Tile::N / 2; ++i) {
    const int m = row + i / 2 % 2 * 8, n = w.column + i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
    if (m >= w.valid) sum[i] = 0.0f;
    if (p.c != nullptr && m < w.end && n < p.N) {
      sum[i] += load_real(p.c, tiles.out_row(w, m) * p.c_row + n, p.c_type);
    }
  }
  // TMA leaves out what lies beyond D, but knows nothing of groups.
  const bool whole = Tile::FORM == Form::dense || top + 64 <= w.end;
  const bool by_tma = p.store_by_tma && whole && Tile::FORM != Form::contiguous;
  const bool storing = thread_index() % 128 == 0;
  // The last tile must have been read before this one takes its place.
  if (storing) tma_store_wait_read<0>();
  named_barrier_sync(1 + group, 128);
  arrange<Tile::N>(sum, ordered, p.out_type);
  if (!by_tma) {
    warp_sync();
    store_rows<Tile>(ordered, p, w, tiles, top);
    warp_sync();
    return;
  }
  fence_async_proxy();
  named_barrier_sync(1 + group, 128);
  if (storing) {
    const int wide = p.out_type == Type::fp32 ? 32 : 64;  // columns of a box
    for (int n = 0; n < Tile::N && w.column + n < p.N; n += wide) {
      if (top < w.end) {
        tma_store(out, ordered + n / wide * (64 * 128), w.column + n,
                  static_cast<int>(tiles.out_row(w, top)));
      }
    }
    tma_store_commit();
  }
}

}  // namespace sm90
