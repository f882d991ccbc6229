// Host interface of csrc/sm90/*.cu: arguments and launchers, without CUDA headers.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include "../fp8_gemm.h"
#include "choose.h"

namespace deepkern {

// A product of any variant, with K > 0 and a non-empty `gemm.out`. The matrices of `gemm` contain
// all groups, one after the other. Rows of codes start at multiples of 16 bytes.
struct Fp8GemmProblem {
  GemmVariant variant;
  Fp8Gemm gemm;
  int64_t M, N, groups;                                // M: rows of A; of each group if masked
  int64_t a_scale_group_stride, b_scale_group_stride;  // floats
  int64_t scale_blocks;                                // columns of the scales
  // By variant: group_index [M], masked_m [groups] or group_offsets [groups + 1].
  const int* group_sizes;
  int* group_bounds;  // contiguous: scratch memory [2 * groups]
};

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

// Arguments of mla_decode, mla_sparse_decode and mla_sparse_prefill. Strides are in elements.
//
// Sparse attention: each query is a sequence of its own, so Sq is 1. Its tokens are the slots that
// its row of indices names.
struct MlaArguments {
  const void* q;      // bf16 [batch · Sq · H, 576], rows at multiples of 16 bytes
  const void* cache;  // [num_pages, page_size, 576] bf16, or 656 bytes per token in the FP8 format
  // The block table [batch, max_tokens / page_size], page numbers; sparse: the indices
  // [batch / queries, queries, max_tokens], slots page · page_size + offset.
  const int* table;
  const int* cache_seqlens;  // [batch], tokens; sparse: [batch / queries], or null: max_tokens
  const float* attn_sink;    // sparse: [H], natural logarithm, or null
  void* out;                 // bf16 [batch, Sq, H, 512]
  float* lse;                // [batch / queries, H, Sq · queries], natural logarithm
  float* max_logits;         // sparse, with one split: as lse, or null
  float* partial_out;        // [batch, num_splits, Sq * H, 512], results of the splits
  float* partial_lse;        // [batch, num_splits, Sq * H], base 2
  int64_t q_row_stride, table_row_stride;
  int64_t table_query_stride;         // sparse: from query to query of a row
  int64_t page_stride, token_stride;  // of the cache
  float softmax_scale_log2;           // softmax_scale · log2(e)
  float max_logits_scale;             // ln(2), or 0 if softmax_scale is 0
  int batch, Sq, H;
  int queries;     // sparse: queries that share a length; else 1
  int max_tokens;  // of a sequence: pages of the block table · page_size; sparse: topk
  int num_pages, page_size;
  int row_tiles;          // tiles of 64 rows (query, head) per sequence
  int num_splits;         // splits of the longest possible sequence
  int min_split_log2;     // log2 of the fewest tokens of a split, unless the sequence has one split
  int max_splits;         // per sequence
  bool causal;
  bool sparse;
  bool by_tma;            // TMA can load the cache: see plan_mla_splits
  bool fp8;               // FP8 cache format
  int64_t tma_page_rows;  // by_tma: rows of the tensor map from one page to the next
  // The page of token or slot i < 2^31 is i · page_reciprocal >> page_shift, exactly.
  uint32_t page_reciprocal;
  int page_shift;

