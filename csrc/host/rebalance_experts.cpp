// Places the replicas of one layer's experts: DeepSeek's EPLB, then a local search from its result.
//
// A pool is a set of experts and the GPUs they are placed on: those of one node, or all GPUs. EPLB
// gives each spare slot to the expert with the largest load per replica. Then it packs the
// replicas, largest first, each on the least loaded GPU with a free slot. The search repeatedly
// takes the most loaded GPU and looks for a step after which every GPU that the step changes has
// less load than that GPU had:
//   swap      exchange one or two of its replicas for smaller ones of another GPU
//   reassign  give one more replica to an expert of this GPU, in a slot of an expert that has
//             several; or give a slot of this GPU, of such an expert, to an expert with little load
//   repack    change two replica counts and pack all replicas again; tried only a few times
// No step raises the largest load of a GPU, so the result is never worse than EPLB's.
//
// Limit: the CPU time of the search, which MAX_WORK bounds per pool. Layers run in parallel.
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

constexpr double MIN_GAIN = 1 - 1e-9;      // a step must gain more than the rounding error
constexpr double DONE_RATIO = 1 + 5e-4;    // load / target at which the search ends
constexpr double REPACK_RATIO = 1 + 5e-3;  // load / target from which on repacking is tried
constexpr int MAX_REPACKS = 16;            // of a pool
constexpr int64_t MAX_WORK = 1 << 23;      // sums evaluated before the search of a pool ends

// Packs items, largest first, each into the lightest bin that has room; ties go to the lower index.
// Returns the items bin by bin, within a bin in the order in which they were packed.
template <typename Real>
std::vector<int> pack(const std::vector<Real>& weight, int bins) {
  const int items = static_cast<int>(weight.size()), room = items / bins;
  std::vector<int> packed(items);
  if (room == 1) {
    std::iota(packed.begin(), packed.end(), 0);
    return packed;
  }
  using Weighed = std::pair<Real, int>;  // weight, index
  std::vector<Weighed> order(items), open(bins);  // open: bins with room, lightest first
  for (int i = 0; i < items; ++i) order[i] = {-weight[i], i};
  std::sort(order.begin(), order.end());
  for (int b = 0; b < bins; ++b) open[b] = {0, b};
  std::vector<int> count(bins, 0);  // items of each bin
  auto lightest = open.begin();
  for (const auto& [negative, item] : order) {
    const Weighed filled{lightest->first - negative, lightest->second};
    packed[filled.second * room + count[filled.second]] = item;
    if (++count[filled.second] == room) {
      ++lightest;
      continue;
    }
    auto place = lightest;  // keeps `open` sorted
    for (; place + 1 != open.end() && place[1] < filled; ++place) *place = place[1];
    *place = filled;
  }
  return packed;
}

// The experts of a pool, numbered from 0, and the slots of their replicas. GPU g has the slots from
// g * slots on.
class Pool {
 public:
  Pool(std::vector<double> load, int gpus, int slots)
      : load_(std::move(load)), replica_load_(load_), gpus_(gpus), slots_(slots) {
    // EPLB's own placement, bit for bit: float32 and EPLB's order.
    const std::vector<float> weight(load_.begin(), load_.end());
    std::vector<int> expert = replicate(weight);
    std::vector<float> replica_load(expert.size());
    for (size_t r = 0; r < expert.size(); ++r)
      replica_load[r] = weight[expert[r]] / count_[expert[r]];
    place(expert, pack(replica_load, gpus_));
    // The most loaded GPU has at least the load of the largest replica and at least the mean load.
    bound_ = *std::max_element(replica_load_.begin(), replica_load_.end());
    bound_ = std::max(bound_, std::accumulate(load_.begin(), load_.end(), 0.0) / gpus_);
  }

  const std::vector<int>& expert_at() const { return expert_at_; }
  double bound() const { return bound_; }
  double max_load() const { return gpu_load_[most_loaded_gpu()]; }

