// score[s, h, n] = softmax_scale * q[s, h] . token[n]             over R + D
// out[s, h]      = softmax over the visible n of score . token[n, :R]
//
// Parallelization: a task is a unit (see attention_decode.h), a group of up to 64 of its rows, and
// a range of its tokens. It converts a tile of tokens to float32 once, for all its rows, and
// updates the running maxima, sums of weights and sums of values of the rows. The ranges depend on
// the unit's length alone, and their results are merged in order, so the bits depend neither on the
// other units nor on the number of threads.
//
// Limit: memory bandwidth and the conversion with up to 4 rows, the FMA units with more.
//
// Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; splitting as in Flash-Decoding.
#ifndef DEEPKERN_ISA
#include "attention_decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "scratch.h"

namespace deepkern {
namespace {

constexpr int64_t VALUES_ALIGN = 16;   // floats
constexpr int64_t MERGE_VALUES = 128;  // values of a merge task

// Floats per row of a partial result: sums of values, maximum, sum.
int64_t partial_width(const Decode& d) {
  return ceil_div(d.cache.R, VALUES_ALIGN) * VALUES_ALIGN + 2;
}

// The next valid tokens of [position, end), at most `max`: addresses and positions. Moves position.
int64_t next_tokens(const Decode& d, int64_t unit, int64_t& position, int64_t end, int64_t max,
                    const char** tokens, int32_t* positions) {
  int64_t n = 0;
  if (d.sparse) {
    const int32_t* indices =
        d.indices + unit / d.Sq * d.index_sequence_stride + unit % d.Sq * d.index_query_stride;
    for (; position < end && n < max; ++position) {
      const int64_t slot = indices[position];
      if (slot < 0 || slot >= d.cache.num_slots()) continue;
      tokens[n] = d.cache.slot(slot);
      positions[n++] = static_cast<int32_t>(position);
    }
    return n;
  }
  const int32_t* pages = d.block_table + unit * d.block_table_stride;
  while (position < end && n < max) {
    const int64_t page = pages[position / d.cache.page_size];
    const int64_t offset = position % d.cache.page_size;
    const bool valid = page >= 0 && page < d.cache.num_pages;
    int64_t count = std::min(d.cache.page_size - offset, end - position);
    if (valid) count = std::min(count, max - n);
    for (int64_t i = 0; valid && i < count; ++i) {
      tokens[n] = d.cache.at(page, offset + i);
      positions[n++] = static_cast<int32_t>(position + i);
    }
    position += count;
  }
  return n;
}

// The number of leading positions that a row attends to.
int32_t row_limit(const Decode& d, int64_t length, int64_t row) {
  const bool causal = !d.sparse && d.causal;
  return static_cast<int32_t>(causal ? length - (d.Sq - 1 - row / d.H) : length);
}

const char* query(const Decode& d, int64_t unit, int64_t row) {
  const auto [sequence, query, head] = d.place(unit, row);
  const int64_t offset =
      sequence * d.q_sequence_stride + query * d.q_query_stride + head * d.q_head_stride;
  return static_cast<const char*>(d.q) + offset * size_of(d.type);
}

// The factor of a row's sums of values. Stores the row's lse.
float finish_row(const Decode& d, int64_t unit, int64_t row, float row_max, float row_sum,
                 bool store_lse) {
  const auto [sequence, query, head] = d.place(unit, row);
  const float lse = (row_max == -INFINITY ? 0.0f : row_max) + std::log(row_sum);
  if (store_lse) d.lse[(sequence * d.H + head) * d.Sq + query] = lse;
  const float factor = row_sum == 0.0f ? 1.0f : 1.0f / row_sum;
  if (d.attn_sink == nullptr) return factor;
  return lse == -INFINITY ? 0.0f : factor / (1.0f + std::exp(d.attn_sink[head] - lse));
}

char* out_row(const Decode& d, int64_t unit, int64_t row) {
  const auto [sequence, query, head] = d.place(unit, row);
  const int64_t index = (sequence * d.Sq + query) * d.H + head;
  return static_cast<char*>(d.out) + index * d.cache.R * size_of(d.type);
}

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/attention_decode.cpp"
#include "every_isa.h"

namespace deepkern {

Decode check_decode(const Arguments& arguments, const Tensor& q, const Tensor& cache,
                    double softmax_scale, int64_t v_head_dim) {
  Decode d{};
  d.type = arguments.check_real("q", q, {-1, -1, -1, -1});
  arguments.require(v_head_dim >= 0 && v_head_dim <= q.size(3), "v_head_dim",
                    "a part of q's last dimension");
  d.cache = latent_cache(arguments, cache, v_head_dim);
  arguments.require(d.width() == q.size(3), "cache", "a last dimension that fits to q");
  arguments.require(d.cache.page_size * cache.stride(1) < int64_t{1} << 31, "cache",
                    "pages of fewer than 2**31 elements");
  d.q = q.const_data_ptr();
  d.B = q.size(0), d.Sq = q.size(1), d.H = q.size(2);
  d.q_sequence_stride = q.stride(0);
  d.q_query_stride = q.stride(1);
  d.q_head_stride = q.stride(2);
  d.softmax_scale = static_cast<float>(softmax_scale);
  return d;
}

namespace {

// Tokens of a range: at least 96, and more for long sequences, so that merging costs little.
int64_t split_length_of(int64_t length) {
  const int64_t longest = std::clamp<int64_t>(length / 16, 96, 768);
  const int64_t num_splits = ceil_div(length, longest);
  return num_splits <= 1 ? length : ceil_div(length, num_splits);
}

}  // namespace

void run_decode(const Decode& d, const std::vector<int64_t>& lengths) {
  if (d.units * d.rows == 0) return;
  const int64_t width = partial_width(d);
  const int64_t split_stride = ceil_div(d.rows, VALUES_ALIGN) * VALUES_ALIGN * width;
  int64_t num_partials = 0, tokens = 0;
  for (const int64_t length : lengths) {
    const int64_t split_length = split_length_of(length);
    tokens += length;
    if (split_length < length) num_partials += ceil_div(length, split_length);
  }
  const std::unique_ptr<float[]> partials(num_partials > 0 ? new float[num_partials * split_stride]
                                                           : nullptr);

  std::vector<DecodeTask> tasks;
  std::vector<MergeTask> merges;
  float* partial = partials.get();
  for (int64_t unit = 0; unit < d.units; ++unit) {
    const int64_t length = lengths[unit], split_length = split_length_of(length);
    const bool split = split_length < length;
    for (int64_t row = 0; row < d.rows; row += ROW_GROUP) {
      if (!split) {
        tasks.push_back({unit, row, length, 0, length, nullptr});
        continue;
      }
      float* to = partial + row * width;
      for (int64_t begin = 0; begin < length; begin += split_length, to += split_stride) {
        tasks.push_back({unit, row, length, begin, std::min(begin + split_length, length), to});
      }
      for (int64_t r = 0; r == 0 || r < d.cache.R; r += MERGE_VALUES) {
        merges.push_back({unit, row, ceil_div(length, split_length), partial + row * width,
                          split_stride, r, std::min(r + MERGE_VALUES, d.cache.R)});
      }
    }
    if (split) partial += ceil_div(length, split_length) * split_stride;
  }

  const auto run_tasks = DEEPKERN_DISPATCH(run_decode_tasks);
  const auto run_merges = DEEPKERN_DISPATCH(run_merge_tasks);
  const auto num_tasks = static_cast<int64_t>(tasks.size());
  const int64_t products = tokens * d.rows * d.width() / num_tasks;  // of a task
  parallel_ranges(num_tasks, products / 8 + d.width(), [&](int64_t first, int64_t last) {
    run_tasks(d, tasks.data() + first, last - first);
  });
  if (merges.empty()) return;
  const auto num_merges = static_cast<int64_t>(merges.size());
  const int64_t values = num_partials * split_stride / num_merges;
  parallel_ranges(num_merges, values, [&](int64_t first, int64_t last) {
    run_merges(d, merges.data() + first, last - first);
  });
}

}  // namespace deepkern
#else
#include "attention_few_rows.h"
#include "attention_products.h"
#include "attention_rows.h"
#include "attention_tokens.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// Rows of `value_count` sums times `factor`, as q's dtype, from value `first_value` on.
void store_row(const Decode& d, int64_t unit, int64_t row, const float* values, float factor,
               int64_t first_value, int64_t count) {
  void* out = out_row(d, unit, row);
  const Floats factors = broadcast(factor);
  DEEPKERN_FOR_REAL(
      d.type, int64_t i = 0; for (; i + LANES <= count; i += LANES) {
        store_floats<type>(out, first_value + i, load_vector<Floats>(values + i) * factors);
      } for (; i < count; ++i) deepkern::store<type>(out, first_value + i, values[i] * factor););
}

// Memory of a thread, and the layout of the rows of a group.
struct Workspace {
  int64_t R, W, pitch, state_width;
  bool few;        // whether the rows are computed by attend_few_rows
  float* queries;  // [group][W] by blocks; few: [FEW_ROWS][pitch]
  float* tile;     // [TILE][pitch], zero past W
  float* scores;   // [TILE][BLOCK]
  float* state;    // [group][state_width]

