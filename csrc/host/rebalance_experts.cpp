// Where the replicas of one layer's experts go: DeepSeek's EPLB, then a search from there.
//
// A pool is a set of experts that share a set of GPUs: those of a node, or all of them. EPLB gives
// each spare slot to the expert with the largest load per replica, then packs replicas, largest
// first, each on the least loaded GPU that has room. The search takes the fullest GPU, again and
// again, and looks for a step after which all GPUs concerned hold less than it held:
//   swap     one of its replicas, or two, against smaller ones of another GPU
//   recount  a slot of an expert with several replicas goes to one of its experts, or a slot of its
//            own, of such an expert, to one with little load
//   repack   a recount that pays only if all replicas are packed anew; a few are tried
// No step raises the fullest GPU, so what comes out is never worse than what EPLB gives.
//
// Source of the policy: https://github.com/deepseek-ai/EPLB.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>
#include <utility>

#include "placement.h"

namespace deepkern {
namespace {

constexpr double kGain = 1 - 1e-9;   // a step lowers the fullest GPU by more than rounding does
constexpr double kNear = 1 + 5e-4;   // this near to the bound, the search ends
constexpr double kFar = 1 + 5e-3;    // only as far from it are replicas packed anew
constexpr int kRepacks = 16;         // so often at most is a pool packed anew
constexpr int64_t kWork = 1 << 23;   // sums to look at before the search of a pool ends anyway

// Items, largest first, each into the lightest of `bins` that has room; ties to the lower index.
// Returns the items bin by bin, in each in the order in which they came.
template <typename Real>
std::vector<int> pack(const std::vector<Real>& weight, int bins) {
  const int items = static_cast<int>(weight.size()), room = items / bins;
  std::vector<int> packed(items);
  if (room == 1) {
    std::iota(packed.begin(), packed.end(), 0);
    return packed;
  }
  using Weighed = std::pair<Real, int>;
  std::vector<Weighed> order(items), open(bins);  // open: bins with room, the lightest first
  for (int i = 0; i < items; ++i) order[i] = {-weight[i], i};
  std::sort(order.begin(), order.end());
  for (int b = 0; b < bins; ++b) open[b] = {0, b};
  std::vector<int> used(bins, 0);
  auto lightest = open.begin();
  for (const auto& [negative, item] : order) {
    const Weighed filled{lightest->first - negative, lightest->second};
    packed[filled.second * room + used[filled.second]] = item;
    if (++used[filled.second] == room) {
      ++lightest;
      continue;
    }
    auto at = lightest;
    for (; at + 1 != open.end() && at[1] < filled; ++at) *at = at[1];
    *at = filled;
  }
  return packed;
}

// Experts, numbered from 0, and where their replicas stand: slots g * slots ... of GPU g.
class Pool {
 public:
  Pool(std::vector<double> load, int gpus, int slots)
      : load_(std::move(load)), share_(load_), gpus_(gpus), slots_(slots) {
    // In float32 and in EPLB's order, so that the search starts from EPLB's own placement.
    const std::vector<float> weight(load_.begin(), load_.end());
    std::vector<int> expert = replicate(weight);
    std::vector<float> share(expert.size());
    for (size_t r = 0; r < expert.size(); ++r) share[r] = weight[expert[r]] / count_[expert[r]];
    place(expert, pack(share, gpus_));
    // No replica can be smaller than the largest of these, and no GPU smaller than their mean.
    bound_ = *std::max_element(share_.begin(), share_.end());
    bound_ = std::max(bound_, std::accumulate(load_.begin(), load_.end(), 0.0) / gpus_);
  }

  const std::vector<int>& expert_at() const { return expert_at_; }
  double bound() const { return bound_; }
  double fullest() const { return held_[fullest_gpu()]; }

  // Lowers the fullest GPU as far as it goes, or until it holds no more than about `enough`.
  void refine(double enough) {
    int64_t work = kWork;
    int repacks = kRepacks;
    while (work > 0) {
      const int full = fullest_gpu();
      if (held_[full] <= enough * kNear) return;
      work -= int64_t{2} * gpus_ * slots_ * slots_;
      if (swap(full) || recount(full)) continue;
      work -= int64_t{1} * gpus_ * slots_ * slots_ * slots_ * slots_ / 4;
      if (work > 0 && swap_pairs(full)) continue;
      if (held_[full] <= enough * kFar || !repack(full, enough, &repacks)) return;
    }
  }

