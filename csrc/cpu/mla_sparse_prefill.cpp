// score[s, h, n] = softmax_scale * q[s, h] . kv[indices[s, n]]
// out[s, h]      = exp(lse) / (exp(lse) + exp(sink[h])) * softmax over n of score . kv[.., :R]
//
// Everything is float32. As in mla_prefill.cpp, a tile of scores is transposed: [keys, heads].
//
// Parallelization: a task is one query and a block of its heads. It gathers the selected rows of
// kv, SPARSE_KEY_BLOCK at a time, and uses them as keys and as values. With fewer queries than
// threads the blocks of heads are smaller; a head's bits do not depend on its block.
//
// Limit: FMA units with many heads, gathering with few.
#ifndef DEEPKERN_ISA
#include "mla_sparse_prefill.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace deepkern {
namespace {

struct SparsePrefill {
  HeadRows q, kv;  // [S, H, W], [Skv, 1, W]
  SelectedRows selected;
  const float* attn_sink;   // [H], or null
  void* out;                // [S, H, R]; all outputs are contiguous
  float *max_logits, *lse;  // [S, H], natural log
  float score_scale;        // softmax_scale * log2(e)
  int64_t H, R;
};

// The scratch memory of a thread, for `heads` heads and tiles of `keys` keys.
struct SparsePrefillScratch {
  SparsePrefillScratch(const SparsePrefill& p, int64_t heads, int64_t keys)
      : memory(OnlineSoftmax::floats(heads, keys) + p.q.width * padded_width(heads) +
               std::max(heads, keys) * padded_width(p.q.width) + heads * padded_width(p.R) +
               16 * 8),
        softmax(memory, heads, keys),
        q_transposed(memory.matrix(p.q.width, heads)),
        kv(memory.matrix(std::max(heads, keys), p.q.width)),
        out(memory.matrix(heads, p.R)),
        rows(p.selected.topk) {}
  Scratch memory;
  OnlineSoftmax softmax;
  Matrix q_transposed;        // [W, heads]
  Matrix kv;                  // [keys, W]
  Matrix out;                 // [heads, R], not divided by row_sum yet
  std::vector<int32_t> rows;  // [topk], selected rows of kv
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/mla_sparse_prefill.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

constexpr int64_t MAX_HEADS = 128, MIN_HEADS = 16;  // of a task

std::tuple<Tensor, Tensor, Tensor> mla_sparse_prefill(const Tensor& q, const Tensor& kv,
                                                      const Tensor& indices, double softmax_scale,
                                                      int64_t v_head_dim,
                                                      const std::optional<Tensor>& attn_sink,
                                                      const std::optional<Tensor>& topk_length) {
  const Arguments arguments{"mla_sparse_prefill"};
  const SelectedRows selected =
      check_sparse_prefill(arguments, q, kv, indices, v_head_dim, attn_sink, topk_length);
  const Real type = real_type("mla_sparse_prefill", "q", q.scalar_type());
  const int64_t S = q.size(0), H = q.size(1);
  Tensor out = new_tensor({S, H, v_head_dim}, q.scalar_type());
  Tensor max_logits = new_tensor({S, H}, ScalarType::Float);
  Tensor lse = new_tensor({S, H}, ScalarType::Float);
  if (S * H == 0) return {out, max_logits, lse};

  const SparsePrefill prefill{{q, type},
                              {kv, type},
                              selected,
                              data<float>(attn_sink),
                              out.mutable_data_ptr(),
                              mutable_data<float>(max_logits),
                              mutable_data<float>(lse),
                              static_cast<float>(softmax_scale * LOG2_E),
                              H,
                              v_head_dim};
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = ceil_div(ceil_div(S * H, threads), MIN_HEADS) * MIN_HEADS;
  const int64_t heads = std::min(H, std::min(share, MAX_HEADS));
  const int64_t blocks = ceil_div(H, heads);
  const auto attend = DEEPKERN_DISPATCH(attend);
  parallel_tasks(
      S * blocks, double(S * H) * double(selected.topk) * double(q.size(2) + v_head_dim),
      [&] {
        const int64_t keys = std::min(SPARSE_KEY_BLOCK, std::max<int64_t>(selected.topk, 1));
        return SparsePrefillScratch(prefill, heads, keys);
      },
      [&](int64_t task, SparsePrefillScratch& scratch) {
        const int64_t first = task % blocks * heads;
        attend(prefill, task / blocks, first, std::min(heads, H - first), scratch);
      });
  return {out, max_logits, lse};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("mla_sparse_prefill", TORCH_BOX(&mla_sparse_prefill));
}

}  // namespace
}  // namespace deepkern
#else
#include "online_softmax.h"
#include "product.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// exp(lse) / (exp(lse) + exp(sink)) for an lse to base 2; 1 for a row without keys.
float sink_factor(const SparsePrefill& p, int64_t head, float lse) {
  if (p.attn_sink == nullptr || lse == -std::numeric_limits<float>::infinity()) return 1.0f;
  return 1.0f / (1.0f + std::exp2(p.attn_sink[head] * float(LOG2_E) - lse));
}

