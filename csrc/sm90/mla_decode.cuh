// Attention of a few new queries per sequence over the paged latent cache, on Hopper: the op
// mla_decode of kernels/deepkern/attention for 512 + 64 values a token, bf16 or an FP8 cache.
//
//     score[r, n] = softmax_scale · q[r] · cache[n]               over 576
//     out[r]      = softmax over the seen n of score · cache[n, :512]
//
// Cut: the Sq · H queries of a sequence are rows, 64 to a tile (zeros past the last), its tokens
// are cut into splits; a block takes one tile over one split, 64 tokens at a time. A token tile
// lies in shared memory once, as nine columns of 64x64, and is key and value. A warpgroup loads
// (mla_load.cuh), two multiply in a seesaw: warpgroup 0 scores the even tiles and sums the left half
// of the value's 512 columns, warpgroup 1 scores the odd tiles and sums the right half. While one
// makes weights (mla_multiply.cuh) the other's products run:
//
//     warpgroup 0  Q·K0ᵀ, weights 0 -> give P0, P0·V0 left, free ...... take P1, P1·V1 left, free
//     warpgroup 1  Q·K1ᵀ ..... take P0, P0·V0 right and weights 1 -> give P1, P1·V1 right, free
//
// With weights go maxima, so that each tile is weighed beside the largest score of all before it.
// Two tiles go round in two pieces each, columns 0 to 3 and 4 to 8, each freed by the warpgroup
// that sums it. Over an FP8 cache the tile is code · step, exactly; what the scale has beyond the
// step, its ratio, is applied to the scores of each block of 128 values and to its weights.
//
// Where the splits fall depends on the sequence's own length alone; `mla_combine` (mla_store.cuh)
// adds them up in their order. Few rows are bound by reading the cache, more than a hundred by the
// tensor cores.
//
// Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; the seesaw, the two halves of the output and
// pieces of a tile freed one by one are FlashMLA's.
#pragma once

#include "mla_store.cuh"

namespace sm90 {

// A multiplying warpgroup: GROUP 0 scores the even tiles and sums the left half of the columns, 1 the
// odd ones and the right half.
template <bool FP8, int GROUP>
struct Attention {
  const MlaArguments& p;
  const MlaWork& w;
  char* memory;
  const int row = thread_index() % 128 / 32 * 16 + lane_index() / 4;
  Rows rows{{minus_infinity(), minus_infinity()}, {}, {}};
  float sum[2][64];
  Pieces pieces;
  uint32_t round = 0;

  SM90_DEVICE Attention(const MlaArguments& arguments, const MlaWork& work, char* shared)
      : p(arguments), w(work), memory(shared), pieces(shared + MlaTile::BARRIERS) {
#pragma unroll
    for (int i = 0; i < 128; ++i) sum[i / 64][i % 64] = 0.0f;
  }

