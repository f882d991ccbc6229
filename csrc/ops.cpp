// deepkern._C: native ops, registered through the stable ABI of torch, so that one build works with
// torch 2.11 or newer and Python 3.10 or newer.
//
// The namespace `deepkern_native` has the names of the Python ops: torch.ops.deepkern_native.X on
// CPU tensors is the `cpu` backend of torch.ops.deepkern.X. On CUDA tensors it is the `cuda`
// backend (sm90/ops.cpp), if nvcc compiled csrc/sm90.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/cast_per_token.h"
#include "cpu/fp8_gemm_nt.h"
#include "cpu/topk_indices.h"
#include "python_module.h"

namespace deepkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An uninitialized scale tensor, with one value per row of x and block of K, and its strides. The
// column layout is a view of a buffer with `pitch` floats per block of K, whose padding is zero. A
// group is one matrix [rows, K] of x.
struct ScaleTensor {
  Tensor tensor;
  float* data;
  int64_t rows;               // of a group
  int64_t group, row, block;  // strides in floats
};

ScaleTensor new_scale(const Tensor& x, int64_t M, bool by_column) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t blocks = (shape.back() + 127) / 128;
  shape.back() = blocks;
  if (!by_column || shape.size() == 1) {
    Tensor scale = torch::stable::new_empty(x, shape, ScalarType::Float);
    return {scale, static_cast<float*>(scale.mutable_data_ptr()), M, 0, blocks, 1};
  }
  const auto rank = static_cast<int64_t>(shape.size());
  const int64_t rows = shape[rank - 2];
  const int64_t pitch = (rows + 3) / 4 * 4;
  shape[rank - 2] = blocks;
  shape[rank - 1] = pitch;
  Tensor padded = pitch == rows ? torch::stable::new_empty(x, shape, ScalarType::Float)
                                : torch::stable::new_zeros(x, shape, ScalarType::Float);
  const Tensor columns = torch::stable::narrow(padded, rank - 1, 0, rows);
  return {torch::stable::transpose(columns, rank - 2, rank - 1),
          static_cast<float*>(padded.mutable_data_ptr()), rows, blocks * pitch, 1, pitch};
}

// The Python op checks all arguments. The checks here are those that memory safety needs.
std::tuple<Tensor, Tensor> cast_per_token(const Tensor& x, const std::string& scale_format,
                                          const std::string& scale_layout) {
  STD_TORCH_CHECK(x.dim() >= 1, "cast_per_token: x: expected rank 1 or more, got rank 0");
  const bool ue8m0 = scale_format == "ue8m0";
  STD_TORCH_CHECK(ue8m0 || scale_format == "fp32",
                  "cast_per_token: scale_format: expected fp32 or ue8m0, got ", scale_format);
  const bool by_column = scale_layout == "column";
  STD_TORCH_CHECK(by_column || scale_layout == "row",
                  "cast_per_token: scale_layout: expected row or column, got ", scale_layout);
  const char* isa = cpu_isa();
  STD_TORCH_CHECK(isa != nullptr,
                  "cast_per_token: DEEPKERN_CPU_ISA names an instruction set that this CPU lacks");
  const Real type = real_type("cast_per_token", "x", x.scalar_type());
  const int64_t K = x.size(x.dim() - 1);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);

  Tensor q = torch::stable::new_empty(x, x.sizes(), ScalarType::Float8_e4m3fn);
  const ScaleTensor scale = new_scale(x, M, by_column);
  if (M * K == 0) return {q, scale.tensor};

  const Tensor rows = torch::stable::reshape(x, {M, K});  // a view if the strides allow it
  STD_TORCH_CHECK(K == 1 || rows.stride(1) == 1,
                  "cast_per_token: x: expected stride 1 in the last dimension, got ",
                  rows.stride(1));
  const void* in = rows.const_data_ptr();
  auto* codes = static_cast<uint8_t*>(q.mutable_data_ptr());
  const int64_t stride = rows.stride(0);
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / K);  // about 32K values per task
  torch::stable::parallel_for(0, M, grain, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t group = first / scale.rows;
      const int64_t end = std::min(last, (group + 1) * scale.rows);
      float* start = scale.data + group * (scale.group - scale.rows * scale.row);
      cast_rows(in, type, stride, codes, {start, scale.row, scale.block}, first, end, K, ue8m0,
                isa);
      first = end;
    }
  });
  return {q, scale.tensor};
}