  // Lowers the largest GPU load as far as the search can, or to about `target`.
  void refine(double target) {
    int64_t work = MAX_WORK;
    int repacks_left = MAX_REPACKS;
    while (work > 0) {
      const int busiest = most_loaded_gpu();
      if (gpu_load_[busiest] <= target * DONE_RATIO) return;
      work -= int64_t{2} * gpus_ * slots_ * slots_;
      if (swap(busiest) || reassign(busiest)) continue;
      work -= int64_t{1} * gpus_ * slots_ * slots_ * slots_ * slots_ / 4;
      if (work > 0 && swap_pairs(busiest)) continue;
      if (gpu_load_[busiest] <= target * REPACK_RATIO) return;
      if (!repack(busiest, target, &repacks_left)) return;
    }
  }

  // Swaps single replicas only, so each expert keeps its number of replicas.
  void swap_all(double target) {
    for (int64_t work = MAX_WORK; work > 0; work -= int64_t{1} * gpus_ * slots_ * slots_) {
      const int busiest = most_loaded_gpu();
      if (gpu_load_[busiest] <= target * DONE_RATIO || !swap(busiest)) return;
    }
  }

 private:
  int most_loaded_gpu() const {
    const auto largest = std::max_element(gpu_load_.begin(), gpu_load_.end());
    return static_cast<int>(largest - gpu_load_.begin());
  }

  // The expert of each replica: first one replica per expert, then the spare ones in the order in
  // which EPLB assigns them.
  std::vector<int> replicate(const std::vector<float>& weight) {
    count_.assign(weight.size(), 1);
    std::vector<int> expert(weight.size());
    std::iota(expert.begin(), expert.end(), 0);
    using Load = std::pair<float, int>;  // load per replica, expert
    auto less = [](const Load& a, const Load& b) {  // ties: the lower expert is the larger
      return a.first != b.first ? a.first < b.first : a.second > b.second;
    };
    std::vector<Load> one_each(weight.size());
    for (int e : expert) one_each[e] = {weight[e], e};
    std::priority_queue<Load, std::vector<Load>, decltype(less)> largest(less,
                                                                         std::move(one_each));
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
    update_loads();
  }

  void update_loads() {
    for (size_t e = 0; e < load_.size(); ++e) replica_load_[e] = load_[e] / count_[e];
    gpu_load_.resize(gpus_);
    for (int g = 0; g < gpus_; ++g) update_gpu_load(g);
  }

  void update_gpu_load(int gpu) {
    gpu_load_[gpu] = 0;
    for (int s = gpu * slots_; s < (gpu + 1) * slots_; ++s)
      gpu_load_[gpu] += replica_load_[expert_at_[s]];
  }

  bool swap(int busiest) {
    double best = gpu_load_[busiest] * MIN_GAIN;
    int from = -1, to = -1;
    for (int g = 0; g < gpus_; ++g) {
      // Even if the step made both loads equal it would be no gain.
      if (gpu_load_[busiest] + gpu_load_[g] >= 2 * best) continue;
      for (int s = busiest * slots_; s < (busiest + 1) * slots_; ++s) {
        const double replica = replica_load_[expert_at_[s]];
        for (int t = g * slots_; t < (g + 1) * slots_; ++t) {
          const double moved = replica - replica_load_[expert_at_[t]];
          const double larger = std::max(gpu_load_[busiest] - moved, gpu_load_[g] + moved);
          if (larger < best) best = larger, from = s, to = t;
        }
      }
    }
    if (from < 0) return false;
    std::swap(expert_at_[from], expert_at_[to]);
    update_gpu_load(busiest), update_gpu_load(to / slots_);
    return true;
  }

  bool swap_pairs(int busiest) {
    double best = gpu_load_[busiest] * MIN_GAIN;
    int from[2], to[2], other = -1;
    for (int g = 0; g < gpus_; ++g) {
      if (gpu_load_[busiest] + gpu_load_[g] >= 2 * best) continue;
      for (int i = busiest * slots_; i < (busiest + 1) * slots_; ++i) {
        for (int j = busiest * slots_; j < i; ++j) {
          const double pair_load = replica_load_[expert_at_[i]] + replica_load_[expert_at_[j]];
          for (int k = g * slots_; k < (g + 1) * slots_; ++k) {
            for (int l = g * slots_; l < k; ++l) {
              const double moved =
                  pair_load - replica_load_[expert_at_[k]] - replica_load_[expert_at_[l]];
              const double larger = std::max(gpu_load_[busiest] - moved, gpu_load_[g] + moved);
              if (larger >= best) continue;
              best = larger, other = g;
              from[0] = i, from[1] = j, to[0] = k, to[1] = l;
            }
          }
        }
      }
    }
    if (other < 0) return false;
    for (int i : {0, 1}) std::swap(expert_at_[from[i]], expert_at_[to[i]]);
    update_gpu_load(busiest), update_gpu_load(other);
    return true;
  }

