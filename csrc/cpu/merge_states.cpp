// lse = log(exp(lse_a) + exp(lse_b))
// out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b
//
// Backward, with w = exp(lse_a - lse) and grad the gradient of out:
//
// grad_out_a = w * grad        grad_lse_a = w * (grad_lse + (1 - w) * <grad, out_a - out_b>)
//
// and the same with a and b exchanged.
//
// Parallelization: threads take ranges of rows. A row is one head of one query.
//
// Limit: memory bandwidth.
//
// Source: FlashAttention (arXiv 2205.14135), section 3.1: softmax of a concatenation from its
// parts.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "attention_cache.h"
#include "scratch.h"

namespace deepkern {
namespace {

// out [B, S, H, D] and lse [B, H, S] of one attention. Strides in elements.
struct State {
  const char* out;
  Real type;
  int64_t out_batch, out_query, out_head;
  const float* lse;
  int64_t lse_batch, lse_head, lse_query;
};

struct MergeStates {
  State a, b;
  int64_t B, S, H, D;
  char* out;             // [B, S, H, D], contiguous, of a's type; in the forward pass
  float* lse;            // [B, H, S], contiguous
  const char* grad_out;  // [B, S, H, D], contiguous; in the backward pass
  Real grad_type;
  const float* grad_lse;           // [B, H, S], contiguous
  char *grad_out_a, *grad_out_b;   // [B, S, H, D], contiguous
  float *grad_lse_a, *grad_lse_b;  // [B, H, S], contiguous

  int64_t rows() const { return B * S * H; }
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/merge_states.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

// Whether x has `leading` dimensions as `like` has, and then the sizes `last`.
bool has_shape(const Tensor& x, const Tensor& like, int64_t leading,
               std::initializer_list<int64_t> last) {
  if (x.dim() != leading + static_cast<int64_t>(last.size())) return false;
  for (int64_t i = 0; i < leading; ++i) {
    if (x.size(i) != like.size(i)) return false;
  }
  int64_t i = leading;
  for (const int64_t size : last) {
    if (x.size(i++) != size) return false;
  }
  return true;
}

// Checks the four arguments of the forward pass.
MergeStates check_states(const Arguments& arguments, const Tensor& out_a, const Tensor& lse_a,
                         const Tensor& out_b, const Tensor& lse_b) {
  MergeStates m{};
  m.a.type = real_type(arguments.op, "out_a", out_a.scalar_type());
  m.b.type = real_type(arguments.op, "out_b", out_b.scalar_type());
  arguments.require(out_a.dim() >= 3, "out_a", "rank 3 or more");
  const int64_t leading = out_a.dim() - 3;
  m.B = 1;
  for (int64_t i = 0; i < leading; ++i) m.B *= out_a.size(i);
  m.S = out_a.size(leading), m.H = out_a.size(leading + 1), m.D = out_a.size(leading + 2);
  arguments.require(has_shape(out_b, out_a, leading, {m.S, m.H, m.D}), "out_b", "out_a's shape");
  for (const auto& [name, lse] : {std::pair("lse_a", &lse_a), std::pair("lse_b", &lse_b)}) {
    arguments.require(lse->scalar_type() == ScalarType::Float, name, "dtype float32");
    arguments.require(has_shape(*lse, out_a, leading, {m.H, m.S}), name, "shape [..., H, S]");
  }
  for (const auto& [name, x] : {std::pair("out_a", &out_a), std::pair("lse_a", &lse_a),
                                std::pair("out_b", &out_b), std::pair("lse_b", &lse_b)}) {
    arguments.require(x->is_cpu(), name, "a CPU tensor");
  }
  arguments.check_last_stride("out_a", out_a);
  arguments.check_last_stride("out_b", out_b);
  arguments.require(lse_a.numel() <= (int64_t{1} << 31) - 2048, "lse_a",
                    "at most 2**31 - 2048 queries times heads");
  return m;
}

// The tensors with one leading dimension: views, unless the leading dimensions cannot be merged.
struct Flat {
  Tensor out, lse;