// `x` with stride 1 along K: itself, or a copy. x: e4m3 [rows, K].
Tensor k_contiguous(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "fp8_gemm_nt: ", name, ": expected rank 2, got rank ", x.dim());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float8_e4m3fn, "fp8_gemm_nt: ", name,
                  ": expected dtype float8_e4m3fn, got ", x.scalar_type());
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

// Checks a scale tensor and returns the rows of `x` per scale: 1 or, if allowed, 128.
int64_t rows_per_scale(const char* name, const Tensor& x, const Tensor& scale, bool allow_blocks) {
  const int64_t rows = x.size(0), blocks = blocks_of_k(x.size(1));
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, "fp8_gemm_nt: ", name,
                  ": expected dtype float32, got ", scale.scalar_type());
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(1) == blocks, "fp8_gemm_nt: ", name,
                  ": expected ", blocks, " columns");
  if (scale.size(0) == rows) return 1;
  STD_TORCH_CHECK(allow_blocks && scale.size(0) == (rows + kBlock - 1) / kBlock, "fp8_gemm_nt: ",
                  name, ": expected ", rows, allow_blocks ? " rows or one per 128" : " rows",
                  ", got ", scale.size(0));
  return kBlock;
}

Fp8Matrix fp8_matrix(const Tensor& x, const Tensor& scale, int64_t scale_rows) {
  return {static_cast<const uint8_t*>(x.const_data_ptr()),
          x.size(0),
          x.stride(0),
          static_cast<const float*>(scale.const_data_ptr()),
          scale_rows,
          scale.stride(0),
          scale.stride(1)};
}

// The arguments of the kernel without `out`, checked as far as memory safety needs.
Fp8Gemm fp8_gemm(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                 ScalarType out_dtype, const std::optional<Tensor>& c) {
  const int64_t M = a.size(0), N = b.size(0), K = a.size(1);
  STD_TORCH_CHECK(b.size(1) == K, "fp8_gemm_nt: b: expected ", K, " columns, got ", b.size(1));
  Fp8Gemm gemm{};
  gemm.a = fp8_matrix(a, a_scale, rows_per_scale("a_scale", a, a_scale, false));
  gemm.b = fp8_matrix(b, b_scale, rows_per_scale("b_scale", b, b_scale, true));
  gemm.K = K;
  gemm.out_type = real_type("fp8_gemm_nt", "out_dtype", out_dtype);
  if (!c.has_value()) return gemm;
  STD_TORCH_CHECK(c->dim() == 2 && c->size(0) == M && c->size(1) == N,
                  "fp8_gemm_nt: c: expected shape (", M, ", ", N, ")");
  STD_TORCH_CHECK(N <= 1 || c->stride(1) == 1,
                  "fp8_gemm_nt: c: expected stride 1 in the last dimension, got ", c->stride(1));
  gemm.c = c->const_data_ptr();
  gemm.c_row_stride = c->stride(0);
  gemm.c_type = real_type("fp8_gemm_nt", "c", c->scalar_type());
  return gemm;
}

Tensor fp8_gemm_nt(const Tensor& a_codes, const Tensor& a_scale, const Tensor& b_codes,
                   const Tensor& b_scale, ScalarType out_dtype, const std::optional<Tensor>& c) {
  const Tensor a = k_contiguous("a", a_codes), b = k_contiguous("b", b_codes);
  Fp8Gemm gemm = fp8_gemm(a, a_scale, b, b_scale, out_dtype, c);
  const char* cpu = cpu_isa();
  STD_TORCH_CHECK(cpu != nullptr,
                  "fp8_gemm_nt: DEEPKERN_CPU_ISA names an instruction set that this CPU lacks");
  const Fp8GemmIsa& isa = fp8_gemm_isa(cpu);
  const int64_t M = gemm.a.rows, N = gemm.b.rows;
  Tensor out = torch::stable::new_empty(a, {M, N}, out_dtype);
  if (M * N == 0) return out;
  gemm.out = out.mutable_data_ptr();

  const int64_t blocks = blocks_of_k(gemm.K), strips = (N + STRIP_COLUMNS - 1) / STRIP_COLUMNS;
  for (int64_t first = 0; first < M; first += Fp8GemmRows::MAX_ROWS) {
    const int64_t count = std::min(M - first, Fp8GemmRows::MAX_ROWS);
    Fp8GemmRows rows(gemm, isa, first, first + count);
    // The least work of a task: 2^16 values to widen, 2^18 multiplications.
    const int64_t min_blocks = (1 << 16) / (kBlock * count);
    const int64_t min_strips = (1 << 18) / (STRIP_COLUMNS * (gemm.K + 1) * count);
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, min_blocks),
                                [&](int64_t from, int64_t to) { rows.widen(from, to); });
    torch::stable::parallel_for(0, strips, std::max<int64_t>(1, min_strips),
                                [&](int64_t from, int64_t to) { rows.multiply(from, to); });
  }
  return out;
}