  int64_t tma_rows() const { return (num_pages - 1) * tma_page_rows + page_size; }
};

// Sets the fields of the parallelization. Splits depend on Sq · H and on a sequence's own length,
// so neither the batch nor the width of the block table changes the bits of a result.
//
// A split's partial result costs the traffic of 3.6 cached bf16 tokens per row. So a split has 64
// tokens per row (5.6 % more traffic), between 512 and 4096. Fewer and longer splits would serve
// large batches better, more and shorter ones a single sequence: see docs/notes/hopper.md.
inline void plan_mla_splits(MlaArguments& p) {
  const int64_t rows = int64_t{p.Sq} * p.H;
  p.row_tiles = static_cast<int>((rows + 63) / 64);
  int power = 1;
  while (power < p.row_tiles) power *= 2;
  p.max_splits = power == 1 ? 64 : power < 16 ? 128 / power : 8;
  p.min_split_log2 = 9;
  while (64 * rows > 1 << p.min_split_log2 && p.min_split_log2 < 12) ++p.min_split_log2;
  if (p.max_logits) p.max_splits = 1;
  const int splits = p.max_tokens >> p.min_split_log2;
  p.num_splits = splits < 1 ? 1 : splits < p.max_splits ? splits : p.max_splits;
  // P of a score s is 2^(s · scale - maximum). With scale 0 a masked score would be inf · 0.
  p.max_logits_scale = p.softmax_scale_log2 == 0 ? 0 : static_cast<float>(LN_2);
  if (p.softmax_scale_log2 == 0) p.softmax_scale_log2 = std::numeric_limits<float>::min();
  if (p.page_size < 1) p.num_pages = 0, p.page_size = 1;  // page_size is a divisor
  if (p.sparse && p.page_stride == p.page_size * p.token_stride) {  // slots without gaps
    p.num_pages *= p.page_size, p.page_size = 1, p.page_stride = p.token_stride;
  }
  // Granlund and Montgomery, "Division by invariant integers using multiplication" (1994).
  p.page_shift = 31;
  while (int64_t{1} << (p.page_shift - 31) < p.page_size) ++p.page_shift;
  p.page_reciprocal =
      static_cast<uint32_t>((uint64_t{1} << p.page_shift) / static_cast<uint32_t>(p.page_size)) + 1;
  // TMA needs pages of a multiple of 64 tokens and one stride between all tokens of the cache.
  p.tma_page_rows = p.token_stride > 0 ? p.page_stride / p.token_stride : 0;
  p.by_tma = !p.fp8 && !p.sparse && p.num_pages > 0 && p.page_size % 64 == 0 &&
             p.token_stride >= 576 && p.page_stride % p.token_stride == 0 &&
             p.tma_page_rows >= p.page_size && p.tma_rows() < INT32_MAX - 64;
}

// The operands of a group of heads take this part of the L2 cache: half of an H100's.
constexpr int64_t PREFILL_L2_BYTES = 24 << 20;

// Arguments of mla_prefill. Strides are in elements. Heads of a row do not overlap.
struct MlaPrefillArguments {
  const void *q, *k, *v;      // bf16 [T, H, 192], [Tk, H / heads_per_key, 192] and [.., 128]
  const int *cu_seqlens_q, *cu_seqlens_k;  // [num_boundaries], not trusted
  void* out;                  // bf16 [T, H, 128]
  float* lse;                 // [H, T], natural logarithm
  int* tiles;                 // scratch memory [num_tiles, 4]
  int64_t q_row_stride, k_row_stride, v_row_stride;
  int q_head_stride, k_head_stride, v_head_stride;
  float softmax_scale_log2;   // softmax_scale · log2(e)
  int T, Tk, H;
  int heads_per_key;          // heads of q per head of k and v
  int num_boundaries;         // sequences + 1
  int num_tiles;              // entries of `tiles`
  int heads_per_group;        // heads whose keys and values fit in the L2 cache
  bool causal;
};

// Arguments of mla_prefill_backward. `forward.out` and `forward.lse` are results of the forward
// pass, `forward.tiles` is the table of query tiles.
struct MlaPrefillBackwardArguments {
  MlaPrefillArguments forward;
  const void* grad_out;    // bf16 [T, H, 128]
  const float* grad_lse;   // [H, T], or null
  void *grad_q, *grad_k, *grad_v;
  float* delta;            // scratch memory [H, T]
  int* key_tiles;          // scratch memory [num_key_tiles, 4]
  int64_t grad_out_row_stride, out_row_stride;
  int grad_out_head_stride, out_head_stride;
  float softmax_scale;
  int num_key_tiles;       // of 64 keys
  int key_heads_per_group;
};

// Sets num_tiles and heads_per_group.
inline void plan_mla_prefill(MlaPrefillArguments& p) {
  p.num_tiles = (p.T + 127) / 128 + p.num_boundaries;
  const int64_t key_heads = PREFILL_L2_BYTES / (int64_t{p.Tk} * (192 + 128) * 2 + 1);
  const int64_t heads = (key_heads < 1 ? 1 : key_heads) * p.heads_per_key;
  p.heads_per_group = static_cast<int>(heads < p.H ? heads : p.H);
}

// Sets the numbers of tiles and of heads per group.
inline void plan_mla_prefill_backward(MlaPrefillBackwardArguments& p) {
  plan_mla_prefill(p.forward);
  p.num_key_tiles = (p.forward.Tk + 63) / 64 + p.forward.num_boundaries;
  const int key_heads = p.forward.H / p.forward.heads_per_key;
  const int64_t head_bytes = int64_t{p.forward.T} * p.forward.heads_per_key * (192 + 128) * 2;
  const int64_t heads = PREFILL_L2_BYTES / (head_bytes + 1);
  p.key_heads_per_group = static_cast<int>(heads < 1 ? 1 : heads < key_heads ? heads : key_heads);
}

// Launch on the current device, which must be a Hopper GPU. Return an error message, or "".
std::string launch_fp8_gemm(const Fp8GemmProblem& problem, void* stream);
std::string launch_mla_decode(MlaArguments arguments, void* stream);
std::string launch_mla_prefill(const MlaPrefillArguments& arguments, void* stream);
std::string launch_mla_prefill_backward(const MlaPrefillBackwardArguments& arguments, void* stream);

// Sets `stream` to torch's current stream of the device; false if torch has no CUDA.
bool current_stream(int device, void** stream);

}  // namespace deepkern
