// Attention of a few new queries per sequence over the paged latent cache, on Hopper: the op
// mla_decode of kernels/deepkern/attention for bf16 and 512 + 64 values a token.
//
//     score[r, n] = softmax_scale · q[r] · cache[n]               over 576
//     out[r]      = softmax over the seen n of score · cache[n, :512]
//
// Cut: the Sq · H queries of a sequence are rows, 64 to a tile (zeros past the last), its tokens
// are cut into splits; a block takes one tile over one split, 64 tokens at a time. A token tile
// lies in shared memory once, as nine columns of 64x64, and is key and value. A warpgroup loads,
// two multiply: each scores 32 of the 64 tokens, they exchange row maxima and weights, then each
// multiplies all 64 weights by its half of the value's 512 columns (the plain form: both work on
// the same tile). Two tiles go round between two barriers:
//
//     loaders      wait empty[s] -> TMA, or row by row -> full[s]
//     warpgroup    wait full[s] -> Q·Kᵀ -> maxima, barrier -> weights, barrier -> P·V -> empty[s]
//
// Whole tiles of a page come by TMA; what it cannot fetch (the last tokens, pages of other sizes,
// pages that do not exist) is gathered 16 bytes a lane, zeros for what is absent.
//
// Where the splits fall depends on the sequence's own length alone; `mla_combine` adds them up in
// their order. Few rows are bound by reading the cache, more than a hundred by the tensor cores,
// which here wait while weights are made.
//
// Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; the cut into 64 rows, two halves of the
// output and a ring of token tiles is FlashMLA's.
#pragma once

#include "mla_arguments.h"
#include "primitives.cuh"

namespace sm90 {

struct MlaTile {
  static constexpr int ROWS = 64, TOKENS = 64, WIDTH = 576, VALUES = 512, STAGES = 2;
  static constexpr int COLUMNS = WIDTH / 64;  // of 64 values: 128-byte rows, swizzled
  static constexpr int THREADS = 384;
  static constexpr uint32_t COLUMN_BYTES = 64 * 128, TILE_BYTES = COLUMNS * COLUMN_BYTES;
  static constexpr uint32_t TOKENS_AT = TILE_BYTES;  // the ring, behind Q
  static constexpr uint32_t WEIGHTS = TOKENS_AT + STAGES * TILE_BYTES;
  static constexpr uint32_t POSITIONS = WEIGHTS + COLUMN_BYTES;
  static constexpr uint32_t POSITION_BYTES = TOKENS * 4;  // of a stage
  static constexpr uint32_t MAXIMA = POSITIONS + STAGES * POSITION_BYTES;
  static constexpr uint32_t SUMS = MAXIMA + 2 * ROWS * 4;
  static constexpr uint32_t BARRIERS = SUMS + 2 * ROWS * 4;
  static constexpr uint32_t SHARED_BYTES = BARRIERS + 2 * STAGES * sizeof(Barrier);
  static_assert(SHARED_BYTES <= 232448);
};

constexpr int ABSENT = 0x7fffffff;  // the position of a token that nobody sees

SM90_DEVICE float minus_infinity() { return -__builtin_huge_valf(); }
SM90_DEVICE float larger(float a, float b) { return a > b ? a : b; }
SM90_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// A sequence's tokens, and how they are split: a function of its length alone.
struct Splits {
  int length, each, count;

  SM90_DEVICE Splits(const MlaArguments& p, int sequence) {
    length = load_global(p.lengths + sequence);
    length = length < 0 ? 0 : smaller(length, p.capacity);
    const int even = (length + p.max_splits - 1) / p.max_splits;
    each = (even + MlaTile::TOKENS - 1) / MlaTile::TOKENS * MlaTile::TOKENS;
    if (each < p.min_split) each = p.min_split;
    count = length > 0 ? (length + each - 1) / each : 1;
  }
};

// What a block does.
struct MlaWork {
  int sequence, row, split;  // `row`: the first of its 64
  int begin, end;            // tokens
  int length, splits;        // of the sequence