  bool reassign(int busiest) {
    // first_ and next_: the list of each expert's slots.
    first_.assign(load_.size(), -1);
    next_.resize(expert_at_.size());
    for (int s = gpus_ * slots_ - 1; s >= 0; --s)
      next_[s] = std::exchange(first_[expert_at_[s]], s);
    double best = gpu_load_[busiest] * MIN_GAIN;
    int to = -1, gainer = -1;
    auto consider = [&](int expert, int t) {
      if (expert_at_[t] == expert || count_[expert_at_[t]] < 2) return;
      const double worst = worst_after_reassign(expert, t, busiest, best);
      if (worst < best) best = worst, to = t, gainer = expert;
    };
    const std::array<int, 2> light = lightest_replicas();
    for (int s = busiest * slots_; s < (busiest + 1) * slots_; ++s) {
      for (int t = 0; t < gpus_ * slots_; ++t) consider(expert_at_[s], t);
      consider(light[expert_at_[s] == light[0]], s);
    }
    if (to < 0) return false;
    const int loser = std::exchange(expert_at_[to], gainer);
    replica_load_[gainer] = load_[gainer] / ++count_[gainer];
    replica_load_[loser] = load_[loser] / --count_[loser];
    for (int e : {gainer, loser})
      for (int u = first_[e]; u >= 0; u = next_[u]) update_gpu_load(u / slots_);
    return true;
  }

  // The two experts with the smallest load per replica if they had one more replica.
  std::array<int, 2> lightest_replicas() const {
    std::array<int, 2> light{0, 0};
    std::array<double, 2> smallest;
    smallest.fill(std::numeric_limits<double>::infinity());
    for (int e = 0; e < static_cast<int>(load_.size()); ++e) {
      const double one_more = load_[e] / (count_[e] + 1);
      if (one_more < smallest[0]) {
        smallest = {one_more, smallest[0]}, light = {e, light[0]};
      } else if (one_more < smallest[1]) {
        smallest[1] = one_more, light[1] = e;
      }
    }
    return light;
  }

  // The largest load, of `busiest` and the GPUs with replicas of the loser, if slot t goes from its
  // expert (the loser) to expert `gainer`. The load of other GPUs does not rise. Stops early with a
  // value >= stop.
  double worst_after_reassign(int gainer, int t, int busiest, double stop) const {
    const int loser = expert_at_[t];
    const double gainer_load = load_[gainer] / (count_[gainer] + 1);
    const double loser_load = load_[loser] / (count_[loser] - 1);
    auto sum_after = [&](int g) {
      double sum = 0;
      for (int s = g * slots_; s < (g + 1) * slots_; ++s) {
        const int e = s == t ? gainer : expert_at_[s];
        sum += e == gainer ? gainer_load : e == loser ? loser_load : replica_load_[e];
      }
      return sum;
    };
    double worst = sum_after(busiest);
    for (int u = first_[loser]; u >= 0 && worst < stop; u = next_[u])
      worst = std::max(worst, sum_after(u / slots_));
    return worst;
  }

  bool repack(int busiest, double target, int* left) {
    const auto count = count_, expert_at = expert_at_;
    const auto replica_load = replica_load_;
    const double limit = gpu_load_[busiest] * MIN_GAIN;
    auto largest_first = [&](int a, int b) {
      return replica_load[a] != replica_load[b] ? replica_load[a] > replica_load[b] : a < b;
    };
    std::vector<int> gainers(&expert_at[busiest * slots_], &expert_at[busiest * slots_] + slots_);
    std::sort(gainers.begin(), gainers.end(), largest_first);
    gainers.erase(std::unique(gainers.begin(), gainers.end()), gainers.end());
    std::vector<std::pair<double, int>> losers;  // smallest load per remaining replica first
    for (int e = 0; e < static_cast<int>(load_.size()); ++e)
      if (count[e] > 1) losers.push_back({load_[e] / (count[e] - 1), e});
    std::sort(losers.begin(), losers.end());
    losers.resize(std::min<size_t>(losers.size(), 4));
    for (int gainer : gainers) {
      for (const auto& [load_left, loser] : losers) {
        if (loser == gainer || load_left >= limit || *left == 0) continue;
        --*left;
        ++count_[gainer], --count_[loser];
        pack_all();
        swap_all(target);
        if (max_load() < limit) return true;
        count_ = count;
      }
    }
    expert_at_ = expert_at;
    update_loads();
    return false;
  }

