// The `cuda` backend: FP8 GEMMs and latent attention on CUDA tensors. Compiled only with nvcc's kernels.
//
// The Python ops have checked their arguments. This file checks the limits of the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "../arguments.h"
#include "launch.h"

// The hash of this folder's files. runtime/verified.py compares it with the kernels verified on a
// GPU.
extern "C" __attribute__((visibility("default"))) const char* deepkern_sm90_sources() {
  return DEEPKERN_SM90_SOURCES;
}

namespace deepkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void* stream_of(const char* op, const Tensor& x) {
  void* stream = nullptr;
  STD_TORCH_CHECK(current_stream(x.get_device_index(), &stream), op,
                  ": this torch has no CUDA stream");
  return stream;
}

// x [.., rows, K] as one matrix for TMA, whose rows must start at multiples of 16 bytes and not
// overlap: a view, or a copy.
Tensor for_tma(const Tensor& x) {
  const int64_t K = x.size(x.dim() - 1), rows = K ? x.numel() / K : 0;
  const Tensor flat = x.dim() == 2 ? x : torch::stable::reshape(x, {rows, K});
  const bool aligned = reinterpret_cast<uintptr_t>(flat.const_data_ptr()) % 16 == 0;
  const bool unit_stride = K <= 1 || flat.stride(1) == 1;
  const bool disjoint = rows <= 1 || (flat.stride(0) % 16 == 0 && flat.stride(0) >= K);
  if (aligned && unit_stride && disjoint) return flat;
  Tensor wide = torch::stable::new_empty(flat, {rows, (K + 15) / 16 * 16});
  Tensor copy = torch::stable::narrow(wide, 1, 0, K);
  return torch::stable::copy_(copy, flat);
}

Fp8Matrix matrix(const Tensor& x, const Tensor& scale, int64_t rows_per_scale) {
  const int64_t d = scale.dim();
  return {static_cast<const uint8_t*>(x.const_data_ptr()),
          x.size(0),
          x.stride(0),
          static_cast<const float*>(scale.const_data_ptr()),
          rows_per_scale,
          scale.stride(d - 2),
          scale.stride(d - 1)};
}

// A call of an FP8 GEMM op. The constructor fills in the operands; the callers add the group sizes
// and C.
struct GemmCall {
  Tensor a, b;  // the inputs, or copies for TMA
  Fp8GemmProblem problem{};

  GemmCall(const char* op, GemmVariant variant, const Tensor& a_codes, const Tensor& a_scale,
          const Tensor& b_codes, const Tensor& b_scale, int64_t groups)
      : a(for_tma(a_codes)), b(for_tma(b_codes)) {
    problem.variant = variant;
    problem.groups = groups;
    problem.M = a_codes.size(a_codes.dim() - 2);
    problem.N = b_codes.size(b_codes.dim() - 2);
    problem.gemm.K = a_codes.size(a_codes.dim() - 1);
    const bool per_row = b_scale.size(b_scale.dim() - 2) == problem.N && problem.N > 1;
    problem.gemm.a = matrix(a, a_scale, 1);
    problem.gemm.b = matrix(b, b_scale, per_row || variant == GemmVariant::k_grouped ? 1 : BLOCK);
    problem.a_scale_group_stride = a_scale.dim() == 3 ? a_scale.stride(0) : 0;
    problem.b_scale_group_stride = b_scale.dim() == 3 ? b_scale.stride(0) : 0;
    problem.scale_blocks = a_scale.size(a_scale.dim() - 1);
    const Fp8Gemm& gemm = problem.gemm;
    const int64_t largest = std::max({gemm.a.rows, gemm.b.rows, gemm.K, groups * problem.M});
    STD_TORCH_CHECK(largest < INT32_MAX - 65536, op, ": a, b: expected, on backend cuda, fewer "
                    "than 2^31 - 65536 rows and values of K, got ", largest);
  }

  void add_c(const char* op, const std::optional<Tensor>& c) {
    if (!c.has_value()) return;
    problem.gemm.c = c->const_data_ptr();
    problem.gemm.c_row_stride = c->stride(c->dim() - 2);
    problem.gemm.c_type = real_type(op, "c", c->scalar_type());
  }

