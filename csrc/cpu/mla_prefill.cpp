// score[i, h, j] = softmax_scale * q[i, h] . k[j, h / group]
// out[i, h]      = softmax over the visible j of score . v[j, h / group]
//
// Everything is float32. Scores are computed transposed, S^T = K·Q^T: then keys and values are
// used as they are in memory, Q^T is made once for all keys, and the softmax of LANES rows runs in
// the lanes of a vector, without sums across lanes.
//
// Parallelization: a task is ROW_BLOCK rows of one sequence and one head of k and v; a row is a
// query and one of the `group` heads of q that use this head. It loops over the visible keys,
// KEY_BLOCK at a time, with an online softmax. Where some keys are masked, panels of rows multiply
// only the keys that one of their rows attends to. Tasks with the most keys come first.
//
// Limit: FMA units.
//
// Source: FlashAttention-2 (arXiv 2307.08691).
#ifndef DEEPKERN_ISA
#include "mla_prefill.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

namespace deepkern {
namespace {

struct Prefill {
  HeadRows q, k, v;   // [T, H, Dqk], [Tk, Hk, Dqk], [Tk, Hk, Dv]
  void* out;          // [T, H, Dv], contiguous
  float* lse;         // [H, T], contiguous, natural log
  float score_scale;  // softmax_scale * log2(e)
  int64_t T, H, group;
  bool causal;
};

// The scratch memory of a thread, for tiles of `rows` rows and `keys` keys.
struct PrefillScratch {
  PrefillScratch(const Prefill& p, int64_t rows, int64_t keys)
      : memory((p.q.width + keys) * padded_width(rows) + 4 * padded_width(rows) +
               std::max(rows, keys) * padded_width(p.q.width) +
               (rows + keys) * padded_width(p.v.width) + 16 * 9),
        softmax(memory, rows, keys),
        q_transposed(memory.matrix(p.q.width, rows)),
        k(memory.matrix(std::max(rows, keys), p.q.width)),
        v(memory.matrix(keys, p.v.width)),
        out(memory.matrix(rows, p.v.width)),
        limit(reinterpret_cast<int32_t*>(memory.take(padded_width(rows)))) {}
  Scratch memory;
  OnlineSoftmax softmax;
  Matrix q_transposed;  // [Dqk, rows]
  Matrix k, v;          // [keys, Dqk], [keys, Dv]
  Matrix out;           // [rows, Dv], not divided by row_sum yet
  int32_t* limit;       // [rows], a row attends to the keys below its limit
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/mla_prefill.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

std::tuple<Tensor, Tensor> mla_prefill(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                       double softmax_scale, bool causal) {
  const Real type =
      check_prefill("mla_prefill", q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale);
  const int64_t T = q.size(0), H = q.size(1), Hk = k.size(1), Dv = v.size(2);
  Tensor out = new_tensor({T, H, Dv}, q.scalar_type());
  Tensor lse = new_tensor({H, T}, ScalarType::Float);
  if (T * H == 0) return {out, lse};

  const Prefill prefill{{q, type},
                        {k, type},
                        {v, type},
                        out.mutable_data_ptr(),
                        mutable_data<float>(lse),
                        static_cast<float>(softmax_scale * LOG2_E),
                        T,
                        H,
                        H / Hk,
                        causal};
  const RaggedTiles tiles(ragged_spans({cu_seqlens_q, T}, {cu_seqlens_k, k.size(0)}), prefill.group,
                          ROW_BLOCK);
  const auto attend = DEEPKERN_DISPATCH(attend);
  const auto count = static_cast<int64_t>(tiles.tiles.size());
  parallel_tasks(
      count * Hk, double(tiles.pairs) * double(Hk * (q.size(2) + Dv)),
      [&] {
        return PrefillScratch(prefill, std::min(ROW_BLOCK, tiles.max_rows),
                              std::min(KEY_BLOCK, tiles.max_others));
      },
      [&](int64_t task, PrefillScratch& scratch) {
        attend(prefill, tiles.tiles[task % count], task / count, scratch);
      });
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("mla_prefill", TORCH_BOX(&mla_prefill));
}

}  // namespace
}  // namespace deepkern
#else
#include "online_softmax.h"
#include "product.h"
#include "stacked_rows.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// out and the softmax of `rows` rows after the keys [first, first + keys) of the sequence.
void attend_to_keys(const Prefill& p, const PrefillScratch& s, int64_t rows, int64_t first,
                    int64_t keys) {
  // Of the first `row + 1` rows, the last one attends to the most keys.
  const auto visible = [&](int64_t row) {
    const int64_t limit = s.limit[std::min(row, rows - 1)];
    return std::min(std::max<int64_t>(limit - first, 0), keys);
  };
  const bool masked = visible(0) < keys;
  for (int64_t row = 0; row < rows; row += TILE_COLUMNS) {
    product<Left::rows>(visible(row + TILE_COLUMNS - 1), TILE_COLUMNS, p.q.width, s.k,
                        s.q_transposed.from(0, row), s.softmax.scores.from(0, row),
                        Into::overwrite);
  }
  for (int64_t row = 0; row < rows; row += LANES) {
    if (masked) {
      const Ints limit = load_vector<Ints>(s.limit + row) - int32_t(first);
      softmax_lanes<true, false>(s.softmax, row, keys, p.score_scale, limit);
    } else {
      softmax_lanes<false, false>(s.softmax, row, keys, p.score_scale);
    }
  }
  const int64_t step = masked ? 2 * TILE_ROWS : rows;
  for (int64_t row = 0; row < rows; row += step) {
    const int64_t count = std::min(step, rows - row);
    product<Left::transposed>(count, p.v.width, visible(row + count - 1),
                              s.softmax.scores.from(0, row), s.v, s.out.from(row, 0), Into::add,
                              s.softmax.alpha + row);
  }
}

template <Real type>
void store_out(const Prefill& p, const StackedRows& rows, const PrefillScratch& s) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t query = rows.query(i), head = rows.head(i);
    const float sum = s.softmax.row_sum[i];
    store_row<type>(p.out, (query * p.H + head) * p.v.width, p.v.width, s.out.row(i),
                    1.0f / (sum == 0.0f ? 1.0f : sum));
    p.lse[head * p.T + query] = sum == 0.0f ? -std::numeric_limits<float>::infinity()
                                            : (s.softmax.row_max[i] + std::log2(sum)) * float(LN_2);
  }
}

void attend(const Prefill& p, const RaggedTile& tile, int64_t kv_head, PrefillScratch& s) {
  const StackedRows rows(tile, kv_head, p.group);
  const int64_t padded = ceil_div(rows.count, TILE_COLUMNS) * TILE_COLUMNS;
  load_stacked_rows(p.q, rows, s.k);
  transpose(rows.count, p.q.width, s.k, s.q_transposed);
  start_softmax(s.softmax, padded);
  for (int64_t i = 0; i < padded; ++i) {
    s.limit[i] = rows.visible_keys(std::min(i, rows.count - 1), p.causal);
  }
  std::memset(s.out.data, 0, rows.count * s.out.stride * sizeof(float));
  const int64_t end = rows.visible_keys(rows.count - 1, p.causal);
  for (int64_t first = 0; first < end; first += KEY_BLOCK) {
    const int64_t keys = std::min(KEY_BLOCK, end - first);
    load_rows(p.k, tile.span.other_begin + first, kv_head, keys, s.k);
    load_rows(p.v, tile.span.other_begin + first, kv_head, keys, s.v);
    attend_to_keys(p, s, rows.count, first, keys);
  }
  DEEPKERN_FOR_REAL(p.q.type, store_out<type>(p, rows, s));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
