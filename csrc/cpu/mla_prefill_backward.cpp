// With P = exp(score - lse), recomputed, and delta[i] = grad_out[i] . out[i] - grad_lse[i]:
//
//     dS     = P * (grad_out . v^T - delta)
//     grad_q = softmax_scale * dS . k
//     grad_k = softmax_scale * dS^T . q
//     grad_v = P^T . grad_out
//
// Everything is float32. As in mla_prefill.cpp, a tile of scores is transposed: [keys, rows].
//
// Parallelization: a task is one sequence and one head of k and v. It loops over tiles of rows and
// over the keys of each: five products per tile. If there are too few such tasks for the threads, a
// task is either a tile of rows, for grad_q, or a tile of keys, for grad_k and grad_v, and a tile
// of scores is computed twice: seven products. Both add the same tiles in the same order, so the
// bits do not depend on the choice.
//
// Limit: FMA units.
//
// Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.2.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include "mla_prefill.h"

namespace deepkern {
namespace {

struct PrefillBackward {
  HeadRows grad_out, q, k, v, out;
  const float* lse;                     // [H, T], natural log
  const float* grad_lse;                // [H, T], or null
  int64_t lse_stride, grad_lse_stride;  // from a head to the next
  float* delta;                         // [H, T], contiguous
  void *grad_q, *grad_k, *grad_v;       // contiguous
  double softmax_scale;
  int64_t T, H, Hk, group;
  bool causal;
};

// The scratch memory of a thread, for tiles of `rows` rows and `keys` keys and the gradients of
// `grad_keys` keys.
struct BackwardScratch {
  BackwardScratch(const PrefillBackward& p, int64_t rows, int64_t keys, int64_t grad_keys)
      : memory((p.q.width + p.v.width + 2 * keys + 3) * padded_width(rows) +
               (2 * rows + keys + grad_keys) * padded_width(p.q.width) +
               (rows + keys + grad_keys) * padded_width(p.v.width) + 16 * 14),
        q(memory.matrix(rows, p.q.width)),
        q_transposed(memory.matrix(p.q.width, rows)),
        grad_out(memory.matrix(rows, p.v.width)),
        grad_out_transposed(memory.matrix(p.v.width, rows)),
        k(memory.matrix(keys, p.q.width)),
        v(memory.matrix(keys, p.v.width)),
        weights(memory.matrix(keys, rows)),
        grad_scores(memory.matrix(keys, rows)),
        grad_q(memory.matrix(rows, p.q.width)),
        grad_k(memory.matrix(grad_keys, p.q.width)),
        grad_v(memory.matrix(grad_keys, p.v.width)),
        lse(memory.take(padded_width(rows))),
        delta(memory.take(padded_width(rows))),
        limit(reinterpret_cast<int32_t*>(memory.take(padded_width(rows)))) {}
  Scratch memory;
  Matrix q, q_transposed;                // [rows, Dqk]
  Matrix grad_out, grad_out_transposed;  // [rows, Dv]
  Matrix k, v;                           // [keys, Dqk], [keys, Dv]
  Matrix weights, grad_scores;           // [keys, rows]
  Matrix grad_q, grad_k, grad_v;         // not multiplied by softmax_scale yet
  float* lse;                            // [rows], to base 2; +inf for a row without keys
  float* delta;                          // [rows]
  int32_t* limit;                        // [rows], a row attends to the keys below its limit
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/mla_prefill_backward.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

constexpr int64_t WHOLE_GRADIENT = 1 << 24;  // floats of grad_k and grad_v that a thread may hold

// Writes zeros to the rows of x [rows, values] of spans without rows on the other side.
void clear_unused(void* x, Real type, int64_t values, const std::vector<Span>& spans) {
  const int64_t bytes = values * (type == Real::fp32 ? 4 : 2);
  for (const Span& span : spans) {
    if (span.other_size() > 0) continue;
    std::memset(static_cast<char*>(x) + span.begin * bytes, 0, span.size() * bytes);
  }
}

// Whether tasks of whole sequences keep all threads busy: five products, where tasks of tiles
// compute seven.
bool use_whole_sequences(const PrefillBackward& p, const std::vector<Span>& queries) {
  int64_t pairs = 0, most_pairs = 0, most_keys = 0;
  for (const Span& span : queries) {
    pairs += span.size() * span.other_size();
    most_pairs = std::max(most_pairs, span.size() * span.other_size());
    most_keys = std::max(most_keys, span.other_size());
  }
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t floats = most_keys * (padded_width(p.q.width) + padded_width(p.v.width));
  return floats <= WHOLE_GRADIENT &&
         double(most_pairs) * double(5 * threads) <= double(pairs) * double(7 * p.Hk);
}

void compute_gradients(const PrefillBackward& p, const Boundaries& cu_q, const Boundaries& cu_k) {
  const std::vector<Span> queries = ragged_spans(cu_q, cu_k), keys = ragged_spans(cu_k, cu_q);
  clear_unused(p.grad_q, p.q.type, p.H * p.q.width, queries);
  clear_unused(p.grad_k, p.q.type, p.Hk * p.q.width, keys);
  clear_unused(p.grad_v, p.q.type, p.Hk * p.v.width, keys);

  const bool whole = use_whole_sequences(p, queries);
  const RaggedTiles row_tiles(queries, p.group, whole ? p.T * p.group : ROW_BLOCK);
  const RaggedTiles key_tiles(keys, 1, KEY_BLOCK);
  const auto sequence_gradients = DEEPKERN_DISPATCH(sequence_gradients);
  const auto key_gradients = DEEPKERN_DISPATCH(key_gradients);
  const auto compute_delta = DEEPKERN_DISPATCH(compute_delta);
  parallel_ranges(p.T * p.H, p.v.width,
                  [&](int64_t first, int64_t last) { compute_delta(p, first, last); });
  const auto num_row_tiles = static_cast<int64_t>(row_tiles.tiles.size());
  const auto num_key_tiles = static_cast<int64_t>(key_tiles.tiles.size());
  const int64_t num_row_tasks = num_row_tiles * p.Hk;
  const int64_t num_key_tasks = whole ? 0 : num_key_tiles * p.Hk;
  parallel_tasks(
      num_row_tasks + num_key_tasks,
      double(row_tiles.pairs) * double(p.Hk * (p.q.width + p.v.width)),
      [&] {
        const int64_t most_keys = key_tiles.max_rows, tile_keys = std::min(KEY_BLOCK, most_keys);
        return BackwardScratch(p, std::min(ROW_BLOCK, row_tiles.max_rows), tile_keys,
                               whole ? most_keys : tile_keys);
      },
      [&](int64_t task, BackwardScratch& scratch) {
        if (task < num_row_tasks) {
          sequence_gradients(p, row_tiles.tiles[task % num_row_tiles], task / num_row_tiles, whole,
                             scratch);
        } else {
          task -= num_row_tasks;
          key_gradients(p, key_tiles.tiles[task % num_key_tiles], task / num_key_tiles, scratch);
        }
      });
}

std::tuple<Tensor, Tensor, Tensor> mla_prefill_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double softmax_scale,
    bool causal, const std::optional<Tensor>& grad_lse) {
  const char* op = "mla_prefill_backward";
  const Real type = check_prefill(op, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale);
  const int64_t T = q.size(0), H = q.size(1), Tk = k.size(0), Hk = k.size(1), Dv = v.size(2);
  const Arguments arguments{op};
  arguments.check("grad_out", grad_out, q.scalar_type(), {T, H, Dv});
  arguments.check("out", out, q.scalar_type(), {T, H, Dv});
  arguments.check("lse", lse, ScalarType::Float, {H, T});
  if (grad_lse) arguments.check("grad_lse", *grad_lse, ScalarType::Float, {H, T});
  Tensor grad_q = new_tensor({T, H, q.size(2)}, q.scalar_type());
  Tensor grad_k = new_tensor({Tk, Hk, q.size(2)}, q.scalar_type());
  Tensor grad_v = new_tensor({Tk, Hk, Dv}, q.scalar_type());
  Tensor delta = new_tensor({H, T}, ScalarType::Float);
  const PrefillBackward backward{{grad_out, type},
                                 {q, type},
                                 {k, type},
                                 {v, type},
                                 {out, type},
                                 data<float>(lse),
                                 data<float>(grad_lse),
                                 lse.stride(0),
                                 grad_lse ? grad_lse->stride(0) : 0,
                                 mutable_data<float>(delta),
                                 grad_q.mutable_data_ptr(),
                                 grad_k.mutable_data_ptr(),
                                 grad_v.mutable_data_ptr(),
                                 softmax_scale,
                                 T,
                                 H,
                                 Hk,
                                 Hk == 0 ? 0 : H / Hk,
                                 causal};
  if (H == 0) {
    clear_unused(backward.grad_k, type, Hk * q.size(2), {{0, Tk, 0, 0}});
    clear_unused(backward.grad_v, type, Hk * Dv, {{0, Tk, 0, 0}});
  } else {
    compute_gradients(backward, {cu_seqlens_q, T}, {cu_seqlens_k, Tk});
  }
  return {grad_q, grad_k, grad_v};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("mla_prefill_backward", TORCH_BOX(&mla_prefill_backward));
}

}  // namespace
}  // namespace deepkern
#else
#include "product.h"
#include "stacked_rows.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// delta of rows [first, last) of the T * H queries and heads; 0 without visible keys.
template <Real type>
void compute_delta_of(const PrefillBackward& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t query = i / p.H, head = i % p.H;
    const int64_t grad = p.grad_out.at(query, head), out = p.out.at(query, head);
    Floats sum = {};
    int64_t j = 0;
    for (; j + LANES <= p.v.width; j += LANES) {
      sum = fma(load_floats<type>(p.grad_out.data, grad + j),
                load_floats<type>(p.out.data, out + j), sum);
    }
    sum = fma(load_first_floats<type>(p.grad_out.data, grad + j, p.v.width - j),
              load_first_floats<type>(p.out.data, out + j, p.v.width - j), sum);
    float delta = sum_of_lanes(sum);
    if (p.grad_lse != nullptr) delta -= p.grad_lse[head * p.grad_lse_stride + query];
    const float lse = p.lse[head * p.lse_stride + query];
    p.delta[head * p.T + query] = lse == -std::numeric_limits<float>::infinity() ? 0.0f : delta;
  }
}