  Flat(const MergeStates& m, const Tensor& x, const Tensor& x_lse) : out(x), lse(x_lse) {
    if (x.dim() == 4) return;
    out = torch::stable::reshape(x, {m.B, m.S, m.H, m.D});
    lse = torch::stable::reshape(x_lse, {m.B, m.H, m.S});
  }

  State state(Real type) const {
    return {static_cast<const char*>(out.const_data_ptr()),
            type,
            out.stride(0),
            out.stride(1),
            out.stride(2),
            data<float>(lse),
            lse.stride(0),
            lse.stride(1),
            lse.stride(2)};
  }
};

Tensor new_like(const Tensor& x) {
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  return new_tensor(shape.data(), x.dim(), x.scalar_type());
}

void run_rows(const MergeStates& m, bool backward) {
  const auto run =
      backward ? DEEPKERN_DISPATCH(merge_rows_backward) : DEEPKERN_DISPATCH(merge_rows);
  parallel_ranges(m.rows(), 2 * m.D + 32,
                  [&](int64_t first, int64_t last) { run(m, first, last); });
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a,
                                        const Tensor& out_b, const Tensor& lse_b) {
  MergeStates m = check_states({"merge_states"}, out_a, lse_a, out_b, lse_b);
  Tensor out = new_like(out_a), lse = new_like(lse_a);
  if (m.rows() == 0) return {out, lse};
  const Flat a(m, out_a, lse_a), b(m, out_b, lse_b);
  m.a = a.state(m.a.type);
  m.b = b.state(m.b.type);
  m.out = static_cast<char*>(out.mutable_data_ptr());
  m.lse = mutable_data<float>(lse);
  run_rows(m, false);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_states_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& out_a, const Tensor& lse_a,
    const Tensor& out_b, const Tensor& lse_b) {
  const Arguments arguments{"merge_states_backward"};
  MergeStates m = check_states(arguments, out_a, lse_a, out_b, lse_b);
  m.grad_type = real_type(arguments.op, "grad_out", grad_out.scalar_type());
  const int64_t leading = out_a.dim() - 3;
  arguments.require(has_shape(grad_out, out_a, leading, {m.S, m.H, m.D}), "grad_out",
                    "out_a's shape");
  arguments.require(grad_out.is_cpu() && grad_out.is_contiguous(), "grad_out",
                    "a contiguous CPU tensor");
  arguments.require(grad_lse.scalar_type() == ScalarType::Float, "grad_lse", "dtype float32");
  arguments.require(has_shape(grad_lse, out_a, leading, {m.H, m.S}), "grad_lse",
                    "shape [..., H, S]");
  arguments.require(grad_lse.is_cpu() && grad_lse.is_contiguous(), "grad_lse",
                    "a contiguous CPU tensor");
  Tensor grad_out_a = new_like(out_a), grad_lse_a = new_like(lse_a);
  Tensor grad_out_b = new_like(out_b), grad_lse_b = new_like(lse_b);
  if (m.rows() > 0) {
    const Flat a(m, out_a, lse_a), b(m, out_b, lse_b);
    m.a = a.state(m.a.type);
    m.b = b.state(m.b.type);
    m.grad_out = static_cast<const char*>(grad_out.const_data_ptr());
    m.grad_lse = data<float>(grad_lse);
    m.grad_out_a = static_cast<char*>(grad_out_a.mutable_data_ptr());
    m.grad_out_b = static_cast<char*>(grad_out_b.mutable_data_ptr());
    m.grad_lse_a = mutable_data<float>(grad_lse_a);
    m.grad_lse_b = mutable_data<float>(grad_lse_b);
    run_rows(m, true);
  }
  return {grad_out_a, grad_lse_a, grad_out_b, grad_lse_b};
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("merge_states", TORCH_BOX(&merge_states));
  m.impl("merge_states_backward", TORCH_BOX(&merge_states_backward));
}

}  // namespace
}  // namespace deepkern
#else
#include "attention_tokens.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

void load_row(const void* row, Real type, int64_t count, float* out) {
  const char* from = static_cast<const char*>(row);
  DEEPKERN_FOR_REAL(type, widen_values<type>(from, count, out));
}

void store_row(char* row, Real type, const float* x, int64_t count) {
  DEEPKERN_FOR_REAL(type, store_values<type>(row, x, count));
}

// The weights of both states in a row, and the merged lse. weight_a + weight_b is 1, or 0 without
// keys.
struct Weights {
  float a, b, lse;