  void pack_all() {
    std::vector<int> expert;
    std::vector<double> replica_load;
    for (size_t e = 0; e < load_.size(); ++e) {
      expert.insert(expert.end(), count_[e], static_cast<int>(e));
      replica_load.insert(replica_load.end(), count_[e], load_[e] / count_[e]);
    }
    place(expert, pack(replica_load, gpus_));
  }

  std::vector<double> load_;          // [experts], of all replicas of an expert
  std::vector<double> replica_load_;  // [experts], of one replica
  int gpus_, slots_;                  // slots of one GPU
  std::vector<int> count_;            // [experts], replicas
  std::vector<int> expert_at_;        // [gpus * slots]
  std::vector<double> gpu_load_;      // [gpus]
  double bound_;                      // a lower bound of the largest GPU load
  // For reassign() only: the first slot of an expert or -1 [experts], and for each slot the next
  // slot of the same expert or -1 [gpus * slots].
  std::vector<int> first_, next_;
};

struct Plan {
  std::vector<std::vector<int>> experts;  // experts of each node
  std::vector<Pool> pools;
  double max_load = 0;
};

// The plan in which each node gets an equal part of `groups`, in their order.
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
    std::vector<double> node_load(experts.size());
    for (size_t e = 0; e < experts.size(); ++e) node_load[e] = load[experts[e]];
    plan.pools.emplace_back(std::move(node_load), c.gpus / nodes, c.replicas / c.gpus);
    least = std::max(least, plan.pools.back().bound());
  }
  // Start with the node of the largest lower bound: the others need not go below its load.
  std::vector<int> order(nodes);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return plan.pools[a].bound() > plan.pools[b].bound();
  });
  for (int n : order) {
    plan.pools[n].refine(std::max(least, plan.max_load));
    plan.max_load = std::max(plan.max_load, plan.pools[n].max_load());
  }
  return plan;
}

}  // namespace

void place_experts(const double* load, const Cluster& c, int64_t* phy2log) {
  const int groups = c.hierarchical() ? c.groups : 1, nodes = c.hierarchical() ? c.nodes : 1;
  // Scale the loads by a power of two, which is exact, so that neither float32 nor a sum overflows.
  int exponent = 0;
  std::frexp(*std::max_element(load, load + c.experts), &exponent);
  std::vector<double> scaled(c.experts), group_load(groups, 0);
  // Two factors, since their product may overflow a double.
  const double half = std::ldexp(1.0, -exponent / 2);
  const double rest = std::ldexp(1.0, exponent / 2 - exponent);
  for (int g = 0, e = 0; g < groups; ++g) {
    for (const int end = e + c.experts / groups; e < end; ++e) {
      scaled[e] = load[e] * half * rest;
      group_load[g] += static_cast<float>(scaled[e]);
    }
  }
  const std::vector<float> group_weight(group_load.begin(), group_load.end());
  Plan plan = plan_nodes(scaled, c, pack(group_weight, nodes), nodes);

  // With three or more groups per node, swaps of groups may balance the nodes further.
  if (groups / nodes > 2 && nodes > 1) {
    Pool node(group_load, nodes, groups / nodes);
    node.swap_all(0);
    Plan other = plan_nodes(scaled, c, node.expert_at(), nodes);
    if (other.max_load < plan.max_load) plan = std::move(other);
  }

  const int slots = c.replicas / c.gpus;
  for (int n = 0; n < nodes; ++n)
    for (int e : plan.pools[n].expert_at()) *phy2log++ = plan.experts[n][e];
  for (int64_t* gpu = phy2log - c.replicas; gpu < phy2log; gpu += slots)
    std::sort(gpu, gpu + slots);
}

}  // namespace deepkern