Tensor topk_indices(const Tensor& logits, int64_t k, const std::optional<Tensor>& lengths) {
  STD_TORCH_CHECK(logits.dim() == 2, "topk_indices: logits: expected rank 2, got rank ",
                  logits.dim());
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "topk_indices: logits: expected dtype float32 or bfloat16, got ", dtype);
  const int64_t S = logits.size(0), N = logits.size(1);
  STD_TORCH_CHECK(k >= 0, "topk_indices: k: expected 0 or more, got ", k);
  STD_TORCH_CHECK(N <= (int64_t{1} << 30), "topk_indices: logits: expected rows of at most 2^30");
  STD_TORCH_CHECK(N <= 1 || logits.stride(1) == 1,
                  "topk_indices: logits: expected stride 1 in the last dimension, got ",
                  logits.stride(1));
  const char* isa = cpu_isa();
  STD_TORCH_CHECK(isa != nullptr,
                  "topk_indices: DEEPKERN_CPU_ISA names an instruction set that this CPU lacks");
  TopkRows rows{};
  if (lengths.has_value()) {
    STD_TORCH_CHECK(lengths->dim() == 1 && lengths->size(0) == S,
                    "topk_indices: lengths: expected shape (", S, ")");
    STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Int,
                    "topk_indices: lengths: expected dtype int32, got ", lengths->scalar_type());
    rows.lengths = static_cast<const int32_t*>(lengths->const_data_ptr());
    rows.length_stride = lengths->stride(0);
  }
  Tensor out = torch::stable::new_empty(logits, {S, k}, ScalarType::Int);
  if (S * k == 0) return out;
  rows.logits = logits.const_data_ptr();
  rows.type = dtype == ScalarType::Float ? Real::fp32 : Real::bf16;
  rows.row_stride = logits.stride(0);
  rows.N = N;
  rows.k = k;
  rows.out = static_cast<int32_t*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / (N + 1));  // about 32K values per task
  torch::stable::parallel_for(0, S, grain, [&](int64_t first, int64_t last) {
    topk_rows(rows, first, last, isa);
  });
  return out;
}

STABLE_TORCH_LIBRARY(deepkern_native, m) {
  m.def(
      "cast_per_token(Tensor x, str scale_format, str scale_layout=\"row\") -> (Tensor, Tensor)");
  m.def(
      "fp8_gemm_nt(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType out_dtype, "
      "Tensor? c) -> Tensor");
  m.def(
      "m_grouped_fp8_gemm_nt_contiguous(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, "
      "Tensor group_index, ScalarType out_dtype) -> Tensor");
  m.def(
      "m_grouped_fp8_gemm_nt_masked(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, "
      "Tensor masked_m, ScalarType out_dtype, int? expected_m) -> Tensor");
  m.def(
      "k_grouped_fp8_gemm_nt(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, "
      "Tensor group_offsets, Tensor? c) -> Tensor");
  m.def(
      "mla_decode(Tensor q, Tensor cache, Tensor block_table, Tensor cache_seqlens, "
      "float softmax_scale, bool causal, int v_head_dim) -> (Tensor, Tensor)");
  m.def("topk_indices(Tensor logits, int k, Tensor? lengths=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("cast_per_token", TORCH_BOX(&cast_per_token));
  m.impl("fp8_gemm_nt", TORCH_BOX(&fp8_gemm_nt));
  m.impl("topk_indices", TORCH_BOX(&topk_indices));
}

}  // namespace
}  // namespace deepkern

DEEPKERN_EMPTY_PYTHON_MODULE(_C)