  // Swaps of one replica alone: every expert keeps its count.
  void swap_all(double enough) {
    for (int64_t work = kWork; work > 0; work -= int64_t{1} * gpus_ * slots_ * slots_) {
      const int full = fullest_gpu();
      if (held_[full] <= enough * kNear || !swap(full)) return;
    }
  }

 private:
  int fullest_gpu() const {
    return static_cast<int>(std::max_element(held_.begin(), held_.end()) - held_.begin());
  }

  // The expert of each replica: each one's first, then the spare ones as they are given.
  std::vector<int> replicate(const std::vector<float>& weight) {
    count_.assign(weight.size(), 1);
    std::vector<int> expert(weight.size());
    std::iota(expert.begin(), expert.end(), 0);
    using Share = std::pair<float, int>;  // largest first, ties to the lower expert
    auto after = [](const Share& a, const Share& b) {
      return a.first != b.first ? a.first < b.first : a.second > b.second;
    };
    std::vector<Share> one_each(weight.size());
    for (int e : expert) one_each[e] = {weight[e], e};
    std::priority_queue<Share, std::vector<Share>, decltype(after)> largest(
        after, std::move(one_each));
    expert.reserve(gpus_ * slots_);
    while (static_cast<int>(expert.size()) < gpus_ * slots_) {
      const int e = largest.top().second;
      largest.pop();
      expert.push_back(e);
      largest.push({weight[e] / ++count_[e], e});
    }
    return expert;
  }

  void place(const std::vector<int>& expert, const std::vector<int>& packed) {
    expert_at_.resize(expert.size());
    for (size_t s = 0; s < expert.size(); ++s) expert_at_[s] = expert[packed[s]];
    weigh_all();
  }

  void weigh_all() {
    for (size_t e = 0; e < load_.size(); ++e) share_[e] = load_[e] / count_[e];
    held_.resize(gpus_);
    for (int g = 0; g < gpus_; ++g) weigh(g);
  }

  void weigh(int gpu) {
    held_[gpu] = 0;
    for (int s = gpu * slots_; s < (gpu + 1) * slots_; ++s) held_[gpu] += share_[expert_at_[s]];
  }

  bool swap(int full) {
    double best = held_[full] * kGain;
    int from = -1, to = -1;
    for (int g = 0; g < gpus_; ++g) {
      if (held_[full] + held_[g] >= 2 * best) continue;  // not even if they end up alike
      for (int s = full * slots_; s < (full + 1) * slots_; ++s) {
        const double mine = share_[expert_at_[s]];
        for (int t = g * slots_; t < (g + 1) * slots_; ++t) {
          const double moved = mine - share_[expert_at_[t]];
          const double worse = std::max(held_[full] - moved, held_[g] + moved);
          if (worse < best) best = worse, from = s, to = t;
        }
      }
    }
    if (from < 0) return false;
    std::swap(expert_at_[from], expert_at_[to]);
    weigh(full), weigh(to / slots_);
    return true;
  }

  bool swap_pairs(int full) {
    double best = held_[full] * kGain;
    int from[2], to[2], other = -1;
    for (int g = 0; g < gpus_; ++g) {
      if (held_[full] + held_[g] >= 2 * best) continue;
      for (int i = full * slots_; i < (full + 1) * slots_; ++i) {
        for (int j = full * slots_; j < i; ++j) {
          const double ours = share_[expert_at_[i]] + share_[expert_at_[j]];
          for (int k = g * slots_; k < (g + 1) * slots_; ++k) {
            for (int l = g * slots_; l < k; ++l) {
              const double moved = ours - share_[expert_at_[k]] - share_[expert_at_[l]];
              const double worse = std::max(held_[full] - moved, held_[g] + moved);
              if (worse >= best) continue;
              best = worse, other = g;
              from[0] = i, from[1] = j, to[0] = k, to[1] = l;
            }
          }
        }
      }
    }
    if (other < 0) return false;
    for (int i : {0, 1}) std::swap(expert_at_[from[i]], expert_at_[to[i]]);
    weigh(full), weigh(other);
    return true;
  }

