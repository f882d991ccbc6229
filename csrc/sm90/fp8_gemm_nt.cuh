// FP8 matrix product with block scales on Hopper: D = A·Bᵀ (+ C), as kernels/deepkern/matmul does.
//
//     d[m, n] = Σ_j a_scale[m, j] · b_scale[n / 128, j] · Σ_{k in block j} a[m, k] · b[n, k]
//
// Cut: as many blocks as there are multiprocessors each go through tiles of 64·GROUPS x BLOCK_N.
// One warp of a block only loads: A and B by TMA, 128 of K at a time, through a ring of STAGES
// buffers. GROUPS warpgroups multiply, 64 rows each. A buffer goes round between two barriers:
//
//     loader       wait empty[s] -> announce bytes, TMA -> full[s]
//     warpgroup    wait full[s] -> 4 WGMMA -> empty[s] -> sum = fma(product, scales, sum)
//
// WGMMA keeps some 14 bits of an FP8 sum, hence the float32 sum beside it ("promotion"). While one
// warpgroup promotes, the other's WGMMAs run. With CLUSTER = 2, two blocks one below the other
// share a tile of B: each loads half of it and sends it to both, which halves what L2 has to give.
//
// Large products are bound by the tensor cores, those of few rows by reading B.
//
// Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; DeepGEMM.
#pragma once

#include "primitives.cuh"

namespace sm90 {

enum class Type { bf16, fp16, fp32 };

struct GemmArguments {
  const float* a_scale;  // [M, K/128]
  const float* b_scale;  // [N/128, K/128]
  const void* c;         // [M, N] or null
  void* out;             // [M, N]
  int64_t a_scale_row, a_scale_block, b_scale_row, b_scale_block, c_row, out_row;  // strides
  int M, N, K;
  Type c_type, out_type;
  int band;         // rows of tiles that neighbours in time share
  bool store_by_tma;  // rows of `out` are multiples of 16 bytes
};

template <int GROUPS, int BLOCK_N, int STAGES, int CLUSTER>
struct GemmTile {
  static constexpr int M = 64 * GROUPS, N = BLOCK_N, K = 128;
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr uint32_t A_BYTES = M * K, B_BYTES = N * K, STAGE_BYTES = A_BYTES + B_BYTES;
  static constexpr uint32_t OUT_BYTES = M * N * 4;  // where a tile of D is put in order for TMA
  static constexpr uint32_t BARRIERS = STAGES * STAGE_BYTES + OUT_BYTES;
  static constexpr uint32_t SHARED_BYTES = BARRIERS + 2 * STAGES * sizeof(Barrier);
  static_assert(128 % N == 0, "a tile has one scale of B");
  static_assert(SHARED_BYTES <= 232448);
};

// Where the ring stands: which buffer, and which round of it.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t round = 0;
  SM90_DEVICE void next() {
    if (++stage == STAGES) stage = 0, round ^= 1;
  }
};

struct Place {
  int row, column;
};

// Tile t of a matrix of rows x columns tiles, in bands of `band` rows: neighbours in time share
// rows of A and B in L2.
SM90_DEVICE Place place(int t, int rows, int columns, int band) {
  const int first = t / (band * columns) * band;
  const int height = rows - first < band ? rows - first : band;
  const int inside = t % (band * columns);
  return {first + inside % height, inside / height};
}

SM90_DEVICE float load_real(const void* p, int64_t i, Type type) {
  if (type == Type::fp32) return static_cast<const float*>(p)[i];
  if (type == Type::bf16) return to_float(static_cast<const bf16*>(p)[i]);
  return to_float(static_cast<const fp16*>(p)[i]);
}

SM90_DEVICE uint32_t pack(float low, float high, Type type) {
  return type == Type::bf16 ? pack(to_bf16(low), to_bf16(high))
                            : pack(to_fp16(low), to_fp16(high));
}

