// Attention of a few new queries per sequence over the paged latent cache, on Hopper: the op
// mla_decode of kernels/deepkern/attention for 512 + 64 values a token, bf16 or an FP8 cache.
//
//     score[r, n] = softmax_scale · q[r] · cache[n]               over 576
//     out[r]      = softmax over the seen n of score · cache[n, :512]
//
// Cut: the Sq · H queries of a sequence are rows, 64 to a tile (zeros past the last), its tokens
// are cut into splits; a block takes one tile over one split, 64 tokens at a time. A token tile
// lies in shared memory once, as nine columns of 64x64, and is key and value. A warpgroup loads
// (mla_load.cuh), two multiply: each scores 32 of the 64 tokens, they exchange row maxima and
// weights, then each multiplies all 64 weights by its half of the value's 512 columns (the plain
// form: both work on the same tile). Two tiles go round between two barriers:
//
//     loaders      wait empty[s] -> TMA, or row by row -> full[s]
//     warpgroup    wait full[s] -> Q·Kᵀ -> maxima, barrier -> weights -> P·V of its own tokens,
//                  barrier -> P·V of the others -> empty[s]
//
// Over an FP8 cache the tile is code · step, exactly, and what the scale has beyond the step, its
// ratio, is applied to the scores of each block of 128 values and to the weights of each block.
//
// Where the splits fall depends on the sequence's own length alone; `mla_combine` adds them up in
// their order. Few rows are bound by reading the cache, more than a hundred by the tensor cores,
// which here wait while weights are made.
//
// Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; the cut into 64 rows, two halves of the
// output and a ring of token tiles is FlashMLA's.
#pragma once

#include "mla_load.cuh"

namespace sm90 {

// The value of this lane's row among the four lanes that share it.
SM90_DEVICE float largest_of_row(float x) {
  x = larger(x, shuffle_xor(x, 1));
  return larger(x, shuffle_xor(x, 2));
}
SM90_DEVICE float sum_of_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// What a thread keeps of its two rows, `row` and `row` + 8.
struct Rows {
  int limit[2];            // tokens seen
  float top[2], total[2];  // largest score; sum of the weights that this thread made
  float excess[2][2];      // by the half of its columns: what rounding added to the weights used
};

// Scores become weights: largest scores are exchanged with the other warpgroup. `shrink` is what
// sums over earlier tokens are worth beside the new maximum; `first`: the tile's first token.
SM90_DEVICE void weigh(float (&score)[16], float (&shrink)[2], Rows& rows, const MlaArguments& p,
                       int first, const char* places, char* maxima, int group, int row) {
  float top[2] = {rows.top[0], rows.top[1]};
  const int room[2] = {smaller(rows.limit[0] - first, MlaTile::TOKENS),
                       smaller(rows.limit[1] - first, MlaTile::TOKENS)};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int half = i / 2 % 2, column = group * 32 + i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
    const bool seen = load_shared<uint8_t>(places + column) < room[half];
    score[i] = seen ? score[i] * p.score_scale : minus_infinity();
    top[half] = larger(score[i], top[half]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    top[half] = largest_of_row(top[half]);
    if (lane_index() % 4 == 0) {
      store_shared(maxima + 4 * (group * MlaTile::ROWS + row + 8 * half), top[half]);
    }
  }
  named_barrier_sync(1, 256);
  float zero[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int other = (1 - group) * MlaTile::ROWS + row + 8 * half;
    top[half] = larger(top[half], load_shared<float>(maxima + 4 * other));
    // Nothing seen yet: all weights are 0.
    zero[half] = top[half] == minus_infinity() ? 0.0f : top[half];
    shrink[half] = exp2_of(rows.top[half] - zero[half]);
    rows.total[half] *= shrink[half];
    rows.excess[0][half] *= shrink[half];
    rows.excess[1][half] *= shrink[half];
    rows.top[half] = top[half];
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    score[i] = exp2_of(score[i] - zero[i / 2 % 2]);
    rows.total[i / 2 % 2] += score[i];
  }
}

// The products of COUNT columns of q, from `first` on, with those of 32 tokens.
template <int COUNT>
SM90_DEVICE void multiply_queries(float (&product)[16], const char* queries, const char* keys,
                                  int first) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < COUNT * 4; ++step) {
    const int at = (first + step / 4) * MlaTile::COLUMN_BYTES + step % 4 * 32;
    wgmma_bf16<32>(product, matrix_descriptor(queries + at, 0, 1024),
                   matrix_descriptor(keys + at, 0, 1024), step > 0);
  }
  wgmma_commit();
}

