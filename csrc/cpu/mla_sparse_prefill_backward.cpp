// With p[n] the weights, sinks included, p'[n] the weights without sinks, and v the first R values
// of a row of kv, each query and head has
//
//     grad_score[n] = p[n] (grad_out . v[n] - grad_out . out)  [+ p'[n] grad_lse]
//     grad_q        = softmax_scale * sum over n of grad_score[n] kv[n]
//     grad_kv[n]    = sum over queries and heads of p[n] grad_out [+] softmax_scale grad_score[n] q
//
// where [+] adds the R values of grad_out to the first R of q's R + D. Everything is float32.
//
// Parallelization: two steps for as many queries at a time as WORKSPACE holds. In the first one a
// task is a query: it computes grad_q and stores p and grad_score, [n, heads]. In the second one a
// task is a range of columns of kv: it loops over the queries and adds to these columns of grad_kv,
// so the order of every sum is fixed: by query, then by index.
//
// Limit: FMA units with many heads; with few, reading and writing grad_kv.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "mla_sparse_prefill.h"

namespace deepkern {
namespace {

struct SparseBackward {
  HeadRows grad_out, q, kv, out;  // [S, H, R], [S, H, W], [Skv, 1, W], [S, H, R]
  SelectedRows selected;
  const float* lse;                     // [S, H], natural log
  const float* grad_lse;                // [S, H], or null
  int64_t lse_stride, grad_lse_stride;  // from a query to the next
  const float* attn_sink;               // [H], or null
  void* grad_q;                         // [S, H, W], contiguous
  float* grad_kv;                       // [Skv, W], contiguous
  double* grad_sink;                    // [S, H], each query's part of the gradient
  float softmax_scale;
  int64_t H, R;
};

// What the first step stores of a query: its selected rows, and p and softmax_scale * grad_score.
struct QueryGradients {
  QueryGradients(int64_t topk, int64_t H)
      : memory(2 * topk * padded_width(H) + 32),
        weights(memory.matrix(topk, H)),
        grad_scores(memory.matrix(topk, H)),
        rows(topk) {}
  Scratch memory;
  Matrix weights, grad_scores;  // [count, H]
  std::vector<int32_t> rows;
  int64_t count = 0;
};

// The scratch memory of a thread in the first step.
struct QueryScratch {
  QueryScratch(const SparseBackward& p, int64_t keys)
      : memory((2 * p.H + keys) * padded_width(p.q.width) + p.H * padded_width(p.R) +
               (p.q.width + p.R + 4) * padded_width(p.H) + 16 * 10),
        q(memory.matrix(p.H, p.q.width)),
        q_transposed(memory.matrix(p.q.width, p.H)),
        grad_out(memory.matrix(p.H, p.R)),
        grad_out_transposed(memory.matrix(p.R, p.H)),
        kv(memory.matrix(keys, p.q.width)),
        grad_q(memory.matrix(p.H, p.q.width)),
        lse(memory.take(padded_width(p.H))),
        delta(memory.take(padded_width(p.H))),
        factor(memory.take(padded_width(p.H))),
        grad_lse(memory.take(padded_width(p.H))) {}
  Scratch memory;
  Matrix q, q_transposed;                  // [H, W]
  Matrix grad_out, grad_out_transposed;    // [H, R]
  Matrix kv;                               // [keys, W]
  Matrix grad_q;                           // [H, W]
  float *lse, *delta, *factor, *grad_lse;  // [H]; lse to base 2, factor: p = p' * factor
};

// The scratch memory of a thread in the second step, for `columns` columns.
struct ColumnScratch {
  ColumnScratch(const SparseBackward& p, int64_t keys, int64_t columns)
      : memory((2 * p.H + keys) * padded_width(columns) + 48),
        q(memory.matrix(p.H, columns)),
        grad_out(memory.matrix(p.H, columns)),
        grad_kv(memory.matrix(keys, columns)) {}
  Scratch memory;
  Matrix q, grad_out;  // [H, columns]
  Matrix grad_kv;      // [keys, columns]
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/mla_sparse_prefill_backward.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

constexpr int64_t WORKSPACE = 1 << 24;  // floats of the weights and grad_scores of all queries
constexpr int64_t MAX_COLUMNS = 256;    // of a task in the second step

void compute_gradients(const SparseBackward& p, int64_t S) {
  const int64_t topk = p.selected.topk, W = p.q.width, threads = torch::stable::get_num_threads();
  const int64_t fit = WORKSPACE / std::max<int64_t>(2 * topk * padded_width(p.H), 1);
  const int64_t step = std::min(S, std::max(fit, threads));
  const int64_t keys = std::min(SPARSE_KEY_BLOCK, std::max<int64_t>(topk, 1));
  const int64_t share = ceil_div(ceil_div(W, threads), 32) * 32;
  const int64_t columns = std::max<int64_t>(std::min(MAX_COLUMNS, share), 1);
  const auto query_gradients = DEEPKERN_DISPATCH(query_gradients);
  const auto add_columns = DEEPKERN_DISPATCH(add_columns);
  std::vector<QueryGradients> stored;
  for (int64_t i = 0; i < step; ++i) stored.emplace_back(topk, p.H);
  const double work = double(step * p.H) * double(topk) * double(W + p.R);
  for (int64_t first = 0; first < S; first += step) {
    const int64_t count = std::min(step, S - first);
    parallel_tasks(
        count, work, [&] { return QueryScratch(p, keys); },
        [&](int64_t i, QueryScratch& scratch) {
          query_gradients(p, first + i, stored[i], scratch);
        });
    parallel_tasks(
        ceil_div(W, columns), work, [&] { return ColumnScratch(p, keys, columns); },
        [&](int64_t task, ColumnScratch& scratch) {
          const int64_t column = task * columns;
          for (int64_t i = 0; i < count; ++i) {
            add_columns(p, first + i, stored[i], column, std::min(columns, W - column), scratch);
          }
        });
  }
}

std::tuple<Tensor, Tensor, Tensor> mla_sparse_prefill_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q,
    const Tensor& kv, const Tensor& indices, const Tensor& out, const Tensor& lse,
    double softmax_scale, const std::optional<Tensor>& attn_sink,
    const std::optional<Tensor>& topk_length) {
  const Arguments arguments{"mla_sparse_prefill_backward"};
  const Real type = arguments.check_real("q", q, {-1, -1, -1});
  const int64_t S = q.size(0), H = q.size(1), W = q.size(2);
  arguments.check("out", out, q.scalar_type(), {S, H, -1});
  const int64_t R = out.size(2);
  arguments.check("grad_out", grad_out, q.scalar_type(), {S, H, R});
  arguments.check("lse", lse, ScalarType::Float, {S, H});
  if (grad_lse) arguments.check("grad_lse", *grad_lse, ScalarType::Float, {S, H});
  const SelectedRows selected =
      check_sparse_prefill(arguments, q, kv, indices, R, attn_sink, topk_length);

  Tensor grad_q = new_tensor({S, H, W}, q.scalar_type());
  Tensor grad_kv = new_tensor({kv.size(0), 1, W}, q.scalar_type());
  Tensor grad_sink = new_tensor({attn_sink ? H : 0}, ScalarType::Float);
  std::vector<float> grad_kv_sum(kv.size(0) * W);
  std::vector<double> grad_sink_rows(S * H);
  const SparseBackward backward{{grad_out, type},
                                {q, type},
                                {kv, type},
                                {out, type},
                                selected,
                                data<float>(lse),
                                data<float>(grad_lse),
                                lse.stride(0),
                                grad_lse ? grad_lse->stride(0) : 0,
                                data<float>(attn_sink),
                                grad_q.mutable_data_ptr(),
                                grad_kv_sum.data(),
                                grad_sink_rows.data(),
                                static_cast<float>(softmax_scale),
                                H,
                                R};
  if (S * H > 0) compute_gradients(backward, S);
  const auto store_grad_kv = DEEPKERN_DISPATCH(store_grad_kv);
  void* const rows = grad_kv.mutable_data_ptr();
  parallel_ranges(kv.size(0), W,
                  [&](int64_t first, int64_t last) { store_grad_kv(backward, rows, first, last); });
  if (attn_sink) {
    float* const sums = mutable_data<float>(grad_sink);
    for (int64_t h = 0; h < H; ++h) {
      double sum = 0.0;
      for (int64_t s = 0; s < S; ++s) sum += grad_sink_rows[s * H + h];
      sums[h] = static_cast<float>(sum);
    }
  }
  return {grad_q, grad_kv, grad_sink};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("mla_sparse_prefill_backward", TORCH_BOX(&mla_sparse_prefill_backward));
}

}  // namespace
}  // namespace deepkern
#else
#include "product.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// grad_out . out of one head.
template <Real type>
float compute_delta(const SparseBackward& p, int64_t query, int64_t head) {
  const int64_t grad = p.grad_out.at(query, head), out = p.out.at(query, head);
  Floats sum = {};
  int64_t i = 0;
  for (; i + LANES <= p.R; i += LANES) {
    sum = fma(load_floats<type>(p.grad_out.data, grad + i), load_floats<type>(p.out.data, out + i),
              sum);
  }
  return sum_of_lanes(fma(load_first_floats<type>(p.grad_out.data, grad + i, p.R - i),
                          load_first_floats<type>(p.out.data, out + i, p.R - i), sum));
}

