// f[b, e] = E / (topk · S) · #{(t, j): topk_idx[b, t, j] = e}
// P[b, e] = 1 / S · Σ_t s[b, t, e] / Σ_i s[b, t, i]               s = score(logits)
// loss    = alpha / B · Σ_b Σ_e f[b, e] · P[b, e]
//
// Parallelization: threads take ranges of chunks of 32 tokens, and write a chunk's sums of s / Σ s.
// One thread adds the sums in order, in float64. The backward pass needs the counts alone; threads
// take ranges of tokens.
//
// Limit: the arithmetic of the scores.
//
// Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2, equations 17 to 20.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <string>
#include <vector>

#include "expert_rows.h"
#include "routing.h"

namespace deepkern {
namespace {

struct BalanceLoss {
  static constexpr int64_t CHUNK = 32;  // tokens

  const void* logits;  // [B, S, E]
  Real type;
  int64_t sequence_stride, token_stride;  // elements
  Score score;
  int64_t B, S, E, topk;
  double factor;          // of count · Σ s / Σ s in the loss; backward, times its gradient
  const int32_t* counts;  // [B, E], assignments of each sequence to each expert
  float* sums;            // [B, chunks(), E], written; unused in the backward pass
  void* grad_logits;      // [B, S, E], contiguous, written; unused in the forward pass

  int64_t chunks() const { return ceil_div(S, CHUNK); }  // per sequence
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/sequence_balance_loss.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

// Checks logits and topk_idx. Counts the assignments unless there is no token, expert or slot.
BalanceLoss check_loss(const Arguments& arguments, const Tensor& logits, const Tensor& topk_idx,
                       const std::string& score, double alpha, std::vector<int32_t>& counts) {
  const Real type = arguments.check_real("logits", logits, {-1, -1, -1});
  const int64_t B = logits.size(0), S = logits.size(1), E = logits.size(2);
  const bool is_int64 = topk_idx.scalar_type() == ScalarType::Long;
  arguments.check("topk_idx", topk_idx, is_int64 ? ScalarType::Long : ScalarType::Int, {B, S, -1});
  const int64_t topk = topk_idx.size(2);
  BalanceLoss loss{};
  loss.logits = logits.const_data_ptr();
  loss.type = type;
  loss.sequence_stride = logits.stride(0), loss.token_stride = logits.stride(1);
  loss.score = score_of(arguments.op, score);
  loss.B = B, loss.S = S, loss.E = E, loss.topk = topk;
  if (B * S * E * topk == 0) return loss;
  const auto tokens = static_cast<double>(S);
  loss.factor = alpha * static_cast<double>(E) / (static_cast<double>(B * topk) * tokens * tokens);
  counts.resize(B * E);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t offset = b * topk_idx.stride(0) * (is_int64 ? 8 : 4);
    count_assignments(data<char>(topk_idx) + offset, is_int64, topk_idx.stride(1), S, topk, E,
                      counts.data() + b * E);
  }
  loss.counts = counts.data();
  return loss;
}

double add_chunks(const BalanceLoss& loss) {
  double total_loss = 0.0;
  for (int64_t b = 0; b < loss.B; ++b) {
    for (int64_t e = 0; e < loss.E; ++e) {
      double sum = 0.0;
      for (int64_t i = 0; i < loss.chunks(); ++i) {
        sum += loss.sums[(b * loss.chunks() + i) * loss.E + e];
      }
      total_loss += sum * loss.counts[b * loss.E + e];
    }
  }
  return total_loss * loss.factor;
}

Tensor sequence_balance_loss(const Tensor& logits, const Tensor& topk_idx, const std::string& score,
                             double alpha) {
  const Arguments arguments{"sequence_balance_loss"};
  std::vector<int32_t> counts;
  BalanceLoss loss = check_loss(arguments, logits, topk_idx, score, alpha, counts);
  Tensor out = new_tensor({}, ScalarType::Float);
  float* result = mutable_data<float>(out);
  *result = 0.0f;
  if (counts.empty()) return out;
  std::vector<float> sums(loss.B * loss.chunks() * loss.E);
  loss.sums = sums.data();
  const auto sum_chunks = DEEPKERN_DISPATCH(sum_chunks);
  parallel_ranges(loss.B * loss.chunks(), BalanceLoss::CHUNK * loss.E * 8,
                  [&](int64_t first, int64_t last) { sum_chunks(loss, first, last); });
  *result = static_cast<float>(add_chunks(loss));
  return out;
}

Tensor sequence_balance_loss_backward(const Tensor& grad, const Tensor& logits,
                                      const Tensor& topk_idx, const std::string& score,
                                      double alpha) {
  const Arguments arguments{"sequence_balance_loss_backward"};
  arguments.check("grad", grad, ScalarType::Float, {1}, false);
  std::vector<int32_t> counts;
  BalanceLoss loss = check_loss(arguments, logits, topk_idx, score, alpha, counts);
  Tensor grad_logits = new_tensor(logits.sizes().data(), logits.dim(), logits.scalar_type());
  if (counts.empty()) return torch::stable::zero_(grad_logits);
  loss.factor *= *data<float>(grad);
  loss.grad_logits = grad_logits.mutable_data_ptr();
  const auto backward_tokens = DEEPKERN_DISPATCH(backward_tokens);
  parallel_ranges(loss.B * loss.S, 8 * loss.E,
                  [&](int64_t first, int64_t last) { backward_tokens(loss, first, last); });
  return grad_logits;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("sequence_balance_loss", TORCH_BOX(&sequence_balance_loss));
  m.impl("sequence_balance_loss_backward", TORCH_BOX(&sequence_balance_loss_backward));
}

}  // namespace
}  // namespace deepkern
#else
#include "arithmetic.h"
#include "cast_block.h"
#include "real_blocks.h"
#include "score.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