  DEEPKERN_INLINE Weights(float lse_a, float lse_b) {
    const float row_max = lse_a > lse_b ? lse_a : lse_b;
    const float finite_max = row_max == -INFINITY ? 0.0f : row_max;
    const float exp_a = exp(broadcast(lse_a - finite_max))[0];
    const float exp_b = exp(broadcast(lse_b - finite_max))[0];
    const float row_sum = exp_a + exp_b, norm = row_sum == 0.0f ? 1.0f : row_sum;
    a = exp_a / norm;
    b = exp_b / norm;
    lse = finite_max + std::log(row_sum);
  }
};

// A row: its lse values, and its values as float32; zero where lse is -inf, and not read there.
struct Row {
  float lse_a, lse_b;
  int64_t lse_index;  // in contiguous [B, H, S]

  Row(const MergeStates& m, int64_t row, float* a, float* b) {
    const int64_t batch = row / (m.S * m.H), query = row / m.H % m.S, head = row % m.H;
    lse_index = (batch * m.H + head) * m.S + query;
    lse_a = load_state(m.a, m.D, batch, query, head, a);
    lse_b = load_state(m.b, m.D, batch, query, head, b);
  }

  static float load_state(const State& s, int64_t D, int64_t batch, int64_t query, int64_t head,
                          float* values) {
    const float lse = s.lse[batch * s.lse_batch + head * s.lse_head + query * s.lse_query];
    if (lse == -INFINITY) {
      std::memset(values, 0, D * sizeof(float));
      return lse;
    }
    const int64_t at = batch * s.out_batch + query * s.out_query + head * s.out_head;
    load_row(s.out + at * size_of(s.type), s.type, D, values);
    return lse;
  }
};

void merge_rows(const MergeStates& m, int64_t first, int64_t last) {
  float* a = thread_scratch(2 * m.D);
  float* __restrict b = a + m.D;
  for (int64_t row = first; row < last; ++row) {
    const Row r(m, row, a, b);
    const Weights weight(r.lse_a, r.lse_b);
    for (int64_t i = 0; i < m.D; ++i) b[i] = weight.a * a[i] + weight.b * b[i];
    store_row(m.out + row * m.D * size_of(m.a.type), m.a.type, b, m.D);
    m.lse[r.lse_index] = weight.lse;
  }
}

// The sum of x * (a - b), in LANES partial sums.
float dot_of_difference(const float* x, const float* a, const float* b, int64_t count) {
  Floats sum = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Floats difference = load_vector<Floats>(a + i) - load_vector<Floats>(b + i);
    sum = fma(load_vector<Floats>(x + i), difference, sum);
  }
  float rest = 0.0f;
  for (; i < count; ++i) rest = rest + x[i] * (a[i] - b[i]);
  return sum_of_lanes(sum) + rest;
}

void merge_rows_backward(const MergeStates& m, int64_t first, int64_t last) {
  float* a = thread_scratch(3 * m.D);
  float* b = a + m.D;
  float* grad = b + m.D;
  for (int64_t row = first; row < last; ++row) {
    const Row r(m, row, a, b);
    const Weights weight(r.lse_a, r.lse_b);
    load_row(m.grad_out + row * m.D * size_of(m.grad_type), m.grad_type, m.D, grad);
    const float dot = dot_of_difference(grad, a, b, m.D), grad_lse = m.grad_lse[r.lse_index];
    for (int64_t i = 0; i < m.D; ++i) {
      a[i] = weight.a * grad[i];
      b[i] = weight.b * grad[i];
    }
    store_row(m.grad_out_a + row * m.D * size_of(m.a.type), m.a.type, a, m.D);
    store_row(m.grad_out_b + row * m.D * size_of(m.b.type), m.b.type, b, m.D);
    m.grad_lse_a[r.lse_index] = weight.a * (grad_lse + weight.b * dot);
    m.grad_lse_b[r.lse_index] = weight.b * (grad_lse - weight.a * dot);
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