void compute_delta(const PrefillBackward& p, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(p.q.type, compute_delta_of<type>(p, first, last));
}

void load_tile_rows(const PrefillBackward& p, const StackedRows& rows, const BackwardScratch& s) {
  load_stacked_rows(p.q, rows, s.q);
  load_stacked_rows(p.grad_out, rows, s.grad_out);
  transpose(rows.count, p.q.width, s.q, s.q_transposed);
  transpose(rows.count, p.v.width, s.grad_out, s.grad_out_transposed);
  const int64_t padded = ceil_div(rows.count, TILE_COLUMNS) * TILE_COLUMNS;
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t row = std::min(i, rows.count - 1);
    const int64_t query = rows.query(row), head = rows.head(row);
    const float lse = p.lse[head * p.lse_stride + query];
    const float infinity = std::numeric_limits<float>::infinity();
    s.lse[i] = lse == -infinity ? infinity : lse * float(LOG2_E);
    s.delta[i] = p.delta[head * p.T + query];
    s.limit[i] = rows.visible_keys(row, p.causal);
  }
}

void load_tile_keys(const PrefillBackward& p, const Span& span, int64_t kv_head, int64_t first,
                    int64_t keys, const BackwardScratch& s) {
  load_rows(p.k, span.begin + first, kv_head, keys, s.k);
  load_rows(p.v, span.begin + first, kv_head, keys, s.v);
}

