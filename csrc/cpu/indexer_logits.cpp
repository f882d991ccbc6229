// out[s, n] = scale[n] * sum over h of weights[s, h] * ReLU(q[s, h] . key[n])    for visible n
// out[s, n] = -inf                                                             elsewhere
//
// Parallelization: a task computes a few queries of a unit (see indexer_logits.h) and a range of
// keys. It converts a tile of keys to float32 once, for all its queries. A logit is summed by one
// task: over D, then over the blocks of heads, then over the lanes of a vector. So its bits do not
// depend on the other queries and keys.
//
// Limit: the FMA units, with H * D multiply-adds per logit.
//
// Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1.
#ifndef DEEPKERN_ISA
#include "indexer_logits.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "scratch.h"

namespace deepkern {
namespace {

constexpr int64_t KEYS = 384;                       // of a task
constexpr int64_t QUERY_VALUES = int64_t{1} << 16;  // of a task's queries, as float32 in L2
constexpr int64_t MAX_QUERIES = 8;                  // of a task

struct LogitTask {
  int64_t unit, first_query, last_query, first_key, last_key;
};

// A tile of keys: their codes, scales and positions.
struct KeyTile {
  static constexpr int64_t SIZE = 48;
  const uint8_t* codes[SIZE];
  float scale[SIZE];
  int64_t position[SIZE];
  int64_t count;
};

// The next keys of [position, end) that exist. Moves position.
void next_keys(const IndexerLogits& l, int64_t unit, int64_t& position, int64_t end,
               KeyTile& tile) {
  tile.count = 0;
  for (; position < end && tile.count < KeyTile::SIZE; ++position) {
    const uint8_t* codes = nullptr;
    float* scale = tile.scale + tile.count;
    if (!l.paged) {
      codes = l.kv + position * l.kv_stride;
      *scale = l.kv_scale[position];
    } else {
      const int64_t page_size = l.cache.page_size, offset = position % page_size;
      const int64_t page = l.block_table[unit * l.block_table_stride + position / page_size];
      if (page < 0 || page >= l.cache.num_pages) continue;
      codes = l.cache.codes(page, offset);
      std::memcpy(scale, l.cache.scale(page, offset), sizeof *scale);
    }
    tile.codes[tile.count] = codes;
    tile.position[tile.count++] = position;
  }
}

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/indexer_logits.cpp"
#include "every_isa.h"

namespace deepkern {

void check_indexer_queries(const Arguments& arguments, const Tensor& q, IndexerLogits& logits) {
  const int64_t rank = q.dim();
  arguments.require((q.size(rank - 2) - 1) * q.stride(rank - 2) < int64_t{1} << 31, "q",
                    "heads within 2**31 elements");
  logits.q = data<uint8_t>(q);
  logits.units = rank == 4 ? q.size(0) : 1;
  logits.q_unit_stride = rank == 4 ? q.stride(0) : 0;
  logits.queries = q.size(rank - 3);
  logits.q_query_stride = q.stride(rank - 3);
  logits.H = q.size(rank - 2);
  logits.q_head_stride = q.stride(rank - 2);
  logits.D = q.size(rank - 1);
}

void run_indexer_logits(const IndexerLogits& l) {
  const int64_t products = std::max<int64_t>(l.H * l.D, 1);
  const int64_t queries = std::clamp<int64_t>(QUERY_VALUES / products, 1, MAX_QUERIES);
  std::vector<LogitTask> tasks;
  for (int64_t unit = 0; unit < l.units; ++unit) {
    for (int64_t query = 0; query < l.queries; query += queries) {
      const int64_t last_query = std::min(query + queries, l.queries);
      for (int64_t key = 0; key < l.N; key += KEYS) {
        tasks.push_back({unit, query, last_query, key, std::min(key + KEYS, l.N)});
      }
    }
  }
  const auto compute_logits = DEEPKERN_DISPATCH(compute_logits);
  const int64_t work = std::min(queries, l.queries) * std::min(KEYS, l.N) * (products / 8 + 1);
  parallel_ranges(static_cast<int64_t>(tasks.size()), work, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) compute_logits(l, tasks[i]);
  });
}

}  // namespace deepkern
#else
#include "attention_products.h"
#include "attention_tokens.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

static_assert(KeyTile::SIZE == TILE);

// Memory of a task.
struct LogitWorkspace {
  int64_t D, pitch, heads;  // heads: H, padded to whole blocks
  float* queries;           // [queries][heads][D] by blocks: [D][block]
  float* weights;           // [queries][heads], zero past H
  float* tile;              // [TILE][pitch]
  float* scores;            // [TILE][BLOCK]