// score += ratio of each token in the block · product
SM90_DEVICE void add_block(float (&score)[16], const float (&product)[16], const char* ratios) {
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const auto ratio = load_shared<FloatPair>(ratios + (i * 2 + lane_index() % 4 * 2) * 4);
    score[i] = fused_multiply_add(ratio.low, product[i], score[i]);
    score[i + 1] = fused_multiply_add(ratio.high, product[i + 1], score[i + 1]);
    score[i + 2] = fused_multiply_add(ratio.low, product[i + 2], score[i + 2]);
    score[i + 3] = fused_multiply_add(ratio.high, product[i + 3], score[i + 3]);
  }
}

// Q · Kᵀ over an FP8 cache: RoPE, then block by block. The other warpgroup's products go on while
// this one adds.
SM90_DEVICE void score_fp8(float (&score)[16], const char* queries, const char* keys,
                           const char* ratios) {
  float product[16];
  multiply_queries<1>(score, queries, keys, MlaTile::COLUMNS - 1);
#pragma unroll
  for (int j = 0; j < MlaTile::BLOCKS; ++j) {
    multiply_queries<2>(product, queries, keys, 2 * j);
    wgmma_wait<0>();
    add_block(score, product, ratios + j * MlaTile::TOKENS * 4);
  }
}

// 32 of the 64 weights of its two rows that a thread needs are made by the other warpgroup's thread
// of the same number, which has them in the same order: pairs go from one to the other.
SM90_DEVICE void give_weights(const uint32_t (&pair)[8], char* weights, int group) {
  char* to = weights + group * 4096 + thread_index() % 128 * 16;
  store_shared(to, Chunk{.word = {pair[0], pair[1], pair[2], pair[3]}});
  store_shared(to + 2048, Chunk{.word = {pair[4], pair[5], pair[6], pair[7]}});
}
SM90_DEVICE void take_weights(uint32_t (&pair)[8], const char* weights, int group) {
  const char* from = weights + (1 - group) * 4096 + thread_index() % 128 * 16;
#pragma unroll
  for (int i = 0; i < 8; ++i) pair[i] = load_shared<Chunk>(from + i / 4 * 2048).word[i % 4];
}

// P · V of 32 tokens and this warpgroup's 256 columns, begun.
SM90_DEVICE void add_values(float (&sum)[2][64], const uint32_t (&pair)[8], const char* values) {
  auto& all = reinterpret_cast<float(&)[128]>(sum);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const uint32_t* a = pair + 4 * step;
    wgmma_bf16<256, false>(
        all, {a[0], a[1], a[2], a[3]},
        matrix_descriptor(values + step * 16 * 128, MlaTile::COLUMN_BYTES, 1024), true);
  }
}

// The same over an FP8 cache: each of the two blocks of columns has weights of its own, times the
// ratios. What rounding makes of them is counted, as if the weight had been another: so it cancels
// where one token outweighs the others.
SM90_DEVICE void add_fp8_values(float (&sum)[2][64], Rows& rows, const float (&weight)[16],
                                const char* ratios, const char* values) {
  uint32_t scaled[2][8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int half = i % 2, column = i / 2 * 8 + lane_index() % 4 * 2;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const auto ratio = load_shared<FloatPair>(ratios + (b * MlaTile::TOKENS + column) * 4);
      const float left = weight[2 * i] * ratio.low, right = weight[2 * i + 1] * ratio.high;
      scaled[b][i] = pack(to_bf16(left), to_bf16(right));
      // As if all ratios were 1, which is near enough for so little.
      rows.excess[b][half] += to_float(low_bf16(scaled[b][i])) - left;
      rows.excess[b][half] += to_float(high_bf16(scaled[b][i])) - right;
    }
  }
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const char* from = values + b * 2 * MlaTile::COLUMN_BYTES + step * 16 * 128;
      const uint32_t* a = scaled[b] + 4 * step;
      wgmma_bf16<128, false>(sum[b], {a[0], a[1], a[2], a[3]},
                             matrix_descriptor(from, MlaTile::COLUMN_BYTES, 1024), true);
    }
  }
}