  SM90_DEVICE void score(float (&to)[32], int tile) {
    const TokenTile t(memory, tile);
    if (FP8) {
      score_fp8_tile(to, memory, t, pieces.full + 2 * tile, round);
    } else {
      score_tile(to, memory, t, pieces.full + 2 * tile, round);
    }
  }
  SM90_DEVICE void weigh(float (&weight)[32], float (&shrink)[2], int tile, int first) {
    sm90::weigh(weight, shrink, rows, p.score_scale, first, TokenTile(memory, tile).places,
                memory + MlaTile::LIMITS + 4 * row);
  }
  // sum += P · V of a tile, begun: with the weights made here, or those the other one gave.
  SM90_DEVICE void add_own(const uint32_t (&pair)[4][4], int tile) {
    if (!FP8) wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) add_step(pair[step], TokenTile(memory, tile), step);
    if (!FP8) wgmma_commit();
  }
  SM90_DEVICE void add_given(int tile) {
    const TokenTile t(memory, tile);
    if (FP8) {
      // Nothing of the next step beforehand: registers are few beside scores.
#pragma unroll 1
      for (int step = 0; step < 4; ++step) {
        uint32_t pair[4];
        take_weights(pair, memory + MlaTile::WEIGHTS, step);
        add_step(pair, t, step);
      }
    } else {
      uint32_t pair[4][4];
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        take_weights(pair[step], memory + MlaTile::WEIGHTS, step);
      }
      add_own(pair, tile);
    }
  }
  SM90_DEVICE void add_step(const uint32_t (&pair)[4], const TokenTile& tile, int step) {
    if (FP8) {
      add_fp8_values<GROUP>(sum, rows, pair, tile, step * 16);
      wgmma_wait<0>();  // more weights than those of a step have no registers
    } else {
      add_values<GROUP>(sum, pair, tile, step * 16);
    }
  }
  // This warpgroup's piece of a tile is read.
  SM90_DEVICE void free(int tile) {
    wgmma_wait<0>();
    if (lane_index() == 0) barrier_arrive(&pieces.empty[2 * tile + GROUP]);
  }
  SM90_DEVICE void give(const uint32_t (&pair)[4][4]) {
    give_weights(pair, memory + MlaTile::WEIGHTS);
    char* tops = memory + MlaTile::EXCHANGED + (GROUP * MlaTile::ROWS + row) * 4;
    if (lane_index() % 4 == 0) {
      store_shared(tops, rows.top[0]);
      store_shared(tops + 32, rows.top[1]);
    }
    named_barrier_arrive(2 + GROUP, 256);
  }
  // What the other warpgroup gave, and this one's piece of that tile.
  SM90_DEVICE void take(float (&shrink)[2], int tile) {
    named_barrier_sync(3 - GROUP, 256);
    barrier_wait(&pieces.full[2 * tile + GROUP], round);
    const char* tops = memory + MlaTile::EXCHANGED + ((1 - GROUP) * MlaTile::ROWS + row) * 4;
    raise_top(rows, shrink, {load_shared<float>(tops), load_shared<float>(tops + 32)});
  }

  SM90_DEVICE void even(int first) {
    float weight[32], shrink[2];
    uint32_t pair[4][4];
    score(weight, 0);
    weigh(weight, shrink, 0, first);
    pack_weights<FP8>(pair, weight);
    give(pair);
    scale_sums(sum, shrink);
    add_own(pair, 0);
    free(0);
    if (first + MlaTile::TOKENS >= w.end) return;
    take(shrink, 1);
    scale_sums(sum, shrink);
    add_given(1);
    free(1);
  }
  SM90_DEVICE void odd(int first) {
    float weight[32], shrink[2];
    uint32_t pair[4][4];
    score(weight, 1);
    take(shrink, 0);
    scale_sums(sum, shrink);
    add_given(0);
    weigh(weight, shrink, 1, first);
    pack_weights<FP8>(pair, weight);
    give(pair);
    free(0);
    scale_sums(sum, shrink);
    add_own(pair, 1);
    free(1);
  }
  SM90_DEVICE void odd_alone() {
    float shrink[2];
    take(shrink, 0);
    scale_sums(sum, shrink);
    add_given(0);
    free(0);
  }
};

template <bool FP8, int GROUP>
SM90_DEVICE void attend(const MlaArguments& p, const MlaWork& w, char* memory) {
  load_queries(p, w, memory);
  Attention<FP8, GROUP> a(p, w, memory);
  int first = w.begin;
  if (GROUP == 0) {
    for (; first < w.end; first += 2 * MlaTile::TOKENS) {
      a.even(first);
      a.round ^= 1;
    }
  } else {
    for (; first + MlaTile::TOKENS < w.end; first += 2 * MlaTile::TOKENS) {
      a.odd(first + MlaTile::TOKENS);
      a.round ^= 1;
    }
    if (first < w.end) a.odd_alone();
  }
  store_attended(a.sum, a.rows, p, w, memory, GROUP);
}

// FP8: the cache's format.
template <bool FP8>
SM90_KERNEL(MlaTile::THREADS, 1)
void mla_decode(SM90_PARAMETER TensorMap map, SM90_PARAMETER MlaArguments p) {
  grid_dependency_launch();  // mla_combine may come up, and waits for the end of this grid
  const MlaWork w(p);
  if (w.split >= w.splits) return;
  char* memory = shared_memory();
  const int warp = warp_index();
  if (warp == 8 && elect_one()) {
    if (p.by_tma) prefetch(&map);
    Pieces(memory + MlaTile::BARRIERS).init(128, 4);  // loading threads; warps that sum the piece
    barrier_init_fence();
  }
  block_sync();
  if (warp >= 8) {
    registers_decrease<FP8 ? 88 : 72>();
    if (FP8) {
      load_fp8_tokens(p, w, memory);
    } else {
      load_tokens(&map, p, w, memory);
    }
  } else {
    registers_increase<FP8 ? 208 : 216>();
    if (warp < 4) {
      attend<FP8, 0>(p, w, memory);
    } else {
      attend<FP8, 1>(p, w, memory);
    }
  }
}

}  // namespace sm90
