// s[t, e] = sigmoid(logits[t, e]), or softmax over e, or sqrt(softplus(logits[t, e]))
// idx[t]  = the topk experts with the largest s + bias, among the topk_groups best groups
// weights[t, j] = scale · s[t, idx[t, j]] / Σ_i s[t, idx[t, i]]        (or without the quotient)
//
// Parallelization: threads take ranges of tokens. A biased score becomes an int32 key in the order
// of the scores. The keys of the experts in the best groups are packed in ascending order of the
// experts, and topk maxima are taken one after the other; the first of equal keys wins.
//
// Limit: the arithmetic of scores and maxima.
//
// score.h computes the scores with the bits of the reference.
//
// Backward: the gradient of the chosen scores, topk numbers per token, is computed in float64. It
// goes to all logits for softmax and to those of the chosen experts otherwise.
//
// Source: DeepSeek-V2 (arXiv 2405.04434), section 2.2.2; DeepSeek-V3 (arXiv 2412.19437), section
// 2.1.2, and the released inference code, which adds 1e-20 to the sum of the weights.
#ifndef DEEPKERN_ISA
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "routing.h"

namespace deepkern {
namespace {

struct RouteTopk {
  RealRows logits;   // [T, E]
  const void* bias;  // [E], or null
  Real bias_type;
  int64_t E, topk, num_groups, topk_groups;
  Score score;
  bool top2;  // a group's score is the sum of its two best scores, otherwise the best
  bool normalize;
  float scale;
  float* weights;  // [T, topk]
  int64_t* idx;    // [T, topk]
};

struct RouteTopkBackward {
  RealRows grad_weights;  // [T, topk]
  RealRows logits;        // [T, E]
  const int64_t* idx;     // [T, topk]
  int64_t idx_stride;
  int64_t E, topk;
  Score score;
  bool normalize;
  double scale;
  void* grad_logits;  // [T, E] in the dtype of logits, contiguous
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/route_topk.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

void check_routing(const Arguments& arguments, int64_t E, int64_t topk, int64_t num_groups,
                   int64_t topk_groups) {
  arguments.require(num_groups >= 1 && E % num_groups == 0, "num_groups", "a divisor of E");
  arguments.require(topk_groups >= 1 && topk_groups <= num_groups, "topk_groups",
                    "1 to num_groups");
  arguments.require(topk >= 1 && topk <= topk_groups * (E / num_groups), "topk",
                    "1 to the experts in topk_groups groups");
}

std::tuple<Tensor, Tensor> route_topk(const Tensor& logits, const std::optional<Tensor>& bias,
                                      int64_t topk, int64_t num_groups, int64_t topk_groups,
                                      const std::string& score, const std::string& group_score,
                                      bool normalize, double scale) {
  const Arguments arguments{"route_topk"};
  const Real type = arguments.check_real("logits", logits, {-1, -1});
  const int64_t T = logits.size(0), E = logits.size(1);
  RouteTopk route{};
  if (bias.has_value()) {
    route.bias_type = arguments.check_real("bias", *bias, {E});
    route.bias = bias->const_data_ptr();
  }
  route.score = score_of("route_topk", score);
  route.top2 = arguments.choose("group_score", group_score, "top2", "max");
  check_routing(arguments, E, topk, num_groups, topk_groups);
  Tensor weights = new_tensor({T, topk}, ScalarType::Float);
  Tensor idx = new_tensor({T, topk}, ScalarType::Long);
  route.logits = {logits.const_data_ptr(), type, logits.stride(0)};
  route.E = E, route.topk = topk, route.num_groups = num_groups, route.topk_groups = topk_groups;
  route.normalize = normalize;
  route.scale = static_cast<float>(scale);
  route.weights = mutable_data<float>(weights);
  route.idx = mutable_data<int64_t>(idx);
  const auto route_tokens = DEEPKERN_DISPATCH(route_tokens);
  parallel_ranges(T, 8 * E, [&](int64_t first, int64_t last) { route_tokens(route, first, last); });
  return {weights, idx};
}

Tensor route_topk_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& idx,
                           const std::string& score, bool normalize, double scale) {
  const Arguments arguments{"route_topk_backward"};
  const Real grad_type = arguments.check_real("grad_weights", grad_weights, {-1, -1});
  const int64_t T = grad_weights.size(0), topk = grad_weights.size(1);
  const Real type = arguments.check_real("logits", logits, {T, -1});
  arguments.check("idx", idx, ScalarType::Long, {T, topk});
  const Score score_type = score_of("route_topk_backward", score);
  const int64_t E = logits.size(1);
  Tensor grad_logits = new_tensor({T, E}, logits.scalar_type());
  const RouteTopkBackward backward{
      {grad_weights.const_data_ptr(), grad_type, grad_weights.stride(0)},
      {logits.const_data_ptr(), type, logits.stride(0)},
      data<int64_t>(idx),
      idx.stride(0),
      E,
      topk,
      score_type,
      normalize,
      scale,
      grad_logits.mutable_data_ptr()};
  const auto backward_tokens = DEEPKERN_DISPATCH(backward_tokens);
  if (E == 0) return grad_logits;
  parallel_ranges(T, 4 * E,
                  [&](int64_t first, int64_t last) { backward_tokens(backward, first, last); });
  return grad_logits;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) {
  m.impl("route_topk", TORCH_BOX(&route_topk));
  m.impl("route_topk_backward", TORCH_BOX(&route_topk_backward));
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

constexpr int32_t LOWEST_KEY = std::numeric_limits<int32_t>::min();  // less than that of -inf

// The bits of a float as an int32 in the order of the floats; its own inverse.
DEEPKERN_INLINE Ints flip_negative(Ints bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }
DEEPKERN_INLINE int32_t flip_negative(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

DEEPKERN_INLINE int32_t key_of(float score) {
  return flip_negative(as_bits(score == score ? score : -INFINITY));
}

// The index of the largest key, the lowest one of equal keys. count: a multiple of LANES.
DEEPKERN_INLINE int64_t find_largest(const int32_t* key, int64_t count) {
  Ints largest = broadcast_int(LOWEST_KEY), index = lane_index(), lane = lane_index();
  for (int64_t i = 0; i < count; i += LANES, lane += LANES) {
    const Ints k = load_vector<Ints>(key + i), better = k > largest;
    largest = better ? k : largest;
    index = better ? lane : index;
  }
  int32_t keys[LANES], indices[LANES];
  store_vector(keys, largest);
  store_vector(indices, index);
  int best = 0;
  for (int i = 1; i < LANES; ++i) {
    const bool better =
        keys[i] > keys[best] || (keys[i] == keys[best] && indices[i] < indices[best]);
    best = better ? i : best;
  }
  return indices[best];
}

// The scratch of a thread.
struct Routing {
  std::vector<float> x, s, biased, bias, chosen;
  std::vector<int32_t> key, packed, group_key;
  std::vector<int32_t> expert;  // of each packed key

  explicit Routing(const RouteTopk& r)
      : x(padded_experts(r.E)),
        s(x.size()),
        biased(x.size()),
        bias(x.size()),
        chosen(r.topk),
        key(x.size()),
        packed(x.size()),
        group_key(padded_experts(r.num_groups)),
        expert(x.size()) {}
};

// The rank of a group of `size` keys.
int32_t group_key(const RouteTopk& r, const int32_t* key, int64_t size) {
  int32_t best = LOWEST_KEY, second = LOWEST_KEY;
  for (int64_t i = 0; i < size; ++i) {
    second = std::max(second, std::min(best, key[i]));
    best = std::max(best, key[i]);
  }
  if (!r.top2 || size == 1) return best;
  return key_of(as_float(flip_negative(best)) + as_float(flip_negative(second)));
}

// Packs the keys of the experts in the best groups; returns their number, padded.
int64_t pack_groups(const RouteTopk& r, Routing& w) {
  const int64_t size = r.E / r.num_groups;
  for (int64_t g = 0; g < r.num_groups; ++g) {
    w.group_key[g] = group_key(r, w.key.data() + g * size, size);
  }
  std::fill(w.group_key.begin() + r.num_groups, w.group_key.end(), LOWEST_KEY);
  for (int64_t i = 0; i < r.topk_groups; ++i) {
    w.group_key[find_largest(w.group_key.data(), w.group_key.size())] = LOWEST_KEY;
  }
  int64_t count = 0;
  for (int64_t g = 0; g < r.num_groups; ++g) {
    if (w.group_key[g] != LOWEST_KEY) continue;
    for (int64_t e = g * size; e < (g + 1) * size; ++e, ++count) {
      w.packed[count] = w.key[e];
      w.expert[count] = static_cast<int32_t>(e);
    }
  }
  const int64_t padded = padded_experts(count);
  std::fill(w.packed.begin() + count, w.packed.begin() + padded, LOWEST_KEY);
  return padded;
}

// Writes the scores of token t, and the keys of its biased scores; whether one is NaN.
bool score_token(const RouteTopk& r, int64_t t, Routing& w) {
  const int64_t padded = padded_experts(r.E);
  load_logits(r.logits.data, r.logits.type, t * r.logits.stride, r.E, padded, w.x.data());
  score_row(r.score, w.x.data(), padded, w.s.data());
  Ints nan = {};
  for (int64_t e = 0; e < padded; e += LANES) {
    Floats biased = load_vector<Floats>(w.s.data() + e);
    if (r.bias != nullptr) biased += load_vector<Floats>(w.bias.data() + e);
    const Ints is_nan = biased != biased;
    nan |= e + LANES <= r.E ? is_nan : is_nan & (lane_index() < static_cast<int32_t>(r.E - e));
    const Ints key = flip_negative(bits_of(is_nan ? broadcast(-INFINITY) : biased));
    store_vector(w.key.data() + e, key);
  }
  for (int64_t e = r.E; e < padded; ++e) w.key[e] = LOWEST_KEY;
  return largest_lane(nan & 1) != 0;
}

void write_weights(const RouteTopk& r, int64_t t, bool has_nan, Routing& w) {
  float* weights = r.weights + t * r.topk;
  const int64_t* idx = r.idx + t * r.topk;
  for (int64_t j = 0; j < r.topk; ++j) weights[j] = w.chosen[j] = w.s[idx[j]];
  const float sum = r.normalize ? sum_pairwise(w.chosen.data(), r.topk) + 1e-20f : 1.0f;
  for (int64_t j = 0; j < r.topk; ++j) {
    const float weight = r.normalize ? weights[j] / sum : weights[j];
    weights[j] = has_nan ? as_float(0x7FC00000) : weight * r.scale;
  }
}

void route_tokens(const RouteTopk& r, int64_t first, int64_t last) {
  Routing w(r);
  if (r.bias != nullptr) {
    load_logits(r.bias, r.bias_type, 0, r.E, padded_experts(r.E), w.bias.data());
  }
  for (int64_t t = first; t < last; ++t) {
    const bool has_nan = score_token(r, t, w);
    const bool all_groups = r.topk_groups == r.num_groups;
    const int64_t count = all_groups ? padded_experts(r.E) : pack_groups(r, w);
    int32_t* key = all_groups ? w.key.data() : w.packed.data();
    for (int64_t j = 0; j < r.topk; ++j) {
      const int64_t i = find_largest(key, count);
      key[i] = LOWEST_KEY;
      r.idx[t * r.topk + j] = all_groups ? i : w.expert[i];
    }
    write_weights(r, t, has_nan, w);
  }
}

// Backward.

double exact_score(Score score, double x) {
  if (score == Score::sigmoid) return 1.0 / (1.0 + std::exp(-x));
  return std::sqrt(x > 20.0 ? x : std::log1p(std::exp(x)));
}

// The gradient of a logit x, given that of its score s; not for softmax.
double pointwise_gradient(Score score, double grad, double x, double s) {
  if (score == Score::sigmoid) return grad * s / (1.0 + std::exp(x));
  return s > 0.0 ? grad / (1.0 + std::exp(-x)) / (2.0 * s) : 0.0;
}

// The gradient of each slot's score, 0 for an invalid index.
void slot_gradients(const RouteTopkBackward& b, int64_t t, const double* s, double* grad) {
  const int64_t* idx = b.idx + t * b.idx_stride;
  double sum = 1e-20, product = 0.0;
  for (int64_t j = 0; j < b.topk; ++j) {
    grad[j] = 0.0;
    if (idx[j] < 0 || idx[j] >= b.E) continue;
    grad[j] = load_real(b.grad_weights.data, b.grad_weights.type, t * b.grad_weights.stride + j);
    grad[j] *= b.scale;
    sum += s[j];
    product += grad[j] * s[j];
  }
  if (!b.normalize) return;
  for (int64_t j = 0; j < b.topk; ++j) {
    if (idx[j] >= 0 && idx[j] < b.E) grad[j] = (grad[j] - product / sum) / sum;
  }
}

// grad_x = s * (grad - Σ grad * s): for experts that were not chosen, grad is 0.
void softmax_gradient(const RouteTopkBackward& b, int64_t t, const float* s, double* chosen,
                      double* grad, float* out) {
  const int64_t* idx = b.idx + t * b.idx_stride;
  for (int64_t j = 0; j < b.topk; ++j) {
    const bool valid = idx[j] >= 0 && idx[j] < b.E;
    chosen[j] = valid ? static_cast<double>(s[idx[j]]) : 0.0;
  }
  slot_gradients(b, t, chosen, grad);
  double dot = 0.0;
  for (int64_t j = 0; j < b.topk; ++j) dot += grad[j] * chosen[j];
  for (int64_t e = 0; e < b.E; ++e) out[e] = static_cast<float>(-dot);
  // A sum of the gradients of all slots that chose the expert, then the product with its score.
  for (int64_t j = 0; j < b.topk; ++j) {
    if (idx[j] >= 0 && idx[j] < b.E) out[idx[j]] += static_cast<float>(grad[j]);
  }
  for (int64_t e = 0; e < b.E; ++e) out[e] *= s[e];
}

void pointwise_gradients(const RouteTopkBackward& b, int64_t t, const float* x, double* chosen,
                         double* grad, float* out) {
  const int64_t* idx = b.idx + t * b.idx_stride;
  for (int64_t j = 0; j < b.topk; ++j) {
    const bool valid = idx[j] >= 0 && idx[j] < b.E;
    chosen[j] = valid ? exact_score(b.score, x[idx[j]]) : 0.0;
  }
  slot_gradients(b, t, chosen, grad);
  for (int64_t e = 0; e < b.E; ++e) {
    out[e] = b.score == Score::sigmoid && x[e] != x[e] ? x[e] : 0.0f;  // 0 * NaN
  }
  for (int64_t j = 0; j < b.topk; ++j) {
    if (idx[j] < 0 || idx[j] >= b.E) continue;
    const int64_t e = idx[j];
    out[e] += static_cast<float>(pointwise_gradient(b.score, grad[j], x[e], chosen[j]));
  }
}

void backward_tokens(const RouteTopkBackward& b, int64_t first, int64_t last) {
  const int64_t padded = padded_experts(b.E);
  std::vector<float> x(padded), s(padded), out(padded);
  std::vector<double> chosen(b.topk), grad(b.topk);
  for (int64_t t = first; t < last; ++t) {
    load_logits(b.logits.data, b.logits.type, t * b.logits.stride, b.E, padded, x.data());
    if (b.score == Score::softmax) {
      softmax_row(x.data(), padded, s.data());
      softmax_gradient(b, t, s.data(), chosen.data(), grad.data(), out.data());
    } else {
      pointwise_gradients(b, t, x.data(), chosen.data(), grad.data(), out.data());
    }
    for (int64_t e = 0; e < b.E; e += 128) {
      store_real_block(b.grad_logits, b.logits.type, t * b.E + e, std::min<int64_t>(128, b.E - e),
                       out.data() + e);
    }
  }
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