  bool recount(int full) {
    first_.assign(load_.size(), -1);
    next_.resize(expert_at_.size());
    for (int s = gpus_ * slots_ - 1; s >= 0; --s)
      next_[s] = std::exchange(first_[expert_at_[s]], s);
    double best = held_[full] * kGain;
    int to = -1, taker = -1;
    auto consider = [&](int expert, int t) {
      if (expert_at_[t] == expert || count_[expert_at_[t]] < 2) return;
      const double worst = worst_after_recount(expert, t, full, best);
      if (worst < best) best = worst, to = t, taker = expert;
    };
    const std::array<int, 2> light = lightest_replicas();
    for (int s = full * slots_; s < (full + 1) * slots_; ++s) {
      for (int t = 0; t < gpus_ * slots_; ++t) consider(expert_at_[s], t);
      consider(light[expert_at_[s] == light[0]], s);
    }
    if (to < 0) return false;
    const int giver = std::exchange(expert_at_[to], taker);
    share_[taker] = load_[taker] / ++count_[taker];
    share_[giver] = load_[giver] / --count_[giver];
    for (int e : {taker, giver})
      for (int u = first_[e]; u >= 0; u = next_[u]) weigh(u / slots_);
    return true;
  }

  // The two experts whose replicas would be the smallest if they had one more.
  std::array<int, 2> lightest_replicas() const {
    std::array<int, 2> light{0, 0};
    std::array<double, 2> share;
    share.fill(std::numeric_limits<double>::infinity());
    for (int e = 0; e < static_cast<int>(load_.size()); ++e) {
      const double one_more = load_[e] / (count_[e] + 1);
      if (one_more < share[0]) {
        share = {one_more, share[0]}, light = {e, light[0]};
      } else if (one_more < share[1]) {
        share[1] = one_more, light[1] = e;
      }
    }
    return light;
  }

  // What the GPU that is fullest then, of `full` and those with replicas of the giver, holds if slot
  // t goes to expert `taker`; other GPUs hold no more than before. Anything >= stop if that is out.
  double worst_after_recount(int taker, int t, int full, double stop) const {
    const int giver = expert_at_[t];
    const double taker_share = load_[taker] / (count_[taker] + 1);
    const double giver_share = load_[giver] / (count_[giver] - 1);
    auto sum_after = [&](int g) {
      double sum = 0;
      for (int s = g * slots_; s < (g + 1) * slots_; ++s) {
        const int e = s == t ? taker : expert_at_[s];
        sum += e == taker ? taker_share : e == giver ? giver_share : share_[e];
      }
      return sum;
    };
    double worst = sum_after(full);
    for (int u = first_[giver]; u >= 0 && worst < stop; u = next_[u])
      worst = std::max(worst, sum_after(u / slots_));
    return worst;
  }

  bool repack(int full, double enough, int* left) {
    const auto count = count_, expert_at = expert_at_;
    const auto share = share_;
    const double limit = held_[full] * kGain;
    auto largest_first = [&](int a, int b) {
      return share[a] != share[b] ? share[a] > share[b] : a < b;
    };
    std::vector<int> takers(&expert_at[full * slots_], &expert_at[full * slots_] + slots_);
    std::sort(takers.begin(), takers.end(), largest_first);
    takers.erase(std::unique(takers.begin(), takers.end()), takers.end());
    std::vector<std::pair<double, int>> givers;  // those first whose replicas stay the smallest
    for (int e = 0; e < static_cast<int>(load_.size()); ++e)
      if (count[e] > 1) givers.push_back({load_[e] / (count[e] - 1), e});
    std::sort(givers.begin(), givers.end());
    givers.resize(std::min<size_t>(givers.size(), 4));
    for (int taker : takers) {
      for (const auto& [share_left, giver] : givers) {
        if (giver == taker || share_left >= limit || *left == 0) continue;
        --*left;
        ++count_[taker], --count_[giver];
        pack_anew();
        swap_all(enough);
        if (fullest() < limit) return true;
        count_ = count;
      }
    }
    expert_at_ = expert_at;
    weigh_all();
    return false;
  }