  Tensor run(const char* op, Tensor out, ScalarType dtype) {
    problem.gemm.out = out.mutable_data_ptr();
    problem.gemm.out_type = real_type(op, "out_dtype", dtype);
    const std::string error = launch_fp8_gemm(problem, stream_of(op, a));
    STD_TORCH_CHECK(error.empty(), op, ": backend cuda: ", error);
    return out;
  }
};

const int* int_data(const Tensor& x) { return static_cast<const int*>(x.const_data_ptr()); }

// The result of a product with K = 0: c, or zeros.
Tensor empty_product(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                     ScalarType dtype, const std::optional<Tensor>& c) {
  Tensor out = torch::stable::new_zeros(like, shape, dtype);
  return c.has_value() ? torch::stable::copy_(out, *c) : out;
}

Tensor fp8_gemm_nt(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                   ScalarType out_dtype, const std::optional<Tensor>& c) {
  const char* op = "fp8_gemm_nt";
  const int64_t M = a.size(0), N = b.size(0), K = a.size(1);
  if (K == 0) return empty_product(a, {M, N}, out_dtype, c);
  Tensor out = torch::stable::new_empty(a, {M, N}, out_dtype);
  if (M * N == 0) return out;
  GemmCall call(op, GemmVariant::dense, a, a_scale, b, b_scale, 1);
  call.add_c(op, c);
  return call.run(op, out, out_dtype);
}

Tensor contiguous(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                  const Tensor& group_index, ScalarType out_dtype) {
  const char* op = "m_grouped_fp8_gemm_nt_contiguous";
  const int64_t M = a.size(0), N = b.size(1), G = b.size(0);
  if (a.size(1) == 0 || G == 0) return empty_product(a, {M, N}, out_dtype, std::nullopt);
  Tensor out = torch::stable::new_empty(a, {M, N}, out_dtype);
  if (M * N == 0) return out;
  GemmCall call(op, GemmVariant::contiguous, a, a_scale, b, b_scale, G);
  Tensor group_bounds = torch::stable::new_empty(a, {2 * G}, ScalarType::Int);
  call.problem.group_bounds = static_cast<int*>(group_bounds.mutable_data_ptr());
  call.problem.group_sizes = int_data(group_index);
  return call.run(op, out, out_dtype);
}

Tensor masked(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
              const Tensor& masked_m, ScalarType out_dtype, std::optional<int64_t> /*expected_m*/) {
  const char* op = "m_grouped_fp8_gemm_nt_masked";
  const int64_t G = a.size(0), M = a.size(1), N = b.size(1);
  if (a.size(2) == 0) return empty_product(a, {G, M, N}, out_dtype, std::nullopt);
  Tensor out = torch::stable::new_empty(a, {G, M, N}, out_dtype);
  if (G * M * N == 0) return out;
  GemmCall call(op, GemmVariant::masked, a, a_scale, b, b_scale, G);
  call.problem.group_sizes = int_data(masked_m);
  return call.run(op, out, out_dtype);
}

Tensor k_grouped(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                 const Tensor& group_offsets, const std::optional<Tensor>& c) {
  const char* op = "k_grouped_fp8_gemm_nt";
  const int64_t M = a.size(0), N = b.size(0), G = group_offsets.size(0) - 1;
  if (a.size(1) == 0 || G < 1) return empty_product(a, {G, M, N}, ScalarType::Float, c);
  Tensor out = torch::stable::new_empty(a, {G, M, N}, ScalarType::Float);
  if (M * N == 0) return out;
  GemmCall call(op, GemmVariant::k_grouped, a, a_scale, b, b_scale, G);
  // The kernel reads c as [G * M, N] with one row stride.
  const Tensor addend = c.has_value() ? torch::stable::contiguous(*c) : a;
  if (c.has_value()) call.add_c(op, addend);
  call.problem.gemm.c_row_stride = N;
  call.problem.group_sizes = int_data(group_offsets);
  return call.run(op, out, ScalarType::Float);
}

// Whether all rows start at multiples of 16 bytes and have unit stride.
bool rows_are_aligned(const Tensor& x) {
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16) return false;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    if (x.size(d) > 1 && x.stride(d) * x.element_size() % 16) return false;
  }
  return x.stride(x.dim() - 1) == 1;
}

