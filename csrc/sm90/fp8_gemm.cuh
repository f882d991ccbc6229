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
// Large products are bound by the tensor cores, those of few rows by reading B.
//
// Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; DeepGEMM.
#pragma once

#include "schedule.cuh"

namespace sm90 {

// LEFT_ROWS, RIGHT_ROWS: how many rows of an operand share a scale, 1 or 128.
template <Form FORM_, int GROUPS_, int N_, int STAGES_, int CLUSTER_, bool SWAPPED_, int B_ROWS>
struct GemmTile {
  static constexpr Form FORM = FORM_;
  static constexpr int GROUPS = GROUPS_, M = 64 * GROUPS, N = N_, K = 128, STAGES = STAGES_;
  static constexpr int CLUSTER = CLUSTER_;
  static constexpr bool SWAPPED = SWAPPED_;
  static constexpr int LEFT_ROWS = SWAPPED ? B_ROWS : 1, RIGHT_ROWS = SWAPPED ? 1 : B_ROWS;
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr uint32_t LEFT_BYTES = M * K, STAGE_BYTES = LEFT_BYTES + N * K;
  // Where a tile of D is put in order, which a swapped one is not.
  static constexpr uint32_t ORDERED_BYTES = SWAPPED ? 0 : M * N * 4;
  static constexpr uint32_t ORDERED = STAGES * STAGE_BYTES;
  static constexpr uint32_t SCALES = ORDERED + ORDERED_BYTES;
  static constexpr uint32_t SCALE_BYTES = RIGHT_ROWS == 1 ? N * 4 : 0;  // of a stage
  static constexpr uint32_t BARRIERS = SCALES + STAGES * SCALE_BYTES;
  static constexpr uint32_t SHARED_BYTES = BARRIERS + 2 * STAGES * sizeof(Barrier);
  static constexpr int LOADS = 1 + (RIGHT_ROWS == 1 ? 32 : 0);  // arrivals that fill a buffer
  using Tiles = Schedule<FORM, (SWAPPED ? N : M) * CLUSTER, SWAPPED ? M : N>;
  static_assert(RIGHT_ROWS == 1 || 128 % N == 0, "a tile has one scale of its right operand");
  static_assert(CLUSTER == 1 || (FORM == Form::dense && !SWAPPED && RIGHT_ROWS == 128));
  static_assert(SHARED_BYTES <= 232448);
};

// What all warps know: the ring's buffers and barriers, and where this warp stands in it.
template <class Tile>
struct Ring {
  char* memory;
  Barrier *full, *empty;
  int stage = 0;
  uint32_t round = 0;