  LogitWorkspace(const IndexerLogits& l, int64_t num_queries)
      : D(l.D), pitch(tile_pitch(D)), heads((l.H + LANES - 1) / LANES * LANES) {
    const int64_t query_size = num_queries * heads * D, weight_size = num_queries * heads;
    queries = thread_scratch(query_size + weight_size + TILE * pitch + TILE * BLOCK);
    weights = queries + query_size;
    tile = weights + weight_size;
    scores = tile + TILE * pitch;
  }
};

void load_query(const IndexerLogits& l, const LogitWorkspace& w, int64_t unit, int64_t query,
                float* queries, float* weights) {
  const uint8_t* q = l.q + unit * l.q_unit_stride + query * l.q_query_stride;
  const float* from = l.weights + (unit * l.queries + query) * l.weights_stride;
  for (int64_t i = 0; i < w.heads; ++i) weights[i] = i < l.H ? from[i] : 0.0f;
  for (int64_t i = 0; i < l.H; i += BLOCK) {
    const int64_t width = block_rows(l.H, i);
    for (int64_t j = 0; j < width; ++j) {
      float* row = w.tile + j * w.pitch;
      if (i + j < l.H) {
        widen_codes(q + (i + j) * l.q_head_stride, nullptr, l.D, row);
      } else {
        std::memset(row, 0, l.D * sizeof(float));
      }
    }
    transpose(w.tile, w.pitch, width, l.D, queries + i * l.D, width);
  }
}

// sums[n] += weights * ReLU(scores[n]) over the vectors of a block.
template <int VECTORS>
void add_heads(const float* scores, const float* weights, int64_t count, float* sums) {
  Floats weight[VECTORS];
  for (int v = 0; v < VECTORS; ++v) weight[v] = load_vector<Floats>(weights + v * LANES);
  for (int64_t n = 0; n < count; ++n) {
    Floats sum = load_vector<Floats>(sums + n * LANES);
    for (int v = 0; v < VECTORS; ++v) {
      const Floats score = load_vector<Floats>(scores + (n * VECTORS + v) * LANES);
      sum = fma(score < 0.0f ? Floats{} : score, weight[v], sum);  // NaN is kept
    }
    store_vector(sums + n * LANES, sum);
  }
}

// The logits of one query for a tile.
void score_query(const IndexerLogits& l, const LogitWorkspace& w, const float* queries,
                 const float* weights, const KeyTile& keys, IndexerLogits::Range range,
                 float* out) {
  float sums[TILE * LANES] = {};
  for (int64_t i = 0; i < l.H; i += BLOCK) {
    const bool both = block_rows(l.H, i) == BLOCK;
    const auto score = both ? score_block<2> : score_block<1>;
    score(queries + i * l.D, l.D, w.tile, w.pitch, keys.count, w.scores);
    (both ? add_heads<2> : add_heads<1>)(w.scores, weights + i, keys.count, sums);
  }
  for (int64_t n = 0; n < keys.count; ++n) {
    if (keys.position[n] < range.begin || keys.position[n] >= range.end) continue;
    out[keys.position[n]] = sum_of_lanes(load_vector<Floats>(sums + n * LANES)) * keys.scale[n];
  }
}

void compute_logits(const IndexerLogits& l, const LogitTask& task) {
  const int64_t num_queries = task.last_query - task.first_query;
  const int64_t first_row = task.unit * l.queries + task.first_query;
  const IndexerLogits::Range* ranges = l.ranges.data() + first_row;
  float* out = l.out + first_row * l.N;
  int64_t begin = task.last_key, end = task.first_key;
  for (int64_t i = 0; i < num_queries; ++i) {
    for (int64_t n = task.first_key; n < task.last_key; ++n) out[i * l.N + n] = -INFINITY;
    if (ranges[i].begin >= ranges[i].end) continue;
    begin = std::min(begin, std::max(ranges[i].begin, task.first_key));
    end = std::max(end, std::min(ranges[i].end, task.last_key));
  }
  if (begin >= end) return;
  const LogitWorkspace w(l, num_queries);
  const int64_t query_size = w.heads * l.D;
  for (int64_t i = 0; i < num_queries; ++i) {
    load_query(l, w, task.unit, task.first_query + i, w.queries + i * query_size,
               w.weights + i * w.heads);
  }
  KeyTile keys;
  for (int64_t position = begin; position < end;) {
    next_keys(l, task.unit, position, end, keys);
    if (keys.count == 0) break;
    for (int64_t n = 0; n < keys.count; ++n) {
      widen_codes(keys.codes[n], nullptr, l.D, w.tile + n * w.pitch);
    }
    const int64_t first = keys.position[0], last = keys.position[keys.count - 1];
    for (int64_t i = 0; i < num_queries; ++i) {
      if (ranges[i].end <= first || ranges[i].begin > last) continue;
      score_query(l, w, w.queries + i * query_size, w.weights + i * w.heads, keys, ranges[i],
                  out + i * l.N);
    }
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