// The weights and the gradients of the scores of LANES rows, in place of the scores and the
// gradients of the weights.
DEEPKERN_INLINE void differentiate_lanes(const PrefillBackward& p, const BackwardScratch& s,
                                         int64_t row, int64_t first, int64_t keys) {
  const Floats scale = broadcast(static_cast<float>(p.softmax_scale * LOG2_E));
  const Floats lse = load_vector<Floats>(s.lse + row), delta = load_vector<Floats>(s.delta + row);
  const Ints limit = load_vector<Ints>(s.limit + row) - int32_t(first);
  float* weights = s.weights.data + row;
  float* grads = s.grad_scores.data + row;
  for (int64_t i = 0; i < keys; ++i) {
    const Floats exponent = fma(load_vector<Floats>(weights), scale, -lse);
    const Floats weight = exp2_of_negative(min(broadcast(128.0f), exponent));
    const Floats grad = weight * (load_vector<Floats>(grads) - delta);
    const Ints visible = broadcast_int(i) < limit;
    store_vector(weights, visible ? weight : Floats{});
    store_vector(grads, visible ? grad : Floats{});
    weights += s.weights.stride;
    grads += s.grad_scores.stride;
  }
}

// What a tile of rows and the keys [first, first + keys) of its sequence add to grad_q, and to
// grad_k and grad_v (of these keys).
struct TileGradients {
  const PrefillBackward& p;
  const BackwardScratch& s;
  int64_t rows, first, keys;
  // How many of the keys row `row` attends to: no more than the rows after it.
  int64_t visible(int64_t row) const {
    const int64_t limit = s.limit[std::min(row, rows - 1)];
    return std::min(std::max<int64_t>(limit - first, 0), keys);
  }
  bool masked() const { return visible(0) < keys; }

  void compute_scores() const {
    for (int64_t row = 0; row < rows; row += TILE_COLUMNS) {
      const int64_t count = visible(row + TILE_COLUMNS - 1);
      product<Left::rows>(count, TILE_COLUMNS, p.q.width, s.k, s.q_transposed.from(0, row),
                          s.weights.from(0, row), Into::overwrite);
      product<Left::rows>(count, TILE_COLUMNS, p.v.width, s.v, s.grad_out_transposed.from(0, row),
                          s.grad_scores.from(0, row), Into::overwrite);
    }
    for (int64_t row = 0; row < rows; row += LANES) differentiate_lanes(p, s, row, first, keys);
  }