// The stride between the rows of x [.., width], if they all have the same one.
int64_t row_stride(const Tensor& x) {
  for (int64_t d = x.dim() - 2; d >= 0; --d) {
    if (x.size(d) > 1) return x.stride(d);
  }
  return x.size(x.dim() - 1);
}

// x as rows for one tensor map, with one stride and not overlapping: x itself, or a copy.
Tensor with_uniform_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1, stride = row_stride(x);
  bool uniform = rows_are_aligned(x) && stride >= x.size(last);
  int64_t rows = 1;  // in the dimensions after d
  for (int64_t d = last - 1; d >= 0; --d) {
    uniform = uniform && (x.size(d) == 1 || x.stride(d) == rows * stride);
    rows *= x.size(d);
  }
  if (uniform) return x;
  Tensor copy = torch::stable::new_empty(x, x.sizes());
  return torch::stable::copy_(copy, x);
}

constexpr int64_t MLA_WIDTH = 576, MLA_V_DIM = 512;         // values
constexpr int64_t MLA_FP8_WIDTH = 512 + 4 * 4 + 64 * 2;  // bytes

float* float_data(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// q [.., 576] in bfloat16, and a cache whose last two dimensions are 1 and the width of a token.
void check_mla(const char* op, const Tensor& q, const char* name, const Tensor& cache,
               int64_t v_head_dim) {
  const auto is = [](const Tensor& x, ScalarType dtype, int64_t width) {
    return x.scalar_type() == dtype && x.size(x.dim() - 1) == width;
  };
  STD_TORCH_CHECK(is(q, ScalarType::BFloat16, MLA_WIDTH), op,
                  ": q: expected, on backend cuda, bfloat16 of width 576, got ",
                  torch::headeronly::toString(q.scalar_type()), " of width ",
                  q.size(q.dim() - 1));
  STD_TORCH_CHECK(is(cache, ScalarType::BFloat16, MLA_WIDTH) ||
                      is(cache, ScalarType::Byte, MLA_FP8_WIDTH),
                  op, ": ", name, ": expected, on backend cuda, bfloat16 of width 576 or uint8 of "
                  "656, got ", torch::headeronly::toString(cache.scalar_type()), " of width ",
                  cache.size(cache.dim() - 1));
  STD_TORCH_CHECK(v_head_dim == MLA_V_DIM, op,
                  ": v_head_dim: expected, on backend cuda, 512, got ", v_head_dim);
  STD_TORCH_CHECK(rows_are_aligned(cache), op, ": ", name, ": expected, on backend cuda, tokens "
                  "that start at multiples of 16 bytes, got strides ", cache.stride(0), " and ",
                  cache.stride(1));
}

// A call of latent attention. The constructor fills in the operands that all of the ops have.
struct MlaCall {
  const char* op;
  Tensor q, partial_out, partial_lse;  // q: the queries, or a copy for TMA
  MlaArguments p{};

  MlaCall(const char* name, const Tensor& queries, const Tensor& cache, const Tensor& table,
          double softmax_scale, Tensor& out, Tensor& lse)
      : op(name), q(with_uniform_rows(queries)) {
    p.q = q.const_data_ptr(), p.cache = cache.const_data_ptr();
    p.table = int_data(table);
    p.out = out.mutable_data_ptr(), p.lse = float_data(lse);
    p.q_row_stride = row_stride(q);
    p.table_row_stride = table.stride(0);
    p.page_stride = p.token_stride = cache.stride(0);
    p.softmax_scale_log2 = static_cast<float>(softmax_scale * LOG2_E);
    p.queries = 1, p.page_size = 1;
    p.num_pages = static_cast<int>(cache.size(0));
    if (cache.dim() == 4) {
      p.page_size = static_cast<int>(cache.size(1)), p.token_stride = cache.stride(1);
    }
    p.fp8 = cache.scalar_type() == ScalarType::Byte;
  }

  // Fewer than 2^31 - 65536 of each.
  void check_sizes(std::initializer_list<int64_t> sizes) const {
    const int64_t largest = std::max(sizes);
    STD_TORCH_CHECK(largest < INT32_MAX - 65536, op, ": q, cache: expected, on backend cuda, fewer "
                    "than 2^31 - 65536 queries, blocks and tokens, got ", largest);
  }

  // For `batch` sequences of Sq queries of H heads.
  void run(int64_t batch, int64_t Sq, int64_t H) {
    const int64_t rows = Sq * H;
    p.batch = static_cast<int>(batch), p.Sq = static_cast<int>(Sq), p.H = static_cast<int>(H);
    plan_mla_splits(p);
    STD_TORCH_CHECK(batch * p.row_tiles * p.num_splits < INT32_MAX && batch * rows < INT32_MAX, op,
                    ": q: expected, on backend cuda, fewer than 2^31 rows, got ", batch * rows);
    if (p.num_splits > 1) {
      partial_out =
          torch::stable::new_empty(q, {batch, p.num_splits, rows, MLA_V_DIM}, ScalarType::Float);
      partial_lse = torch::stable::new_empty(q, {batch, p.num_splits, rows}, ScalarType::Float);
      p.partial_out = float_data(partial_out), p.partial_lse = float_data(partial_lse);
    }
    const std::string error = launch_mla_decode(p, stream_of(op, q));
    STD_TORCH_CHECK(error.empty(), op, ": backend cuda: ", error);
  }
};

std::tuple<Tensor, Tensor> mla_decode(const Tensor& q, const Tensor& cache, const Tensor& table,
                                      const Tensor& lengths, double softmax_scale, bool causal,
                                      int64_t v_head_dim) {
  const char* op = "mla_decode";
  check_mla(op, q, "cache", cache, v_head_dim);
  const int64_t B = q.size(0), Sq = q.size(1), H = q.size(2);
  Tensor out = torch::stable::new_empty(q, {B, Sq, H, MLA_V_DIM});
  Tensor lse = torch::stable::new_empty(q, {B, H, Sq}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  MlaCall call(op, q, cache, table, softmax_scale, out, lse);
  const int64_t capacity = table.size(1) * cache.size(1);
  call.check_sizes({capacity, cache.size(0), Sq * H});
  call.p.cache_seqlens = int_data(lengths);
  call.p.max_tokens = static_cast<int>(capacity);
  call.p.causal = causal;
  call.run(B, Sq, H);
  return {out, lse};
}

// Sparse attention over a cache of any rank. indices: [B, Sq, topk], topk_length: [B].
void run_sparse(MlaCall& call, const Tensor& indices, const std::optional<Tensor>& topk_length,
                const std::optional<Tensor>& attn_sink, int64_t H) {
  const int64_t B = indices.size(0), Sq = indices.size(1), topk = indices.size(2);
  call.check_sizes({int64_t{call.p.num_pages} * call.p.page_size, topk, B * Sq, H});
  if (topk_length.has_value()) call.p.cache_seqlens = int_data(*topk_length);
  if (attn_sink.has_value()) {
    call.p.attn_sink = static_cast<const float*>(attn_sink->const_data_ptr());
  }
  call.p.table_query_stride = indices.stride(1);
  call.p.queries = static_cast<int>(Sq);
  call.p.max_tokens = static_cast<int>(topk);
  call.p.sparse = true;
  call.run(B * Sq, 1, H);
}

std::tuple<Tensor, Tensor> mla_sparse_decode(const Tensor& q, const Tensor& cache,
                                             const Tensor& indices, double softmax_scale,
                                             const std::optional<Tensor>& topk_length,
                                             const std::optional<Tensor>& attn_sink,
                                             int64_t v_head_dim) {
  const char* op = "mla_sparse_decode";
  check_mla(op, q, "cache", cache, v_head_dim);
  const int64_t B = q.size(0), Sq = q.size(1), H = q.size(2);
  Tensor out = torch::stable::new_empty(q, {B, Sq, H, MLA_V_DIM});
  Tensor lse = torch::stable::new_empty(q, {B, H, Sq}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  MlaCall call(op, q, cache, indices, softmax_scale, out, lse);
  run_sparse(call, indices, topk_length, attn_sink, H);
  return {out, lse};
}

// kv [Skv, 1, 576] is a cache of pages of one token.
std::tuple<Tensor, Tensor, Tensor> mla_sparse_prefill(const Tensor& q, const Tensor& kv,
                                                      const Tensor& indices, double softmax_scale,
                                                      int64_t v_head_dim,
                                                      const std::optional<Tensor>& attn_sink,
                                                      const std::optional<Tensor>& topk_length) {
  const char* op = "mla_sparse_prefill";
  check_mla(op, q, "kv", kv, v_head_dim);
  const int64_t S = q.size(0), H = q.size(1);
  Tensor out = torch::stable::new_empty(q, {S, H, MLA_V_DIM});
  Tensor max_logits = torch::stable::new_empty(q, {S, H}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(q, {S, H}, ScalarType::Float);
  if (lse.numel() == 0) return {out, max_logits, lse};
  MlaCall call(op, q, kv, indices, softmax_scale, out, lse);
  call.p.max_logits = float_data(max_logits);
  run_sparse(call, indices, topk_length, attn_sink, H);
  return {out, max_logits, lse};
}

constexpr int64_t PREFILL_QK_DIM = 192, PREFILL_V_DIM = 128;  // values

// x [rows, heads, dim] for a tensor map of rows that hold all heads: a view, or a copy.
Tensor with_heads_in_rows(const Tensor& x) {
  const int64_t columns = (x.size(1) - 1) * x.stride(1) + x.size(2);
  const bool disjoint = (x.size(1) <= 1 || x.stride(1) >= x.size(2)) &&
                        (x.size(0) <= 1 || x.stride(0) >= columns);
  if (disjoint && columns < INT32_MAX && rows_are_aligned(x)) return x;
  Tensor copy = torch::stable::new_empty(x, x.sizes());
  return torch::stable::copy_(copy, x);
}

// The arguments that mla_prefill and its gradients share, and the tensors that they point into.
struct PrefillCall {
  Tensor q, k, v, tiles;
  MlaPrefillArguments p{};

  PrefillCall(const char* op, const Tensor& queries, const Tensor& keys, const Tensor& values,
              const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double softmax_scale,
              bool causal)
      : q(with_heads_in_rows(queries)),
        k(with_heads_in_rows(keys)),
        v(with_heads_in_rows(values)) {
    STD_TORCH_CHECK(queries.scalar_type() == ScalarType::BFloat16 &&
                        queries.size(2) == PREFILL_QK_DIM && values.size(2) == PREFILL_V_DIM,
                    op, ": q, v: expected, on backend cuda, bfloat16 of widths 192 and 128, got ",
                    torch::headeronly::toString(queries.scalar_type()), " of widths ",
                    queries.size(2), " and ", values.size(2));
    p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
    p.cu_seqlens_q = int_data(cu_seqlens_q), p.cu_seqlens_k = int_data(cu_seqlens_k);
    p.q_row_stride = q.stride(0), p.k_row_stride = k.stride(0), p.v_row_stride = v.stride(0);
    p.q_head_stride = static_cast<int>(q.stride(1));
    p.k_head_stride = static_cast<int>(k.stride(1));
    p.v_head_stride = static_cast<int>(v.stride(1));
    p.softmax_scale_log2 = static_cast<float>(softmax_scale * LOG2_E);
    p.T = static_cast<int>(q.size(0)), p.Tk = static_cast<int>(k.size(0));
    p.H = static_cast<int>(q.size(1));
    p.heads_per_key = k.size(1) > 0 ? static_cast<int>(q.size(1) / k.size(1)) : 1;
    p.num_boundaries = static_cast<int>(cu_seqlens_q.size(0));
    p.causal = causal;
    plan_mla_prefill(p);
    const int64_t items = int64_t{p.num_tiles} * p.H;
    STD_TORCH_CHECK(items < INT32_MAX / 2, op, ": q: expected, on backend cuda, fewer than 2^30 "
                    "tiles of 128 queries and heads, got ", items);
    tiles = torch::stable::new_empty(q, {p.num_tiles, 4}, ScalarType::Int);
    p.tiles = static_cast<int*>(tiles.mutable_data_ptr());
  }
};

std::tuple<Tensor, Tensor> mla_prefill(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                       double softmax_scale, bool causal) {
  const char* op = "mla_prefill";
  PrefillCall call(op, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), PREFILL_V_DIM});
  Tensor lse = torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  call.p.out = out.mutable_data_ptr(), call.p.lse = static_cast<float*>(lse.mutable_data_ptr());
  const std::string error = launch_mla_prefill(call.p, stream_of(op, q));
  STD_TORCH_CHECK(error.empty(), op, ": backend cuda: ", error);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> mla_prefill_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    double softmax_scale, bool causal, const std::optional<Tensor>& grad_lse) {
  const char* op = "mla_prefill_backward";
  PrefillCall call(op, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal);
  Tensor grad_q = torch::stable::new_empty(q, q.sizes());
  Tensor grad_k = torch::stable::new_empty(k, k.sizes());
  Tensor grad_v = torch::stable::new_empty(v, v.sizes());
  if (call.p.H == 0) {
    return {grad_q, torch::stable::new_zeros(k, k.sizes()), torch::stable::new_zeros(v, v.sizes())};
  }
  MlaPrefillBackwardArguments p{};
  p.forward = call.p;
  plan_mla_prefill_backward(p);
  const int64_t key_items = int64_t{p.num_key_tiles} * k.size(1);
  STD_TORCH_CHECK(key_items < INT32_MAX / 2, op, ": k: expected, on backend cuda, fewer than 2^30 "
                  "tiles of 64 keys and heads, got ", key_items);
  const Tensor grads = with_heads_in_rows(grad_out), outs = with_heads_in_rows(out);
  const Tensor lses = torch::stable::contiguous(lse);
  const Tensor grad_lses = torch::stable::contiguous(grad_lse.has_value() ? *grad_lse : lse);
  Tensor delta = torch::stable::new_empty(lse, lse.sizes());
  Tensor key_tiles = torch::stable::new_empty(q, {p.num_key_tiles, 4}, ScalarType::Int);
  p.forward.out = const_cast<void*>(outs.const_data_ptr());
  p.forward.lse = const_cast<float*>(static_cast<const float*>(lses.const_data_ptr()));
  p.grad_out = grads.const_data_ptr();
  if (grad_lse.has_value()) p.grad_lse = static_cast<const float*>(grad_lses.const_data_ptr());
  p.grad_q = grad_q.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  p.delta = static_cast<float*>(delta.mutable_data_ptr());
  p.key_tiles = static_cast<int*>(key_tiles.mutable_data_ptr());
  p.grad_out_row_stride = grads.stride(0), p.out_row_stride = outs.stride(0);
  p.grad_out_head_stride = static_cast<int>(grads.stride(1));
  p.out_head_stride = static_cast<int>(outs.stride(1));
  p.softmax_scale = static_cast<float>(softmax_scale);
  const std::string error = launch_mla_prefill_backward(p, stream_of(op, q));
  STD_TORCH_CHECK(error.empty(), op, ": backend cuda: ", error);
  return {grad_q, grad_k, grad_v};
}

// Tests register the same functions for CPU tensors and run the kernels in the emulator.
#ifndef DEEPKERN_SM90_LIBRARY
#define DEEPKERN_SM90_LIBRARY deepkern_native
#define DEEPKERN_SM90_DEVICE CUDA
#endif
STABLE_TORCH_LIBRARY_IMPL(DEEPKERN_SM90_LIBRARY, DEEPKERN_SM90_DEVICE, m) {
  m.impl("fp8_gemm_nt", TORCH_BOX(&fp8_gemm_nt));
  m.impl("m_grouped_fp8_gemm_nt_contiguous", TORCH_BOX(&contiguous));
  m.impl("m_grouped_fp8_gemm_nt_masked", TORCH_BOX(&masked));
  m.impl("k_grouped_fp8_gemm_nt", TORCH_BOX(&k_grouped));
  m.impl("mla_decode", TORCH_BOX(&mla_decode));
  m.impl("mla_sparse_decode", TORCH_BOX(&mla_sparse_decode));
  m.impl("mla_sparse_prefill", TORCH_BOX(&mla_sparse_prefill));
  m.impl("mla_prefill", TORCH_BOX(&mla_prefill));
  m.impl("mla_prefill_backward", TORCH_BOX(&mla_prefill_backward));
}

}  // namespace
}  // namespace deepkern
