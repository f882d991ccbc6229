// How a finished tile of fp8_gemm.cuh comes from registers to D.
#pragma once

#include "fp8_gemm_tile.cuh"

namespace sm90 {

SM90_DEVICE float load_real(const void* p, int64_t i, Type type) {
  if (type == Type::fp32) return static_cast<const float*>(p)[i];
  if (type == Type::bf16) return to_float(static_cast<const bf16*>(p)[i]);
  return to_float(static_cast<const fp16*>(p)[i]);
}

SM90_DEVICE void store_real(void* p, int64_t i, float x, Type type) {
  if (type == Type::fp32) {
    static_cast<float*>(p)[i] = x;
  } else if (type == Type::bf16) {
    static_cast<bf16*>(p)[i] = to_bf16(x);
  } else {
    static_cast<fp16*>(p)[i] = to_fp16(x);
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
      *reinterpret_cast<Chunk*>(to) = values;
      continue;
    }
    const int left = (p.N - column) * size;
    for (int at = 0; at < 16 && at < left; at += 2) {
      reinterpret_cast<uint16_t*>(to)[at / 2] = values.half[at / 2];
    }
  }
}

// Few rows of A: element i of thread t is D[m, n] with n along the left operand's rows.
template <class Tile>
SM90_DEVICE void store_swapped(const float (&sum)[Tile::N / 2], const GemmArguments& p,
                               const Work& w, const typename Tile::Tiles& tiles, int row) {
  for (int i = 0; i < Tile::N / 2; ++i) {
    const int n = row + i / 2 % 2 * 8, m = w.row + i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
    if (n >= p.N || !tiles.owns(w, m)) continue;
    const int64_t at = tiles.out_row(w, m);
    float value = m < w.valid ? sum[i] : 0.0f;
    if (p.c != nullptr) value += load_real(p.c, at * p.c_row + n, p.c_type);
    store_real(p.out, at * p.N + n, value, p.out_type);
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