  void add_to_queries() const {
    const int64_t step = masked() ? 2 * TILE_ROWS : rows;
    for (int64_t row = 0; row < rows; row += step) {
      const int64_t count = std::min(step, rows - row);
      product<Left::transposed>(count, p.q.width, visible(row + count - 1),
                                s.grad_scores.from(0, row), s.k, s.grad_q.from(row, 0), Into::add);
    }
  }

  void add_to_keys(Matrix grad_k, Matrix grad_v) const {
    const int64_t step = masked() ? 2 * TILE_ROWS : keys;
    int64_t row = 0;  // the first row that attends to one of the keys
    for (int64_t key = 0; key < keys; key += step) {
      while (row < rows && visible(row) <= key) ++row;
      const int64_t count = std::min(step, keys - key);
      product<Left::rows>(count, p.v.width, rows - row, s.weights.from(key, row),
                          s.grad_out.from(row, 0), grad_v.from(key, 0), Into::add);
      product<Left::rows>(count, p.q.width, rows - row, s.grad_scores.from(key, row),
                          s.q.from(row, 0), grad_k.from(key, 0), Into::add);
    }
  }
};

void clear(Matrix x, int64_t rows) { std::memset(x.data, 0, rows * x.stride * sizeof(float)); }

void store_keys(const PrefillBackward& p, int64_t first, int64_t kv_head, int64_t keys,
                const BackwardScratch& s) {
  DEEPKERN_FOR_REAL(
      p.q.type, for (int64_t i = 0; i < keys; ++i) {
        const int64_t row = (first + i) * p.Hk + kv_head;
        store_row<type>(p.grad_k, row * p.q.width, p.q.width, s.grad_k.row(i), p.softmax_scale);
        store_row<type>(p.grad_v, row * p.v.width, p.v.width, s.grad_v.row(i), 1.0f);
      });
}

// grad_q of the rows of `tile`; with_keys: the tile is a sequence, and its grad_k and grad_v, too.
void sequence_gradients(const PrefillBackward& p, const RaggedTile& tile, int64_t kv_head,
                        bool with_keys, BackwardScratch& s) {
  const Span& span = tile.span;
  if (span.other_size() == 0) return;
  const Span keys_span{span.other_begin, span.other_end, span.begin, span.end};
  if (with_keys) clear(s.grad_k, span.other_size()), clear(s.grad_v, span.other_size());
  for (int64_t first_row = 0; first_row < tile.count; first_row += ROW_BLOCK) {
    const RaggedTile part{span, tile.first + first_row,
                          std::min(ROW_BLOCK, tile.count - first_row)};
    const StackedRows rows(part, kv_head, p.group);
    load_tile_rows(p, rows, s);
    clear(s.grad_q, rows.count);
    const int64_t end = rows.visible_keys(rows.count - 1, p.causal);
    for (int64_t first = 0; first < end; first += KEY_BLOCK) {
      const int64_t keys = std::min(KEY_BLOCK, span.other_size() - first);
      load_tile_keys(p, keys_span, kv_head, first, keys, s);
      const TileGradients gradients{p, s, rows.count, first, keys};
      gradients.compute_scores();
      gradients.add_to_queries();
      if (with_keys) gradients.add_to_keys(s.grad_k.from(first, 0), s.grad_v.from(first, 0));
    }
    DEEPKERN_FOR_REAL(
        p.q.type, for (int64_t i = 0; i < rows.count; ++i) {
          const int64_t row = rows.query(i) * p.H + rows.head(i);
          store_row<type>(p.grad_q, row * p.q.width, p.q.width, s.grad_q.row(i), p.softmax_scale);
        });
  }
  if (with_keys) store_keys(p, span.other_begin, kv_head, span.other_size(), s);
}

// grad_k and grad_v of the keys of `tile`.
void key_gradients(const PrefillBackward& p, const RaggedTile& tile, int64_t kv_head,
                   BackwardScratch& s) {
  const Span& span = tile.span;
  const Span queries{span.other_begin, span.other_end, span.begin, span.end};
  if (queries.size() == 0) return;
  load_tile_keys(p, span, kv_head, tile.first, tile.count, s);
  clear(s.grad_k, tile.count);
  clear(s.grad_v, tile.count);
  const int64_t num_rows = queries.size() * p.group;
  for (int64_t first_row = 0; first_row < num_rows; first_row += ROW_BLOCK) {
    const RaggedTile part{queries, first_row, std::min(ROW_BLOCK, num_rows - first_row)};
    const StackedRows rows(part, kv_head, p.group);
    if (rows.visible_keys(rows.count - 1, p.causal) <= tile.first) continue;
    load_tile_rows(p, rows, s);
    const TileGradients gradients{p, s, rows.count, tile.first, tile.count};
    gradients.compute_scores();
    gradients.add_to_keys(s.grad_k, s.grad_v);
  }
  store_keys(p, span.begin + tile.first, kv_head, tile.count, s);
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