// A thread's part of out and lse, or of the split's results.
SM90_DEVICE void store_attended(const float (&sum)[2][64], Rows& rows, const MlaArguments& p,
                                const MlaWork& w, char* sums, int group, int row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.total[half] = sum_of_row(rows.total[half]);
    if (lane_index() % 4 == 0) {
      store_shared(sums + 4 * (group * MlaTile::ROWS + row + 8 * half), rows.total[half]);
    }
  }
  named_barrier_sync(1, 256);
  const bool whole = w.splits == 1;
  auto* out = static_cast<bf16*>(p.out);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float excess[2] = {sum_of_row(rows.excess[0][half]), sum_of_row(rows.excess[1][half])};
    const int here = row + 8 * half, m = w.row + here, all = p.Sq * p.H;
    if (m >= all) continue;
    // In the same order in both warpgroups: the weights of tokens 0 to 31 first.
    const float total = load_shared<float>(sums + 4 * here) +
                        load_shared<float>(sums + 4 * (MlaTile::ROWS + here));
    const float lse = total == 0.0f ? minus_infinity() : rows.top[half] + log2_of(total);
    const int64_t out_row = int64_t{w.sequence} * all + m;
    const int64_t split_row = (int64_t{w.sequence} * p.splits + w.split) * all + m;
    if (group == 0 && lane_index() % 4 == 0) {
      const int64_t at = (int64_t{w.sequence} * p.H + m % p.H) * p.Sq + m / p.H;
      if (whole) store_global(p.lse + at, lse * 0.6931471805599453f);
      if (!whole) store_global(p.partial_lse + split_row, lse);
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const float scale = total == 0.0f ? 0.0f : 1.0f / (total + excess[b]);
      const int column = group * 256 + b * 128 + lane_index() % 4 * 2;
#pragma unroll
      for (int i = half * 2; i < 64; i += 4) {
        const int at = column + i / 4 * 8;
        const float left = sum[b][i] * scale, right = sum[b][i + 1] * scale;
        if (whole) {
          auto* to = reinterpret_cast<uint32_t*>(out + out_row * MlaTile::VALUES + at);
          store_global(to, pack(to_bf16(left), to_bf16(right)));
        } else {
          auto* to = reinterpret_cast<FloatPair*>(p.partial + split_row * MlaTile::VALUES + at);
          store_global(to, FloatPair{left, right});
        }
      }
    }
  }
}

// sum = sum · shrink + P · V: the weights made here first, then those of the other warpgroup.
template <bool FP8>
SM90_DEVICE void sum_tile(float (&sum)[2][64], Rows& rows, float (&weight)[16],
                          const float (&shrink)[2], TokenRing& ring, char* weights, int group) {
  uint32_t pair[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float low = weight[2 * i], high = weight[2 * i + 1];
    pair[i] = FP8 ? pack(to_fp16(low), to_fp16(high)) : pack(to_bf16(low), to_bf16(high));
  }
  give_weights(pair, weights, group);
#pragma unroll
  for (int i = 0; i < 128; ++i) sum[i / 64][i % 64] *= shrink[i / 2 % 2];
  const char* values = ring.tokens() + group * 4 * MlaTile::COLUMN_BYTES;
  const char* ratios = ring.ratios() + group * 2 * MlaTile::TOKENS * 4;
  const int mine = group * 32, others = 32 - mine;  // first tokens
  if (FP8) {
    add_fp8_values(sum, rows, weight, ratios + mine * 4, values + mine * 128);
  } else {
    add_values(sum, pair, values + mine * 128);
  }
  named_barrier_sync(1, 256);
  take_weights(pair, weights, group);
  if (FP8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      weight[2 * i] = to_float(low_fp16(pair[i])), weight[2 * i + 1] = to_float(high_fp16(pair[i]));
    }
    add_fp8_values(sum, rows, weight, ratios + others * 4, values + others * 128);
  } else {
    add_values(sum, pair, values + others * 128);
  }
  wgmma_commit();
}