// Rows [row, row + 64) of the tile's warpgroup, straight from its registers.
template <int N>
SM90_DEVICE void store_direct(const float (&sum)[N / 2], const GemmArguments& p, int row,
                              int column) {
  for (int i = 0; i < N / 2; ++i) {
    const int64_t m = row + i / 2 % 2 * 8, n = column + i / 4 * 8 + i % 2;
    if (m >= p.M || n >= p.N) continue;
    const int64_t at = m * p.out_row + n;
    if (p.out_type == Type::fp32) {
      static_cast<float*>(p.out)[at] = sum[i];
    } else if (p.out_type == Type::bf16) {
      static_cast<bf16*>(p.out)[at] = to_bf16(sum[i]);
    } else {
      static_cast<fp16*>(p.out)[at] = to_fp16(sum[i]);
    }
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
    } else {
      store_shared(place, pack(sum[i], sum[i + 1], type));
    }
  }
}

// The loading warp: one thread of it.
template <class Tile, int STAGES, int CLUSTER>
SM90_DEVICE void load_tiles(const TensorMap* a, const TensorMap* b, const GemmArguments& p,
                            char* memory, Barrier* full, Barrier* empty, int first, int tiles,
                            int rows, int columns) {
  Ring<STAGES> ring;
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  const int half = Tile::N / CLUSTER;
  for (int t = first; t < tiles; t += block_count() / CLUSTER) {
    const Place at = place(t, rows, columns, p.band);
    for (int k = 0; k < p.K; k += Tile::K) {
      barrier_wait(&empty[ring.stage], ring.round ^ 1);
      char* stage = memory + ring.stage * Tile::STAGE_BYTES;
      barrier_arrive_expect(&full[ring.stage], Tile::STAGE_BYTES);
      tma_load(stage, a, &full[ring.stage], k, (at.row * CLUSTER + rank) * Tile::M);
      char* to = stage + Tile::A_BYTES + rank * half * Tile::K;
      const int column = at.column * Tile::N + rank * half;
      if (CLUSTER > 1) {
        tma_load_multicast(to, b, &full[ring.stage], k, column, (1 << CLUSTER) - 1);
      } else {
        tma_load(to, b, &full[ring.stage], k, column);
      }
      ring.next();
    }
  }
}