// Loads q and grad_out of a query, what its softmax needs, and computes its part of grad_sink.
template <Real type>
void load_query(const SparseBackward& p, int64_t query, const QueryScratch& s) {
  for (int64_t h = 0; h < p.H; ++h) {
    load_row<type>(p.q.data, p.q.at(query, h), p.q.width, s.q.row(h));
    load_row<type>(p.grad_out.data, p.grad_out.at(query, h), p.R, s.grad_out.row(h));
  }
  transpose(p.H, p.q.width, s.q, s.q_transposed);
  transpose(p.H, p.R, s.grad_out, s.grad_out_transposed);
  const int64_t padded = ceil_div(p.H, TILE_COLUMNS) * TILE_COLUMNS;
  for (int64_t h = 0; h < padded; ++h) s.lse[h] = s.delta[h] = s.factor[h] = s.grad_lse[h] = 0.0f;
  for (int64_t h = 0; h < p.H; ++h) {
    const float lse = p.lse[query * p.lse_stride + h] * float(LOG2_E);
    s.lse[h] = lse;
    s.delta[h] = compute_delta<type>(p, query, h);
    s.factor[h] = 1.0f;
    if (p.grad_lse != nullptr) s.grad_lse[h] = p.grad_lse[query * p.grad_lse_stride + h];
    if (p.attn_sink == nullptr || lse == -std::numeric_limits<float>::infinity()) continue;
    const float sink = p.attn_sink[h] * float(LOG2_E);
    s.factor[h] = 1.0f / (1.0f + std::exp2(sink - lse));
    // The sink's own weight, 1 - factor: the difference would cancel for a sink far below lse.
    const float sink_weight = 1.0f / (1.0f + std::exp2(lse - sink));
    p.grad_sink[query * p.H + h] = -double(sink_weight) * double(s.delta[h]);
  }
}