// A multiplying warpgroup: `group` 0 scores the first 32 tokens of a tile and sums the left half
// of the columns.
template <bool FP8>
SM90_DEVICE void attend(const MlaArguments& p, const MlaWork& w, char* memory) {
  TokenRing ring(memory);
  const int group = thread_index() / 128;
  const int row = thread_index() % 128 / 32 * 16 + lane_index() / 4;
  char *weights = memory + MlaTile::WEIGHTS, *exchanged = memory + MlaTile::EXCHANGED;
  Rows rows{};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = (w.row + row + 8 * half) / p.H;
    rows.limit[half] = p.causal ? w.length - (p.Sq - 1 - query) : w.length;
    rows.top[half] = minus_infinity();
  }
  load_queries(p, w, memory);
  float sum[2][64];
#pragma unroll
  for (int i = 0; i < 128; ++i) sum[i / 64][i % 64] = 0.0f;

  for (int first = w.begin; first < w.end; first += MlaTile::TOKENS) {
    float score[16], shrink[2];
    ring.wait_full();
    const char* keys = ring.tokens() + group * 32 * 128;
    if (FP8) {
      score_fp8(score, memory, keys, ring.ratios() + group * 32 * 4);
    } else {
      multiply_queries<MlaTile::COLUMNS>(score, memory, keys, 0);
      wgmma_wait<0>();
    }
    weigh(score, shrink, rows, p, first, ring.places(), exchanged, group, row);
    sum_tile<FP8>(sum, rows, score, shrink, ring, weights, group);
    // ptxas takes WGMMAs under way around a loop's end for a reason to wait after each.
    wgmma_wait<0>();
    if (lane_index() == 0) barrier_arrive(&ring.empty[ring.stage]);
    ring.next();
  }
  store_attended(sum, rows, p, w, exchanged, group, row);
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
    TokenRing(memory).init(128, 8);  // the loading threads; the multiplying warps
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
    attend<FP8>(p, w, memory);
  }
}

// Adds up the splits of each row, weighted with their shares of the sum of exponentials. A warp
// takes a row; blocks of 4 rows.
SM90_KERNEL(128, 1)
void mla_combine(SM90_PARAMETER MlaArguments p) {
  grid_dependency_wait();
  const int all = p.Sq * p.H, tiles = (all + 3) / 4;
  const int sequence = block_index() / tiles, m = block_index() % tiles * 4 + warp_index();
  const Splits cut(p, sequence);
  if (cut.count == 1 || m >= all) return;
  const int64_t first = int64_t{sequence} * p.splits * all + m;  // of split 0
  float top = minus_infinity();
  for (int i = 0; i < cut.count; ++i) {
    top = larger(load_written(p.partial_lse + first + int64_t{i} * all), top);
  }
  const float zero = top == minus_infinity() ? 0.0f : top;
  float total = 0.0f, sum[16] = {};
  for (int i = 0; i < cut.count; ++i) {
    const int64_t at = first + int64_t{i} * all;
    const float weight = exp2_of(load_written(p.partial_lse + at) - zero);
    total += weight;
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      const float* from = p.partial + at * MlaTile::VALUES + j / 2 * 64 + lane_index() * 2;
      const auto x = load_written(reinterpret_cast<const FloatPair*>(from));
      sum[j] = fused_multiply_add(weight, x.low, sum[j]);
      sum[j + 1] = fused_multiply_add(weight, x.high, sum[j + 1]);
    }
  }
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  bf16* out = static_cast<bf16*>(p.out) + (int64_t{sequence} * all + m) * MlaTile::VALUES;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {
    store_global(reinterpret_cast<uint32_t*>(out + j / 2 * 64 + lane_index() * 2),
                 pack(to_bf16(sum[j] * scale), to_bf16(sum[j + 1] * scale)));
  }
  if (lane_index() == 0) {
    const float lse = total == 0.0f ? minus_infinity() : top + log2_of(total);
    const int64_t at = (int64_t{sequence} * p.H + m % p.H) * p.Sq + m / p.H;
    store_global(p.lse + at, lse * 0.6931471805599453f);
  }
}

}  // namespace sm90