// Writes the logits and the scores of a token, padded; returns the sum of the scores.
double score_token(const BalanceLoss& loss, int64_t b, int64_t t, float* x, float* s) {
  const int64_t padded = padded_experts(loss.E);
  const int64_t offset = b * loss.sequence_stride + t * loss.token_stride;
  load_logits(loss.logits, loss.type, offset, loss.E, padded, x);
  score_row(loss.score, x, padded, s);
  double sum = 0.0;
  for (int64_t e = 0; e < loss.E; ++e) sum += s[e];
  return sum;
}

void sum_chunks(const BalanceLoss& loss, int64_t first, int64_t last) {
  const int64_t padded = padded_experts(loss.E);
  std::vector<float> x(padded), s(padded);
  for (int64_t i = first; i < last; ++i) {
    const int64_t b = i / loss.chunks(), start = i % loss.chunks() * BalanceLoss::CHUNK;
    float* sums = loss.sums + i * loss.E;
    std::fill_n(sums, loss.E, 0.0f);
    for (int64_t t = start; t < std::min(loss.S, start + BalanceLoss::CHUNK); ++t) {
      const auto inverse = static_cast<float>(1.0 / score_token(loss, b, t, x.data(), s.data()));
      for (int64_t e = 0; e < loss.E; ++e) sums[e] += s[e] * inverse;
    }
  }
}

// Through s / Σ s, then through s; the sum of a softmax is constant.
void token_gradient(const BalanceLoss& loss, const int32_t* counts, const float* x, const float* s,
                    double sum, float* out) {
  double product = 0.0;
  for (int64_t e = 0; e < loss.E; ++e) product += loss.factor * counts[e] * s[e];
  const double mean = product / sum;
  for (int64_t e = 0; e < loss.E; ++e) {
    out[e] = static_cast<float>((loss.factor * counts[e] - mean) / sum);
  }
  const int64_t padded = padded_experts(loss.E);
  for (int64_t e = 0; e < padded; e += LANES) {
    const Floats logit = load_vector<Floats>(x + e), score = load_vector<Floats>(s + e);
    Floats g = load_vector<Floats>(out + e);
    if (loss.score == Score::softmax) {
      g = g * score;
    } else if (loss.score == Score::sigmoid) {
      g = g * score * exact_sigmoid(-logit);
    } else {
      g = score > 0.0f ? g * exact_sigmoid(logit) / (2.0f * score) : Floats{};
    }
    store_vector(out + e, g);
  }
}

void backward_tokens(const BalanceLoss& loss, int64_t first, int64_t last) {
  const int64_t padded = padded_experts(loss.E);
  std::vector<float> x(padded), s(padded), out(padded);
  for (int64_t i = first; i < last; ++i) {
    const int64_t b = i / loss.S;
    const double sum = score_token(loss, b, i % loss.S, x.data(), s.data());
    token_gradient(loss, loss.counts + b * loss.E, x.data(), s.data(), sum, out.data());
    for (int64_t e = 0; e < loss.E; e += 128) {
      store_real_block(loss.grad_logits, loss.type, i * loss.E + e,
                       std::min<int64_t>(128, loss.E - e), out.data() + e);
    }
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