  SM90_DEVICE explicit MlaWork(const MlaArguments& p) {
    const int group = block_index() / p.tiles;
    row = block_index() % p.tiles * MlaTile::ROWS;
    sequence = group / p.splits;
    split = group % p.splits;
    const Splits cut(p, sequence);
    length = cut.length, splits = cut.count;
    begin = split * cut.each;
    end = smaller(begin + cut.each, length);
  }
  SM90_DEVICE int tiles() const { return (end - begin + MlaTile::TOKENS - 1) / MlaTile::TOKENS; }
};

// What all warps know: the token tiles and their barriers, and where this warp stands in the ring.
struct TokenRing {
  char* memory;
  Barrier *full, *empty;
  int stage = 0;
  uint32_t round = 0;

  SM90_DEVICE explicit TokenRing(char* shared)
      : memory(shared),
        full(reinterpret_cast<Barrier*>(shared + MlaTile::BARRIERS)),
        empty(full + MlaTile::STAGES) {}
  SM90_DEVICE void wait_empty() { barrier_wait(&empty[stage], round ^ 1); }
  SM90_DEVICE void wait_full() { barrier_wait(&full[stage], round); }
  SM90_DEVICE char* tokens() {
    return memory + MlaTile::TOKENS_AT + stage * MlaTile::TILE_BYTES;
  }
  SM90_DEVICE char* positions() {
    return memory + MlaTile::POSITIONS + stage * MlaTile::POSITION_BYTES;
  }
  SM90_DEVICE void next() {
    if (++stage == MlaTile::STAGES) stage = 0, round ^= 1;
  }
};

// Eight lanes bring a row of 576 values to row `row` of a tile, or zeros if there is none.
SM90_DEVICE void gather_row(char* tile, int row, const bf16* from) {
  const int chunk = lane_index() % 8;
  Chunk values[MlaTile::COLUMNS];
#pragma unroll
  for (int j = 0; j < MlaTile::COLUMNS; ++j) {
    values[j] = from ? load_global(reinterpret_cast<const Chunk*>(from + j * 64 + chunk * 8))
                     : Chunk{};
  }
  char* place = tile + row * 128 + (chunk ^ (row % 8)) * 16;
#pragma unroll
  for (int j = 0; j < MlaTile::COLUMNS; ++j) {
    store_shared(place + j * MlaTile::COLUMN_BYTES, values[j]);
  }
}

// The page that holds a token; -1: none does.
SM90_DEVICE int page_of(const MlaArguments& p, const MlaWork& w, int token) {
  if (token >= w.end) return -1;
  const int page = load_global(p.table + w.sequence * p.table_row + token / p.page);
  return page < p.blocks ? page : -1;
}

// The loading warpgroup.
SM90_DEVICE void load_tokens(const TensorMap* map, const MlaArguments& p, const MlaWork& w,
                             char* memory) {
  TokenRing ring(memory);
  const int thread = thread_index() % 128;
  for (int first = w.begin; first < w.end; first += MlaTile::TOKENS) {
    const int page = page_of(p, w, first);
    const bool by_tma = p.by_tma && page >= 0 && first + MlaTile::TOKENS <= w.end;
    ring.wait_empty();
    Barrier* full = &ring.full[ring.stage];
    if (by_tma) {
      if (thread < MlaTile::TOKENS) store_shared(ring.positions() + 4 * thread, first + thread);
      if (thread == 0) {
        barrier_arrive_expect(full, MlaTile::TILE_BYTES);
        const int row = static_cast<int>(page * p.page_rows) + first % p.page;
        for (int j = 0; j < MlaTile::COLUMNS; ++j) {
          tma_load(ring.tokens() + j * MlaTile::COLUMN_BYTES, map, full, j * 64, row);
        }
      } else {
        barrier_arrive(full);
      }
    } else {
      for (int row = thread / 8; row < MlaTile::TOKENS; row += 16) {
        const int token = first + row, found = page_of(p, w, token);
        const bf16* from = nullptr;
        if (found >= 0) {
          from = static_cast<const bf16*>(p.cache) + found * p.block + token % p.page * p.slot;
        }
        gather_row(ring.tokens(), row, from);
        if (thread % 8 == 0) store_shared(ring.positions() + 4 * row, from ? token : ABSENT);
      }
      fence_async_proxy();
      barrier_arrive(full);
    }
    ring.next();
  }
}

// The multiplying warpgroups' threads bring the 64 rows of q.
SM90_DEVICE void load_queries(const MlaArguments& p, const MlaWork& w, char* memory) {
  for (int i = thread_index() / 8; i < MlaTile::ROWS; i += 32) {
    const int row = w.row + i, query = row / p.H, head = row % p.H;
    const int64_t at = w.sequence * p.q_batch + query * p.q_query + head * p.q_head;
    gather_row(memory, i, row < p.Sq * p.H ? static_cast<const bf16*>(p.q) + at : nullptr);
  }
  fence_async_proxy();
  named_barrier_sync(1, 256);
}

// The value of this lane's row among the four lanes that share it.
SM90_DEVICE float largest_of_row(float x) {
  x = larger(x, shuffle_xor(x, 1));
  return larger(x, shuffle_xor(x, 2));
}
SM90_DEVICE float sum_of_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// The warpgroup's 64 x 32 weights to their place in P [64, 64], swizzled.
SM90_DEVICE void store_weights(const float (&weight)[16], char* to, int group) {
  const int lane = lane_index(), row = thread_index() % 128 / 32 * 16 + lane % 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* w = weight + half * 8;
    const int chunk = group * 4 + half * 2 + lane / 16;
    store_matrix_x4(to + row * 128 + (chunk ^ (row % 8)) * 16, pack(to_bf16(w[0]), to_bf16(w[1])),
                    pack(to_bf16(w[2]), to_bf16(w[3])), pack(to_bf16(w[4]), to_bf16(w[5])),
                    pack(to_bf16(w[6]), to_bf16(w[7])));
  }
}