// p and softmax_scale * grad_score of LANES heads, in place of the scores and grad_out . v.
DEEPKERN_INLINE void differentiate_lanes(const SparseBackward& p, const QueryScratch& s,
                                         Matrix weights, Matrix grad_scores, int64_t head,
                                         int64_t keys) {
  const Floats scale = broadcast(float(double(p.softmax_scale) * LOG2_E));
  const Floats lse = load_vector<Floats>(s.lse + head), delta = load_vector<Floats>(s.delta + head);
  const Floats factor = load_vector<Floats>(s.factor + head);
  const Floats grad_lse = load_vector<Floats>(s.grad_lse + head);
  for (int64_t i = 0; i < keys; ++i) {
    float* const weight = weights.row(i) + head;
    float* const grad = grad_scores.row(i) + head;
    const Floats exponent = fma(load_vector<Floats>(weight), scale, -lse);
    const Floats no_sink = exp2_of_negative(min(broadcast(128.0f), exponent));
    const Floats with_sink = no_sink * factor;
    const Floats grad_score = with_sink * (load_vector<Floats>(grad) - delta) + no_sink * grad_lse;
    store_vector(weight, with_sink);
    store_vector(grad, grad_score * p.softmax_scale);
  }
}

template <Real type>
void query_gradients_of(const SparseBackward& p, int64_t query, QueryGradients& g,
                        const QueryScratch& s) {
  const int64_t W = p.q.width, H = p.H;
  std::memset(s.grad_q.data, 0, H * s.grad_q.stride * sizeof(float));
  g.count = p.selected.select(query, g.rows.data());
  if (g.count > 0) load_query<type>(p, query, s);
  for (int64_t first = 0; first < g.count; first += SPARSE_KEY_BLOCK) {
    const int64_t keys = std::min(SPARSE_KEY_BLOCK, g.count - first);
    for (int64_t i = 0; i < keys; ++i) {
      load_row<type>(p.kv.data, p.kv.at(g.rows[first + i], 0), W, s.kv.row(i));
    }
    const Matrix weights = g.weights.from(first, 0), grad_scores = g.grad_scores.from(first, 0);
    product<Left::rows>(keys, H, W, s.kv, s.q_transposed, weights, Into::overwrite);
    product<Left::rows>(keys, H, p.R, s.kv, s.grad_out_transposed, grad_scores, Into::overwrite);
    for (int64_t head = 0; head < H; head += LANES) {
      differentiate_lanes(p, s, weights, grad_scores, head, keys);
    }
    product<Left::transposed>(H, W, keys, grad_scores, s.kv, s.grad_q, Into::add);
  }
  for (int64_t h = 0; h < H; ++h) {
    store_row<type>(p.grad_q, (query * H + h) * W, W, s.grad_q.row(h), 1.0f);
  }
}