template <Real type>
void store_heads(const SparsePrefill& p, int64_t query, int64_t first_head, int64_t heads,
                 const SparsePrefillScratch& s) {
  for (int64_t i = 0; i < heads; ++i) {
    const int64_t head = first_head + i, row = query * p.H + head;
    const float sum = s.softmax.row_sum[i], row_max = s.softmax.row_max[i];
    const float lse =
        sum == 0.0f ? -std::numeric_limits<float>::infinity() : row_max + std::log2(sum);
    p.max_logits[row] = row_max * float(LN_2);
    p.lse[row] = lse * float(LN_2);
    const float factor = sink_factor(p, head, lse) / (sum == 0.0f ? 1.0f : sum);
    store_row<type>(p.out, row * p.R, p.R, s.out.row(i), factor);
  }
}

template <Real type>
void attend_of(const SparsePrefill& p, int64_t query, int64_t first_head, int64_t heads,
               SparsePrefillScratch& s) {
  const int64_t W = p.q.width, padded = ceil_div(heads, TILE_COLUMNS) * TILE_COLUMNS;
  for (int64_t i = 0; i < heads; ++i) {
    load_row<type>(p.q.data, p.q.at(query, first_head + i), W, s.kv.row(i));
  }
  transpose(heads, W, s.kv, s.q_transposed);
  start_softmax(s.softmax, padded);
  std::memset(s.out.data, 0, heads * s.out.stride * sizeof(float));
  int32_t* const rows = s.rows.data();
  const int64_t count = p.selected.select(query, rows);
  for (int64_t first = 0; first < count; first += SPARSE_KEY_BLOCK) {
    const int64_t keys = std::min(SPARSE_KEY_BLOCK, count - first);
    for (int64_t i = 0; i < keys; ++i) {
      load_row<type>(p.kv.data, p.kv.at(rows[first + i], 0), W, s.kv.row(i));
    }
    product<Left::rows>(keys, heads, W, s.kv, s.q_transposed, s.softmax.scores, Into::overwrite);
    for (int64_t row = 0; row < heads; row += LANES) {
      softmax_lanes<false, true>(s.softmax, row, keys, p.score_scale);
    }
    product<Left::transposed>(heads, p.R, keys, s.softmax.scores, s.kv, s.out, Into::add,
                              s.softmax.alpha);
  }
  store_heads<type>(p, query, first_head, heads, s);
}

void attend(const SparsePrefill& p, int64_t query, int64_t first_head, int64_t heads,
            SparsePrefillScratch& s) {
  DEEPKERN_FOR_REAL(p.q.type, attend_of<type>(p, query, first_head, heads, s));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