  SM90_DEVICE explicit Ring(char* shared)
      : memory(shared),
        full(reinterpret_cast<Barrier*>(shared + Tile::BARRIERS)),
        empty(full + Tile::STAGES) {}
  SM90_DEVICE void wait_empty() { barrier_wait(&empty[stage], round ^ 1); }
  SM90_DEVICE void wait_full() { barrier_wait(&full[stage], round); }
  SM90_DEVICE char* left() { return memory + stage * Tile::STAGE_BYTES; }
  SM90_DEVICE char* right() { return left() + Tile::LEFT_BYTES; }
  SM90_DEVICE char* scales() { return memory + Tile::SCALES + stage * Tile::SCALE_BYTES; }
  SM90_DEVICE void next() {
    if (++stage == Tile::STAGES) stage = 0, round ^= 1;
  }
};

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

// The scales of one row of an operand, from the tile's first block on.
SM90_DEVICE const float* scale_row(const Scales& s, int group, int row, int rows) {
  return s.data + group * s.group + static_cast<int64_t>(row / rows) * s.row;
}

// The loading thread.
template <class Tile>
SM90_DEVICE void load_tiles(const TensorMap* a, const TensorMap* b, char* memory,
                            typename Tile::Tiles tiles) {
  Ring<Tile> ring(memory);
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
  Ring<Tile> ring(memory);
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

// The products of one tile, promoted. Thread t's rows are `row` and `row` + 8 of the left operand.
template <class Tile>
SM90_DEVICE void multiply(float (&sum)[Tile::N / 2], Ring<Tile>& ring, const GemmArguments& p,
                          const Work& w, int row) {
  const int group = thread_index() / 128, last = Tile::SWAPPED ? p.N : p.M;
  const Scales& left = Tile::SWAPPED ? p.b_scale : p.a_scale;
  const Scales& right = Tile::SWAPPED ? p.a_scale : p.b_scale;
  const float* above = scale_row(left, w.group, row < last ? row : 0, Tile::LEFT_ROWS);
  const float* below = scale_row(left, w.group, row + 8 < last ? row + 8 : 0, Tile::LEFT_ROWS);
  const float* beside = scale_row(right, w.group, w.column, Tile::RIGHT_ROWS);
  for (int j = 0; j * Tile::K < w.length; ++j) {
    // Asked for before the wait, so that they come while it lasts.
    const int64_t block = w.scale_block + j;
    float upper = load_global(above + block * left.block);
    float lower = load_global(below + block * left.block);
    if (Tile::RIGHT_ROWS == 128) {
      const float scale = load_global(beside + block * right.block);
      upper *= scale, lower *= scale;
    }
    float product[Tile::N / 2];
    ring.wait_full();
    if (Tile::FORM == Form::k_grouped && w.length - j * Tile::K < Tile::K) {
      clear_tail<Tile>(ring.left(), w.length - j * Tile::K);
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

// A warpgroup's part of all tiles.
template <class Tile>
SM90_DEVICE void multiply_tiles(const TensorMap* out, const GemmArguments& p, char* memory,
                                typename Tile::Tiles tiles) {
  Ring<Tile> ring(memory);
  const int group = thread_index() / 128, rank = Tile::CLUSTER > 1 ? cluster_rank() : 0;
  const int inside = group * 64 + thread_index() % 128 / 32 * 16 + lane_index() / 4;
  char* ordered = memory + Tile::ORDERED + group * 64 * Tile::N * 4;
  Work w;
  while (tiles.next(w)) {
    float sum[Tile::N / 2];
    for (int i = 0; i < Tile::N / 2; ++i) sum[i] = 0.0f;
    const int first = (Tile::SWAPPED ? w.column : w.row) + rank * Tile::M;
    multiply<Tile>(sum, ring, p, w, first + inside);
    if (Tile::SWAPPED) {
      store_swapped<Tile>(sum, p, w, tiles, first + inside);
    } else {
      store<Tile>(sum, out, p, w, tiles, ordered, first + group * 64);
    }
  }
  if (!Tile::SWAPPED && thread_index() % 128 == 0) tma_store_wait_read<0>();
}

template <class Tile>
SM90_KERNEL(Tile::THREADS, Tile::GROUPS == 1 ? 2 : 1)
void fp8_gemm(SM90_PARAMETER TensorMap a, SM90_PARAMETER TensorMap b,
              SM90_PARAMETER TensorMap out, SM90_PARAMETER GemmArguments p) {
  char* memory = shared_memory();
  Ring<Tile> ring(memory);
  const int warp = warp_index(), loader = 4 * Tile::GROUPS;
  if (warp == loader && elect_one()) {
    prefetch(&a);
    prefetch(&b);
    for (int s = 0; s < Tile::STAGES; ++s) {
      barrier_init(&ring.full[s], Tile::LOADS);
      // A warp of each block that reads it.
      barrier_init(&ring.empty[s], 4 * Tile::GROUPS * Tile::CLUSTER);
    }
    barrier_init_fence();
  }
  if (Tile::CLUSTER > 1) {
    cluster_sync();
  } else {
    block_sync();
  }

  const typename Tile::Tiles tiles(p, block_index() / Tile::CLUSTER,
                                   block_count() / Tile::CLUSTER);
  // A thread may have 168 of the registers at first; one warpgroup alone has enough of them.
  if (warp >= loader) {
    if (Tile::GROUPS > 1) registers_decrease<40>();
    if (warp == loader && elect_one()) load_tiles<Tile>(&a, &b, memory, tiles);
    if (warp == loader + 1 && Tile::RIGHT_ROWS == 1) load_scales<Tile>(p, memory, tiles);
  } else {
    if (Tile::GROUPS > 1) registers_increase<232>();
    multiply_tiles<Tile>(&out, p, memory, tiles);
  }
  // A block's barriers and buffers must be there until the other has sent its last.
  if (Tile::CLUSTER > 1) cluster_sync();
}

// Where the rows of each group lie: sizes[g] their first, sizes[groups + g] the one after the last,
// set to INT_MAX and 0 before. Rows of no group are cleared. A warp takes a row.
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
      *reinterpret_cast<uint16_t*>(out + m * row_bytes + i) = 0;
    }
  }
}

}  // namespace sm90