// The products of one tile, promoted. Thread t's rows are `row` and `row` + 8.
template <class Tile, int STAGES, int CLUSTER>
SM90_DEVICE void multiply(float (&sum)[Tile::N / 2], Ring<STAGES>& ring, const GemmArguments& p,
                          char* memory, Barrier* full, Barrier* empty, int row, int column) {
  const int group = thread_index() / 128;
  const float* above = p.a_scale + (row < p.M ? row : 0) * p.a_scale_row;
  const float* below = p.a_scale + (row + 8 < p.M ? row + 8 : 0) * p.a_scale_row;
  const float* right = p.b_scale + column / 128 * p.b_scale_row;
  for (int k = 0; k < p.K; k += Tile::K) {
    const int64_t block = k / 128;
    // Asked for before the wait, so that they come while it lasts.
    const float scale = load_global(right + block * p.b_scale_block);
    const float upper = load_global(above + block * p.a_scale_block) * scale;
    const float lower = load_global(below + block * p.a_scale_block) * scale;
    const char* a = memory + ring.stage * Tile::STAGE_BYTES + group * 64 * Tile::K;
    const char* b = memory + ring.stage * Tile::STAGE_BYTES + Tile::A_BYTES;
    float product[Tile::N / 2];
    barrier_wait(&full[ring.stage], ring.round);
    wgmma_fence();
    for (int step = 0; step < 4; ++step) {
      wgmma_e4m3<Tile::N>(product, matrix_descriptor(a + step * 32, 0, 1024),
                          matrix_descriptor(b + step * 32, 0, 1024), step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (CLUSTER == 1) {
      if (lane_index() == 0) barrier_arrive(&empty[ring.stage]);
    } else if (lane_index() < CLUSTER) {
      barrier_arrive_at(&empty[ring.stage], lane_index());
    }
    for (int i = 0; i < Tile::N / 2; ++i) {
      sum[i] = fused_multiply_add(product[i], i / 2 % 2 ? lower : upper, sum[i]);
    }
    ring.next();
  }
}

// A warpgroup's part of all tiles.
template <class Tile, int STAGES, int CLUSTER>
SM90_DEVICE void multiply_tiles(const TensorMap* out, const GemmArguments& p, char* memory,
                                Barrier* full, Barrier* empty, int first, int tiles, int rows,
                                int columns) {
  Ring<STAGES> ring;
  const int group = thread_index() / 128, rank = CLUSTER > 1 ? cluster_rank() : 0;
  const int inside = thread_index() % 128 / 32 * 16 + lane_index() / 4;
  char* ordered = memory + STAGES * Tile::STAGE_BYTES + group * 64 * Tile::N * 4;
  const bool storing = thread_index() % 128 == 0;
  for (int t = first; t < tiles; t += block_count() / CLUSTER) {
    const Place at = place(t, rows, columns, p.band);
    const int top = (at.row * CLUSTER + rank) * Tile::M + group * 64;
    const int left = at.column * Tile::N, row = top + inside;
    float sum[Tile::N / 2];
    for (int i = 0; i < Tile::N / 2; ++i) sum[i] = 0.0f;
    multiply<Tile, STAGES, CLUSTER>(sum, ring, p, memory, full, empty, row, left);
    const int column = left + lane_index() % 4 * 2;
    if (p.c != nullptr) {
      for (int i = 0; i < Tile::N / 2; ++i) {
        const int64_t m = row + i / 2 % 2 * 8, n = column + i / 4 * 8 + i % 2;
        if (m < p.M && n < p.N) sum[i] += load_real(p.c, m * p.c_row + n, p.c_type);
      }
    }
    if (!p.store_by_tma) {
      store_direct<Tile::N>(sum, p, row, column);
      continue;
    }
    // The last tile must have been read before this one takes its place.
    if (storing) tma_store_wait_read<0>();
    named_barrier_sync(1 + group, 128);
    arrange<Tile::N>(sum, ordered, p.out_type);
    fence_async_proxy();
    named_barrier_sync(1 + group, 128);
    if (storing) {
      const int wide = p.out_type == Type::fp32 ? 32 : 64;  // columns of a box
      for (int n = 0; n < Tile::N && left + n < p.N; n += wide) {
        if (top < p.M) tma_store(out, ordered + n / wide * (64 * 128), left + n, top);
      }
      tma_store_commit();
    }
  }
  if (storing) tma_store_wait_read<0>();
}

template <int GROUPS, int BLOCK_N, int STAGES, int CLUSTER>
SM90_KERNEL(128 * (GROUPS + 1), 1)
void fp8_gemm_nt(SM90_PARAMETER TensorMap a, SM90_PARAMETER TensorMap b,
                 SM90_PARAMETER TensorMap out, SM90_PARAMETER GemmArguments p) {
  using Tile = GemmTile<GROUPS, BLOCK_N, STAGES, CLUSTER>;
  char* memory = shared_memory();
  auto* full = reinterpret_cast<Barrier*>(memory + Tile::BARRIERS);
  Barrier* empty = full + STAGES;
  const int warp = warp_index(), loader = 4 * GROUPS;
  if (warp == loader && elect_one()) {
    prefetch(&a);
    prefetch(&b);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], 4 * GROUPS * CLUSTER);  // a warp of each block that reads it
    }
    barrier_init_fence();
  }
  if (CLUSTER > 1) {
    cluster_sync();
  } else {
    block_sync();
  }

  const int rows = (p.M + Tile::M * CLUSTER - 1) / (Tile::M * CLUSTER);
  const int columns = (p.N + Tile::N - 1) / Tile::N;
  const int first = block_index() / CLUSTER, tiles = rows * columns;
  if (warp >= loader) {
    if (GROUPS > 1) registers_decrease<40>();
    if (warp == loader && elect_one()) {
      load_tiles<Tile, STAGES, CLUSTER>(&a, &b, p, memory, full, empty, first, tiles, rows,
                                        columns);
    }
  } else {
    // A thread may have 168 of the registers at first; one warpgroup alone has enough of them.
    if (GROUPS > 1) registers_increase<232>();
    multiply_tiles<Tile, STAGES, CLUSTER>(&out, p, memory, full, empty, first, tiles, rows,
                                          columns);
  }
  // A block's barriers and buffers must be there until the other has sent its last.
  if (CLUSTER > 1) cluster_sync();
}

}  // namespace sm90