  explicit Workspace(const Decode& d)
      : R(d.cache.R),
        W(d.width()),
        pitch(tile_pitch(W)),
        state_width(partial_width(d)),
        few(d.rows <= FEW_ROWS) {
    const int64_t group = d.rows < ROW_GROUP ? (d.rows + 15) / 16 * 16 : ROW_GROUP;
    const int64_t tokens = few ? FEW_TILE : TILE;
    const int64_t query_size = few ? FEW_ROWS * pitch : group * pitch;
    const int64_t score_size = few ? 0 : TILE * BLOCK;
    queries = thread_scratch(query_size + tokens * pitch + score_size + group * state_width);
    tile = queries + query_size;
    scores = tile + tokens * pitch;
    state = scores + score_size;
    for (int64_t n = 0; n < tokens; ++n) {
      std::memset(tile + n * pitch + W, 0, (pitch - W) * sizeof(float));
    }
  }
};

int64_t group_rows(const Decode& d, int64_t first_row) {
  return d.rows - first_row < ROW_GROUP ? d.rows - first_row : ROW_GROUP;
}

void load_query(const Decode& d, int64_t unit, int64_t row, float* out) {
  DEEPKERN_FOR_REAL(d.type, widen_values<type>(query(d, unit, row), d.width(), out));
}

void load_queries(const Decode& d, const Workspace& w, int64_t unit, int64_t first_row) {
  const int64_t rows = group_rows(d, first_row);
  if (w.few) {
    std::memset(w.queries, 0, FEW_ROWS * w.pitch * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) load_query(d, unit, i, w.queries + i * w.pitch);
    return;
  }
  for (int64_t i = 0; i < rows; i += BLOCK) {
    const int64_t width = block_rows(rows, i);
    for (int64_t j = 0; j < width; ++j) {
      float* row = w.tile + j * w.pitch;
      if (i + j < rows) {
        load_query(d, unit, first_row + i + j, row);
      } else {
        std::memset(row, 0, w.W * sizeof(float));
      }
    }
    transpose(w.tile, w.pitch, width, w.W, w.queries + i * w.W, width);
  }
}

// The state of the block of `rows` rows at row i of a group.
RowState block_state(const Workspace& w, float* group, int64_t i, int64_t rows) {
  return {group + i * w.state_width, rows, w.R};
}

RowState few_state(const Workspace& w, float* group, int64_t rows) {
  return {group, rows == 3 ? 4 : rows, w.state_width - 2};
}

// Calls function(i, state) for the states of a group: blocks of rows at row i, or one of few rows.
template <class Function>
DEEPKERN_INLINE void for_each_state(const Workspace& w, int64_t rows, float* group,
                                    const Function& function) {
  if (w.few) return function(0, few_state(w, group, rows));
  for (int64_t i = 0; i < rows; i += BLOCK) {
    function(i, block_state(w, group, i, block_rows(rows, i)));
  }
}

void clear_softmax(const Workspace& w, int64_t rows, float* group) {
  for_each_state(w, rows, group, [](int64_t, const RowState& state) {
    for (int64_t i = 0; i < state.rows; ++i) {
      state.row_max()[i] = NO_SCORE;
      state.row_sum()[i] = 0.0f;
    }
  });
}

void clear_sums(const Workspace& w, int64_t rows, float* group) {
  for_each_state(w, rows, group, [](int64_t, const RowState& state) {
    std::memset(state.sums(), 0, state.rows * state.R * sizeof(float));
  });
}

void attend_tile(const Decode& d, const Workspace& w, const TokenTile& tile, const int32_t* limit,
                 int64_t rows, bool first, float* group) {
  for_each_state(w, rows, group, [&](int64_t i, const RowState& state) {
    const int32_t* limits = limit + i;
    if (w.few) {
      const auto attend = state.rows == 1   ? attend_few_rows<1>
                          : state.rows == 2 ? attend_few_rows<2>
                                            : attend_few_rows<4>;
      attend(w.queries, w.W, tile, limits, d.softmax_scale, first, state);
    } else {
      const auto attend = state.rows == BLOCK ? attend_block<2> : attend_block<1>;
      attend(w.queries + i * w.W, w.W, tile, limits, d.softmax_scale, first, w.scores, state);
    }
  });
}

// Writes values [first, last) of the rows of a group, and lse if first is 0.
void finish_group(const Decode& d, const Workspace& w, int64_t unit, int64_t first_row,
                  float* group, int64_t first, int64_t last) {
  const int64_t rows = group_rows(d, first_row);
  for_each_state(w, rows, group, [&](int64_t i, const RowState& state) {
    const float* values = state.sums() + first;  // of row i
    int64_t stride = state.R;
    if (!w.few) {
      transpose(state.sums() + first * state.rows, state.rows, last - first, state.rows, w.tile,
                w.pitch);
      values = w.tile;
      stride = w.pitch;
    }
    for (int64_t j = 0; j < state.rows && i + j < rows; ++j) {
      const int64_t row = first_row + i + j;
      const float row_max = state.row_max()[j], row_sum = state.row_sum()[j];
      const float factor = finish_row(d, unit, row, row_max, row_sum, first == 0);
      store_row(d, unit, row, values + j * stride, factor, first, last - first);
    }
  });
}

void run_decode_task(const Decode& d, const Workspace& w, const DecodeTask& task) {
  const int64_t rows = group_rows(d, task.first_row);
  float* group = task.partial != nullptr ? task.partial : w.state;
  int32_t limit[ROW_GROUP + BLOCK] = {};
  for (int64_t i = 0; i < rows; ++i) limit[i] = row_limit(d, task.length, task.first_row + i);
  clear_softmax(w, rows, group);
  const int64_t first_limit = row_limit(d, task.length, 0);
  const char* tokens[TILE];
  int32_t positions[TILE];
  bool first = true;
  for (int64_t position = task.begin; position < task.end;) {
    const int64_t max = w.few ? FEW_TILE : TILE;
    const int64_t n = next_tokens(d, task.unit, position, task.end, max, tokens, positions);
    if (n == 0) break;
    widen_tokens(d.cache, tokens, n, w.tile, w.pitch);
    const TokenTile tile{w.tile, w.pitch, n, positions, positions[n - 1] >= first_limit};
    attend_tile(d, w, tile, limit, rows, first, group);
    first = false;
  }
  if (first) clear_sums(w, rows, group);
  if (task.partial != nullptr) return;
  finish_group(d, w, task.unit, task.first_row, group, 0, w.R);
}

// Merges values [first, last) of the states at `from`, `stride` floats apart, into `to`.
void merge_block(const RowState& to, const float* from, int64_t stride, int64_t num_splits,
                 int64_t first, int64_t last) {
  const auto split = [&](int64_t i) {
    return RowState{const_cast<float*>(from) + i * stride, to.rows, to.R};
  };
  for (int64_t lane = 0; lane < to.rows; lane += LANES) {
    Floats row_max = broadcast(NO_SCORE), row_sum = {};
    for (int64_t i = 0; i < num_splits; ++i) {
      row_max = max(row_max, load_vector<Floats>(split(i).row_max() + lane));
    }
    const Floats finite_max = row_max == broadcast(NO_SCORE) ? Floats{} : row_max;
    for (int64_t i = 0; i < num_splits; ++i) {
      const Floats alpha = exp(load_vector<Floats>(split(i).row_max() + lane) - finite_max);
      row_sum = fma(load_vector<Floats>(split(i).row_sum() + lane), alpha, row_sum);
      for (int64_t r = first; r < last; ++r) {
        float* sum = to.sums() + r * to.rows + lane;
        const Floats x = load_vector<Floats>(split(i).sums() + r * to.rows + lane);
        store_vector(sum, i == 0 ? x * alpha : fma(x, alpha, load_vector<Floats>(sum)));
      }
    }
    store_vector(to.row_max() + lane, row_max);
    store_vector(to.row_sum() + lane, row_sum);
  }
}

void merge_few_rows(const RowState& to, const float* from, int64_t stride, int64_t num_splits,
                    int64_t first, int64_t last) {
  const auto split = [&](int64_t i) {
    return RowState{const_cast<float*>(from) + i * stride, to.rows, to.R};
  };
  for (int64_t row = 0; row < to.rows; ++row) {
    float row_max = NO_SCORE, row_sum = 0.0f;
    for (int64_t i = 0; i < num_splits; ++i) {
      const float x = split(i).row_max()[row];
      row_max = row_max > x ? row_max : x;
    }
    const float finite_max = row_max == NO_SCORE ? 0.0f : row_max;
    for (int64_t i = 0; i < num_splits; ++i) {
      const Floats alpha = exp(broadcast(split(i).row_max()[row] - finite_max));
      row_sum = row_sum + split(i).row_sum()[row] * alpha[0];
      for (int64_t r = first; r < last; r += LANES) {  // state rows are padded to 16 values
        float* sum = to.sums() + row * to.R + r;
        const Floats x = load_vector<Floats>(split(i).sums() + row * to.R + r);
        store_vector(sum, i == 0 ? x * alpha : fma(x, alpha, load_vector<Floats>(sum)));
      }
    }
    to.row_max()[row] = row_max;
    to.row_sum()[row] = row_sum;
  }
}

void run_merge_task(const Decode& d, const Workspace& w, const MergeTask& task) {
  for_each_state(w, group_rows(d, task.first_row), w.state, [&](int64_t i, const RowState& state) {
    const auto merge = w.few ? merge_few_rows : merge_block;
    merge(state, task.partial + i * w.state_width, task.split_stride, task.num_splits,
          task.first_value, task.last_value);
  });
  finish_group(d, w, task.unit, task.first_row, w.state, task.first_value, task.last_value);
}

void run_decode_tasks(const Decode& d, const DecodeTask* tasks, int64_t count) {
  const Workspace w(d);
  for (int64_t i = 0; i < count; ++i) {
    const DecodeTask& task = tasks[i];
    if (i == 0 || task.unit != tasks[i - 1].unit || task.first_row != tasks[i - 1].first_row) {
      load_queries(d, w, task.unit, task.first_row);
    }
    run_decode_task(d, w, task);
  }
}

void run_merge_tasks(const Decode& d, const MergeTask* tasks, int64_t count) {
  const Workspace w(d);
  for (int64_t i = 0; i < count; ++i) run_merge_task(d, w, tasks[i]);
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