// What a thread keeps of its two rows, `row` and `row` + 8.
struct Rows {
  int limit[2];               // tokens seen
  float top[2], total[2];     // largest score; sum of the weights that this thread made
};

// Scores become weights: largest scores are exchanged with the other warpgroup. `shrink` is what
// sums over earlier tokens are worth beside the new maximum.
SM90_DEVICE void weigh(float (&score)[16], float (&shrink)[2], Rows& rows, const MlaArguments& p,
                       const char* positions, char* maxima, int group, int row) {
  float top[2] = {rows.top[0], rows.top[1]};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int half = i / 2 % 2, column = group * 32 + i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
    const bool seen = load_shared<int>(positions + 4 * column) < rows.limit[half];
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
    rows.top[half] = top[half];
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    score[i] = exp2_of(score[i] - zero[i / 2 % 2]);
    rows.total[i / 2 % 2] += score[i];
  }
}

// A thread's part of out and lse, or of the split's results.
SM90_DEVICE void store_attended(float (&sum)[128], Rows& rows, const MlaArguments& p,
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
    const int here = row + 8 * half, m = w.row + here, all = p.Sq * p.H;
    if (m >= all) continue;
    // In the same order in both warpgroups: the weights of tokens 0 to 31 first.
    const float total = load_shared<float>(sums + 4 * here) +
                        load_shared<float>(sums + 4 * (MlaTile::ROWS + here));
    const float scale = total == 0.0f ? 0.0f : 1.0f / total;
    const float lse = total == 0.0f ? minus_infinity() : rows.top[half] + log2_of(total);
    const int64_t out_row = int64_t{w.sequence} * all + m;
    const int64_t split_row = (int64_t{w.sequence} * p.splits + w.split) * all + m;
    if (group == 0 && lane_index() % 4 == 0) {
      const int64_t at = (int64_t{w.sequence} * p.H + m % p.H) * p.Sq + m / p.H;
      if (whole) p.lse[at] = lse * 0.6931471805599453f;
      if (!whole) p.partial_lse[split_row] = lse;
    }
    const int column = group * 256 + lane_index() % 4 * 2;
#pragma unroll
    for (int i = half * 2; i < 128; i += 4) {
      const int at = column + i / 4 * 8;
      const float left = sum[i] * scale, right = sum[i + 1] * scale;
      if (whole) {
        auto* to = reinterpret_cast<uint32_t*>(out + out_row * MlaTile::VALUES + at);
        *to = pack(to_bf16(left), to_bf16(right));
      } else {
        auto* to = reinterpret_cast<uint64_t*>(p.partial + split_row * MlaTile::VALUES + at);
        *to = uint64_t{float_bits(left)} | uint64_t{float_bits(right)} << 32;
      }
    }
  }
}