  void pack_anew() {
    std::vector<int> expert;
    std::vector<double> share;
    for (size_t e = 0; e < load_.size(); ++e) {
      expert.insert(expert.end(), count_[e], static_cast<int>(e));
      share.insert(share.end(), count_[e], load_[e] / count_[e]);
    }
    place(expert, pack(share, gpus_));
  }

  std::vector<double> load_, share_;  // [experts]: of all, and of one of its replicas
  int gpus_, slots_;                  // slots of one GPU
  std::vector<int> count_;            // [experts]
  std::vector<int> expert_at_;        // [gpus * slots]
  std::vector<double> held_;          // [gpus]
  double bound_;                      // what the fullest GPU holds at least
  // For recount alone: an expert's first slot or -1 [experts], and the next slot of a slot's expert.
  std::vector<int> first_, next_;
};

struct Plan {
  std::vector<std::vector<int>> experts;  // of each node
  std::vector<Pool> pools;
  double fullest = 0;
};

// The best that is found when the nodes get equal parts of `groups`, in its order.
Plan plan_nodes(const std::vector<double>& load, const Cluster& c, const std::vector<int>& groups,
                int nodes) {
  const size_t size = c.experts / groups.size(), groups_per_node = groups.size() / nodes;
  Plan plan;
  plan.experts.resize(nodes);
  for (size_t g = 0; g < groups.size(); ++g)
    for (size_t e = 0; e < size; ++e)
      plan.experts[g / groups_per_node].push_back(static_cast<int>(groups[g] * size + e));
  plan.pools.reserve(nodes);
  double least = 0;
  for (const auto& experts : plan.experts) {
    std::vector<double> mine(experts.size());
    for (size_t e = 0; e < experts.size(); ++e) mine[e] = load[experts[e]];
    plan.pools.emplace_back(std::move(mine), c.gpus / nodes, c.replicas / c.gpus);
    least = std::max(least, plan.pools.back().bound());
  }
  // The node that no search can bring below `least` first: the others need not get below it.
  std::vector<int> order(nodes);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return plan.pools[a].bound() > plan.pools[b].bound();
  });
  for (int n : order) {
    plan.pools[n].refine(std::max(least, plan.fullest));
    plan.fullest = std::max(plan.fullest, plan.pools[n].fullest());
  }
  return plan;
}

}  // namespace

void place_experts(const double* load, const Cluster& c, int64_t* phy2log) {
  const int groups = c.hierarchical() ? c.groups : 1, nodes = c.hierarchical() ? c.nodes : 1;
  // By a power of two, which changes no digit, to where neither float32 nor a sum overflows.
  int exponent = 0;
  std::frexp(*std::max_element(load, load + c.experts), &exponent);
  std::vector<double> scaled(c.experts), group_load(groups, 0);
  // In two factors, as the whole one may be too large for a double.
  const double half = std::ldexp(1.0, -exponent / 2), rest = std::ldexp(1.0, exponent / 2 - exponent);
  for (int g = 0, e = 0; g < groups; ++g) {
    for (const int end = e + c.experts / groups; e < end; ++e) {
      scaled[e] = load[e] * half * rest;
      group_load[g] += static_cast<float>(scaled[e]);
    }
  }
  const std::vector<float> group_weight(group_load.begin(), group_load.end());
  Plan plan = plan_nodes(scaled, c, pack(group_weight, nodes), nodes);

  // With three groups or more to a node, swaps of groups may even out the nodes further.
  if (groups / nodes > 2 && nodes > 1) {
    Pool node(group_load, nodes, groups / nodes);
    node.swap_all(0);
    Plan other = plan_nodes(scaled, c, node.expert_at(), nodes);
    if (other.fullest < plan.fullest) plan = std::move(other);
  }

  const int slots = c.replicas / c.gpus;
  for (int n = 0; n < nodes; ++n)
    for (int e : plan.pools[n].expert_at()) *phy2log++ = plan.experts[n][e];
  for (int64_t* gpu = phy2log - c.replicas; gpu < phy2log; gpu += slots)
    std::sort(gpu, gpu + slots);
}

}  // namespace deepkern