void query_gradients(const SparseBackward& p, int64_t query, QueryGradients& g, QueryScratch& s) {
  DEEPKERN_FOR_REAL(p.q.type, query_gradients_of<type>(p, query, g, s));
}

// Adds what a query adds to columns [first, first + columns) of grad_kv.
template <Real type>
void add_columns_of(const SparseBackward& p, int64_t query, const QueryGradients& g, int64_t first,
                    int64_t columns, const ColumnScratch& s) {
  const int64_t W = p.q.width, latents = std::clamp<int64_t>(p.R - first, 0, columns);
  for (int64_t h = 0; h < p.H; ++h) {
    load_row<type>(p.q.data, p.q.at(query, h) + first, columns, s.q.row(h));
    // Zeros past R: they are added to the columns up to a multiple of TILE_COLUMNS.
    std::memset(s.grad_out.row(h), 0, s.grad_out.stride * sizeof(float));
    load_row<type>(p.grad_out.data, p.grad_out.at(query, h) + first, latents, s.grad_out.row(h));
  }
  for (int64_t key = 0; key < g.count; key += SPARSE_KEY_BLOCK) {
    const int64_t keys = std::min(SPARSE_KEY_BLOCK, g.count - key);
    product<Left::rows>(keys, columns, p.H, g.grad_scores.from(key, 0), s.q, s.grad_kv,
                        Into::overwrite);
    product<Left::rows>(keys, latents, p.H, g.weights.from(key, 0), s.grad_out, s.grad_kv,
                        Into::add);
    for (int64_t i = 0; i < keys; ++i) {
      float* const sum = p.grad_kv + g.rows[key + i] * W + first;
      const float* const part = s.grad_kv.row(i);
      int64_t j = 0;
      for (; j + LANES <= columns; j += LANES) {
        store_vector(sum + j, load_vector<Floats>(sum + j) + load_vector<Floats>(part + j));
      }
      for (; j < columns; ++j) sum[j] += part[j];
    }
  }
}

void add_columns(const SparseBackward& p, int64_t query, const QueryGradients& g, int64_t first,
                 int64_t columns, ColumnScratch& s) {
  if (g.count == 0) return;
  DEEPKERN_FOR_REAL(p.q.type, add_columns_of<type>(p, query, g, first, columns, s));
}

// Rows [first, last) of grad_kv in q's dtype.
void store_grad_kv(const SparseBackward& p, void* out, int64_t first, int64_t last) {
  const int64_t W = p.q.width;
  DEEPKERN_FOR_REAL(
      p.q.type, for (int64_t i = first; i < last;
                     ++i) { store_row<type>(out, i * W, W, p.grad_kv + i * W, 1.0f); });
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