// A multiplying warpgroup: `group` 0 scores the first 32 tokens of a tile and sums the left half
// of the columns.
SM90_DEVICE void attend(const MlaArguments& p, const MlaWork& w, char* memory) {
  TokenRing ring(memory);
  const int group = thread_index() / 128;
  const int row = thread_index() % 128 / 32 * 16 + lane_index() / 4;
  char* weights = memory + MlaTile::WEIGHTS;
  Rows rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = (w.row + row + 8 * half) / p.H;
    rows.limit[half] = p.causal ? w.length - (p.Sq - 1 - query) : w.length;
    rows.top[half] = minus_infinity(), rows.total[half] = 0.0f;
  }
  float sum[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) sum[i] = 0.0f;
  load_queries(p, w, memory);

  const int tiles = w.tiles();
  for (int t = 0; t < tiles; ++t) {
    float score[16];
    ring.wait_full();
    const char* keys = ring.tokens() + group * 32 * 128;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < MlaTile::WIDTH / 16; ++step) {
      const int at = step / 4 * MlaTile::COLUMN_BYTES + step % 4 * 32;
      wgmma_bf16<32>(score, matrix_descriptor(memory + at, 0, 1024),
                     matrix_descriptor(keys + at, 0, 1024), step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    float shrink[2];
    weigh(score, shrink, rows, p, ring.positions(), memory + MlaTile::MAXIMA, group, row);
    store_weights(score, weights, group);
    fence_async_proxy();
    named_barrier_sync(1, 256);
#pragma unroll
    for (int i = 0; i < 128; ++i) sum[i] *= shrink[i / 2 % 2];
    const char* values = ring.tokens() + group * 4 * MlaTile::COLUMN_BYTES;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < MlaTile::TOKENS / 16; ++step) {
      wgmma_bf16<256, true, false>(
          sum, matrix_descriptor(weights + step * 32, 0, 1024),
          matrix_descriptor(values + step * 16 * 128, MlaTile::COLUMN_BYTES, 1024), true);
    }
    wgmma_commit();
    // ptxas takes WGMMAs under way around a loop's end for a reason to wait after each.
    wgmma_wait<0>();
    if (lane_index() == 0) barrier_arrive(&ring.empty[ring.stage]);
    ring.next();
  }
  store_attended(sum, rows, p, w, memory + MlaTile::SUMS, group, row);
}

SM90_KERNEL(MlaTile::THREADS, 1)
void mla_decode(SM90_PARAMETER TensorMap map, SM90_PARAMETER MlaArguments p) {
  grid_dependency_launch();  // mla_combine may come up, and waits for the end of this grid
  const MlaWork w(p);
  if (w.split >= w.splits) return;
  char* memory = shared_memory();
  const int warp = warp_index();
  if (warp == 8 && elect_one()) {
    TokenRing ring(memory);
    if (p.by_tma) prefetch(&map);
    for (int s = 0; s < MlaTile::STAGES; ++s) {
      barrier_init(&ring.full[s], 128);  // the loading threads
      barrier_init(&ring.empty[s], 8);   // the multiplying warps
    }
    barrier_init_fence();
  }
  block_sync();
  if (warp >= 8) {
    registers_decrease<72>();
    load_tokens(&map, p, w, memory);
  } else {
    registers_increase<216>();
    attend(p, w, memory);
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
  for (int i = 0; i < cut.count; ++i) top = larger(p.partial_lse[first + int64_t{i} * all], top);
  const float zero = top == minus_infinity() ? 0.0f : top;
  float total = 0.0f, sum[16] = {};
  for (int i = 0; i < cut.count; ++i) {
    const int64_t at = first + int64_t{i} * all;
    const float weight = exp2_of(p.partial_lse[at] - zero);
    total += weight;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float x = p.partial[at * MlaTile::VALUES + j / 2 * 64 + lane_index() * 2 + j % 2];
      sum[j] = fused_multiply_add(weight, x, sum[j]);
    }
  }
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  bf16* out = static_cast<bf16*>(p.out) + (int64_t{sequence} * all + m) * MlaTile::VALUES;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {
    *reinterpret_cast<uint32_t*>(out + j / 2 * 64 + lane_index() * 2) =
        pack(to_bf16(sum[j] * scale), to_bf16(sum[j + 1] * scale));
  }
  if (lane_index() == 0) {
    const float lse = total == 0.0f ? minus_infinity() : top + log2_of(total);
    p.lse[(int64_t{sequence} * p.H + m % p.H) * p.Sq + m / p.H] = lse * 0.6931471805599453f;
  }
}

}  // namespace sm90
